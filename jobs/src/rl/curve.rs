//! How a job learns, round after round: what checkpoints keep, what reports show and what is drawn. Owns the figures; the same on every learner, because
//! they are made of sums. Decides nothing.

use super::learn::Round;
use super::learner::Updated;
use crate::JobError;
use crate::train::{Broadcast, Metrics, NamedTensor, RlProgress};

/// Points that are kept. When there are more every second one goes: what a picture shows stays.
const POINTS_MAX: usize = 4096;
/// Episodes whose mean return is told of: CleanRL's and gymnasium's custom.
const EPISODES: f64 = 100.0;
/// Before the algorithm's figures.
pub const COLUMNS: [&str; 8] = [
    "env_steps",
    "episodes",
    "episode_return",
    "episode_length",
    "explained_variance",
    "environment_failures",
    "environment_strays",
    "grad_norm",
];
const NAME: &str = "rl.curve";
const TOTALS: &str = "rl.totals";

#[derive(Debug, Clone, PartialEq)]
pub struct Curve {
    figures: &'static [&'static str],
    /// Rounds of a point.
    every: u64,
    rounds: u64,
    env_steps: u64,
    episodes: u64,
    failures: u64,
    strays: u64,
    points: Vec<Vec<f32>>,
    /// The round under way: sums of the figures of its updates.
    sums: Vec<f64>,
    updates: u64,
    round: Option<Round>,
    last: Last,
    /// Means of the newest rounds with ended episodes: how many there were, their mean return.
    recent: Vec<(f64, f64)>,
}

/// Of the last update.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Last {
    pub loss: f64,
    pub grad_norm: f64,
    pub lr: f64,
}

