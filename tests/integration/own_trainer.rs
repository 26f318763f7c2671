//! Trainers of users' own: docs/own-trainer.md is followed word by word, from an empty folder, through a killed rank, to the same bits; and programs that are
//! no ranks are refused where they are found out.

use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use stoke_protocol::codec::PROTOCOL_VERSION;
use tempfile::TempDir;

use crate::harness::{Cluster, binary, root, stoke, text};

/// A cold build of Burn on a busy machine; what hangs is to fail.
const SECONDS_MAX: &str = "2400";

/// A fenced block of the guide.
struct Block {
    /// Of a file that it is the text of.
    file: Option<String>,
    language: String,
    text: String,
}

fn guide() -> Vec<Block> {
    let guide = std::fs::read_to_string(root().join("docs/own-trainer.md")).expect("the guide");
    let (mut blocks, mut open, mut before) = (Vec::new(), None::<Block>, "");
    for line in guide.lines() {
        match (line.strip_prefix("```"), &mut open) {
            (Some(_), Some(_)) => blocks.extend(open.take()),
            (Some(language), None) => {
                let file = before.strip_prefix('`').and_then(|rest| rest.strip_suffix("`:")).map(str::to_owned);
                open = Some(Block { file, language: language.to_owned(), text: String::new() });
            }
            (None, Some(block)) => block.text = format!("{}{line}\n", block.text),
            (None, None) => {}
        }
        before = line;
    }
    blocks
}

/// A folder beside a checkout, as the guide has it.
struct Place(TempDir);

impl Place {
    fn new() -> Self {
        let place = Self(tempfile::tempdir().expect("a temporary folder"));
        symlink(root(), place.path("stoke")).expect("a link");
        std::fs::create_dir_all(place.path("bin")).expect("a folder");
        std::fs::create_dir_all(place.path("letters/src")).expect("a folder");
        symlink(binary(), place.path("bin/stoke")).expect("a link");
        // Crates are the same ones in every run only where they have the same path.
        let (root, cargo) = (root().display(), env!("CARGO"));
        let script = format!(
            "#!/bin/sh\nsed -i 's|\"\\(\\.\\./\\)*stoke/|\"{root}/|' Cargo.toml\nexec {cargo} \"$@\" --offline\n"
        );
        place.executable("bin/cargo", &script);
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn executable(&self, name: &str, text: &str) {
        std::fs::write(self.path(name), text).expect("written");
        std::fs::set_permissions(self.path(name), PermissionsExt::from_mode(0o755)).expect("mode");
    }

    /// Runs lines of a shell; what they print, in order.
    fn shell(&self, folder: &str, lines: &str) -> (bool, String) {
        let path = format!("{}:{}", self.path("bin").display(), std::env::var("PATH").unwrap_or_default());
        let mut command = Command::new("timeout");
        command.args([SECONDS_MAX, "sh", "-exc", &format!("exec 2>&1\n{lines}")]).current_dir(self.path(folder));
        command
            .env("PATH", path)
            .env("XDG_DATA_HOME", self.0.path())
            .env_remove("STOKE_CLUSTER")
            .env_remove("RUST_LOG");
        if std::env::var_os("CARGO_BUILD_BUILD_DIR").is_none() {
            // As the checkout's own `.cargo/config.toml` says, which is not above this folder.
            command.env("CARGO_BUILD_BUILD_DIR", "{cargo-cache-home}/stoke-build");
        }
        command.env_remove("CARGO_TARGET_DIR").env_remove("CARGO");
        let output = command.stdin(Stdio::null()).output().expect("a shell");
        (output.status.success(), String::from_utf8_lossy(&output.stdout).into_owned())
    }
}

/// What follows this word on each line that begins with it.
fn values<'a>(said: &'a str, word: &str) -> Vec<&'a str> {
    said.lines().filter_map(|line| line.trim_start().strip_prefix(word)?.split_whitespace().next()).collect()
}

