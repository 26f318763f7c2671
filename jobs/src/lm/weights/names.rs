//! GGUF's names of tensors as Hugging Face's, which are the ones that the rest of the program knows. Never looks into a file.
//! Source: `gguf-py/gguf/tensor_mapping.py` of llama.cpp, for the architectures `llama` and `qwen2`.

/// Outside of the layers.
const WHOLE: [(&str, &str); 3] =
    [("token_embd", "model.embed_tokens"), ("output_norm", "model.norm"), ("output", "lm_head")];

/// In a layer: `blk.N.` before the one, `model.layers.N.` before the other.
const LAYER: [(&str, &str); 9] = [
    ("attn_norm", "input_layernorm"),
    ("attn_q", "self_attn.q_proj"),
    ("attn_k", "self_attn.k_proj"),
    ("attn_v", "self_attn.v_proj"),
    ("attn_output", "self_attn.o_proj"),
    ("ffn_norm", "post_attention_layernorm"),
    ("ffn_gate", "mlp.gate_proj"),
    ("ffn_up", "mlp.up_proj"),
    ("ffn_down", "mlp.down_proj"),
];

/// The canonical name of a GGUF tensor; a name that is in no table stays as it is.
pub(super) fn canonical(gguf: &str) -> String {
    let mapped = || {
        let (stem, suffix) = gguf.rsplit_once('.')?;
        match stem.strip_prefix("blk.") {
            None => find(&WHOLE, stem).map(|name| format!("{name}.{suffix}")),
            Some(rest) => {
                let (layer, part) = rest.split_once('.')?;
                find(&LAYER, part).map(|name| format!("model.layers.{layer}.{name}.{suffix}"))
            }
        }
    };
    mapped().unwrap_or_else(|| gguf.to_owned())
}

fn find(table: &[(&str, &'static str)], name: &str) -> Option<&'static str> {
    table.iter().find(|(gguf, _)| *gguf == name).map(|(_, canonical)| *canonical)
}

#[cfg(test)]
mod tests {
    use super::canonical;

    #[test]
    fn names_of_gguf_become_those_of_hugging_face() {
        for (gguf, expected) in [
            ("token_embd.weight", "model.embed_tokens.weight"),
            ("output.weight", "lm_head.weight"),
            ("output_norm.weight", "model.norm.weight"),
            ("blk.0.attn_q.weight", "model.layers.0.self_attn.q_proj.weight"),
            ("blk.12.attn_k.bias", "model.layers.12.self_attn.k_proj.bias"),
            ("blk.3.ffn_norm.weight", "model.layers.3.post_attention_layernorm.weight"),
            ("blk.3.ffn_down.weight", "model.layers.3.mlp.down_proj.weight"),
            ("rope_freqs.weight", "rope_freqs.weight"),
            ("blk.3", "blk.3"),
            ("", ""),
        ] {
            assert_eq!(canonical(gguf), expected);
        }
    }
}
