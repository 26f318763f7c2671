//! Whether the compute thread still gets anywhere. Owns the times; whoever looks decides what follows. A rank that waits for its peers is not
//! late: somebody else is.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::checkpoint;

/// A piece of work that takes longer than this many of the longest so far is not slow, it hangs.
const TIMES_LONGEST: u32 = 10;
/// But never before this: a machine may be busy with something else for a while.
const HANGS_MIN: Duration = Duration::from_secs(30);
/// Before the first piece is done nobody knows how long one takes.
const FIRST_MAX: Duration = Duration::from_secs(600);

/// A read that brings no byte for so long hangs: a store that does not answer is asked again for a minute.
const NO_BYTE_MAX: Duration = Duration::from_secs(120);

/// Shared by the compute thread and whoever looks after it.
#[derive(Clone)]
pub struct Beat(Arc<Times>);

struct Times {
    zero: Instant,
    /// Milliseconds after `zero`, plus one, at which the piece that is under way began; 0 between pieces.
    begun: AtomicU64,
    /// The piece has told that it gets on: what counts is each part of it.
    pulsed: AtomicBool,
    longest_ms: AtomicU64,
    /// The piece reads a checkpoint: it takes as long as the store needs, and gets on while bytes come.
    reads: AtomicBool,
    /// Bytes that were read when it was last looked at.
    read: AtomicU64,
    /// The same of waits for an environment, each of which has a deadline.
    waited: AtomicU64,
}

impl Beat {
    pub fn new() -> Self {
        let [begun, longest_ms, read, waited] = [0; 4].map(AtomicU64::new);
        let [pulsed, reads] = [false; 2].map(AtomicBool::new);
        Self(Arc::new(Times { zero: Instant::now(), begun, pulsed, longest_ms, reads, read, waited }))
    }

    /// Runs one piece of computing.
    pub fn piece<T>(&self, work: impl FnOnce() -> T) -> T {
        let (done, taken_ms) = self.run(work);
        self.0.longest_ms.fetch_max(taken_ms.max(1), Ordering::Relaxed);
        done
    }

    /// Between two parts of the piece that is under way: it gets on, and is counted from here. How long the first part takes is no measure: it may have made
    /// what the others use.
    pub fn pulse(&self) {
        let now = self.now_ms() + 1;
        let begun = self.0.begun.swap(now, Ordering::Relaxed);
        if self.0.pulsed.swap(true, Ordering::Relaxed) {
            self.0.longest_ms.fetch_max(now.saturating_sub(begun).max(1), Ordering::Relaxed);
        }
    }

    /// Runs a piece that waits for a checkpoint's store.
    pub fn reading<T>(&self, work: impl FnOnce() -> T) -> T {
        self.0.reads.store(true, Ordering::Relaxed);
        let (done, _) = self.run(work);
        self.0.reads.store(false, Ordering::Relaxed);
        done
    }

    fn run<T>(&self, work: impl FnOnce() -> T) -> (T, u64) {
        let begun = self.now_ms();
        self.0.begun.store(begun + 1, Ordering::Relaxed);
        let done = work();
        let last = self.0.begun.swap(0, Ordering::Relaxed);
        // Of a piece that has told of its parts, the last one.
        let begun = if self.0.pulsed.swap(false, Ordering::Relaxed) { last.saturating_sub(1) } else { begun };
        (done, self.now_ms().saturating_sub(begun))
    }

    /// What is wrong with the piece that is under way, if it hangs. To be asked now and then.
    pub fn hangs(&self) -> Option<String> {
        self.hangs_at(checkpoint::bytes_read(), stoke_jobs::rl::waited())
    }

    fn hangs_at(&self, read: u64, waited: u64) -> Option<String> {
        let begun = self.0.begun.load(Ordering::Relaxed);
        let taken = Duration::from_millis((self.now_ms() + 1).saturating_sub(begun));
        if begun == 0 {
            return None;
        }
        if !self.0.reads.load(Ordering::Relaxed) {
            if self.0.waited.swap(waited, Ordering::Relaxed) != waited {
                return self.begin_again(begun);
            }
            let late = taken > limit(self.0.longest_ms.load(Ordering::Relaxed));
            let seconds = taken.as_secs();
            return late
                .then(|| format!("one lane or one update takes {seconds} s, far longer than any before: it hangs"));
        }
        if self.0.read.swap(read, Ordering::Relaxed) != read {
            return self.begin_again(begun);
        }
        let seconds = taken.as_secs();
        (taken > NO_BYTE_MAX)
            .then(|| format!("reading the checkpoint brought no byte for {seconds} s: its store hangs"))
    }

