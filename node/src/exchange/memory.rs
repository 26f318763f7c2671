//! Memory that the ranks of one machine share for a generation. Each rank's partial sums lie there; each adds its own pieces from everybody's, where
//! all read the whole sum: nothing is copied. Where there are other machines, what they give is added there too, and what they added is written there.
//! Owns the layout, the counters and the waiting; whose turn it is is `all_reduce.rs`'s.
//!
//! X14: what a rank writes others read only after it has counted it: `given` when its partials of an operation are whole, `added` when its pieces
//! of the sum are. Partials are written again after everybody has added; a sum two operations later, after everybody who reads it has given again.
//! X15: nothing that others write here is trusted beyond numbers: counters only end waits, and no length or place comes from the memory.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use memmap2::{MmapOptions, MmapRaw};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, fcntl_get_seals, ftruncate, memfd_create};
use rustix::thread::futex::{self, Timespec};
use stoke_protocol::ids::{Fingerprint, Step};

use super::plan::Plan;
use super::sum::VALUE_BYTES;

const LINE: usize = 64;
const PAGE: usize = 4096;
/// Sums that are there at a time: the one that ranks read, and the one that is made.
pub const SUMS: usize = 2;
/// Looks before a rank sleeps. More would take the processor from ranks that it waits for.
const LOOKS: u32 = 100;
/// A ring that is missed costs no more than this.
const SLEEP_MAX: Timespec = Timespec { tv_sec: 0, tv_nsec: 50_000_000 };

/// See the module.
pub struct Memory {
    map: MmapRaw,
    layout: Layout,
}

/// Where what lies: the bell, a line of counters for each rank of the host, the sums, the partials.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Layout {
    values: usize,
    ranks: usize,
    leaves: usize,
    data: usize,
    vector: usize,
}

/// Whoever waits sleeps on it.
#[repr(C, align(64))]
struct Bell {
    rung: AtomicU32,
    sleepers: AtomicU32,
}

/// What a rank tells.
#[repr(C, align(64))]
pub struct Line {
    pub given: AtomicU64,
    pub added: AtomicU64,
    step: AtomicU64,
    replica: AtomicU64,
    compares: AtomicU32,
}

impl Layout {
    /// None: it would not fit into an address space.
    pub fn of(plan: &Plan) -> Option<Self> {
        let (values, ranks, leaves) = (plan.values, plan.host().len(), plan.own_leaves().count());
        let data = LINE.checked_mul(1 + ranks)?.checked_next_multiple_of(PAGE)?;
        let vector = values.checked_mul(VALUE_BYTES)?.checked_next_multiple_of(PAGE)?;
        let layout = Self { values, ranks, leaves, data, vector };
        vector.checked_mul(SUMS + leaves)?.checked_add(data)?;
        Some(layout)
    }

    fn bytes(&self) -> usize {
        self.data + self.vector * (SUMS + self.leaves)
    }
}

