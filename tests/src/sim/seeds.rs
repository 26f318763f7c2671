//! Many seeds on all threads, and what is written of one that fails. Owns the loop and the report; knows no test.

use std::ops::Range;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use super::planted::Planted;
use super::random::Source;
use super::run::{Setting, run};
use super::shrink::{RUNS_MAX, shrink};

/// Runs seeds on so many threads; gives what it made of each, in no order.
pub fn over<T: Send>(seeds: Range<u64>, threads: usize, each: impl Fn(u64) -> Option<T> + Sync) -> Vec<T> {
    let next = AtomicU64::new(seeds.start);
    let made = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= seeds.end {
                        return;
                    }
                    if let Some(one) = each(seed) {
                        made.lock().unwrap_or_else(PoisonError::into_inner).push(one);
                    }
                }
            });
        }
    });
    made.into_inner().unwrap_or_else(PoisonError::into_inner)
}

/// What to read after a run has failed: what does not hold, its shrunk trace, which is written to the folder, and how to see it again.
pub fn report(setting: &Setting, folder: &Path) -> String {
    let outcome = run(setting);
    let Some(violation) = outcome.violation else { return "every invariant holds".to_owned() };
    let (trace, runs) = shrink(setting, &violation, RUNS_MAX);
    let seed = match setting.source {
        Source::Seed(seed) => format!("seed-{seed}"),
        Source::Written(_) => "trace".to_owned(),
    };
    let planted = setting.planted != Planted::Nothing;
    let name = if planted { format!("{}-{seed}", setting.planted.name()) } else { seed };
    let shown = run(&trace.setting()).violation.map(|violation| violation.what).unwrap_or_default();
    let words = format!("{name}, shrunk in {runs} runs: {shown}");
    let text = trace.write(&words);
    let file = folder.join(format!("{name}.toml"));
    let written = std::fs::create_dir_all(folder).and_then(|()| std::fs::write(&file, &text));
    let written = written.map_or_else(
        |error| format!("write {}: {error}", file.display()),
        |()| {
            let again = "cargo test --release -p stoke-cli -p stoke-tests --test simulation one_run -- --nocapture";
            format!("see it again: TRACE={} {again}", file.display())
        },
    );
    format!(
        "{text}\n{written}\nWhen it is mended, the trace belongs into tests/src/sim/traces: each test run runs it again."
    )
}
