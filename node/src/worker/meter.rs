//! How fast a rank goes, measured between two reports. Owns the figures; `Progress` is made here.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use stoke_jobs::{Applied, Plan};
use stoke_protocol::ids::{Generation, Step};
use stoke_protocol::message::rank::{Progress, RlProgress, StepTimes};

/// Between two reports.
const EVERY: Duration = Duration::from_millis(500);

/// Steps whose times are kept for the next report.
const TIMED_MAX: usize = 64;

/// Between two lines of the log.
const LOG_EVERY: Duration = Duration::from_secs(10);

/// What a step consists of.
#[derive(Clone, Copy)]
pub enum Part {
    Compute,
    Exchange,
    Apply,
}

pub struct Meter {
    batch: u64,
    steps: u64,
    /// When the last part ended.
    lap: Instant,
    reported: Instant,
    reported_step: u64,
    /// Of a job with `[rl]`.
    reported_env_steps: u64,
    logged: Instant,
    parts: [Duration; 3],
    /// Of the step under way.
    of_step: [Duration; 3],
    /// The generation that trains, and how many steps were done when it began.
    begun: (Generation, u64),
    timed: Vec<StepTimes>,
    last: Option<Applied>,
    /// When the first step of this process was committed, and which it was.
    first: Option<(Instant, u64)>,
}

impl Meter {
    pub fn new(plan: &Plan, step: u64) -> Self {
        let now = Instant::now();
        let batch = plan.batch as u64;
        Self {
            batch,
            steps: plan.steps,
            lap: now,
            reported: now,
            reported_step: step,
            reported_env_steps: 0,
            logged: now,
            parts: [Duration::ZERO; 3],
            of_step: [Duration::ZERO; 3],
            begun: (Generation(0), step),
            timed: Vec::new(),
            last: None,
            first: None,
        }
    }

    /// Another generation begins, after so many steps: what lies between is nobody's time.
    pub fn begin(&mut self, generation: Generation, step: u64) {
        (self.lap, self.begun) = (Instant::now(), (generation, step));
    }

    /// The state of `step` was taken over: what was done until then is not this rank's pace.
    pub fn took_over(&mut self, step: u64) {
        (self.lap, self.reported, self.reported_step) = (Instant::now(), Instant::now(), step);
        self.parts = [Duration::ZERO; 3];
    }

    /// The part that was under way is over.
    pub fn lap(&mut self, part: Part) {
        let now = Instant::now();
        self.parts[part as usize] += now - self.lap;
        if matches!(part, Part::Compute) {
            // A step begins with it, whatever became of the one before.
            self.of_step = [Duration::ZERO; 3];
        }
        self.of_step[part as usize] += now - self.lap;
        self.lap = now;
    }

    /// A step was committed; `step` is how many there are now.
    pub fn stepped(&mut self, applied: &Applied, step: u64) {
        self.last = Some(*applied);
        self.lap = Instant::now();
        self.time(step);
        if self.first.is_none() {
            self.first = Some((self.lap, step));
            let unix_ms = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_millis() as u64;
            tracing::info!(step, unix_ms, loss = applied.loss, "first step committed");
        }
    }

    fn time(&mut self, step: u64) {
        let (parts, (generation, before)) = (std::mem::take(&mut self.of_step), self.begun);
        // A rank that joins applies what others have computed.
        let is_own = !parts[Part::Compute as usize].is_zero();
        if !is_own || !StepTimes::is_told(step.saturating_sub(before)) || self.timed.len() >= TIMED_MAX {
            return;
        }
        let began = SystemTime::now() - parts.iter().sum::<Duration>();
        let began_us = began.duration_since(UNIX_EPOCH).unwrap_or_default().as_micros() as u64;
        let [compute_us, exchange_us, apply_us] = parts.map(|part| u32::try_from(part.as_micros()).unwrap_or(u32::MAX));
        self.timed.push(StepTimes { generation, step: Step(step), began_us, compute_us, exchange_us, apply_us });
    }

    /// The times of steps that are to be told, once.
    pub fn take_timed(&mut self) -> Vec<StepTimes> {
        std::mem::take(&mut self.timed)
    }

    /// Samples a second over all ranks since the first step, everything between steps included.
    pub fn samples_per_second(&self, step: u64) -> f64 {
        self.first
            .map_or(0.0, |(at, first)| ((step - first) * self.batch) as f64 / at.elapsed().as_secs_f64().max(1e-6))
    }

    /// Whether the log should have a line again.
    pub fn is_log_due(&mut self) -> bool {
        let due = self.logged.elapsed() >= LOG_EVERY;
        if due {
            self.logged = Instant::now();
        }
        due
    }

    fn rl(&mut self, rl: stoke_jobs::RlProgress, since: Duration) -> RlProgress {
        let done = rl.env_steps.saturating_sub(std::mem::replace(&mut self.reported_env_steps, rl.env_steps));
        RlProgress {
            round: rl.round,
            rounds: rl.rounds,
            env_steps: rl.env_steps,
            env_steps_per_second: done as f64 / since.as_secs_f64().max(1e-6),
            episodes: rl.episodes,
            episode_return: rl.episode_return,
            explained_variance: rl.explained_variance,
            approx_kl: rl.approx_kl,
            entropy: rl.entropy,
            lag: rl.lag,
            environment_failures: rl.environment_failures,
            environment_strays: rl.environment_strays,
            played_here: rl.played_here,
            played_elsewhere: rl.played_elsewhere,
            weights_sent: rl.broadcast.bytes,
            broadcast_seconds: rl.broadcast.seconds,
        }
    }

    /// A report, if it is time for one or the last step is done. `step` steps were applied.
    pub fn due(
        &mut self,
        (generation, lanes): (Generation, u32),
        step: u64,
        (skipped, rl): (u64, Option<stoke_jobs::RlProgress>),
    ) -> Option<Progress> {
        let since = self.reported.elapsed();
        let applied = self.last.filter(|_| since >= EVERY || step == self.steps)?;
        let rl = rl.map(|rl| self.rl(rl, since));
        let steps = (step - self.reported_step).max(1);
        let mean_ms = |part: Part| (self.parts[part as usize].as_secs_f64() * 1e3 / steps as f64) as f32;
        let progress = Progress {
            generation,
            step: Step(step),
            steps: Step(self.steps),
            loss: applied.loss as f32,
            accuracy: applied.accuracy as f32,
            learning_rate: applied.lr,
            samples_per_second: (steps * self.batch) as f64 / since.as_secs_f64().max(1e-6),
            compute_ms: mean_ms(Part::Compute),
            exchange_ms: mean_ms(Part::Exchange),
            apply_ms: mean_ms(Part::Apply),
            samples: step * self.batch,
            skipped,
            lanes,
            rl,
        };
        self.reported = Instant::now();
        self.reported_step = step;
        self.parts = [Duration::ZERO; 3];
        Some(progress)
    }
}
