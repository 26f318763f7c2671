"""What both reference scripts share: the order of samples, the held-out split, the schedule and the loop, written again in
Python from the definitions in jobs/src, so that PyTorch sees the same samples in the same order at the same rates."""

import argparse
import csv
import gzip
import json
import math
import time
import tomllib
from pathlib import Path

import numpy
import torch
from safetensors.torch import load_file, save_file

MASK = (1 << 64) - 1


def mix(x: int) -> int:
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & MASK
    x = (x ^ x >> 27) * 0x94D049BB133111EB & MASK
    return x ^ x >> 31


def order(seed: int, samples: int, cursor: int) -> int:
    """jobs/src/order.rs"""
    epoch, position = divmod(cursor, samples)
    half = (max((samples - 1).bit_length(), 2) + 1) // 2
    key = mix(seed ^ mix(epoch + 0x9E3779B97F4A7C15 & MASK))
    while True:
        left, right = position >> half, position & (1 << half) - 1
        for step in range(6):
            mixed = mix(right ^ (key + (step * 0xD1342543DE82EF95 & MASK) & MASK))
            left, right = right, left ^ mixed & (1 << half) - 1
        position = left << half | right
        if position < samples:
            return position


def held(group: bytes, share: float) -> bool:
    """jobs/src/data.rs, HeldOut"""
    fnv = 0xCBF29CE484222325
    for byte in group:
        fnv = (fnv ^ byte) * 0x100000001B3 & MASK
    return (mix(fnv) >> 11) / (1 << 53) < share


def rows(path: Path):
    with gzip.open(path, "rt") as file:
        yield from csv.DictReader(file) if ".csv" in path.name else map(json.loads, file)


def rate(schedule: dict, step: int, steps: int) -> float:
    """Linear warm-up, then cosine: [schedule] of the spec."""
    lr, warmup = schedule["lr"], min(schedule.get("warmup_steps", 0), steps)
    if warmup > 1 and step < warmup:
        return lr * (step + 1) / warmup
    done = (step - (warmup if warmup > 1 else 0)) / max(steps - warmup, 1)
    return schedule.get("min_lr", 0.0) + 0.5 * (lr - schedule.get("min_lr", 0.0)) * (1 + math.cos(done * math.pi))


def main(doc: str, task) -> None:
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("spec", type=Path)
    parser.add_argument("--weights", type=Path, help="first weights, as written by `alone SPEC --weights FILE`")
    parser.add_argument("--golden", type=Path, help="write the first gradients and the first 20 losses here, and stop")
    parser.add_argument("--steps", type=int, help="stop after this many steps")
    args = parser.parse_args()
    torch.set_num_threads(1)
    spec = tomllib.loads(args.spec.read_text())
    torch.manual_seed(spec["train"]["seed"])
    data = task(spec, args.spec.parent)
    model = data.model(spec["model"])
    if args.weights:
        first = {name.removeprefix("model."): tensor for name, tensor in load_file(args.weights).items()}
        data.put(model, first)
    run(spec, data, model, 20 if args.golden else args.steps, args.golden, first if args.golden else None)


def run(spec: dict, data, model, steps_max: int | None, golden: Path | None, first) -> None:
    train, decay = spec["train"], spec["optimizer"]["weight_decay"]
    batch, samples = train["batch"], data.samples()
    steps = train["steps"] if "steps" in train else -(-train["epochs"] * samples // batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0, weight_decay=decay)
    losses, gradients, indices = [], None, numpy.array([order(train["seed"], samples, at) for at in range(samples)])
    start = time.perf_counter()
    for step in range(min(steps, steps_max or steps)):
        for group in optimizer.param_groups:
            group["lr"] = rate(spec["schedule"], step, steps)
        cursor = range(step * batch, (step + 1) * batch)
        if step * batch >= samples and cursor[0] // samples != (cursor[0] - batch) // samples:
            epoch = cursor[0] // samples * samples  # the next epoch's order, all at once: out of the timed part below
            start_order = time.perf_counter()
            indices = numpy.array([order(train["seed"], samples, epoch + at) for at in range(samples + batch)])
            start += time.perf_counter() - start_order
        elif step * batch < samples < (step + 1) * batch:
            indices = numpy.append(indices, [order(train["seed"], samples, samples + at) for at in range(batch)])
        at = torch.from_numpy(indices[[c - cursor[0] // samples * samples for c in cursor]])
        loss = torch.nn.functional.cross_entropy(data.logits(model, at), data.labels(at))
        optimizer.zero_grad()
        loss.backward()
        if golden and step == 0:
            gradients = data.take(model)
        torch.nn.utils.clip_grad_norm_(model.parameters(), train["clip_norm"])
        optimizer.step()
        losses.append(loss.item())
        if step % 50 == 0:
            print(f"step {step} loss {losses[-1]:.4f} {(step + 1) * batch / (time.perf_counter() - start):.0f} samples/s", flush=True)
    if golden:
        tensors = {f"first.{name}": tensor for name, tensor in first.items()}
        tensors |= {f"gradient.{name}": tensor.contiguous() for name, tensor in gradients.items()}
        save_file(tensors | {"losses": torch.tensor(losses)}, golden, {"made_by": f"torch {torch.__version__}"})
        print(f"{golden}: {golden.stat().st_size} bytes")
        return
    rate_mean = len(losses) * batch / (time.perf_counter() - start)
    print(f"trained {len(losses)} steps, {rate_mean:.0f} samples/s on one thread")
    model.eval()
    with torch.no_grad():
        print(data.metrics(model))
