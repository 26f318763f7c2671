# Sourced by the scripts of this folder: where tools are kept, and how they are installed there once. Owns no test.
# shellcheck shell=bash
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
CACHE=${STOKE_TESTS_CACHE:-${HOME:-/root}/.cache/stoke-tests}
STOKE_BIN=${STOKE_BIN:-$ROOT/target/release/stoke}

say() { printf -- '-- %s\n' "$*"; }
die() { printf 'error: %s\n' "$*" >&2; exit 1; }
# Whether what comes has a line like this. All of it is read: a writer that is left with a closed pipe fails, and `pipefail` takes that for the answer.
says() { local text; text=$(cat); grep -q -- "$1" <<<"$text"; }

# Ends the process with this id, and waits until it is gone (ten seconds, then by force).
end_process() {
    local pid=$1 _
    kill "$pid" 2>/dev/null || return 0
    for _ in $(seq 100); do
        kill -0 "$pid" 2>/dev/null || return 0
        sleep 0.1
    done
    kill -KILL "$pid" 2>/dev/null || true
}

# until_true SECONDS WHAT COMMAND...: polls the command until it succeeds.
until_true() {
    local deadline=$((SECONDS + $1)) what=$2
    shift 2
    until "$@" >/dev/null 2>&1; do
        [ "$SECONDS" -lt "$deadline" ] || die "$what: not within the deadline"
        sleep 0.2
    done
}

# python_env NAME PYTHON PACKAGE==VERSION...: a virtual environment in the cache; its path is printed. Fails where it cannot be made, and leaves nothing that looks made.
python_env() {
    local dir=$CACHE/$1 python=$2
    shift 2
    if [ "$(cat "$dir/installed" 2>/dev/null)" != "$*" ]; then
        say "installs $* into $dir" >&2
        rm -rf "$dir"
        # errexit does not reach into $(...).
        "$python" -m venv "$dir" >&2 || return 1
        "$dir/bin/python" -m pip install --quiet --disable-pip-version-check "$@" >&2 || return 1
        echo "$*" >"$dir/installed"
    fi
    echo "$dir"
}

# apt_install COMMAND PACKAGE...: installs the packages if the command is missing.
apt_install() {
    local command=$1
    shift
    command -v "$command" >/dev/null && return 0
    say "installs $* by apt-get"
    { apt-get install -y -qq "$@" || { apt-get update -qq && apt-get install -y -qq "$@"; }; } >/dev/null
}

needs_stoke() {
    [ -x "$STOKE_BIN" ] || die "no $STOKE_BIN; help: cargo build --release --locked -p stoke-cli, or set STOKE_BIN"
}
