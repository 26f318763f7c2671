//! A model's parameters as plain numbers, in declaration order: their layout, their gradients, saving and loading.

use std::collections::BTreeMap;
use std::sync::mpsc::Sender;

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param};
use burn::optim::GradientsParams;
use burn::tensor::{Tensor, TensorData};

use super::fingerprint::Fingerprint;
use super::fused::{self, tap};
use super::precision::wide;
use super::{Layout, NamedTensor, ParamSpec, STATS};
use crate::JobError;

/// Walks the parameters in declaration order with their dotted paths.
struct Walk<F> {
    path: Vec<String>,
    each: F,
}

/// What a walk does at a parameter: path, shape, value.
trait Visit {
    fn visit<const D: usize>(&mut self, path: String, param: &Param<Tensor<D>>);
}

impl<F: Visit> ModuleVisitor for Walk<F> {
    fn enter_module(&mut self, name: &str, _: &str) {
        self.path.push(name.to_owned());
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        self.each.visit(self.path.join("."), param);
    }
}

fn walk<M: Module, F: Visit>(model: &M, each: F) -> F {
    let mut walk = Walk { path: Vec::new(), each };
    model.visit(&mut walk);
    walk.each
}

struct Specs(Vec<ParamSpec>);

impl Visit for Specs {
    fn visit<const D: usize>(&mut self, path: String, param: &Param<Tensor<D>>) {
        let shape = param.val().dims().to_vec();
        let (offset, len) = (self.0.last().map_or(0, |last| last.offset + last.len), shape.iter().product());
        self.0.push(ParamSpec { path, shape, offset, len, learns: param.is_require_grad() });
    }
}

pub(crate) fn layout<M: Module>(model: &M) -> Layout {
    Layout { params: walk(model, Specs(Vec::new())).0, figures: STATS }
}

struct Take {
    gradients: GradientsParams,
    out: Vec<Option<TensorData>>,
}

impl Visit for Take {
    fn visit<const D: usize>(&mut self, _: String, param: &Param<Tensor<D>>) {
        // The buffer moves out where the backend holds the only handle: no copy on the CPU.
        self.out.push(self.gradients.remove::<D>(param.id).map(|gradient| wide(gradient).into_data()));
    }
}

/// Names those that one layer alone uses to the tap of this thread.
struct Watch<F> {
    place: usize,
    is_used_once: F,
}

impl<F: Fn(&str) -> bool> Visit for Watch<F> {
    fn visit<const D: usize>(&mut self, path: String, param: &Param<Tensor<D>>) {
        if (self.is_used_once)(&path) {
            fused::watch(param.val(), self.place);
        }
        self.place += 1;
    }
}

/// Gradients in layout order, as f32; zeros for a parameter that the loss did not reach.
pub(crate) fn gradients<M: Module>(model: &M, layout: &Layout, loss: Tensor<1>) -> Vec<TensorData> {
    let taken = taken(model, loss).into_iter().zip(&layout.params);
    taken.map(|(data, param)| data.unwrap_or_else(|| zeros(param))).collect()
}

/// The same, sent to `out` with their places in the layout. Those of parameters that one layer of ours alone uses come while the ones of earlier layers are
/// still computed. On this thread.
pub(crate) fn gradients_early<M: Module>(
    model: &M,
    layout: &Layout,
    loss: Tensor<1>,
    is_used_once: impl Fn(&str) -> bool,
    out: Sender<(usize, TensorData)>,
) {
    let watch = || drop(walk(model, Watch { place: 0, is_used_once }));
    let (rest, given) = tap::open(watch, out.clone(), || taken(model, loss));
    for (place, (data, param)) in rest.into_iter().zip(&layout.params).enumerate() {
        if given.contains(&place) {
            assert!(data.is_none(), "{} is used more than once, and its task says that it is not", param.path);
        } else {
            let _ = out.send((place, data.unwrap_or_else(|| zeros(param))));
        }
    }
}

/// None of a parameter that the loss did not reach, or whose gradient was given away.
fn taken<M: Module>(model: &M, loss: Tensor<1>) -> Vec<Option<TensorData>> {
    let gradients = GradientsParams::from_grads(loss.backward(), model);
    walk(model, Take { gradients, out: Vec::new() }).out
}

fn zeros(param: &ParamSpec) -> TensorData {
    TensorData::new(vec![0f32; param.len], param.shape.clone())
}

/// Adds gradients in place.
pub(crate) fn add(total: &mut [TensorData], part: &[TensorData]) {
    total.iter_mut().zip(part).for_each(|(total, part)| add_one(total, part));
}

pub(crate) fn add_one(total: &mut TensorData, part: &TensorData) {
    let total = total.as_mut_slice::<f32>().expect("gradients are f32");
    let part = part.as_slice::<f32>().expect("gradients are f32");
    total.iter_mut().zip(part).for_each(|(total, part)| *total += part);
}