#[test]
fn the_guide_leads_from_an_empty_folder_to_the_same_bits_through_a_killed_rank() {
    let (place, mut runs) = (Place::new(), Vec::new());
    for block in guide() {
        match (&block.file, block.language.as_str()) {
            (Some(file), _) => std::fs::write(place.path("letters").join(file), &block.text).expect("written"),
            (None, "sh") => {
                let began = std::time::Instant::now();
                let (ended_well, said) = place.shell("letters", &block.text);
                assert!(ended_well, "{said}");
                println!("{:?}:\n{said}", began.elapsed());
                runs.push(said);
            }
            (None, _) => {}
        }
    }
    let [letters, prose] = &runs[..] else { panic!("the guide has {} blocks of commands", runs.len()) };
    let weights = values(letters, "weights_blake3");
    assert_eq!(weights.len(), 3, "{letters}");
    assert!(weights.iter().all(|other| *other == weights[0]), "{weights:?}");

    let weights = values(prose, "weights_blake3");
    assert_eq!(weights.len(), 2, "{prose}");
    assert_eq!(weights[0], weights[1], "a killed rank changed the result: {prose}");
    assert_eq!(prose.matches("no rank was lost").count(), 1, "nothing was killed: {prose}");
    let bits =
        |name: &str| values(prose, &format!("held-out {name}")).first().and_then(|bits| bits.parse::<f64>().ok());
    let (own, pairs) = (bits("bits_per_byte").expect("told"), bits("bigram_bits_per_byte").expect("told"));
    assert!(own < pairs, "it has learned less than pairs of letters: {own} against {pairs}");

    mistakes_are_told_with_their_lines(&place);
    only_the_program_computes_with_its_weights(&place, prose);
}

fn mistakes_are_told_with_their_lines(place: &Place) {
    let spec = std::fs::read_to_string(place.path("letters/spec.toml")).expect("the spec");
    for (from, to, said) in [
        (
            "held_out = 0.1",
            "held_out = 2.0",
            "wrong.toml:9: [letters] held_out is no share (write a number such as 0.1)",
        ),
        ("held_out = 0.1", "", "wrong.toml:8: missing field `held_out`"),
        ("[letters]", "[leters]", "wrong.toml:8: unknown section [leters]"),
        (
            "trainer = \"letters\"",
            "trainer = \"digits\"",
            "wrong.toml:2: trainer: unknown trainer \"digits\" (write one of letters)",
        ),
    ] {
        std::fs::write(place.path("letters/wrong.toml"), spec.replace(from, to)).expect("written");
        let (_, shown) = place.shell(
            "letters",
            "stoke run wrong.toml || echo code $?\ntarget/release/letters check wrong.toml || echo code $?",
        );
        assert!(
            shown.contains(&said.replace("trainer: unknown", "unknown")) || shown.contains(said),
            "{said}: {shown}"
        );
        assert_eq!(values(&shown, "code"), ["2", "2"], "{shown}");
    }
}

fn only_the_program_computes_with_its_weights(place: &Place, prose: &str) {
    let checkpoint = *values(prose, "checkpoint").last().expect("a checkpoint");
    let (ended_well, said) = place.shell("letters/prose", &format!("echo a | stoke predict --checkpoint {checkpoint}"));
    assert!(!ended_well && said.contains("stoke checkpoint export"), "{said}");
    let (ended_well, said) = place.shell("letters/prose", &format!("stoke eval {checkpoint}"));
    assert!(!ended_well && said.contains("held-out"), "{said}");
    let (ended_well, said) =
        place.shell("letters/prose", &format!("stoke checkpoint export {checkpoint} --out w.safetensors"));
    assert!(ended_well && said.contains("w.safetensors holds prose"), "{said}");
    let file = std::fs::read(place.path("letters/prose/w.safetensors")).expect("the weights");
    let names = String::from_utf8_lossy(&file[..file.len().min(20_000)]).into_owned();
    assert!(names.contains("\"blocks.0.qkv.weight\""), "{names}");
}