    /// It gets on: counted from here, unless it is over meanwhile.
    fn begin_again(&self, begun: u64) -> Option<String> {
        let _over = self.0.begun.compare_exchange(begun, self.now_ms() + 1, Ordering::Relaxed, Ordering::Relaxed);
        None
    }

    fn now_ms(&self) -> u64 {
        u64::try_from(self.0.zero.elapsed().as_millis()).unwrap_or(u64::MAX)
    }
}

fn limit(longest_ms: u64) -> Duration {
    match longest_ms {
        0 => FIRST_MAX,
        longest_ms => (Duration::from_millis(longest_ms) * TIMES_LONGEST).max(HANGS_MIN),
    }
}

/// What every thread of this process is doing, as the kernel knows it, for the log of a rank that hangs.
pub fn threads() -> Vec<String> {
    let read = |path: std::path::PathBuf| std::fs::read_to_string(path).unwrap_or_default();
    let thread = |task: std::fs::DirEntry| {
        let of = |file: &str| read(task.path().join(file));
        let state =
            of("status").lines().find_map(|line| line.strip_prefix("State:").map(|state| state.trim().to_owned()));
        let (name, waits, call) = (of("comm"), of("wchan"), of("syscall"));
        let call = call.split_whitespace().next().unwrap_or("-").to_owned();
        format!("{}: {}, waits in {}, system call {call}", name.trim(), state.unwrap_or_default(), waits.trim())
    };
    std::fs::read_dir("/proc/self/task").into_iter().flatten().flatten().map(thread).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A piece of either kind that began `seconds` ago.
    fn begun_before(seconds: u64) -> Beat {
        let beat = Beat::new();
        let mut times = Arc::into_inner(beat.0).unwrap();
        times.zero = times.zero.checked_sub(Duration::from_secs(seconds)).unwrap();
        (times.begun, times.longest_ms) = (AtomicU64::new(1), AtomicU64::new(20));
        Beat(Arc::new(times))
    }

    #[test]
    fn slow_is_not_hung_and_waiting_is_neither() {
        assert_eq!((limit(0), limit(10), limit(60_000)), (FIRST_MAX, HANGS_MIN, Duration::from_secs(600)));
        let beat = Beat::new();
        assert_eq!(beat.hangs(), None);
        assert_eq!(beat.piece(|| beat.hangs()), None);
        assert!(begun_before(40).hangs().is_some_and(|why| why.starts_with("one lane or one update takes 40 s")));
        assert!(threads().iter().any(|thread| thread.contains("running")), "{:?}", threads());
    }

    #[test]
    fn a_piece_that_waits_for_an_environment_gets_on_and_hangs_when_it_does_not() {
        let beat = begun_before(40);
        assert_eq!(beat.hangs_at(0, 3), None, "it has waited for an answer since the last look");
        assert_eq!(beat.hangs_at(0, 3), None, "not, but not for long");
        beat.0.begun.store(1, Ordering::Relaxed);
        assert!(beat.hangs_at(0, 3).is_some_and(|why| why.contains("takes 40 s")));
    }

    #[test]
    fn parts_of_a_piece_count_each_by_itself() {
        let beat = begun_before(40);
        beat.0.longest_ms.store(0, Ordering::Relaxed);
        beat.pulse();
        assert_eq!(beat.0.longest_ms.load(Ordering::Relaxed), 0, "nobody knows yet how long a part takes");
        // Zero is 40 s ago: so long does the next part take.
        beat.0.begun.store(1, Ordering::Relaxed);
        assert_eq!(beat.hangs(), None);
        beat.pulse();
        assert!(beat.0.longest_ms.load(Ordering::Relaxed) >= 40_000);
        let beat = begun_before(40);
        beat.pulse();
        assert_eq!(beat.hangs(), None, "it gets on");
        beat.piece(|| beat.pulse());
        assert!(!beat.0.pulsed.load(Ordering::Relaxed), "another piece is whole unless it tells");
    }

    #[test]
    fn a_read_hangs_when_no_byte_comes_and_may_take_any_time_otherwise() {
        let beat = begun_before(500);
        beat.0.reads.store(true, Ordering::Relaxed);
        assert_eq!(beat.hangs_at(7, 0), None, "bytes have come since the last look");
        assert_eq!(beat.hangs_at(7, 0), None, "no byte, but not for long");
        beat.0.begun.store(1, Ordering::Relaxed);
        assert!(beat.hangs_at(7, 0).is_some_and(|why| why.contains("no byte for 500 s")));
        beat.reading(|| ());
        assert_eq!(beat.hangs_at(7, 0), None, "it is over");
        assert_eq!(beat.0.longest_ms.load(Ordering::Relaxed), 20, "says nothing of how long a lane may take");
    }
}
