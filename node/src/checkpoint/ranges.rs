//! Files in ranges, read and hashed by several threads. Owns the split and the tree of the hash; knows nothing of what the bytes mean.
//!
//! BLAKE3 is a tree over 1 KiB chunks: a range whose length is a power of two, at a multiple of that length, is a node of it. So ranges can be
//! hashed in any order, and their hashes are joined into that of the file.

use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;

use blake3::hazmat::{ChainingValue, HasherExt, Mode, left_subtree_len, merge_subtrees_non_root, merge_subtrees_root};

use super::error::CheckpointError;

/// What one thread reads at a time: large enough that an object store's latency is small beside it, small enough to share a shard out.
pub(super) const RANGE_BYTES: u64 = 8 << 20;
/// More threads than this do not make a disk faster.
const READERS_MAX: usize = 8;

/// The ranges of a file; the last one may be shorter.
pub(super) fn ranges(file_bytes: u64) -> impl Iterator<Item = Range<u64>> {
    let starts = (0..file_bytes).step_by(RANGE_BYTES as usize);
    starts.map(move |start| start..file_bytes.min(start + RANGE_BYTES))
}

/// The hash of one range of a file.
pub(super) struct RangeHash {
    hasher: blake3::Hasher,
    is_whole: bool,
}

impl RangeHash {
    pub fn new(range: &Range<u64>, file_bytes: u64) -> Self {
        let mut hasher = blake3::Hasher::new();
        hasher.set_input_offset(range.start);
        Self { hasher, is_whole: range.end - range.start == file_bytes }
    }

    pub fn update(&mut self, bytes: &[u8]) {
        self.hasher.update(bytes);
    }

    /// For [`file_blake3`].
    pub fn finish(self) -> ChainingValue {
        if self.is_whole { *self.hasher.finalize().as_bytes() } else { self.hasher.finalize_non_root() }
    }
}

/// The BLAKE3 of a file from the hashes of its ranges.
pub(super) fn file_blake3(parts: &[ChainingValue], file_bytes: u64) -> [u8; 32] {
    root(parts, file_bytes, RANGE_BYTES)
}

fn root(parts: &[ChainingValue], bytes: u64, range_bytes: u64) -> [u8; 32] {
    if let [whole] = parts {
        return *whole;
    }
    let left = left_subtree_len(bytes);
    let (first, second) = parts.split_at((left / range_bytes) as usize);
    let (first, second) = (node(first, left, range_bytes), node(second, bytes - left, range_bytes));
    *merge_subtrees_root(&first, &second, Mode::Hash).as_bytes()
}

fn node(parts: &[ChainingValue], bytes: u64, range_bytes: u64) -> ChainingValue {
    if let [leaf] = parts {
        return *leaf;
    }
    let left = left_subtree_len(bytes);
    let (first, second) = parts.split_at((left / range_bytes) as usize);
    merge_subtrees_non_root(&node(first, left, range_bytes), &node(second, bytes - left, range_bytes), Mode::Hash)
}

/// Does `work` for every item, side by side. The results in the order of the items, or the error of the first item that has one.
pub(super) fn side_by_side<T: Send, R: Send>(
    items: Vec<T>,
    work: impl Fn(T) -> Result<R, CheckpointError> + Sync,
) -> Result<Vec<R>, CheckpointError> {
    let threads = thread::available_parallelism().map_or(1, usize::from).min(READERS_MAX).min(items.len());
    let (queue, done) = (Mutex::new(items.into_iter().enumerate()), Mutex::new(Vec::new()));
    let take = || locked(&queue).next();
    let run = || {
        while let Some((index, item)) = take() {
            let result = work(item);
            if result.is_err() {
                // Items are taken in order: those before this one are under way or done.
                locked(&queue).by_ref().for_each(drop);
            }
            locked(&done).push((index, result));
        }
    };
    thread::scope(|scope| {
        (1..threads).for_each(|_| drop(scope.spawn(run)));
        run();
    });
    let mut done = done.into_inner().unwrap_or_else(PoisonError::into_inner);
    done.sort_by_key(|(index, _)| *index);
    done.into_iter().map(|(_, result)| result).collect()
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hashes_of_ranges_join_into_that_of_the_file() {
        const RANGE: u64 = 4096;
        for bytes in [1, 1024, 4095, 4096, 4097, 8192, 8193, 12_288, 20_479, 20_480, 65_537, 200_000] {
            let file: Vec<u8> = (0..bytes).map(|i| (i * 31 % 251) as u8).collect();
            let part = |start: u64| {
                let range = start..bytes.min(start + RANGE);
                let mut hash = RangeHash::new(&range, bytes);
                file[range.start as usize..range.end as usize].chunks(100).for_each(|chunk| hash.update(chunk));
                hash.finish()
            };
            let parts: Vec<ChainingValue> = (0..bytes).step_by(RANGE as usize).map(part).collect();
            assert_eq!(root(&parts, bytes, RANGE), *blake3::hash(&file).as_bytes(), "{bytes} bytes");
        }
    }

    #[test]
    fn results_come_in_order_and_the_first_error_wins() {
        let double = |item: u64| Ok(item * 2);
        assert_eq!(side_by_side((0..100).collect(), double).unwrap(), (0..100).map(|i| i * 2).collect::<Vec<_>>());
        let failing = |item: u64| match item {
            30 | 31 | 90 => Err(CheckpointError::Missing { uri: item.to_string() }),
            _ => Ok(item),
        };
        let error = side_by_side((0..100).collect(), failing).unwrap_err().to_string();
        assert!(error.contains("no checkpoint at 30"), "{error}");
    }
}
