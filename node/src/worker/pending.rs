//! What a rank has to tell its agent. Pure. Owns the order, the numbers and the bound of it; sends nothing.
//!
//! Q1: an event stays until its number, or a higher one, is acknowledged, and is told again to each new agent; numbers grow and are never
//!     given twice. Q2: of progress, load and signs of life only the newest is told, and none twice.
//! Of steps' times at most `StepTimes::TOLD_MAX` wait.
//! Q3: at most [`EVENTS_MAX`] events stay. Beyond, the oldest about a checkpoint or a lost connection goes; others are a few in a rank's life.

use std::collections::VecDeque;

use stoke_protocol::message::load::Load;
use stoke_protocol::message::rank::{FromRank, Progress, RankEvent, StepTimes};

use crate::agent::is_droppable;

/// More than a rank says in its orphan grace at a checkpoint a second; about 100 KiB.
pub const EVENTS_MAX: usize = 512;

/// See the module.
#[derive(Debug, Default)]
pub struct Pending {
    /// Until the certificate is there.
    hello: Option<FromRank>,
    hello_told: bool,
    renewal: Option<FromRank>,
    told: VecDeque<(u64, RankEvent)>,
    untold: VecDeque<RankEvent>,
    /// The highest number that was given.
    last: u64,
    progress: Option<Progress>,
    load: Option<Load>,
    timed: Vec<StepTimes>,
    alive: bool,
    leaving: Option<u8>,
}

impl Pending {
    pub fn push(&mut self, frame: FromRank) {
        match frame {
            FromRank::Hello { .. } => (self.hello, self.hello_told) = (Some(frame), false),
            FromRank::Renew { .. } => self.renewal = Some(frame),
            FromRank::Event(event) => {
                if self.told.len() + self.untold.len() >= EVENTS_MAX {
                    self.shed();
                }
                self.untold.push_back(event);
            }
            FromRank::Progress(progress) => self.progress = Some(progress),
            FromRank::Load(load) => self.load = Some(load),
            FromRank::Timed(steps) => {
                self.timed.extend(steps.0);
                self.timed.truncate(StepTimes::TOLD_MAX);
            }
            FromRank::Alive => self.alive = true,
            FromRank::Leaving { code } => self.leaving = Some(code),
            // Said by whoever holds the link, not by the rank.
            FromRank::Return { .. } => {}
        }
    }

    pub fn is_empty(&self) -> bool {
        (self.hello.is_none() || self.hello_told)
            && self.renewal.is_none()
            && self.untold.is_empty()
            && self.progress.is_none()
            && self.load.is_none()
            && self.timed.is_empty()
            && !self.alive
            && self.leaving.is_none()
    }

    /// The next frame to tell; the last is the one that the rank leaves with.
    pub fn pop(&mut self) -> Option<FromRank> {
        if let Some(hello) = self.hello.as_ref().filter(|_| !self.hello_told) {
            self.hello_told = true;
            return Some(hello.clone());
        }
        if let Some(event) = self.untold.pop_front() {
            self.last += 1;
            self.told.push_back((self.last, event.clone()));
            return Some(FromRank::Event(event));
        }
        if let Some(renewal) = self.renewal.take() {
            return Some(renewal);
        }
        if let Some(progress) = self.progress.take() {
            return Some(FromRank::Progress(progress));
        }
        if let Some(load) = self.load.take() {
            return Some(FromRank::Load(load));
        }
        if !self.timed.is_empty() {
            return Some(FromRank::Timed(std::mem::take(&mut self.timed).into()));
        }
        if std::mem::take(&mut self.alive) {
            return Some(FromRank::Alive);
        }
        self.leaving.take().map(|code| FromRank::Leaving { code })
    }

    /// The rank has its certificate.
    pub fn certified(&mut self) {
        self.hello = None;
    }

    /// Q1.
    pub fn taken(&mut self, said: u64) {
        while self.told.front().is_some_and(|(number, _)| *number <= said) {
            self.told.pop_front();
        }
    }

    /// Another agent is to be told everything; gives the number of the first event.
    pub fn rewind(&mut self) -> u64 {
        let again = std::mem::take(&mut self.told).into_iter().map(|(_, event)| event);
        self.untold = again.chain(std::mem::take(&mut self.untold)).collect();
        self.hello_told = false;
        self.last + 1
    }

    /// Q3.
    fn shed(&mut self) {
        if let Some(at) = self.told.iter().position(|(_, event)| is_droppable(event)) {
            self.told.remove(at);
        } else if let Some(at) = self.untold.iter().position(is_droppable) {
            self.untold.remove(at);
        }
    }
}

#[cfg(test)]
mod tests {
    use stoke_protocol::ids::{Generation, Step};

    use super::*;

    fn event(step: u64) -> RankEvent {
        RankEvent::Resumed { generation: Generation(1), step: Step(step) }
    }

    fn droppable(step: u64) -> RankEvent {
        RankEvent::NotStored { generation: Generation(1), step: Step(step), error: String::new() }
    }

    fn all(pending: &mut Pending) -> Vec<FromRank> {
        std::iter::from_fn(|| pending.pop()).collect()
    }

    #[test]
    fn what_no_agent_has_acknowledged_is_told_to_the_next_one_under_new_numbers() {
        let mut pending = Pending::default();
        pending.push(FromRank::Hello { csr: vec![1].into(), artifact: None });
        (1..=3).for_each(|step| pending.push(FromRank::Event(event(step))));
        assert_eq!(all(&mut pending).len(), 4);
        assert!(pending.is_empty());
        pending.taken(1);
        assert_eq!(pending.rewind(), 4);
        let hello = FromRank::Hello { csr: vec![1].into(), artifact: None };
        assert_eq!(all(&mut pending), [hello, FromRank::Event(event(2)), FromRank::Event(event(3))]);
        pending.certified();
        pending.taken(4);
        assert_eq!(pending.rewind(), 6);
        assert_eq!(all(&mut pending), [FromRank::Event(event(3))]);
        pending.taken(6);
        assert_eq!((pending.rewind(), pending.is_empty()), (7, true));
    }

    #[test]
    fn signs_of_life_do_not_pile_up_and_the_farewell_comes_last() {
        let mut pending = Pending::default();
        let renewal = |key: u8| FromRank::Renew { csr: vec![key].into() };
        (1..=3).for_each(|key| pending.push(renewal(key)));
        pending.push(FromRank::Leaving { code: 1 });
        (0..9).for_each(|_| pending.push(FromRank::Alive));
        pending.push(FromRank::Event(event(1)));
        let last = [FromRank::Alive, FromRank::Leaving { code: 1 }];
        assert_eq!(all(&mut pending), [&[FromRank::Event(event(1)), renewal(3)][..], &last[..]].concat());
    }

    #[test]
    fn a_long_time_alone_drops_checkpoints_and_nothing_else() {
        let mut pending = Pending::default();
        pending.push(FromRank::Event(event(0)));
        (0..2 * EVENTS_MAX as u64).for_each(|step| pending.push(FromRank::Event(droppable(step))));
        let told = all(&mut pending);
        assert_eq!((told.len(), &told[0]), (EVENTS_MAX, &FromRank::Event(event(0))));
        pending.push(FromRank::Event(droppable(9_999)));
        pending.rewind();
        let told = all(&mut pending);
        assert_eq!((told.len(), told.last()), (EVENTS_MAX, Some(&FromRank::Event(droppable(9_999)))));
    }
}
