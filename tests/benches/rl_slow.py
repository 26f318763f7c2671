"""An environment that waits for what it asks, as one does that probes hosts or drives a browser: a millisecond a step, no arithmetic."""

import time

import gymnasium
import numpy


class Slow(gymnasium.Env):
    observation_space = gymnasium.spaces.Box(-1.0, 1.0, (4,), numpy.float32)
    action_space = gymnasium.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return self.observation_space.sample() * 0, {}

    def step(self, action):
        time.sleep(0.001)
        self.steps += 1
        observation = numpy.full(4, self.steps / 50, numpy.float32)
        return observation, float(action), self.steps == 50, False, {}


gymnasium.register("Slow-v0", Slow)
