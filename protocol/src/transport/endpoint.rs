//! Endpoints: a socket with a place to run, an identity and settings. Owns making and ending them and dialling; accepting is the gate's.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use quinn::{AsyncUdpSocket, EndpointConfig, ServerConfig, ValidationTokenConfig};
use quinn_proto::HashedConnectionIdGenerator;
use ring::hmac;
use ring::rand::{SecureRandom, SystemRandom};
use tokio::sync::{Mutex, mpsc};
use tokio::task::AbortHandle;
use tokio::time::timeout;

use super::connection::Connection;
use super::error::{CloseCode, Closed, TransportError};
use super::frames::{FrameReceiver, FrameSender, StreamKind};
use super::gate::{Accepted, Gate};
use super::io::Io;
use super::settings::{PathMtu, Settings};
use super::socket::{self, SEND_BYTES_MAX, SOCKET_BUFFER_BYTES, Socket, SocketBuffers};
use super::{ALPN_JOIN, HALF_OPEN_MAX, HANDSHAKE_MAX, STRANGER_BYTES_MAX};
use crate::codec::FrameCap;
use crate::identity::{
    AuthorityPin, Credentials, Failure, JoinToken, KeyRequest, PeerError, Subject, client_config, joining_config,
};
use crate::identity::{leaf_expires_at, leaf_identity, server_config};
use crate::message::join::{JoinReply, JoinRequest, Wants};

/// TLS wants a name where nobody uses one: identities are URIs in certificates.
const SERVER_NAME: &str = "stoke";

/// How long a close waits for its farewell packets to be acknowledged.
const CLOSE_MAX: Duration = Duration::from_millis(500);

/// Connections that passed the gate and wait for [`Endpoint::accept`]; further ones are told to try again.
const ACCEPTED_MAX: usize = 256;

const CID_KEY_CONTEXT: &str = "stoke quic connection id key v1";

/// Where an endpoint's packets come from.
#[derive(Debug)]
pub enum Bind {
    /// A UDP socket of the system.
    Address(SocketAddr),
    /// Someone else's packets, a simulator's; `seed` makes the endpoint's choices repeatable.
    Socket { socket: Arc<dyn AsyncUdpSocket>, seed: [u8; 32] },
}

impl From<SocketAddr> for Bind {
    fn from(address: SocketAddr) -> Self {
        Self::Address(address)
    }
}

/// An endpoint. Clones share it. When the last is dropped it accepts no more; its connections live on until they are dropped or closed.
#[derive(Clone)]
pub struct Endpoint(Arc<Inner>);

struct Inner {
    quinn: quinn::Endpoint,
    settings: Settings,
    credentials: Option<Credentials>,
    buffers: Option<SocketBuffers>,
    accepted: Mutex<mpsc::Receiver<Accepted>>,
    gate: Option<AbortHandle>,
    io: Io,
}

impl Endpoint {
    /// Listens, and dials as well. Control settings serve `stoke/join/1` and `stoke/cluster/1`, bulk settings `stoke/peer/1`.
    pub fn server(
        io: &Io,
        bind: impl Into<Bind>,
        settings: Settings,
        credentials: Credentials,
    ) -> Result<Self, TransportError> {
        let configs = server_configs(&settings, &credentials)?;
        let (quinn, buffers) = open(io, bind.into(), Some(configs[&PathMtu::Ethernet].as_ref()), Some(&credentials))?;
        let (to_accepted, accepted) = mpsc::channel(ACCEPTED_MAX);
        let gate = Gate::new(quinn.clone(), settings.clone(), configs, io.downgrade(), to_accepted);
        let gate = Some(io.spawn(gate.run()).abort_handle());
        let (credentials, accepted, io) = (Some(credentials), Mutex::new(accepted), io.clone());
        Ok(Self(Arc::new(Inner { quinn, settings, credentials, buffers, accepted, gate, io })))
    }

    /// Dials only.
    pub fn client(
        io: &Io,
        bind: impl Into<Bind>,
        settings: Settings,
        credentials: Credentials,
    ) -> Result<Self, TransportError> {
        Self::dialling(io, bind.into(), settings, Some(credentials))
    }

    /// Can only [`Endpoint::join`]: for a machine or a person that has no certificate yet.
    pub fn stranger(io: &Io, bind: impl Into<Bind>) -> Result<Self, TransportError> {
        Self::dialling(io, bind.into(), Settings::control(), None)
    }

    fn dialling(
        io: &Io,
        bind: Bind,
        settings: Settings,
        credentials: Option<Credentials>,
    ) -> Result<Self, TransportError> {
        let (quinn, buffers) = open(io, bind, None, credentials.as_ref())?;
        let (_, accepted) = mpsc::channel(1);
        let (accepted, io) = (Mutex::new(accepted), io.clone());
        Ok(Self(Arc::new(Inner { quinn, settings, credentials, buffers, accepted, gate: None, io })))
    }

