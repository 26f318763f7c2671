//! Trainer `domains`: is a domain name phishing or benign, from its characters alone. A character CNN (Kim 2014, on
//! characters as in Zhang, Zhao and LeCun 2015): embedding, convolutions of a few widths, the largest value over the
//! positions, a small MLP.
//!
//! The held-out rows are chosen by registered domain, so that the model is judged on owners it has never seen.

use std::path::PathBuf;

use burn::module::Module;
use burn::tensor::activation::relu;
use burn::tensor::{Device, Int, Tensor, TensorData};
use serde::Deserialize;

use super::engine::{Engine, Loss, Task, cross_entropy};
use super::layers::{Embedding, Init, Linear};
use super::metrics::{at_false_positives, roc_auc};
use super::parameters::{check_model, layout, load_model};
use super::pytorch::{Kind, to_pytorch};
use super::{Metrics, NamedTensor, Plan, Predict, Prediction, Train, answers, prediction};
use crate::JobError;
use crate::config::{Sections, Spec};
use crate::data::{Group, HeldOut, Samples, check_names, in_column, read_split};
use crate::device::device;

// ---- what the spec says ----------------------------------------------------------------------------------------------

/// `[data]`
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Data {
    train: PathBuf,
    /// A share of the registered domains of `train`, or a file of its own.
    #[serde(default = "held_out")]
    held_out: HeldOut,
    /// Column with the domain name.
    #[serde(default = "domain")]
    domain: String,
    /// Column with the label.
    #[serde(default = "label")]
    label: String,
    /// Column with the registered domain. Left out: guessed from the name (see `registered`).
    registered: Option<String>,
    /// The two labels as the column writes them; metrics take the second as the positive class.
    #[serde(default = "labels", deserialize_with = "crate::config::pair")]
    labels: [String; 2],
}

fn held_out() -> HeldOut {
    HeldOut::Fraction(0.15)
}
fn domain() -> String {
    "domain".to_owned()
}
fn label() -> String {
    "label".to_owned()
}
fn labels() -> [String; 2] {
    ["benign".to_owned(), "phishing".to_owned()]
}

/// `[model]`
#[derive(Debug, Clone, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Model {
    /// Characters that are looked at: the last ones, where the registered domain is.
    length: usize,
    /// Size of a character's vector.
    embedding: usize,
    /// Window widths of the convolutions, in characters.
    widths: Vec<usize>,
    /// Channels of each convolution.
    channels: usize,
    /// Size of the hidden layer.
    hidden: usize,
}

impl Default for Model {
    fn default() -> Self {
        Model { length: 64, embedding: 16, widths: vec![5], channels: 256, hidden: 64 }
    }
}

pub(crate) fn sections(spec: &Spec<'_>) -> Result<Sections<Data, Model>, JobError> {
    let sections: Sections<Data, Model> = spec.sections()?;
    let model = &sections.model;
    let sizes = [
        ("length", model.length, 253),
        ("embedding", model.embedding, 1024),
        ("channels", model.channels, 4096),
        ("hidden", model.hidden, 4096),
    ];
    if let Some((key, _, max)) = sizes.iter().find(|(_, size, max)| size == &0 || size > max) {
        let mend = format!("write a number from 1 to {max}");
        return Err(spec.mistake("model", key, &format!("{key} is out of range"), &mend));
    }
    if model.widths.is_empty() || model.widths.iter().any(|width| !(1..=16).contains(width)) {
        let mend = "write one or more widths from 1 to 16, such as [3, 5]";
        return Err(spec.mistake("model", "widths", "widths is out of range", mend));
    }
    sections.data.held_out.check(spec)?;
    check_names(&sections.data.train, &sections.data.held_out)?;
    if sections.data.labels[0] == sections.data.labels[1] {
        return Err(spec.mistake("data", "labels", "both labels are the same", "write the two labels of the column"));
    }
    Ok(sections)
}

