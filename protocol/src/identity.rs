//! Who is speaking: subjects, their URI in a certificate, the cluster's authority, credentials and join tokens.
//! Owns keys and certificates; never opens a socket, and never decides what a subject may do (that is the coordinator's one
//! authorisation function).

mod authority;
mod credentials;
mod files;
mod name;
mod tls;
mod token;
mod web;

pub use authority::{Authority, AuthorityError, CLOCK_TOLERANCE, Issued};
pub use credentials::{Credentials, CredentialsError, KeyRequest};
pub use files::FileError;
pub use name::{Identity, NameError, Subject, UserRole};
pub use tls::PeerError;
pub(crate) use tls::{
    AuthorityPin, Failure, client_config, joining_config, leaf_expires_at, leaf_identity, server_config,
};
pub use token::{JoinToken, TokenError, TokenSecret, verify_secret};
pub use web::{web_caller, web_config};
