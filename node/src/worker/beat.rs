//! Whether the compute thread still gets anywhere. Owns the times; whoever looks decides what follows. A rank that waits for its peers is not
//! late: somebody else is.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// A piece of work that takes longer than this many of the longest so far is not slow, it hangs.
const TIMES_LONGEST: u32 = 10;
/// But never before this: a machine may be busy with something else for a while.
const HANGS_MIN: Duration = Duration::from_secs(30);
/// Before the first piece is done nobody knows how long one takes.
const FIRST_MAX: Duration = Duration::from_secs(600);

/// Shared by the compute thread and whoever looks after it.
#[derive(Clone)]
pub struct Beat(Arc<Times>);

struct Times {
    zero: Instant,
    /// Milliseconds after `zero`, plus one, at which the piece that is under way began; 0 between pieces.
    begun: AtomicU64,
    longest_ms: AtomicU64,
}

impl Beat {
    pub fn new() -> Self {
        let (begun, longest_ms) = (AtomicU64::new(0), AtomicU64::new(0));
        Self(Arc::new(Times { zero: Instant::now(), begun, longest_ms }))
    }

    /// Runs one piece of work.
    pub fn piece<T>(&self, work: impl FnOnce() -> T) -> T {
        let begun = self.now_ms();
        self.0.begun.store(begun + 1, Ordering::Relaxed);
        let done = work();
        self.0.begun.store(0, Ordering::Relaxed);
        self.0.longest_ms.fetch_max((self.now_ms() - begun).max(1), Ordering::Relaxed);
        done
    }

    /// How long the piece that is under way has taken, if it hangs.
    pub fn hangs(&self) -> Option<Duration> {
        let begun = self.0.begun.load(Ordering::Relaxed).checked_sub(1)?;
        let taken = Duration::from_millis(self.now_ms().saturating_sub(begun));
        (taken > limit(self.0.longest_ms.load(Ordering::Relaxed))).then_some(taken)
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

    #[test]
    fn slow_is_not_hung_and_waiting_is_neither() {
        assert_eq!((limit(0), limit(10), limit(60_000)), (FIRST_MAX, HANGS_MIN, Duration::from_secs(600)));
        let beat = Beat::new();
        assert_eq!(beat.hangs(), None);
        assert_eq!(beat.piece(|| beat.hangs()), None);
        beat.0.begun.store(1, Ordering::Relaxed);
        let late = Beat(Arc::new(Times {
            zero: Instant::now().checked_sub(Duration::from_secs(40)).unwrap(),
            begun: AtomicU64::new(1),
            longest_ms: AtomicU64::new(20),
        }));
        assert!(late.hangs().is_some_and(|taken| taken >= Duration::from_secs(40)));
        assert!(threads().iter().any(|thread| thread.contains("running")), "{:?}", threads());
    }
}
