//! Memory that QUIC reads while we still write elsewhere in it: bytes handed to a send stream are read until they are acknowledged, long
//! after the send call returned. A buffer freezes the ranges that it handed out, and can be reused when the last of them was dropped.
//! Owns the only shared mutable memory of the exchange; knows nothing of ranks or steps.
//!
//! X2: a frozen range is never written before `thaw` found that nobody reads it.

use std::cell::UnsafeCell;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;

use super::memory::Memory;
use super::ranges::Ranges;
use super::sum::as_bytes;

/// How often a taker looks again when a pool is exhausted.
const POOL_WAIT: Duration = Duration::from_micros(200);

/// A vector of f32 of which finished ranges can be sent without a copy.
pub struct Buffer {
    slab: Arc<Slab>,
    frozen: Ranges,
}

/// Buffers of one length, used again and again.
pub struct Pool {
    values: usize,
    spare: Vec<Buffer>,
    /// Buffers that may still be made. An operation needs the memory of the last one only until its acknowledgements arrive, so two sets
    /// are enough in practice; the limit keeps a link that stopped acknowledging from eating the machine.
    left: usize,
}

enum Slab {
    Own(Box<[UnsafeCell<f32>]>),
    /// A rank's partial sum in the memory that its machine's ranks share.
    Partial {
        memory: Arc<Memory>,
        leaf: usize,
    },
    /// The sum of an operation there.
    Sum {
        memory: Arc<Memory>,
        operation: u64,
    },
}

impl Slab {
    fn len(&self) -> usize {
        match self {
            Self::Own(cells) => cells.len(),
            Self::Partial { memory, .. } | Self::Sum { memory, .. } => memory.values(),
        }
    }

    fn ptr(&self) -> *mut f32 {
        match self {
            Self::Own(cells) => cells.as_ptr() as *mut f32,
            Self::Partial { memory, leaf } => memory.partial_ptr(*leaf),
            Self::Sum { memory, operation } => memory.sum_ptr(*operation),
        }
    }
}

/// A range of a slab that is being sent.
struct Frozen {
    slab: Arc<Slab>,
    range: Range<usize>,
}

// SAFETY: `Buffer` alone decides who may touch which range (X2): writes need `&mut Buffer` and avoid the frozen range; other threads only
// read frozen ranges.
unsafe impl Sync for Slab {}
// SAFETY: plain memory.
unsafe impl Send for Slab {}

impl Buffer {
    pub fn new(values: usize) -> Self {
        let cells = std::iter::repeat_with(|| UnsafeCell::new(0.0)).take(values).collect();
        Self { slab: Arc::new(Slab::Own(cells)), frozen: Ranges::default() }
    }

    /// The partial sum of this place among the leaves. Its rank alone writes there, others read when it has given it (X14).
    pub fn partial(memory: &Arc<Memory>, leaf: usize) -> Self {
        Self { slab: Arc::new(Slab::Partial { memory: memory.clone(), leaf }), frozen: Ranges::default() }
    }

    /// The sum of an operation, and of every second after it. Each rank writes what it adds or is told, and reads the rest when all have added (X14).
    pub fn sum(memory: &Arc<Memory>, operation: u64) -> Self {
        Self { slab: Arc::new(Slab::Sum { memory: memory.clone(), operation }), frozen: Ranges::default() }
    }

    /// Whether others read the values where they are made.
    pub fn is_shared(&self) -> bool {
        !matches!(*self.slab, Slab::Own(_))
    }

    /// Values in the buffer.
    pub fn len(&self) -> usize {
        self.slab.len()
    }

    /// All values.
    pub fn read(&self) -> &[f32] {
        // SAFETY: writing needs `&mut self`; frozen ranges are only read.
        unsafe { std::slice::from_raw_parts(self.slab.ptr(), self.len()) }
    }

    /// A range to write. It must not be frozen.
    pub fn write(&mut self, range: Range<usize>) -> &mut [f32] {
        assert!(range.start <= range.end && range.end <= self.len(), "X2: {range:?} of {} values", self.len());
        assert!(!self.frozen.touch(&range), "X2: {range:?} is being sent");
        // SAFETY: inside the slab, apart from what others read, and `&mut self` makes this the only writer.
        unsafe { std::slice::from_raw_parts_mut(self.slab.ptr().add(range.start), range.len()) }
    }

