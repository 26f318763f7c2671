//! The rules of the code that a compiler does not check: who may know what, which words may not stand in a file, which licences may come
//! in. A new rule costs one line. Reads files and `cargo metadata`; never builds or changes anything.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

const LINES_MAX: usize = 600;

/// Licences that may be linked. All are permissive but MPL-2.0, which binds changes of its own files only, and we change none.
const LICENCES: [&str; 15] = [
    "MIT",
    "Apache-2.0",
    "Apache-2.0 WITH LLVM-exception",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "0BSD",
    "ISC",
    "Zlib",
    "Unicode-3.0",
    "CC0-1.0",
    "BSL-1.0",
    "Unlicense",
    "MIT-0",
    "CDLA-Permissive-2.0",
    "MPL-2.0",
];

/// Crates that name a licence file instead of a licence, read by hand: cfg_block is under Apache-2.0.
const READ_BY_HAND: [&str; 1] = ["cfg_block"];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("tests/ lies in the workspace").to_owned()
}

/// Every tracked Rust file with its text, by path from the root.
fn sources() -> Vec<(String, String)> {
    let mut found = Vec::new();
    let mut folders: Vec<PathBuf> =
        ["protocol", "coordinator", "node", "jobs", "cli", "tests"].map(|name| root().join(name)).into();
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).expect("read source folder") {
            let path = entry.expect("read source folder").path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let name = path.strip_prefix(root()).expect("below the root").to_string_lossy().into_owned();
                found.push((name, fs::read_to_string(&path).expect("read source file")));
            }
        }
    }
    found.sort();
    found
}

/// The part of a file before its unit tests.
fn code(text: &str) -> &str {
    text.split("#[cfg(test)]\nmod ").next().unwrap_or(text)
}

/// Lines of code (no comments) that contain `word`, as `path:line`.
fn uses(files: &[(String, String)], word: &str, allowed: impl Fn(&str) -> bool) -> Vec<String> {
    let mut hits = Vec::new();
    for (path, text) in files.iter().filter(|(path, _)| !allowed(path)) {
        for (number, line) in code(text).lines().enumerate() {
            if line.contains(word) && !line.trim_start().starts_with("//") {
                hits.push(format!("{path}:{}: {}", number + 1, line.trim()));
            }
        }
    }
    hits
}

fn none(rule: &str, hits: Vec<String>) {
    assert!(hits.is_empty(), "{rule}:\n  {}", hits.join("\n  "));
}

fn metadata() -> serde_json::Value {
    let output = Command::new(env!("CARGO"))
        .args([
            "metadata",
            "--format-version",
            "1",
            "--locked",
            "--offline",
            "--filter-platform",
            "x86_64-unknown-linux-gnu",
        ])
        .current_dir(root())
        .output()
        .expect("run cargo metadata");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).expect("cargo metadata prints JSON")
}

#[test]
fn one_file_knows_the_codec_and_one_module_knows_quic() {
    let files = sources();
    none(
        "only codec.rs knows bincode",
        uses(&files, "bincode::", |path| path == "protocol/src/codec.rs" || path == "tests/tidy.rs"),
    );
    let transport = |path: &str| path.starts_with("protocol/src/transport") || path.starts_with("tests/");
    none("only the transport module knows quinn", uses(&files, "quinn::", transport));
}

#[test]
fn only_actors_know_ractor() {
    let files: Vec<_> = sources().into_iter().filter(|(path, _)| path.starts_with("coordinator/")).collect();
    none("only actors/ know ractor", uses(&files, "ractor::", |path| path.starts_with("coordinator/src/actors/")));
}

#[test]
fn state_is_pure() {
    let state: Vec<_> =
        sources().into_iter().filter(|(path, _)| path.contains("/state/") || path.ends_with("/state.rs")).collect();
    assert!(!state.is_empty(), "there is a state/ folder");
    for word in [
        "HashMap",
        "HashSet",
        "SystemTime",
        "Instant::now",
        "rand::",
        "tokio::",
        "quinn::",
        "ractor::",
        "std::fs",
        "std::net::Udp",
        "async fn",
        "std::thread",
        "println!",
    ] {
        none(&format!("state/ does not know {word}"), uses(&state, word, |_| false));
    }
}

#[test]
fn files_are_finished() {
    let files = sources();
    let tidy = |path: &str| path == "tests/tidy.rs";
    for word in ["todo!(", "unimplemented!(", "dbg!(", "#[ignore", "TODO", "FIXME", "XXX"] {
        none(&format!("{word} stands in no file"), uses(&files, word, tidy));
    }
    for (path, text) in &files {
        assert!(text.starts_with("//!"), "{path} starts with a header that says what it owns");
        let lines = code(text).lines().count();
        assert!(lines <= LINES_MAX, "{path} has {lines} lines before its tests, the limit is {LINES_MAX}");
        assert!(tidy(path) || !text.contains("fn test_"), "{path}: names of tests are facts, without a prefix");
    }
}

#[test]
fn crates_depend_one_way() {
    let metadata = metadata();
    let forbidden = [
        ("stoke-protocol", &["burn", "ractor", "redb", "stoke-coordinator", "stoke-node", "stoke-jobs"][..]),
        ("stoke-coordinator", &["burn", "stoke-jobs", "stoke-node", "quinn", "bincode"]),
        ("stoke-jobs", &["tokio", "quinn", "ractor", "bincode", "stoke-protocol"]),
        ("stoke-node", &["burn", "quinn", "bincode", "redb", "stoke-coordinator"]),
        ("stoke-cli", &["burn", "quinn", "bincode", "ractor", "redb"]),
    ];
    for package in metadata["packages"].as_array().expect("packages") {
        let Some((name, absent)) = forbidden.iter().find(|(name, _)| package["name"] == *name) else { continue };
        for dependency in package["dependencies"].as_array().expect("dependencies") {
            let dependency = dependency["name"].as_str().expect("a name");
            assert!(!absent.contains(&dependency), "{name} must not depend on {dependency}");
        }
    }
}

#[test]
fn dependencies_come_from_the_registry_under_known_licences() {
    let known: BTreeSet<&str> = LICENCES.into();
    let mut refused = Vec::new();
    for package in metadata()["packages"].as_array().expect("packages") {
        let name = format!(
            "{} {}",
            package["name"].as_str().unwrap_or_default(),
            package["version"].as_str().unwrap_or_default()
        );
        let Some(source) = package["source"].as_str() else { continue };
        if !source.starts_with("registry+") {
            refused.push(format!("{name} comes from {source}"));
        }
        let licence = package["license"].as_str().unwrap_or("none");
        // "A OR B" needs one known; "A AND B" needs all; the old "A/B" means OR.
        let by_hand = package["name"].as_str().is_some_and(|name| READ_BY_HAND.contains(&name));
        let allowed = by_hand
            || licence.replace('/', " OR ").split(" OR ").any(|choice| {
                choice
                    .split(" AND ")
                    .all(|part| known.contains(part.trim_matches(|c| c == '(' || c == ')' || c == ' ')))
            });
        if !allowed {
            refused.push(format!("{name} is under {licence}"));
        }
    }
    none("dependencies are from the registry under known licences", refused);
}
