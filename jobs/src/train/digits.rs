//! Trainer `digits`: which digit a 28x28 grey image shows. A small LeNet: two convolutions of 5x5, each followed by
//! 2x2 max-pooling, and a small MLP.

use std::path::PathBuf;

use burn::module::Module;
use burn::tensor::activation::relu;
use burn::tensor::{Device, Int, Tensor, TensorData};
use serde::Deserialize;
use serde_json::Value;

use super::engine::{Engine, Loss, Task, cross_entropy};
use super::layers::{Init, Linear};
use super::parameters::{check_model, layout, load_model};
use super::precision::rows;
use super::pytorch::{Kind, to_pytorch};
use super::{Metrics, NamedTensor, Plan, Predict, Prediction, Train, answers, prediction};
use crate::JobError;
use crate::config::{Sections, Spec};
use crate::data::{Field, Group, HeldOut, Samples, check_names, in_column, read_split};
use crate::device::device;

// ---- what the spec says ----------------------------------------------------------------------------------------------

/// `[data]`
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Data {
    train: PathBuf,
    /// A share of the rows of `train`, or a file of its own.
    #[serde(default = "held_out")]
    held_out: HeldOut,
    /// Column with 784 values of 0..255, row by row.
    #[serde(default = "pixels")]
    pixels: String,
    /// Column with the digit.
    #[serde(default = "label")]
    label: String,
}

fn held_out() -> HeldOut {
    HeldOut::Fraction(0.15)
}
fn pixels() -> String {
    "pixels".to_owned()
}
fn label() -> String {
    "label".to_owned()
}

/// `[model]`
#[derive(Debug, Clone, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Model {
    /// Channels of the two convolutions.
    #[serde(deserialize_with = "crate::config::pair")]
    channels: [usize; 2],
    /// Size of the hidden layer.
    hidden: usize,
}

impl Default for Model {
    fn default() -> Self {
        Model { channels: [16, 32], hidden: 128 }
    }
}

pub(crate) fn sections(spec: &Spec<'_>) -> Result<Sections<Data, Model>, JobError> {
    let sections: Sections<Data, Model> = spec.sections()?;
    let [first, second] = sections.model.channels;
    for (key, size, max) in
        [("channels", first, 1024), ("channels", second, 1024), ("hidden", sections.model.hidden, 4096)]
    {
        if size == 0 || size > max {
            let mend = format!("write numbers from 1 to {max}");
            return Err(spec.mistake("model", key, &format!("{key} is out of range"), &mend));
        }
    }
    sections.data.held_out.check(spec)?;
    check_names(&sections.data.train, &sections.data.held_out)?;
    Ok(sections)
}

// ---- the data --------------------------------------------------------------------------------------------------------

const SIDE: usize = 28;
const PIXELS: usize = SIDE * SIDE;
const DIGITS: usize = 10;

/// Training and held-out samples: label and pixels. A held-out share is taken by the hash of the pixels: copies of an image stay together.
fn read(data: &Data) -> Result<[Samples; 2], JobError> {
    let sets = read_split(&data.train, &data.held_out, &[&data.label, &data.pixels], &|fields, sample| {
        let label = in_column(&data.label, fields[0].integer(DIGITS as u64 - 1))? as u8;
        let pixels = in_column(&data.pixels, fields[1].bytes(PIXELS))?;
        sample.push(label);
        sample.extend_from_slice(&pixels);
        Ok(Group::of(&pixels))
    })?;
    for (samples, which) in sets.iter().zip(["training", "held-out"]) {
        if samples.len() == 0 {
            return Err(JobError::Data { path: data.train.clone(), problem: format!("no {which} rows") });
        }
    }
    Ok(sets)
}

// ---- the model -------------------------------------------------------------------------------------------------------

/// Side of the convolutions' windows.
const KERNEL: usize = 5;
/// Side of the image after the first convolution (24) and pooling.
const SIDE_1: usize = pooled(SIDE);
/// The same after the second (8).
const SIDE_2: usize = pooled(SIDE_1);

