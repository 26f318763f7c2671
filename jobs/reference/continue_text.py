"""What transformers says after a text, likeliest token by likeliest token: continue_text.py FOLDER TEXT TOKENS"""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

# It would ask the CUDA library that setup.sh leaves out.
torch.cuda.is_current_stream_capturing = lambda: False

folder, text, tokens = sys.argv[1], sys.argv[2], int(sys.argv[3])
tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
asked = tokenizer(text, return_tensors="pt")
said = model.generate(**asked, max_new_tokens=tokens, do_sample=False)[0][asked["input_ids"].shape[1] :]
print(tokenizer.decode(said, skip_special_tokens=True), end="")
