"""The trainer `digits` (jobs/src/train/digits.rs) in PyTorch: same model, samples, order and schedule.

    digits.py jobs/specs/digits.toml                       trains it whole and prints the held-out metrics
    digits.py SPEC --weights FIRST --golden OUT            writes the golden file for jobs/tests/golden.rs
"""

import torch
from torch import nn

import common

KERNEL, POOLED = 5, 4  # side of the windows; side of the image after both convolutions and poolings


class Net(nn.Module):
    def __init__(self, config):
        super().__init__()
        first, second = config["channels"]
        self.first = nn.Conv2d(1, first, KERNEL)
        self.second = nn.Conv2d(first, second, KERNEL)
        self.hidden = nn.Linear(POOLED * POOLED * second, config["hidden"])
        self.output = nn.Linear(config["hidden"], 10)

    def forward(self, images):
        x = torch.relu(nn.functional.max_pool2d(self.first(images), 2))
        x = torch.relu(nn.functional.max_pool2d(self.second(x), 2))
        return self.output(torch.relu(self.hidden(x.flatten(1))))


class Digits:
    model = Net

    def __init__(self, spec, folder):
        data, sides = spec["data"], [[], []]
        for row in common.rows(folder / data["train"]):
            sides[common.held(bytes(row["pixels"]), data["held_out"])].append((row["pixels"], row["label"]))
        self.train, self.held = map(self.encode, sides)

    @staticmethod
    def encode(side):
        images = torch.tensor([pixels for pixels, _ in side], dtype=torch.uint8).reshape(-1, 1, 28, 28)
        return images / 255.0, torch.tensor([label for _, label in side])

    def samples(self):
        return len(self.train[0])

    def logits(self, model, at):
        return model(self.train[0][at])

    def labels(self, at):
        return self.train[1][at]

    def metrics(self, model):
        guesses = torch.cat([model(part).argmax(1) for part in self.held[0].split(256)])
        return {"accuracy": (guesses == self.held[1]).float().mean().item()}

    def put(self, model, tensors):
        """Our weights are [inputs, outputs], with inputs by row, column, channel; PyTorch has channel, row, column."""
        state = {}
        for name, tensor in tensors.items():
            if name == "output.weight":
                tensor = tensor.T
            elif tensor.dim() == 2:
                side = POOLED if name == "hidden.weight" else KERNEL
                tensor = tensor.reshape(side, side, -1, tensor.shape[1]).permute(3, 2, 0, 1)
                tensor = tensor.flatten(1) if name == "hidden.weight" else tensor
            state[name] = tensor
        model.load_state_dict(state)

    def take(self, model):
        """The gradients in our shapes: the inverse of `put`."""
        out = {}
        for name, param in model.named_parameters():
            gradient = param.grad.clone()
            if name == "output.weight":
                gradient = gradient.T
            elif gradient.dim() > 1:
                side = POOLED if name == "hidden.weight" else KERNEL
                gradient = gradient.reshape(len(gradient), -1, side, side)
                gradient = gradient.permute(2, 3, 1, 0).reshape(-1, len(gradient))
            out[name] = gradient
        return out


if __name__ == "__main__":
    common.main(__doc__, Digits)
