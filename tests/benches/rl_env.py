#!/usr/bin/env python3
"""gymnasium's side of rl_env.rs: steps a second of SyncVectorEnv, or of CartPole's own vectorised environment.

usage: rl_env.py LANES SECONDS. Each line on stdin is the name of an environment; the answer on stdout is the steps a second of all envs together.
"""

import sys
import time

import gymnasium
import numpy

DRAWN = 256


def main():
    envs, seconds = int(sys.argv[1]), float(sys.argv[2])
    print(gymnasium.__version__, "numpy", numpy.__version__, flush=True)
    made = {}
    for line in sys.stdin:
        name = line.strip()
        if name not in made:
            mode = "vector_entry_point" if name.endswith(" vectorised") else "sync"
            env = gymnasium.make_vec(name.split()[0], num_envs=envs, vectorization_mode=mode)
            env.reset(seed=0)
            env.action_space.seed(0)
            made[name] = env, [env.action_space.sample() for _ in range(DRAWN)]
        env, actions = made[name]
        steps, begun = 0, time.perf_counter()
        while time.perf_counter() - begun < seconds:
            for action in actions[:16]:
                env.step(action)
                steps += envs
            actions = actions[16:] + actions[:16]
        print(steps / (time.perf_counter() - begun), flush=True)


if __name__ == "__main__":
    main()