const fn pooled(side: usize) -> usize {
    (side + 1 - KERNEL) / 2
}

#[derive(Module, Debug)]
pub(crate) struct Net {
    first: Linear,
    second: Linear,
    hidden: Linear,
    output: Linear,
}

impl Net {
    fn new(init: &Init<'_>, config: &Model) -> Self {
        let [first, second] = config.channels;
        Net {
            first: Linear::new(init, "first", KERNEL * KERNEL, first),
            second: Linear::new(init, "second", KERNEL * KERNEL * first, second),
            hidden: Linear::new(init, "hidden", SIDE_2 * SIDE_2 * second, config.hidden),
            output: Linear::new(init, "output", config.hidden, DIGITS),
        }
    }

    /// Logits [images, 10]. A convolution is a product of all its windows with its weights (channels last): faster than
    /// Burn's convolution on the CPU, whose backward pass is slow. Windows are gathered in the order of the pooled
    /// pixels, four windows to a pixel, so that pooling is the largest of four neighbouring rows.
    fn forward(&self, config: &Model, images: &[&[u8]], device: &Device) -> Tensor<2> {
        let [first, second] = config.channels;
        let count = images.len();
        let windows = window_pixels(images);
        let size = [count * SIDE_1 * SIDE_1 * 4, KERNEL * KERNEL];
        let x = Tensor::<2>::from_data(TensorData::new(windows, size), device);
        let x = self.first.forward_largest(x, 4);

        let windows = window_rows(count);
        let x = rows(x, Tensor::<1, Int>::from_data(&windows[..], device));
        let x = x.reshape([count * SIDE_2 * SIDE_2 * 4, KERNEL * KERNEL * first]);
        let x = self.second.forward_largest(x, 4);

        let x = x.reshape([count, SIDE_2 * SIDE_2 * second]);
        self.output.forward(relu(self.hidden.forward(x)))
    }
}

/// For each pooled pixel, its four windows, each as positions in the image of `side` before the convolution.
fn window_positions(side: usize) -> Vec<usize> {
    let pooled = pooled(side);
    let mut out = Vec::with_capacity(pooled * pooled * 4 * KERNEL * KERNEL);
    for (y, x) in square(pooled) {
        for (dy, dx) in square(2) {
            for (ky, kx) in square(KERNEL) {
                out.push((2 * y + dy + ky) * side + 2 * x + dx + kx);
            }
        }
    }
    out
}

fn square(side: usize) -> impl Iterator<Item = (usize, usize)> {
    (0..side).flat_map(move |y| (0..side).map(move |x| (y, x)))
}

/// The first convolution's windows as values of 0 to 1.
fn window_pixels(images: &[&[u8]]) -> Vec<f32> {
    let positions = window_positions(SIDE);
    let mut out = Vec::with_capacity(images.len() * positions.len());
    for image in images {
        out.extend(positions.iter().map(|&at| f32::from(image[at]) / 255.0));
    }
    out
}

/// The second convolution's windows as rows of the first one's pooled output.
fn window_rows(images: usize) -> Vec<i32> {
    let positions = window_positions(SIDE_1);
    let mut out = Vec::with_capacity(images * positions.len());
    for image in 0..images {
        out.extend(positions.iter().map(|&at| (image * SIDE_1 * SIDE_1 + at) as i32));
    }
    out
}

// ---- training, evaluation, prediction --------------------------------------------------------------------------------

struct Digits {
    config: Model,
    train: Samples,
    held: Samples,
}

pub(crate) fn load(spec: &Spec<'_>, plan: Plan) -> Result<Box<dyn Train>, JobError> {
    let sections = sections(spec)?;
    let [train, held] = read(&sections.data)?;
    let device = device().autodiff();
    let net = Net::new(&Init::new(plan.seed, &device), &sections.model);
    let task = Digits { config: sections.model, train, held };
    Ok(Box::new(Engine::new(task, net, device, plan, (&sections.optimizer, &sections.schedule))?))
}

