//! A member's key, certificate and trusted roots, swappable while connections live. Owns their files and their lifetime; never
//! decides when to renew (its holder does, at [`Credentials::renew_at`]).

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, RwLock};
use std::time::{Duration, SystemTime};

use rcgen::{CertificateParams, KeyPair, PKCS_ED25519};
use rustls::RootCertStore;
use rustls::pki_types::{CertificateDer, UnixTime};
use rustls::server::danger::ClientCertVerifier;
use rustls::sign::CertifiedKey;

use super::files::{self, FileError};
use super::name::Identity;
use super::tls::{self, PeerError};
use crate::ids::Digest;

const IDENTITY_FILE: &str = "identity.pem";
const ROOTS_FILE: &str = "ca.pem";
const CERTIFICATE_LABEL: &str = "CERTIFICATE";
const KEY_LABEL: &str = "PRIVATE KEY";
const RESET_KEY_LABEL: &str = "STOKE RESET KEY";
const RESET_KEY_CONTEXT: &str = "stoke quic reset key v1";

/// Two stand while the authority rotates; more than a few are not ours.
const ROOTS_MAX: usize = 8;

/// A new key with the request for its certificate. The private key never leaves this machine.
pub struct KeyRequest {
    key: KeyPair,
    csr: Vec<u8>,
}

/// Who this process is, to TLS. Clones share one identity: renewing one renews all, and new connections use it at once.
#[derive(Clone)]
pub struct Credentials(Arc<RwLock<Arc<Material>>>);

/// One key with all that is derived from it.
pub(super) struct Material {
    identity: Identity,
    key: Vec<u8>,
    certificate: Vec<u8>,
    /// The root that issued the certificate.
    authority: Vec<u8>,
    roots: Vec<Vec<u8>>,
    not_before: SystemTime,
    not_after: SystemTime,
    /// Outlives renewals: a restarted process must be able to reset its predecessor's connections.
    reset_key: [u8; 32],
    pub(super) certified: Arc<CertifiedKey>,
    pub(super) root_store: Arc<RootCertStore>,
    pub(super) client_verifier: Arc<dyn ClientCertVerifier>,
}