    /// Connects to `expected` at `address`, and to nobody else. A server that refuses our certificate says so on the first stream, after
    /// this has returned (TLS 1.3 checks the client last).
    pub async fn connect(&self, address: SocketAddr, expected: &Subject) -> Result<Connection, TransportError> {
        let credentials = self.0.credentials.as_ref().ok_or(TransportError::NoCredentials)?;
        let (tls, failure) =
            client_config(credentials, expected, self.0.settings.spoken()).map_err(TransportError::Tls)?;
        let quinn = self.dial(address, tls, &failure).await?;
        let leaf = peer_leaf(&quinn).ok_or(TransportError::Peer { address, peer: PeerError::UnknownAuthority })?;
        let peer = leaf_identity(&leaf).map_err(|peer| TransportError::Peer { address, peer })?;
        let expires_at = leaf_expires_at(&leaf).unwrap_or(SystemTime::UNIX_EPOCH);
        Ok(Connection::new(quinn, peer, expires_at, self.0.io.clone()))
    }

    /// Exchanges a token and a certificate request for credentials. The secret is sent only to a coordinator whose chain holds the CA that
    /// the token names.
    pub async fn join(
        &self,
        address: SocketAddr,
        token: &JoinToken,
        wants: Wants,
        key: KeyRequest,
    ) -> Result<Credentials, TransportError> {
        let pin = AuthorityPin { ca_hash: token.ca_hash, found: Arc::default() };
        let (tls, failure) = joining_config(&pin, ALPN_JOIN).map_err(TransportError::Tls)?;
        let quinn = self.dial(address, tls, &failure).await?;
        let request =
            JoinRequest { token: token.id, secret: token.secret.expose(), wants, csr: key.csr().to_vec().into() };
        let deadline = TransportError::Deadline { what: "wait for the coordinator to let us in", after: HANDSHAKE_MAX };
        let reply = timeout(HANDSHAKE_MAX, ask_to_join(&quinn, &request)).await.map_err(|_| deadline)??;
        quinn.close(CloseCode::Done.into(), b"joined");
        let certificate = match reply {
            JoinReply::Accepted { certificate } => certificate,
            JoinReply::Refused { reason } => return Err(TransportError::JoinRefused { reason }),
        };
        let authority = pin.found.lock().expect("no holder of this lock panics").take();
        let authority = authority.expect("the verifier keeps the authority of every chain that it accepts");
        Ok(key.accept(&certificate, &[authority])?)
    }

    /// The next joiner or session. None once the endpoint is closed.
    pub async fn accept(&self) -> Option<Accepted> {
        self.0.accepted.lock().await.recv().await
    }

    pub fn local_addr(&self) -> Result<SocketAddr, TransportError> {
        self.0.quinn.local_addr().map_err(TransportError::Endpoint)
    }

    /// What the kernel gave; none for a simulated socket.
    pub fn socket_buffers(&self) -> Option<SocketBuffers> {
        self.0.buffers
    }

    /// Connections of this endpoint, half-open ones among them.
    pub fn open_connections(&self) -> usize {
        self.0.quinn.open_connections()
    }

    pub fn io(&self) -> &Io {
        &self.0.io
    }

    /// Closes every connection with this code, accepts no more, and waits shortly for the peers to hear of it.
    pub async fn close(&self, code: CloseCode, reason: &str) {
        if let Some(gate) = &self.0.gate {
            gate.abort();
        }
        self.0.quinn.close(code.into(), reason.as_bytes());
        let _ = timeout(CLOSE_MAX, self.0.quinn.wait_idle()).await;
    }

    pub(super) async fn dial(
        &self,
        address: SocketAddr,
        tls: rustls::ClientConfig,
        failure: &Failure,
    ) -> Result<quinn::Connection, TransportError> {
        let quic = QuicClientConfig::try_from(tls).expect("the provider has the suite of initial packets");
        let mut config = quinn::ClientConfig::new(Arc::new(quic));
        let path = self.0.settings.path_towards(address.ip());
        config.transport_config(self.0.settings.client_transport(path));
        let refused = |reason: quinn::ConnectError| TransportError::Address { address, reason: reason.to_string() };
        let connecting = self.0.quinn.connect_with(config, address, SERVER_NAME).map_err(refused)?;
        let silent = TransportError::NoAnswer { address, after: HANDSHAKE_MAX };
        let Ok(connected) = timeout(HANDSHAKE_MAX, connecting).await else { return Err(silent) };
        connected.map_err(|error| {
            if let Some(peer) = failure.lock().expect("no holder of this lock panics").take() {
                return TransportError::Peer { address, peer };
            }
            match Closed::from(error) {
                Closed::Silent => silent,
                closed => TransportError::Connect { address, closed },
            }
        })
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        if let Some(gate) = &self.gate {
            gate.abort();
        }
    }
}

