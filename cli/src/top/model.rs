//! What `stoke top` knows and shows: the newest look, where the selection is, what a key does.

use std::collections::{BTreeMap, VecDeque};

use console::Key;
use stoke_protocol::ids::JobId;
use stoke_protocol::list::List;
use stoke_protocol::message::client::{ClusterEvent, Explanation, JobView, NodeView, Point, Pulse};

use crate::command::top::Wish;
use crate::failure::Failure;

/// Events that can be scrolled to: as many as the coordinator keeps.
const EVENTS_MAX: usize = 256;
/// Of a job's curve: more than a line is wide.
const CURVE_MAX: usize = 512;

/// What one look has found.
pub struct Seen {
    pub pulse: Box<Pulse>,
    pub nodes: List<NodeView>,
    pub jobs: List<JobView>,
    /// Of jobs that were not known.
    pub curves: Vec<(JobId, List<Point>)>,
    pub detail: Option<Box<Explanation>>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Pane {
    Nodes,
    #[default]
    Jobs,
    Events,
}

/// Whether it goes on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Turn {
    On,
    End,
}

#[derive(Default)]
pub struct Model {
    pub pulse: Option<Box<Pulse>>,
    pub nodes: Vec<NodeView>,
    pub jobs: Vec<JobView>,
    /// Newest last.
    pub events: VecDeque<ClusterEvent>,
    /// Returns of jobs that have some, losses of the others.
    pub curves: BTreeMap<JobId, Vec<f32>>,
    pub pane: Pane,
    /// In each pane, as `Pane` numbers them.
    pub selected: [usize; 3],
    /// The job whose page is open, and what is known of it.
    pub open: Option<JobId>,
    pub detail: Option<Box<Explanation>>,
    pub helps: bool,
    /// Why nothing newer is known.
    pub away: Option<String>,
}

impl Model {
    pub fn wish(&self) -> Wish {
        let after = self.events.back().map(|event| event.index).unwrap_or_default();
        Wish { job: self.open, after, curves: self.curves.keys().copied().collect() }
    }

    pub fn take(&mut self, seen: Result<Seen, Failure>) {
        let Seen { pulse, nodes, jobs, curves, detail } = match seen {
            Ok(seen) => seen,
            Err(failure) => return self.away = Some(failure.message().to_string()),
        };
        self.away = None;
        let known = self.events.back().map(|event| event.index).unwrap_or_default();
        self.events.extend(pulse.events.iter().filter(|event| event.index > known).cloned());
        self.events.drain(..self.events.len().saturating_sub(EVENTS_MAX));
        self.curves.retain(|id, _| jobs.iter().any(|job| job.job == *id));
        for (job, points) in curves {
            self.curves.insert(job, points.iter().map(|point| point.episode_return.unwrap_or(point.loss)).collect());
        }
        for job in jobs.iter() {
            let Some(progress) = &job.progress else { continue };
            let value = progress.rl.and_then(|rl| rl.episode_return).unwrap_or(progress.loss);
            let curve = self.curves.entry(job.job).or_default();
            if curve.last() != Some(&value) && !job.state.is_terminal() {
                curve.push(value);
            }
            curve.drain(..curve.len().saturating_sub(CURVE_MAX));
        }
        self.detail = detail.filter(|detail| Some(detail.job.job) == self.open);
        (self.pulse, self.nodes, self.jobs) = (Some(pulse), nodes.into_iter().collect(), jobs.into_iter().collect());
        self.keep_in_sight();
    }

    pub fn press(&mut self, key: &Key) -> Turn {
        match key {
            Key::Char('q') | Key::CtrlC => return Turn::End,
            Key::Char('?') => self.helps = !self.helps,
            Key::Escape | Key::Backspace => {
                let closed = std::mem::take(&mut self.helps);
                if !closed {
                    (self.open, self.detail) = (None, None);
                }
            }
            Key::Tab => self.turn_to([Pane::Jobs, Pane::Events, Pane::Nodes]),
            Key::BackTab => self.turn_to([Pane::Events, Pane::Nodes, Pane::Jobs]),
            Key::ArrowUp => self.go(|at| at.saturating_sub(1)),
            Key::ArrowDown => self.go(|at| at + 1),
            Key::PageUp => self.go(|at| at.saturating_sub(10)),
            Key::PageDown => self.go(|at| at + 10),
            Key::Home => self.go(|_| 0),
            Key::End => self.go(|_| usize::MAX),
            Key::Enter => self.open = self.named_job().or(self.open),
            _ => {}
        }
        Turn::On
    }

    /// The job of the line that is selected.
    fn named_job(&self) -> Option<JobId> {
        let at = self.selected[self.pane as usize];
        match self.pane {
            Pane::Jobs => self.jobs.get(at).map(|job| job.job),
            Pane::Events => self.events.iter().rev().nth(at)?.job,
            Pane::Nodes => self.nodes.get(at)?.ranks.iter().next().map(|(job, _)| *job),
        }
    }

    /// To the pane that follows nodes, jobs and events, in this order.
    fn turn_to(&mut self, next: [Pane; 3]) {
        self.pane = next[self.pane as usize];
    }

    fn go(&mut self, to: impl Fn(usize) -> usize) {
        let at = &mut self.selected[self.pane as usize];
        *at = to(*at);
        self.keep_in_sight();
    }

    fn keep_in_sight(&mut self) {
        let lengths = [self.nodes.len(), self.jobs.len(), self.events.len()];
        for (at, length) in self.selected.iter_mut().zip(lengths) {
            *at = (*at).min(length.saturating_sub(1));
        }
    }
}