/// Why a key and a certificate are no credentials.
#[derive(Debug, thiserror::Error)]
pub enum CredentialsError {
    #[error("make a key")]
    Key(#[source] rcgen::Error),
    #[error("certificate does not belong to this key: was it issued for another request?")]
    OtherKey,
    #[error("certificate is not usable: {reason}")]
    Certificate { reason: String },
    #[error("certificate is for {found}, expected {expected}")]
    OtherSubject { expected: Box<Identity>, found: Box<Identity> },
    #[error("no credentials in {}: join the cluster first", dir.display())]
    Absent { dir: PathBuf },
    #[error(transparent)]
    File(#[from] FileError),
}

impl KeyRequest {
    /// Draws an Ed25519 key.
    pub fn new() -> Result<Self, CredentialsError> {
        let key = KeyPair::generate_for(&PKCS_ED25519).map_err(CredentialsError::Key)?;
        let mut params = CertificateParams::default();
        params.distinguished_name = rcgen::DistinguishedName::new();
        let csr = params.serialize_request(&key).map_err(CredentialsError::Key)?.der().to_vec();
        Ok(Self { key, csr })
    }

    /// The certificate request as DER.
    pub fn csr(&self) -> &[u8] {
        &self.csr
    }

    /// Credentials from the answer: the certificate that was issued for this key, and the authorities to trust, all DER.
    pub fn accept(self, certificate: &[u8], roots: &[Vec<u8>]) -> Result<Credentials, CredentialsError> {
        let reset_key = blake3::derive_key(RESET_KEY_CONTEXT, self.key.serialized_der());
        let material =
            Material::new(portable(self.key.serialize_der()), certificate.to_vec(), roots.to_vec(), reset_key)?;
        Ok(Credentials(Arc::new(RwLock::new(Arc::new(material)))))
    }
}

/// The key as OpenSSL 3.0 reads it, and with it other people's clients: without the public key, which is in RFC 5958 only and can be computed.
fn portable(pkcs8: Vec<u8>) -> Vec<u8> {
    const WITH_PUBLIC: [u8; 16] = [0x30, 0x51, 2, 1, 1, 0x30, 5, 6, 3, 0x2b, 0x65, 0x70, 4, 0x22, 4, 0x20];
    const WITHOUT: [u8; 16] = [0x30, 0x2e, 2, 1, 0, 0x30, 5, 6, 3, 0x2b, 0x65, 0x70, 4, 0x22, 4, 0x20];
    match pkcs8.strip_prefix(&WITH_PUBLIC).and_then(|rest| rest.first_chunk::<32>()) {
        Some(private) => [&WITHOUT[..], private].concat(),
        None => pkcs8,
    }
}

impl Credentials {
    /// Reads what [`Credentials::save`] wrote.
    pub fn load(dir: &Path) -> Result<Self, CredentialsError> {
        let path = dir.join(IDENTITY_FILE);
        if !path.exists() {
            return Err(CredentialsError::Absent { dir: dir.to_owned() });
        }
        let text = files::read_private(&path)?;
        let key = files::pem_blocks(&text, KEY_LABEL, &path)?.swap_remove(0);
        let certificate = files::pem_blocks(&text, CERTIFICATE_LABEL, &path)?.swap_remove(0);
        let reset_key = files::pem_blocks(&text, RESET_KEY_LABEL, &path)?.swap_remove(0);
        let reset_key =
            reset_key.try_into().map_err(|_| FileError::Missing { path: path.clone(), label: RESET_KEY_LABEL })?;
        let path = dir.join(ROOTS_FILE);
        let roots = files::pem_blocks(&files::read(&path)?, CERTIFICATE_LABEL, &path)?;
        Ok(Self(Arc::new(RwLock::new(Arc::new(Material::new(key, certificate, roots, reset_key)?)))))
    }

    /// Writes `identity.pem` (key and certificate) and `ca.pem` (roots), for the owner only. Each file is replaced in one step, and the roots
    /// first, so that a crash in between leaves credentials that load.
    pub fn save(&self, dir: &Path) -> Result<(), CredentialsError> {
        let material = self.current();
        files::create_dir(dir)?;
        let roots: String = material.roots.iter().map(|der| files::to_pem(CERTIFICATE_LABEL, der)).collect();
        files::replace(&dir.join(ROOTS_FILE), roots.as_bytes())?;
        let mut text = files::to_pem(KEY_LABEL, &material.key);
        text.push_str(&files::to_pem(CERTIFICATE_LABEL, &material.certificate));
        text.push_str(&files::to_pem(RESET_KEY_LABEL, &material.reset_key));
        Ok(files::replace(&dir.join(IDENTITY_FILE), text.as_bytes())?)
    }

    /// Takes over a renewed key and certificate (DER), for every clone: connections that live go on, new ones show the new certificate.
    /// Refused unless it is of the same subject: a renewal never changes a name.
    pub fn renew(&self, request: KeyRequest, certificate: &[u8]) -> Result<(), CredentialsError> {
        let current = self.current();
        let (key, roots) = (portable(request.key.serialize_der()), current.roots.clone());
        let material = Material::new(key, certificate.to_vec(), roots, current.reset_key)?;
        if material.identity != current.identity {
            return Err(CredentialsError::OtherSubject {
                expected: Box::new(current.identity.clone()),
                found: Box::new(material.identity),
            });
        }
        *self.0.write().expect("no holder of this lock panics") = Arc::new(material);
        Ok(())
    }

    pub fn identity(&self) -> Identity {
        self.current().identity.clone()
    }

    /// The certificate's last moment.
    pub fn expires_at(&self) -> SystemTime {
        self.current().not_after
    }

    /// Whether nobody accepts the certificate any more: it was not renewed in time.
    pub fn has_ended(&self) -> bool {
        self.expires_at() <= SystemTime::now()
    }

    /// Two thirds of the certificate's life: late enough to be rare, early enough to retry for the last third.
    pub fn renew_at(&self) -> SystemTime {
        let material = self.current();
        let life = material.not_after.duration_since(material.not_before).unwrap_or(Duration::ZERO);
        material.not_before + life * 2 / 3
    }

    /// The trusted authorities as DER.
    pub fn roots(&self) -> Vec<Vec<u8>> {
        self.current().roots.clone()
    }

    /// The own certificate as DER.
    pub fn certificate(&self) -> Vec<u8> {
        self.current().certificate.clone()
    }

    /// BLAKE3 of the authority that issued the own certificate: what a join token pins.
    pub fn ca_hash(&self) -> Digest {
        Digest(*blake3::hash(&self.current().authority).as_bytes())
    }

    /// The secret behind stateless resets and connection ids.
    pub(crate) fn reset_key(&self) -> [u8; 32] {
        self.current().reset_key
    }

    pub(super) fn current(&self) -> Arc<Material> {
        self.0.read().expect("no holder of this lock panics").clone()
    }
}

impl Material {
    fn new(
        key: Vec<u8>,
        certificate: Vec<u8>,
        roots: Vec<Vec<u8>>,
        reset_key: [u8; 32],
    ) -> Result<Self, CredentialsError> {
        let refused = |reason: String| CredentialsError::Certificate { reason };
        if roots.is_empty() || roots.len() > ROOTS_MAX {
            return Err(refused(format!("{} authorities to trust, expected 1 to {ROOTS_MAX}", roots.len())));
        }
        let unusable = |error: PeerError| refused(error.to_string());
        let identity = tls::leaf_identity(&certificate).map_err(unusable)?;
        let (not_before, not_after) = tls::leaf_validity(&certificate).map_err(unusable)?;
        let authority = issuer_among(&roots, &certificate, not_before).map_err(unusable)?;
        let signing = rustls::crypto::ring::sign::any_eddsa_type(&key.as_slice().into())
            .map_err(|error| refused(format!("key is not Ed25519: {error}")))?;
        // The authority goes along, so that a joiner can compare it with the hash in its token.
        let chain = [&certificate, &authority].map(|der| CertificateDer::from(der.clone())).to_vec();
        let certified = Arc::new(CertifiedKey::new(chain, signing));
        certified.keys_match().map_err(|_| CredentialsError::OtherKey)?;
        let root_store = tls::root_store(&roots).map_err(unusable)?;
        let client_verifier = tls::client_verifier(&root_store).map_err(|error| refused(error.to_string()))?;
        Ok(Self {
            identity,
            key,
            certificate,
            authority,
            roots,
            not_before,
            not_after,
            reset_key,
            certified,
            root_store,
            client_verifier,
        })
    }
}

/// The root that issued the certificate. It must hold at the certificate's first moment; whether it holds now is TLS's business.
fn issuer_among(roots: &[Vec<u8>], certificate: &[u8], at: SystemTime) -> Result<Vec<u8>, PeerError> {
    let at = UnixTime::since_unix_epoch(at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default());
    let mut refused = PeerError::UnknownAuthority;
    for root in roots {
        match tls::verify_chain(certificate, &*tls::root_store(std::slice::from_ref(root))?, at) {
            Ok(()) => return Ok(root.clone()),
            Err(error) => refused = error,
        }
    }
    Err(refused)
}

/// Shows who, never the key.
impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Credentials({})", self.current().identity)
    }
}