impl Memory {
    /// Memory of its own, and what others map it by. Gone with the last process that has it.
    pub fn make(layout: Layout) -> io::Result<(Self, OwnedFd)> {
        let fd = memfd_create("stoke-exchange", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
        ftruncate(&fd, layout.bytes() as u64)?;
        // Nobody can cut it under the feet of those who read it.
        fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        Ok((Self::map(fd.try_clone()?, layout)?, fd))
    }

    /// What another rank has made.
    pub fn map(fd: OwnedFd, layout: Layout) -> io::Result<Self> {
        let file = File::from(fd);
        let is_whole = file.metadata()?.len() == layout.bytes() as u64;
        if !is_whole || !fcntl_get_seals(&file)?.contains(SealFlags::SHRINK | SealFlags::SEAL) {
            return Err(io::Error::other("it is not what this generation exchanges through"));
        }
        let map = MmapOptions::new().len(layout.bytes()).map_raw(&file)?;
        Ok(Self { map, layout })
    }

    /// Of the rank with this place in the host.
    pub fn line(&self, index: usize) -> &Line {
        assert!(index < self.layout.ranks, "X15: place {index} of {}", self.layout.ranks);
        // SAFETY: inside the mapping, aligned to a line; atomics may have any bits, and are what others write there too.
        unsafe { &*self.map.as_mut_ptr().add(LINE * (1 + index)).cast() }
    }

    fn bell(&self) -> &Bell {
        // SAFETY: as in `line`.
        unsafe { &*self.map.as_mut_ptr().cast() }
    }

    /// Wakes everybody who waits here.
    pub fn ring(&self) {
        let bell = self.bell();
        bell.rung.fetch_add(1, Ordering::SeqCst);
        if bell.sleepers.load(Ordering::SeqCst) > 0 {
            // There is no other error than a wrong address.
            let _ = futex::wake(&bell.rung, futex::Flags::empty(), i32::MAX as u32);
        }
    }

    /// Asks until there is an answer; after some tries only when the bell was rung.
    pub fn wait<T>(&self, mut ask: impl FnMut() -> Option<T>) -> T {
        let bell = self.bell();
        for look in 0.. {
            let rung = bell.rung.load(Ordering::SeqCst);
            if let Some(answer) = ask() {
                return answer;
            }
            if look < LOOKS {
                std::hint::spin_loop();
                continue;
            }
            bell.sleepers.fetch_add(1, Ordering::SeqCst);
            // Woken, rung meanwhile, a signal, or a ring that was missed: all the same.
            let _ = futex::wait(&bell.rung, futex::Flags::empty(), rung, Some(&SLEEP_MAX));
            bell.sleepers.fetch_sub(1, Ordering::SeqCst);
        }
        unreachable!("X14: the looks do not end")
    }

    /// A rank's partial sum, which lies at this place among the leaves.
    pub fn partial(&self, leaf: usize) -> &[f32] {
        // SAFETY: inside the mapping; read when its rank has given it, and that rank writes it no more before all have added (X14).
        unsafe { std::slice::from_raw_parts(self.partial_ptr(leaf), self.layout.values) }
    }

    /// Where that rank writes it.
    pub fn partial_ptr(&self, leaf: usize) -> *mut f32 {
        assert!(leaf < self.layout.leaves, "X15: leaf {leaf} of {}", self.layout.leaves);
        self.vector(SUMS + leaf)
    }

    pub fn values(&self) -> usize {
        self.layout.values
    }

    /// The sum of an operation.
    pub fn sum(&self, operation: u64) -> &[f32] {
        // SAFETY: inside the mapping; read when all have added, and written again two operations later (X14).
        unsafe { std::slice::from_raw_parts(self.sum_ptr(operation), self.layout.values) }
    }

    /// The part of a sum that this rank makes.
    ///
    /// # Safety
    /// Nobody else has the range: it is of one of the caller's own pieces, and everybody has given for this operation (X14).
    #[expect(clippy::mut_from_ref, reason = "the memory is many processes', and the protocol says who writes where")]
    pub unsafe fn sum_mut(&self, operation: u64, range: Range<usize>) -> &mut [f32] {
        assert!(range.start <= range.end && range.end <= self.layout.values, "X15: {range:?}");
        // SAFETY: inside the mapping; alone, as the caller says.
        unsafe { std::slice::from_raw_parts_mut(self.sum_ptr(operation).add(range.start), range.len()) }
    }

    /// Where it is made.
    pub fn sum_ptr(&self, operation: u64) -> *mut f32 {
        self.vector((operation % SUMS as u64) as usize)
    }

    fn vector(&self, index: usize) -> *mut f32 {
        // SAFETY: `index` is below SUMS + leaves, so it is inside the mapping.
        unsafe { self.map.as_mut_ptr().add(self.layout.data + index * self.layout.vector).cast() }
    }
}

impl std::fmt::Debug for Memory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Memory({:?})", self.layout)
    }
}

impl Line {
    /// Before `given` says so.
    pub fn describe(&self, step: Step, replica: Option<Fingerprint>) {
        self.step.store(step.0, Ordering::Relaxed);
        self.replica.store(replica.unwrap_or_default().0, Ordering::Relaxed);
        self.compares.store(replica.is_some().into(), Ordering::Relaxed);
    }

    /// After `given` has said so.
    pub fn described(&self) -> (Step, Option<Fingerprint>) {
        let compares = self.compares.load(Ordering::Relaxed) != 0;
        let replica = Fingerprint(self.replica.load(Ordering::Relaxed));
        (Step(self.step.load(Ordering::Relaxed)), compares.then_some(replica))
    }
}
