#!/usr/bin/env bash
# Runs every test of the deployment files, one after the other, and prints a table: what, how it ended, seconds. Ends with 1 if one failed.
# Usage: run.sh [NAME...]    names of scripts of this folder without .sh; default: kubernetes terraform image ansible
# Needs the binary (STOKE_BIN, default target/release/stoke); image and ansible need root. What they install is named by each, and kept in ~/.cache/stoke-tests.
set -uo pipefail
here=$(dirname "$0")
[ $# -gt 0 ] || set -- kubernetes terraform image ansible
table=() failed=0
for name in "$@"; do
    [ -x "$here/$name.sh" ] || { echo "error: there is no test $name" >&2; exit 2; }
    printf '\n== %s\n' "$name"
    begun=$SECONDS
    if timeout --kill-after 10 1800 "$here/$name.sh"; then result=passed; else result="failed ($?)" failed=1; fi
    table+=("$(printf '%-12s %-12s %5s s' "$name" "$result" $((SECONDS - begun)))")
done
printf '\n'
printf '%s\n' "${table[@]}"
exit $failed
