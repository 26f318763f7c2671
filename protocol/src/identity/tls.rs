//! TLS 1.3 as the cluster uses it: who is trusted, and that a certificate's URI is the expected subject of the same cluster. Owns the
//! verifiers; knows rustls and nothing of QUIC.
//!
//! No resumption, no tickets and no early data: a resumed session would skip the checks of this file and outlive a renewal.

use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, SystemTime};

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{ResolvesClientCert, Resumption, verify_server_cert_signed_by_trust_anchor};
use rustls::crypto::{CryptoProvider, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{
    ClientHello, NoServerSessionStorage, ParsedCertificate, ResolvesServerCert, WebPkiClientVerifier,
};
use rustls::sign::CertifiedKey;
use rustls::{
    CertificateError, CipherSuite, ClientConfig, DigitallySignedStruct, DistinguishedName, RootCertStore, ServerConfig,
    SignatureScheme,
};
use x509_parser::certificate::X509Certificate;
use x509_parser::extensions::GeneralName;

use super::authority::authority_uri;
use super::credentials::Credentials;
use super::name::{Identity, Subject};
use crate::ids::Digest;

/// Why a peer's certificate was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PeerError {
    #[error(
        "its certificate is not of this cluster's authority: is the address right, and was this machine joined to another cluster?"
    )]
    UnknownAuthority,
    #[error("its certificate has expired: check that machine's clock and that it renews")]
    Expired,
    #[error("its certificate is not valid yet: check the clocks of both machines")]
    NotYetValid,
    #[error("it is {found}, expected {expected}")]
    OtherSubject { expected: String, found: String },
    #[error(
        "no certificate of its chain has the hash in the join token: the address belongs to another cluster, or something sits in between"
    )]
    OtherPin,
    #[error("its certificate is not one of stoke's: {reason}")]
    Foreign { reason: String },
}

impl PeerError {
    fn of(error: rustls::Error) -> Self {
        match error {
            rustls::Error::InvalidCertificate(CertificateError::UnknownIssuer | CertificateError::BadSignature) => {
                Self::UnknownAuthority
            }
            rustls::Error::InvalidCertificate(CertificateError::Expired | CertificateError::ExpiredContext { .. }) => {
                Self::Expired
            }
            rustls::Error::InvalidCertificate(
                CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. },
            ) => Self::NotYetValid,
            other => Self::Foreign { reason: other.to_string() },
        }
    }
}

/// A failed check of a peer, kept because TLS would only report an alert.
pub(crate) type Failure = Arc<Mutex<Option<PeerError>>>;

/// The authority that a join token names, and its certificate once it was seen.
#[derive(Clone, Debug)]
pub(crate) struct AuthorityPin {
    pub(crate) ca_hash: Digest,
    pub(crate) found: Arc<Mutex<Option<Vec<u8>>>>,
}

/// TLS of a server: own certificate, clients' certificates asked for but not demanded (the gate in transport decides by protocol).
pub(crate) fn server_config(credentials: &Credentials, protocols: &[&[u8]]) -> Result<ServerConfig, rustls::Error> {
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_client_cert_verifier(Arc::new(ClientIsMember(credentials.clone())))
        .with_cert_resolver(Arc::new(Presented(credentials.clone())));
    config.alpn_protocols = protocols.iter().map(|protocol| protocol.to_vec()).collect();
    config.max_early_data_size = 0;
    config.send_tls13_tickets = 0;
    config.session_storage = Arc::new(NoServerSessionStorage {});
    Ok(config)
}

/// TLS of a web server with a certificate of its own; clients' certificates are asked for but not demanded.
pub(super) fn web_config(
    credentials: &Credentials,
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
) -> Result<ServerConfig, rustls::Error> {
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_client_cert_verifier(Arc::new(ClientIsMember(credentials.clone())))
        .with_single_cert(chain, key)?;
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    config.send_tls13_tickets = 0;
    config.session_storage = Arc::new(NoServerSessionStorage {});
    Ok(config)
}

/// TLS of a member that connects to `expected` and to nobody else.
pub(crate) fn client_config(
    credentials: &Credentials,
    expected: &Subject,
    protocol: &[u8],
) -> Result<(ClientConfig, Failure), rustls::Error> {
    let failure = Failure::default();
    let expected = Identity { cluster: credentials.identity().cluster, subject: expected.clone() };
    let verifier = ServerIsExpected { credentials: credentials.clone(), expected, failure: failure.clone() };
    let config = client_builder()?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier))
        .with_client_cert_resolver(Arc::new(Presented(credentials.clone())));
    Ok((finish_client(config, protocol), failure))
}

/// TLS of a joiner: no certificate of its own, trust in the pinned authority only.
pub(crate) fn joining_config(pin: &AuthorityPin, protocol: &[u8]) -> Result<(ClientConfig, Failure), rustls::Error> {
    let failure = Failure::default();
    let verifier = ServerIsPinned { pin: pin.clone(), failure: failure.clone() };
    let config =
        client_builder()?.dangerous().with_custom_certificate_verifier(Arc::new(verifier)).with_no_client_auth();
    Ok((finish_client(config, protocol), failure))
}

