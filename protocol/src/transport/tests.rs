//! Loopback tests with real sockets: who gets in, how streams and connections end, and that bulk bytes arrive.

mod bulk;
mod corrupt;
mod simulated;

use std::io::{self, IoSliceMut};
use std::net::{Ipv4Addr, SocketAddr};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use tokio::time::timeout;

use super::socket::Socket;
use super::*;
use crate::codec::{CodecError, PROTOCOL_VERSION};
use crate::identity::{
    Authority, AuthorityPin, JoinToken, KeyRequest, PeerError, Subject, TokenSecret, client_config, joining_config,
};
use crate::ids::{ClusterId, Digest, Generation, JobId, NodeId, Rank, TokenId};
use crate::message::join::{JoinReply, Wants};

const HOUR: Duration = Duration::from_secs(3600);
const SOON: Duration = Duration::from_secs(4);
const ANY: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 0);

struct Cluster {
    authority: Authority,
    server: Endpoint,
    address: SocketAddr,
}

fn authority(fill: u8) -> Authority {
    Authority::in_memory(ClusterId([fill; 16])).unwrap()
}

fn io() -> Io {
    Io::thread("stoke-test-net").unwrap()
}

fn node(number: u64) -> Subject {
    Subject::Node(NodeId(number))
}

fn rank(number: u32) -> Subject {
    Subject::Rank { job: JobId(1), generation: Generation(1), rank: Rank(number) }
}

impl Cluster {
    fn start() -> Self {
        let authority = authority(1);
        let credentials = authority.credentials(&Subject::Coordinator, HOUR).unwrap();
        let server = Endpoint::server(&io(), ANY, Settings::control(), credentials).unwrap();
        let address = server.local_addr().unwrap();
        Self { authority, server, address }
    }

    fn member(&self, subject: &Subject) -> Endpoint {
        let credentials = self.authority.credentials(subject, HOUR).unwrap();
        Endpoint::client(&io(), ANY, Settings::control(), credentials).unwrap()
    }

    /// A connected pair: what the node holds, what the coordinator holds.
    async fn pair(&self) -> (Connection, Connection) {
        let member = self.member(&node(7));
        let (dialled, accepted) =
            tokio::join!(member.connect(self.address, &Subject::Coordinator), self.accept_session());
        (dialled.unwrap(), accepted)
    }

    async fn accept_session(&self) -> Connection {
        match timeout(SOON, self.server.accept()).await.unwrap().unwrap() {
            Accepted::Session(connection) => connection,
            Accepted::Join(attempt) => panic!("expected a session, got {attempt:?}"),
        }
    }

    /// A connection of a member to which raw bytes can be written.
    async fn raw(&self) -> quinn::Connection {
        let credentials = self.authority.credentials(&node(7), HOUR).unwrap();
        let (tls, failure) = client_config(&credentials, &Subject::Coordinator, ALPN_CLUSTER).unwrap();
        let endpoint = Endpoint::stranger(&Io::ambient().unwrap(), ANY).unwrap();
        endpoint.dial(self.address, tls, &failure).await.unwrap()
    }

    fn token(&self) -> JoinToken {
        JoinToken { ca_hash: self.authority.ca_hash(), id: TokenId(3), secret: TokenSecret::from_bytes([9; 16]) }
    }
}

async fn closed(connection: &quinn::Connection) -> Closed {
    timeout(SOON, connection.closed()).await.expect("the connection ends").into()
}

fn code(closed: &Closed) -> Option<CloseCode> {
    match closed {
        Closed::ByPeer { code, .. } => Some(*code),
        _ => None,
    }
}

