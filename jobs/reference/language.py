"""The trainer `language` (jobs/src/train/language.rs) with transformers' LlamaForCausalLM: same model, samples, order and schedule.

    language.py jobs/specs/language.toml                     trains it whole and prints the held-out metrics
    language.py SPEC --weights FIRST --golden OUT            writes the golden file for jobs/tests/golden.rs
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import common

END = 256
# It would ask the CUDA library that setup.sh leaves out.
torch.cuda.is_current_stream_capturing = lambda: False


def model(config):
    hidden = config.get("hidden", 256)
    heads = config.get("heads", max(hidden // 64, 1))
    shape = LlamaConfig(
        hidden_size=hidden,
        num_hidden_layers=config.get("layers", 4),
        num_attention_heads=heads,
        num_key_value_heads=config.get("kv_heads", heads),
        intermediate_size=config.get("ffn", -(-(hidden * 8 // 3) // 64) * 64),
        vocab_size=END + 1,
        max_position_embeddings=config.get("context", 128),
        rms_norm_eps=1e-5,
        tie_word_embeddings=config.get("tied", True),
        attn_implementation="sdpa",
        use_cache=False,
    )
    return LlamaForCausalLM(shape)


class Language:
    model = staticmethod(model)

    def __init__(self, spec, folder):
        data, self.length, sides = spec["data"], spec["model"].get("context", 128), [[], []]
        for row in common.rows(folder / data["train"]):
            text = row[data["text"]].encode()
            sides[common.held(text, data["held_out"])] += [END, *text]
        self.train, self.held = (self.windows([*side, END]) for side in sides)

    def windows(self, tokens):
        count = (len(tokens) - 1) // self.length
        tokens = torch.tensor(tokens)
        return torch.stack([tokens[at * self.length : (at + 1) * self.length + 1] for at in range(count)])

    def samples(self):
        return len(self.train)

    def logits(self, model, at):
        return model(input_ids=self.train[at, :-1]).logits.flatten(0, 1)

    def labels(self, at):
        return self.train[at, 1:].flatten()

    def metrics(self, model):
        logits = torch.cat([model(input_ids=part[:, :-1]).logits for part in self.held.split(16)]).flatten(0, 1)
        targets = self.held[:, 1:].flatten()
        loss = torch.nn.functional.cross_entropy(logits, targets).item()
        return {"loss": loss, "accuracy": (logits.argmax(1) == targets).float().mean().item()}

    @staticmethod
    def parts(name, model):
        """The matrices of theirs that stand side by side in one of ours."""
        config, head = model.config, model.config.hidden_size // model.config.num_attention_heads
        shared = config.num_key_value_heads * head
        sides = {
            "qkv_proj": {"q_proj": config.hidden_size, "k_proj": shared, "v_proj": shared},
            "gate_up_proj": {"gate_proj": config.intermediate_size, "up_proj": config.intermediate_size},
        }
        ours = next((ours for ours in sides if ours in name), None)
        return {name.replace(ours, theirs): width for theirs, width in sides[ours].items()} if ours else {}

    def put(self, model, tensors):
        state, self.ours = {}, list(tensors)
        for name, tensor in tensors.items():
            parts = self.parts(name, model)
            if parts:
                state |= dict(zip(parts, tensor.T.split(list(parts.values()))))
            elif name.startswith("lm_head"):
                state[name] = tensor.T
            else:
                state[name] = tensor.T if "_proj." in name else tensor
        named = {name if name.startswith("lm_head") else f"model.{name}": tensor for name, tensor in state.items()}
        left = set(model.state_dict()) - set(named) - ({"lm_head.weight"} if model.config.tie_word_embeddings else set())
        assert not left, left
        model.load_state_dict(named, strict=False)

    def take(self, model):
        theirs, out = {name.removeprefix("model."): param.grad.clone() for name, param in model.named_parameters()}, {}
        for name in self.ours:
            parts = self.parts(name, model)
            gradient = torch.cat([theirs[part] for part in parts]) if parts else theirs[name]
            out[name] = (gradient.T if "_proj." in name or name.startswith("lm_head") else gradient).contiguous()
        return out


if __name__ == "__main__":
    common.main(__doc__, Language)
