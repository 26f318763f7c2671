//! What the cluster actor is told, and what it answers. Stays inside this crate.

use std::collections::BTreeSet;

use stoke_protocol::identity::Subject;
use stoke_protocol::ids::{Digest, JobId, NodeId, Rank, TokenId};
use stoke_protocol::message::client::{JobView, Refusal, Reply, Request};
use stoke_protocol::message::join::Wants;
use stoke_protocol::message::load::{Demand, Load};
use stoke_protocol::message::node::{Heartbeat, NodeHello, Report};
use stoke_protocol::message::rank::{Progress, RankId, StepTimes};
use stoke_protocol::message::split::{Survey, Surveyed};
use stoke_protocol::spec::Artifact;
use stoke_protocol::transport::Connection;
use tokio::sync::{OwnedSemaphorePermit, mpsc, oneshot};

use super::session;
use crate::journal::{Durable, JournalError};
use crate::state::SessionId;
use crate::state::effect::Member;
use crate::state::pruning::Sweep;

/// Bounds what one peer may have in the mailbox; given back when the message was handled.
pub(crate) type Permit = Option<OwnedSemaphorePermit>;

pub(crate) enum Message {
    /// From a session: its first frame.
    Hello { session: SessionId, node: NodeId, address: String, hello: Box<NodeHello>, link: Link },
    /// From a session: any later word of its node.
    Heard { session: SessionId, words: Words, permit: Permit },
    /// From a session: its connection is over.
    Closed { session: SessionId },
    /// From a gateway, a session or the door. Answered once; dropping the receiver withdraws it.
    Ask { question: Question, answer: oneshot::Sender<Answer> },
    /// From a gateway: tell of each change of a job until it has ended.
    Watch { job: JobId, views: mpsc::Sender<JobView> },
    /// From a gateway: where a job's logs are.
    Sources { job: JobId, rank: Option<Rank>, answer: oneshot::Sender<Result<Vec<Source>, Refusal>> },
    /// From the journal: what is durable now, or why nothing will be any more.
    Committed(Result<Durable, JournalError>),
    /// From the clock.
    Tick,
    /// From the owner, who wants to know that messages are still taken. Answered at once.
    Beat { done: oneshot::Sender<()> },
    /// From the owner: end in order. Answered when everything taken in is durable.
    Stop { done: oneshot::Sender<()> },
}

pub(crate) enum Words {
    Report(Report),
    Progress { id: RankId, progress: Progress },
    Load { id: RankId, load: Load },
    Timed { id: RankId, steps: Vec<StepTimes> },
    Demand(Vec<Demand>),
    Swept(Sweep),
    Surveyed { rtt_us: u32, survey: Survey, found: Result<Surveyed, String> },
    Heartbeat(Box<Heartbeat>),
}

pub(crate) enum Question {
    Request { caller: Subject, request: Request, secret_hash: Digest },
    Join { token: TokenId, secret_hash: Digest, wants: Wants },
    SignRank { session: SessionId, id: RankId },
    RenewNode { session: SessionId },
}

#[derive(Debug)]
pub(crate) enum Answer {
    Reply(Box<Reply>),
    Token(TokenId),
    Member(Member),
    /// The rank may have its certificate.
    Sign(RankId),
    Granted,
    /// An artifact may be stored; jobs need these.
    Artifacts(BTreeSet<Artifact>),
    Denied(String),
}

/// How to reach a node's session.
pub(crate) struct Link {
    pub actor: ractor::ActorRef<session::Message>,
    pub connection: Connection,
}

/// A rank whose log is wanted, its node, and the way to it.
pub(crate) type Source = (RankId, NodeId, Option<Connection>);