#[tokio::test]
async fn members_exchange_frames_requests_and_datagrams() {
    let cluster = Cluster::start();
    let (dialled, accepted) = cluster.pair().await;
    assert_eq!(accepted.peer().subject, node(7));
    assert_eq!(dialled.peer().subject, Subject::Coordinator);

    let (mut to_server, mut from_server) = dialled.open_frames().await.unwrap();
    to_server.send(&"hello".to_owned()).await.unwrap();
    let (mut to_node, mut from_node) = accepted.accept_frames().await.unwrap();
    assert_eq!(from_node.recv::<String>().await.unwrap().unwrap(), "hello");
    to_node.send(&vec![7u8; 50_000]).await.unwrap();
    to_node.finish().unwrap();
    assert_eq!(from_server.recv::<Vec<u8>>().await.unwrap().unwrap().len(), 50_000);
    assert!(from_server.recv::<String>().await.unwrap().is_none());

    let ask = dialled.request::<u64, u64>(&20, SOON);
    let answer = async {
        let (question, reply) = accepted.accept_request().await.unwrap().read::<u64>().await.unwrap();
        reply.send(&(question + 1)).await.unwrap();
    };
    assert_eq!(tokio::join!(ask, answer).0.unwrap(), 21);

    let mut lines = dialled.request_frames(&1u64).await.unwrap();
    let (_, reply) = accepted.accept_request().await.unwrap().read::<u64>().await.unwrap();
    let mut reply = reply.into_frames();
    for line in 0..100u64 {
        reply.send(&line).await.unwrap();
    }
    reply.finish().unwrap();
    for line in 0..100 {
        assert_eq!(lines.recv::<u64>().await.unwrap(), Some(line));
    }
    assert_eq!(lines.recv::<u64>().await.unwrap(), None);

    dialled.send_datagram(&77u64).unwrap();
    assert_eq!(timeout(SOON, accepted.recv_datagram::<u64>()).await.unwrap().unwrap(), 77);
}

#[tokio::test]
async fn windows_open_after_the_gate() {
    let cluster = Cluster::start();
    let (dialled, accepted) = cluster.pair().await;
    let mut sender = dialled.open_bulk().await.unwrap();
    // Sixteen times what a stranger may have unread, while nobody reads.
    let write = sender.write_chunk(vec![1; 1 << 20].into());
    timeout(SOON, write).await.expect("the member's window takes it").unwrap();
    let _receiver = accepted.accept_bulk().await.unwrap();
    let many = futures_util::future::join_all((0..200).map(|_| dialled.open_frames()));
    assert!(timeout(SOON, many).await.unwrap().iter().all(Result::is_ok));
}

#[tokio::test]
async fn no_certificate_is_refused_on_the_cluster_protocol() {
    let cluster = Cluster::start();
    let pin = AuthorityPin { ca_hash: cluster.authority.ca_hash(), found: Arc::default() };
    let (tls, failure) = joining_config(&pin, ALPN_CLUSTER).unwrap();
    let endpoint = Endpoint::stranger(&io(), ANY).unwrap();
    let connection = endpoint.dial(cluster.address, tls, &failure).await.unwrap();
    assert_eq!(code(&closed(&connection).await), Some(CloseCode::Unauthenticated));
}

#[tokio::test]
async fn a_server_of_another_cluster_is_refused() {
    let cluster = Cluster::start();
    let foreign = authority(1).credentials(&node(7), HOUR).unwrap();
    let endpoint = Endpoint::client(&io(), ANY, Settings::control(), foreign).unwrap();
    let refused = endpoint.connect(cluster.address, &Subject::Coordinator).await.unwrap_err();
    assert!(matches!(refused, TransportError::Peer { peer: PeerError::UnknownAuthority, .. }), "{refused}");
}

