"""Trains a small network with DistributedDataParallel on the CPU or on GPUs. Written for torchrun, and knows nothing of Stoke:

    torchrun --nproc-per-node 2 train.py --snapshot /tmp/snapshot.pt

Goes on from the snapshot where there is one."""

import argparse
import hashlib
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--snapshot", required=True, help="a file that every rank can read")
    options = parser.parse_args()
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend)
    rank, local_rank = dist.get_rank(), int(os.environ["LOCAL_RANK"])
    device = torch.device("cuda", local_rank) if backend == "nccl" else torch.device("cpu")
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 1)).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    begin = 0
    if os.path.exists(options.snapshot):
        snapshot = torch.load(options.snapshot, map_location=device)
        model.load_state_dict(snapshot["model"])
        optimizer.load_state_dict(snapshot["optimizer"])
        begin = snapshot["epoch"] + 1
        print(f"rank {rank} goes on at epoch {begin}, restart {os.environ.get('TORCHELASTIC_RESTART_COUNT')}", flush=True)
    parallel = DistributedDataParallel(model)
    features = torch.randn(4096, 20, generator=torch.Generator().manual_seed(1))
    data = TensorDataset(features, features[:, :5].sin().sum(1, keepdim=True))
    sampler = DistributedSampler(data, seed=2)
    loader = DataLoader(data, options.batch, sampler=sampler)
    for epoch in range(begin, options.epochs):
        sampler.set_epoch(epoch)
        total = torch.zeros(1, device=device)
        for inputs, targets in loader:
            loss = nn.functional.mse_loss(parallel(inputs.to(device)), targets.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.detach()
        dist.all_reduce(total)
        if rank == 0:
            mean = total.item() / len(loader) / dist.get_world_size()
            print(f"epoch {epoch} loss {mean:.6f}", flush=True)
            # Whole or not at all: a rank may be killed at any time.
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch}, options.snapshot + ".new")
            os.replace(options.snapshot + ".new", options.snapshot)
        dist.barrier()
    if rank == 0:
        weights = b"".join(value.cpu().numpy().tobytes() for value in model.state_dict().values())
        print("weights", hashlib.sha256(weights).hexdigest(), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
