//! Which tokens are computed next: continuous batching, with several batches under way where the layers are cut into stages. Owns the order of
//! requests, how much of each was given out, and who gives way when pages run out; computes nothing and knows no clock.
//!
//! | request  | on                                     | becomes  | and                                              |
//! | ---      | ---                                    | ---      | ---                                              |
//! | waiting  | pages for its tokens and one more      | running  | its pages, with what others left of its beginning|
//! | running  | planned                                | running  | asks for a token when all of its were planned    |
//! | any      | a token that ends it, or its last      | over     | its pages go                                     |
//! | running  | no page left for an older one          | waiting  | first in the queue, with the tokens it has       |
//! | running  | reset                                  | waiting  | in front, in order, with the tokens it has       |
//! | any      | cancelled                              | over     | its pages go                                     |
//!
//! H1: rows of a plan are of running requests, each a run of positions that follow what was planned before. H2: a request that gave way goes on with
//! the same tokens (D1). H3: the oldest running request always gets on. H4 (`stage.rs`): plans are computed by every stage in their order. So what was
//! planned counts as computed for each later plan:
//! - the next part of a prompt is planned while the one before it is under way;
//! - a page is named as soon as the plan that fills it is made, and not before (G3): whoever finds it by its name is planned later;
//! - the pages of a request that is over or gave way while rows of it are under way are used again at once: each stage writes those rows before it
//!   writes those of the page's next owner, and nobody reads a place of a page before its own row was written there.
//!
//! H5: a token is taken once, by the request that asked for it, if that still lacks it: a plan under way knows how many tokens the request had.

use std::collections::{BTreeSet, VecDeque};

use super::pages::{Name, Named, Pages, Table, names};

/// How much is computed at once, and how much waits.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Requests that run at the same time.
    pub running_max: usize,
    /// Rows of a batch: a long prompt is computed in parts, beside the tokens of others.
    pub rows_max: usize,
    /// Batches under way at the same time: as many as there are stages keeps all of them at work.
    pub batches_max: usize,
    /// Requests that wait; more are refused.
    pub waiting_max: usize,
    /// Tokens of a request and its answer.
    pub context: usize,
}

/// What is asked for. Its caller's number, which is its own while it is there.
#[derive(Clone, Debug)]
pub struct Request {
    pub id: u64,
    /// At least one.
    pub prompt: Vec<u32>,
    /// Tokens of the answer that are there already, when it is begun again in its middle.
    pub answered: Vec<u32>,
    /// Of the whole answer, at least one more than there are.
    pub tokens_max: usize,
}

/// Why a request is not taken.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Refused {
    #[error("{waiting} requests wait already: try again later")]
    Busy { waiting: usize },
    #[error(
        "prompt and answer have up to {tokens} tokens, and there is room for {room}: ask for fewer, or shorten the prompt"
    )]
    TooLong { tokens: usize, room: usize },
    #[error("there is nothing to compute: the prompt has no token, or the answer has as many as it may have")]
    Nothing,
}

/// What a batch is made of.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Plan {
    /// One more than that of the plan before, over resets too.
    pub number: u64,
    pub rows: Vec<Row>,
    /// Pages that are whole, and have their names, when it was computed.
    pub filled: Vec<Named>,
}

/// One row of a batch. Those of a request lie side by side.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Row {
    pub id: u64,
    pub token: u32,
    pub position: usize,
    /// What follows it is wanted.
    pub asks: bool,
}

/// Tokens that do not belong to the oldest plan under way: what sends them is wrong, or of another time.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{tokens} tokens of batch {number} came, where {wanted:?} (number, tokens) are due")]
pub struct Unexpected {
    pub number: u64,
    pub tokens: usize,
    pub wanted: Option<(u64, usize)>,
}

#[derive(Debug)]
struct Sequence {
    id: u64,
    /// Of all requests that were ever taken, this one alone has it.
    key: u64,
    /// Prompt and answer.
    tokens: Vec<u32>,
    prompt: usize,
    tokens_max: usize,
    /// Tokens whose keys and values are there, or come with the plans under way.
    planned: usize,
    table: Table,
}

/// A plan that is being computed.
#[derive(Debug)]
struct Flight {
    number: u64,
    /// Who asks in it: the request's key, and how many tokens it had.
    asks: Vec<(u64, usize)>,
}

/// The requests of one head.
#[derive(Debug)]
pub struct Schedule {
    limits: Limits,
    pages: Pages,
    waiting: VecDeque<Sequence>,
    /// The oldest first.
    running: Vec<Sequence>,
    /// The oldest first.
    flights: VecDeque<Flight>,
    plans: u64,
    keys: u64,
}

impl Schedule {
    pub fn new(limits: Limits, pages: Pages) -> Self {
        let (waiting, running, flights) = (VecDeque::new(), Vec::new(), VecDeque::new());
        Self { limits, pages, waiting, running, flights, plans: 0, keys: 0 }
    }

