//! Trainer `language`: a decoder of the Llama class (Touvron et al. 2023) that learns to continue texts, from nothing or from a Hugging Face folder. What it
//! exports is such a folder again, which `stoke serve` and transformers open.
//!
//! A sample is a window of `context` tokens; its loss is the mean over them, so that a batch's is the mean over all tokens.

mod net;
mod text;

use std::path::{Path, PathBuf};

use burn::tensor::Device;
use serde::Deserialize;
use serde_json::json;

use self::net::{Net, check_shapes, from_hugging_face, to_hugging_face};
pub(crate) use self::text::digest;
use self::text::{BYTES, CONFIG, Vocabulary, Windows, files, read};
use super::engine::{Engine, Loss, Task};
use super::fused::{Heads, cross_entropy};
use super::layers::Init;
use super::parameters::{check_model, layout, load_model};
use super::{Metrics, NamedTensor, Plan, Train};
use crate::JobError;
use crate::config::{Sections, Spec};
use crate::data::{HeldOut, check_names};
use crate::device::device;
use crate::lm::{DecoderConfig, Rope, Weights};

/// `[data]`
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Data {
    train: PathBuf,
    /// A share of the texts of `train`, or a file of its own.
    #[serde(default = "held_out")]
    held_out: HeldOut,
    /// Column with the text.
    #[serde(default = "text")]
    text: String,
}

fn held_out() -> HeldOut {
    HeldOut::Fraction(0.05)
}
fn text() -> String {
    "text".to_owned()
}

/// `[model]`
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Model {
    /// Tokens that are looked back at in training.
    context: Option<usize>,
    /// A Hugging Face folder with the first weights, the shape and the tokenizer. Left out: a model of bytes, from nothing, of the sizes below.
    from: Option<PathBuf>,
    /// Of the files in it that are not weights; `stoke submit` adds it, so that a folder that is changed meanwhile is found out.
    from_blake3: Option<String>,
    hidden: Option<usize>,
    layers: Option<usize>,
    heads: Option<usize>,
    kv_heads: Option<usize>,
    ffn: Option<usize>,
    tied: Option<bool>,
}

const CONTEXT: usize = 128;
const HIDDEN: usize = 256;
const LAYERS: usize = 4;
/// Values of a head, where the number of heads is not said.
const HEAD: usize = 64;

pub(crate) fn sections(spec: &Spec<'_>) -> Result<Sections<Data, Model>, JobError> {
    let sections: Sections<Data, Model> = spec.sections()?;
    let model = &sections.model;
    sections.data.held_out.check(spec)?;
    check_names(&sections.data.train, &sections.data.held_out)?;
    let sizes = [
        ("context", model.context, 1 << 16),
        ("hidden", model.hidden, 1 << 14),
        ("layers", model.layers, 256),
        ("heads", model.heads, 256),
        ("kv_heads", model.kv_heads, 256),
        ("ffn", model.ffn, 1 << 16),
    ];
    if let Some((key, _, max)) = sizes.iter().find(|(_, size, max)| size.is_some_and(|size| size == 0 || size > *max)) {
        let mend = format!("write a number from 1 to {max}");
        return Err(spec.mistake("model", key, &format!("{key} is out of range"), &mend));
    }
    if model.from.is_some() {
        let given = sizes[1..].iter().find(|(_, size, _)| size.is_some()).map(|(key, ..)| *key);
        if let Some(key) = given.or(model.tied.map(|_| "tied")) {
            let problem = format!("{key} is beside from, whose folder says it");
            return Err(spec.mistake("model", key, &problem, "remove one of them"));
        }
        return Ok(sections);
    }
    let shape = model.new_shape();
    if !shape.hidden.is_multiple_of(shape.heads) || !shape.head_size.is_multiple_of(2) {
        let mend = format!("write a divisor of hidden = {} that leaves an even size of a head", shape.hidden);
        return Err(spec.mistake("model", "heads", &format!("heads = {} does not fit", shape.heads), &mend));
    }
    if !shape.heads.is_multiple_of(shape.kv_heads) {
        let mend = format!("write a divisor of heads = {}", shape.heads);
        return Err(spec.mistake("model", "kv_heads", "kv_heads does not divide heads", &mend));
    }
    Ok(sections)
}

