//! The schedule against stages that are a model of caches: what is read is what was left there, whatever comes.

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
