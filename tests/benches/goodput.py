"""The peer of the goodput bench: PyTorch DDP over gloo under torch.distributed.run, which starts all workers again when one is killed; they
go on from the last checkpoint.

    python -m torch.distributed.run --standalone --nproc-per-node N --max-restarts 1000 --monitor-interval 0.1 goodput.py SPEC FOLDER EVERY

Trains until it is killed. FOLDER/step holds the number of steps that are done, FOLDER/checkpoint.pt what is written every EVERY steps.
"""

import os
import sys
import tomllib
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "jobs" / "reference"))

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import digits
import domains


def main() -> None:
    path, folder, every = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    spec = tomllib.loads(path.read_text())
    task = {"domains": domains.Domains, "digits": digits.Digits}[spec["trainer"]]
    torch.manual_seed(spec["train"]["seed"])
    data = task(spec, path.parent)
    module = data.model(spec["model"])
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3, weight_decay=spec["optimizer"]["weight_decay"])
    checkpoint, done = folder / "checkpoint.pt", 0
    if checkpoint.exists():
        saved = torch.load(checkpoint)
        module.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        done = saved["step"]
    model = DistributedDataParallel(module)
    batch, samples, seed = spec["train"]["batch"], data.samples(), spec["train"]["seed"]
    progress = os.open(folder / "step", os.O_CREAT | os.O_WRONLY)
    steps_an_epoch = samples // batch
    epoch, order = -1, None
    while True:
        if done // steps_an_epoch != epoch:
            epoch = done // steps_an_epoch
            order = torch.randperm(samples, generator=torch.Generator().manual_seed(seed + epoch))
        begin = done % steps_an_epoch * batch
        at = order[begin + batch * rank // world : begin + batch * (rank + 1) // world]
        loss = torch.nn.functional.cross_entropy(data.logits(model, at), data.labels(at))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        done += 1
        if rank == 0:
            os.pwrite(progress, f"{done:012}".encode(), 0)
            if done % every == 0:
                save(checkpoint, {"model": module.state_dict(), "optimizer": optimizer.state_dict(), "step": done})


def save(path, state) -> None:
    """Whole or not at all, and durable, as ours are."""
    part = path.with_suffix(".part")
    with open(part, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


if __name__ == "__main__":
    main()
