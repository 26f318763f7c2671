//! What a person sees while a job trains: a bar on a terminal, a line now and then elsewhere. Owns stderr's last line; never decides anything.

use std::fmt::Write as _;
use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use stoke_protocol::ids::Generation;
use stoke_protocol::message::client::{JobState, JobView};
use stoke_protocol::message::rank;

use crate::client::Sight;
use crate::json::job_state;
use crate::output;

/// Between lines in a log file or a pipe.
const LINE_EVERY: Duration = Duration::from_secs(5);

pub struct Progress {
    bar: Option<ProgressBar>,
    last_line: Option<Instant>,
    last_state: Option<(JobState, u32, u32, String)>,
}

impl Progress {
    pub fn new() -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr_with_hz(10));
            bar.set_style(style("{spinner} {msg}"));
            bar.enable_steady_tick(Duration::from_millis(200));
            bar
        });
        Self { bar, last_line: None, last_state: None }
    }

    pub fn show(&mut self, sight: Sight<'_>) {
        match sight {
            Sight::Job(view) => self.job(view),
            Sight::Ended { generation, reason } => self.note(&ended(generation, &reason)),
            Sight::Silent => self.note("the coordinator does not answer: trying again (ranks go on without it)"),
            Sight::Back => self.note("the coordinator answers again"),
        }
    }

    fn job(&mut self, view: &JobView) {
        // A rank that joins begins a generation too, and is news when it has joined.
        let world = view.world_sizes.last().copied().unwrap_or(0);
        let state = (view.state, world, view.recoveries, view.reason.clone());
        if self.last_state.as_ref() != Some(&state) {
            self.changed(view);
            self.last_state = Some(state);
        }
        match &view.progress {
            Some(progress) if view.state == JobState::Running => self.step(progress),
            Some(_) | None => {}
        }
    }

    /// A line that stays.
    pub fn note(&self, text: &str) {
        match &self.bar {
            Some(bar) => bar.suspend(|| output::say(text)),
            None => output::say(text),
        }
    }

    pub fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }

    fn changed(&mut self, view: &JobView) {
        let world = match view.state {
            JobState::Starting => view.placement.len() as u32,
            _ => view.world_sizes.last().copied().unwrap_or(0),
        };
        let ranks = output::count(world, "rank");
        let text = match view.state {
            JobState::Queued => format!("{} waits: {}", view.job, view.reason),
            JobState::Starting => format!("{} starts on {ranks}", view.job),
            JobState::Running if view.reason.is_empty() => format!("{} runs on {ranks}", view.job),
            JobState::Running => format!("{} {}", view.job, view.reason),
            JobState::Recovering => ended(view.generation, &view.reason),
            JobState::Cancelling => format!("{} is being cancelled", view.job),
            JobState::Succeeded | JobState::Failed | JobState::Cancelled => {
                format!("{} {}", view.job, job_state(view.state))
            }
        };
        match &self.bar {
            // Recoveries stay on the screen, the rest passes by.
            Some(bar) if view.state != JobState::Recovering => bar.set_message(text),
            Some(_) | None => self.note(&text),
        }
    }

    fn step(&mut self, progress: &rank::Progress) {
        let figures = figures(progress);
        if let Some(bar) = &self.bar {
            if bar.length().is_none() {
                bar.set_style(style("{wide_bar} {pos}/{len} {msg}"));
                bar.set_length(progress.steps.0);
            }
            bar.set_position(progress.step.0);
            bar.set_message(figures);
            return;
        }
        if self.last_line.is_some_and(|at| at.elapsed() < LINE_EVERY) {
            return;
        }
        self.last_line = Some(Instant::now());
        output::say(format_args!("step {}/{} {figures}", progress.step.0, progress.steps.0));
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.finish();
    }
}

fn ended(generation: Generation, reason: &str) -> String {
    format!("generation {} ended: {reason}", generation.0)
}

/// Loss, accuracy, speed and the time that is left at this speed.
pub fn figures(progress: &rank::Progress) -> String {
    if let Some(rl) = &progress.rl {
        return rl_figures(rl);
    }
    let mut text = format!("loss {:.4} accuracy {:.4}", progress.loss, progress.accuracy);
    if progress.samples_per_second > 0.0 {
        let _ = write!(text, " {} samples/s", output::grouped(progress.samples_per_second as u64));
    }
    let per_step = progress.samples / progress.step.0.max(1);
    let samples_left = progress.steps.0.saturating_sub(progress.step.0) * per_step;
    if progress.samples_per_second > 0.0 && samples_left > 0 {
        let left_ms = samples_left as f64 / progress.samples_per_second * 1000.0;
        let _ = write!(text, ", {} left", output::duration_ms(left_ms as u64));
    }
    text
}

/// Return, speed in steps of environments, and what shows whether learning is sound.
fn rl_figures(rl: &rank::RlProgress) -> String {
    let mut text = match rl.episode_return {
        Some(mean) => format!("return {mean:.1} over the last 100 episodes"),
        None => "no episode has ended".to_owned(),
    };
    let _ = write!(text, ", {} env steps", output::grouped(rl.env_steps));
    if rl.env_steps_per_second > 0.0 {
        let _ = write!(text, ", {}/s", output::grouped(rl.env_steps_per_second as u64));
    }
    let named = [("KL", rl.approx_kl), ("explained variance", rl.explained_variance), ("lag", rl.lag)];
    for (name, value) in named {
        if let Some(value) = value {
            let _ = match value.abs() < 0.001 && value != 0.0 {
                true => write!(text, ", {name} {value:.1e}"),
                false => write!(text, ", {name} {value:.3}"),
            };
        }
    }
    if rl.environment_failures > 0 {
        let _ = write!(text, ", {} of environments", output::count(rl.environment_failures, "failure"));
    }
    if rl.environment_strays > 0 {
        let again = output::count(rl.environment_strays, "environment");
        let _ = write!(text, ", {again} went another way when played again");
    }
    text
}

fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).expect("our templates are well formed")
}

#[cfg(test)]
mod tests {
    use stoke_protocol::ids::Step;

    use super::*;

    #[test]
    fn figures_name_what_is_left() {
        let progress = rank::Progress {
            generation: stoke_protocol::ids::Generation(1),
            step: Step(50),
            steps: Step(100),
            loss: 0.25,
            accuracy: 0.9,
            learning_rate: 0.001,
            samples_per_second: 1000.0,
            compute_ms: 1.0,
            exchange_ms: 1.0,
            apply_ms: 1.0,
            samples: 5000,
            skipped: 0,
            lanes: 2,
            rl: None,
        };
        assert_eq!(figures(&progress), "loss 0.2500 accuracy 0.9000 1,000 samples/s, 5.0s left");
        let rl = rank::RlProgress {
            round: 3,
            rounds: 10,
            env_steps: 1536,
            env_steps_per_second: 51_200.0,
            episodes: 20,
            episode_return: Some(31.25),
            explained_variance: None,
            approx_kl: Some(0.0123),
            entropy: Some(0.6),
            lag: None,
            environment_failures: 1,
            environment_strays: 0,
            played_here: 0,
            played_elsewhere: 12,
            weights_sent: 0,
            broadcast_seconds: None,
        };
        assert_eq!(
            figures(&rank::Progress { rl: Some(rl), ..progress }),
            "return 31.2 over the last 100 episodes, 1,536 env steps, 51,200/s, KL 0.012, 1 failure of environments"
        );
    }
}
