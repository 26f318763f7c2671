//! The cluster's certificate authority: the one root that every member trusts. Owns the CA key and what a certificate says; never takes
//! a name, a usage or a lifetime from a request, only its public key.

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DistinguishedName, DnType,
    ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose, PKCS_ED25519, SanType, SerialNumber,
};
use ring::rand::{SecureRandom, SystemRandom};
use rustls::pki_types::CertificateSigningRequestDer;
use time::OffsetDateTime;

use super::credentials::{Credentials, CredentialsError, KeyRequest};
use super::files::{self, FileError};
use super::name::Subject;
use crate::ids::{ClusterId, Digest};

/// Certificates are valid from this long before they are made: machines' clocks may differ by as much (I36).
pub const CLOCK_TOLERANCE: Duration = Duration::from_secs(5 * 60);

/// The authority outlives the cluster's machines; replacing it means issuing every certificate again.
const AUTHORITY_LIFE: Duration = Duration::from_secs(10 * 365 * 24 * 3600);

/// A request is one key and one signature: 200 bytes for Ed25519. Longer ones are not ours.
const CSR_BYTES_MAX: usize = 4096;

const KEY_FILE: &str = "ca.key";
const CERTIFICATE_FILE: &str = "ca.pem";
const CERTIFICATE_LABEL: &str = "CERTIFICATE";

/// The cluster CA: Ed25519, so that every certificate and signature has a fixed size.
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    certificate: Vec<u8>,
    cluster: ClusterId,
    expires: OffsetDateTime,
}