impl Model {
    fn context(&self) -> usize {
        self.context.unwrap_or(CONTEXT)
    }

    /// The shape of a model of bytes.
    fn new_shape(&self) -> DecoderConfig {
        let hidden = self.hidden.unwrap_or(HIDDEN);
        let heads = self.heads.unwrap_or((hidden / HEAD).max(1));
        DecoderConfig {
            architecture: "llama".to_owned(),
            layers: self.layers.unwrap_or(LAYERS),
            hidden,
            heads,
            kv_heads: self.kv_heads.unwrap_or(heads),
            head_size: hidden / heads,
            // As many weights as the two matrices of four times the width that it stands for (Shazeer 2020), in whole vectors of a processor.
            ffn: self.ffn.unwrap_or((hidden * 8 / 3).next_multiple_of(64)),
            vocab: BYTES,
            context: self.context(),
            rms_epsilon: 1e-5,
            rope_base: 10_000.0,
            rope: Rope::Halves,
            tied_embeddings: self.tied.unwrap_or(true),
            qkv_bias: false,
        }
    }

    /// The shape, and the folder that it is from.
    fn shape(&self) -> Result<(DecoderConfig, Option<Weights>), JobError> {
        let Some(from) = &self.from else { return Ok((self.new_shape(), None)) };
        let refused = |problem: String| JobError::Data { path: from.clone(), problem };
        let weights = open_folder(from)?;
        let found = digest(from)?;
        if self.from_blake3.as_ref().is_some_and(|submitted| *submitted != found) {
            let problem = "config.json or the tokenizer is not what it was when the job was submitted: put it back";
            return Err(refused(problem.to_owned()));
        }
        let shape = weights.config().map_err(JobError::Model)?;
        // Before anything is made as large as it says.
        check_shapes(&weights, &shape)?;
        if self.context() > shape.context {
            let problem = format!("made for {} tokens, and [model] context = {}", shape.context, self.context());
            return Err(refused(problem));
        }
        Ok((shape, Some(weights)))
    }
}

/// A folder with weights to begin with.
pub(crate) fn open_folder(from: &Path) -> Result<Weights, JobError> {
    if from.is_file() {
        let problem = "a file: training begins from a Hugging Face folder (config.json, safetensors, tokenizer.json)";
        return Err(JobError::Data { path: from.to_owned(), problem: problem.to_owned() });
    }
    Weights::open(from).map_err(JobError::Model)
}

struct Language {
    model: Model,
    shape: DecoderConfig,
    heads: Heads,
    train: Windows,
    held: Windows,
}

pub(crate) fn load(spec: &Spec<'_>, plan: Plan) -> Result<Box<dyn Train>, JobError> {
    let sections = sections(spec)?;
    let (shape, weights) = sections.model.shape()?;
    let vocabulary = weights.as_ref().map_or(Ok(Vocabulary::Bytes), |weights| Vocabulary::of(weights, shape.vocab))?;
    let length = sections.model.context();
    let [train, held] = read(&sections.data, &vocabulary, length)?;
    let device = device().autodiff();
    let net = match &weights {
        Some(weights) => {
            let net = Net::new(&Init::zeros(&device), &shape);
            let first = from_hugging_face(weights, &layout(&net), &shape)?;
            load_model(net, first)
        }
        None => Net::new(&Init::new(plan.seed, &device), &shape),
    };
    let heads = Heads::new(length, (shape.heads, shape.kv_heads, shape.head_size), shape.rope_base);
    let task = Language { model: sections.model, shape, heads, train, held };
    Ok(Box::new(Engine::new(task, net, device, plan, (&sections.optimizer, &sections.schedule))?))
}

impl Language {
    fn loss_of(&self, net: &Net, windows: &[Vec<u32>], device: &Device) -> Loss {
        let length = self.heads.length;
        let inputs = windows.iter().flat_map(|window| &window[..length]).map(|token| *token as i32).collect();
        let targets = windows.iter().flat_map(|window| &window[1..]).copied().collect();
        Loss::of(cross_entropy(net.forward(&self.shape, &self.heads, inputs, device), targets) / length as f32)
    }
}

/// Tokens of a forward pass outside training, where memory is the only bound.
const BATCH: usize = 2048;

impl Task for Language {
    type Model = Net;