/// The identity in a certificate that was verified.
pub(crate) fn leaf_identity(der: &[u8]) -> Result<Identity, PeerError> {
    let foreign = |reason: String| PeerError::Foreign { reason };
    let (_, parsed) = x509_parser::parse_x509_certificate(der).map_err(|error| foreign(error.to_string()))?;
    let uri = only_uri(&parsed).ok_or_else(|| foreign("it does not hold exactly one name, a URI".to_owned()))?;
    uri.parse().map_err(|error: super::name::NameError| foreign(error.to_string()))
}

/// The one alternative name of a certificate, if it is a URI.
pub(super) fn only_uri<'a>(parsed: &'a X509Certificate<'_>) -> Option<&'a str> {
    let names = parsed.subject_alternative_name().ok()??;
    match names.value.general_names.as_slice() {
        [GeneralName::URI(uri)] => Some(uri),
        _ => None,
    }
}

/// When the certificate's life begins and ends.
pub(super) fn leaf_validity(der: &[u8]) -> Result<(SystemTime, SystemTime), PeerError> {
    let (_, parsed) =
        x509_parser::parse_x509_certificate(der).map_err(|error| PeerError::Foreign { reason: error.to_string() })?;
    let time = |stamp: i64| SystemTime::UNIX_EPOCH + Duration::from_secs(stamp.max(0) as u64);
    let validity = parsed.validity();
    Ok((time(validity.not_before.timestamp()), time(validity.not_after.timestamp())))
}

/// When the certificate of a verified peer ends.
pub(crate) fn leaf_expires_at(der: &[u8]) -> Result<SystemTime, PeerError> {
    leaf_validity(der).map(|(_, end)| end)
}

pub(super) fn root_store(roots: &[Vec<u8>]) -> Result<Arc<RootCertStore>, PeerError> {
    let mut store = RootCertStore::empty();
    for root in roots {
        store.add(CertificateDer::from(root.as_slice())).map_err(PeerError::of)?;
    }
    Ok(Arc::new(store))
}

pub(super) fn client_verifier(roots: &Arc<RootCertStore>) -> Result<Arc<dyn ClientCertVerifier>, rustls::Error> {
    WebPkiClientVerifier::builder_with_provider(roots.clone(), provider())
        .clear_root_hint_subjects()
        .allow_unauthenticated()
        .build()
        .map_err(|error| rustls::Error::General(error.to_string()))
}

/// Whether `leaf` was issued by one of the roots, for a server, and is valid at `now`. Authorities issue leaves directly, so that no
/// intermediate is looked at.
pub(super) fn verify_chain(leaf: &[u8], roots: &RootCertStore, now: UnixTime) -> Result<(), PeerError> {
    let leaf = CertificateDer::from(leaf);
    let parsed = ParsedCertificate::try_from(&leaf).map_err(PeerError::of)?;
    let algorithms = provider().signature_verification_algorithms.all;
    verify_server_cert_signed_by_trust_anchor(&parsed, roots, &[], now, algorithms).map_err(PeerError::of)
}

fn client_builder() -> Result<rustls::ConfigBuilder<ClientConfig, rustls::WantsVerifier>, rustls::Error> {
    ClientConfig::builder_with_provider(provider()).with_protocol_versions(&[&rustls::version::TLS13])
}

fn finish_client(mut config: ClientConfig, protocol: &[u8]) -> ClientConfig {
    config.alpn_protocols = vec![protocol.to_vec()];
    config.resumption = Resumption::disabled();
    config.enable_early_data = false;
    config.enable_sni = false;
    config
}

/// ring's primitives, AES-128-GCM first: the quickest in every measurement, and QUIC's initial packets need it in the list.
fn provider() -> Arc<CryptoProvider> {
    static PROVIDER: OnceLock<Arc<CryptoProvider>> = OnceLock::new();
    let make = || {
        let mut provider = rustls::crypto::ring::default_provider();
        provider.cipher_suites.sort_by_key(|suite| suite.suite() != CipherSuite::TLS13_AES_128_GCM_SHA256);
        Arc::new(provider)
    };
    PROVIDER.get_or_init(make).clone()
}

/// The current certificate, looked up at each handshake: a renewal takes effect at once.
#[derive(Debug)]
struct Presented(Credentials);

impl ResolvesServerCert for Presented {
    fn resolve(&self, _hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.0.current().certified.clone())
    }
}

impl ResolvesClientCert for Presented {
    fn resolve(&self, _hints: &[&[u8]], _schemes: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        Some(self.0.current().certified.clone())
    }

    fn has_certs(&self) -> bool {
        true
    }
}

