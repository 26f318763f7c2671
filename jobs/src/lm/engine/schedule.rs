//! Which tokens are computed next: continuous batching. Owns the order of requests, how much of each is done, and who gives way when pages run
//! out; computes nothing and knows no clock.
//!
//! | request  | on                                     | becomes  | and                                              |
//! | ---      | ---                                    | ---      | ---                                              |
//! | waiting  | pages for its tokens and one more      | running  | its pages, with what others left of its beginning|
//! | running  | planned and computed                   | running  | asks for a token when all of them were           |
//! | running  | a token that ends it, or its last      | over     | its pages go                                     |
//! | running  | no page left for an older one          | waiting  | first in the queue, with the tokens it has       |
//! | any      | cancelled                              | over     | its pages go                                     |
//!
//! H1: rows of a plan are of running requests, each a run of positions that follow what was computed. H2: a request that gave way goes on with the
//! same tokens (D1). H3: the oldest running request always gets on.

use std::collections::VecDeque;

use super::pages::{Pages, Table};

/// How much is computed at once, and how much waits.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Requests that run at the same time.
    pub running_max: usize,
    /// Rows of a batch: a long prompt is computed in parts, beside the tokens of others.
    pub rows_max: usize,
    /// Requests that wait; more are refused.
    pub waiting_max: usize,
}

/// What is asked for. Its caller's number, which is its own.
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
}

/// One row of a batch.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Row {
    pub id: u64,
    pub token: u32,
    pub position: usize,
    /// What follows it is wanted.
    pub asks: bool,
}

#[derive(Debug)]
struct Sequence {
    id: u64,
    /// Prompt and answer.
    tokens: Vec<u32>,
    prompt: usize,
    tokens_max: usize,
    /// Tokens whose keys and values are there.
    computed: usize,
    /// The same after the plan that is under way.
    planned: usize,
    table: Table,
}

/// The requests of one engine.
#[derive(Debug)]
pub struct Schedule {
    limits: Limits,
    pages: Pages,
    waiting: VecDeque<Sequence>,
    /// The oldest first.
    running: Vec<Sequence>,
}

impl Schedule {
    pub fn new(limits: Limits, pages: Pages) -> Self {
        Self { limits, pages, waiting: VecDeque::new(), running: Vec::new() }
    }

    /// Requests that wait, and that run.
    pub fn load(&self) -> (usize, usize) {
        (self.waiting.len(), self.running.len())
    }

    pub fn submit(&mut self, request: Request) -> Result<(), Refused> {
        let Request { id, mut prompt, answered, tokens_max } = request;
        assert!(!prompt.is_empty() && answered.len() < tokens_max, "H1: there is something to compute");
        let (tokens, room) = (prompt.len() + tokens_max, self.pages.len() * self.pages.size());
        if tokens > room {
            return Err(Refused::TooLong { tokens, room });
        }
        if self.waiting.len() >= self.limits.waiting_max {
            return Err(Refused::Busy { waiting: self.waiting.len() });
        }
        let length = prompt.len();
        prompt.extend(answered);
        let (computed, planned, table) = (0, 0, Table::default());
        self.waiting.push_back(Sequence { id, tokens: prompt, prompt: length, tokens_max, computed, planned, table });
        Ok(())
    }

    /// Whether it was there.
    pub fn cancel(&mut self, id: u64) -> bool {
        let (waiting, running) = self.load();
        self.waiting.retain(|sequence| sequence.id != id);
        if let Some(at) = self.running.iter().position(|sequence| sequence.id == id) {
            self.pages.end(self.running.remove(at).table);
        }
        self.load() != (waiting, running)
    }

