"""PyTorch's side of lm_peers.py: prints one line of JSON.

    python lm_torch.py decoder|encoder MODEL WORKLOAD THREADS
"""

import json
import resource
import sys
import time
from pathlib import Path

import torch
from transformers import AutoModel, AutoModelForCausalLM, DynamicCache

# transformers asks CUDA whether it records, and cuda_stubs.py has no answer.
torch.cuda.is_current_stream_capturing = lambda: False


def main() -> None:
    part, path, workload, threads = sys.argv[1], Path(sys.argv[2]), json.loads(Path(sys.argv[3]).read_text()), int(sys.argv[4])
    torch.set_num_threads(threads)
    with torch.inference_mode():
        figures = {"decoder": decoder, "encoder": encoder}[part](path, workload)
    figures["peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps(figures))


def seconds() -> list[float]:
    """By the wall, and of the processors."""
    return [time.perf_counter(), time.process_time()]


def since(begun: list[float]) -> list[float]:
    return [now - then for now, then in zip(seconds(), begun)]


def decoder(path: Path, workload: dict) -> dict:
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()

    def answer(prompts: list[list[int]], steps: int) -> tuple[list[float], list[float]]:
        """What it takes until all prompts have their first token, and from then on until each has so many more."""
        begun = seconds()
        cache = DynamicCache(config=model.config)
        tokens = model(torch.tensor(prompts), past_key_values=cache, logits_to_keep=1).logits.argmax(-1)
        first, then = since(begun), seconds()
        for _ in range(steps):
            tokens = model(tokens, past_key_values=cache, logits_to_keep=1).logits.argmax(-1)
        return first, since(then)

    long, short, steps = workload["long"], workload["short"], workload["steps"]
    answer([short], 2)
    firsts = [answer([prompt], 0)[0] for prompt in workload["firsts"]]
    prefill, _ = answer([long], 0)
    _, one = answer([short], steps)
    _, eight = answer(workload["eight"], steps)
    return {
        "first_token_ms": [sum(first) * 1e3 / len(first) for first in zip(*firsts)],
        "prefill": [len(long) / seconds for seconds in prefill],
        "decode_1": [steps / seconds for seconds in one],
        "decode_8": [8 * steps / seconds for seconds in eight],
    }


def encoder(path: Path, workload: dict) -> dict:
    model = AutoModel.from_pretrained(path, add_pooling_layer=False).eval()
    texts, rounds = workload["texts"], workload["rounds"]

    def embed(texts: list[list[int]]) -> torch.Tensor:
        """As sentence-transformers: padded to the longest, the mean of what is no padding, length 1."""
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones(len(text)) for text in texts], batch_first=True)
        ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(text) for text in texts], batch_first=True)
        hidden = model(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        mean = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return torch.nn.functional.normalize(mean)

    def rate(size: int) -> list[float]:
        begun = seconds()
        for _ in range(rounds):
            for at in range(0, len(texts), size):
                embed(texts[at : at + size])
        return [rounds * len(texts) / seconds for seconds in since(begun)]

    embed(texts)
    return {"embed_1": rate(1), "embed_32": rate(32)}


if __name__ == "__main__":
    main()
