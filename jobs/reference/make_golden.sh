#!/bin/sh
# Makes golden/ again. golden/*.safetensors: first weights from our initialisation, first gradients and 20 losses from PyTorch.
# golden/lm/*.json but prompts.json: tokens, chats, logits, continuations and embeddings from transformers, sentence-transformers and llama.cpp.
# Run setup.sh first. Usage: make_golden.sh [ENVIRONMENT], default ~/.cache/stoke-torch.
set -eu
cd "$(dirname "$0")"
env=${1:-$HOME/.cache/stoke-torch}
first=$(mktemp -d)
trap 'rm -rf "$first"' EXIT
for trainer in domains digits language diloco; do
    cargo run -q --release -p stoke-jobs --example alone -- "golden/$trainer.toml" --weights "$first/$trainer.safetensors"
    "$env/bin/python" -W ignore "$trainer.py" "golden/$trainer.toml" --weights "$first/$trainer.safetensors" \
        --golden "golden/$trainer.safetensors"
done
"$env/bin/python" -W ignore bf16.py golden

python3 ../models/fetch.py
models=${STOKE_MODELS:-$HOME/.cache/stoke/models}
weights=$models/smollm2-135m-instruct/SmolLM2-135M-Instruct.Q4_1.gguf
"$env/bin/python" lm/texts.py "$weights" "$models/all-minilm-l6-v2/tokenizer.json" golden/lm
"$env/bin/python" lm/chat.py "$weights" golden/lm
"$env/bin/python" -W ignore lm/smollm2.py "$weights" golden/lm
"$env/bin/python" -W ignore lm/minilm.py "$models/all-minilm-l6-v2" golden/lm
"$env/bin/python" -W ignore lm/qwen2.py golden/lm/qwen2
node lm/llama_cpp.mjs "$weights" golden/lm "$env/llama"
