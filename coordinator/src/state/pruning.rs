//! Pins and prunes: who asks for them, what they change, and which node sweeps what a prune took out of sight. Which checkpoints go is the
//! catalogue's (`checkpoints.rs`). Touches no store. Part of `cluster.rs` and `control.rs`.
//!
//! | shelf            | on                            | becomes                | and                                  |
//! | ---              | ---                           | ---                    | ---                                  |
//! | any              | pruned                        | unswept, of a node     | Sweep to it                          |
//! | unswept, of N    | N comes back                  | the same               | Sweep to it again                    |
//! | unswept, of N    | N is lost or removed          | unswept, of another    | Sweep to it                          |
//! | unswept, of N    | N could not sweep             | unswept, of nobody     | a line in the job's timeline         |
//! | unswept, of none | a node comes                  | unswept, of this node  | Sweep to it                          |
//! | unswept          | swept, by whichever node      | swept                  | a line in the job's timeline         |

use std::collections::BTreeSet;

use stoke_protocol::identity::Subject;
use stoke_protocol::ids::{Generation, JobId, LogIndex, NodeId, Step as TrainStep};
use stoke_protocol::message::client::{CheckpointView, Refusal, Reply};
use stoke_protocol::message::node::ToNode;
use stoke_protocol::spec::KEEP_MAX;

use super::checkpoints::Keep;
use super::cluster::{Cluster, Refused};
use super::control::{Control, SessionId, Step};
use super::effect::Order;
use super::event::Event;
use super::jobs::Jobs;
use super::machine::{REASON_CHARS_MAX, Scene};
use super::requests::{invalid, owner, refusal};

/// What jobs that have not ended continue from.
pub(super) fn needed(jobs: &Jobs) -> BTreeSet<&str> {
    jobs.iter().filter(|job| !job.state.is_terminal()).filter_map(|job| job.resume.as_deref()).collect()
}

/// What a node says of a sweep.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Sweep {
    pub job: JobId,
    pub index: LogIndex,
    pub removed: u32,
    pub error: Option<String>,
}

impl Cluster {
    pub(super) fn check_prune(&self, id: JobId, keep: u32) -> Result<(), Refused> {
        if self.jobs.get(id).is_none() {
            return Err(Refused::NotFound(format!("there is no {id}")));
        }
        if keep == 0 {
            return Err(Refused::Invalid(format!("a prune of {id} that keeps nothing")));
        }
        Ok(())
    }

    pub(super) fn check_swept(&self, id: JobId, index: LogIndex) -> Result<(), Refused> {
        if self.catalogue.unswept(id) == Some(index) {
            return Ok(());
        }
        Err(Refused::Conflict(format!("no sweep of {id} for the entry {index} is awaited")))
    }

    pub(super) fn pin(&mut self, scene: &mut Scene<'_>, id: JobId, step: TrainStep, by: &str) {
        self.catalogue.pin(id, step);
        self.tell(scene, id, format!("checkpoint at {step} pinned by {by}"));
    }

    pub(super) fn unpin(&mut self, scene: &mut Scene<'_>, id: JobId, step: TrainStep, by: &str) {
        self.catalogue.unpin(id, step);
        self.tell(scene, id, format!("checkpoint at {step} unpinned by {by}"));
    }

    pub(super) fn prune(&mut self, scene: &mut Scene<'_>, id: JobId, keep: u32, by: &str) {
        let needed = needed(&self.jobs);
        let keep = Keep { newest: keep, needed: &|uri| needed.contains(uri), bug: None };
        let going = self.catalogue.surplus(id, &keep);
        self.catalogue.prune(id, scene.index, &keep);
        let steps: Vec<String> = going.iter().map(|checkpoint| checkpoint.step.0.to_string()).collect();
        let what = match &steps[..] {
            [] => "what is left over".to_owned(),
            steps => format!("checkpoints at {}", steps.join(", ")),
        };
        self.tell(scene, id, format!("pruned by {by}: {what}"));
        let sweeper = self.sweeper(id);
        self.order_sweep(scene, id, sweeper);
    }

    pub(super) fn swept(&mut self, scene: &mut Scene<'_>, node: NodeId, sweep: &Sweep) {
        let text = match &sweep.error {
            None => {
                self.catalogue.swept(sweep.job);
                format!("{node} has removed pruned checkpoints from the store, folders: {}", sweep.removed)
            }
            Some(error) => {
                self.catalogue.assign_sweep(sweep.job, None);
                let error: String = error.chars().take(REASON_CHARS_MAX).collect();
                format!(
                    "{node} could not remove all pruned checkpoints, the next node that connects or the next prune tries again: {error}"
                )
            }
        };
        self.tell(scene, sweep.job, text);
    }

    /// An order that was lost with a session is given again; one that failed, or that nobody has, is this node's.
    pub(super) fn sweep_again(&mut self, scene: &mut Scene<'_>, node: NodeId) {
        let is_its = |by: Option<NodeId>| by.is_none_or(|by| by == node);
        let jobs: Vec<JobId> = self.catalogue.all_unswept().filter(|(_, by)| is_its(*by)).map(|(job, _)| job).collect();
        jobs.into_iter().for_each(|job| self.order_sweep(scene, job, Some(node)));
    }

    /// This node is gone: another one sweeps.
    pub(super) fn sweep_elsewhere(&mut self, scene: &mut Scene<'_>, node: NodeId) {
        let its = self.catalogue.all_unswept().filter(|(_, by)| *by == Some(node));
        let jobs: Vec<JobId> = its.map(|(job, _)| job).collect();
        for job in jobs {
            let sweeper = self.sweeper(job);
            self.order_sweep(scene, job, sweeper);
        }
    }

