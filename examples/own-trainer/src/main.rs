//! A trainer of one's own for Stoke: a small language model on real prose. `data` reads the text, `model` computes; this file ties them to a spec.

mod data;
mod model;
mod sample;

use std::process::ExitCode;

use burn::module::Module;
use burn::tensor::Device;
use stoke_jobs::layers::Init;
use stoke_jobs::{Engine, JobError, Loss, Metrics, Plan, Sections, Spec, Task, Train, Trainer, device};

use crate::data::{Data, Prose};
use crate::model::{Config, Net};
use crate::sample::Sampling;

fn main() -> ExitCode {
    stoke_node::rank::main(&[Trainer { name: "prose", sections: &["sample"], check, load }])
}

/// What this trainer reads of a spec, checked.
fn sections(spec: &Spec<'_>) -> Result<(Sections<Data, Config>, Sampling), JobError> {
    let sections: Sections<Data, Config> = spec.sections()?;
    sections.data.check(spec)?;
    sections.model.check(spec)?;
    let sampling: Sampling = spec.section("sample")?;
    sampling.check(spec)?;
    Ok((sections, sampling))
}

fn check(spec: &Spec<'_>) -> Result<(), JobError> {
    sections(spec).map(drop)
}

fn load(spec: &Spec<'_>, plan: Plan) -> Result<Box<dyn Train>, JobError> {
    let (sections, sampling) = sections(spec)?;
    let prose = Prose::read(&sections.data, sections.model.context)?;
    let device = device().autodiff();
    let net = Net::new(&Init::new(plan.seed, &device), &sections.model);
    let task = Language { config: sections.model, prose, sampling };
    Ok(Box::new(Engine::new(task, net, device, plan, (&sections.optimizer, &sections.schedule))?))
}

/// The next byte of a text, from the bytes before it.
struct Language {
    config: Config,
    prose: Prose,
    sampling: Sampling,
}

/// Windows in a forward pass of the evaluation, where memory is the only bound.
const WINDOWS: usize = 64;

impl Task for Language {
    type Model = Net;

    fn samples(&self) -> u64 {
        self.prose.train.count()
    }

    /// A sample is a window of the text; its loss is the mean over its bytes, in nats.
    fn loss(&self, net: &Net, samples: &[u64], device: &Device) -> Loss {
        let windows: Vec<&[u8]> = samples.iter().map(|&index| self.prose.train.window(index)).collect();
        let loss = net.loss(&self.config, &windows, device);
        let context = self.config.context as f64;
        Loss { sum: loss.sum / context, correct: loss.correct / context as f32 }
    }

    fn evaluate(&self, net: &Net, device: &Device) -> Metrics {
        let (mut nats, mut correct) = (0.0, 0.0);
        let held: Vec<&[u8]> = (0..self.prose.held.count()).map(|index| self.prose.held.window(index)).collect();
        for windows in held.chunks(WINDOWS) {
            let loss = net.loss(&self.config, windows, device);
            nats += f64::from(loss.sum.into_scalar::<f32>());
            correct += f64::from(loss.correct);
        }
        let bytes = (held.len() * self.config.context) as f64;
        let text = sample::text(net, &self.config, &self.sampling, device);
        eprintln!("after {} parameters: {text}", net.num_params());
        Metrics::from([
            ("accuracy".to_owned(), correct / bytes),
            ("bits_per_byte".to_owned(), nats / bytes / std::f64::consts::LN_2),
            ("perplexity".to_owned(), (nats / bytes).exp()),
            ("bigram_bits_per_byte".to_owned(), self.prose.bigram_bits()),
            ("gzip_bits_per_byte".to_owned(), self.prose.gzip_bits()),
        ])
    }
}
