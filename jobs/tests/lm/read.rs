//! Everything that can be read from the bytes of a weight file, whatever they are. Shared with `fuzz/`. Each returns whether the file opened;
//! no input may make it panic.

use std::path::Path;

use stoke_jobs::lm::weights::safetensors::Shard;
use stoke_jobs::lm::{DecoderConfig, Gguf, Raw};

pub fn gguf(bytes: &[u8]) -> bool {
    let Ok(gguf) = Gguf::from_bytes(Path::new("any.gguf"), bytes) else { return false };
    for key in gguf.keys() {
        // Whatever its type is, one of them fits or all are errors.
        drop((gguf.optional_string(key), gguf.optional_u32(key), gguf.optional_f32(key), gguf.optional_bool(key)));
        drop((gguf.optional_strings(key), gguf.optional_i32s(key), gguf.optional_f32s(key)));
    }
    gguf.names().for_each(|name| tensor(&gguf.tensor(name).expect("a listed tensor")));
    drop(DecoderConfig::from_gguf(&gguf));
    true
}

pub fn shard(bytes: &[u8]) -> bool {
    let Ok(shard) = Shard::from_bytes(Path::new("any.safetensors"), bytes) else { return false };
    for name in shard.names() {
        // Types that cannot be computed with are errors.
        if let Ok(found) = shard.tensor(&name) {
            tensor(&found.expect("a listed tensor"));
        }
    }
    true
}

fn tensor(tensor: &Raw<'_>) {
    assert_eq!(tensor.dequantise().len(), tensor.shape.iter().product::<usize>());
    assert_eq!(tensor.row(tensor.rows() - 1).len(), tensor.bytes.len() / tensor.rows());
}
