//! A peer that does not keep to the rules, against a coordinator that serves others: no certificate, a certificate of another cluster, frames
//! over the cap, of another version, of nothing. Speaks raw QUIC, so that nothing of ours on this side is polite.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use quinn::crypto::rustls::QuicClientConfig;
use quinn::{ConnectionError, VarInt};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::{DigitallySignedStruct, SignatureScheme};
use stoke_protocol::codec::{FrameCap, PROTOCOL_VERSION};
use stoke_protocol::identity::{Authority, Subject, UserRole};
use stoke_protocol::ids::ClusterId;

use crate::harness::{Background, Cluster, LIMIT, stoke};

/// First byte of a stream that asks one question.
const REQUEST: u8 = 2;
const CLUSTER: &[u8] = b"stoke/cluster/1";

/// Close codes of the transport, as they are on the wire.
const UNAUTHENTICATED: u32 = 2;
const VERSION: u32 = 4;
const FRAME_TOO_LARGE: u32 = 5;
const MALFORMED: u32 = 6;

/// A TLS alert in QUIC: 0x100 and the alert.
const UNKNOWN_CA: u64 = 0x100 + 48;

/// Believes anybody: this side is the attacker.
#[derive(Debug)]
struct Credulous;

impl ServerCertVerifier for Credulous {
    fn verify_server_cert(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        vec![SignatureScheme::ED25519]
    }
}

fn tls(credentials: Option<&Path>) -> rustls::ClientConfig {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .expect("TLS 1.3")
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Credulous));
    let mut config = match credentials {
        None => builder.with_no_client_auth(),
        Some(dir) => {
            let path = dir.join("identity.pem");
            let chain =
                CertificateDer::pem_file_iter(&path).expect("a certificate").map(|der| der.expect("PEM")).collect();
            let key = PrivateKeyDer::from_pem_file(&path).expect("a key");
            builder.with_client_auth_cert(chain, key).expect("a key that fits")
        }
    };
    config.alpn_protocols = vec![CLUSTER.to_vec()];
    config
}

/// Opens a stream with these bytes and tells how the coordinator ended the connection.
fn send(credentials: Option<&Path>, bytes: &[u8]) -> ConnectionError {
    let cluster = Cluster::shared();
    let address = cluster.address().parse().expect("an address");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let quic = QuicClientConfig::try_from(tls(credentials)).expect("a QUIC suite");
        let endpoint = quinn::Endpoint::client(([127, 0, 0, 1], 0).into()).expect("a socket");
        let connecting =
            endpoint.connect_with(quinn::ClientConfig::new(Arc::new(quic)), address, "stoke").expect("dialled");
        let connection = match connecting.await {
            Ok(connection) => connection,
            Err(error) => return error,
        };
        if let Ok((mut sender, _receiver)) = connection.open_bi().await {
            let _ = sender.write_all(bytes).await;
            // A refusal may come before the bytes: then there is nobody to send them to.
            let closed = tokio::time::timeout(LIMIT, connection.closed()).await;
            return closed.expect("the coordinator ends the connection");
        }
        connection.closed().await
    })
}

fn frame(payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).expect("a short frame").to_le_bytes();
    [&[REQUEST][..], &length, payload].concat()
}

#[track_caller]
fn closed_with(error: &ConnectionError, code: u32) {
    let ConnectionError::ApplicationClosed(close) = error else { panic!("closed otherwise: {error:?}") };
    assert_eq!(close.error_code, VarInt::from_u32(code), "{error:?}");
    assert!(!close.reason.is_empty(), "a close says why");
}

#[track_caller]
fn refused_by_tls(error: &ConnectionError, alert: u64) {
    let ConnectionError::ConnectionClosed(close) = error else { panic!("closed otherwise: {error:?}") };
    assert_eq!(u64::from(close.error_code), alert, "{error:?}");
}

#[test]
fn a_client_without_a_certificate_is_refused() {
    closed_with(&send(None, &frame(&[PROTOCOL_VERSION, 1])), UNAUTHENTICATED);
    Cluster::shared().run(&["status"]).expect(0);
}

#[test]
fn a_certificate_of_another_cluster_is_refused_on_both_sides() {
    let cluster = Cluster::shared();
    let dir = tempfile::tempdir().expect("a temporary folder");
    let stranger = Authority::in_memory(ClusterId([9; 16])).expect("an authority");
    let admin = Subject::user(UserRole::Admin, "mallory").expect("a name");
    let credentials = stranger.credentials(&admin, Duration::from_secs(3600)).expect("credentials");
    credentials.save(dir.path()).expect("saved");
    refused_by_tls(&send(Some(dir.path()), &frame(&[PROTOCOL_VERSION, 1])), UNKNOWN_CA);
    // And an honest client of that other cluster does not trust this one.
    let file = format!("cluster = {:?}\ncoordinator = [{:?}]\n", "09".repeat(16), cluster.address());
    std::fs::write(dir.path().join("cluster.toml"), file).expect("written");
    let mut command = stoke(["status", "--cluster"]);
    command.arg(dir.path());
    Background::start(command).wait().expect(4).says(&["not of this cluster's authority"]);
}

#[test]
fn frames_that_break_the_rules_end_their_connection_and_no_other() {
    let cluster = Cluster::shared();
    let admin = cluster.dir().join("coordinator/admin");
    let too_long = u32::try_from(FrameCap::Request.bytes() + 1).expect("a length").to_le_bytes();
    closed_with(&send(Some(&admin), &[&[REQUEST][..], &too_long].concat()), FRAME_TOO_LARGE);
    closed_with(&send(Some(&admin), &frame(&[PROTOCOL_VERSION + 1, 1])), VERSION);
    closed_with(&send(Some(&admin), &frame(&[])), MALFORMED);
    closed_with(&send(Some(&admin), &frame(&[PROTOCOL_VERSION, 250, 250, 250])), MALFORMED);
    closed_with(&send(Some(&admin), &[77]), MALFORMED);
    cluster.run(&["status"]).expect(0);
}
