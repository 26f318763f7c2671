#!/usr/bin/env bash
# Training on a GPU beside PyTorch on the same card. In two parts, because a machine with a GPU often has neither a toolchain nor a network:
#
#     tests/benches/gpu.sh build [FOLDER]    here: builds `stoke` with the feature `cuda` (20 to 45 minutes, LLVM from PyPI) and packs what a run needs
#                                            into FOLDER [target/gpu]: the binary, libdevice, specs and data, PyTorch's side, and this script
#     FOLDER/gpu.sh run                      there: trains `domains`, `digits`, `language` and a model of GPT-2's smallest size on one rank, prints samples a
#                                            second, and those of PyTorch where `python3` (or STOKE_TORCH_PYTHON) has torch and, for models of language,
#                                            transformers. The card's name comes first.
#
# Needs there: a driver. STOKE_BENCH_STEPS [60] sets how long a model trains. Without a GPU it measures the CPU, and says so.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)

say() { printf -- '-- %s\n' "$*"; }
die() { printf 'error: %s\n' "$*" >&2; exit 1; }

build() {
    local root out env prefix share
    root=$(cd "$here/../.." && pwd)
    out=${1:-$root/target/gpu}
    env=$root/target/gpu-build
    say "LLVM 23 and libdevice from PyPI into $env"
    python3 -m venv "$env"
    "$env/bin/pip" install -q 'mlc-llvm-static[all]==23.1.1.post0' nvidia-nvvm
    prefix=$("$env/bin/python" -m mlc_llvm_static.config --prefix)
    share=${XDG_DATA_HOME:-$HOME/.local/share}/tracel
    mkdir -p "$share"
    ln -sfn "$prefix" "$share/tracel-llvm-23.1.0-4"
    touch "$prefix/.tracel-llvm-installed"
    say "stoke with the feature cuda"
    # Beside the others: another set of features compiles Burn again, and theirs stay.
    CARGO_TARGET_DIR=$root/target/cuda CARGO_BUILD_BUILD_DIR=$root/target/cuda-build \
        cargo build --release --locked -p stoke-cli --features cuda --manifest-path "$root/Cargo.toml"
    rm -rf "$out"
    mkdir -p "$out/nvvm/libdevice" "$out/jobs" "$out/tests/benches"
    strip -o "$out/stoke" "$root/target/cuda/release/stoke"
    find "$env" -name libdevice.10.bc -exec cp {} "$out/nvvm/libdevice/" \; -quit
    [ -s "$out/nvvm/libdevice/libdevice.10.bc" ] || die "nvidia-nvvm has no libdevice.10.bc"
    cp -r "$root/jobs/specs" "$root/jobs/data" "$root/jobs/reference" "$out/jobs/"
    rm -rf "$out/jobs/reference/golden"
    cp "$root/tests/benches/ddp.py" "$out/tests/benches/"
    cp "$here/gpu.sh" "$out/"
    say "$out: $(du -sh "$out" | cut -f1)"
}

# Name, spec, and what is set beside the number of steps.
models() {
    echo "domains domains"
    echo "digits digits"
    echo "language language"
    # 85 million weights in the layers, as GPT-2's smallest; the vocabulary is that of bytes.
    echo "gpt2-small language train.batch=32 train.lanes=8 model.context=512 model.hidden=768 model.layers=12 model.heads=12 resources.memory=16GiB"
}

run() {
    local steps=${STOKE_BENCH_STEPS:-60} python name spec sets ours theirs
    export CUDA_PATH=${CUDA_PATH:-$here}
    # Not local: what is done at the end needs it.
    folder=$(mktemp -d)
    stoke() { "$here/stoke" --cluster "$folder/cluster" "$@"; }
    trap 'stoke down >/dev/null 2>&1 || true; rm -rf "$folder"' EXIT
    say "$(nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2>/dev/null || echo 'no GPU: this measures the CPU')"
    python=${STOKE_TORCH_PYTHON:-python3}
    "$python" -c 'import torch' 2>/dev/null || { say "no torch at $python: ours alone"; python=; }
    stoke up --nodes 1 >/dev/null
    printf '%-12s %16s %16s %7s\n' model "stoke samples/s" "torch samples/s" ratio
    models | while read -r name spec sets; do
        ours=$(ours "$spec" "$steps" $sets </dev/null || true)
        theirs=
        [ -z "$python" ] || theirs=$(theirs "$spec" "$steps" $sets </dev/null || true)
        awk -v name="$name" -v ours="$ours" -v theirs="$theirs" 'BEGIN {
            said = ours == "" ? "failed" : sprintf("%.1f", ours)
            other = theirs == "" ? "-" : sprintf("%.1f", theirs)
            ratio = ours == "" || theirs == "" ? "-" : sprintf("%.2f", ours / theirs)
            printf "%-12s %16s %16s %7s\n", name, said, other, ratio
        }'
    done
}

ours() {
    local spec=$1 job set sets=(--set "train.steps=$2" --set checkpoint.every=1000000)
    shift 2
    for set in "$@"; do sets+=(--set "$set"); done
    if ! stoke --json submit "$here/jobs/specs/$spec.toml" --ranks 1 --wait "${sets[@]}" >"$folder/summary" 2>"$folder/said"; then
        cat "$folder/said" >&2
        return 1
    fi
    job=$(sed -n 's/.*"job": *"\(job-[0-9]*\)".*/\1/p' "$folder/summary")
    stoke logs "$job" --rank 0 | grep -o 'samples_per_second=[0-9.]*' | tail -1 | cut -d= -f2
}

theirs() {
    local spec=$1 steps=$2 set sets=()
    shift 2
    for set in "$@"; do [[ $set == resources.* ]] || sets+=("$set"); done
    if ! STOKE_BENCH_DEVICE=auto "$python" -W ignore -m torch.distributed.run --nproc-per-node 1 --master-addr 127.0.0.1 --master-port 29612 \
        "$here/tests/benches/ddp.py" "$here/jobs/specs/$spec.toml" "$steps" "${sets[@]}" >"$folder/summary" 2>"$folder/said"; then
        tail -5 "$folder/said" >&2
        return 1
    fi
    sed -n 's/.*"samples_per_second": *\([0-9.]*\).*/\1/p' "$folder/summary"
}

case ${1:-} in
build) build "${2:-}" ;;
run) run ;;
*) sed -n '2,/^set/p' "$0" | sed '$d; s/^# \{0,1\}//'; exit 2 ;;
esac
