//! Local steps: what a lane does by itself between two sums over the lanes, and what a sum of their changes does to the model. DiLoCo (Douillard et al.,
//! "DiLoCo: Distributed Low-Communication Training of Language Models", 2023, algorithm 1), but for one thing: a lane's optimizer begins each step of the
//! job with an empty state, as the clients of FedOpt do (Reddi et al., "Adaptive Federated Optimization", 2021). So a lane's change is a function of the
//! model, the step and the lane: any rank can compute it, and one that is lost takes nothing along.

use burn::module::Module;
use burn::optim::SgdConfig;
use burn::optim::momentum::MomentumConfig;
use burn::tensor::TensorData;

use super::optimizer::{Rule, Schedule, Update};
use super::parameters::handles;
use super::{Diloco, LaneWork, Layout, STATS};
use crate::JobError;
use crate::config::ScheduleConfig;

/// The local steps of a trainer's lanes.
pub(super) struct Local {
    of: Diloco,
    /// Of the lanes; their sum is applied by [`Diloco::outer`].
    rule: Rule,
    /// Over the local steps of the whole job.
    schedule: Schedule,
    /// Of one step's local steps, and which step that is.
    rates: (Option<u64>, Vec<f64>),
}

impl Diloco {
    /// Stochastic gradient descent with Nesterov's momentum, on the lanes' mean change.
    pub(super) fn outer(&self) -> Rule {
        let momentum = MomentumConfig::new().with_momentum(self.outer_momentum).with_dampening(0.0).with_nesterov(true);
        let momentum = (self.outer_momentum > 0.0).then_some(momentum);
        Rule::Sgd(SgdConfig::new().with_momentum(momentum).build())
    }
}

impl Local {
    /// `steps`: of the job.
    pub fn new(of: Diloco, rule: Rule, schedule: &ScheduleConfig, steps: u64) -> Result<Self, String> {
        let schedule = Schedule::new(schedule, steps.saturating_mul(u64::from(of.local_steps)))?;
        Ok(Self { of, rule, schedule, rates: (None, Vec::new()) })
    }

    pub fn outer_lr(&self) -> f64 {
        self.of.outer_lr
    }

    /// What follows is of this step (0 = first). Its first learning rate.
    pub fn begin(&mut self, step: u64) -> Result<f64, String> {
        if self.rates.0 != Some(step) {
            let count = u64::from(self.of.local_steps);
            let rates = (step * count..(step + 1) * count).map(|step| self.schedule.rate(step));
            self.rates = (Some(step), rates.collect::<Result<_, _>>()?);
        }
        Ok(self.rates.1[0])
    }

    /// What the local steps of the step that was begun take away from each parameter, in layout order, with the figures of all of them. The lane's samples are cut
    /// into a batch for each; `gradients` gives those of a batch, summed over its samples, with its figures; `clip` the factor that a mean gradient of this
    /// norm is scaled by.
    pub fn change<M: Module>(
        &self,
        (model, layout): (&M, &Layout),
        work: LaneWork<'_>,
        gradients: impl Fn(&M, &[u64]) -> (Vec<TensorData>, [f32; STATS]),
        clip: impl Fn(f64) -> f64,
    ) -> Result<(Vec<Vec<f32>>, [f32; STATS]), JobError> {
        let (rates, samples) = (&self.rates.1, work.samples);
        let (mut trained, mut update) = (model.clone(), Update::new(self.rule.clone(), layout));
        let (mut flat, mut stats) = (Vec::with_capacity(layout.len()), [0f32; STATS]);
        for (at, lr) in rates.iter().enumerate() {
            if at > 0 {
                work.pulse.check()?;
            }
            let batch = &samples[at * samples.len() / rates.len()..(at + 1) * samples.len() / rates.len()];
            let (gradients, figures) = gradients(&trained, batch);
            stats.iter_mut().zip(figures).for_each(|(total, figure)| *total += figure);
            flat.clear();
            gradients.iter().for_each(|data| flat.extend_from_slice(data.as_slice().expect("gradients are f32")));
            let norm = norm(&flat) / batch.len() as f64;
            if !norm.is_finite() {
                // Nothing after it would be, and no sum with it is applied.
                let nothing = layout.params.iter().map(|param| vec![f32::NAN; param.len]).collect();
                return Ok((nothing, [f32::NAN, 0.0, samples.len() as f32]));
            }
            let scale = (clip(norm) / batch.len() as f64) as f32;
            trained = update.step(trained, layout, &flat, scale, *lr);
        }
        let values = |model: &M| handles(model).into_iter().map(|tensor| tensor.into_data());
        let changes = values(model).zip(values(&trained)).map(|(before, after)| {
            let [before, after] = [&before, &after].map(|data| data.as_slice::<f32>().expect("parameters are f32"));
            before.iter().zip(after).map(|(before, after)| before - after).collect()
        });
        Ok((changes.collect(), stats))
    }
}

/// The Euclidean norm.
pub(super) fn norm(values: &[f32]) -> f64 {
    values.iter().map(|&value| f64::from(value) * f64::from(value)).sum::<f64>().sqrt()
}
