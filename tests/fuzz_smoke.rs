//! A short fuzz run of every wire decoder, in CI: seeded mutations of real messages, with an allocator that counts. Owns the seed corpus and
//! the bound of I31 (decoding n bytes allocates at most 2n + 64 KiB, never panics). `fuzz/` runs the same targets under libFuzzer for hours.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use stoke_tests::fuzz::{Target, targets};

/// Mutated inputs a target: a few seconds in all on two cores.
const INPUTS: u32 = 20_000;

struct Counting;

thread_local! {
    static LIVE: Cell<isize> = const { Cell::new(0) };
    static PEAK: Cell<isize> = const { Cell::new(0) };
}

fn count(bytes: isize) {
    // A thread that is being torn down has no counter any more; nothing is measured then.
    let _ = LIVE.try_with(|live| {
        live.set(live.get() + bytes);
        let _ = PEAK.try_with(|peak| peak.set(peak.get().max(live.get())));
    });
}

// SAFETY: every call is passed on to the system allocator unchanged; counting touches only thread-local cells.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as isize);
        // SAFETY: the caller's contract is passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        count(-(layout.size() as isize));
        // SAFETY: the caller's contract is passed on.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Bytes that `decode` held at its worst, above what was held before.
fn peak_of(decode: impl FnOnce()) -> isize {
    let before = LIVE.get();
    PEAK.set(before);
    decode();
    PEAK.get() - before
}

fn mutate(seed: &[u8], rng: &mut ChaCha8Rng) -> Vec<u8> {
    let mut bytes = seed.to_vec();
    for _ in 0..rng.random_range(1..6) {
        let at = rng.random_range(0..bytes.len().max(1));
        match rng.random_range(0..6) {
            0 if !bytes.is_empty() => bytes[at] ^= 1 << rng.random_range(0..8),
            1 if !bytes.is_empty() => {
                bytes[at] = *[0, 1, 127, 250, 251, 252, 253, 254, 255].get(rng.random_range(0..9)).unwrap_or(&0)
            }
            2 => bytes.truncate(at),
            3 => bytes.insert(at.min(bytes.len()), rng.random()),
            4 => {
                let length = [u64::MAX, 1 << 40, 1 << 32, 65_536, 4_096][rng.random_range(0..5)];
                bytes.splice(at.min(bytes.len()).., length.to_le_bytes());
            }
            _ => {
                let run: Vec<u8> = (0..rng.random_range(0..2_000)).map(|_| rng.random()).collect();
                bytes.extend(run);
            }
        }
    }
    bytes
}

fn smoke(target: &Target) {
    let mut rng = ChaCha8Rng::seed_from_u64(0x5170_6b65);
    for seed in &target.corpus {
        (target.decode)(seed);
    }
    for number in 0..INPUTS {
        let seed = &target.corpus[number as usize % target.corpus.len()];
        let input = mutate(seed, &mut rng);
        let peak = peak_of(|| (target.decode)(&input));
        let bound = target.memory_bound(input.len());
        assert!(
            peak <= bound as isize,
            "{}: {} bytes of input held {peak} bytes: {input:02x?}",
            target.name,
            input.len()
        );
    }
}

#[test]
fn decoders_neither_panic_nor_over_allocate() {
    for target in targets() {
        smoke(&target);
    }
}
