//! How the tokenizers of GGUF files cut text before merges are applied. The patterns are those of the models' own `tokenizer.json`;
//! which names mean which is llama.cpp's list (`llama-vocab.cpp`). Owns nothing but that table.

/// A way of cutting text.
pub(super) struct Cut {
    /// Each cuts every piece that the one before left, at the bounds of its matches.
    pub patterns: &'static [&'static str],
    /// A piece that is a token is that token, whatever the merges say.
    pub whole: bool,
}

const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Names of `tokenizer.ggml.pre` that are known, for messages.
pub(super) const NAMES: &str = "default, gpt-2, smollm, llama-bpe and qwen2, and names that mean the same";

/// The way that `tokenizer.ggml.pre` names.
pub(super) fn cut(pre: &str) -> Option<Cut> {
    let (patterns, whole): (&'static [&'static str], bool) = match pre {
        "default" => (&[r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"], false),
        "gpt-2" | "phi-2" | "mpt" | "olmo" | "jais" | "trillion" | "granite-docling" => (&[GPT2], false),
        "smollm" | "starcoder" | "refact" | "command-r" | "codeshell" | "exaone" => (&[r"\p{N}", GPT2], false),
        "llama-bpe" | "llama3" | "llama-v3" | "falcon3" => (&[LLAMA3], true),
        "dbrx" | "smaug-bpe" => (&[LLAMA3], false),
        "qwen2" | "stablelm2" | "hunyuan" | "deepseek-r1-qwen" => (&[QWEN2], false),
        _ => return None,
    };
    Some(Cut { patterns, whole })
}