impl Curve {
    pub fn new(figures: &'static [&'static str]) -> Self {
        Self {
            figures,
            every: 1,
            rounds: 0,
            env_steps: 0,
            episodes: 0,
            failures: 0,
            strays: 0,
            points: Vec::new(),
            sums: vec![0.0; figures.len()],
            updates: 0,
            round: None,
            last: Last { loss: 0.0, grad_norm: 0.0, lr: 0.0 },
            recent: Vec::new(),
        }
    }

    pub fn columns(&self) -> impl Iterator<Item = &'static str> {
        COLUMNS.into_iter().chain(self.figures.iter().copied())
    }

    /// One a round that is over: its begin, and all its updates.
    pub fn points(&self) -> Vec<Vec<f32>> {
        let last = self.round.as_ref().filter(|round| self.updates >= u64::from(round.updates));
        self.points.iter().cloned().chain(last.map(|round| self.point(round))).collect()
    }

    pub fn last(&self) -> Last {
        self.last
    }

    /// A round begins; the one before it is a point.
    pub fn began(&mut self, round: &Round, (failures, strays): (f32, f32)) {
        self.close();
        self.env_steps += round.transitions;
        self.episodes += round.episodes;
        self.failures += failures as u64;
        self.strays += strays as u64;
        if let Some(mean) = round.episode_return {
            self.recent.push((round.episodes as f64, mean));
            let mut count = 0.0;
            let kept = self.recent.iter().rev().take_while(|(episodes, _)| {
                let more = count < EPISODES;
                count += episodes;
                more
            });
            let surplus = self.recent.len() - kept.count();
            self.recent.drain(..surplus);
        }
        self.round = Some(round.clone());
    }

    pub fn updated(&mut self, updated: &Updated) {
        self.sums.iter_mut().zip(&updated.figures).for_each(|(sum, figure)| *sum += figure);
        self.updates += 1;
        let loss = updated.figures.first().copied().unwrap_or(0.0);
        self.last = Last { loss, grad_norm: updated.grad_norm, lr: updated.lr };
    }

    fn close(&mut self) {
        let Some(round) = self.round.take() else { return };
        if self.rounds.is_multiple_of(self.every) {
            self.points.push(self.point(&round));
        }
        self.rounds += 1;
        self.sums.fill(0.0);
        self.updates = 0;
        if self.points.len() > POINTS_MAX {
            let mut at = 0;
            self.points.retain(|_| {
                at += 1;
                at % 2 == 1
            });
            self.every *= 2;
        }
    }

    fn point(&self, round: &Round) -> Vec<f32> {
        let known = |value: Option<f64>| value.map_or(f32::NAN, |value| value as f32);
        let of_updates = |sum: &f64| if self.updates == 0 { f32::NAN } else { (sum / self.updates as f64) as f32 };
        let mut point = vec![
            self.env_steps as f32,
            self.episodes as f32,
            known(round.episode_return),
            known(round.episode_length),
            known(round.explained_variance),
            self.failures as f32,
            self.strays as f32,
            if self.updates == 0 { f32::NAN } else { self.last.grad_norm as f32 },
        ];
        point.extend(self.sums.iter().map(of_updates));
        point
    }

    /// Mean return of the last hundred episodes or some more: whole rounds.
    pub fn recent_return(&self) -> Option<f64> {
        let (count, sum) = self
            .recent
            .iter()
            .fold((0.0, 0.0), |(count, sum), (episodes, mean)| (count + episodes, sum + episodes * mean));
        (count > 0.0).then(|| sum / count)
    }

    pub fn metrics(&self) -> Metrics {
        let mut metrics = Metrics::new();
        metrics.insert("env_steps".into(), self.env_steps as f64);
        metrics.insert("episodes".into(), self.episodes as f64);
        metrics.insert("environment_failures".into(), self.failures as f64);
        metrics.insert("environment_strays".into(), self.strays as f64);
        metrics.extend(self.recent_return().map(|mean| ("episode_return_last_100".to_owned(), mean)));
        metrics
    }

    pub fn progress(&self, (round, rounds): (u64, u64), (played_here, played_elsewhere): (u64, u64)) -> RlProgress {
        let figure = |name: &str| {
            let at = self.figures.iter().position(|figure| *figure == name)?;
            match self.updates {
                0 => self.points.last().map(|point| point[COLUMNS.len() + at]),
                updates => Some((self.sums[at] / updates as f64) as f32),
            }
        };
        let variance = self.round.as_ref().and_then(|round| round.explained_variance).map(|variance| variance as f32);
        RlProgress {
            round,
            rounds,
            env_steps: self.env_steps,
            episodes: self.episodes,
            episode_return: self.recent_return().map(|mean| mean as f32),
            explained_variance: variance,
            approx_kl: figure("approx_kl"),
            entropy: figure("entropy"),
            lag: figure("lag"),
            environment_failures: self.failures,
            environment_strays: self.strays,
            played_here,
            played_elsewhere,
            broadcast: Broadcast::default(),
        }
    }

    pub fn tensors(&self) -> Vec<NamedTensor> {
        let width = COLUMNS.len() + self.figures.len();
        let mut curve = self.clone();
        // The round under way is told of in full when it is over: what is kept of it is what makes it.
        let round = curve.round.take();
        let mut totals = Vec::new();
        let Self { every, rounds, env_steps, episodes, failures, strays, updates, .. } = *self;
        for number in [every, rounds, env_steps, episodes, failures, strays, updates] {
            totals.extend([(number & 0xff_ffff) as f32, (number >> 24) as f32]);
        }
        totals.extend(self.sums.iter().flat_map(|sum| split(*sum)));
        totals.extend([self.last.loss, self.last.grad_norm, self.last.lr].into_iter().flat_map(split));
        totals.push(if round.is_some() { 1.0 } else { 0.0 });
        if let Some(Round { updates, transitions, episodes, episode_return, episode_length, explained_variance }) =
            round
        {
            for number in [u64::from(updates), transitions, episodes] {
                totals.extend([(number & 0xff_ffff) as f32, (number >> 24) as f32]);
            }
            for figure in [episode_return, episode_length, explained_variance] {
                totals
                    .extend([if figure.is_some() { 1.0 } else { 0.0 }].into_iter().chain(split(figure.unwrap_or(0.0))));
            }
        }
        totals.extend(self.recent.iter().flat_map(|(episodes, mean)| split(*episodes).into_iter().chain(split(*mean))));
        let mut tensors = vec![NamedTensor { name: TOTALS.to_owned(), shape: vec![totals.len()], values: totals }];
        if !self.points.is_empty() {
            let (shape, values) = (vec![self.points.len(), width], self.points.concat());
            tensors.push(NamedTensor { name: NAME.to_owned(), shape, values });
        }
        tensors
    }

    /// Takes the tensors of [`Self::tensors`].
    pub fn of(tensors: &[NamedTensor], figures: &'static [&'static str]) -> Result<Self, JobError> {
        let wrong =
            |name: &str| JobError::Tensor { name: name.to_owned(), problem: "missing, or of another shape".to_owned() };
        let find = |name: &str| tensors.iter().find(|tensor| tensor.name == name);
        let mut totals = Totals(&find(TOTALS).ok_or_else(|| wrong(TOTALS))?.values);
        let mut read = || -> Option<Self> {
            let mut curve = Self::new(figures);
            curve.every = totals.number()?.max(1);
            curve.rounds = totals.number()?;
            curve.env_steps = totals.number()?;
            curve.episodes = totals.number()?;
            curve.failures = totals.number()?;
            curve.strays = totals.number()?;
            curve.updates = totals.number()?;
            for sum in &mut curve.sums {
                *sum = totals.double()?;
            }
            curve.last = Last { loss: totals.double()?, grad_norm: totals.double()?, lr: totals.double()? };
            if totals.flag()? {
                let (updates, transitions, episodes) = (totals.number()? as u32, totals.number()?, totals.number()?);
                let [episode_return, episode_length, explained_variance] =
                    [totals.maybe()?, totals.maybe()?, totals.maybe()?];
                curve.round =
                    Some(Round { updates, transitions, episodes, episode_return, episode_length, explained_variance });
            }
            while !totals.0.is_empty() {
                curve.recent.push((totals.double()?, totals.double()?));
            }
            Some(curve)
        };
        let mut curve = read().ok_or_else(|| wrong(TOTALS))?;
        let width = COLUMNS.len() + figures.len();
        if let Some(points) = find(NAME) {
            if points.shape != [points.values.len() / width, width] {
                return Err(wrong(NAME));
            }
            curve.points = points.values.chunks_exact(width).map(<[f32]>::to_vec).collect();
        }
        Ok(curve)
    }
}

/// A double as numbers that keep all its bits: four of sixteen each.
fn split(value: f64) -> [f32; 4] {
    let bits = value.to_bits();
    [0, 16, 32, 48].map(|shift| (bits >> shift & 0xffff) as f32)
}

struct Totals<'a>(&'a [f32]);

impl Totals<'_> {
    fn take(&mut self) -> Option<f32> {
        let (first, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(*first)
    }

    fn number(&mut self) -> Option<u64> {
        Some(self.take()? as u64 | (self.take()? as u64) << 24)
    }

    fn double(&mut self) -> Option<f64> {
        let mut bits = 0;
        for shift in [0, 16, 32, 48] {
            bits |= (self.take()? as u64 & 0xffff) << shift;
        }
        Some(f64::from_bits(bits))
    }

    fn flag(&mut self) -> Option<bool> {
        Some(self.take()? != 0.0)
    }

    fn maybe(&mut self) -> Option<Option<f64>> {
        let (is_known, value) = (self.flag()?, self.double()?);
        Some(is_known.then_some(value))
    }
}
