"""What PyTorch makes of small fixed inputs, for jobs/tests/rl/reference.rs: GAE and V-trace from their definitions, one PPO loss (choices and numbers) and one
double DQN loss as CleanRL writes them, their gradients, and the weights after three steps of torch.optim.Adam.

usage: learning.py FOLDER     with torch; writes FOLDER/{gae,vtrace,ppo,ppo_continuous,dqn}.json
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn

TRANSITION, TERMINATED, TRUNCATED = 1, 2, 4
GAMMA, LAMBDA = 0.99, 0.95


def plain(value):
    """f32 with as many digits as it has."""
    values = np.asarray(value.detach() if isinstance(value, torch.Tensor) else value, dtype=np.float32).ravel()
    return [float(f"{number:.9g}") for number in values]


def write(folder, name, content):
    (folder / f"{name}.json").write_text(json.dumps(content, separators=(",", ":")) + "\n")


def course(rng, steps, envs, ends):
    """Rewards, values and flags of some envs: an end now and then, and after it a step that is none."""
    flags = np.full((steps, envs), TRANSITION)
    for env in range(envs):
        step = 0
        while step < steps:
            draw = rng.random()
            if draw < ends:
                flags[step, env] |= TERMINATED if draw < ends / 2 else TRUNCATED
                if step + 1 < steps:
                    flags[step + 1, env] = 0
                    step += 1
            step += 1
    return rng.normal(size=(steps, envs)), rng.normal(size=(steps + 1, envs)) * 2, flags


def segments(flags):
    """(env, first row, row after the last, whether it was terminated) of each stretch of transitions of one episode."""
    steps, envs = flags.shape
    for env in range(envs):
        first = None
        for step in range(steps):
            flag = flags[step, env]
            if not flag & TRANSITION:
                first = None
                continue
            first = step if first is None else first
            if flag & (TERMINATED | TRUNCATED) or step + 1 == steps:
                yield env, first, step + 1, bool(flag & TERMINATED)
                first = None


def gae(rewards, values, flags):
    """Equation 16 of Schulman et al. (2016), a sum for each step."""
    advantages = np.zeros_like(rewards)
    for env, first, end, terminated in segments(flags):
        v = values[first : end + 1, env].copy()
        v[-1] *= 0.0 if terminated else 1.0
        deltas = rewards[first:end, env] + GAMMA * v[1:] - v[:-1]
        for step in range(end - first):
            powers = (GAMMA * LAMBDA) ** np.arange(end - first - step)
            advantages[first + step, env] = (powers * deltas[step:]).sum()
    return advantages


def vtrace(rewards, values, flags, ratios, rho, c):
    """Equation 1 of Espeholt et al. (2018), a sum for each step; advantages as in section 4.2."""
    targets, advantages = values[:-1].copy(), np.zeros_like(rewards)
    for env, first, end, terminated in segments(flags):
        v = values[first : end + 1, env].copy()
        v[-1] *= 0.0 if terminated else 1.0
        ratio = ratios[first:end, env]
        deltas = np.minimum(rho, ratio) * (rewards[first:end, env] + GAMMA * v[1:] - v[:-1])
        traces = np.minimum(c, ratio)
        for step in range(end - first):
            later = np.arange(end - first - step)
            products = np.concatenate([[1.0], np.cumprod(traces[step : end - first - 1])])
            targets[first + step, env] = v[step] + (GAMMA**later * products * deltas[step:]).sum()
        after = np.append(targets[first + 1 : end, env], v[-1])
        advantages[first:end, env] = np.minimum(rho, ratio) * (rewards[first:end, env] + GAMMA * after - v[:-1])
    return targets, advantages


def returns(folder):
    rng = np.random.default_rng(1)
    rewards, values, flags = (part.astype(np.float32) for part in course(rng, 40, 3, 0.15))
    flags = flags.astype(int)
    wide = [part.astype(np.float64) for part in (rewards, values)]
    advantages = gae(*wide, flags)
    transitions = flags & TRANSITION != 0
    common = {"envs": 3, "gamma": GAMMA, "rewards": plain(rewards), "values": plain(values), "flags": flags.ravel().tolist()}
    write(folder, "gae", {**common, "lambda": LAMBDA, "advantages": plain(advantages), "returns": plain(advantages + wide[1][:-1])})
    ratios = np.exp(rng.normal(size=rewards.shape) * 0.5).astype(np.float32)
    targets, advantages = vtrace(*wide, flags, ratios.astype(np.float64), 1.0, 0.9)
    targets[~transitions] = wide[1][:-1][~transitions]
    write(folder, "vtrace", {**common, "ratios": plain(ratios), "rho": 1.0, "c": 0.9, "targets": plain(targets), "advantages": plain(advantages)})


def network(sizes, activation):
    layers = []
    for index, (inputs, outputs) in enumerate(zip(sizes, sizes[1:])):
        layers += [nn.Linear(inputs, outputs), activation()] if index + 2 < len(sizes) else [nn.Linear(inputs, outputs)]
    return nn.Sequential(*layers)


def named(parts):
    """Parameters as Stoke names and lays them out: weights are [inputs, outputs]."""
    out = {}
    for name, part in parts.items():
        if isinstance(part, nn.Parameter):
            out[name] = part
            continue
        for index, linear in enumerate(module for module in part if isinstance(module, nn.Linear)):
            out[f"{name}.{index}.weight"], out[f"{name}.{index}.bias"] = linear.weight, linear.bias
    return out


def flat(tensors):
    return {name: plain(tensor.T if name.endswith("weight") else tensor) for name, tensor in tensors.items()}


def ppo(folder, continuous):
    torch.manual_seed(3)
    rng = np.random.default_rng(3)
    steps, envs, numbers, width = 12, 2, 4, 2
    rewards, values, flags = course(rng, steps, envs, 0.1)
    seen = rng.normal(size=(steps + 1, envs, numbers)).astype(np.float32)
    actor, critic = network([numbers, 8, 8, width], nn.Tanh), network([numbers, 8, 8, 1], nn.Tanh)
    log_std = nn.Parameter(torch.tensor([0.2, -0.4]))
    params = named({"actor": actor, **({"log_std": log_std} if continuous else {}), "critic": critic})
    rewards, values = rewards.astype(np.float32), (values * 0.2).astype(np.float32)
    advantages = gae(rewards.astype(np.float64), values.astype(np.float64), flags)
    rows = np.flatnonzero(flags.ravel() & TRANSITION)
    pick = lambda part: torch.tensor(np.asarray(part, dtype=np.float32).reshape(steps * envs, -1)[rows]).squeeze(-1)
    if continuous:
        actions = rng.normal(size=(steps, envs, width)).astype(np.float32)
    else:
        actions = rng.integers(0, width, size=(steps, envs))
    old = rng.normal(size=(steps, envs)) * 0.3 + (-2.5 if continuous else -0.7)
    old = old.astype(np.float32)
    x, adv, ret, val, logp = pick(seen[:-1]), pick(advantages), pick(advantages + values[:-1]), pick(values[:-1]), pick(old)
    chosen = pick(actions) if continuous else torch.tensor(actions.ravel()[rows])
    clip, ent_coef, vf_coef = 0.2, 0.01, 0.5
    first = flat(params)
    optimizer = torch.optim.Adam(params.values(), lr=2.5e-4, eps=1e-5)
    golden = []
    for _ in range(3):
        output, newvalue = actor(x), critic(x).view(-1)
        if continuous:
            probs = torch.distributions.Normal(output, log_std.expand_as(output).exp())
            newlogprob, entropy = probs.log_prob(chosen).sum(1), probs.entropy().sum(1)
        else:
            probs = torch.distributions.Categorical(logits=output)
            newlogprob, entropy = probs.log_prob(chosen), probs.entropy()
        logratio = newlogprob - logp
        ratio = logratio.exp()
        scaled = (adv - adv.mean()) / (adv.std() + 1e-8)
        pg_loss = torch.max(-scaled * ratio, -scaled * torch.clamp(ratio, 1 - clip, 1 + clip)).mean()
        unclipped = (newvalue - ret) ** 2
        near = val + torch.clamp(newvalue - val, -clip, clip)
        v_loss = 0.5 * torch.max(unclipped, (near - ret) ** 2).mean()
        loss = pg_loss - ent_coef * entropy.mean() + vf_coef * v_loss
        optimizer.zero_grad()
        loss.backward()
        kl, fraction = ((ratio - 1) - logratio).mean(), ((ratio - 1.0).abs() > clip).float().mean()
        gradient = flat({name: param.grad for name, param in params.items()})
        norm = nn.utils.clip_grad_norm_(params.values(), 0.5)
        optimizer.step()
        golden.append({"figures": plain(torch.stack([pg_loss, v_loss, entropy.mean(), kl, fraction])), "norm": float(norm)})
        if len(golden) == 1:
            golden[0]["gradient"] = gradient
    write(folder, "ppo_continuous" if continuous else "ppo", {
        "steps": steps, "envs": envs, "observations": plain(seen), "actions": actions.ravel().tolist(), "log_probs": plain(old),
        "values": plain(values), "rewards": plain(rewards), "flags": flags.ravel().tolist(), "weights": first, "updates": golden, "after": flat(params),
    })


def mix(word):
    z = (word + 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
    return z ^ z >> 31


def drawn(seed, stream, address, count, n):
    """Whole numbers below n at an address, as jobs/src/rl/draws.rs draws them."""
    key = mix(mix(seed) ^ stream)
    for word in address:
        key = mix(key ^ word)
    return [mix(key ^ (0x9E3779B97F4A7C15 * (index + 1)) % 2**64) * n >> 64 for index in range(count)]


def dqn(folder):
    torch.manual_seed(5)
    rng = np.random.default_rng(5)
    steps, envs, numbers, width, batch, seed = 20, 2, 4, 3, 32, 9
    rewards, _, flags = course(rng, steps, envs, 0.1)
    rewards = rewards.astype(np.float32)
    seen = rng.normal(size=(steps + 1, envs, numbers)).astype(np.float32)
    actions = rng.integers(0, width, size=(steps, envs))
    q, target = network([numbers, 8, 6, width], nn.ReLU), network([numbers, 8, 6, width], nn.ReLU)
    params, rows = named({"q": q}), np.flatnonzero(flags.ravel() & TRANSITION)
    flat_of = lambda part: torch.tensor(part.reshape(steps * envs, -1)).squeeze(-1)
    first, other = flat(params), flat(named({"q": target}))
    optimizer = torch.optim.Adam(params.values(), lr=2.5e-4)
    golden = []
    for update in range(3):
        at = rows[drawn(seed, 4, [update, 0, 0], batch, len(rows))]
        x, later = flat_of(seen[:-1])[at], flat_of(seen[1:])[at]
        action, reward = torch.tensor(actions.ravel()[at]), flat_of(rewards)[at]
        done = torch.tensor((flags.ravel()[at] & TERMINATED != 0).astype(np.float32))
        with torch.no_grad():
            best = q(later).argmax(1, keepdim=True)
            td_target = reward + GAMMA * target(later).gather(1, best).squeeze() * (1 - done)
        old_val = q(x).gather(1, action.unsqueeze(1)).squeeze()
        loss = nn.functional.mse_loss(td_target, old_val)
        optimizer.zero_grad()
        loss.backward()
        golden.append({"figures": plain(torch.stack([loss, old_val.mean()]))})
        if update == 0:
            golden[0]["gradient"] = flat({name: param.grad for name, param in params.items()})
        optimizer.step()
    write(folder, "dqn", {
        "steps": steps, "envs": envs, "observations": plain(seen), "actions": actions.ravel().tolist(), "rewards": plain(rewards),
        "flags": flags.ravel().tolist(), "batch": batch, "seed": seed, "weights": first, "target": other, "updates": golden, "after": flat(params),
    })


def main():
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    returns(folder)
    ppo(folder, False)
    ppo(folder, True)
    dqn(folder)


main()
