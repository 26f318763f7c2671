"""Loads a file of `stoke checkpoint export` into a plain nn.Module, and compares what it answers with what Stoke said of the same weights.

    load_export.py model.safetensors                         held-out metrics, against those that the file carries (of a job's last step)
    load_export.py model.safetensors --scores answers.jsonl  probabilities too, against those of `stoke predict --json`

The state dictionary is the file as it is: names and layouts are PyTorch's (docs/checkpoints.md).
"""

import argparse
import json
import tomllib
from pathlib import Path

import torch
from safetensors import safe_open

import digits
import domains

# Both add the same f32 products in another order; logits are of the order of 1 to 10.
PROBABILITY_TOLERANCE = 1e-5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--scores", type=Path, help="what `stoke predict --json` answered")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with safe_open(args.file, "pt") as file:
        notes, state = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}
    spec = tomllib.loads(notes["spec"])
    task = {"domains": domains.Domains, "digits": digits.Digits}[notes["trainer"]]
    model = task.model(spec["model"])
    model.load_state_dict(state)
    model.eval()
    with torch.no_grad():
        data = task(spec, Path("/"))
        compared = metrics(data, model, json.loads(notes["metrics"]))
        if args.scores:
            answers = [json.loads(line) for line in args.scores.read_text().splitlines()]
            compared["probability"] = scores(notes["trainer"], data, model, answers)
    print(json.dumps({"job": notes["job"], "step": notes["step"], "largest_difference": compared}))


def metrics(data, model, ours: dict) -> dict:
    theirs = data.metrics(model)
    rows = len(data.held[0])
    # Rounding may turn over a row whose scores are equal to the last bits.
    tolerance = {"accuracy": 2 / rows, "roc_auc": 1e-4}
    differences = {name: abs(theirs[name] - ours[name]) for name in tolerance if name in theirs and name in ours}
    for name, difference in differences.items():
        assert difference <= tolerance[name], f"{name}: PyTorch {theirs[name]}, Stoke {ours[name]}, of {rows} rows"
    return differences


def scores(trainer: str, data, model, answers: list) -> float:
    largest = 0.0
    for answer in answers:
        if trainer == "domains":
            labels, side = domains.LABELS, data.encode([(answer["line"][-data.length :], 0)])
            logits = model(data.cut(side, torch.tensor([0])))
        else:
            labels, side = [str(digit) for digit in range(10)], data.encode([(json.loads(answer["line"]), 0)])
            logits = model(side[0])
        theirs = dict(zip(labels, logits.softmax(1)[0].tolist()))
        for label, ours in answer["scores"].items():
            difference = abs(theirs[label] - ours)
            assert difference <= PROBABILITY_TOLERANCE, f"{answer['line'][:60]}: {label}: PyTorch {theirs[label]}, Stoke {ours}"
            largest = max(largest, difference)
    return largest


if __name__ == "__main__":
    main()
