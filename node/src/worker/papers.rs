//! A rank's key and certificate: asked for at its start, and again at two thirds of their life. Owns when; the agent brings the request to the
//! coordinator and the answer back.

use std::time::{Duration, Instant, SystemTime};

use stoke_protocol::identity::{Credentials, CredentialsError, KeyRequest};

/// Between two requests for a renewal at least. Certificates begin in the past (clock tolerance), so that short ones are due when they are made.
const ASK_EVERY: Duration = Duration::from_secs(10);

#[derive(Default)]
pub struct Papers {
    /// A key that is asked for and has no certificate yet.
    key: Option<KeyRequest>,
    credentials: Option<Credentials>,
    asked: Option<Instant>,
}

impl Papers {
    /// The first request.
    pub fn apply(&mut self) -> Result<Vec<u8>, CredentialsError> {
        let key = KeyRequest::new()?;
        let csr = key.csr().to_vec();
        self.key = Some(key);
        Ok(csr)
    }

    /// The request for a renewal, when one is due; the same again until it is answered.
    pub fn renewal(&mut self) -> Option<Result<Vec<u8>, CredentialsError>> {
        let due = self.credentials.as_ref()?.renew_at() <= SystemTime::now();
        let waited = self.asked.is_none_or(|asked| asked.elapsed() >= ASK_EVERY);
        (due && waited).then(|| {
            self.asked = Some(Instant::now());
            match &self.key {
                Some(key) => Ok(key.csr().to_vec()),
                None => self.apply(),
            }
        })
    }

    /// Takes the answer. Gives the credentials if they are the first; later ones reach every clone of those.
    pub fn take(&mut self, certificate: &[u8], authority: &[u8]) -> Result<Option<Credentials>, CredentialsError> {
        let Some(key) = self.key.take() else { return Ok(None) };
        match &self.credentials {
            None => {
                let credentials = key.accept(certificate, &[authority.to_vec()])?;
                self.credentials = Some(credentials.clone());
                Ok(Some(credentials))
            }
            Some(credentials) => {
                match credentials.renew(key, certificate) {
                    Ok(()) => tracing::info!("certificate of this rank was renewed"),
                    Err(error) => tracing::warn!(%error, "certificate of this rank was not renewed, asking again"),
                }
                Ok(None)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use stoke_protocol::identity::{Authority, Subject};
    use stoke_protocol::ids::{ClusterId, Generation, JobId, Rank};

    use super::*;

    #[test]
    fn a_certificate_is_renewed_at_two_thirds_of_its_life_for_whoever_holds_it() {
        let authority = Authority::in_memory(ClusterId([1; 16])).unwrap();
        let subject = Subject::Rank { job: JobId(1), generation: Generation(1), rank: Rank(0) };
        let sign =
            |csr: &[u8], life: u64| authority.issue(csr, &subject, Duration::from_secs(life)).unwrap().certificate;
        let mut papers = Papers::default();
        assert!(papers.renewal().is_none(), "there is nothing to renew");
        let short = sign(&papers.apply().unwrap(), 2);
        let held = papers.take(&short, authority.certificate()).unwrap().expect("credentials");
        let (first, ends) = (held.certificate(), held.expires_at());
        let csr = papers.renewal().expect("a short one is due at once").unwrap();
        assert!(papers.renewal().is_none(), "one at a time");
        papers.asked = None;
        assert_eq!(papers.renewal().expect("still due").unwrap(), csr, "a late answer is one too");
        // The answer to another request.
        assert!(papers.take(&short, authority.certificate()).unwrap().is_none());
        assert_eq!(held.certificate(), first);
        papers.asked = None;
        let again = papers.renewal().expect("still due").unwrap();
        assert_ne!(csr, again);
        assert!(papers.take(&sign(&again, 30 * 24 * 3_600), authority.certificate()).unwrap().is_none());
        assert!(held.expires_at() > ends);
        papers.asked = None;
        assert!(papers.renewal().is_none(), "it lives for a month");
    }
}
