#!/usr/bin/env python3
"""One rank of PyTorch's gloo all_reduce, for exchange.rs: RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT come from the environment.

Each line on stdin is "<bytes> <rounds>"; the answer on stdout is the CPU seconds of all rounds, then the seconds of each round.
"""

import os
import sys
import time

import torch
import torch.distributed as dist


def cpu_seconds():
    return time.clock_gettime(time.CLOCK_PROCESS_CPUTIME_ID)


def main():
    # One thread a rank, as on our side: more threads than cores make both slower.
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    print("ready", torch.__version__, flush=True)
    vectors = {}
    for line in sys.stdin:
        size, rounds = (int(word) for word in line.split())
        vector = vectors.setdefault(size, torch.zeros(size // 4))
        dist.barrier()
        cpu, seconds = cpu_seconds(), []
        for _ in range(rounds):
            start = time.perf_counter()
            dist.all_reduce(vector)
            seconds.append(time.perf_counter() - start)
        print(cpu_seconds() - cpu, *seconds, flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
