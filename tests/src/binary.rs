//! The `stoke` binary that integration tests and benches drive. Owns how cargo is asked from inside of them; never runs the binary.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::Value;

/// Builds the binary and finds it.
pub fn build(root: &Path) -> PathBuf {
    let output = cargo()
        .args(["build", "--release", "--locked", "-p", "stoke-cli", "--bin", "stoke", "--message-format=json"])
        .current_dir(root)
        .stderr(Stdio::inherit())
        .output()
        .expect("run cargo");
    assert!(output.status.success(), "the stoke binary does not build");
    let text = String::from_utf8_lossy(&output.stdout);
    let messages = text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let mut executables = messages.filter_map(|message| message["executable"].as_str().map(PathBuf::from));
    executables.next_back().expect("cargo names the binary that it built")
}

/// Cargo, as from a shell.
pub fn cargo() -> Command {
    let mut cargo = Command::new(env!("CARGO"));
    // What cargo tells a test or bench about its package: ring's build script would see it as a change, and half of the tree be compiled again.
    let names = std::env::vars_os().map(|(name, _)| name);
    for name in names.filter(is_of_package) {
        cargo.env_remove(name);
    }
    cargo
}

fn is_of_package(name: &std::ffi::OsString) -> bool {
    let name = name.to_string_lossy();
    name.starts_with("CARGO_PKG_") || name.starts_with("CARGO_MANIFEST_")
}