    fn samples(&self) -> u64 {
        self.train.len() as u64
    }

    fn loss(&self, net: &Net, samples: &[u64], device: &Device) -> Loss {
        let windows: Vec<Vec<u32>> = samples.iter().map(|at| self.train.get(*at as usize)).collect();
        self.loss_of(net, &windows, device)
    }

    /// The embedding may be the head too.
    fn is_used_once(&self, path: &str) -> bool {
        !path.starts_with("embed_tokens")
    }

    /// The same weights under other heads or another base of the rotary embedding are another model.
    fn continues(&self, config_toml: &str) -> Result<(), String> {
        let theirs = sections(&Spec::new(config_toml)).map_err(|error| error.to_string())?.model;
        let of = |model: &Model| Model { context: None, ..model.clone() };
        match of(&theirs) == of(&self.model) {
            true => Ok(()),
            false => Err("its [model] is another one: only context may be changed".to_owned()),
        }
    }

    fn computes_in_bf16(&self) -> bool {
        true
    }

    fn evaluate(&self, net: &Net, device: &Device) -> Metrics {
        let (mut loss, mut correct) = (0.0, 0.0);
        let (count, size) = (self.held.len(), (BATCH / self.heads.length).max(1));
        for start in (0..count).step_by(size) {
            let windows: Vec<Vec<u32>> = (start..(start + size).min(count)).map(|at| self.held.get(at)).collect();
            let figures = self.loss_of(net, &windows, device);
            loss += f64::from(figures.sum.into_scalar::<f32>());
            correct += f64::from(figures.correct);
        }
        let count = count as f64;
        Metrics::from([
            ("loss".to_owned(), loss / count),
            ("perplexity".to_owned(), (loss / count).exp()),
            ("accuracy".to_owned(), correct / count),
        ])
    }
}

/// Whether the folder that training is to begin from can be: reads no weight.
pub(crate) fn check_from(spec: &Spec<'_>) -> Result<(), JobError> {
    sections(spec)?.model.shape().map(drop)
}

/// The weights as a Hugging Face folder has them.
pub(crate) fn pytorch(spec: &Spec<'_>, tensors: Vec<NamedTensor>) -> Result<Vec<NamedTensor>, JobError> {
    let (shape, _) = sections(spec)?.model.shape()?;
    let weights = check_model(&layout(&Net::new(&Init::zeros(&device()), &shape)), tensors)?;
    Ok(to_hugging_face(weights, &shape))
}

/// The files of that folder beside the weights.
pub(crate) fn folder(spec: &Spec<'_>) -> Result<Vec<(PathBuf, Vec<u8>)>, JobError> {
    let model = sections(spec)?.model;
    let (shape, _) = model.shape()?;
    let mut files = files(model.from.as_deref())?;
    let config = match &model.from {
        Some(from) => {
            let path = from.join(CONFIG);
            let text = std::fs::read_to_string(&path).map_err(|source| JobError::File { path, source })?;
            with_f32(text).into()
        }
        None => config_json(&shape).to_string().into(),
    };
    files.push((CONFIG.into(), config));
    Ok(files)
}

/// A `config.json` that says what weights are written beside it.
fn with_f32(text: String) -> String {
    let Ok(mut config) = serde_json::from_str::<serde_json::Map<_, _>>(&text) else { return text };
    let mut changed = false;
    for key in ["dtype", "torch_dtype"] {
        if let Some(kind) = config.get_mut(key) {
            changed |= *kind != json!("float32");
            *kind = json!("float32");
        }
    }
    if changed { serde_json::Value::Object(config).to_string() } else { text }
}

fn config_json(shape: &DecoderConfig) -> serde_json::Value {
    json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "float32", "hidden_act": "silu",
        "hidden_size": shape.hidden, "num_hidden_layers": shape.layers, "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads, "head_dim": shape.head_size, "intermediate_size": shape.ffn,
        "vocab_size": shape.vocab, "max_position_embeddings": shape.context, "rms_norm_eps": f64::from(shape.rms_epsilon),
        "rope_theta": f64::from(shape.rope_base), "tie_word_embeddings": shape.tied_embeddings,
        "bos_token_id": BYTES - 1, "eos_token_id": BYTES - 1,
    })
}