impl fmt::Debug for KeyRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("KeyRequest(..)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::identity::{Authority, Subject};
    use crate::ids::{ClusterId, NodeId};

    const HOUR: Duration = Duration::from_secs(3600);

    fn node(number: u64) -> Subject {
        Subject::Node(NodeId(number))
    }

    #[test]
    fn saved_credentials_load_as_the_same_identity() {
        let authority = Authority::in_memory(ClusterId([1; 16])).unwrap();
        let made = authority.credentials(&node(3), HOUR).unwrap();
        let dir = tempfile::tempdir().unwrap();
        made.save(dir.path()).unwrap();
        made.save(dir.path()).unwrap();
        let loaded = Credentials::load(dir.path()).unwrap();
        assert_eq!(loaded.identity(), made.identity());
        assert_eq!(loaded.reset_key(), made.reset_key());
        assert_eq!(loaded.expires_at(), made.expires_at());
        assert_eq!(loaded.ca_hash(), authority.ca_hash());
    }

    #[test]
    fn missing_credentials_say_so() {
        let dir = tempfile::tempdir().unwrap();
        assert!(matches!(Credentials::load(dir.path()), Err(CredentialsError::Absent { .. })));
        std::fs::write(dir.path().join(IDENTITY_FILE), "nothing").unwrap();
        use std::os::unix::fs::PermissionsExt;
        let private = std::fs::Permissions::from_mode(0o600);
        std::fs::set_permissions(dir.path().join(IDENTITY_FILE), private).unwrap();
        assert!(Credentials::load(dir.path()).unwrap_err().to_string().contains("PRIVATE KEY"));
    }

    #[test]
    fn renewal_keeps_the_name_and_the_reset_key() {
        let authority = Authority::in_memory(ClusterId([1; 16])).unwrap();
        let credentials = authority.credentials(&node(3), HOUR).unwrap();
        let clone = credentials.clone();
        let (reset_key, before) = (credentials.reset_key(), credentials.expires_at());
        let request = KeyRequest::new().unwrap();
        let issued = authority.issue(request.csr(), &node(3), 2 * HOUR).unwrap();
        credentials.renew(request, &issued.certificate).unwrap();
        assert!(clone.expires_at() > before);
        assert_eq!(clone.reset_key(), reset_key);
        let request = KeyRequest::new().unwrap();
        let issued = authority.issue(request.csr(), &node(4), HOUR).unwrap();
        let refused = credentials.renew(request, &issued.certificate).unwrap_err();
        assert!(matches!(refused, CredentialsError::OtherSubject { .. }), "{refused}");
    }

    #[test]
    fn a_certificate_of_another_key_or_authority_is_refused() {
        let authority = Authority::in_memory(ClusterId([1; 16])).unwrap();
        let issued = authority.issue(KeyRequest::new().unwrap().csr(), &node(3), HOUR).unwrap();
        let roots = vec![authority.certificate().to_vec()];
        let refused = KeyRequest::new().unwrap().accept(&issued.certificate, &roots).unwrap_err();
        assert!(matches!(refused, CredentialsError::OtherKey), "{refused}");
        let other = Authority::in_memory(ClusterId([1; 16])).unwrap();
        let request = KeyRequest::new().unwrap();
        let issued = authority.issue(request.csr(), &node(3), HOUR).unwrap();
        assert!(request.accept(&issued.certificate, &[other.certificate().to_vec()]).is_err());
    }

    #[test]
    fn renewal_is_due_at_two_thirds_of_life() {
        let authority = Authority::in_memory(ClusterId([1; 16])).unwrap();
        let credentials = authority.credentials(&node(3), 3 * HOUR).unwrap();
        let left = credentials.expires_at().duration_since(credentials.renew_at()).unwrap();
        assert!(left > HOUR && left < HOUR + HOUR / 10, "{left:?}");
    }
}
