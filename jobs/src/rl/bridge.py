"""Runs envs of one gymnasium environment for bridge.rs, which starts it: python -c SOURCE OPTIONS. Needs gymnasium 1.x and numpy.

OPTIONS is JSON: {"name": ..., "options": {...}, "envs": ..., "owner": process id, "bytes_max": ...}. Frames on standard input and output,
little-endian: u32 length of the rest, one byte that says what it is, the rest.

    out H   at the start: u32 action kind (0 choices, 1 box), u32 choices or numbers, u32 limit of steps (0: none), u32 numbers of an
            observation; f32 its low and high bounds; of a box f32 low and high bounds of an action
    in  S   u64 seed of each env              out O   f32 observations
    in  A   u64 seed for the next episode of   out T   f32 observations, f32 rewards, u8 terminated, u8 truncated
            each env; u32 choice or f32 numbers an env
    in  R   u32 env, u64 seed, u8 1 to begin   out P   f32 observation of that env
            an episode with the seed; actions
            that it takes one after the other
    out E   UTF-8: the exception that ended it

Envs begin again by themselves in gymnasium's next-step mode, each episode with the seed that came with the step. Observations of any space are flattened as gymnasium.spaces.flatten does.
"""

import ctypes
import json
import os
import signal
import struct
import sys
import traceback


def die_with_owner(owner):
    """Also in the middle of a step. The thread that started this process lives as long as it does."""
    try:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    except (OSError, AttributeError):
        return  # Not Linux: the end of standard input has to do.
    if os.getppid() != owner:
        os._exit(1)


def claim_output():
    """What environments print goes to standard error, or it would stand among the frames."""
    frames = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    return frames


def claim_input():
    """What environments read, or programs that they start, is nothing: they would take the requests."""
    requests = os.fdopen(os.dup(0), "rb")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    return requests


class Envs:
    def __init__(self, name, options, count):
        import gymnasium
        import numpy

        self.numpy = numpy
        self.envs = [gymnasium.make(name, **options) for _ in range(count)]
        self.ended = [False] * count
        first = self.envs[0]
        self.space = first.observation_space
        self.flatten = gymnasium.spaces.flatten
        flat = gymnasium.spaces.flatten_space(self.space)
        if not isinstance(flat, gymnasium.spaces.Box):
            raise TypeError(f"observations of {self.space} cannot be made a vector of fixed length")
        self.action = first.action_space
        self.choices = isinstance(self.action, gymnasium.spaces.Discrete)
        if not self.choices and not isinstance(self.action, gymnasium.spaces.Box):
            raise TypeError(f"actions of {self.action} are neither Discrete nor Box")
        self.numbers = 1 if self.choices else int(numpy.prod(self.action.shape))
        limit = (first.spec.max_episode_steps if first.spec else None) or 0
        size = int(self.action.n) if self.choices else self.numbers
        low, high = self.floats(flat.low), self.floats(flat.high)
        self.hello = struct.pack("<4I", 0 if self.choices else 1, size, limit, low.size) + low.tobytes() + high.tobytes()
        if not self.choices:
            self.hello += self.floats(self.action.low).tobytes() + self.floats(self.action.high).tobytes()

    def floats(self, values):
        return self.numpy.asarray(values).astype("<f4").ravel()

    def seen(self, observation):
        return self.floats(self.flatten(self.space, observation))

    def reset(self, body):
        seeds = struct.unpack(f"<{len(self.envs)}Q", body)
        self.ended = [False] * len(self.envs)
        rows = [self.seen(env.reset(seed=seed)[0]) for env, seed in zip(self.envs, seeds)]
        return b"O" + self.numpy.concatenate(rows).tobytes()

    def actions(self, body):
        if self.choices:
            return self.numpy.frombuffer(body, "<u4").astype(self.numpy.int64) + int(self.action.start)
        return self.numpy.frombuffer(body, "<f4").reshape((-1, *self.action.shape)).astype(self.action.dtype)

    def step(self, body):
        seeds = struct.unpack_from(f"<{len(self.envs)}Q", body)
        actions = self.actions(body[8 * len(seeds) :])
        rows, rewards, terminated, truncated = [], [], [], []
        for index, env in enumerate(self.envs):
            if self.ended[index]:
                observation, reward, end, cut = env.reset(seed=seeds[index])[0], 0.0, False, False
            else:
                observation, reward, end, cut, _ = env.step(actions[index])
            self.ended[index] = bool(end or cut)
            rows.append(self.seen(observation))
            rewards.append(float(reward))
            terminated.append(bool(end))
            truncated.append(bool(cut))
        return b"T" + self.numpy.concatenate([*rows, self.floats(rewards)]).tobytes() + bytes(terminated) + bytes(truncated)

    def replay(self, body):
        index, seed, begins = struct.unpack_from("<IQB", body)
        env = self.envs[index]
        if begins:
            self.last = self.seen(env.reset(seed=seed)[0])
            self.ended[index] = False
        for action in self.actions(body[13:]):
            if self.ended[index]:
                break  # It is no function of its seed and actions: this episode was longer before.
            observation, _, end, cut, _ = env.step(action)
            self.ended[index] = bool(end or cut)
            self.last = self.seen(observation)
        return b"P" + self.last.tobytes()


def main():
    options = json.loads(sys.argv[1])
    die_with_owner(options["owner"])
    requests, answers = claim_input(), claim_output()

    def answer(frame):
        answers.write(struct.pack("<I", len(frame)) + frame)
        answers.flush()

    try:
        envs = Envs(options["name"], options["options"], options["envs"])
        answer(b"H" + envs.hello)
        while len(head := requests.read(5)) == 5:
            length, kind = struct.unpack("<Ic", head)
            body = requests.read(length - 1)
            answer({b"S": envs.reset, b"A": envs.step, b"R": envs.replay}[kind](body))
    except Exception:
        said = traceback.format_exc().strip()
        answer(b"E" + said.encode("utf-8", "replace")[-options["bytes_max"] :])
    # Without the interpreter's end, which may wait for threads of the environment.
    os._exit(0)


main()