struct Handles(Vec<Tensor<1>>);

impl Visit for Handles {
    fn visit<const D: usize>(&mut self, _: String, param: &Param<Tensor<D>>) {
        let tensor = param.val().inner();
        let len = tensor.shape().num_elements();
        self.0.push(tensor.reshape([len]));
    }
}

/// The parameters' tensors in layout order, each flat and sharing the model's buffer.
pub(crate) fn handles<M: Module>(model: &M) -> Vec<Tensor<1>> {
    walk(model, Handles(Vec::new())).0
}

impl Visit for Fingerprint {
    fn visit<const D: usize>(&mut self, _: String, param: &Param<Tensor<D>>) {
        let data = param.val().inner().into_data();
        self.add(data.as_slice::<f32>().expect("parameters are f32"));
    }
}

/// A checksum over the parameters, in layout order.
pub(crate) fn fingerprint_model<M: Module>(model: &M) -> u64 {
    walk(model, Fingerprint::new()).finish()
}

/// Tensors by name, each with as many values as its shape says.
pub(crate) fn by_name(tensors: Vec<NamedTensor>) -> Result<BTreeMap<String, NamedTensor>, JobError> {
    let mut map = BTreeMap::new();
    for tensor in tensors {
        let name = tensor.name.clone();
        let fail = |problem| Err(JobError::Tensor { name: name.clone(), problem });
        if tensor.shape.iter().try_fold(1usize, |len, &size| len.checked_mul(size)) != Some(tensor.values.len()) {
            return fail(format!("{} values in the shape {:?}", tensor.values.len(), tensor.shape));
        }
        if map.insert(name.clone(), tensor).is_some() {
            return fail("given twice".to_owned());
        }
    }
    Ok(map)
}

/// The weights in layout order, with every name and shape checked.
pub(crate) fn check_model(layout: &Layout, tensors: Vec<NamedTensor>) -> Result<Vec<NamedTensor>, JobError> {
    let mut map = by_name(tensors)?;
    let weights = layout.params.iter().zip(found(layout, &mut map)?).map(|(param, tensor)| {
        let missing = || JobError::Tensor { name: weights_name(param), problem: "missing".to_owned() };
        tensor.ok_or_else(missing)
    });
    let weights = weights.collect::<Result<_, JobError>>()?;
    nothing_else(map)?;
    Ok(weights)
}

/// Those of the weights that are given, by place in the layout.
pub(crate) fn check_some(layout: &Layout, tensors: Vec<NamedTensor>) -> Result<Vec<Option<NamedTensor>>, JobError> {
    let mut map = by_name(tensors)?;
    let weights = found(layout, &mut map)?;
    nothing_else(map)?;
    Ok(weights)
}

/// The parameters' weights, taken out of `map`.
fn found(layout: &Layout, map: &mut BTreeMap<String, NamedTensor>) -> Result<Vec<Option<NamedTensor>>, JobError> {
    let find = |param: &ParamSpec| match map.remove(&weights_name(param)) {
        Some(tensor) if tensor.shape != param.shape => {
            let problem = format!("shape {:?}, expected {:?}: saved with another [model]?", tensor.shape, param.shape);
            Err(JobError::Tensor { name: tensor.name, problem })
        }
        tensor => Ok(tensor),
    };
    layout.params.iter().map(find).collect()
}

fn nothing_else(rest: BTreeMap<String, NamedTensor>) -> Result<(), JobError> {
    match rest.into_keys().next() {
        None => Ok(()),
        Some(name) => Err(JobError::Tensor { name, problem: "no parameter of this model has that name".to_owned() }),
    }
}

fn weights_name(param: &ParamSpec) -> String {
    format!("model.{}", param.path)
}

/// Puts checked weights into the model.
pub(crate) fn load_model<M: Module>(model: M, weights: Vec<NamedTensor>) -> M {
    let mut weights = weights.into_iter();
    let next = |_| weights.next().map(|tensor| TensorData::new(tensor.values, tensor.shape));
    replace(model, next)
}

/// Gives parameters other values, each by its place in the layout; those that have none stay as they are.
pub(crate) fn replace<M: Module>(model: M, values: impl FnMut(usize) -> Option<TensorData>) -> M {
    struct Put<F> {
        place: usize,
        values: F,
    }
    impl<F: FnMut(usize) -> Option<TensorData>> ModuleMapper for Put<F> {
        fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
            let place = self.place;
            self.place += 1;
            let Some(values) = (self.values)(place) else { return param };
            let (id, old, mapper) = param.consume();
            let tensor = Tensor::<D>::from_data(values, &old.device());
            let tensor = if old.is_require_grad() { tensor.require_grad() } else { tensor };
            Param::from_mapped_value(id, tensor, mapper)
        }
    }
    model.map(&mut Put { place: 0, values })
}
