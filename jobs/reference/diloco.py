"""Local steps (jobs/src/train/local.rs) in PyTorch: the digits, each lane by itself with an AdamW of its own, and SGD with Nesterov's momentum on what the
lanes have changed.

    diloco.py SPEC --weights FIRST --golden OUT     writes the golden file for jobs/tests/golden.rs
"""

import copy

import torch
from safetensors.torch import save_file

import common
import digits

STEPS = 6


def run(spec, data, model, steps_max, golden, first):
    train, config, decay = spec["train"], spec["train"]["diloco"], spec["optimizer"]["weight_decay"]
    batch, lanes, local, samples = train["batch"], train["lanes"], config["local_steps"], data.samples()
    slice = batch // lanes
    outer = torch.optim.SGD(
        model.parameters(), lr=config["outer_lr"], momentum=config["outer_momentum"], nesterov=config["outer_momentum"] > 0
    )
    losses, changes = [], None
    for step in range(STEPS):
        changed, loss_sum = [torch.zeros_like(p) for p in model.parameters()], 0.0
        for lane in range(lanes):
            own = copy.deepcopy(model)
            inner = torch.optim.AdamW(own.parameters(), lr=1.0, weight_decay=decay)
            for at in range(local):
                for group in inner.param_groups:
                    group["lr"] = common.rate(spec["schedule"], step * local + at, train["steps"] * local)
                start = step * batch * local + lane * slice * local + at * slice
                at = torch.tensor([common.order(train["seed"], samples, cursor) for cursor in range(start, start + slice)])
                loss = torch.nn.functional.cross_entropy(data.logits(own, at), data.labels(at))
                inner.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(own.parameters(), train["clip_norm"])
                inner.step()
                loss_sum += loss.item() * slice
            for total, before, after in zip(changed, model.parameters(), own.parameters()):
                total += before.detach() - after.detach()
        for parameter, total in zip(model.parameters(), changed):
            parameter.grad = total / lanes
        changes = changes or data.take(model)
        outer.step()
        losses.append(loss_sum / (batch * local))
    tensors = {f"first.{name}": tensor for name, tensor in first.items()}
    tensors |= {f"gradient.{name}": tensor.contiguous() for name, tensor in changes.items()}
    save_file(tensors | {"losses": torch.tensor(losses)}, golden, {"made_by": f"torch {torch.__version__}"})
    print(f"{golden}: {golden.stat().st_size} bytes, losses {losses}")


if __name__ == "__main__":
    common.run = run
    common.main(__doc__, digits.Digits)
