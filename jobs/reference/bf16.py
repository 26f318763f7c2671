"""Training in bf16 (jobs/src/train/precision.rs) in PyTorch, as FSDP does with MixedPrecision(param_dtype=bfloat16, reduce_dtype=float32): forward and backward
on a copy of the model in bf16, its gradients added and applied in f32.

    bf16.py FOLDER      from the golden files of the trainers in FOLDER: writes bf16.safetensors beside them, for jobs/tests/train/golden.rs

Of each trainer: 20 losses; and of each parameter, how far the gradients of those 20 batches at the first weights are from the same in f32 (Euclidean, as a
share of their length).
"""

import copy
import sys
import tomllib
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import common
import digits
import domains
import language

STEPS = 20
TASKS = {"domains": domains.Domains, "digits": digits.Digits, "language": language.Language}


def gradients(data, model, train, step, dtype):
    """Into the model, of the mean loss over the batch, which is given back. Lane by lane, each from a copy of its own."""
    slice = train["batch"] // train["lanes"]
    totals, loss_sum, count = [torch.zeros_like(p) for p in model.parameters()], 0.0, 0
    for lane in range(train["lanes"]):
        start = step * train["batch"] + lane * slice
        at = torch.tensor([common.order(train["seed"], data.samples(), cursor) for cursor in range(start, start + slice)])
        own = copy.deepcopy(model)
        # Parameters alone: angles of positions stay f32, as they do under FSDP.
        for parameter in own.parameters():
            parameter.data = parameter.data.to(dtype)
        # Pixels are the model's inputs, and floats; symbols and tokens are neither.
        own.register_forward_pre_hook(lambda _, inputs: tuple(x.to(dtype) if x.is_floating_point() else x for x in inputs))
        labels = data.labels(at)
        loss = torch.nn.functional.cross_entropy(data.logits(own, at).float(), labels, reduction="sum")
        loss.backward()
        for total, parameter in zip(totals, own.parameters()):
            total += parameter.grad.float()
        loss_sum, count = loss_sum + loss.item(), count + len(labels)
    for parameter, total in zip(model.parameters(), totals):
        parameter.grad = total / count
    return loss_sum / count


def errors(data, model, train):
    apart, size = {}, {}
    for step in range(STEPS):
        gradients(data, model, train, step, torch.float32)
        exact = data.take(model)
        gradients(data, model, train, step, torch.bfloat16)
        for name, gradient in data.take(model).items():
            apart[name] = apart.get(name, 0.0) + (gradient - exact[name]).square().sum()
            size[name] = size.get(name, 0.0) + exact[name].square().sum()
    return {name: (apart[name] / size[name]).sqrt() for name in size}


def run(name, folder):
    spec = tomllib.loads((folder / f"{name}.toml").read_text())
    golden = load_file(folder / f"{name}.safetensors")
    train, data = spec["train"], TASKS[name](spec, folder)
    model = data.model(spec["model"])
    data.put(model, {key.removeprefix("first."): tensor for key, tensor in golden.items() if key.startswith("first.")})
    out = {f"{name}.error.{key}": error.reshape(1) for key, error in errors(data, model, train).items()}
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1.0, weight_decay=spec["optimizer"]["weight_decay"]), []
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = common.rate(spec["schedule"], step, train["steps"])
        losses.append(gradients(data, model, train, step, torch.bfloat16))
        torch.nn.utils.clip_grad_norm_(model.parameters(), train["clip_norm"])
        optimizer.step()
    losses = torch.tensor(losses)
    print(f"{name}: losses at most {(losses - golden['losses']).abs().max():.1e} from those in f32")
    return out | {f"{name}.losses": losses}


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, tensors = Path(sys.argv[1]), {}
    for name in TASKS:
        tensors |= run(name, folder)
    save_file(tensors, folder / "bf16.safetensors", {"made_by": f"torch {torch.__version__}"})
