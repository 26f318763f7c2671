//! What `stoke run` says at its end: one object for programs, a few lines for people, and the same object as `summary.json` beside the
//! checkpoints. Owns its field names, which are stable over releases.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};
use stoke_protocol::ids::Rank;
use stoke_protocol::message::client::{ExecView, JobState, JobView, Reply, Request};
use stoke_protocol::message::rank::Exit as ExitOf;
use tokio::time::{Instant, timeout_at};

use crate::chaos::account::Account;
use crate::client::Client;
use crate::failure::{Exit, Failure, OrFail};
use crate::json::{exec, float, job_state, ledger};
use crate::output;
use crate::progress::figures;

/// Changes of the world size in a summary.
const WORLDS_SHOWN_MAX: usize = 8;

/// Of each rank that may tell why.
const LOG_LINES: u32 = 20;
/// Logs come from agents that may be in trouble.
const LOGS_MAX: Duration = Duration::from_secs(5);

pub struct Report {
    pub view: JobView,
    pub wall: Duration,
    /// Processes of the local cluster that died and were started again.
    pub restarts: u32,
    /// Last lines of the ranks that failed, each with its rank.
    pub logs: Vec<(Rank, String)>,
    /// Of a run under chaos.
    pub chaos: Option<Account>,
}

impl Report {
    /// Prints the end of the run and writes `summary.json`; exit code 1 unless the job succeeded.
    pub fn publish(&self, out: &Path, as_json: bool) -> Result<Exit, Failure> {
        let document = self.json(out);
        let path = out.join("summary.json");
        std::fs::write(&path, format!("{document:#}\n"))
            .or_fail(Exit::Negative, format!("write {}", path.display()))?;
        if as_json {
            output::print_json(&document)?;
        } else {
            output::print(&self.text(out))?;
        }
        if let Some(account) = &self.chaos {
            output::say(format_args!("\n{}", account.text().trim_end()));
        }
        if self.view.state == JobState::Succeeded {
            return Ok(Exit::Ok);
        }
        for (rank, line) in &self.logs {
            output::say(format_args!("[{rank}] {line}"));
        }
        output::say(format_args!("error: {} {}: {}", self.view.job, job_state(self.view.state), self.view.reason));
        Ok(Exit::Negative)
    }

    fn json(&self, out: &Path) -> Value {
        let mut document = document(&self.view, self.wall);
        document["restarts"] = json!(self.restarts);
        document["out"] = json!(out);
        if let Some(account) = &self.chaos {
            document["chaos"] = account.json_of_run();
        }
        document
    }

    fn text(&self, out: &Path) -> String {
        let mut table = summary_table(&self.view);
        let wall_ms = u64::try_from(self.wall.as_millis()).unwrap_or(u64::MAX);
        table.row(["wall time".into(), output::duration_ms(wall_ms)]);
        table.row(["written to".into(), out.display().to_string()]);
        let mut text = table.render();
        if let Some(checkpoint) = self.view.checkpoint.as_ref().filter(|_| self.view.state == JobState::Succeeded) {
            let folder = checkpoint.uri.strip_prefix("file://").unwrap_or(&checkpoint.uri);
            let (program, folder) = (output::program(), output::quoted(folder));
            text.push_str(&match self.view.trainer.as_str() {
                "rl" => format!("\nuse it:  {program} eval {folder}; {program} plot {folder}\n"),
                "language" => {
                    let opened = format!("{program} infer --model model --raw TEXT");
                    format!("\nuse it:  {program} checkpoint export {folder} --out model; {opened}\n")
                }
                built_in if stoke_jobs::TRAINERS.contains(&built_in) => {
                    format!("\nuse it:  {program} predict --checkpoint {folder} < lines.txt\n")
                }
                _ => format!("\nuse it:  {program} checkpoint export {folder} --out weights.safetensors\n"),
            });
        }
        text
    }
}

/// The end of a job as one flat object: of `stoke run`, which adds to it, and of `stoke submit --wait`.
pub fn document(view: &JobView, wall: Duration) -> Value {
    let outcome = view.outcome.as_ref();
    json!({
        "job": view.job.to_string(),
        "name": view.name,
        "state": job_state(view.state),
        "reason": view.reason,
        "step": outcome.map(|outcome| outcome.step.0),
        "loss": outcome.map(|outcome| float(outcome.loss)),
        "samples": outcome.map(|outcome| outcome.samples),
        "ledger": outcome.map(|outcome| ledger(outcome.ledger)),
        "skipped_steps": outcome.map(|outcome| outcome.skipped),
        "metrics": outcome.map(|outcome| &outcome.metrics),
        "weights_blake3": outcome.map(|outcome| outcome.weights_blake3.to_string()),
        "world_sizes": view.world_sizes.0,
        "generations": view.generation.0,
        "recoveries": view.recoveries,
        "preemptions": view.preemptions,
        "exec": view.exec.as_ref().map(exec),
        "checkpoint": view.checkpoint.as_ref().map(|checkpoint| &checkpoint.uri),
        "wall_seconds": (wall.as_secs_f64() * 1000.0).round() / 1000.0,
    })
}

/// The end of a job in a few lines.
pub fn summary(view: &JobView) -> String {
    let mut table = summary_table(view);
    if let (Some(started), Some(ended)) = (view.started_ms, view.ended_ms) {
        table.row(["time".into(), output::duration_ms(ended.saturating_sub(started))]);
    }
    table.render()
}

