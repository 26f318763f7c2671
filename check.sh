#!/usr/bin/env bash
# Runs every test of the project, from nothing: format, lints, build, unit tests, simulation, integration through the `stoke` binary.
# Changes no tracked file. Usage: ./check.sh
set -euo pipefail
cd "$(dirname "$0")"

say() { printf '\n== %s (%s s)\n' "$1" "$SECONDS"; }

if ! command -v cargo >/dev/null; then
    echo "error: cargo is not installed; help: install Rust 1.95 or newer (https://rustup.rs)" >&2
    exit 2
fi
if ! command -v cc >/dev/null; then
    say "a C compiler is missing: installing gcc by apt-get"
    apt-get update -qq && apt-get install -y -qq gcc libc6-dev
fi
if ! command -v ip >/dev/null && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    say "iproute2 is missing: installing it by apt-get, for the tests with network namespaces"
    apt-get update -qq && apt-get install -y -qq iproute2
fi
if ! command -v strace >/dev/null && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    say "strace is missing: installing it by apt-get, for the tests that fail system calls of the coordinator"
    apt-get update -qq && apt-get install -y -qq strace
fi

say "format"
cargo fmt --all --check
say "build and lints (the first build compiles Burn: about ten minutes on two cores)"
cargo clippy --release --workspace --all-targets --locked -- -D warnings
say "tests"
cargo test --release --workspace --locked
say "done"
