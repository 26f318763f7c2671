//! What a gateway knows of its clients and shows them: tokens and a certificate. Files are looked at again and again, so that a token is given or
//! taken back and a certificate renewed without a restart. Owns when they are read; what is in them is `auth.rs`'s and `tls.rs`'s.
//!
//! G10: a file that cannot be used changes nothing: what was read last counts until it is mended, and the log says so.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};
use std::time::Duration;

use tokio::time::{MissedTickBehavior, interval};

use super::GatewayError;
use super::auth::{Token, read_tokens};
use super::tls::{Acceptor, Tls};
use crate::worker::text_of;

/// A file is looked at so often.
const LOOK_EVERY: Duration = Duration::from_secs(2);

/// Who may ask.
#[derive(Clone, Debug)]
pub enum Who {
    /// Everybody on this machine, and nobody else.
    Machine,
    Tokens(Vec<Token>),
    /// Of the tokens in a file ([`read_tokens`]).
    File(PathBuf),
}

pub(super) struct Secrets {
    who: Who,
    tls: Option<Tls>,
    known: RwLock<Known>,
}

/// As it was read last.
struct Known {
    tokens: Arc<[Token]>,
    tls: Option<Acceptor>,
}

/// What was read last. Nothing at first: the files may have changed since the start.
#[derive(Default)]
struct Look {
    read: Stamp,
    /// What was wrong since then.
    told: String,
}

/// Of each file: where it lies, when it was written, and its length.
type Stamp = Vec<Option<(u64, i64, i64, u64)>>;

impl Secrets {
    pub(super) fn open(who: Who, tls: Option<Tls>) -> Result<Self, GatewayError> {
        let known = RwLock::new(read(&who, tls.as_ref())?);
        Ok(Self { who, tls, known })
    }

    /// Empty: no token is asked for.
    pub(super) fn tokens(&self) -> Arc<[Token]> {
        self.known().tokens.clone()
    }

    /// None: plain HTTP.
    pub(super) fn tls(&self) -> Option<Acceptor> {
        self.known().tls.clone()
    }

    fn known(&self) -> RwLockReadGuard<'_, Known> {
        self.known.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads files when they have changed, for as long as it is polled.
    pub(super) async fn watch(self: Arc<Self>) {
        if self.files().next().is_none() {
            return;
        }
        let (mut last, mut ticks) = (Look::default(), interval(LOOK_EVERY));
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            self.look(&mut last);
        }
    }

    fn look(&self, last: &mut Look) {
        let found = self.stamp();
        if found == last.read {
            return;
        }
        match read(&self.who, self.tls.as_ref()) {
            Ok(known) => {
                tracing::info!(tokens = known.tokens.len(), "read the gateway's tokens and certificate");
                *self.known.write().unwrap_or_else(PoisonError::into_inner) = known;
                *last = Look { read: found, told: String::new() };
            }
            // Both files of a pair may not be there yet: it is tried again.
            Err(error) => {
                let error = text_of(&error);
                if error != last.told {
                    tracing::warn!(
                        error,
                        "cannot use what has changed of the gateway's tokens and certificate: the last ones count"
                    );
                    last.told = error;
                }
            }
        }
    }

    fn files(&self) -> impl Iterator<Item = &Path> {
        let tokens = if let Who::File(file) = &self.who { Some(file.as_path()) } else { None };
        let tls = self.tls.iter().flat_map(|tls| [tls.certificate.as_path(), &tls.key]);
        tokens.into_iter().chain(tls)
    }

    fn stamp(&self) -> Stamp {
        let of = |path: &Path| {
            let found = std::fs::metadata(path).ok()?;
            Some((found.ino(), found.mtime(), found.mtime_nsec(), found.len()))
        };
        self.files().map(of).collect()
    }
}

fn read(who: &Who, tls: Option<&Tls>) -> Result<Known, GatewayError> {
    let tokens = match who {
        Who::Machine => Vec::new(),
        Who::Tokens(tokens) => tokens.clone(),
        Who::File(file) => read_tokens(file).map_err(GatewayError::Tokens)?,
    };
    Ok(Known { tokens: tokens.into(), tls: tls.map(Acceptor::new).transpose()? })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn files_that_change_are_read_again_and_one_that_cannot_be_used_changes_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("tokens");
        let write = |text: &str| {
            let beside = dir.path().join("beside");
            std::fs::write(&beside, text).unwrap();
            std::fs::set_permissions(&beside, std::fs::Permissions::from_mode(0o600)).unwrap();
            std::fs::rename(&beside, &file).unwrap();
        };
        write("anna 0123456789abcdef\n");
        let secrets = Secrets::open(Who::File(file.clone()), None).unwrap();
        let mut last = Look::default();
        let mut users = || {
            secrets.look(&mut last);
            let users = secrets.tokens().iter().map(|token| token.user.clone()).collect::<Vec<_>>();
            (users.join(" "), last.told.clone())
        };
        assert_eq!(users(), ("anna".into(), String::new()));
        write("ben 0123456789abcdef\ncora fedcba9876543210\n");
        assert_eq!(users(), ("ben cora".into(), String::new()));
        write("dora short\n");
        let (still, told) = users();
        assert!(still == "ben cora" && told.contains("the token of dora is too short"), "{still}: {told}");
        std::fs::remove_file(&file).unwrap();
        assert_eq!(users().0, "ben cora");
        write("dora 0123456789abcdef\n");
        assert_eq!(users(), ("dora".into(), String::new()));
    }
}
