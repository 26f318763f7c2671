#!/usr/bin/env bash
# Makes target/debian/stoke.deb from the binary: man pages and completions come from the binary itself.
# Needs target/release/stoke (cargo build --release --locked -p stoke-cli), built where glibc is no newer than on the machines that get the package, and cargo-deb
# (cargo install cargo-deb --locked --version 3.8.0).
# Usage: deb.sh [VERSION]    default: that of the crates. Machines tell packages apart by their versions: give each build that is installed one of its own.
set -euo pipefail
cd "$(dirname "$0")/.."
binary=${CARGO_TARGET_DIR:-target}/release/stoke
[ -x "$binary" ] || { echo "error: there is no $binary; help: cargo build --release --locked -p stoke-cli" >&2; exit 2; }
command -v cargo-deb >/dev/null || { echo "error: cargo-deb is not installed; help: cargo install cargo-deb --locked --version 3.8.0" >&2; exit 2; }
generated=target/packaging
rm -rf "$generated"
mkdir -p "$generated"
"$binary" man "$generated/man"
for shell in bash zsh fish; do
    "$binary" completions "$shell" >"$generated/stoke.$shell"
done
version=()
[ $# = 0 ] || version=(--deb-version "$1")
mkdir -p target/debian
cargo-deb deb --no-build --package stoke-cli --output target/debian/stoke.deb "${version[@]}" --quiet
echo target/debian/stoke.deb
