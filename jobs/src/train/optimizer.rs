//! One optimizer step over a model and its state by parameter; and the learning rate of a step. The rules and the
//! schedules are Burn's. It does not use `ModuleOptimizer`: that keys its state by random ids and loads it on
//! `Device::default()`; here the state is named by the parameter's path and goes where it is told.

use std::collections::BTreeMap;

use burn::lr_scheduler::LrSchedulerConfig;
use burn::lr_scheduler::cosine::CosineAnnealingLrSchedulerConfig;
use burn::lr_scheduler::linear::LinearLrSchedulerConfig;
use burn::lr_scheduler::module_lr_scheduler::{ModuleLrScheduler, ModuleLrSchedulerConfig};
use burn::lr_scheduler::sequential::SequentialLrSchedulerConfig;
use burn::module::{Module, ModuleMapper, Param};
use burn::optim::{Adam, AdamW, DynOptimizer, DynState, Optimizer, Sgd, StateSink, StateSource};
use burn::tensor::{Device, Tensor, TensorData};

use super::{Layout, NamedTensor};
use crate::JobError;
use crate::config::{Decay, ScheduleConfig};

/// An update rule of Burn.
#[derive(Clone)]
pub(crate) enum Rule {
    AdamW(AdamW),
    Adam(Adam),
    Sgd(Sgd),
}

impl Rule {
    fn erased(&self) -> &dyn DynOptimizer {
        match self {
            Rule::AdamW(rule) => rule,
            Rule::Adam(rule) => rule,
            Rule::Sgd(rule) => rule,
        }
    }
}

/// A rule and its state, one entry a parameter in layout order; none before the first step. A clone shares the buffers.
#[derive(Clone)]
pub(crate) struct Update {
    rule: Rule,
    states: Vec<Option<DynState>>,
    /// Whether the state of a parameter is kept here, by place; elsewhere it is another rank's, and the parameter is not stepped.
    kept: Vec<bool>,
}

/// Counters are saved as f32. Whole numbers are exact up to 2^24 steps; beyond, Adam's bias corrections have long been
/// 1 to the last bit, so that the rounding changes nothing.
type Counter = f32;

impl Update {
    pub fn new(rule: Rule, layout: &Layout) -> Self {
        let count = layout.params.len();
        Update { rule, states: (0..count).map(|_| None).collect(), kept: vec![true; count] }
    }

    /// Keeps the state of the parameters at these places only.
    pub fn keep(&mut self, places: &[usize]) {
        self.kept.fill(false);
        places.iter().for_each(|place| self.kept[*place] = true);
        for (state, _) in self.states.iter_mut().zip(&self.kept).filter(|(_, kept)| !**kept) {
            *state = None;
        }
    }

    pub fn keeps(&self, place: usize) -> bool {
        self.kept[place]
    }

    /// Steps every parameter whose state is kept, with `sum * scale` as its gradient.
    pub fn step<M: Module>(&mut self, model: M, layout: &Layout, sum: &[f32], scale: f32, lr: f64) -> M {
        model.map(&mut Stepper { update: self, layout, sum, scale, lr, index: 0 })
    }

    /// The same on another device; sharing the buffers if they are there already.
    pub fn to_device(&self, device: &Device) -> Self {
        let rule = self.rule.clone();
        let moved = |state: &DynState| rule.erased().to_device_dyn(state.clone(), device);
        let states = self.states.iter().map(|state| state.as_ref().map(moved)).collect();
        Update { rule, states, kept: self.kept.clone() }
    }

    /// The state as tensors named `optimizer.<path>.<field>`.
    pub fn save(self, layout: &Layout) -> Result<Vec<NamedTensor>, JobError> {
        let mut out = Vec::new();
        for (param, state) in layout.params.iter().zip(self.states) {
            let Some(state) = state else { continue };
            let mut sink = StateSink::default();
            self.rule.erased().state_flatten(&format!("optimizer.{}", param.path), &state, &mut sink);
            drop(state);
            for (name, data) in sink.tensors {
                let shape = data.shape().to_vec();
                let values = floats(&name, data)?;
                out.push(NamedTensor { name, shape, values });
            }
            for (name, scalar) in sink.scalars {
                let value = u64::try_from(scalar)
                    .map_err(|_| JobError::Tensor { name: name.clone(), problem: "not a counter".to_owned() })?;
                out.push(NamedTensor { name, shape: vec![1], values: vec![value as Counter] });
            }
        }
        Ok(out)
    }

