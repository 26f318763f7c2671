"""Environments that fail, for bridge.rs: imported by gymnasium.make("environments:Failing-v0", how=...)."""

import os
import sys

import gymnasium
import numpy


class Failing(gymnasium.Env):
    """Fails as `how` says at the fifth step."""

    observation_space = gymnasium.spaces.Box(-1.0, 1.0, (2,), numpy.float32)
    action_space = gymnasium.spaces.Discrete(2, start=5)

    def __init__(self, how):
        self.how = how
        if how == "at start":
            raise ValueError("no such world")

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        print("printed by an environment")
        return numpy.zeros(2, numpy.float32), {}

    def step(self, action):
        self.steps += 1
        assert action in (5, 6)
        observation, reward = numpy.full(2, self.steps / 10, numpy.float32), 1.0
        if self.steps == 5:
            if self.how == "raise":
                raise RuntimeError("the world has ended")
            if self.how == "exit":
                sys.stderr.write("about to leave\n")
                sys.stderr.flush()
                os._exit(3)
            if self.how == "hang":
                sys.stderr.write("thinking\n")
                sys.stderr.flush()
                while True:
                    pass
            if self.how == "nan":
                observation[1] = numpy.nan
            if self.how == "inf":
                reward = float("inf")
            if self.how == "close":
                os.close(1)
                os.closerange(3, 64)
                while True:
                    pass
        return observation, reward, False, False, {}


gymnasium.register("Failing-v0", entry_point=Failing, disable_env_checker=True)
