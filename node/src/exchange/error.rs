//! Why an exchange cannot go on. Every variant names the rank at fault where there is one; all but `Aborted` end the membership: the
//! coordinator decides what comes next.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use stoke_protocol::ids::{Generation, Rank, Step};
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
    Membership { own: Rank, reason: String },
    #[error("connect to {rank} at {address} within {} s", within.as_secs())]
    Unreachable {
        rank: Rank,
        address: SocketAddr,
        within: Duration,
        #[source]
        source: Arc<TransportError>,
    },
    #[error("wait for {rank} to connect: nothing in {} s; can its machine reach UDP {own}?", within.as_secs())]
    Absent { rank: Rank, own: SocketAddr, within: Duration },
    #[error("the endpoint for peers was closed")]
    EndpointClosed,
    #[error("lost {rank}")]
    PeerLost {
        rank: Rank,
        #[source]
        source: Arc<TransportError>,
    },
    #[error("{rank} left before the sum was complete")]
    PeerLeft { rank: Rank },
    #[error("{rank} speaks for {theirs}, this is {ours}")]
    StaleGeneration { rank: Rank, theirs: Generation, ours: Generation },
    #[error("refuse a frame of {rank}")]
    Refused {
        rank: Rank,
        #[source]
        source: Unexpected,
    },
    #[error("{rank} sent {count} values at once, more than the cap of {cap}")]
    TooLarge { rank: Rank, count: u32, cap: usize },
    #[error("sum of {step} after {last}: steps must grow")]
    StepOrder { step: Step, last: Step },
    #[error("exchange was stopped: {reason}")]
    Aborted { reason: String },
}
