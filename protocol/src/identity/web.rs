//! HTTPS of the coordinator: a certificate with the names that other people's clients check, and callers who show the certificates that they show everywhere.
//! Owns how a caller is known. A certificate of this file opens nothing inside of the cluster: members have exactly one name, a URI.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rustls::ServerConfig;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};

use super::authority::{Authority, AuthorityError};
use super::credentials::Credentials;
use super::name::Subject;
use super::tls;

/// TLS of the HTTP API: clients' certificates are asked for but not demanded, so that whoever has none gets an answer that says so.
pub fn web_config(
    authority: &Authority,
    credentials: &Credentials,
    names: &[String],
    ttl: Duration,
) -> Result<Arc<ServerConfig>, AuthorityError> {
    let (certificate, key) = authority.web_certificate(names, ttl)?;
    let chain = vec![CertificateDer::from(certificate), CertificateDer::from(authority.certificate().to_vec())];
    let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(key));
    let config = tls::web_config(credentials, chain, key);
    Ok(Arc::new(config.map_err(|error| AuthorityError::Request { reason: error.to_string() })?))
}

/// Who is at the other end, and until when its certificate says so. None: it has shown none.
pub fn web_caller(chain: Option<&[CertificateDer<'_>]>) -> Option<(Subject, SystemTime)> {
    let leaf = chain?.first()?;
    // The verifier has checked both during the handshake.
    let identity = tls::leaf_identity(leaf).ok()?;
    Some((identity.subject, tls::leaf_expires_at(leaf).ok()?))
}
