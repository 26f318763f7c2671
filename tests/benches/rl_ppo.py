"""PPO as CleanRL's ppo.py has it (Huang et al., 2022), on one thread, for rl_ppo.rs: the same hyperparameters, gymnasium's SyncVectorEnv.

usage: rl_ppo.py STEPS SEED      with torch and gymnasium; prints env steps a second after the imports, and the mean return of the last 100 episodes.
"""

import sys
import time
from collections import deque

import gymnasium as gym
import numpy as np
import torch
from torch import nn
from torch.distributions.categorical import Categorical

ENVS, STEPS, EPOCHS, MINIBATCHES = 4, 128, 4, 4
GAMMA, LAMBDA, CLIP, ENT, VF, NORM, RATE, TOTAL = 0.99, 0.95, 0.2, 0.01, 0.5, 0.5, 2.5e-4, 500_000


def layer(inputs, outputs, std=np.sqrt(2)):
    linear = nn.Linear(inputs, outputs)
    nn.init.orthogonal_(linear.weight, std)
    nn.init.constant_(linear.bias, 0.0)
    return linear


class Agent(nn.Module):
    def __init__(self, numbers, actions):
        super().__init__()
        self.critic = nn.Sequential(layer(numbers, 64), nn.Tanh(), layer(64, 64), nn.Tanh(), layer(64, 1, 1.0))
        self.actor = nn.Sequential(layer(numbers, 64), nn.Tanh(), layer(64, 64), nn.Tanh(), layer(64, actions, 0.01))

    def forward(self, x, action=None):
        probs = Categorical(logits=self.actor(x))
        if action is None:
            action = probs.sample()
        return action, probs.log_prob(action), probs.entropy(), self.critic(x)


def main():
    budget, seed = int(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    np.random.seed(seed)
    envs = gym.make_vec("CartPole-v1", num_envs=ENVS, vectorization_mode="sync")
    agent = Agent(4, 2)
    optimizer = torch.optim.Adam(agent.parameters(), lr=RATE, eps=1e-5)
    obs = torch.zeros((STEPS, ENVS, 4))
    actions, logprobs, rewards, dones, values = (torch.zeros((STEPS, ENVS)) for _ in range(5))
    batch = ENVS * STEPS
    rounds, planned = budget // batch, TOTAL // batch
    begun = time.perf_counter()
    seen, _ = envs.reset(seed=seed)
    next_obs, next_done = torch.Tensor(seen), torch.zeros(ENVS)
    running, last = np.zeros(ENVS), deque(maxlen=100)
    for iteration in range(rounds):
        optimizer.param_groups[0]["lr"] = (1.0 - iteration / planned) * RATE
        for step in range(STEPS):
            obs[step], dones[step] = next_obs, next_done
            with torch.no_grad():
                action, logprob, _, value = agent(next_obs)
                values[step] = value.flatten()
            actions[step], logprobs[step] = action, logprob
            seen, reward, terminated, truncated, _ = envs.step(action.numpy())
            done = np.logical_or(terminated, truncated)
            running += reward
            for index in np.flatnonzero(done):
                last.append(running[index])
                running[index] = 0.0
            rewards[step] = torch.tensor(reward).view(-1)
            next_obs, next_done = torch.Tensor(seen), torch.Tensor(done)
        with torch.no_grad():
            next_value = agent.critic(next_obs).reshape(1, -1)
            advantages = torch.zeros_like(rewards)
            lastgaelam = 0
            for t in reversed(range(STEPS)):
                nonterminal = 1.0 - (next_done if t == STEPS - 1 else dones[t + 1])
                nextvalues = next_value if t == STEPS - 1 else values[t + 1]
                delta = rewards[t] + GAMMA * nextvalues * nonterminal - values[t]
                advantages[t] = lastgaelam = delta + GAMMA * LAMBDA * nonterminal * lastgaelam
            returns = advantages + values
        b_obs, b_actions, b_logprobs = obs.reshape(-1, 4), actions.reshape(-1), logprobs.reshape(-1)
        b_advantages, b_returns, b_values = advantages.reshape(-1), returns.reshape(-1), values.reshape(-1)
        order = np.arange(batch)
        for _ in range(EPOCHS):
            np.random.shuffle(order)
            for start in range(0, batch, batch // MINIBATCHES):
                mb = order[start : start + batch // MINIBATCHES]
                _, newlogprob, entropy, newvalue = agent(b_obs[mb], b_actions.long()[mb])
                logratio = newlogprob - b_logprobs[mb]
                ratio = logratio.exp()
                adv = b_advantages[mb]
                adv = (adv - adv.mean()) / (adv.std() + 1e-8)
                pg_loss = torch.max(-adv * ratio, -adv * torch.clamp(ratio, 1 - CLIP, 1 + CLIP)).mean()
                newvalue = newvalue.view(-1)
                unclipped = (newvalue - b_returns[mb]) ** 2
                clipped = b_values[mb] + torch.clamp(newvalue - b_values[mb], -CLIP, CLIP)
                v_loss = 0.5 * torch.max(unclipped, (clipped - b_returns[mb]) ** 2).mean()
                loss = pg_loss - ENT * entropy.mean() + v_loss * VF
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(agent.parameters(), NORM)
                optimizer.step()
    rate = rounds * batch / (time.perf_counter() - begun)
    print(f"{rate} {np.mean(last) if last else 0.0}")


main()