    /// The states that `tensors` (all of them `optimizer.*`) describe, of the parameters at the places that are `wanted`. None at all means: before the first step.
    pub fn load(
        &self,
        layout: &Layout,
        mut tensors: BTreeMap<String, NamedTensor>,
        device: &Device,
        wanted: impl Fn(usize) -> bool,
    ) -> Result<Vec<Option<DynState>>, JobError> {
        tensors.retain(|name, _| layout.place_of_state(name).is_none_or(&wanted));
        if tensors.is_empty() {
            return Ok(layout.params.iter().map(|_| None).collect());
        }
        let (counters, moments): (Vec<_>, Vec<_>) =
            tensors.into_values().partition(|tensor| tensor.shape == [1] && counter(tensor));
        let scalars = counters.iter().map(|tensor| (tensor.name.clone(), (tensor.values[0] as u64).into())).collect();
        let mut source = StateSource::new(scalars);
        let mut given: Vec<String> = counters.into_iter().map(|tensor| tensor.name).collect();
        for tensor in moments {
            check_owner(layout, &tensor)?;
            given.push(tensor.name.clone());
            source.insert_tensor(tensor.name, TensorData::new(tensor.values, tensor.shape));
        }
        let mut states = Vec::new();
        let mut used = Vec::new();
        for (place, param) in layout.params.iter().enumerate() {
            if !param.learns || !wanted(place) {
                states.push(None);
                continue;
            }
            let prefix = format!("optimizer.{}", param.path);
            let state = self.rule.erased().state_unflatten(param.shape.len(), &prefix, &mut source, device);
            let state = state.ok_or_else(|| JobError::Tensor {
                name: prefix.clone(),
                problem: "a field of the optimizer's state is missing: saved with another [optimizer]?".to_owned(),
            })?;
            let mut sink = StateSink::default();
            self.rule.erased().state_flatten(&prefix, &state, &mut sink);
            used.extend(sink.tensors.into_iter().map(|(name, _)| name));
            used.extend(sink.scalars.into_iter().map(|(name, _)| name));
            states.push(Some(state));
        }
        if let Some(name) = given.iter().find(|name| !used.contains(name)) {
            let problem = "this model and optimizer have no such state".to_owned();
            return Err(JobError::Tensor { name: name.clone(), problem });
        }
        Ok(states)
    }

    pub fn put(&mut self, states: Vec<Option<DynState>>) {
        self.states = states;
    }

    /// Those of some parameters; the others' stay.
    pub fn put_some(&mut self, states: Vec<Option<DynState>>, is_given: impl Fn(usize) -> bool) {
        let given = self.states.iter_mut().zip(states).enumerate().filter(|(place, _)| is_given(*place));
        given.for_each(|(_, (own, state))| *own = state);
    }
}

/// Burn names Adam's step counter `time`; moments are tensors of the parameter's shape.
fn counter(tensor: &NamedTensor) -> bool {
    tensor.name.ends_with(".time")
}

/// A moment has the shape of the parameter whose path it carries.
fn check_owner(layout: &Layout, tensor: &NamedTensor) -> Result<(), JobError> {
    let fail = |problem| Err(JobError::Tensor { name: tensor.name.clone(), problem });
    let Some(param) = layout.place_of_state(&tensor.name).map(|place| &layout.params[place]) else {
        return fail("no parameter of this model has that name".to_owned());
    };
    if param.shape != tensor.shape {
        return fail(format!("shape {:?}, expected {:?}", tensor.shape, param.shape));
    }
    Ok(())
}

struct Stepper<'a> {
    update: &'a mut Update,
    layout: &'a Layout,
    sum: &'a [f32],
    scale: f32,
    lr: f64,
    index: usize,
}

impl Stepper<'_> {
    fn rule<O: Optimizer, const D: usize>(
        rule: &O,
        lr: f64,
        weights: Tensor<D>,
        gradient: Tensor<D>,
        state: Option<DynState>,
    ) -> (Tensor<D>, Option<DynState>) {
        let state = state.map(|state| state.downcast::<O::State<D>>());
        let (weights, state) = rule.step(lr, weights, gradient, state);
        (weights, state.map(|state| DynState::create(state, D)))
    }
}

