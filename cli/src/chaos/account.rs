//! What a chaos run says at its end: each fault with its victim and its effect, and what it cost. Owns its field names, which are stable over
//! releases; measures nothing.

use serde_json::{Value, json};
use stoke_protocol::ids::JobId;
use stoke_protocol::message::client::JobState;

use super::blows::Struck;
use super::course::{Losses, Recovery};
use crate::json::{job_state, ledger};
use crate::output;

pub struct Account {
    pub seed: u64,
    pub schedule: String,
    pub faults: Vec<Struck>,
    pub jobs: Vec<(JobId, Losses)>,
}

impl Account {
    /// Of `stoke run`: the one job's account is flat.
    pub fn json_of_run(&self) -> Value {
        let mut document = self.head();
        if let (Value::Object(document), Some(Value::Object(job))) =
            (&mut document, self.jobs.first().map(|(_, losses)| losses_json(losses)))
        {
            document.extend(job);
        }
        document
    }

    /// Of `stoke chaos`: any number of jobs.
    pub fn json(&self) -> Value {
        let mut document = self.head();
        let jobs = self.jobs.iter().map(|(job, losses)| {
            let mut document = losses_json(losses);
            document["job"] = json!(job.to_string());
            document["state"] = json!(losses.state.map(job_state));
            document["reason"] = json!(losses.reason);
            document
        });
        document["jobs"] = jobs.collect();
        document
    }

    /// A job failed, or samples of one that succeeded are missing, or damage was not found.
    pub fn has_losses(&self) -> bool {
        let bad =
            |losses: &Losses| losses.state == Some(JobState::Failed) || losses.samples_lost.is_some_and(|n| n > 0);
        self.jobs.iter().any(|(_, losses)| bad(losses)) || self.faults.iter().any(|struck| struck.undetected)
    }

    fn head(&self) -> Value {
        let faults = self.faults.iter().enumerate().map(|(index, struck)| {
            json!({
                "seconds": seconds(struck.at.as_millis()),
                "at_ms": struck.at_ms,
                "fault": struck.fault.name(),
                "met": struck.victim.is_some(),
                "victim": struck.victim.as_ref().map(|victim| &victim.text),
                "processes": struck.victim.as_ref().map(|victim| &victim.pids),
                "effect": self.effect(index),
                "back_after_seconds": struck.back_after.map(|after| seconds(after.as_millis())),
                "amount": struck.amount.map(|amount| amount.to_string()),
                "paused_seconds": struck.resumed_after.map(|after| seconds(after.as_millis())),
            })
        });
        json!({ "schedule": self.schedule, "seed": self.seed, "faults": faults.collect::<Vec<_>>() })
    }

    pub fn text(&self) -> String {
        let (faults, seed) = (output::count(self.faults.len() as u64, "fault"), self.seed);
        let mut text =
            format!("chaos: {faults} by \"{}\", seed {seed} (the same faults again: --seed {seed})\n", self.schedule);
        let mut table = output::Table::bare();
        for (index, struck) in self.faults.iter().enumerate() {
            let victim = struck.victim.as_ref().map_or("nobody", |victim| &victim.text);
            let at = format!("  {:.1}s", struck.at.as_secs_f64());
            table.row([at, struck.fault.name().to_owned(), victim.to_owned(), self.effect(index)]);
        }
        text.push_str(&table.render());
        for (job, losses) in &self.jobs {
            text.push_str(&format!("\n{job}: {}\n", losses.state.map_or("unknown", job_state)));
            text.push_str(&losses_text(losses));
        }
        text
    }

    /// What came of one fault, as far as it can be told from others.
    fn effect(&self, index: usize) -> String {
        let struck = &self.faults[index];
        if struck.victim.is_none() {
            return struck.remark.clone().unwrap_or_else(|| "met nobody".to_owned());
        }
        let mut parts: Vec<String> = struck.remark.iter().cloned().collect();
        if let Some(after) = struck.resumed_after {
            let by = struck.amount.map(|amount| format!(" by {amount}")).unwrap_or_default();
            parts.push(format!("over after {:.1}s{by}", after.as_secs_f64()));
        }
        if let Some(after) = struck.back_after {
            parts.push(format!("started again after {:.2}s", after.as_secs_f64()));
        }
        let recoveries = self.jobs.iter().flat_map(|(_, losses)| &losses.found);
        parts.extend(recoveries.filter(|recovery| self.cause(recovery) == Some(index)).map(recovery_text));
        if parts.is_empty() { "no generation ended".to_owned() } else { parts.join("; ") }
    }

    /// The last fault before it that met ranks; else the last one of any kind.
    fn cause(&self, recovery: &Recovery) -> Option<usize> {
        let before = || {
            let faults = self.faults.iter().enumerate().rev();
            faults.filter(|(_, struck)| struck.victim.is_some() && struck.at_ms <= recovery.ended_ms)
        };
        let of_ranks = before().find(|(_, struck)| struck.fault.is_of_ranks());
        of_ranks.or_else(|| before().next()).map(|(index, _)| index)
    }
}

fn recovery_text(recovery: &Recovery) -> String {
    let Recovery { generation, reason, ended_ms, survived, resumed } = recovery;
    match resumed {
        None => format!("{generation} ended: {reason}"),
        Some(resumed) => {
            let after = (resumed.at_ms - ended_ms.min(&resumed.at_ms)) as f64 / 1e3;
            let (next, step) = (&resumed.generation, resumed.step);
            let how = if *survived { "" } else { " from a checkpoint" };
            format!("{generation} ended: {reason}; {next} went on at step {step}{how}, {after:.2}s later")
        }
    }
}

