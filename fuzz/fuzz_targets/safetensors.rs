//! Safetensors files under libFuzzer: header and every tensor. The seeded run of every test is in `jobs/tests/lm/safetensors.rs`.
//! Run: `cargo install cargo-fuzz`, then `RUSTC_BOOTSTRAP=1 cargo fuzz run safetensors` in the workspace's root.
#![no_main]

#[allow(dead_code, reason = "the other format's half")]
#[path = "../../jobs/tests/lm/read.rs"]
mod read;

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    read::shard(data);
});
