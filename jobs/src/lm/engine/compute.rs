//! One batch after the other through a whole model: what is planned is computed, and each request that asks gets its next token. Owns cache and
//! sampling of the requests; decides no order (`schedule.rs`).

use std::collections::BTreeMap;

use super::pages::Pages;
use super::schedule::{Ends, Limits, Refused, Request, Schedule};
use crate::lm::kernels::{Cache, Place, Rows};
use crate::lm::{Decoder, Sampling, Scratch};

/// A request with how its tokens are chosen.
#[derive(Clone, Debug)]
pub struct Ask {
    pub request: Request,
    pub sampling: Sampling,
    /// Tokens that end the answer.
    pub last: Vec<u32>,
}

/// The next token of an answer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Made {
    pub id: u64,
    pub token: u32,
    /// It is the last one.
    pub over: bool,
}

/// A model and the requests that it answers. Blocks while it computes; one thread owns it.
pub struct Engine<'w> {
    decoder: Decoder<'w>,
    scratch: Scratch,
    cache: Cache,
    schedule: Schedule,
    asks: BTreeMap<u64, Ask>,
}

impl<'w> Engine<'w> {
    /// `decoder`: all layers of the model. `pages`: of its cache, [`Cache::PAGE`] tokens each.
    pub fn new(decoder: Decoder<'w>, pages: u32, limits: Limits) -> Self {
        let (cache, scratch) = (decoder.cache(pages as usize), decoder.scratch());
        let schedule = Schedule::new(limits, Pages::new(pages, Cache::PAGE));
        Self { decoder, scratch, cache, schedule, asks: BTreeMap::new() }
    }

    pub fn submit(&mut self, ask: Ask) -> Result<(), Refused> {
        self.schedule.submit(ask.request.clone())?;
        self.asks.insert(ask.request.id, ask);
        Ok(())
    }

    /// Frees what a request holds; whether it was there.
    pub fn cancel(&mut self, id: u64) -> bool {
        self.asks.remove(&id);
        self.schedule.cancel(id)
    }

    /// Requests that wait, and that run.
    pub fn load(&self) -> (usize, usize) {
        self.schedule.load()
    }

    /// Computes the next batch. No token: parts of prompts, or nothing is left to do.
    pub fn step(&mut self) -> Vec<Made> {
        let rows = self.schedule.plan();
        if rows.is_empty() {
            return Vec::new();
        }
        let tokens: Vec<u32> = rows.iter().map(|row| row.token).collect();
        let place = |row: &super::Row| Place { pages: self.schedule.pages_of(row.id), position: row.position };
        let places: Vec<Place<'_>> = rows.iter().map(place).collect();
        let mut hidden = self.decoder.embed(&tokens);
        self.decoder.forward(&mut hidden, &places, &mut self.cache, &mut self.scratch);
        self.schedule.computed();
        let asking: Vec<usize> = (0..rows.len()).filter(|row| rows[*row].asks).collect();
        if asking.is_empty() {
            return Vec::new();
        }
        let mut last = Rows::new(hidden.width);
        asking.iter().for_each(|row| last.values.extend_from_slice(hidden.row(*row)));
        let mut logits = self.decoder.logits(&last, &mut self.scratch);
        let made = asking.iter().enumerate().map(|(at, row)| self.choose(rows[*row].id, logits.row_mut(at)));
        made.collect()
    }

    fn choose(&mut self, id: u64, logits: &mut [f32]) -> Made {
        let (before, index) = self.schedule.tokens_of(id).expect("H1: who asks runs");
        let ask = &self.asks[&id];
        let token = ask.sampling.choose(logits, before, index as u64);
        let ends = if ask.last.contains(&token) { Ends::Here } else { Ends::Goes };
        let over = self.schedule.token(id, token, ends);
        if over {
            self.asks.remove(&id);
        }
        Made { id, token, over }
    }
}