/// What a member demands of the server that it connects to.
#[derive(Debug)]
struct ServerIsExpected {
    credentials: Credentials,
    expected: Identity,
    failure: Failure,
}

impl ServerIsExpected {
    fn check(&self, leaf: &[u8], now: UnixTime) -> Result<(), PeerError> {
        verify_chain(leaf, &self.credentials.current().root_store, now)?;
        let found = leaf_identity(leaf)?;
        if found != self.expected {
            return Err(PeerError::OtherSubject { expected: self.expected.to_string(), found: found.to_string() });
        }
        Ok(())
    }
}

/// What a joiner demands of the server that it is about to tell its token.
#[derive(Debug)]
struct ServerIsPinned {
    pin: AuthorityPin,
    failure: Failure,
}

impl ServerIsPinned {
    fn check(&self, leaf: &[u8], chain: &[CertificateDer<'_>], now: UnixTime) -> Result<(), PeerError> {
        let pinned = |der: &&CertificateDer<'_>| blake3::hash(der).as_bytes() == &self.pin.ca_hash.0;
        let ca = chain.iter().find(pinned).ok_or(PeerError::OtherPin)?;
        verify_chain(leaf, &*root_store(&[ca.to_vec()])?, now)?;
        let found = leaf_identity(leaf)?;
        let (_, parsed) = x509_parser::parse_x509_certificate(ca)
            .map_err(|error| PeerError::Foreign { reason: error.to_string() })?;
        if only_uri(&parsed) != Some(&authority_uri(found.cluster)) {
            return Err(PeerError::Foreign { reason: "its cluster is not its authority's".to_owned() });
        }
        if found.subject != Subject::Coordinator {
            let expected = Subject::Coordinator.to_string();
            return Err(PeerError::OtherSubject { expected, found: found.to_string() });
        }
        *self.pin.found.lock().expect("no holder of this lock panics") = Some(ca.to_vec());
        Ok(())
    }
}

/// Turns a typed failure into TLS's answer, and keeps it for the caller of connect.
fn verdict(checked: Result<(), PeerError>, failure: &Failure) -> Result<ServerCertVerified, rustls::Error> {
    checked.map(|()| ServerCertVerified::assertion()).map_err(|error| {
        let alert = match &error {
            PeerError::Expired => CertificateError::Expired,
            PeerError::NotYetValid => CertificateError::NotValidYet,
            PeerError::UnknownAuthority | PeerError::OtherPin => CertificateError::UnknownIssuer,
            PeerError::OtherSubject { .. } => CertificateError::NotValidForName,
            PeerError::Foreign { .. } => CertificateError::BadEncoding,
        };
        *failure.lock().expect("no holder of this lock panics") = Some(error);
        alert.into()
    })
}

/// The parts of a server verifier that are the same for members and joiners.
macro_rules! tls13_only {
    () => {
        fn verify_tls12_signature(
            &self,
            _message: &[u8],
            _cert: &CertificateDer<'_>,
            _dss: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, rustls::Error> {
            Err(rustls::Error::General("only TLS 1.3 is spoken here".to_owned()))
        }

        fn verify_tls13_signature(
            &self,
            message: &[u8],
            cert: &CertificateDer<'_>,
            dss: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, rustls::Error> {
            verify_tls13_signature(message, cert, dss, &provider().signature_verification_algorithms)
        }

        fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
            provider().signature_verification_algorithms.supported_schemes()
        }
    };
}

impl ServerCertVerifier for ServerIsExpected {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        _chain: &[CertificateDer<'_>],
        _name: &ServerName<'_>,
        _ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        verdict(self.check(leaf, now), &self.failure)
    }

    tls13_only!();
}

impl ServerCertVerifier for ServerIsPinned {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        chain: &[CertificateDer<'_>],
        _name: &ServerName<'_>,
        _ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        verdict(self.check(leaf, chain, now), &self.failure)
    }

    tls13_only!();
}

/// What a server demands of a client that shows a certificate: one of the cluster's. Which subjects may do what is decided later.
#[derive(Debug)]
struct ClientIsMember(Credentials);

impl ClientCertVerifier for ClientIsMember {
    fn offer_client_auth(&self) -> bool {
        true
    }

    fn client_auth_mandatory(&self) -> bool {
        false
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        leaf: &CertificateDer<'_>,
        _chain: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        let current = self.0.current();
        // Authorities of different clusters have names alike; a signature that is not ours is an issuer that is not ours.
        let verified = current.client_verifier.verify_client_cert(leaf, &[], now).map_err(|error| match error {
            rustls::Error::InvalidCertificate(CertificateError::BadSignature) => CertificateError::UnknownIssuer.into(),
            other => other,
        })?;
        let found = leaf_identity(leaf).map_err(|_| CertificateError::BadEncoding)?;
        if found.cluster != self.0.identity().cluster {
            return Err(CertificateError::NotValidForName.into());
        }
        Ok(verified)
    }

    tls13_only!();
}