    /// The next batch: a row for each request that makes tokens, and parts of prompts in the rows that are left. Empty: there is nothing to do. Every
    /// plan is computed before the next one is made.
    pub fn plan(&mut self) -> Vec<Row> {
        self.admit();
        let mut rows = Vec::new();
        let mut at = 0;
        // Tokens before prompts: whoever reads an answer waits for each of them.
        let order = |schedule: &Self, makes: bool| -> Vec<u64> {
            let of = schedule.running.iter().filter(|sequence| (sequence.left() == 1) == makes);
            of.map(|sequence| sequence.id).collect()
        };
        let ids = [order(self, true), order(self, false)].concat();
        while let Some(id) = ids.get(at).filter(|_| rows.len() < self.limits.rows_max) {
            at += 1;
            // One that gave way to an older one is not there any more.
            let Some(place) = self.running.iter().position(|sequence| sequence.id == *id) else { continue };
            self.plan_one(place, &mut rows);
        }
        rows
    }

    fn plan_one(&mut self, place: usize, rows: &mut Vec<Row>) {
        let sequence = &self.running[place];
        let count = sequence.left().min(self.limits.rows_max - rows.len());
        let (from, to) = (sequence.computed, sequence.computed + count);
        if !self.make_room(place, to, rows) {
            return;
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
    }

    /// Pages for so many tokens of a request; younger ones that are not in this plan give way for it.
    fn make_room(&mut self, place: usize, tokens: usize, rows: &[Row]) -> bool {
        loop {
            let sequence = &mut self.running[place];
            if self.pages.grow(&mut sequence.table, tokens) {
                return true;
            }
            let youngest = self.running.len() - 1;
            if youngest == place || rows.iter().any(|row| row.id == self.running[youngest].id) {
                return false;
            }
            let mut sequence = self.running.remove(youngest);
            self.pages.end(std::mem::take(&mut sequence.table));
            (sequence.computed, sequence.planned) = (0, 0);
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
            (sequence.table, sequence.computed, sequence.planned) = (table, there, there);
            self.running.push(sequence);
        }
    }

    /// The pages of a request that runs.
    pub fn pages_of(&self, id: u64) -> &[u32] {
        let sequence =
            self.running.iter().find(|sequence| sequence.id == id).expect("H1: rows are of running requests");
        sequence.table.pages()
    }

    /// All rows of the plan were computed.
    pub fn computed(&mut self) {
        for sequence in &mut self.running {
            sequence.computed = sequence.planned;
            self.pages.computed(&mut sequence.table, &sequence.tokens[..sequence.computed]);
        }
    }

    /// The tokens of prompt and answer of a request that runs, and how many of them are the answer's.
    pub fn tokens_of(&self, id: u64) -> Option<(&[u32], usize)> {
        let sequence = self.running.iter().find(|sequence| sequence.id == id)?;
        Some((&sequence.tokens, sequence.tokens.len() - sequence.prompt))
    }

    /// The token that follows, for a request that asked. `ends`: it is the last one, whatever was asked for. Whether the request is over.
    pub fn token(&mut self, id: u64, token: u32, ends: Ends) -> bool {
        let Some(at) = self.running.iter().position(|sequence| sequence.id == id) else { return true };
        let sequence = &mut self.running[at];
        sequence.tokens.push(token);
        if ends == Ends::Goes && sequence.tokens.len() - sequence.prompt < sequence.tokens_max {
            return false;
        }
        self.pages.end(self.running.remove(at).table);
        true
    }
}

/// Whether a token is an answer's last one.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Ends {
    Here,
    Goes,
}

