//! The benches that compare with a peer or have a goal, one after the other with fewer turns than alone, and one table of what they found.
//!
//!     cargo bench -p stoke-cli -p stoke-tests --bench suite
//!
//! Under 20 minutes on two cores. Peers are measured in the same run, where they are installed: `sh jobs/reference/setup.sh` makes PyTorch's. What takes
//! longer stands alone: `goodput`, `detection`, `seeds`, `digest`, `rl_rollouts`, `serving`, `lm_peers.py`, `serving_ray.sh`.

use std::time::Instant;

use stoke_tests::report::{FILE, Figure, Goal, Row, rows};

/// Each with what makes it shorter.
const BENCHES: [(&str, &[(&str, &str)]); 9] = [
    ("exchange", &[("STOKE_BENCH_TURNS", "3")]),
    ("training", &[("STOKE_BENCH_ROUNDS", "3")]),
    ("placement", &[]),
    ("scale", &[]),
    ("failures", &[]),
    ("checkpoint", &[]),
    ("restart", &[("STOKE_BENCH_ENTRIES", "200000")]),
    ("rl_env", &[("STOKE_BENCH_TURNS", "3")]),
    ("rl_ppo", &[("STOKE_BENCH_TURNS", "3")]),
];

fn main() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let file = folder.path().join("rows.jsonl");
    let begun = Instant::now();
    let mut failed = Vec::new();
    for (bench, shorter) in BENCHES {
        println!("\n== {bench} ({:.0} s)", begun.elapsed().as_secs_f64());
        let mut command = stoke_tests::binary::cargo();
        command.args(["bench", "--locked", "-p", "stoke-cli", "-p", "stoke-tests", "--bench", bench]);
        command.env(FILE, &file).envs(shorter.iter().copied());
        if !command.status().is_ok_and(|status| status.success()) {
            failed.push(bench);
        }
    }
    table(&rows(&file));
    println!("\n{:.1} minutes", begun.elapsed().as_secs_f64() / 60.0);
    assert!(failed.is_empty(), "these did not end well: {}", failed.join(", "));
}

fn table(rows: &[Row]) {
    println!("\n| what | unit | ours | spread | peer | theirs | spread | ratio | goal |");
    println!("| --- | --- | --- | --- | --- | --- | --- | --- | --- |");
    for row in rows {
        let (peer, theirs) = row.peer.as_ref().map_or(("-", None), |(peer, theirs)| (peer.as_str(), Some(*theirs)));
        let [ours, theirs] = [Some(row.ours), theirs].map(shown);
        let ratio = row.ratio().map_or("-".to_owned(), |ratio| format!("{ratio:.3}"));
        let compared = row.ratio().unwrap_or(row.ours.median);
        let goal = row.goal.map_or("-".to_owned(), |goal| {
            let (sign, bound) = match goal {
                Goal::AtLeast(least) => (">=", least),
                Goal::AtMost(most) => ("<=", most),
            };
            format!("{sign} {bound:.3}: {}", if goal.holds(compared) { "met" } else { "MISSED" })
        });
        println!("| {} | {} | {ours} | {peer} | {theirs} | {ratio} | {goal} |", row.what, row.unit);
    }
}

/// A median in three figures, and its spread.
fn shown(figure: Option<Figure>) -> String {
    let Some(Figure { median, spread }) = figure else { return "- | -".to_owned() };
    let digits = (2 - median.abs().max(1e-9).log10().floor() as i32).clamp(0, 6) as usize;
    let spread = spread.map_or("-".to_owned(), |spread| format!("{:.0}%", 100.0 * spread));
    format!("{median:.digits$} | {spread}")
}