/// An ELF file of this machine, or with another machine's number, with a mark of this version of the protocol.
fn forged(folder: &Path, name: &str, machine: Option<u16>, version: u8) -> PathBuf {
    let mut program = std::fs::read("/bin/true").expect("a program");
    if let Some(machine) = machine {
        program[18..20].copy_from_slice(&machine.to_le_bytes());
    }
    program.extend(format!("stoke rank program, protocol <{version:03}>").bytes());
    let path = folder.join(name);
    std::fs::write(&path, program).expect("written");
    std::fs::set_permissions(&path, PermissionsExt::from_mode(0o755)).expect("mode");
    path
}

fn spec_of(folder: &Path, program: &Path) -> String {
    let spec = format!(
        "name = \"own\"\ntrainer = \"own\"\nprogram = \"{}\"\n[train]\nsteps = 2\nbatch = 8\n[resources]\nranks = 1\nmemory = \"64MiB\"\n",
        program.display()
    );
    let path = folder.join("spec.toml");
    std::fs::write(&path, spec).expect("written");
    path.to_str().expect("UTF-8").to_owned()
}

#[test]
fn what_is_no_rank_program_is_refused_before_it_is_sent() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let folder = folder.path();
    std::fs::write(folder.join("script"), "#!/bin/sh\n").expect("written");
    let cases = [
        (folder.join("script"), "it is no program for Linux"),
        (PathBuf::from("/bin/true"), "its main is to be `stoke_node::rank::main(TRAINERS)`"),
        (forged(folder, "newer", None, 250), "it speaks version 250 of the ranks' protocol"),
        (forged(folder, "mute", None, PROTOCOL_VERSION), "did not answer `check`"),
        (folder.join("nothing"), "name the file that `cargo build --release` has made"),
    ];
    for (program, why) in cases {
        let spec = spec_of(folder, &program);
        let output = stoke(["run", &spec]).output().expect("stoke runs");
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(2), "{said}");
        assert!(said.contains("spec.toml:3: ") && said.contains(why), "{said}");
    }
}

#[test]
fn a_node_refuses_what_it_cannot_run_and_tells_what_died_at_once() {
    let (cluster, folder) = (Cluster::shared(), tempfile::tempdir().expect("a temporary folder"));
    let folder = folder.path();
    // Of a machine that none of this project's tests runs on.
    let foreign = forged(folder, "foreign", Some(0x16), PROTOCOL_VERSION);
    let spec = spec_of(folder, &foreign);
    let ended = cluster.run(&["submit", &spec, "--json"]).expect(0).says(&["not checked here", "built for s390x"]);
    let view = cluster.wait_for_state(&text(&ended.json()["job"]), "failed");
    let why = text(&view["reason"]);
    assert!(why.contains("it is built for s390x") && why.contains("[resources.labels]"), "{why}");

    let source = folder.join("dies.c");
    let code = format!(
        "#include <stdio.h>\n#include <string.h>\nvolatile const char mark[] = \"stoke rank program, protocol <{PROTOCOL_VERSION:03}>\";\n\
         int main(int count, char **words) {{\n  if (!strcmp(words[1], \"check\")) return puts(\"{{\\\"ok\\\": true}}\") < 0;\n\
         fputs(\"no such library\\n\", stderr);\n  return mark[0] ? 7 : 8;\n}}\n"
    );
    std::fs::write(&source, code).expect("written");
    let program = folder.join("dies");
    let compiled = Command::new("cc").arg("-o").arg(&program).arg(&source).status().expect("a C compiler");
    assert!(compiled.success());
    let job = text(&cluster.json(&["submit", &spec_of(folder, &program)])["job"]);
    let view = cluster.wait_for_state(&job, "failed");
    let why = text(&view["reason"]);
    assert!(why.contains("ended with code 7 before it said a word") && why.contains("no such library"), "{why}");
    // By its hash, from anywhere; and one that nobody has sent.
    let hash = blake3::hash(&std::fs::read(&program).expect("the program")).to_hex();
    let again = text(&cluster.json(&["submit", &spec_of(folder, Path::new(&format!("blake3:{hash}")))])["job"]);
    cluster.wait_for_state(&again, "failed");
    let spec = spec_of(folder, Path::new(&format!("blake3:{}", "1".repeat(64))));
    cluster.run(&["submit", &spec]).expect(3).says(&["does not have the artifact", "as its `program`"]);
}