    /// What names what stays (C3).
    fn order_sweep(&mut self, scene: &mut Scene<'_>, id: JobId, to: Option<NodeId>) {
        self.catalogue.assign_sweep(id, to);
        let (Some(job), Some(node)) = (self.jobs.get(id), to) else { return };
        let Some(index) = self.catalogue.unswept(id) else { return };
        // Of a job that is over, also what it began after the last that was committed.
        let newest = match (job.state.is_terminal(), self.catalogue.last(id)) {
            (true, _) => (TrainStep(u64::MAX), Generation(u64::MAX)),
            (false, Some(newest)) => (newest.step, newest.generation),
            (false, None) => return,
        };
        let message = ToNode::Sweep {
            job: id,
            index,
            checkpoints: job.checkpoints.clone(),
            newest,
            keep: self.catalogue.kept(id).into(),
        };
        scene.orders.push(Order::Send { node, message });
    }

    /// A node that has reached the store before, where one is left: it has the credentials.
    fn sweeper(&self, id: JobId) -> Option<NodeId> {
        let job = self.jobs.get(id)?;
        let is_up = |node: &NodeId| self.members.node(*node).is_some_and(|node| node.up);
        let ran = job.run.iter().flat_map(|run| run.ranks.values().map(|rank| rank.node));
        let ran = ran.chain(job.past.iter().rev().map(|(_, node)| *node));
        let any = self.members.nodes().map(|node| node.id);
        ran.chain(any).find(is_up)
    }

    fn tell(&mut self, scene: &mut Scene<'_>, id: JobId, text: String) {
        let (at, index) = (scene.at, scene.index);
        self.jobs.drive(id, self.placements, |job| job.timeline.add(at, index, text));
        scene.orders.push(Order::Changed { job: id });
    }
}

impl Control {
    pub(super) fn pin_checkpoint(
        &mut self,
        step: &mut Step,
        caller: &Subject,
        (job, at): (JobId, TrainStep),
    ) -> Result<Reply, Refusal> {
        self.may_change(step, caller, job, "pin")?;
        if !self.cluster.catalogue().is_pinned(job, at) {
            self.commit(step, Event::Pinned { job, step: at, by: owner(caller) }).map_err(no_checkpoint)?;
        }
        Ok(Reply::Pinned(self.checkpoint(job, at).expect("a pinned checkpoint is visible")))
    }

    pub(super) fn unpin_checkpoint(
        &mut self,
        step: &mut Step,
        caller: &Subject,
        (job, at): (JobId, TrainStep),
    ) -> Result<Reply, Refusal> {
        self.may_change(step, caller, job, "unpin")?;
        if self.cluster.catalogue().is_pinned(job, at) {
            self.commit(step, Event::Unpinned { job, step: at, by: owner(caller) }).map_err(no_checkpoint)?;
        }
        let found = self.checkpoint(job, at);
        found
            .map(Reply::Pinned)
            .ok_or_else(|| no_checkpoint(Refused::NotFound(format!("{job} has no committed checkpoint at {at}"))))
    }

    pub(super) fn prune_checkpoints(
        &mut self,
        step: &mut Step,
        caller: &Subject,
        (id, keep, mode): (JobId, Option<u32>, Mode),
    ) -> Result<Reply, Refusal> {
        self.may_change(step, caller, id, "prune")?;
        let job = self.find(id)?;
        let newest = keep.unwrap_or(job.keep);
        if !(1..=KEEP_MAX).contains(&newest) {
            return Err(invalid(
                format!("keep {newest} checkpoints of {id}"),
                &format!("use 1 to {KEEP_MAX}: the newest one always stays"),
            ));
        }
        let needed = needed(self.cluster.jobs());
        let keep = Keep { newest, needed: &|uri| needed.contains(uri), bug: None };
        let catalogue = self.cluster.catalogue();
        let going: Vec<CheckpointView> =
            catalogue.surplus(id, &keep).iter().map(|found| catalogue.view(id, found)).collect();
        // What a job that is over has begun and never committed is in no catalogue: only its store tells whether there is any.
        let is_done = going.is_empty() && catalogue.unswept(id).is_none() && !job.state.is_terminal();
        let kept = catalogue.views(id).into_iter().filter(|view| !going.contains(view)).collect();
        if mode == Mode::Do && !is_done {
            let event = Event::Pruned { job: id, keep: newest, by: owner(caller) };
            self.commit(step, event)
                .map_err(|refused| refusal(refused, "`stoke checkpoint list` shows what there is"))?;
        }
        Ok(Reply::Pruned { removed: going.into(), kept })
    }

    /// A node has swept, or could not; an answer that nobody awaits any more changes nothing.
    pub(super) fn take_sweep(&mut self, step: &mut Step, session: SessionId, sweep: Sweep) {
        self.replan |= self.liveness.heard(self.now.mono, session, None);
        let Some((node, _)) = self.liveness.node(session) else { return };
        let Sweep { job, index, removed, error } = sweep;
        let _ = self.commit(step, Event::Swept { node, job, index, removed, error });
    }

    fn checkpoint(&self, job: JobId, step: TrainStep) -> Option<CheckpointView> {
        self.cluster.catalogue().views(job).into_iter().find(|view| view.step == step)
    }
}

/// Whether a prune is done or only told.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mode {
    Do,
    Tell,
}

fn no_checkpoint(refused: Refused) -> Refusal {
    refusal(refused, "`stoke checkpoint list` shows the steps; unpin what is not needed")
}
