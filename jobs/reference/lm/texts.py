"""Golden token ids of difficult texts: the `tokenizers` package with the vocabulary of the real GGUF and the way of cutting text of
each model family, as it stands in the tokenizer.json of a model of that family; llama_cpp.mjs checks them against llama.cpp. And with
the tokenizer.json of MiniLM, with the tokens that belong around a text."""

import argparse
import json
import unicodedata
from pathlib import Path

import gguf
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

WORDS = r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)" + WORDS % "{1,3}"
QWEN2 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)" + WORDS % ""


def cut(pattern: str):
    return [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]


# (cuts, whether a piece that is a token is taken as it is): SmolLM2, GPT-2, Llama 3, Qwen 2.
PRES = {
    "smollm": ([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)], False),
    "gpt-2": ([pre_tokenizers.ByteLevel(add_prefix_space=False)], False),
    "llama-bpe": (cut(LLAMA3), True),
    "qwen2": (cut(QWEN2), False),
}

TEXTS = [
    "",
    " ",
    "  ",
    "\n",
    "\r\n",
    "\r\n\r\n",
    "\t",
    "\t\tx\n\t y",
    "a\r\nb\rc\n\n\nd",
    " leading and trailing ",
    "two  three   four    spaces",
    "nbsp\u00a0thin\u2009ideographic\u3000line\u2028paragraph\u2029next\u0085end",
    "0",
    "007",
    "1234567890",
    "12345.67890e-12",
    "3 000 000, 3,000,000 and 3_000_000",
    "x1y22z333",
    "½ ² ³ Ⅷ ١٢٣ ४५६ 一二三",
    "it's we're I'VE they'LL don't 'twas O'Neill 's",
    "it’s we’re",
    "snake_case camelCase SCREAMING_CASE kebab-case",
    "!!!???...---===",
    "a+b=c; x<<=2; y->z; p::q; #![allow(x)]",
    "http://user:pa%20ss@[::1]:8080/~path?q=1&r=%F0%9F%98%80#frag",
    "C:\\Users\\kim\\x.txt",
    "naïve café Zürich Ærøskøbing Łódź",
    unicodedata.normalize("NFD", "naïve café Zürich"),
    "e\u0301\u0302\u0303 combined",
    "Привет, мир! Γειά σου Κόσμε",
    "こんにちは世界。你好，世界！안녕하세요",
    "مرحبا بالعالم שלום עולם",
    "नमस्ते दुनिया ก็ได้",
    "😀😃👩‍👩‍👧‍👦🏳️‍🌈👍🏽🇩🇪",
    "text😀text 😀 text",
    "zero\u200bwidth\u200djoiner\u2060word\ufeffbom",
    "\u202eright to left\u202c",
    "ﬁ ﬂ Ⅳ ㎏ ｆｕｌｌｗｉｄｔｈ",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𐍈 𠜎",
    "\ufffd\u0000\u0001\u001b[31mred\u001b[0m\u007f",
    "<|im_start|>user\nhi<|im_end|>\n",
    "a<|im_end|>b<|endoftext|><|endoftext|>",
    "<|im_start |> <|im_end| > <|IM_END|> |im_end|>",
    " <|im_end|> ",
    "<repo_name>x<file_sep>y<jupyter_code>z",
    "def f(x):\n    return x**2\n\n\n# end\n",
    "    indented\n\tmore\n        yet more\n",
    "SELECT * FROM t WHERE a != 'b';\n",
    "{\"k\": [1, 2.5, null, true], \"é\": \"\\u00e9\"}",
    "-----BEGIN CERTIFICATE-----\nMIIBszCCAVmgAwIBAgIUE2x7oT4m0o1d0p6m9o4qg3h0S3cwCgYIKoZIzj0EAwIw\n",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "supercalifragilisticexpialidocious antidisestablishmentarianism",
    "Ġ is a letter, Ċ too, and ĉ",
]


def tokenizer(metadata: dict, pre: tuple[list, bool]) -> Tokenizer:
    """Byte-level BPE with a GGUF's vocabulary: every key with a dot of its metadata, by name."""
    cuts, whole = pre
    names, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    made = Tokenizer(models.BPE({name: id for id, name in enumerate(names)}, merges, ignore_merges=whole))
    made.pre_tokenizer = pre_tokenizers.Sequence(cuts)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(name, normalized=False, special=True) for name, kind in zip(names, types) if kind == 3])
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gguf", type=Path)
    parser.add_argument("minilm", type=Path, help="its tokenizer.json")
    parser.add_argument("golden", type=Path, help="folder; texts.json is written there")
    args = parser.parse_args()
    metadata = {name: field.contents() for name, field in gguf.GGUFReader(args.gguf).fields.items() if "." in name}
    made = {name: tokenizer(metadata, pre) for name, pre in PRES.items()}
    minilm = Tokenizer.from_file(str(args.minilm))
    minilm.no_truncation()
    minilm.no_padding()
    lines = []
    for text in TEXTS:
        row = {"text": text} | {name: pre.encode(text, add_special_tokens=False).ids for name, pre in made.items()}
        lines.append(json.dumps(row | {"minilm": minilm.encode(text).ids, "minilm_text": minilm.decode(minilm.encode(text).ids)}))
    (args.golden / "texts.json").write_text("[\n" + ",\n".join(lines) + "\n]\n")


if __name__ == "__main__":
    main()
