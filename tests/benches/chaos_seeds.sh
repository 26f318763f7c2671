#!/usr/bin/env bash
# One job under each schedule of faults, seed after seed, against its calm run: the same weights, and every sample in exactly one committed step?
# usage: tests/benches/chaos_seeds.sh [SEEDS] [STEPS]    with STOKE=path/to/stoke (target/release/stoke), OUT=folder for the results
set -euo pipefail
cd "$(dirname "$0")/../.."
seeds=${1:-20} steps=${2:-400} stoke=${STOKE:-target/release/stoke} out=${OUT:-$(mktemp -d)}
schedules=("kill-rank every 3s" "kill-node every 4s" "pause-node every 5s for 2s" "partition-node every 5s for 2s" "kill-coordinator every 3s")
mkdir -p "$out"

# run FILE ARGUMENT...: the summary of one run, as JSON.
run() {
    local file=$1; shift
    [ -s "$file" ] && return
    "$stoke" run jobs/specs/domains.toml --nodes 3 --set train.steps="$steps" --json --out "$file.d" "$@" > "$file.part" 2> "$file.log" || true
    rm -rf "$file.d"
    mv "$file.part" "$file"
}

run "$out/calm.json"
for seed in $(seq "$seeds"); do
    for number in "${!schedules[@]}"; do
        run "$out/$number-$seed.json" --chaos "${schedules[$number]}" --seed "$seed"
    done
done

python3 - "$out" "$seeds" "${schedules[@]}" <<'PYTHON'
import json, os, statistics, sys
out, seeds, schedules = sys.argv[1], int(sys.argv[2]), sys.argv[3:]
calm = json.load(open(f"{out}/calm.json"))
share = lambda values, at: sorted(values)[min(len(values) - 1, int(at * len(values)))] if values else 0
print(f"calm: weights {calm['weights_blake3'][:12]}, ledger {calm['ledger']}, {calm['wall_seconds']:.0f} s\n")
print("| schedule | seeds | same weights | ledger whole | faults that met | recoveries | recovery, median / longest | committed steps lost | time, median |")
print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
for number, schedule in enumerate(schedules):
    runs = [json.load(open(path)) for path in (f"{out}/{number}-{seed}.json" for seed in range(1, seeds + 1)) if os.path.exists(path)]
    accounts = [run.get("chaos") or {} for run in runs]
    same = sum(run.get("weights_blake3") == calm["weights_blake3"] for run in runs)
    whole = sum(run.get("ledger") == calm["ledger"] for run in runs)
    met = sum(fault["met"] for account in accounts for fault in account.get("faults", []))
    took = [account["longest_recovery_seconds"] for account in accounts if account.get("longest_recovery_seconds") is not None]
    total = lambda field: sum(account.get(field) or 0 for account in accounts)
    walls = [run["wall_seconds"] for run in runs if "wall_seconds" in run]
    recovery = f"{share(took, 0.5):.2f} / {max(took):.2f} s" if took else "-"
    print(f"| `{schedule}` | {len(runs)} | {same} | {whole} | {met} | {total('recoveries')} | {recovery} | {total('steps_lost')} | {statistics.median(walls):.0f} s |")
PYTHON