#[tokio::test]
async fn a_client_of_another_cluster_is_refused() {
    let cluster = Cluster::start();
    // Trusts the right authority, shows a certificate of another with the same cluster id.
    let own = cluster.authority.credentials(&node(7), HOUR).unwrap();
    let foreign = authority(1).credentials(&node(7), HOUR).unwrap();
    let (mut tls, failure) = client_config(&own, &Subject::Coordinator, ALPN_CLUSTER).unwrap();
    tls.client_auth_cert_resolver =
        client_config(&foreign, &Subject::Coordinator, ALPN_CLUSTER).unwrap().0.client_auth_cert_resolver;
    let endpoint = Endpoint::stranger(&io(), ANY).unwrap();
    let end = match endpoint.dial(cluster.address, tls, &failure).await {
        Ok(connection) => closed(&connection).await,
        Err(error) => error.closed().expect("a connection that was refused").clone(),
    };
    let Closed::Refused { reason } = end else { panic!("{end:?}") };
    assert!(reason.contains("another cluster"), "{reason}");
}

#[tokio::test]
async fn another_subject_than_expected_is_refused() {
    let cluster = Cluster::start();
    let refused = cluster.member(&node(7)).connect(cluster.address, &node(8)).await.unwrap_err();
    assert!(matches!(refused, TransportError::Peer { peer: PeerError::OtherSubject { .. }, .. }), "{refused}");
    assert!(refused.to_string().contains("/node/8"), "{refused}");
}

#[tokio::test]
async fn a_rank_may_not_speak_the_cluster_protocol() {
    let cluster = Cluster::start();
    let connection = cluster.member(&rank(0)).connect(cluster.address, &Subject::Coordinator).await.unwrap();
    assert_eq!(code(&connection.closed().await), Some(CloseCode::WrongRole));
    let refused = connection.request::<u64, u64>(&1, SOON).await.unwrap_err();
    assert!(refused.to_string().contains("may not speak stoke/cluster/1"), "{refused}");
}

#[tokio::test]
async fn a_joiner_with_the_right_pin_becomes_a_member() {
    let cluster = Cluster::start();
    let stranger = Endpoint::stranger(&io(), ANY).unwrap();
    let token = cluster.token();
    let wants = Wants::Node { name: "n1".to_owned() };
    let join = stranger.join(cluster.address, &token, wants.clone(), KeyRequest::new().unwrap());
    let answer = async {
        let Some(Accepted::Join(attempt)) = cluster.server.accept().await else { panic!("expected a join") };
        assert_eq!((attempt.request().token, attempt.request().secret), (TokenId(3), [9; 16]));
        assert_eq!(attempt.request().wants, wants);
        let issued = cluster.authority.issue(&attempt.request().csr, &node(5), HOUR).unwrap();
        attempt.reply(&JoinReply::Accepted { certificate: issued.certificate.into() }).await.unwrap();
    };
    let credentials = tokio::join!(join, answer).0.unwrap();
    assert_eq!(credentials.identity().subject, node(5));
    let member = Endpoint::client(&io(), ANY, Settings::control(), credentials).unwrap();
    let connection = member.connect(cluster.address, &Subject::Coordinator).await.unwrap();
    assert_eq!(cluster.accept_session().await.peer().subject, node(5));
    drop(connection);
}

#[tokio::test]
async fn a_wrong_pin_stops_the_join_before_the_token_is_sent() {
    let cluster = Cluster::start();
    let stranger = Endpoint::stranger(&io(), ANY).unwrap();
    let token = JoinToken { ca_hash: Digest([0; 32]), ..cluster.token() };
    let wants = Wants::User { name: "ada".to_owned() };
    let refused = stranger.join(cluster.address, &token, wants, KeyRequest::new().unwrap()).await.unwrap_err();
    assert!(matches!(refused, TransportError::Peer { peer: PeerError::OtherPin, .. }), "{refused}");
    assert!(timeout(Duration::from_millis(100), cluster.server.accept()).await.is_err());
}

