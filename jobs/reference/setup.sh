#!/bin/sh
# Makes a Python environment with PyTorch for the reference scripts: setup.sh [FOLDER], default ~/.cache/stoke-torch. With gymnasium, transformers
# and, in its folder llama/, llama.cpp from npm where npm is there: for the language models.
# PyPI's PyTorch asks for gigabytes of CUDA libraries that a CPU never calls: it is installed without them, and
# cuda_stubs.py writes empty libraries in their place. Needs python3 with venv, gcc and readelf.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
env=${1:-$HOME/.cache/stoke-torch}
python3 -m venv "$env"
"$env/bin/pip" install -q --no-deps torch==2.12.1
"$env/bin/pip" install -q numpy gymnasium==1.4.0 safetensors scikit-learn filelock fsspec jinja2 networkx sympy typing_extensions
"$env/bin/pip" install -q --no-deps transformers==5.24.0 tokenizers==0.23.3 gguf==0.19.0 accelerate==1.15.0 sentence-transformers==6.2.0
"$env/bin/pip" install -q huggingface_hub regex packaging pyyaml requests tqdm psutil
if command -v npm >/dev/null; then
    npm install --silent --ignore-scripts --prefix "$env/llama" node-llama-cpp@3.22.1 @node-llama-cpp/linux-x64@3.22.1
fi
"$env/bin/python" "$here/cuda_stubs.py" "$("$env/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
"$env/bin/python" -c 'import torch; print("torch", torch.__version__, (torch.ones(2, 2) @ torch.ones(2, 2)).sum().item())'