    /// Requests that wait, and that run.
    pub fn load(&self) -> (usize, usize) {
        (self.waiting.len(), self.running.len())
    }

    /// Plans that are under way.
    pub fn under_way(&self) -> usize {
        self.flights.len()
    }

    pub fn submit(&mut self, request: Request) -> Result<(), Refused> {
        let Request { id, prompt: mut tokens, answered, tokens_max } = request;
        if tokens.is_empty() || answered.len() >= tokens_max {
            return Err(Refused::Nothing);
        }
        let (whole, room) = (tokens.len().saturating_add(tokens_max), self.room());
        if whole > room {
            return Err(Refused::TooLong { tokens: whole, room });
        }
        if self.waiting.len() >= self.limits.waiting_max {
            return Err(Refused::Busy { waiting: self.waiting.len() });
        }
        let prompt = tokens.len();
        tokens.extend(answered);
        self.keys += 1;
        let (key, planned, table) = (self.keys, 0, Table::default());
        self.waiting.push_back(Sequence { id, key, tokens, prompt, tokens_max, planned, table });
        Ok(())
    }

    /// Tokens of the longest request with its answer.
    pub fn room(&self) -> usize {
        (self.pages.len() * self.pages.size()).min(self.limits.context)
    }

    /// Whether it was there.
    pub fn cancel(&mut self, id: u64) -> bool {
        let of = |sequence: &Sequence| sequence.id == id;
        let found = self.find(of).map(|place| self.take(place));
        found.is_some()
    }

    /// The next batch: a row for each request that makes tokens, and parts of prompts in the rows that are left. None: there is nothing to do before
    /// a batch under way is computed, or nothing at all. Where more than one may be under way, it takes only its share of the requests.
    pub fn plan(&mut self) -> Option<Plan> {
        if self.flights.len() >= self.limits.batches_max {
            return None;
        }
        self.admit();
        // Tokens before prompts: whoever reads an answer waits for each of them. Nothing is left of who waits for its token.
        let order = |schedule: &Self, makes: bool| -> Vec<u64> {
            let ready = schedule.running.iter().filter(|sequence| sequence.left() > 0);
            ready.filter(|sequence| (sequence.left() == 1) == makes).map(|sequence| sequence.key).collect()
        };
        let keys = [order(self, true), order(self, false)].concat();
        let mut share = self.running.len().div_ceil(self.limits.batches_max);
        let (mut rows, mut planned) = (Vec::new(), Vec::new());
        for key in keys {
            if rows.len() == self.limits.rows_max || share == 0 {
                break;
            }
            // One that gave way to an older one is not there any more.
            let Some(place) = self.running.iter().position(|sequence| sequence.key == key) else { continue };
            if self.plan_one(place, &planned, &mut rows) {
                planned.push(key);
                share -= 1;
            }
        }
        if rows.is_empty() {
            return None;
        }
        let filled = self.depart(&planned);
        Some(Plan { number: self.plans, rows, filled })
    }

    /// Whether it has rows in the plan.
    fn plan_one(&mut self, place: usize, planned: &[u64], rows: &mut Vec<Row>) -> bool {
        let sequence = &self.running[place];
        let count = sequence.left().min(self.limits.rows_max - rows.len());
        let (from, to) = (sequence.planned, sequence.planned + count);
        if !self.make_room(place, to, planned) {
            return false;
        }
        let sequence = &mut self.running[place];
        sequence.planned = to;
        let (id, whole) = (sequence.id, sequence.tokens.len());
        let made = (from..to).map(|position| Row {
            id,
            token: sequence.tokens[position],
            position,
            asks: position + 1 == whole,
        });
        rows.extend(made);
        true
    }

    /// Pages for so many tokens of a request; younger ones that are not in this plan give way for it.
    fn make_room(&mut self, place: usize, tokens: usize, planned: &[u64]) -> bool {
        loop {
            if self.pages.grow(&mut self.running[place].table, tokens) {
                return true;
            }
            let youngest = self.running.len() - 1;
            if youngest == place || planned.contains(&self.running[youngest].key) {
                return false;
            }
            let mut sequence = self.running.remove(youngest);
            self.pages.end(std::mem::take(&mut sequence.table));
            sequence.planned = 0;
            self.waiting.push_front(sequence);
        }
    }

    /// In the order in which they came, while there are pages.
    fn admit(&mut self) {
        while self.running.len() < self.limits.running_max
            && let Some(mut sequence) = self.waiting.pop_front()
        {
            let (mut table, there) = self.pages.begin(&sequence.tokens);
            if !self.pages.grow(&mut table, sequence.tokens.len() + 1) {
                self.pages.end(table);
                return self.waiting.push_front(sequence);
            }
            (sequence.table, sequence.planned) = (table, there);
            self.running.push(sequence);
        }
    }