// ---- the data --------------------------------------------------------------------------------------------------------

/// Symbols: 0 = outside the name, 1 = any other character, then these.
const ALPHABET: &[u8] = b"abcdefghijklmnopqrstuvwxyz0123456789-._";
const SYMBOLS: usize = 2 + ALPHABET.len();

/// A name in lower case, without blanks around it or a dot behind it.
fn normal(name: &str) -> Result<String, String> {
    let normal = name.trim().trim_end_matches('.').to_lowercase();
    if normal.is_empty() || normal.contains(|c: char| c.is_whitespace() || c.is_control() || "/:@?#,".contains(c)) {
        return Err(format!("expected a domain name, found \"{}\"", name.escape_debug()));
    }
    Ok(normal)
}

/// The last `length` characters of a normal name as symbols.
fn encode(name: &str, length: usize) -> Vec<u8> {
    let symbol = |c: char| ALPHABET.iter().position(|&known| char::from(known) == c).map_or(1, |at| at as u8 + 2);
    let symbols: Vec<u8> = name.chars().map(symbol).collect();
    symbols[symbols.len().saturating_sub(length)..].to_vec()
}

/// The registered domain, guessed without the public suffix list: the last two labels, or three under a country's
/// general second level (`example.co.uk`). A `registered` column is better where there is one.
fn registered(name: &str) -> &str {
    const SECOND_LEVEL: [&str; 12] = ["ac", "co", "com", "edu", "go", "gob", "gouv", "gov", "ne", "net", "or", "org"];
    let labels: Vec<&str> = name.rsplitn(4, '.').collect();
    let keep = match labels[..] {
        [top, second, _, ..] if top.len() == 2 && SECOND_LEVEL.contains(&second) => 3,
        _ => 2.min(labels.len()),
    };
    let bytes = labels[..keep].iter().map(|label| label.len() + 1).sum::<usize>() - 1;
    &name[name.len() - bytes..]
}

/// Training and held-out samples: the index of the label, and the name as symbols. Both must have both labels.
fn read(data: &Data, length: usize) -> Result<[Samples; 2], JobError> {
    let group = data.registered.as_ref().unwrap_or(&data.domain);
    let columns = [data.domain.as_str(), &data.label, group];
    let sets = read_split(&data.train, &data.held_out, &columns, &|fields, sample| {
        let name = in_column(&data.domain, fields[0].text().and_then(|name| normal(&name)))?;
        let label = in_column(&data.label, fields[1].text())?;
        let known = data.labels.iter().position(|known| *known == label);
        let unknown = || format!("{}: expected {}, found \"{label}\"", data.label, data.labels.join(" or "));
        let label = known.ok_or_else(unknown)? as u8;
        let group = match &data.registered {
            Some(column) => in_column(column, fields[2].text())?,
            None => registered(&name).into(),
        };
        sample.push(label);
        sample.extend(encode(&name, length));
        Ok(Group::of(group.as_bytes()))
    })?;
    for (samples, which) in sets.iter().zip(["training", "held-out"]) {
        for (index, label) in data.labels.iter().enumerate() {
            if !(0..samples.len()).any(|at| usize::from(samples.labelled(at).0) == index) {
                let problem = format!("no {which} row is labelled {label}");
                return Err(JobError::Data { path: data.train.clone(), problem });
            }
        }
    }
    Ok(sets)
}

// ---- the model -------------------------------------------------------------------------------------------------------

#[derive(Module, Debug)]
pub(crate) struct Net {
    embedding: Embedding,
    convolutions: Vec<Linear>,
    hidden: Linear,
    output: Linear,
}

impl Net {
    fn new(init: &Init<'_>, config: &Model) -> Self {
        let convolution = |(at, width): (usize, &usize)| {
            Linear::new(init, &format!("convolutions.{at}"), width * config.embedding, config.channels)
        };
        Net {
            embedding: Embedding::new(init, "embedding", SYMBOLS, config.embedding),
            convolutions: config.widths.iter().enumerate().map(convolution).collect(),
            hidden: Linear::new(init, "hidden", config.widths.len() * config.channels, config.hidden),
            output: Linear::new(init, "output", config.hidden, 2),
        }
    }