impl std::fmt::Debug for Endpoint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Endpoint({:?})", self.0.quinn.local_addr().ok())
    }
}

/// The first certificate that the peer showed, as DER.
pub(super) fn peer_leaf(quinn: &quinn::Connection) -> Option<Vec<u8>> {
    let chain = quinn.peer_identity()?.downcast::<Vec<rustls::pki_types::CertificateDer<'static>>>().ok()?;
    chain.first().map(|leaf| leaf.to_vec())
}

async fn ask_to_join(quinn: &quinn::Connection, request: &JoinRequest) -> Result<JoinReply, TransportError> {
    let (send, receive) = quinn.open_bi().await?;
    let mut sender = FrameSender::new(send, FrameCap::Control, None);
    sender.announce(StreamKind::Request).await?;
    sender.send(request).await?;
    sender.finish()?;
    FrameReceiver::new(receive, FrameCap::Control, None).expect().await
}

fn open(
    io: &Io,
    bind: Bind,
    server: Option<&ServerConfig>,
    credentials: Option<&Credentials>,
) -> Result<(quinn::Endpoint, Option<SocketBuffers>), TransportError> {
    let mut config = endpoint_config(credentials);
    let (socket, buffers): (Arc<dyn AsyncUdpSocket>, _) = match bind {
        Bind::Address(address) => {
            let failed = |source| TransportError::Bind { address, source };
            let (socket, buffers) = socket::bind(address).map_err(failed)?;
            if buffers.receive_bytes.min(buffers.send_bytes) < SOCKET_BUFFER_BYTES {
                tracing::debug!(%address, ?buffers, "UDP buffers are smaller than asked: raise net.core.rmem_max and wmem_max");
            }
            (Arc::new(io.enter(|| Socket::new(socket)).map_err(failed)?), Some(buffers))
        }
        Bind::Socket { socket, seed } => {
            config.rng_seed(Some(seed));
            (socket, None)
        }
    };
    let quinn = quinn::Endpoint::new_with_abstract_socket(config, server.cloned(), socket, io.runtime())
        .map_err(TransportError::Endpoint)?;
    Ok((quinn, buffers))
}

/// Reset and connection-id keys come from the credentials, so that a restarted process recognises its predecessor's connections and resets
/// them at once, instead of leaving its peers to their idle time-out.
fn endpoint_config(credentials: Option<&Credentials>) -> EndpointConfig {
    let secret = credentials.map_or_else(random_key, Credentials::reset_key);
    let cid_key = blake3::derive_key(CID_KEY_CONTEXT, &secret);
    let cid_key = u64::from_le_bytes(std::array::from_fn(|index| cid_key[index]));
    let mut config = EndpointConfig::new(Arc::new(hmac::Key::new(hmac::HMAC_SHA256, &secret)));
    config.cid_generator(move || Box::new(HashedConnectionIdGenerator::from_key(cid_key)));
    config.max_udp_payload_size(SEND_BYTES_MAX as u16).expect("above QUIC's least of 1,200");
    config
}

fn random_key() -> [u8; 32] {
    let mut key = [0; 32];
    SystemRandom::new().fill(&mut key).expect("the system's random source answers");
    key
}

/// One server configuration a path, alike but for packet sizes.
fn server_configs(
    settings: &Settings,
    credentials: &Credentials,
) -> Result<BTreeMap<PathMtu, Arc<ServerConfig>>, TransportError> {
    let tls = server_config(credentials, settings.served()).map_err(TransportError::Tls)?;
    let quic = QuicServerConfig::try_from(tls).expect("the provider has the suite of initial packets");
    let mut tokens = ValidationTokenConfig::default();
    tokens.sent(0);
    let mut base = ServerConfig::with_crypto(Arc::new(quic));
    base.migration(false)
        .max_incoming(HALF_OPEN_MAX)
        .incoming_buffer_size(STRANGER_BYTES_MAX.into())
        .incoming_buffer_size_total(u64::from(STRANGER_BYTES_MAX) * HALF_OPEN_MAX as u64)
        .retry_token_lifetime(HANDSHAKE_MAX)
        .validation_token_config(tokens);
    let with_path = |path| {
        let mut config = base.clone();
        config.transport_config(settings.server_transport(path));
        (path, Arc::new(config))
    };
    Ok([PathMtu::SameHost, PathMtu::Jumbo, PathMtu::Ethernet].map(with_path).into())
}
