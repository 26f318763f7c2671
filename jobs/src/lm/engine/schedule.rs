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
mod tests {
    use std::collections::{BTreeMap, VecDeque};

    use rand_chacha::ChaCha8Rng;
    use rand_chacha::rand_core::{RngCore, SeedableRng};

    use super::*;

    const LIMITS: Limits = Limits { running_max: 4, rows_max: 8, batches_max: 1, waiting_max: 100, context: 64 };
    const PAGE: usize = 4;

    fn request(id: u64, prompt: std::ops::Range<u32>, tokens_max: usize) -> Request {
        Request { id, prompt: prompt.collect(), answered: Vec::new(), tokens_max }
    }

    /// A model whose next token is a function of all before it.
    fn follows(tokens: &[u32]) -> u32 {
        tokens.iter().fold(17, |sum, token| sum * 31 % 1_009 + token) % 97
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

    /// A row with the pages of its sequence.
    type Placed = (Row, Vec<u32>);

    /// A head with the stages behind it: what a row reads is what the batches before it have left in the pages, not what the schedule thinks.
    struct Gang {
        schedule: Schedule,
        /// Tokens by page and place, as of the batches that came out of the last stage.
        cache: Vec<[u32; PAGE]>,
        under_way: VecDeque<(Plan, Vec<Placed>)>,
        /// What the stages would have.
        named: BTreeMap<u32, Named>,
        answers: BTreeMap<u64, Vec<u32>>,
    }

    impl Gang {
        fn new(limits: Limits, pages: u32) -> Self {
            let schedule = Schedule::new(limits, Pages::new(pages, PAGE));
            let cache = vec![[u32::MAX; PAGE]; pages as usize];
            let (under_way, named, answers) = Default::default();
            Self { schedule, cache, under_way, named, answers }
        }

        /// The rows of a new batch. Checks that they follow each other (H1).
        fn plan(&mut self) -> usize {
            let Some(plan) = self.schedule.plan() else { return 0 };
            let rows: Vec<Placed> = plan
                .rows
                .iter()
                .map(|row| {
                    let (tokens, _) = self.schedule.tokens_of(row.id).unwrap();
                    assert_eq!((row.token, row.asks), (tokens[row.position], row.position + 1 == tokens.len()));
                    (*row, self.schedule.pages_of(row.id).to_vec())
                })
                .collect();
            let planned = rows.len();
            self.under_way.push_back((plan, rows));
            planned
        }

        /// The oldest batch is computed.
        fn compute(&mut self) {
            let Some((plan, rows)) = self.under_way.pop_front() else { return };
            for (row, pages) in &rows {
                let page = pages[row.position / PAGE];
                self.cache[page as usize][row.position % PAGE] = row.token;
                self.named.remove(&page);
            }
            self.named.extend(plan.filled.iter().map(|named| (named.page, *named)));
            let asking = rows.iter().filter(|(row, _)| row.asks);
            let tokens = asking.map(|(row, pages)| {
                let read = (0..=row.position).map(|at| self.cache[pages[at / PAGE] as usize][at % PAGE]);
                follows(&read.collect::<Vec<_>>())
            });
            let tokens: Vec<u32> = tokens.collect();
            for made in self.schedule.computed(plan.number, &tokens, |_, _| false).unwrap() {
                self.answers.entry(made.id).or_default().push(made.token);
            }
        }

        fn step(&mut self) -> usize {
            let rows = self.plan();
            self.compute();
            rows
        }

        /// Of the pages that have names, those are kept.
        fn reset(&mut self, keeps: impl Fn(u32) -> bool) {
            self.named.retain(|page, _| keeps(*page));
            let lost = (0..).zip(&mut self.cache).filter(|(page, _)| !self.named.contains_key(page));
            lost.for_each(|(_, tokens)| *tokens = [u32::MAX; PAGE]);
            self.schedule.reset(&self.named.values().copied().collect::<Vec<_>>());
            self.under_way.clear();
        }
    }

    #[test]
    fn long_prompts_are_computed_in_parts_beside_the_tokens_of_others() {
        let mut gang = Gang::new(LIMITS, 16);
        gang.schedule.submit(request(1, 0..3, 9)).unwrap();
        assert_eq!(gang.step(), 3);
        gang.schedule.submit(request(2, 0..20, 2)).unwrap();
        for (rows, made) in [(8, 2), (8, 3), (7, 4)] {
            assert_eq!((gang.step(), gang.answers[&1].len()), (rows, made));
        }
        assert_eq!(gang.answers[&2].len(), 1);
    }

    #[test]
    fn batches_under_way_share_the_requests_and_the_parts_of_a_prompt() {
        let mut gang = Gang::new(Limits { batches_max: 2, ..LIMITS }, 16);
        (1..=4).for_each(|id| gang.schedule.submit(request(id, 0..2, 4)).unwrap());
        assert_eq!((gang.plan(), gang.plan(), gang.plan()), (4, 4, 0), "two requests each");
        gang.compute();
        assert_eq!((gang.plan(), gang.plan()), (2, 0), "the two whose tokens are there");
        gang.reset(|_| false);
        (1..=4).for_each(|id| assert!(gang.schedule.cancel(id)));
        gang.schedule.submit(request(5, 0..12, 2)).unwrap();
        assert_eq!((gang.plan(), gang.plan()), (8, 4), "both parts at once");
        gang.compute();
        gang.compute();
        assert_eq!(gang.answers[&5], alone(&request(5, 0..12, 1)));
    }

    #[test]
    fn of_what_was_computed_only_the_pages_that_are_lacking_are_computed_again() {
        let mut gang = Gang::new(LIMITS, 16);
        (1..=2).for_each(|id| gang.schedule.submit(request(id, id as u32 * 20..id as u32 * 20 + 10, 3)).unwrap());
        let rows: usize = std::iter::repeat_with(|| gang.step()).take(3).sum();
        assert_eq!(rows, 21, "two prompts, and a token of the first answer");
        gang.reset(|_| true);
        assert_eq!(gang.step(), 12 % PAGE + PAGE + 11 % PAGE, "what is behind the pages that were whole");
        while gang.step() > 0 {}
        assert_eq!(
            [1, 2].map(|id| gang.answers[&id].clone()),
            [20..30, 40..50].map(|prompt| alone(&request(1, prompt, 3)))
        );
    }

    #[test]
    fn tokens_of_another_batch_are_refused_and_those_of_a_cancelled_request_are_nobodys() {
        let mut gang = Gang::new(LIMITS, 16);
        gang.schedule.submit(request(1, 0..3, 9)).unwrap();
        gang.plan();
        let wanted = Some((1, 1));
        let never = |_, _| false;
        assert_eq!(gang.schedule.computed(2, &[5], never), Err(Unexpected { number: 2, tokens: 1, wanted }));
        assert_eq!(gang.schedule.computed(1, &[], never), Err(Unexpected { number: 1, tokens: 0, wanted }));
        // Another one of the same number is not the one that asked.
        assert!(gang.schedule.cancel(1));
        gang.schedule.submit(request(1, 7..9, 9)).unwrap();
        assert_eq!(gang.schedule.computed(1, &[5], never), Ok(Vec::new()));
        assert_eq!(gang.schedule.computed(1, &[5], never), Err(Unexpected { number: 1, tokens: 1, wanted: None }));
    }

    #[test]
    fn what_cannot_ever_fit_and_what_is_too_much_is_refused() {
        let mut schedule = Schedule::new(Limits { waiting_max: 1, ..LIMITS }, Pages::new(4, PAGE));
        assert_eq!(schedule.submit(request(1, 0..10, 7)), Err(Refused::TooLong { tokens: 17, room: 16 }));
        assert_eq!(schedule.submit(request(1, 0..0, 7)), Err(Refused::Nothing));
        let answered = Request { answered: vec![1, 2], ..request(1, 0..1, 2) };
        assert_eq!(schedule.submit(answered), Err(Refused::Nothing));
        schedule.submit(request(1, 0..10, 6)).unwrap();
        assert_eq!(schedule.submit(request(2, 0..1, 1)), Err(Refused::Busy { waiting: 1 }));
        assert!(schedule.cancel(1) && !schedule.cancel(1));
        assert_eq!(schedule.load(), (0, 0));
        let mut schedule = Schedule::new(LIMITS, Pages::new(100, PAGE));
        assert_eq!(schedule.submit(request(1, 0..60, 5)), Err(Refused::TooLong { tokens: 65, room: 64 }));
    }

    #[test]
    fn every_answer_is_that_of_the_request_alone_whatever_comes() {
        for seed in 0..240 {
            let mut random = ChaCha8Rng::seed_from_u64(seed);
            let limits = Limits { batches_max: 1 + seed as usize % 4, ..LIMITS };
            let mut gang = Gang::new(limits, 9);
            let (mut wanted, mut next) = (BTreeMap::new(), 0u64);
            let mut idle = 0;
            for turn in 0..4_000 {
                if turn > 400 && gang.schedule.load() == (0, 0) {
                    break;
                }
                let draw = random.next_u32();
                if turn < 400 && draw % 3 == 0 {
                    // Sometimes with the number of one that is over.
                    next += u64::from(draw % 4 != 0 || next == 0 || gang.schedule.tokens_of(next).is_some());
                    let mut made = request(next, 0..1 + draw / 3 % 14, 1 + (draw / 64 % 12) as usize);
                    if draw % 5 == 0 {
                        let whole = alone(&made);
                        made.answered = whole[..whole.len() - 1].to_vec();
                    }
                    wanted.insert(next, alone(&made));
                    gang.answers.remove(&next);
                    gang.schedule.submit(made).unwrap();
                }
                if draw % 17 == 0 && next > 0 {
                    let id = u64::from(draw / 17) % next + 1;
                    if gang.schedule.cancel(id) {
                        wanted.remove(&id);
                        gang.answers.remove(&id);
                    }
                }
                if draw % 101 == 0 {
                    gang.reset(|page| u32::MAX / 7 * (page % 8) < draw);
                }
                let rows = gang.plan();
                // What is under way comes back sooner or later.
                if rows == 0 || draw / 8 % 2 == 0 {
                    gang.compute();
                }
                idle = if rows == 0 && gang.under_way.is_empty() { idle + 1 } else { 0 };
                let load = gang.schedule.load();
                assert!(idle < 2 || load == (0, 0), "H3: seed {seed} stands still with {load:?}");
            }
            assert_eq!(gang.schedule.load(), (0, 0), "seed {seed}");
            assert_eq!(gang.answers, wanted, "seed {seed}");
            assert_eq!(gang.schedule.pages.available(), 9, "G1");
        }
    }
}