/// Why the authority could not be made, opened or used.
#[derive(Debug, thiserror::Error)]
pub enum AuthorityError {
    #[error("{} already holds a cluster authority: open it, or choose another folder (a new authority locks every member out)", path.display())]
    Exists { path: PathBuf },
    #[error(transparent)]
    File(#[from] FileError),
    #[error("{} is not a cluster authority of stoke: {reason}", path.display())]
    Damaged { path: PathBuf, reason: String },
    #[error("certificate request refused: {reason}")]
    Request { reason: String },
    #[error("sign certificate for {subject}")]
    Sign {
        subject: Subject,
        #[source]
        source: rcgen::Error,
    },
    #[error(transparent)]
    Credentials(#[from] CredentialsError),
}

/// A certificate that was just made.
#[derive(Clone, Debug)]
pub struct Issued {
    /// DER.
    pub certificate: Vec<u8>,
    /// The certificate's serial number, for the audit log and deny lists.
    pub serial: [u8; 16],
    pub expires_at: SystemTime,
}

impl Authority {
    /// Makes a new authority for a new cluster and writes it to `dir` (`ca.key`, `ca.pem`, both for the owner only).
    pub fn create(dir: &Path) -> Result<Self, AuthorityError> {
        files::create_dir(dir)?;
        let path = dir.join(KEY_FILE);
        if path.exists() {
            return Err(AuthorityError::Exists { path: dir.to_owned() });
        }
        let (authority, key) = Self::build(ClusterId(random_bytes()))?;
        // The certificate first: a crash in between leaves no key, and so no authority.
        files::replace(
            &dir.join(CERTIFICATE_FILE),
            files::to_pem(CERTIFICATE_LABEL, &authority.certificate).as_bytes(),
        )?;
        files::create(&path, key.as_bytes())?;
        Ok(authority)
    }

    /// Opens the authority that [`Authority::create`] wrote.
    pub fn open(dir: &Path) -> Result<Self, AuthorityError> {
        let path = dir.join(KEY_FILE);
        let key = files::read_private(&path)?;
        let damaged = |reason: String| AuthorityError::Damaged { path: dir.to_owned(), reason };
        let key = KeyPair::from_pem(&key).map_err(|error| damaged(format!("{KEY_FILE}: {error}")))?;
        let path = dir.join(CERTIFICATE_FILE);
        let text = files::read(&path)?;
        let certificate = files::pem_blocks(&text, CERTIFICATE_LABEL, &path)?.swap_remove(0);
        let (cluster, expires) = inspect(&certificate, &key).map_err(damaged)?;
        let issuer = Issuer::from_ca_cert_der(&certificate.clone().into(), key)
            .map_err(|error| damaged(format!("{CERTIFICATE_FILE}: {error}")))?;
        Ok(Self { issuer, certificate, cluster, expires })
    }

    /// An authority that lives in memory only: for simulations and tests, where the cluster's id must not be drawn.
    pub fn in_memory(cluster: ClusterId) -> Result<Self, AuthorityError> {
        Ok(Self::build(cluster)?.0)
    }

    pub fn cluster(&self) -> ClusterId {
        self.cluster
    }

    /// The CA certificate as DER: what members trust.
    pub fn certificate(&self) -> &[u8] {
        &self.certificate
    }

    /// Until when it may issue.
    pub fn expires_at(&self) -> SystemTime {
        self.expires.into()
    }

    /// BLAKE3 of the CA certificate: what a join token pins.
    pub fn ca_hash(&self) -> Digest {
        Digest(*blake3::hash(&self.certificate).as_bytes())
    }

    /// A certificate for `subject` and the key in the request. Everything else in the request is ignored.
    pub fn issue(&self, csr_der: &[u8], subject: &Subject, ttl: Duration) -> Result<Issued, AuthorityError> {
        let refused = |reason: String| AuthorityError::Request { reason };
        if csr_der.len() > CSR_BYTES_MAX {
            return Err(refused(format!("{} bytes, at most {CSR_BYTES_MAX} are read", csr_der.len())));
        }
        // `from_der` verifies the request's own signature: the sender holds the private key.
        let mut request = CertificateSigningRequestParams::from_der(&CertificateSigningRequestDer::from(csr_der))
            .map_err(|error| refused(error.to_string()))?;
        if request.public_key.algorithm() != &PKCS_ED25519 {
            return Err(refused("its key is not Ed25519".to_owned()));
        }
        let serial = fixed_size_serial();
        let now = OffsetDateTime::now_utc();
        request.params = leaf_params(self.cluster, subject, serial)?;
        request.params.not_before = now - CLOCK_TOLERANCE;
        request.params.not_after = (now + ttl).min(self.expires);
        let expires_at = request.params.not_after.into();
        let signed = request
            .signed_by(&self.issuer)
            .map_err(|source| AuthorityError::Sign { subject: subject.clone(), source })?;
        Ok(Issued { certificate: signed.der().to_vec(), serial, expires_at })
    }

    /// A key and a certificate for `subject` in one go: for the coordinator itself and for users of the same machine.
    pub fn credentials(&self, subject: &Subject, ttl: Duration) -> Result<Credentials, AuthorityError> {
        let request = KeyRequest::new()?;
        let issued = self.issue(request.csr(), subject, ttl)?;
        Ok(request.accept(&issued.certificate, std::slice::from_ref(&self.certificate))?)
    }

    /// A key (PKCS#8) and a certificate for a web server that is reached under these names or addresses.
    pub(super) fn web_certificate(
        &self,
        names: &[String],
        ttl: Duration,
    ) -> Result<(Vec<u8>, Vec<u8>), AuthorityError> {
        let sign_error = |source| AuthorityError::Sign { subject: Subject::Coordinator, source };
        let key = KeyPair::generate_for(&PKCS_ED25519).map_err(sign_error)?;
        let mut params = CertificateParams::new(names).map_err(sign_error)?;
        let now = OffsetDateTime::now_utc();
        params.serial_number = Some(SerialNumber::from_slice(&fixed_size_serial()));
        params.distinguished_name = common_name("stoke api");
        params.not_before = now - CLOCK_TOLERANCE;
        params.not_after = (now + ttl).min(self.expires);
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        params.use_authority_key_identifier_extension = true;
        let certificate = params.signed_by(&key, &self.issuer).map_err(sign_error)?;
        Ok((certificate.der().to_vec(), key.serialize_der()))
    }

    /// The authority and its key as PEM.
    fn build(cluster: ClusterId) -> Result<(Self, String), AuthorityError> {
        let sign_error = |source| AuthorityError::Sign { subject: Subject::Coordinator, source };
        let key = KeyPair::generate_for(&PKCS_ED25519).map_err(sign_error)?;
        let now = OffsetDateTime::now_utc();
        let mut params = CertificateParams::default();
        params.serial_number = Some(SerialNumber::from_slice(&fixed_size_serial()));
        params.not_before = now - CLOCK_TOLERANCE;
        params.not_after = now + AUTHORITY_LIFE;
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params.distinguished_name = common_name("stoke cluster authority");
        params.subject_alt_names = vec![uri(authority_uri(cluster)).map_err(sign_error)?];
        let certificate = params.self_signed(&key).map_err(sign_error)?.der().to_vec();
        let (pem, expires) = (key.serialize_pem(), params.not_after);
        Ok((Self { issuer: Issuer::new(params, key), certificate, cluster, expires }, pem))
    }
}

impl std::fmt::Debug for Authority {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Authority").field("cluster", &self.cluster).finish_non_exhaustive()
    }
}

/// The URI of the authority itself: the trust domain without a path.
pub(super) fn authority_uri(cluster: ClusterId) -> String {
    format!("spiffe://{cluster}")
}

fn leaf_params(cluster: ClusterId, subject: &Subject, serial: [u8; 16]) -> Result<CertificateParams, AuthorityError> {
    let name = super::name::Identity { cluster, subject: subject.clone() };
    let mut params = CertificateParams::default();
    params.serial_number = Some(SerialNumber::from_slice(&serial));
    params.distinguished_name = common_name("stoke");
    params.subject_alt_names =
        vec![uri(name.to_string()).map_err(|source| AuthorityError::Sign { subject: subject.clone(), source })?];
    params.is_ca = IsCa::ExplicitNoCa;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth, ExtendedKeyUsagePurpose::ServerAuth];
    params.use_authority_key_identifier_extension = true;
    Ok(params)
}

fn uri(text: String) -> Result<SanType, rcgen::Error> {
    Ok(SanType::URI(text.try_into()?))
}

fn common_name(name: &str) -> DistinguishedName {
    let mut distinguished = DistinguishedName::new();
    distinguished.push(DnType::CommonName, name);
    distinguished
}

