"""A golden Qwen2 of two layers with random weights, and its logits: transformers' own Qwen2ForCausalLM in 64-bit floats on the weights
as the file has them (bf16). No real weights come as a package; this one holds what SmolLM2's GGUF does not: a safetensors folder,
rotate-half, biases of q, k and v, an output layer of its own, and sizes that are no whole number of lanes or blocks."""

import json
import sys
from pathlib import Path

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

TOKENS = 40


def main() -> None:
    golden = Path(sys.argv[1])
    torch.manual_seed(7)
    config = Qwen2Config(
        vocab_size=64, hidden_size=40, intermediate_size=56, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, rope_theta=1e6, rms_norm_eps=1e-6,
        tie_word_embeddings=False, attn_implementation="eager",
    )
    model = Qwen2ForCausalLM(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            # Large enough that attention is far from even, norms far from one and biases far from none.
            weight.copy_((torch.randn(weight.shape) * 0.3 + (1.0 if "norm" in name else 0.0)).bfloat16())
    tokens = torch.randint(0, config.vocab_size, (1, TOKENS))
    with torch.no_grad():
        logits = model.double()(tokens).logits[0]
    # After the logits: the angles of the rotary embedding are rounded too.
    model.to(torch.bfloat16).save_pretrained(golden)
    (golden / "generation_config.json").unlink(missing_ok=True)
    (golden / "model.safetensors").chmod(0o644)
    text = {"tokens": tokens[0].tolist(), "logits": [[round(value, 6) for value in row] for row in logits.tolist()]}
    (golden / "logits.json").write_text(json.dumps(text) + "\n")


main()
