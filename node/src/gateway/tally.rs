//! What this gateway has done for each model, and what is under way. Owns the counts and which models they are kept for: those that are served, so
//! that no client makes up names. Knows no head.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use stoke_protocol::message::load::{Demand, FirstTokens};

use super::error::{Kind, Problem};
use super::received::Event;

/// Of every model that is served.
#[derive(Default, Debug)]
pub(super) struct Tallies(Mutex<BTreeMap<String, Arc<Tally>>>);

/// Of one model, since it is served.
#[derive(Default, Debug)]
pub(super) struct Tally {
    pub(super) questions: AtomicU64,
    pub(super) answers: AtomicU64,
    pub(super) tokens: AtomicU64,
    /// Answers that another head went on with, or began again.
    pub(super) replays: AtomicU64,
    /// Questions that were refused because every head was busy (429), and because none came up in time (503).
    pub(super) busy: AtomicU64,
    pub(super) headless: AtomicU64,
    /// Of those two, how many the coordinator was told of.
    told: AtomicU64,
    /// Questions that are not over, and those of them that wait for a head.
    open: AtomicU32,
    held: AtomicU32,
    first_tokens: Mutex<FirstTokens>,
}

/// A question in its model's tally, until this is dropped.
pub(super) struct Place {
    tally: Arc<Tally>,
    began: Instant,
    is_silent: bool,
}

/// A question that waits for a head, until this is dropped.
pub(super) struct Held(Arc<Tally>);

impl Tallies {
    fn all(&self) -> MutexGuard<'_, BTreeMap<String, Arc<Tally>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A question comes, for a model that is served.
    pub(super) fn enter(&self, model: &str, began: Instant) -> Place {
        let mut all = self.all();
        let tally = match all.get(model) {
            Some(tally) => tally.clone(),
            None => all.entry(model.to_owned()).or_default().clone(),
        };
        tally.questions.fetch_add(1, Ordering::Relaxed);
        tally.open.fetch_add(1, Ordering::Relaxed);
        Place { tally, began, is_silent: true }
    }

    /// Forgets models that are served no more, once their last question is over.
    pub(super) fn keep(&self, is_served: impl Fn(&str) -> bool) {
        self.all().retain(|model, tally| is_served(model) || tally.open.load(Ordering::Relaxed) > 0);
    }

    pub(super) fn each(&self) -> Vec<(String, Arc<Tally>)> {
        self.all().iter().map(|(model, tally)| (model.clone(), tally.clone())).collect()
    }

    /// Models with questions that no head has now, or that were refused since the last call.
    pub(super) fn demand(&self) -> Vec<Demand> {
        let demand = |(model, tally): (&String, &Arc<Tally>)| {
            let refused = tally.busy.load(Ordering::Relaxed) + tally.headless.load(Ordering::Relaxed);
            let more = refused.saturating_sub(tally.told.swap(refused, Ordering::Relaxed));
            let refused = u32::try_from(more).unwrap_or(u32::MAX);
            Demand { model: model.clone(), held: tally.held.load(Ordering::Relaxed), refused }
        };
        self.all().iter().map(demand).filter(|demand| demand.held > 0 || demand.refused > 0).collect()
    }
}

impl Tally {
    pub(super) fn running(&self) -> u64 {
        let (open, held) = (self.open.load(Ordering::Relaxed), self.held.load(Ordering::Relaxed));
        open.saturating_sub(held).into()
    }

    pub(super) fn held(&self) -> u64 {
        self.held.load(Ordering::Relaxed).into()
    }

    pub(super) fn first_tokens(&self) -> FirstTokens {
        *self.first_tokens.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Place {
    pub(super) fn hold(&self) -> Held {
        self.tally.held.fetch_add(1, Ordering::Relaxed);
        Held(self.tally.clone())
    }

    pub(super) fn replayed(&self) {
        self.tally.replays.fetch_add(1, Ordering::Relaxed);
    }

    /// An event of the answer, with so many tokens more.
    pub(super) fn heard(&mut self, event: &Event, more: u64) {
        let tokens = match event {
            Event::Text(_) | Event::Tensors(_) => more,
            Event::Vector { tokens, .. } => u64::from(*tokens),
            Event::Ended { .. } => {
                self.tally.answers.fetch_add(1, Ordering::Relaxed);
                return;
            }
            Event::Begun { .. } | Event::Described { .. } => return,
        };
        self.tally.tokens.fetch_add(tokens, Ordering::Relaxed);
        if std::mem::take(&mut self.is_silent) {
            let ms = u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX);
            self.tally.first_tokens.lock().unwrap_or_else(PoisonError::into_inner).add(ms);
        }
    }

    pub(super) fn refused(&self, problem: &Problem) {
        let refused = match problem.kind {
            Kind::Busy => &self.tally.busy,
            Kind::NoHead => &self.tally.headless,
            _ => return,
        };
        refused.fetch_add(1, Ordering::Relaxed);
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.tally.open.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.0.held.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_coordinator_is_told_of_each_refusal_once_and_of_whoever_waits_now() {
        let tallies = Tallies::default();
        let mut place = tallies.enter("m", Instant::now());
        assert_eq!(tallies.demand(), []);
        place.refused(&Problem::busy("m", std::time::Duration::from_secs(1)));
        place.refused(&Problem::late());
        let held = place.hold();
        let demand = |held, refused| vec![Demand { model: "m".into(), held, refused }];
        assert_eq!((tallies.demand(), tallies.demand()), (demand(1, 1), demand(1, 0)));
        drop(held);
        assert_eq!(tallies.demand(), []);
        place.heard(&Event::Text("a".into()), 2);
        place.heard(&Event::Text("b".into()), 1);
        let (_, tally) = &tallies.each()[0];
        assert_eq!((tally.running(), tally.tokens.load(Ordering::Relaxed), tally.first_tokens().count()), (1, 3, 1));
        tallies.keep(|_| false);
        assert_eq!(tallies.each().len(), 1, "a question is under way");
        drop(place);
        tallies.keep(|_| false);
        assert_eq!(tallies.each().len(), 0);
    }
}