#[tokio::test]
async fn a_refused_join_carries_the_reason() {
    let cluster = Cluster::start();
    let stranger = Endpoint::stranger(&io(), ANY).unwrap();
    let (token, wants) = (cluster.token(), Wants::User { name: "ada".to_owned() });
    let join = stranger.join(cluster.address, &token, wants, KeyRequest::new().unwrap());
    let answer = async {
        let Some(Accepted::Join(attempt)) = cluster.server.accept().await else { panic!("expected a join") };
        attempt.reply(&JoinReply::Refused { reason: "token-3 has expired".to_owned() }).await.unwrap();
    };
    let refused = tokio::join!(join, answer).0.unwrap_err();
    assert_eq!(refused.to_string(), "join refused: token-3 has expired");
}

#[tokio::test]
async fn only_the_coordinator_of_the_pinned_cluster_is_told_the_token() {
    // A node of the cluster that poses as its coordinator.
    let authority = authority(1);
    let impostor = authority.credentials(&node(66), HOUR).unwrap();
    let server = Endpoint::server(&io(), ANY, Settings::control(), impostor).unwrap();
    let token = JoinToken { ca_hash: authority.ca_hash(), id: TokenId(1), secret: TokenSecret::random() };
    let stranger = Endpoint::stranger(&io(), ANY).unwrap();
    let wants = Wants::Node { name: "n1".to_owned() };
    let refused =
        stranger.join(server.local_addr().unwrap(), &token, wants, KeyRequest::new().unwrap()).await.unwrap_err();
    assert!(matches!(refused, TransportError::Peer { peer: PeerError::OtherSubject { .. }, .. }), "{refused}");
}

#[tokio::test]
async fn renewal_keeps_old_connections_and_shows_in_new_ones() {
    let cluster = Cluster::start();
    let credentials = cluster.authority.credentials(&node(7), HOUR).unwrap();
    let member = Endpoint::client(&io(), ANY, Settings::control(), credentials.clone()).unwrap();
    let old = member.connect(cluster.address, &Subject::Coordinator).await.unwrap();
    let old_seen = cluster.accept_session().await;

    let request = KeyRequest::new().unwrap();
    let issued = cluster.authority.issue(request.csr(), &node(7), 5 * HOUR).unwrap();
    credentials.renew(request, &issued.certificate).unwrap();
    let _new = member.connect(cluster.address, &Subject::Coordinator).await.unwrap();
    let new_seen = cluster.accept_session().await;
    assert!(new_seen.peer_expires_at() > old_seen.peer_expires_at() + HOUR);

    let answer = async {
        let (question, reply) = old_seen.accept_request().await.unwrap().read::<u64>().await.unwrap();
        reply.send(&question).await.unwrap();
    };
    assert_eq!(tokio::join!(old.request::<u64, u64>(&5, SOON), answer).0.unwrap(), 5);
}

