//! Joining: a machine or a user that has a token and no certificate yet. The one conversation without a client certificate (ALPN
//! `stoke/join/1`); one request, one reply, then the connection is closed.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::ids::TokenId;
use crate::list::List;

/// The longest certificate signing request and certificate that are accepted, in bytes: ours are below 600.
pub const CERTIFICATE_BYTES_MAX: usize = 8 * 1024;

/// New member → coordinator, once. Answered by [`JoinReply`].
#[derive(Clone, Serialize, Deserialize)]
pub struct JoinRequest {
    pub token: TokenId,
    /// Sent only after the coordinator's chain was matched with the CA hash of the token.
    pub secret: [u8; 16],
    pub wants: Wants,
    /// PKCS#10, DER. Only its public key is used.
    pub csr: List<u8>,
}

/// What the holder of the token asks to become. A token is scoped to one of these; another is refused (I33).
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Wants {
    /// An agent; `name` is what people call the machine.
    Node { name: String },
    /// A person or a program that uses the command line; the role comes from the token.
    User { name: String },
}

/// Coordinator → new member. Closes the conversation.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum JoinReply {
    /// The leaf certificate (DER); the identity is in its URI SAN.
    Accepted { certificate: List<u8> },
    /// The token is unknown, used, expired, revoked or for another role. The reason says which, and what to do.
    Refused { reason: String },
}

impl fmt::Debug for JoinRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("JoinRequest").field("token", &self.token).field("wants", &self.wants).finish_non_exhaustive()
    }
}