impl Task for Digits {
    type Model = Net;

    fn samples(&self) -> u64 {
        self.train.len() as u64
    }

    fn loss(&self, net: &Net, samples: &[u64], device: &Device) -> Loss {
        let (labels, images): (Vec<u8>, Vec<&[u8]>) =
            samples.iter().map(|at| self.train.labelled(*at as usize)).unzip();
        cross_entropy(net.forward(&self.config, &images, device), &labels)
    }

    fn computes_in_bf16(&self) -> bool {
        true
    }

    fn evaluate(&self, net: &Net, device: &Device) -> Metrics {
        let (mut correct, mut loss) = (0.0, 0.0);
        for (labels, images) in self.held.batches(BATCH) {
            let figures = cross_entropy(net.forward(&self.config, &images, device), &labels);
            correct += f64::from(figures.correct);
            loss += f64::from(figures.sum.into_scalar::<f32>());
        }
        let rows = self.held.len() as f64;
        Metrics::from([("accuracy".to_owned(), correct / rows), ("loss".to_owned(), loss / rows)])
    }
}

/// Images a forward pass outside training, where memory is the only bound.
const BATCH: usize = 64;

struct Classifier {
    config: Model,
    /// Key of the pixels, where a line is a row of a training file.
    pixels: String,
    labels: Vec<String>,
    net: Net,
    device: Device,
}

pub(crate) fn classifier(spec: &Spec<'_>, tensors: Vec<NamedTensor>) -> Result<Box<dyn Predict>, JobError> {
    let sections = sections(spec)?;
    let device = device();
    let net = Net::new(&Init::new(0, &device), &sections.model);
    let weights = check_model(&layout(&net), tensors)?;
    let net = load_model(net, weights);
    let labels = (0..DIGITS).map(|digit| digit.to_string()).collect();
    Ok(Box::new(Classifier { config: sections.model, pixels: sections.data.pixels, labels, net, device }))
}

/// The weights for a plain PyTorch module: `nn.Conv2d`, `nn.Linear`.
pub(crate) fn pytorch(spec: &Spec<'_>, tensors: Vec<NamedTensor>) -> Result<Vec<NamedTensor>, JobError> {
    let config = sections(spec)?.model;
    let weights = check_model(&layout(&Net::new(&Init::new(0, &device()), &config)), tensors)?;
    let kind = |name: &str| match name {
        "model.first.weight" | "model.second.weight" => Kind::Convolution { window: vec![KERNEL, KERNEL] },
        "model.hidden.weight" => Kind::Flattened { pixels: SIDE_2 * SIDE_2 },
        "model.output.weight" => Kind::Linear,
        _ => Kind::Plain,
    };
    let laid_out = weights.into_iter().map(|tensor| {
        let kind = kind(&tensor.name);
        to_pytorch(tensor, &kind)
    });
    Ok(laid_out.collect())
}

impl Predict for Classifier {
    fn predict(&mut self, lines: &[&str]) -> Vec<Result<Prediction, String>> {
        let images = lines.iter().map(|line| image(line, &self.pixels)).collect();
        answers(images, BATCH, |batch| {
            let batch: Vec<&[u8]> = batch.iter().map(|image| &image[..]).collect();
            let logits = self.net.forward(&self.config, &batch, &self.device).into_data();
            let logits = logits.try_into_vec::<f32>().expect("logits are f32");
            logits.chunks(DIGITS).map(|row| prediction(&self.labels, row)).collect()
        })
    }
}

/// A line is a JSON array of 784 values of 0..255, or a row of a JSONL file to train on.
fn image(line: &str, pixels: &str) -> Result<Vec<u8>, String> {
    let expected = || format!("expected a JSON array of {PIXELS} numbers, or an object with \"{pixels}\"");
    let value: Value = serde_json::from_str(line).map_err(|_| expected())?;
    let array = if value.is_object() { value.get(pixels).ok_or_else(expected)? } else { &value };
    Field::Json(array).bytes(PIXELS)
}
