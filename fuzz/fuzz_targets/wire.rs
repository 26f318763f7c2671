//! Every wire decoder under libFuzzer: the first byte picks the decoder. The list and the short run that CI makes are in `tests/`.
//! Run: `cargo install cargo-fuzz`, then `RUSTC_BOOTSTRAP=1 cargo fuzz run wire` in the workspace's root.
#![no_main]

#[path = "../../tests/src/fuzz.rs"]
mod fuzz;

use std::sync::LazyLock;

static TARGETS: LazyLock<Vec<fuzz::Target>> = LazyLock::new(fuzz::targets);

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    if let Some((&pick, input)) = data.split_first() {
        (TARGETS[pick as usize % TARGETS.len()].decode)(input);
    }
});
