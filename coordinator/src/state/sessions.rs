//! What comes in over a node's session: hellos, reports, progress, signing requests. Owns who is heard and who is sent away; what a hello or a
//! report changes is the fold's (`inventory.rs`, `reports.rs`). Part of `control.rs`.

use stoke_protocol::ids::NodeId;
use stoke_protocol::message::node::{NodeHello, Report, ToNode};
use stoke_protocol::message::rank::{Progress, RankId};

use super::cluster::Refused;
use super::control::{Control, SessionId, Step, Ticket, stale_words};
use super::effect::Effect;
use super::event::Event;
use super::members::Stale;
use super::removal::removed_words;

impl Control {
    pub(super) fn hello(
        &mut self,
        step: &mut Step,
        (session, node): (SessionId, NodeId),
        address: String,
        hello: NodeHello,
    ) {
        if self.cluster.members().was_removed(node) {
            return step.effects.push(Effect::Revoke { session, reason: removed_words(node) });
        }
        if let Err(reason) = self.check_hello(node, &hello) {
            step.effects.push(Effect::Close { session, reason });
            return;
        }
        let before = self.liveness.open(self.now.mono, node, session, hello.incarnation);
        if let Some(session) = before {
            let reason = format!("another session of {node} has opened");
            step.effects.push(Effect::Close { session, reason });
        }
        let welcome = ToNode::Welcome {
            epoch: self.cluster.epoch(),
            index: self.cluster.index().next(),
            heartbeat_ms: self.options.timings.heartbeat_ms,
            lease_ms: self.options.timings.lease_ms,
        };
        step.effects.push(Effect::Send { session, message: welcome });
        let committed = self.commit(step, Event::NodeUp { hello, address });
        assert!(committed.is_ok(), "M1: the hello of {node} was checked: {committed:?}");
        self.tell_routes_to(step, session);
    }

    /// I1, I5 and F32: who may open a session.
    fn check_hello(&self, node: NodeId, hello: &NodeHello) -> Result<(), String> {
        if Some(hello.cluster) != self.cluster.id() {
            return Err(format!("this is another cluster than {}: check the coordinator's address", hello.cluster));
        }
        if hello.node != node {
            return Err(format!("the certificate is of {node}, the hello of {}", hello.node));
        }
        if hello.epoch_seen > self.cluster.epoch() || hello.index_seen > self.cluster.index() {
            return Err(format!(
                "this coordinator ({}, {}) is behind what the node has obeyed ({}, {}): was an old copy of its folder started?",
                self.cluster.epoch(),
                self.cluster.index(),
                hello.epoch_seen,
                hello.index_seen
            ));
        }
        let bug = self.cluster.planted_bug();
        self.cluster
            .members()
            .check_hello(node, (hello.incarnation, hello.session), bug)
            .map_err(|stale| stale_words(node, &stale))
    }

    pub(super) fn report(&mut self, step: &mut Step, session: SessionId, report: Report) {
        self.replan |= self.liveness.heard(self.now.mono, session, None);
        let Some((node, incarnation)) = self.liveness.node(session) else { return };
        let sequence = report.sequence;
        let (job, failures) = (report.id.job, self.failures(report.id.job));
        match self.commit(step, Event::Reported { node, incarnation, report }) {
            Ok(()) => {
                self.hold_off(job, failures);
                self.convict(step, node);
            }
            Err(Refused::Stale(Stale::Duplicate { last })) => {
                let message = ToNode::Acknowledge { sequence: last, index: self.cluster.index() };
                step.effects.push(Effect::Send { session, message });
            }
            Err(Refused::Stale(stale)) => {
                let reason = format!("report {sequence} is refused: {}", stale_words(node, &stale));
                self.close(step, session, reason);
            }
            Err(
                Refused::Invalid(why) | Refused::NotFound(why) | Refused::Conflict(why) | Refused::Unavailable(why),
            ) => {
                self.close(step, session, format!("report {sequence} is refused: {why}"));
            }
        }
    }

    fn close(&mut self, step: &mut Step, session: SessionId, reason: String) {
        self.liveness.close(session);
        step.effects.push(Effect::Close { session, reason });
    }

    pub(super) fn take_progress(&mut self, step: &mut Step, session: SessionId, id: RankId, progress: Progress) {
        self.replan |= self.liveness.heard(self.now.mono, session, None);
        let Some((node, _)) = self.liveness.node(session) else { return };
        let Some(job) = self.cluster.jobs().get(id.job) else { return };
        if !job.is_on(id, node) || !job.expects(id) {
            return;
        }
        let newest = self.progress.entry(id.job).or_insert(progress);
        if progress.step >= newest.step || id.rank.0 == 0 {
            *newest = progress;
            self.histories.hear(id.job, self.now.wall.0, &progress);
            step.effects.push(Effect::Changed { job: id.job });
        }
        self.take_pace(step, id, &progress);
    }

    /// A node's own certificate is renewed for members only.
    pub(super) fn renew_node(&mut self, step: &mut Step, ticket: Ticket, session: SessionId) {
        step.effects.push(match self.liveness.node(session) {
            Some(_) => Effect::Granted { ticket },
            None => Effect::Deny { ticket, reason: "the session is over".into() },
        });
    }

    pub(super) fn sign_rank(&mut self, step: &mut Step, ticket: Ticket, session: SessionId, id: RankId) {
        let allowed = match self.liveness.node(session) {
            Some((node, incarnation)) => self.cluster.check_sign(node, incarnation, id),
            None => Err("the session is over".into()),
        };
        step.effects.push(match allowed {
            Ok(()) => Effect::SignRank { ticket, id },
            Err(reason) => Effect::Deny { ticket, reason },
        });
    }
}
