//! One batch after the other through a whole model in one rank. Owns nothing but the order: a head plans (`head.rs`), a stage computes (`stage.rs`).

use super::head::{Ask, Head};
use super::schedule::{Limits, Made, Refused};
use super::stage::Stage;
use crate::lm::Decoder;
use crate::lm::decoder::Alone;

/// A model and the requests that it answers. Blocks while it computes; one thread owns it.
pub struct Engine<'w> {
    stage: Stage<'w>,
    head: Head,
}

impl<'w> Engine<'w> {
    /// `decoder`: all layers of the model. `pages`: of its cache.
    pub fn new(decoder: Decoder<'w>, pages: u32, limits: Limits) -> Self {
        let context = limits.context.min(decoder.context());
        let limits = Limits { batches_max: 1, context, ..limits };
        Self { stage: Stage::new(decoder, pages, limits.rows_max as u32), head: Head::new(pages, limits) }
    }

    pub fn submit(&mut self, ask: Ask) -> Result<(), Refused> {
        self.head.submit(ask)
    }

    /// Frees what a request holds; whether it was there.
    pub fn cancel(&mut self, id: u64) -> bool {
        self.head.cancel(id)
    }

    /// Requests that wait, and that run.
    pub fn load(&self) -> (usize, usize) {
        self.head.load()
    }

    /// Computes the next batch. No token: parts of prompts, or nothing is left to do.
    pub fn step(&mut self) -> Vec<Made> {
        let Some(batch) = self.head.plan() else { return Vec::new() };
        let mut rows = self.stage.embed(&batch);
        self.stage.forward(&batch, &mut rows, &mut Alone).expect("D3: the whole waits for no other share");
        let tokens = self.stage.choose(&batch, &rows);
        self.head.computed(batch.number, &tokens).expect("H4: it is the batch under way")
    }
}
