//! What has taken too long: silent nodes, ranks that do not come up, that nobody reaches, or that outlive their job. Owns the rounds that find it;
//! never ends anything by itself: it journals that it is over. Part of `control.rs`.

use std::collections::BTreeSet;

use stoke_protocol::ids::JobId;
use stoke_protocol::message::client::JobState;
use stoke_protocol::message::node::ToNode;
use stoke_protocol::message::rank::RankId;

use super::control::{Control, Step};
use super::effect::Effect;
use super::event::Event;
use super::machine::STOP_GRACE_MS;
use super::planted::PlantedBug;
use super::run::Run;

impl Control {
    pub(super) fn tick(&mut self, step: &mut Step) {
        let live = self.liveness.live().len();
        for (node, incarnation, session) in self.liveness.tick(self.now.mono) {
            if let Some(session) = session {
                let reason = format!("{node} was silent for too long and is taken as lost: connect again");
                step.effects.push(Effect::Close { session, reason });
            }
            // A node that was lost before and never came back changes nothing.
            let _unchanged = self.commit(step, Event::NodeLost { node, incarnation });
        }
        self.replan |= self.liveness.live().len() != live;
        // What a job that has failed lacks is placed when its wait is over, not with the next thing that happens.
        let (held_off, now) = (self.held_off.len(), self.now.mono);
        self.held_off.retain(|_, until| now < *until);
        self.replan |= self.held_off.len() != held_off;
        self.surveys.tick();
        self.end_yields(step);
        self.end_drains(step);
        self.end_leaves(step);
        self.autoscale(step);
        self.begin_probations(step);
        self.end_stalled(step);
        self.evict(step);
        if self.now.mono.since_ms(self.nagged) >= self.options.timings.exit_max_ms {
            self.nagged = self.now.mono;
            self.nag(step);
            self.progress.retain(|job, _| self.cluster.jobs().get(*job).is_some());
            self.histories.retain(|job| self.cluster.jobs().get(job).is_some());
            let jobs = self.cluster.jobs();
            self.stragglers.retain(|job| jobs.get(job).is_some_and(|job| !job.state.is_terminal()));
            let runs = |job| jobs.get(job).is_some_and(|job| !job.state.is_terminal());
            let is_served = |model: &str| self.cluster.serving(model).next().is_some();
            self.loads.retain(runs, is_served);
            self.held_off.retain(|job, _| self.cluster.jobs().get(*job).is_some_and(|job| !job.state.is_terminal()));
        }
    }

    /// Jobs that take too long to make room; and those that have rested may make it again.
    fn end_yields(&mut self, step: &mut Step) {
        let now = self.now.mono;
        let due: Vec<JobId> = self.yielding.iter().filter(|(_, due)| now >= **due).map(|(job, _)| *job).collect();
        for job in due {
            self.yielding.remove(&job);
            // One that has stopped meanwhile has made room.
            let _unchanged = self.commit(step, Event::YieldOverdue { job });
        }
        let (spared, jobs) = (self.spared.len(), self.cluster.jobs());
        for (job, until) in &mut self.spared {
            if jobs.get(*job).is_some_and(|job| job.state == JobState::Starting) {
                *until = now.plus_ms(self.options.timings.spared_ms);
            }
        }
        self.spared.retain(|_, until| now < *until);
        self.replan |= self.spared.len() != spared;
    }

    /// Ranks that do not come up: a gang is ended, a rank that was added is given up.
    fn end_stalled(&mut self, step: &mut Step) {
        let (now, start_max_ms) = (self.now.mono, self.options.timings.start_max_ms);
        let jobs = self.cluster.jobs();
        self.starting.retain(|id, _| jobs.get(id.job).is_some_and(|job| job.unready(*id).is_some()));
        let late = self.starting.iter().filter(|(_, since)| now.since_ms(**since) >= start_max_ms);
        let late: Vec<RankId> = late.map(|(id, _)| *id).collect();
        for id in late {
            let Some(node) = self.cluster.jobs().get(id.job).and_then(|job| job.unready(id)) else { continue };
            let late = format!("was not ready within {} s", start_max_ms / 1_000);
            let starts = self.cluster.jobs().get(id.job).is_some_and(|job| job.state == JobState::Starting);
            let event = if starts {
                Event::Stalled {
                    job: id.job,
                    generation: id.generation,
                    reason: format!("{} on {node} {late}", id.rank),
                }
            } else {
                Event::Evicted { id, reason: late }
            };
            let failures = self.failures(id.job);
            // One that is over by now changes nothing.
            let _unchanged = self.commit(step, event);
            self.hold_off(id.job, failures);
        }
    }

    /// Ranks that others cannot reach.
    fn evict(&mut self, step: &mut Step) {
        if self.cluster.planted_bug() == Some(PlantedBug::PartedForgotten) {
            return;
        }
        let live = self.liveness.live();
        let silent = |run: &Run, id: RankId| run.ranks.get(&id).is_none_or(|rank| !live.contains(&rank.node));
        for (id, accusers) in self.hearings.due(self.now.mono, self.cluster.jobs().parted(), silent) {
            let accusers: Vec<String> = accusers.iter().map(|id| id.rank.to_string()).collect();
            let reason = format!("was given up: {} lost the connection to it", accusers.join(", "));
            let failures = self.failures(id.job);
            let _unchanged = self.commit(step, Event::Evicted { id, reason });
            self.hold_off(id.job, failures);
        }
    }

    /// Ranks that outlive their job, because their process hangs, hold room that others wait for.
    fn nag(&mut self, step: &mut Step) {
        let jobs = self.cluster.jobs();
        let wanted = |id: &RankId| {
            // While a job recovers or is cancelled its ranks were told already.
            let job = jobs.get(id.job).filter(|job| !job.state.is_terminal() && job.state != JobState::Queued);
            job.is_some_and(|job| job.expects(*id) || !job.is_active() && job.knows(*id))
        };
        let held = self.cluster.members().nodes().flat_map(|node| node.held.keys());
        let unwanted: BTreeSet<RankId> = held.filter(|id| !wanted(id)).copied().collect();
        // Twice in a row: since the last round at least. The wall clock may jump, so it cannot tell how long.
        let late = std::mem::replace(&mut self.unwanted, unwanted);
        for node in self.cluster.members().nodes() {
            let Some(session) = self.liveness.session(node.id) else { continue };
            for id in node.held.keys().filter(|id| late.contains(id) && self.unwanted.contains(id)) {
                let reason = "its generation is over".to_owned();
                let grace_ms = jobs.get(id.job).map_or(STOP_GRACE_MS, |job| job.stop_grace_ms(STOP_GRACE_MS));
                let message = ToNode::Stop { id: *id, reason, grace_ms };
                step.effects.push(Effect::Send { session, message });
            }
        }
    }
}