fn summary_table(view: &JobView) -> output::Table {
    let mut table = output::Table::bare();
    table.row(["job".into(), format!("{} ({}), {}", view.job, view.name, job_state(view.state))]);
    if !view.reason.is_empty() {
        table.row(["reason".into(), view.reason.clone()]);
    }
    if let Some(outcome) = &view.outcome {
        table.row(["steps".into(), outcome.step.0.to_string()]);
        table.row(["samples".into(), output::grouped(outcome.samples)]);
        table.row(["ledger".into(), format!("{} exactly once", outcome.ledger)]);
        if outcome.skipped > 0 {
            table.row(["skipped".into(), format!("{} not finite", output::count(outcome.skipped, "step"))]);
        }
        table.row(["loss".into(), format!("{:.6}", outcome.loss)]);
        for (name, value) in &outcome.metrics {
            let held_out = if view.trainer == "rl" { "" } else { "held-out " };
            let whole = value.fract() == 0.0 && (0.0..1e15).contains(value);
            let value = if whole { output::grouped(*value as u64) } else { format!("{value:.4}") };
            table.row([format!("{held_out}{name}"), value]);
        }
        table.row(["weights_blake3".into(), outcome.weights_blake3.to_string()]);
    }
    if let Some(progress) = view.progress.as_ref().filter(|_| !view.state.is_terminal()) {
        let (step, steps) = (output::grouped(progress.step.0), output::grouped(progress.steps.0));
        table.row(["step".into(), format!("{step} of {steps}, {}", figures(progress))]);
        if let Some(rl) = progress.rl.filter(|rl| rl.played_elsewhere > 0) {
            let (here, elsewhere) = (output::grouped(rl.played_here), output::grouped(rl.played_elsewhere));
            table.row([
                "played".into(),
                format!("{here} rounds of lanes by this rank, {elsewhere} for it by ranks that play"),
            ]);
        }
    }
    table.row(["ranks".into(), format!("{} ({})", worlds(&view.world_sizes), recoveries(view))]);
    if let Some(exec) = view.exec.as_ref().filter(|exec| !exec.exits.is_empty()) {
        table.row(["exit codes".into(), exec_ends(exec)]);
    }
    if view.preemptions > 0 {
        table.row(["made room".into(), format!("{} for more urgent jobs", output::count(view.preemptions, "time"))]);
    }
    if let Some(checkpoint) = &view.checkpoint {
        table.row(["checkpoint".into(), checkpoint.uri.clone()]);
    }
    table
}

/// How commands have ended, by rank.
pub fn exec_ends(exec: &ExecView) -> String {
    let word = |exit: &ExitOf| match exit {
        ExitOf::Code(code) => code.to_string(),
        ExitOf::Signal(signal) => format!("signal {signal}"),
        other => format!("{other:?}"),
    };
    let ends: Vec<String> = exec.exits.iter().map(|(rank, exit)| format!("{rank}: {}", word(exit))).collect();
    ends.join(", ")
}

/// World sizes as they changed, the last few of many.
fn worlds(sizes: &[u32]) -> String {
    let mut changes: Vec<u32> = sizes.to_vec();
    changes.dedup();
    let from = changes.len().saturating_sub(WORLDS_SHOWN_MAX);
    let shown: Vec<String> = changes[from..].iter().map(ToString::to_string).collect();
    let before = if from > 0 { "..., then " } else { "" };
    format!("{before}{}", shown.join(", then "))
}

fn recoveries(view: &JobView) -> String {
    match view.recoveries {
        // A loss may have been its end.
        0 if view.state == JobState::Failed => "no recovery".to_owned(),
        0 => "no rank was lost".to_owned(),
        1 => "1 recovery".to_owned(),
        count => format!("{count} recoveries"),
    }
}

/// The last lines of the rank that the reason names, or of all ranks. What cannot be had is left out: the reason is known already.
pub async fn failed_logs(client: &mut Client, view: &JobView) -> Vec<(Rank, String)> {
    let request = Request::Logs { job: view.job, rank: named_rank(&view.reason), tail: Some(LOG_LINES), follow: false };
    let deadline = Instant::now() + LOGS_MAX;
    let mut lines: BTreeMap<Rank, Vec<String>> = BTreeMap::new();
    if let Ok(Ok(mut answers)) = timeout_at(deadline, client.stream(&request)).await {
        while let Ok(Ok(Some(Reply::Log(chunk)))) = timeout_at(deadline, answers.next()).await {
            lines.entry(chunk.id.rank).or_default().extend(chunk.lines.0);
            if chunk.last {
                break;
            }
        }
    }
    lines.into_iter().flat_map(|(rank, lines)| lines.into_iter().map(move |line| (rank, line))).collect()
}

/// Reasons are for people, and say `rank 1` or `rank-1`.
fn named_rank(reason: &str) -> Option<Rank> {
    let (_, rest) = reason.split_once("rank")?;
    let digits: String = rest.trim_start_matches([' ', '-']).chars().take_while(char::is_ascii_digit).collect();
    digits.parse().ok().map(Rank)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_failed_rank_is_found_in_the_reason() {
        assert_eq!(named_rank("rank-2 on node-1 exited with code 3"), Some(Rank(2)));
        assert_eq!(named_rank("after 3 generations: rank 0: read data file x.csv"), Some(Rank(0)));
        assert_eq!(named_rank("no node fits"), None);
    }
}
