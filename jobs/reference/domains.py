"""The trainer `domains` (jobs/src/train/domains.rs) in PyTorch: same model, samples, order and schedule.

    domains.py jobs/specs/domains.toml                     trains it whole and prints the held-out metrics
    domains.py SPEC --weights FIRST --golden OUT           writes the golden file for jobs/tests/golden.rs
"""

import numpy
import torch
from sklearn.metrics import roc_auc_score, roc_curve
from torch import nn

import common

ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789-._"
LABELS = ["benign", "phishing"]


class Net(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.embedding = nn.Embedding(2 + len(ALPHABET), config["embedding"])
        sizes = config["widths"], config["embedding"], config["channels"]
        self.convolutions = nn.ModuleList(nn.Conv1d(sizes[1], sizes[2], width) for width in sizes[0])
        self.hidden = nn.Linear(len(sizes[0]) * sizes[2], config["hidden"])
        self.output = nn.Linear(config["hidden"], 2)

    def forward(self, symbols):
        x = self.embedding(symbols).transpose(1, 2)
        x = torch.cat([torch.relu(convolution(x).amax(2)) for convolution in self.convolutions], 1)
        return self.output(torch.relu(self.hidden(x)))


class Domains:
    model = Net

    def __init__(self, spec, folder):
        data, self.length, self.width = spec["data"], spec["model"]["length"], max(spec["model"]["widths"])
        sides = [[], []]
        for row in common.rows(folder / data["train"]):
            side = sides[common.held(row[data["registered"]].encode(), data["held_out"])]
            side.append((row["domain"][-self.length :], LABELS.index(row["label"])))
        self.train, self.held = map(self.encode, sides)

    def encode(self, side):
        symbols = torch.zeros(len(side), self.length + self.width, dtype=torch.long)
        for at, (name, _) in enumerate(side):
            symbols[at, : len(name)] = torch.tensor([ALPHABET.find(c) + 2 if c in ALPHABET else 1 for c in name])
        return symbols, torch.tensor([len(name) for name, _ in side]), torch.tensor([label for _, label in side])

    def samples(self):
        return len(self.train[0])

    def cut(self, side, at):
        """The names with as many symbols 0 behind the longest as the widest window needs to lie in them."""
        return side[0][at, : side[1][at].max() + self.width]

    def logits(self, model, at):
        return model(self.cut(self.train, at))

    def labels(self, at):
        return self.train[2][at]

    def metrics(self, model):
        at = torch.arange(len(self.held[0])).split(256)
        scores = torch.cat([model(self.cut(self.held, part)) for part in at])
        scores, labels = (scores[:, 1] - scores[:, 0]).numpy(), self.held[2].numpy()
        alarms, hits, _ = roc_curve(labels, scores, drop_intermediate=False)
        last = numpy.flatnonzero(alarms <= 0.01)[-1]
        found, wrong = hits[last] * (labels == 1).sum(), alarms[last] * (labels == 0).sum()
        return {
            "accuracy": float(((scores > 0) == labels).mean()),
            "roc_auc": float(roc_auc_score(labels, scores)),
            "precision_at_1pct_fpr": float(found / (found + wrong)),
            "recall_at_1pct_fpr": float(hits[last]),
        }

    def put(self, model, tensors):
        """Our weights are [inputs, outputs]; a window's inputs are position by position, then channel."""
        state = {}
        for name, tensor in tensors.items():
            if name.startswith("convolutions") and tensor.dim() == 2:
                tensor = tensor.reshape(-1, model.embedding.embedding_dim, tensor.shape[1]).permute(2, 1, 0)
            elif tensor.dim() == 2 and not name.startswith("embedding"):
                tensor = tensor.T
            state[name] = tensor
        model.load_state_dict(state)

    def take(self, model):
        """The gradients in our shapes: the inverse of `put`."""
        out = {}
        for name, param in model.named_parameters():
            gradient = param.grad.clone()
            if gradient.dim() == 3:
                gradient = gradient.permute(2, 1, 0).reshape(-1, gradient.shape[0])
            elif gradient.dim() == 2 and not name.startswith("embedding"):
                gradient = gradient.T
            out[name] = gradient
        return out


if __name__ == "__main__":
    common.main(__doc__, Domains)
