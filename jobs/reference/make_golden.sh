#!/bin/sh
# Makes golden/*.safetensors: first weights from our initialisation, first gradients and 20 losses from PyTorch.
# Run setup.sh first. Usage: make_golden.sh [ENVIRONMENT], default ~/.cache/stoke-torch.
set -eu
cd "$(dirname "$0")"
python=${1:-$HOME/.cache/stoke-torch}/bin/python
first=$(mktemp -d)
trap 'rm -rf "$first"' EXIT
for trainer in domains digits; do
    cargo run -q --release -p stoke-jobs --example alone -- "golden/$trainer.toml" --weights "$first/$trainer.safetensors"
    "$python" -W ignore "$trainer.py" "golden/$trainer.toml" --weights "$first/$trainer.safetensors" \
        --golden "golden/$trainer.safetensors"
done
