//! GGUF files under libFuzzer: header, metadata, every tensor. The seeded run of every test is in `jobs/tests/lm/gguf.rs`.
//! Run: `cargo install cargo-fuzz`, then `RUSTC_BOOTSTRAP=1 cargo fuzz run gguf` in the workspace's root.
#![no_main]

#[allow(dead_code, reason = "the other format's half")]
#[path = "../../jobs/tests/lm/read.rs"]
mod read;

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    read::gguf(data);
});