    /// A plan with rows of these is under way: it fills their pages for every later one (H4).
    fn depart(&mut self, planned: &[u64]) -> Vec<Named> {
        let (mut asks, mut filled) = (Vec::new(), Vec::new());
        for key in planned {
            let found = self.running.iter_mut().find(|sequence| sequence.key == *key);
            let sequence = found.expect("H1: who is in a plan does not give way in it");
            filled.extend(self.pages.computed(&mut sequence.table, &sequence.tokens[..sequence.planned]));
            if sequence.left() == 0 {
                asks.push((*key, sequence.tokens.len()));
            }
        }
        self.plans += 1;
        self.flights.push_back(Flight { number: self.plans, asks });
        filled
    }

    /// The pages of a request that runs.
    pub fn pages_of(&self, id: u64) -> &[u32] {
        let found = self.running.iter().find(|sequence| sequence.id == id);
        found.expect("H1: rows are of running requests").table.pages()
    }

    /// The tokens of prompt and answer of a request, and how many of them are the answer's.
    pub fn tokens_of(&self, id: u64) -> Option<(&[u32], usize)> {
        let sequence = self.running.iter().chain(&self.waiting).find(|sequence| sequence.id == id)?;
        Some((&sequence.tokens, sequence.tokens.len() - sequence.prompt))
    }

    /// Whether a request runs, and some of it was planned.
    pub fn is_planned(&self, id: u64) -> bool {
        self.running.iter().any(|sequence| sequence.id == id && sequence.planned > 0)
    }

    /// The oldest plan under way was computed, with a token for each row that asked, in their order. Gives the requests that take theirs, and whether
    /// it is their last one. `ends`: that a token ends the answer of a request, however long it may be.
    pub fn computed(
        &mut self,
        number: u64,
        tokens: &[u32],
        ends: impl Fn(u64, u32) -> bool,
    ) -> Result<Vec<Made>, Unexpected> {
        let wanted = self.flights.front().map(|flight| (flight.number, flight.asks.len()));
        if wanted != Some((number, tokens.len())) {
            return Err(Unexpected { number, tokens: tokens.len(), wanted });
        }
        let flight = self.flights.pop_front().expect("looked at above");
        let taken = flight.asks.into_iter().zip(tokens).filter_map(|((key, length), token)| {
            let place = self.find(|sequence| sequence.key == key && sequence.tokens.len() == length)?;
            let sequence = self.at(place);
            sequence.tokens.push(*token);
            let (id, whole) = (sequence.id, sequence.tokens.len() - sequence.prompt >= sequence.tokens_max);
            let over = whole || ends(id, *token);
            if over {
                self.take(place);
            }
            Some(Made { id, token: *token, over })
        });
        Ok(taken.collect())
    }

    /// Names of the pages that requests have, or would have when all of their tokens were computed.
    pub fn names(&self) -> BTreeSet<Name> {
        let sequences = self.running.iter().chain(&self.waiting);
        sequences.flat_map(|sequence| names(&sequence.tokens, self.pages.size())).collect()
    }

    /// Of what was planned, nothing but these pages is in the caches, or will be: all that runs is computed again from its tokens, as far as it is
    /// lacking, in its order and before what waits.
    pub fn reset(&mut self, kept: &[Named]) {
        self.flights.clear();
        self.pages = Pages::holding(self.pages.len() as u32, self.pages.size(), kept);
        while let Some(mut sequence) = self.running.pop() {
            (sequence.planned, sequence.table) = (0, Table::default());
            self.waiting.push_front(sequence);
        }
        // Whoever comes first takes no page that a later one has computed already.
        self.waiting.iter().rev().for_each(|sequence| self.pages.prefer(&sequence.tokens));
    }

    /// Where the first such request is.
    fn find(&self, is: impl Fn(&Sequence) -> bool) -> Option<Place> {
        let running = self.running.iter().position(&is).map(Place::Running);
        running.or_else(|| self.waiting.iter().position(is).map(Place::Waiting))
    }

    fn at(&mut self, place: Place) -> &mut Sequence {
        match place {
            Place::Running(at) => &mut self.running[at],
            Place::Waiting(at) => &mut self.waiting[at],
        }
    }

    /// It is over.
    fn take(&mut self, place: Place) {
        match place {
            Place::Running(at) => self.pages.end(self.running.remove(at).table),
            Place::Waiting(at) => drop(self.waiting.remove(at)),
        }
    }
}

#[derive(Clone, Copy, Debug)]
enum Place {
    Running(usize),
    Waiting(usize),
}

/// The next token of an answer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Made {
    pub id: u64,
    pub token: u32,
    /// It is the last one.
    pub over: bool,
}

impl Sequence {
    /// Tokens that no plan has yet. None while the token that follows them is on its way.
    fn left(&self) -> usize {
        self.tokens.len() - self.planned
    }
}

#[cfg(test)]
mod tests;
