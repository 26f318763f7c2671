//! Nodes that are let go for good: lost ones, and drained ones. Owns when that is allowed and what a removed node is told; parts of `cluster.rs`
//! and `control.rs`.
//!
//! R1: a node that may carry a rank which somebody counts on is not removed. R2: ids are never given twice, so an id that was given and is not
//! there was removed, and its certificate opens nothing any more. What a lost node still has on its books goes with it: its ranks counted as
//! gone when it was lost, and no membership names them (I2).

use stoke_protocol::identity::Subject;
use stoke_protocol::ids::NodeId;
use stoke_protocol::message::client::{Refusal, RefusalCode, Reply};

use super::cluster::{Cluster, Refused};
use super::control::{Control, Step};
use super::effect::Effect;
use super::event::Event;
use super::requests::{Answer, owner, refusal};

impl Cluster {
    pub(super) fn check_remove(&self, node: NodeId) -> Result<(), Refused> {
        let found = self.check_node(node)?;
        if !found.up || found.drain.is_some() && found.held.is_empty() {
            return Ok(());
        }
        Err(Refused::Conflict(format!("{node} is neither lost nor drained")))
    }
}

impl Control {
    pub(super) fn ask_remove(&mut self, step: &mut Step, caller: &Subject, node: NodeId) -> Answer {
        if self.cluster.members().was_removed(node) {
            // A client whose answer was lost asks again.
            return Ok(Reply::NodeRemoved { node });
        }
        self.commit(step, Event::NodeRemoved { node, by: owner(caller) }).map_err(|refused| match refused {
            Refused::Conflict(message) => {
                let mend = format!("`stoke drain {node}` empties it; one that has died is lost after a few seconds");
                Refusal { code: RefusalCode::Conflict, message, mend }
            }
            other => refusal(other, "`stoke nodes` lists the nodes"),
        })?;
        self.deadlines.remove(&node);
        if let Some(session) = self.liveness.forget(node) {
            step.effects.push(Effect::Revoke { session, reason: removed_words(node) });
        }
        Ok(Reply::NodeRemoved { node })
    }
}

/// What a node is told that was removed and comes back.
pub(super) fn removed_words(node: NodeId) -> String {
    format!(
        "{node} was removed from this cluster: to let the machine in again, make a token (`stoke token create --role node`) and start its \
         agent with --join TOKEN"
    )
}