    /// Logits [names, 2]. Each convolution is a product of all windows of characters with its weights: the windows are
    /// gathered as symbols, before the embedding, which on the CPU is faster than cutting the embedded text.
    ///
    /// A name is taken as followed by endless symbols 0. Windows that lie wholly in them are all the same, so one of
    /// them after the longest name stands for all: a name's logits do not depend on the other names in the batch.
    fn forward(&self, config: &Model, names: &[&[u8]], device: &Device) -> Tensor<2> {
        let positions = 1 + names.iter().map(|name| name.len()).max().unwrap_or(0);
        let mut features = Vec::new();
        for (convolution, &width) in self.convolutions.iter().zip(&config.widths) {
            let windows = windows(names, positions, width);
            let windows =
                Tensor::<1, Int>::from_data(TensorData::new(windows, [names.len() * positions * width]), device);
            let windows = self.embedding.forward(windows).reshape([names.len() * positions, width * config.embedding]);
            features.push(convolution.forward_largest(windows, positions));
        }
        let features = if features.len() == 1 { features.remove(0) } else { Tensor::cat(features, 1) };
        self.output.forward(relu(self.hidden.forward(features)))
    }
}

/// The symbols in the windows of `width` that start at 0, 1, ... `positions - 1`, name by name.
fn windows(names: &[&[u8]], positions: usize, width: usize) -> Vec<i32> {
    let mut out = Vec::with_capacity(names.len() * positions * width);
    for name in names {
        for start in 0..positions {
            out.extend((start..start + width).map(|at| i32::from(name.get(at).copied().unwrap_or(0))));
        }
    }
    out
}

// ---- training, evaluation, prediction --------------------------------------------------------------------------------

struct Domains {
    config: Model,
    train: Samples,
    held: Samples,
}

pub(crate) fn load(spec: &Spec<'_>, plan: Plan) -> Result<Box<dyn Train>, JobError> {
    let sections = sections(spec)?;
    let [train, held] = read(&sections.data, sections.model.length)?;
    let device = device().autodiff();
    let net = Net::new(&Init::new(plan.seed, &device), &sections.model);
    let task = Domains { config: sections.model, train, held };
    Ok(Box::new(Engine::new(task, net, device, plan, (&sections.optimizer, &sections.schedule))?))
}

impl Task for Domains {
    type Model = Net;

    fn samples(&self) -> u64 {
        self.train.len() as u64
    }

    fn loss(&self, net: &Net, samples: &[u64], device: &Device) -> Loss {
        let (labels, names): (Vec<u8>, Vec<&[u8]>) = samples.iter().map(|at| self.train.labelled(*at as usize)).unzip();
        cross_entropy(net.forward(&self.config, &names, device), &labels)
    }

    fn computes_in_bf16(&self) -> bool {
        true
    }

    fn evaluate(&self, net: &Net, device: &Device) -> Metrics {
        let positive: Vec<bool> = (0..self.held.len()).map(|at| self.held.labelled(at).0 == 1).collect();
        let (mut scores, mut correct, mut loss) = (Vec::new(), 0.0, 0.0);
        for (labels, names) in self.held.batches(BATCH) {
            let logits = net.forward(&self.config, &names, device);
            let figures = cross_entropy(logits.clone(), &labels);
            correct += f64::from(figures.correct);
            loss += f64::from(figures.sum.into_scalar::<f32>());
            let logits = logits.into_data().try_into_vec::<f32>().expect("logits are f32");
            scores.extend(logits.chunks(2).map(|row| row[1] - row[0]));
        }
        let (precision, recall) = at_false_positives(&scores, &positive, 0.01);
        let rows = self.held.len() as f64;
        Metrics::from([
            ("accuracy".to_owned(), correct / rows),
            ("loss".to_owned(), loss / rows),
            ("roc_auc".to_owned(), roc_auc(&scores, &positive)),
            ("precision_at_1pct_fpr".to_owned(), precision),
            ("recall_at_1pct_fpr".to_owned(), recall),
        ])
    }
}

