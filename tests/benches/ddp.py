"""The peer of the training and start-up benches: the same model, samples and batch under PyTorch DDP over gloo, one thread a rank.

    python -m torch.distributed.run --nproc-per-node N ddp.py SPEC STEPS [SECTION.KEY=NUMBER...]

STOKE_BENCH_DEVICE=auto: on a GPU where there is one. STOKE_BENCH_OPTIMIZER=zero: each rank keeps a part of the optimizer's state.
Rank 0 prints one JSON line: seconds since the Unix epoch when the first step was done, samples a second over the rest, and the most memory that it had.
"""

import json
import os
import resource
import sys
import time
import tomllib
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "jobs" / "reference"))

import torch
import torch.distributed as dist
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

import digits
import domains
import language


def settle(is_gpu: bool) -> None:
    if is_gpu:
        torch.cuda.synchronize()
    dist.barrier()


def main() -> None:
    path, steps = Path(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    spec = tomllib.loads(path.read_text())
    for change in sys.argv[3:]:
        (section, key), value = change.split("=")[0].split("."), change.split("=")[1]
        spec[section][key] = int(value)
    is_gpu = os.environ.get("STOKE_BENCH_DEVICE") == "auto" and torch.cuda.is_available()
    device = torch.device("cuda" if is_gpu else "cpu")
    task = {"domains": domains.Domains, "digits": digits.Digits, "language": language.Language}[spec["trainer"]]
    torch.manual_seed(spec["train"]["seed"])
    data = task(spec, path.parent)
    for name, value in vars(data).items():
        if isinstance(value, torch.Tensor):
            setattr(data, name, value.to(device))
        elif isinstance(value, tuple):
            setattr(data, name, tuple(part.to(device) for part in value))
    model = DistributedDataParallel(data.model(spec["model"]).to(device))
    rule = {"lr": 1e-3, "weight_decay": spec["optimizer"]["weight_decay"]}
    if os.environ.get("STOKE_BENCH_OPTIMIZER") == "zero":
        optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, **rule)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), **rule)
    batch, samples, seed = spec["train"]["batch"], data.samples(), spec["train"]["seed"]
    # Shuffled as PyTorch users do: our own order in Python would cost them start-up time that is not theirs.
    epochs = -(-steps * batch // samples)
    order = torch.cat([torch.randperm(samples, generator=torch.Generator().manual_seed(seed + epoch)) for epoch in range(epochs)])
    own = [slice(step * batch + batch * rank // world, step * batch + batch * (rank + 1) // world) for step in range(steps)]
    indices = [order[part].to(device) for part in own]
    warm, first, start = min(10, steps - 1), 0.0, 0.0
    for step, at in enumerate(indices):
        if step == warm:
            settle(is_gpu)
            start = time.perf_counter()
        loss = torch.nn.functional.cross_entropy(data.logits(model, at), data.labels(at))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        first = first or time.time()
    settle(is_gpu)
    rate = (steps - warm) * batch / (time.perf_counter() - start)
    if rank == 0:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        figures = {"first_step_unix": first, "samples_per_second": rate, "loss": loss.item(), "peak_mib": peak}
        print(json.dumps(figures), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
