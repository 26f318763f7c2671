//! What is to be done after the entries before it are durable. Effects are never journalled: what a restart forgets is made again from the
//! state when a node reconnects or a client asks again.

use std::collections::BTreeSet;

use stoke_protocol::ids::{JobId, NodeId, TokenId};
use stoke_protocol::message::client::Reply;
use stoke_protocol::message::node::ToNode;
use stoke_protocol::message::rank::RankId;
use stoke_protocol::spec::Artifact;

use super::control::{SessionId, Ticket};

/// What `Cluster::apply` orders, in terms of nodes.
#[derive(Clone, PartialEq, Debug)]
pub enum Order {
    /// To the node's session; dropped when it has none, for reconnecting makes it again.
    Send { node: NodeId, message: ToNode },
    /// The job looks different now: watchers are told, cancels may be answered.
    Changed { job: JobId },
}

/// What `Control::step` orders, in terms of sessions and requests.
#[derive(Clone, PartialEq, Debug)]
pub enum Effect {
    Send {
        session: SessionId,
        message: ToNode,
    },
    /// Ends a session; the reason goes to the agent.
    Close {
        session: SessionId,
        reason: String,
    },
    /// Ends a session for good: its node was removed, and its agent ends with it.
    Revoke {
        session: SessionId,
        reason: String,
    },
    Reply {
        ticket: Ticket,
        reply: Box<Reply>,
    },
    /// A token was made: the shell, which knows the secret, puts the text together.
    TokenMade {
        ticket: Ticket,
        token: TokenId,
    },
    /// A member was let in: sign its certificate.
    Admit {
        ticket: Ticket,
        member: Member,
    },
    /// The join or the signing was refused; the reason is for the one who asked.
    Deny {
        ticket: Ticket,
        reason: String,
    },
    /// The rank may have a certificate.
    SignRank {
        ticket: Ticket,
        id: RankId,
    },
    /// An artifact may be stored; these are what jobs that live need.
    Artifacts {
        ticket: Ticket,
        needed: BTreeSet<Artifact>,
    },
    /// The caller, a user or a node, may do what only the shell can: sign its renewal, read logs, watch.
    Granted {
        ticket: Ticket,
    },
    /// Watchers of the job are to be told.
    Changed {
        job: JobId,
    },
}

/// Who a join token has let in.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Member {
    Node { node: NodeId },
    User { name: String, role: stoke_protocol::message::client::TokenScope },
}