impl Sequence {
    /// Tokens whose keys and values are not there. At least one: nothing is known of what follows the last.
    fn left(&self) -> usize {
        self.tokens.len() - self.computed
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use rand_chacha::ChaCha8Rng;
    use rand_chacha::rand_core::{RngCore, SeedableRng};

    use super::*;

    const LIMITS: Limits = Limits { running_max: 4, rows_max: 8, waiting_max: 100 };

    fn request(id: u64, prompt: std::ops::Range<u32>, tokens_max: usize) -> Request {
        Request { id, prompt: prompt.collect(), answered: Vec::new(), tokens_max }
    }

    /// A model whose next token is a function of all before it.
    fn follows(tokens: &[u32]) -> u32 {
        tokens.iter().fold(17, |sum, token| sum * 31 % 1_009 + token) % 97
    }

    /// Computes a plan, and answers who asks. Checks that rows follow each other (H1).
    fn step(schedule: &mut Schedule, answers: &mut BTreeMap<u64, Vec<u32>>) -> usize {
        let rows = schedule.plan();
        for row in &rows {
            let (tokens, _) = schedule.tokens_of(row.id).unwrap();
            assert_eq!((row.token, row.asks), (tokens[row.position], row.position + 1 == tokens.len()));
            assert!(schedule.pages_of(row.id).len() * 4 > row.position);
        }
        schedule.computed();
        for row in rows.iter().filter(|row| row.asks) {
            let token = follows(schedule.tokens_of(row.id).unwrap().0);
            answers.entry(row.id).or_default().push(token);
            schedule.token(row.id, token, Ends::Goes);
        }
        rows.len()
    }

    fn alone(request: &Request) -> Vec<u32> {
        let mut tokens = [&request.prompt[..], &request.answered].concat();
        (request.answered.len()..request.tokens_max)
            .map(|_| {
                tokens.push(follows(&tokens));
                tokens[tokens.len() - 1]
            })
            .collect()
    }

    #[test]
    fn long_prompts_are_computed_in_parts_beside_the_tokens_of_others() {
        let mut schedule = Schedule::new(LIMITS, Pages::new(16, 4));
        schedule.submit(request(1, 0..3, 9)).unwrap();
        let mut answers = BTreeMap::new();
        assert_eq!(step(&mut schedule, &mut answers), 3);
        schedule.submit(request(2, 0..20, 2)).unwrap();
        for (rows, made) in [(8, 2), (8, 3), (7, 4)] {
            assert_eq!((step(&mut schedule, &mut answers), answers[&1].len()), (rows, made));
        }
        assert_eq!(answers[&2].len(), 1);
    }

    #[test]
    fn what_cannot_ever_fit_and_what_is_too_much_is_refused() {
        let mut schedule = Schedule::new(Limits { waiting_max: 1, ..LIMITS }, Pages::new(4, 4));
        assert_eq!(schedule.submit(request(1, 0..10, 7)), Err(Refused::TooLong { tokens: 17, room: 16 }));
        schedule.submit(request(1, 0..10, 6)).unwrap();
        assert_eq!(schedule.submit(request(2, 0..1, 1)), Err(Refused::Busy { waiting: 1 }));
        assert!(schedule.cancel(1) && !schedule.cancel(1));
        assert_eq!(schedule.load(), (0, 0));
    }

    #[test]
    fn every_answer_is_that_of_the_request_alone_whatever_comes() {
        for seed in 0..60 {
            let mut random = ChaCha8Rng::seed_from_u64(seed);
            let mut schedule = Schedule::new(LIMITS, Pages::new(9, 4));
            let (mut answers, mut wanted, mut next) = (BTreeMap::new(), BTreeMap::new(), 0u64);
            let mut idle = 0;
            for turn in 0..600 {
                let draw = random.next_u32();
                if turn < 300 && draw % 3 == 0 {
                    next += 1;
                    let mut made = request(next, 0..1 + draw / 3 % 14, 1 + (draw / 64 % 12) as usize);
                    if draw % 5 == 0 {
                        let whole = alone(&made);
                        made.answered = whole[..whole.len() - 1].to_vec();
                    }
                    wanted.insert(next, alone(&made));
                    schedule.submit(made).unwrap();
                }
                if draw % 17 == 0 && next > 0 {
                    let id = u64::from(draw / 17) % next + 1;
                    if schedule.cancel(id) {
                        wanted.remove(&id);
                        answers.remove(&id);
                    }
                }
                idle = if step(&mut schedule, &mut answers) == 0 { idle + 1 } else { 0 };
                assert!(
                    idle == 0 || schedule.load() == (0, 0),
                    "H3: seed {seed} stands still with {:?}",
                    schedule.load()
                );
            }
            assert_eq!(schedule.load(), (0, 0), "seed {seed}");
            assert_eq!(answers, wanted, "seed {seed}");
            assert_eq!(schedule.pages.available(), 9, "G1");
        }
    }
}
