"""Gymnasium's classic control as it really runs, for jobs/tests/rl/golden.rs: ten envs of each environment, 10,000 steps each.

usage: environments.py FOLDER [STRIDE]     with gymnasium==1.4.0 and numpy==2.4.6 from PyPI

Writes FOLDER/NAME.bin, little-endian: u32 stride, steps, envs, numbers of an observation; then each env: its first observation (f32); of every
STRIDE-th step the observation and the reward (f32); of every STRIDE steps the weighted sum of all observations (f64); the FNV-1a hash of the bits of
all rewards (f32) as u64; the number of ends as u32, and each as u32: the step times 2, plus 1 when it was truncated and not terminated.

STRIDE is 50 for the golden files. With 1 the test compares every number: STOKE_RL_WHOLE=FOLDER cargo test ... (16 MB).

Even envs act at random; odd ones mostly as a simple rule says, so that goals and limits of steps are reached. Both draw from numpy's PCG64.
"""

import pathlib
import struct
import sys

import gymnasium
import numpy

SEEDS = [0, 1, 2, 3, 42, 123456789, 2**32, 2**32 + 5, 2**40 + 7, 2**63 + 1]
STEPS = 10_000


def cart_pole(o):
    return 1 if o[2] + 0.5 * o[3] + 0.05 * o[0] + 0.1 * o[1] > 0 else 0


def acrobot(o):
    return 2 if o[4] + 0.5 * o[3] < 0 else 0


def mountain_car(o):
    return 2 if o[1] >= 0 else 0


def mountain_car_continuous(o):
    return 1.2 if o[1] >= 0 else -1.2


def pendulum(o):
    return 1.5 if o[2] >= 0 else -1.5


ENVIRONMENTS = {
    "CartPole-v1": cart_pole,
    "Acrobot-v1": acrobot,
    "MountainCar-v0": mountain_car,
    "MountainCarContinuous-v0": mountain_car_continuous,
    "Pendulum-v1": pendulum,
}


def choose(space, rule, env, observation, draw):
    """`draw` is one random number in [0, 1)."""
    ruled = env % 2 == 1 and draw >= 0.1
    observation = [float(value) for value in observation]
    if isinstance(space, gymnasium.spaces.Discrete):
        return rule(observation) if ruled else int(draw * 7919 % 1 * int(space.n))
    # Half as far again as the bounds: they are there to be cut at.
    high = float(space.high[0])
    return numpy.float32(rule(observation) if ruled else high * (3 * (draw * 7919 % 1) - 1.5))


def fnv(hash, bytes):
    for byte in bytes:
        hash = (hash ^ byte) * 0x100000001B3 % 2**64
    return hash


def record(name, rule, stride):
    envs = gymnasium.make_vec(name, num_envs=len(SEEDS), vectorization_mode="sync")
    space = envs.single_action_space
    draws = [numpy.random.Generator(numpy.random.PCG64(seed ^ 1)) for seed in SEEDS]
    seen, _ = envs.reset(seed=SEEDS)
    length = seen.shape[1]
    weights = numpy.arange(1, length + 1) / length
    out = [seen[env].astype("<f4").tobytes() for env in range(len(SEEDS))]
    sums = [[] for _ in SEEDS]
    running = numpy.zeros(len(SEEDS))
    hashes = [0xCBF29CE484222325] * len(SEEDS)
    ends = [[] for _ in SEEDS]
    for step in range(STEPS):
        actions = [choose(space, rule, env, seen[env], draws[env].random()) for env in range(len(SEEDS))]
        actions = numpy.array(actions) if isinstance(space, gymnasium.spaces.Discrete) else numpy.array(actions)[:, None]
        seen, rewards, terminated, truncated, _ = envs.step(actions)
        rewards = rewards.astype("<f4")
        running += seen.astype(numpy.float64) @ weights
        for env in range(len(SEEDS)):
            hashes[env] = fnv(hashes[env], rewards[env].tobytes())
            if terminated[env] or truncated[env]:
                ends[env].append(step * 2 + int(not terminated[env]))
            if (step + 1) % stride == 0:
                out[env] += seen[env].astype("<f4").tobytes() + rewards[env].tobytes()
                sums[env].append(running[env])
                running[env] = 0.0
    envs.close()
    whole = struct.pack("<4I", stride, STEPS, len(SEEDS), length)
    for env in range(len(SEEDS)):
        whole += out[env] + struct.pack(f"<{len(sums[env])}d", *sums[env])
        whole += struct.pack(f"<QI{len(ends[env])}I", hashes[env], len(ends[env]), *ends[env])
    truncations = sum(end & 1 for env in ends for end in env)
    print(f"{name}: {len(whole)} bytes, {sum(map(len, ends)) - truncations} terminated, {truncations} truncated", flush=True)
    return whole


def main():
    assert gymnasium.__version__ == "1.4.0", gymnasium.__version__
    folder = pathlib.Path(sys.argv[1])
    stride = int(sys.argv[2]) if len(sys.argv) > 2 else 50
    folder.mkdir(parents=True, exist_ok=True)
    for name, rule in ENVIRONMENTS.items():
        (folder / f"{name}.bin").write_bytes(record(name, rule, stride))


if __name__ == "__main__":
    main()