impl ModuleMapper for Stepper<'_> {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let spec = &self.layout.params[self.index];
        if !spec.learns || !self.update.keeps(self.index) {
            self.index += 1;
            return param;
        }
        let scaled: Vec<f32> = self.sum[spec.offset..spec.offset + spec.len].iter().map(|g| g * self.scale).collect();
        let (id, weights, mapper) = param.consume();
        let weights = weights.inner();
        let gradient = Tensor::from_data(TensorData::new(scaled, spec.shape.clone()), &weights.device());
        let state = self.update.states[self.index].take();
        let (weights, state) = match &self.update.rule {
            Rule::AdamW(rule) => Self::rule(rule, self.lr, weights, gradient, state),
            Rule::Adam(rule) => Self::rule(rule, self.lr, weights, gradient, state),
            Rule::Sgd(rule) => Self::rule(rule, self.lr, weights, gradient, state),
        };
        self.update.states[self.index] = state;
        self.index += 1;
        Param::from_mapped_value(id, Tensor::from_inner(weights).require_grad(), mapper)
    }
}

/// The elements of a float tensor.
pub(crate) fn floats(name: &str, data: TensorData) -> Result<Vec<f32>, JobError> {
    data.try_into_vec::<f32>()
        .map_err(|error| JobError::Tensor { name: name.to_owned(), problem: format!("not f32: {error:?}") })
}

/// The learning rate by step: linear warm-up from `lr / warmup_steps`, then the decay, which reaches `min_lr` after the
/// last step of the job.
pub(crate) struct Schedule {
    config: LrSchedulerConfig,
    scheduler: ModuleLrScheduler,
    /// The step whose rate the scheduler gives next.
    next: u64,
}

impl Schedule {
    pub fn new(config: &ScheduleConfig, steps: u64) -> Result<Self, String> {
        let warmup = config.warmup_steps.min(steps) as usize;
        let rest = (steps as usize).saturating_sub(warmup).max(1);
        let main = match config.decay {
            Decay::Constant => LrSchedulerConfig::Constant(config.lr),
            Decay::Linear => LinearLrSchedulerConfig::new(config.lr, config.min_lr, rest).into(),
            Decay::Cosine => CosineAnnealingLrSchedulerConfig::new(config.lr, rest).with_min_lr(config.min_lr).into(),
        };
        let config = if warmup > 1 {
            let rise = LinearLrSchedulerConfig::new(config.lr / warmup as f64, config.lr, warmup - 1);
            SequentialLrSchedulerConfig::new(vec![rise.into(), main], vec![warmup]).into()
        } else {
            main
        };
        let scheduler = ModuleLrSchedulerConfig::new(config.clone()).init()?;
        Ok(Schedule { config, scheduler, next: 0 })
    }

    /// The rate of `step` (0 = first). Burn's schedulers only move forward, so a step back starts again from 0.
    pub fn rate(&mut self, step: u64) -> Result<f64, String> {
        if step < self.next {
            self.scheduler = ModuleLrSchedulerConfig::new(self.config.clone()).init()?;
            self.next = 0;
        }
        while self.next < step {
            self.scheduler.step();
            self.next += 1;
        }
        self.next += 1;
        Ok(self.scheduler.step().base())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rates(decay: Decay, warmup_steps: u64) -> Vec<f64> {
        let config = ScheduleConfig { lr: 0.1, warmup_steps, decay, min_lr: 0.02 };
        let mut schedule = Schedule::new(&config, 8).expect("a good schedule");
        (0..8).map(|step| schedule.rate(step).expect("a rate")).collect()
    }

    fn close(got: &[f64], expected: &[f64]) {
        assert_eq!(got.len(), expected.len());
        assert!(got.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-12), "{got:?} is not {expected:?}");
    }

    #[test]
    fn rates_follow_the_schedule() {
        close(&rates(Decay::Constant, 0), &[0.1; 8]);
        close(&rates(Decay::Constant, 4), &[0.025, 0.05, 0.075, 0.1, 0.1, 0.1, 0.1, 0.1]);
        close(&rates(Decay::Linear, 0), &[0.1, 0.09, 0.08, 0.07, 0.06, 0.05, 0.04, 0.03]);
        let half = |k: f64| 0.02 + 0.5 * 0.08 * (1.0 + (k / 4.0 * std::f64::consts::PI).cos());
        close(&rates(Decay::Cosine, 4), &[0.025, 0.05, 0.075, 0.1, half(0.0), half(1.0), half(2.0), half(3.0)]);
    }

    #[test]
    fn rate_is_a_function_of_the_step() {
        let config = ScheduleConfig { lr: 0.1, warmup_steps: 3, decay: Decay::Cosine, min_lr: 0.0 };
        let mut schedule = Schedule::new(&config, 10).expect("a good schedule");
        let in_order: Vec<f64> = (0..10).map(|step| schedule.rate(step).expect("a rate")).collect();
        for step in [7, 2, 2, 9, 0] {
            assert_eq!(schedule.rate(step).expect("a rate"), in_order[step as usize], "step {step}");
        }
    }
}