fn losses_text(losses: &Losses) -> String {
    let mut table = output::Table::bare();
    let longest = longest_ms(losses).map_or(String::new(), |ms| format!(", the longest took {:.2}s", ms as f64 / 1e3));
    table.row(["  recoveries".into(), format!("{}{longest}", losses.recoveries)]);
    table.row(["  steps begun again".into(), format!("{} (under way when ranks were lost)", losses.steps_redone)]);
    table.row(["  committed steps lost".into(), losses.steps_lost.to_string()]);
    let samples = losses.samples_lost.map_or("not known before the end".to_owned(), output::grouped);
    table.row(["  samples lost".into(), samples]);
    let ledger = losses.ledger.map_or("not known before the end".to_owned(), |ledger| format!("{ledger} exactly once"));
    table.row(["  ledger".into(), ledger]);
    let (still, all) = (losses.standstill_ms as f64 / 1e3, losses.training_ms as f64 / 1e3);
    table.row(["  without progress".into(), format!("{still:.1}s of {all:.1}s")]);
    if let Some((rate, share)) = pace(losses) {
        let (rate, share) = (output::grouped(rate as u64), 100.0 * share);
        table.row(["  committed".into(), format!("{rate} samples/s, steps in {share:.1}% of the time")]);
    }
    table.render()
}

fn losses_json(losses: &Losses) -> Value {
    json!({
        "recoveries": losses.recoveries,
        "longest_recovery_seconds": longest_ms(losses).map(|ms| seconds(ms.into())),
        "steps_redone": losses.steps_redone,
        "steps_lost": losses.steps_lost,
        "samples_lost": losses.samples_lost,
        "ledger": losses.ledger.map(ledger),
        "training_seconds": seconds(losses.training_ms.into()),
        "seconds_without_progress": seconds(losses.standstill_ms.into()),
        "committed_samples_per_second": pace(losses).map(|(rate, _)| rate.round()),
        "progress_share": pace(losses).map(|(_, share)| (share * 1e4).round() / 1e4),
    })
}

/// From the end of a generation to the next one's first step.
fn longest_ms(losses: &Losses) -> Option<u64> {
    let took = |recovery: &Recovery| Some(recovery.resumed.as_ref()?.at_ms.saturating_sub(recovery.ended_ms));
    losses.found.iter().filter_map(took).max()
}

/// Samples a second, and the share of the time in which steps were made. Of a job without a step that was seen nothing can be said.
fn pace(losses: &Losses) -> Option<(f64, f64)> {
    let (samples, all, still) = (losses.samples as f64, losses.training_ms as f64, losses.standstill_ms as f64);
    (losses.samples > 0 && losses.training_ms > 0).then(|| (samples * 1e3 / all, 1.0 - still / all))
}

fn seconds(ms: u128) -> f64 {
    ms as f64 / 1e3
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::blows::Victim;
    use super::super::course::Resumed;
    use super::super::schedule::Fault;
    use super::*;

    fn struck(at_ms: u64, fault: Fault) -> Struck {
        Struck {
            at: Duration::from_millis(at_ms),
            at_ms,
            fault,
            victim: Some(Victim { text: "the rank of node-1 (process 7)".into(), pids: vec![7] }),
            hold: Duration::ZERO,
            amount: None,
            back_after: None,
            resumed_after: None,
            remark: None,
            undetected: false,
        }
    }

    #[test]
    fn a_recovery_is_told_with_the_fault_that_caused_it() {
        let recovery = Recovery {
            generation: "g1".into(),
            reason: "rank-1 was killed".into(),
            ended_ms: 2_500,
            survived: true,
            resumed: Some(Resumed { generation: "g2".into(), at_ms: 2_750, step: 9 }),
        };
        let losses = Losses {
            recoveries: 1,
            found: vec![recovery],
            training_ms: 10_000,
            standstill_ms: 250,
            samples: 1_000,
            ..Losses::default()
        };
        let mut nobody = struck(3_000, Fault::KillRank);
        (nobody.victim, nobody.remark) = (None, Some("no rank was there".into()));
        let account = Account {
            seed: 7,
            schedule: "kill-rank every 1s".into(),
            faults: vec![
                struck(1_000, Fault::KillRank),
                struck(2_400, Fault::KillNode),
                struck(2_450, Fault::KillCoordinator),
                nobody,
            ],
            jobs: vec![(JobId(1), losses)],
        };
        assert_eq!(account.effect(0), "no generation ended");
        assert_eq!(account.effect(1), "g1 ended: rank-1 was killed; g2 went on at step 9, 0.25s later");
        assert_eq!(account.effect(3), "no rank was there");
        let document = account.json_of_run();
        assert_eq!(document["seconds_without_progress"], 0.25);
        assert_eq!(document["committed_samples_per_second"], 100.0);
        assert_eq!(document["progress_share"], 0.975);
        assert_eq!(document["faults"][3]["met"], false);
        assert_eq!(account.json()["jobs"][0]["job"], "job-1");
        assert!(account.text().contains("steps in 97.5% of the time"), "{}", account.text());
    }

    #[test]
    fn of_a_job_without_a_step_no_pace_is_told() {
        let losses = Losses { training_ms: 5_000, ..Losses::default() };
        let account = Account { seed: 7, schedule: String::new(), faults: Vec::new(), jobs: vec![(JobId(1), losses)] };
        let document = account.json_of_run();
        for key in ["committed_samples_per_second", "progress_share"] {
            assert_eq!(document.get(key), Some(&Value::Null), "{document:#}");
        }
        assert!(!account.text().contains("of the time"), "{}", account.text());
    }
}
