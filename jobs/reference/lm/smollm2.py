"""Golden tokens and logits of SmolLM2-135M-Instruct: transformers' own Llama on the weights of the real GGUF, which transformers
reads, dequantises and puts in order itself. Nothing of the model is written here.

Products in 64-bit floats, so that the numbers below are the weights' and not an order of summation's (transformers keeps norms and
rotary tables in 32 bits); `float32_error` is how far the logits of the same model in 32 bits are from them, at most, over the
whole vocabulary: the least tolerance that makes sense for another implementation in 32 bits. Every continuation is 32 tokens long: greedy, and on past the end of an answer."""

import argparse
import json
import sys
import time
from pathlib import Path

import gguf
import torch
import transformers
from transformers import AutoModelForCausalLM, DynamicCache

from texts import PRES, tokenizer

TOKENS = 32
LOGITS_AT = [0, 1, 8, 31]  # which continuation tokens' logits are kept: 0 is the prompt's last position
LOGITS = 16
TRACED = "capital"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gguf", type=Path)
    parser.add_argument("golden", type=Path, help="folder with prompts.json; smollm2.json is written there")
    parser.add_argument("--time", action="store_true", help="measure tokens a second in 32 bits instead")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    metadata = {name: field.contents() for name, field in gguf.GGUFReader(args.gguf).fields.items() if "." in name}
    tokens = tokenizer(metadata, PRES["smollm"])
    template = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokens, chat_template=metadata["tokenizer.chat_template"]
    )
    model = AutoModelForCausalLM.from_pretrained(
        args.gguf.parent, gguf_file=args.gguf.name, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    model.generation_config.eos_token_id = None  # go on past the end of the answer
    model.generation_config.pad_token_id = 0
    prompts = json.loads((args.golden / "prompts.json").read_text())
    for prompt in prompts:
        if "messages" in prompt:
            prompt["text"] = template.apply_chat_template(prompt["messages"], add_generation_prompt=True, tokenize=False)
        prompt["prompt"] = tokens.encode(prompt["text"], add_special_tokens=False).ids
    if args.time:
        measure(model, prompts)
        return
    narrow = [greedy(model, prompt["prompt"]) for prompt in prompts]
    trace = states(model.double(), next(prompt for prompt in prompts if prompt["name"] == TRACED)["prompt"])
    lines, errors = [], []
    for prompt, (narrow_ids, narrow_logits) in zip(prompts, narrow):
        ids, logits = greedy(model, prompt["prompt"])
        same = next((at for at in range(TOKENS) if narrow_ids[at] != ids[at]), TOKENS - 1) + 1
        errors.append(float(f"{(narrow_logits[:same].double() - logits[:same]).abs().max().item():.1e}"))
        best = logits.topk(LOGITS)
        lines.append(
            json.dumps(
                {
                    "name": prompt["name"],
                    "text": prompt["text"],
                    "prompt": prompt["prompt"],
                    "continuation": ids,
                    "float32_error": errors[-1],
                    "margins": rounded(best.values[:, 0] - best.values[:, 1]),
                    "logits": [
                        {"at": at, "ids": best.indices[at].tolist(), "values": rounded(best.values[at])}
                        for at in LOGITS_AT
                    ],
                },
                ensure_ascii=False,
            )
        )
        print(prompt["name"], len(prompt["prompt"]), errors[-1], repr(tokens.decode(ids, skip_special_tokens=False)), flush=True)
    head = {
        "made_by": f"transformers {transformers.__version__}, torch {torch.__version__}",
        "weights": args.gguf.name,
        "float32_error": max(errors),
        "trace": trace,
    }
    body = json.dumps(head)[:-1] + ', "prompts": [\n' + ",\n".join(lines) + "\n]}\n"
    (args.golden / "smollm2.json").write_text(body)
    print(f"float32 error {max(errors)}, {len(body)} bytes", file=sys.stderr)


def greedy(model, prompt: list[int]) -> tuple[list[int], torch.Tensor]:
    """The next TOKENS tokens and the logits [TOKENS, vocabulary] that each was taken from."""
    out = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=TOKENS,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return out.sequences[0, len(prompt) :].tolist(), torch.cat(out.logits)


def states(model, prompt: list[int]) -> dict:
    """The last position's vector after the embedding and after each layer (the last one after the final norm): its first 8 values
    and its length. Tells at which layer another implementation goes wrong."""
    with torch.no_grad():
        hidden = model(torch.tensor([prompt]), output_hidden_states=True).hidden_states
    last = [state[0, -1] for state in hidden]
    return {
        "prompt": TRACED,
        "first": [rounded(state[:8]) for state in last],
        "length": rounded(torch.stack([state.norm() for state in last])),
    }


def rounded(values: torch.Tensor) -> list[float]:
    return [round(value, 5) for value in values.tolist()]


def measure(model, prompts: list[dict]) -> None:
    """Tokens a second at batch 1 in 32 bits: prefill of the prompts of 200 tokens and more, decoding after a short one."""
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, float32")
    with torch.no_grad():
        long = [torch.tensor([p["prompt"]]) for p in prompts if len(p["prompt"]) >= 200]
        short = torch.tensor([prompts[0]["prompt"]])
        for _ in range(3):
            start = time.perf_counter(), time.process_time()
            for prompt in long:
                model(prompt, logits_to_keep=1)
            print("prefill", rate(sum(prompt.shape[1] for prompt in long), start), end=", ")
            # A cache of our own: the one in the output asks CUDA whether it records, and cuda_stubs.py has no answer.
            cache = DynamicCache(config=model.config)
            out = model(short, past_key_values=cache)
            start = time.perf_counter(), time.process_time()
            for _ in range(64):
                out = model(out.logits[:, -1:].argmax(-1), past_key_values=cache)
            print("decode", rate(64, start), flush=True)


def rate(tokens: int, start: tuple[float, float]) -> str:
    wall, processor = time.perf_counter() - start[0], time.process_time() - start[1]
    return f"{tokens / wall:.1f} tokens/s ({tokens / processor:.1f} a second of processor time)"


if __name__ == "__main__":
    main()