/// The cluster and the end of life of a CA certificate that belongs to `key`.
fn inspect(certificate: &[u8], key: &KeyPair) -> Result<(ClusterId, OffsetDateTime), String> {
    let (_, parsed) =
        x509_parser::parse_x509_certificate(certificate).map_err(|error| format!("{CERTIFICATE_FILE}: {error}"))?;
    if parsed.public_key().subject_public_key.data.as_ref() != key.public_key_raw() {
        return Err(format!("{KEY_FILE} and {CERTIFICATE_FILE} do not belong together"));
    }
    let uri = super::tls::only_uri(&parsed).ok_or(format!("{CERTIFICATE_FILE} names no cluster"))?;
    let cluster = uri
        .strip_prefix("spiffe://")
        .and_then(|id| id.parse().ok())
        .ok_or(format!("{CERTIFICATE_FILE} names {uri:?}, not a cluster"))?;
    let expires = parsed.validity().not_after.to_datetime();
    Ok((cluster, expires))
}

/// A random serial whose encoding has always 16 bytes (no leading zero, positive), so that certificates have a fixed size.
fn fixed_size_serial() -> [u8; 16] {
    let mut serial: [u8; 16] = random_bytes();
    serial[0] = serial[0] & 0x3f | 0x40;
    serial
}

fn random_bytes<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    SystemRandom::new().fill(&mut bytes).expect("the system's random source answers");
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::identity::Identity;
    use crate::identity::tls::leaf_identity;
    use crate::ids::NodeId;

    const HOUR: Duration = Duration::from_secs(3600);

    fn authority() -> Authority {
        Authority::in_memory(ClusterId([7; 16])).unwrap()
    }

    #[test]
    fn a_request_cannot_choose_its_name_usage_or_lifetime() {
        let authority = authority();
        let key = KeyPair::generate_for(&PKCS_ED25519).unwrap();
        let mut evil = CertificateParams::new(vec!["evil.example".to_owned()]).unwrap();
        evil.subject_alt_names.push(uri(format!("spiffe://{}/coordinator", authority.cluster())).unwrap());
        evil.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        evil.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        let csr = evil.serialize_request(&key).unwrap();
        let issued = authority.issue(csr.der(), &Subject::Node(NodeId(4)), HOUR).unwrap();
        let identity = leaf_identity(&issued.certificate).unwrap();
        assert_eq!(identity, Identity { cluster: ClusterId([7; 16]), subject: Subject::Node(NodeId(4)) });
        let (_, leaf) = x509_parser::parse_x509_certificate(&issued.certificate).unwrap();
        assert!(!leaf.is_ca());
        assert!(!leaf.key_usage().unwrap().unwrap().value.key_cert_sign());
        assert!(leaf.validity().not_after.timestamp() <= OffsetDateTime::now_utc().unix_timestamp() + 3600);
    }

    #[test]
    fn a_request_of_another_key_kind_or_a_broken_one_is_refused() {
        let authority = authority();
        let key = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).unwrap();
        let csr = CertificateParams::default().serialize_request(&key).unwrap();
        let refused = authority.issue(csr.der(), &Subject::Node(NodeId(1)), HOUR).unwrap_err();
        assert!(refused.to_string().contains("Ed25519"), "{refused}");
        let mut torn = KeyRequest::new().unwrap().csr().to_vec();
        *torn.last_mut().unwrap() ^= 1;
        assert!(authority.issue(&torn, &Subject::Node(NodeId(1)), HOUR).is_err());
        assert!(authority.issue(&[0; CSR_BYTES_MAX + 1], &Subject::Node(NodeId(1)), HOUR).is_err());
    }

    #[test]
    fn certificates_of_equal_names_have_equal_sizes() {
        let authority = authority();
        let size = |_| {
            let request = KeyRequest::new().unwrap();
            authority.issue(request.csr(), &Subject::Node(NodeId(1)), HOUR).unwrap().certificate.len()
        };
        let sizes: std::collections::BTreeSet<usize> = (0..64).map(size).collect();
        assert_eq!(sizes.len(), 1, "{sizes:?}");
    }

    #[test]
    fn an_authority_opens_again_as_the_same_cluster() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().join("authority");
        let made = Authority::create(&dir).unwrap();
        let opened = Authority::open(&dir).unwrap();
        assert_eq!(opened.cluster(), made.cluster());
        assert_eq!(opened.ca_hash(), made.ca_hash());
        let credentials = opened.credentials(&Subject::Coordinator, HOUR).unwrap();
        assert_eq!(credentials.identity().cluster, made.cluster());
        assert!(matches!(Authority::create(&dir), Err(AuthorityError::Exists { .. })));
    }

    #[test]
    fn a_key_that_others_can_read_is_refused() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        Authority::create(dir.path()).unwrap();
        let key = dir.path().join(KEY_FILE);
        std::fs::set_permissions(&key, std::fs::Permissions::from_mode(0o644)).unwrap();
        let refused = Authority::open(dir.path()).unwrap_err().to_string();
        assert!(refused.contains("chmod 600"), "{refused}");
    }
}
