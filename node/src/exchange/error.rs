//! Why an exchange cannot go on. Every variant names the rank at fault where there is one. The generation is over then; the coordinator
//! decides what comes next.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use stoke_protocol::ids::{Fingerprint, Step, Term};
use stoke_protocol::message::rank::RankId;
use stoke_protocol::transport::TransportError;

use super::operation::Unexpected;

/// Stays with the exchange: every later call gets the first error again.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ExchangeError {
    #[error("open the endpoint for peers")]
    Bind(#[source] Arc<TransportError>),
    #[error("these credentials are not of a rank: {found}")]
    NotARank { found: String },
    #[error("peers of {own}: {reason}")]
    Membership { own: RankId, reason: String },
    #[error("connect to {peer} at {address} within {} s", within.as_secs())]
    Unreachable {
        peer: RankId,
        address: SocketAddr,
        within: Duration,
        #[source]
        source: Arc<TransportError>,
    },
    #[error("wait for {peer} to connect: nothing in {} s; can its machine reach UDP {own}?", within.as_secs())]
    Absent { peer: RankId, own: SocketAddr, within: Duration },
    #[error("the endpoint for peers was closed")]
    EndpointClosed,
    #[error("lost {peer}")]
    PeerLost {
        peer: RankId,
        #[source]
        source: Arc<TransportError>,
    },
    #[error("{peer} left before the sum was complete")]
    PeerLeft { peer: RankId },
    #[error("{peer} speaks for {theirs}, this is {ours}")]
    StaleTerm { peer: RankId, theirs: Term, ours: Term },
    #[error("refuse a frame of {peer}")]
    Refused {
        peer: RankId,
        #[source]
        source: Unexpected,
    },
    #[error("{peer} sent {count} values at once, more than the cap of {cap}")]
    TooLarge { peer: RankId, count: u32, cap: usize },
    #[error("state of {peer} is refused: {problem}")]
    State { peer: RankId, problem: String },
    #[error("sum of {step} after {last}: steps must grow")]
    StepOrder { step: Step, last: Step },
    #[error("after {step} the ranks' parameters are not the same")]
    Differ { step: Step, replicas: Vec<(RankId, Fingerprint)> },
    #[error("exchange was stopped: {reason}")]
    Aborted { reason: String },
}