    /// The bytes of a range, shared with whoever sends them. One may be frozen again.
    pub fn freeze(&mut self, range: Range<usize>) -> Bytes {
        assert!(range.start <= range.end && range.end <= self.len(), "X2: {range:?} of {} values", self.len());
        self.frozen.insert(range.clone());
        Bytes::from_owner(Frozen { slab: self.slab.clone(), range })
    }

    /// All values as bytes, never to be written again.
    pub fn share(self) -> Bytes {
        let range = 0..self.len();
        Bytes::from_owner(Frozen { slab: self.slab, range })
    }

    /// Makes the whole buffer writable if nobody reads it any more.
    pub fn thaw(&mut self) -> bool {
        let free = Arc::get_mut(&mut self.slab).is_some();
        if free {
            self.frozen.clear();
        }
        free
    }

    /// Waits until nobody reads it any more. False: `gives_up` said so before.
    pub fn thaw_unless(&mut self, gives_up: impl Fn() -> bool) -> bool {
        while !self.thaw() {
            if gives_up() {
                return false;
            }
            std::thread::park_timeout(POOL_WAIT);
        }
        true
    }
}

impl std::fmt::Debug for Buffer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Buffer({} values, {:?} frozen)", self.len(), self.frozen)
    }
}

impl AsRef<[u8]> for Frozen {
    fn as_ref(&self) -> &[u8] {
        // SAFETY: inside the slab; the range is frozen, so nobody writes it while this reader lives (X2).
        as_bytes(unsafe { std::slice::from_raw_parts(self.slab.ptr().add(self.range.start), self.range.len()) })
    }
}

impl Pool {
    /// A pool of at most `limit` buffers of `values` each. Nothing is allocated yet.
    pub fn new(values: usize, limit: usize) -> Self {
        Self { values, spare: Vec::with_capacity(limit), left: limit }
    }

    /// A writable buffer with any contents: one that came back, or a new one. Waits when `limit` buffers are out and none is
    /// acknowledged; a lost connection gives its buffers back too, so the wait ends.
    pub fn take(&mut self) -> Buffer {
        self.take_unless(|| false).expect("X2: the wait ends with a buffer")
    }

    /// The same, but the wait ends without one when `gives_up` says so.
    pub fn take_unless(&mut self, gives_up: impl Fn() -> bool) -> Option<Buffer> {
        loop {
            if let Some(index) = self.spare.iter_mut().position(Buffer::thaw) {
                return Some(self.spare.swap_remove(index));
            }
            if self.left > 0 {
                self.left -= 1;
                return Some(Buffer::new(self.values));
            }
            if gives_up() {
                return None;
            }
            assert!(!self.spare.is_empty(), "X2: more buffers in use than the pool was made for");
            std::thread::park_timeout(POOL_WAIT);
        }
    }

    /// Gives a buffer back, though it may still be read.
    pub fn put(&mut self, buffer: Buffer) {
        self.spare.push(buffer);
    }

    /// The same, if there is one.
    pub fn put_all(&mut self, buffers: Option<Buffer>) {
        self.spare.extend(buffers);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_is_writable_again_when_its_last_reader_is_gone() {
        let mut buffer = Buffer::new(8);
        buffer.write(0..8).copy_from_slice(&[0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]);
        let sent = buffer.freeze(2..4);
        let part = sent.slice(4..8);
        drop(sent);
        buffer.write(4..8).fill(9.0);
        assert!(!buffer.thaw());
        assert_eq!(part.as_ref(), 3f32.to_le_bytes());
        drop(part);
        assert!(buffer.thaw());
        buffer.write(0..8).fill(1.0);
        assert_eq!(buffer.read(), [1.0; 8]);
    }

    #[test]
    #[should_panic(expected = "is being sent")]
    fn a_frozen_range_cannot_be_written() {
        let mut buffer = Buffer::new(8);
        let _sent = buffer.freeze(2..4);
        buffer.write(3..5);
    }

    #[test]
    fn a_pool_gives_back_what_was_acknowledged_before_it_makes_more() {
        let mut pool = Pool::new(4, 2);
        let mut first = pool.take();
        first.write(0..4).fill(1.0);
        let sent = first.freeze(0..4);
        pool.put(first);
        let second = pool.take();
        assert_eq!(second.read(), [0.0; 4]);
        let third = {
            let mut second = second;
            let _sent = second.freeze(0..4);
            pool.put(second);
            pool.take_unless(|| true)
        };
        assert!(third.is_none(), "both are still read, and nobody waits for them");
        drop(sent);
        let (a, b) = (pool.take(), pool.take());
        assert_eq!(a.read()[0] + b.read()[0], 1.0);
    }
}
