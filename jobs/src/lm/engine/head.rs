//! The first rank of the layers: requests in, batches out, tokens back. Owns how the tokens of each request are chosen; decides no order
//! (`schedule.rs`), computes nothing and sends nothing.

use std::collections::{BTreeMap, BTreeSet};

use super::batch::{AskRow, Batch, BatchRow};
use super::pages::{Name, Named, Pages};
use super::schedule::{Limits, Made, Plan, Refused, Request, Schedule, Unexpected};
use crate::lm::Sampling;
use crate::lm::kernels::Cache;

/// A request with how its tokens are chosen.
#[derive(Clone, Debug)]
pub struct Ask {
    pub request: Request,
    pub sampling: Sampling,
    /// Tokens that end the answer.
    pub last: Vec<u32>,
}

/// The requests that a model answers.
#[derive(Debug)]
pub struct Head {
    schedule: Schedule,
    choices: BTreeMap<u64, Choice>,
}

/// What [`Ask`] says besides its request.
#[derive(Debug)]
struct Choice {
    sampling: Sampling,
    last: Vec<u32>,
}

impl Head {
    /// `pages`: of the cache that every stage has, [`Cache::PAGE`] tokens each.
    pub fn new(pages: u32, limits: Limits) -> Self {
        Self { schedule: Schedule::new(limits, Pages::new(pages, Cache::PAGE)), choices: BTreeMap::new() }
    }

    /// Its number must be no other's that is there.
    pub fn submit(&mut self, ask: Ask) -> Result<(), Refused> {
        let Ask { request, sampling, last } = ask;
        let id = request.id;
        assert!(!self.choices.contains_key(&id), "H1: a number is one request's");
        self.schedule.submit(request)?;
        self.choices.insert(id, Choice { sampling, last });
        Ok(())
    }

    /// Frees what a request holds; whether it was there. Batches under way go on.
    pub fn cancel(&mut self, id: u64) -> bool {
        self.choices.remove(&id);
        self.schedule.cancel(id)
    }

    /// Requests that wait, and that run.
    pub fn load(&self) -> (usize, usize) {
        self.schedule.load()
    }

    /// Whether some of it was planned, and it is not over.
    pub fn runs(&self, id: u64) -> bool {
        self.schedule.is_planned(id)
    }

    /// Batches that are under way.
    pub fn under_way(&self) -> usize {
        self.schedule.under_way()
    }

    /// Tokens of the longest request with its answer.
    pub fn room(&self) -> usize {
        self.schedule.room()
    }

    /// The next batch; every stage computes it after the one before (H4). None: nothing to do before [`Head::computed`] or [`Head::submit`].
    pub fn plan(&mut self) -> Option<Batch> {
        let Plan { number, rows, filled } = self.schedule.plan()?;
        let mut batch = Batch { number, filled, ..Batch::default() };
        for of in rows.chunk_by(|row, next| row.id == next.id) {
            let table = batch.tables.len() as u32;
            let last = of[of.len() - 1];
            batch.tables.push(self.schedule.pages_of(last.id)[..=last.position / Cache::PAGE].to_vec());
            let row = |row: &super::Row| BatchRow { table, token: row.token, position: row.position as u32 };
            batch.rows.extend(of.iter().map(row));
            if last.asks {
                batch.asks.push(self.ask(last.id, batch.rows.len() as u32 - 1));
            }
        }
        Some(batch)
    }

    fn ask(&self, id: u64, row: u32) -> AskRow {
        let (tokens, index) = self.schedule.tokens_of(id).expect("H1: who asks runs");
        let sampling = self.choices[&id].sampling.clone();
        let mut before = if sampling.repetition_penalty == 1.0 { Vec::new() } else { tokens.to_vec() };
        // A penalty looks at which tokens there are, not at how many.
        before.sort_unstable();
        before.dedup();
        AskRow { row, sampling, index: index as u64, before }
    }

    /// The oldest batch under way was computed: `tokens` are what the last stage chose. Gives each request that takes one.
    pub fn computed(&mut self, number: u64, tokens: &[u32]) -> Result<Vec<Made>, Unexpected> {
        let choices = &self.choices;
        let ends = |id: u64, token: u32| choices[&id].last.contains(&token);
        let made = self.schedule.computed(number, tokens, ends)?;
        for made in made.iter().filter(|made| made.over) {
            self.choices.remove(&made.id);
        }
        Ok(made)
    }

    /// Pages that requests have use of.
    pub fn names(&self) -> BTreeSet<Name> {
        self.schedule.names()
    }

    /// The ranks begin anew: batches under way are lost, and the caches of all of them hold these pages and nothing else. Every request goes on from
    /// the tokens that it has.
    pub fn reset(&mut self, kept: &[Named]) {
        self.schedule.reset(kept);
    }
}
