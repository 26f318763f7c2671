//! Becoming a node: a join token is exchanged for credentials, once. Owns the decision whether a folder already belongs to a cluster.

use std::path::Path;

use stoke_protocol::identity::{Credentials, CredentialsError, JoinToken, KeyRequest, Subject};
use stoke_protocol::ids::NodeId;
use stoke_protocol::message::join::Wants;
use stoke_protocol::transport::{Endpoint, Io, TransportError};

use super::disk::identity_dir;
use super::session::{any_port_towards, resolve};

#[derive(Debug, thiserror::Error)]
pub enum JoinError {
    #[error("{0}")]
    Address(String),
    #[error("join the cluster")]
    Transport(#[from] TransportError),
    #[error(transparent)]
    Credentials(#[from] CredentialsError),
    #[error("{dir} belongs to another cluster: choose another folder, or remove it")]
    OtherCluster { dir: String },
    #[error("the coordinator gave an identity that is not a node's: {found}")]
    NotANode { found: String },
}

/// Makes a key, exchanges `token` for a certificate at `address` (`host:port`), and keeps both in `dir`. A folder that has credentials of
/// the token's cluster is left as it is, so that a service may be started with its token again and again; unless their time is over: the machine joins as
/// another node then.
pub async fn join(dir: &Path, address: &str, token: &JoinToken, name: &str) -> Result<NodeId, JoinError> {
    let identity = identity_dir(dir);
    match Credentials::load(&identity) {
        Ok(present) if present.ca_hash() == token.ca_hash => {
            let node = node_of(&present)?;
            if !present.has_ended() {
                return Ok(node);
            }
            tracing::info!(%node, "its certificate has ended: this machine joins anew");
        }
        Ok(_) => return Err(JoinError::OtherCluster { dir: dir.display().to_string() }),
        Err(CredentialsError::Absent { .. }) => {}
        Err(error) => return Err(error.into()),
    }
    let addresses = resolve(address).await.map_err(JoinError::Address)?;
    let mut last = JoinError::Address(format!("{address:?} has no address"));
    for address in addresses {
        let io = Io::thread("stoke-join")?;
        let stranger = Endpoint::stranger(&io, any_port_towards(Some(address.ip()), None))?;
        let wants = Wants::Node { name: name.to_owned() };
        match stranger.join(address, token, wants, KeyRequest::new()?).await {
            Ok(credentials) => {
                let node = node_of(&credentials)?;
                credentials.save(&identity)?;
                return Ok(node);
            }
            // A refusal has used the token up or will not change; another address cannot help.
            Err(error @ TransportError::JoinRefused { .. }) => return Err(error.into()),
            Err(error) => last = error.into(),
        }
    }
    Err(last)
}

/// Which node the holder of these credentials is.
pub(super) fn node_of(credentials: &Credentials) -> Result<NodeId, JoinError> {
    match credentials.identity().subject {
        Subject::Node(node) => Ok(node),
        other => Err(JoinError::NotANode { found: other.to_string() }),
    }
}
