"""Writes golden/dequantise.json: what ggml's own Python package (`gguf`, by the makers of llama.cpp) reads from quantised bytes, as BLAKE3 of
the f32 values in order, little-endian. Not a number becomes 0 first, because its bits differ between processors.

- `patterns`: for each type, all 65,536 patterns of 16 bits one after the other, cut to whole blocks.
- `smollm2`: tensors of the real file, by the names of Hugging Face as `gguf` maps them, with shape and type.

README.md says how to run it.
"""

import json
import os
from pathlib import Path

import gguf
import numpy as np
from blake3 import blake3
from gguf.quants import dequantize

KINDS = ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1"]
LAYERS = [0, 13, 29]
PARTS = ["input_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
PARTS += ["post_attention_layernorm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]


def main() -> None:
    golden = {"patterns": patterns(), "smollm2": smollm2()}
    out = Path(__file__).parent / "golden/dequantise.json"
    out.write_text(json.dumps(golden, indent=1) + "\n")
    print(f"{out}: {len(golden['patterns'])} types, {len(golden['smollm2'])} tensors")


def patterns() -> dict[str, str]:
    every = np.arange(1 << 16, dtype="<u2").view(np.uint8)
    found = {}
    for kind in KINDS:
        number = gguf.GGMLQuantizationType[kind]
        block_bytes = gguf.GGML_QUANT_SIZES[number][1]
        found[kind] = hashed(dequantize(every[: every.size // block_bytes * block_bytes], number))
    return found


def smollm2() -> dict[str, dict]:
    models = Path(os.environ.get("STOKE_MODELS") or Path.home() / ".cache/stoke/models")
    reader = gguf.GGUFReader(models / "smollm2-135m-instruct/SmolLM2-135M-Instruct.Q4_1.gguf")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, max(LAYERS) + 1)
    wanted = ["model.embed_tokens", "model.norm"] + [f"model.layers.{layer}.{part}" for layer in LAYERS for part in PARTS]
    found = {}
    for name in wanted:
        tensor = tensors[f"{names.get_name(name)}.weight"]
        values = dequantize(tensor.data, tensor.tensor_type)
        # The package lists dimensions as the file does, the innermost first.
        assert values.shape == tuple(reversed(tensor.shape.tolist()))
        found[f"{name}.weight"] = {"kind": tensor.tensor_type.name, "shape": values.shape, "blake3": hashed(values)}
    return found


def hashed(values: np.ndarray) -> str:
    values = np.where(np.isnan(values), np.float32(0), values)
    return blake3(np.ascontiguousarray(values, dtype="<f4").tobytes()).hexdigest()


if __name__ == "__main__":
    main()