#[tokio::test]
async fn an_expired_certificate_is_refused_with_advice() {
    let cluster = Cluster::start();
    // Not after is now plus nothing: over by the time of the handshake, which has a resolution of seconds.
    let credentials = cluster.authority.credentials(&node(7), Duration::ZERO).unwrap();
    while credentials.expires_at().elapsed().map_or(true, |over| over < Duration::from_secs(1)) {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let member = Endpoint::client(&io(), ANY, Settings::control(), credentials).unwrap();
    let end = match member.connect(cluster.address, &Subject::Coordinator).await {
        Ok(connection) => connection.closed().await,
        Err(error) => error.closed().expect("a connection that was refused").clone(),
    };
    assert!(end.to_string().contains("expired"), "{end}");
}

#[tokio::test]
async fn a_frame_over_the_cap_closes_with_its_code() {
    let cluster = Cluster::start();
    let raw = cluster.raw().await;
    let accepted = cluster.accept_session().await;
    let (mut send, _receive) = raw.open_bi().await.unwrap();
    send.write_all(&[1]).await.unwrap();
    send.write_all(&u32::MAX.to_le_bytes()).await.unwrap();
    let (_sender, mut receiver) = accepted.accept_frames().await.unwrap();
    let refused = receiver.recv::<String>().await.unwrap_err();
    assert!(matches!(refused, TransportError::Frame(CodecError::TooLarge { .. })), "{refused}");
    assert_eq!(code(&closed(&raw).await), Some(CloseCode::FrameTooLarge));
}

#[tokio::test]
async fn a_frame_of_another_version_closes_with_its_code() {
    let cluster = Cluster::start();
    let raw = cluster.raw().await;
    let accepted = cluster.accept_session().await;
    let (mut send, _receive) = raw.open_bi().await.unwrap();
    send.write_all(&[1, 2, 0, 0, 0, PROTOCOL_VERSION + 1, 0]).await.unwrap();
    let (_sender, mut receiver) = accepted.accept_frames().await.unwrap();
    let refused = receiver.recv::<u8>().await.unwrap_err();
    assert!(matches!(refused, TransportError::Frame(CodecError::Version { .. })), "{refused}");
    let end = closed(&raw).await;
    assert_eq!(code(&end), Some(CloseCode::Version));
    assert!(end.to_string().contains("run the same stoke release"), "{end}");
}

#[tokio::test]
async fn a_stream_that_does_not_say_what_it_is_closes_the_connection() {
    let cluster = Cluster::start();
    let raw = cluster.raw().await;
    let _accepted = cluster.accept_session().await;
    let (mut send, _receive) = raw.open_bi().await.unwrap();
    send.write_all(&[200]).await.unwrap();
    assert_eq!(code(&closed(&raw).await), Some(CloseCode::Malformed));
}

#[tokio::test]
async fn a_silent_stream_does_not_hold_up_later_ones() {
    let cluster = Cluster::start();
    let raw = cluster.raw().await;
    let accepted = cluster.accept_session().await;
    // Opening the second stream opens the first, of which no byte ever comes.
    let _silent = raw.open_bi().await.unwrap();
    let (mut send, _receive) = raw.open_bi().await.unwrap();
    send.write_all(&[1]).await.unwrap();
    assert!(timeout(SOON, accepted.accept_frames()).await.unwrap().is_ok());
}

#[tokio::test]
async fn a_dropped_sender_is_not_a_clean_end() {
    let cluster = Cluster::start();
    let (dialled, accepted) = cluster.pair().await;
    let (mut sender, _receiver) = dialled.open_frames().await.unwrap();
    sender.send(&1u64).await.unwrap();
    let (_sender, mut receiver) = accepted.accept_frames().await.unwrap();
    assert_eq!(receiver.recv::<u64>().await.unwrap(), Some(1));
    drop(sender);
    let end = receiver.recv::<u64>().await.unwrap_err();
    assert!(matches!(end, TransportError::StreamReset { code: CloseCode::Abandoned }), "{end}");

    let mut bulk = dialled.open_bulk().await.unwrap();
    bulk.write_header(&8u64).await.unwrap();
    let mut received = accepted.accept_bulk().await.unwrap();
    assert_eq!(received.read_header::<u64>().await.unwrap(), Some(8));
    drop(bulk);
    assert!(matches!(received.read_chunk(8).await.unwrap_err(), TransportError::StreamReset { .. }));
}

#[tokio::test]
async fn an_unanswered_request_is_an_error_when_dropped_and_after_its_deadline() {
    let cluster = Cluster::start();
    let (dialled, accepted) = cluster.pair().await;
    let drop_it = async {
        let (_, reply) = accepted.accept_request().await.unwrap().read::<u64>().await.unwrap();
        drop(reply);
    };
    let dropped = tokio::join!(dialled.request::<u64, u64>(&1, SOON), drop_it).0.unwrap_err();
    assert!(matches!(dropped, TransportError::StreamReset { code: CloseCode::Abandoned }), "{dropped}");
    let late = dialled.request::<u64, u64>(&1, Duration::from_millis(50)).await.unwrap_err();
    assert!(matches!(late, TransportError::Deadline { .. }), "{late}");
}

#[tokio::test]
async fn a_cancelled_send_poisons_its_stream() {
    let cluster = Cluster::start();
    let (dialled, _accepted) = cluster.pair().await;
    let (mut sender, _receiver) = dialled.open_frames().await.unwrap();
    // Nobody reads: the stream's window fills, and a send is cut short.
    let frame = vec![0u8; 60_000];
    while timeout(Duration::from_millis(100), sender.send(&frame)).await.is_ok() {}
    assert!(matches!(sender.send(&1u8).await, Err(TransportError::Interrupted)));
    assert!(matches!(sender.finish(), Err(TransportError::Interrupted)));
}

#[tokio::test]
async fn receiving_survives_being_cancelled_inside_a_frame() {
    let cluster = Cluster::start();
    let raw = cluster.raw().await;
    let accepted = cluster.accept_session().await;
    let (mut send, _receive) = raw.open_bi().await.unwrap();
    let mut bytes = vec![1];
    bytes.extend(super::frames::frame(&"in pieces".to_owned(), crate::codec::FrameCap::Control).unwrap().concat());
    send.write_all(&bytes[..1]).await.unwrap();
    let (_sender, mut receiver) = accepted.accept_frames().await.unwrap();
    for byte in &bytes[1..bytes.len() - 1] {
        send.write_all(&[*byte]).await.unwrap();
        assert!(timeout(Duration::from_millis(2), receiver.recv::<String>()).await.is_err());
    }
    send.write_all(&bytes[bytes.len() - 1..]).await.unwrap();
    assert_eq!(receiver.recv::<String>().await.unwrap().unwrap(), "in pieces");
}

#[tokio::test]
async fn closing_tells_the_peer_why() {
    let cluster = Cluster::start();
    let (dialled, accepted) = cluster.pair().await;
    let start = Instant::now();
    accepted.close(CloseCode::Superseded, "incarnation 4 has connected");
    let end = dialled.closed().await;
    assert_eq!(end.to_string(), "closed by the peer, superseded: incarnation 4 has connected");
    assert!(start.elapsed() < SOON);
}

#[tokio::test]
async fn a_closed_endpoint_tells_its_peers_and_accepts_no_more() {
    let cluster = Cluster::start();
    let (dialled, _accepted) = cluster.pair().await;
    cluster.server.close(CloseCode::ShuttingDown, "upgrade").await;
    assert_eq!(code(&dialled.closed().await), Some(CloseCode::ShuttingDown));
    assert!(timeout(SOON, cluster.server.accept()).await.unwrap().is_none());
}

#[tokio::test]
async fn the_last_handle_ends_the_thread_and_tells_the_peer() {
    let cluster = Cluster::start();
    let (dialled, accepted) = cluster.pair().await;
    let start = Instant::now();
    // The node's endpoint is gone already: its connection is what keeps its network thread.
    drop(dialled);
    assert_eq!(code(&accepted.closed().await), Some(CloseCode::Abandoned));
    assert!(start.elapsed() < Duration::from_secs(1), "{:?}", start.elapsed());
}

#[tokio::test]
async fn a_port_in_use_is_named() {
    let cluster = Cluster::start();
    let credentials = cluster.authority.credentials(&Subject::Coordinator, HOUR).unwrap();
    let taken = Endpoint::server(&io(), cluster.address, Settings::control(), credentials).unwrap_err().to_string();
    assert!(taken.contains(&cluster.address.to_string()) && taken.contains("in use"), "{taken}");
}

#[tokio::test]
async fn a_silent_address_is_reported_with_advice() {
    let authority = authority(1);
    let credentials = authority.credentials(&node(7), HOUR).unwrap();
    let member = Endpoint::client(&io(), ANY, Settings::control(), credentials).unwrap();
    let deaf = std::net::UdpSocket::bind(ANY).unwrap();
    let address = deaf.local_addr().unwrap();
    let silent = member.connect(address, &Subject::Coordinator).await.unwrap_err().to_string();
    assert!(silent.contains("no answer in 5 s") && silent.contains(&address.port().to_string()), "{silent}");
}

#[tokio::test]
async fn a_restarted_server_resets_its_predecessors_connections() {
    let authority = authority(1);
    let credentials = authority.credentials(&Subject::Coordinator, HOUR).unwrap();
    // A runtime that is torn down without a word, as a killed process is.
    let killed = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let (address_out, address) = tokio::sync::oneshot::channel();
    let own = credentials.clone();
    killed.spawn(async move {
        let server = Endpoint::server(&Io::ambient().unwrap(), ANY, Settings::control(), own).unwrap();
        address_out.send(server.local_addr().unwrap()).unwrap();
        let Some(Accepted::Session(session)) = server.accept().await else { panic!("expected a session") };
        let (question, reply) = session.accept_request().await.unwrap().read::<u64>().await.unwrap();
        reply.send(&question).await.unwrap();
        std::future::pending::<()>().await;
    });
    let address = address.await.unwrap();
    let member = authority.credentials(&node(7), HOUR).unwrap();
    let member = Endpoint::client(&io(), ANY, Settings::control(), member).unwrap();
    let connection = member.connect(address, &Subject::Coordinator).await.unwrap();
    // An answer shows that both sides have finished the handshake; before that there is no connection to reset.
    assert_eq!(connection.request::<u64, u64>(&1, SOON).await.unwrap(), 1);
    killed.shutdown_background();

    let start = Instant::now();
    let _successor = loop {
        match Endpoint::server(&io(), address, Settings::control(), credentials.clone()) {
            Ok(server) => break server,
            Err(error) => assert!(start.elapsed() < SOON, "{error}"),
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    };
    assert_eq!(connection.closed().await, Closed::Restarted);
    assert!(start.elapsed() < Duration::from_secs(3), "{:?}", start.elapsed());
}

/// Sends, and hears nothing.
#[derive(Debug)]
struct Deaf(Arc<Socket>);

impl AsyncUdpSocket for Deaf {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        self.0.clone().create_io_poller()
    }

    fn try_send(&self, transmit: &udp::Transmit<'_>) -> io::Result<()> {
        self.0.try_send(transmit)
    }

    fn poll_recv(
        &self,
        _cx: &mut Context<'_>,
        _bufs: &mut [IoSliceMut<'_>],
        _meta: &mut [udp::RecvMeta],
    ) -> Poll<io::Result<usize>> {
        Poll::Pending
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.0.local_addr()
    }
}

#[tokio::test]
async fn a_member_gets_in_while_strangers_leave_handshakes_half_open() {
    let cluster = Cluster::start();
    let (socket, _) = super::socket::bind(ANY).unwrap();
    let socket = Arc::new(Deaf(Arc::new(Socket::new(socket).unwrap())));
    let credentials = cluster.authority.credentials(&node(66), HOUR).unwrap();
    let bind = Bind::Socket { socket, seed: [1; 32] };
    let flood = Endpoint::client(&Io::ambient().unwrap(), bind, Settings::control(), credentials).unwrap();
    let connect = |_| {
        let (flood, address) = (flood.clone(), cluster.address);
        tokio::spawn(async move { flood.connect(address, &Subject::Coordinator).await.map(drop) })
    };
    let attempts: Vec<_> = (0..300).map(connect).collect();
    let start = Instant::now();
    while cluster.server.open_connections() < 16 {
        assert!(start.elapsed() < SOON, "strangers hold the slots that need no proof of address");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let (_dialled, accepted) = timeout(SOON, cluster.pair()).await.unwrap();
    assert_eq!(accepted.peer().subject, node(7));
    assert!(cluster.server.open_connections() <= HALF_OPEN_PER_ADDRESS_MAX);
    for attempt in attempts {
        attempt.abort();
    }
}