/// Rows a forward pass outside training, where memory is the only bound.
const BATCH: usize = 256;

struct Classifier {
    config: Model,
    labels: [String; 2],
    net: Net,
    device: Device,
}

pub(crate) fn classifier(spec: &Spec<'_>, tensors: Vec<NamedTensor>) -> Result<Box<dyn Predict>, JobError> {
    let sections = sections(spec)?;
    let device = device();
    let net = Net::new(&Init::new(0, &device), &sections.model);
    let weights = check_model(&layout(&net), tensors)?;
    let net = load_model(net, weights);
    Ok(Box::new(Classifier { config: sections.model, labels: sections.data.labels, net, device }))
}

/// The weights for a plain PyTorch module: `nn.Embedding`, `nn.Conv1d`, `nn.Linear`.
pub(crate) fn pytorch(spec: &Spec<'_>, tensors: Vec<NamedTensor>) -> Result<Vec<NamedTensor>, JobError> {
    let config = sections(spec)?.model;
    let weights = check_model(&layout(&Net::new(&Init::new(0, &device()), &config)), tensors)?;
    let kind = |name: &str| match name.split('.').collect::<Vec<_>>()[..] {
        ["model", "convolutions", at, "weight"] => {
            let at: usize = at.parse().expect("P1: check_model knows the name");
            Kind::Convolution { window: vec![config.widths[at]] }
        }
        ["model", "hidden" | "output", "weight"] => Kind::Linear,
        _ => Kind::Plain,
    };
    let laid_out = weights.into_iter().map(|tensor| {
        let kind = kind(&tensor.name);
        to_pytorch(tensor, &kind)
    });
    Ok(laid_out.collect())
}

impl Predict for Classifier {
    /// A line is a domain name.
    fn predict(&mut self, lines: &[&str]) -> Vec<Result<Prediction, String>> {
        let encoded = lines.iter().map(|line| Ok(encode(&normal(line)?, self.config.length))).collect();
        answers(encoded, BATCH, |batch| {
            let names: Vec<&[u8]> = batch.iter().map(|symbols| &symbols[..]).collect();
            let logits = self.net.forward(&self.config, &names, &self.device).into_data();
            let logits = logits.try_into_vec::<f32>().expect("logits are f32");
            logits.chunks(2).map(|row| prediction(&self.labels, row)).collect()
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn registered_domain_is_guessed() {
        for (name, expected) in [
            ("a.b.example.com", "example.com"),
            ("example.com", "example.com"),
            ("www.example.co.uk", "example.co.uk"),
            ("example.co.uk", "example.co.uk"),
            ("co.uk", "co.uk"),
            ("a.b.c.example.com.br", "example.com.br"),
            ("localhost", "localhost"),
        ] {
            assert_eq!(registered(name), expected, "{name}");
        }
    }

    #[test]
    fn names_become_their_last_symbols() {
        assert_eq!(encode("ab-9.\u{e9}", 64), [2, 3, 38, 37, 39, 1]);
        assert_eq!(encode("abcdef", 2), [6, 7]);
        assert_eq!(normal(" Example.COM. "), Ok("example.com".to_owned()));
        assert!(normal("http://example.com").is_err() && normal("").is_err() && normal("a b").is_err());
        assert!(normal("a\0b.com").is_err() && normal("a\u{1b}[m.com").is_err());
    }

    #[test]
    fn windows_run_past_the_end() {
        assert_eq!(windows(&[&[5, 6, 7], &[8]], 2, 3), [5, 6, 7, 6, 7, 0, 8, 0, 0, 0, 0, 0]);
    }
}
