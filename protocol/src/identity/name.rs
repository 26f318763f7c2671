//! Subjects and their SPIFFE-style URI, the only name that a certificate carries. Parsing is strict: a URI parses only if printing the
//! result gives the same characters, so that no subject has two spellings.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::ids::{ClusterId, Generation, JobId, NodeId, Rank};

/// Longer user names would not fit the audit log's columns, nor most directories' limits.
const USER_NAME_BYTES_MAX: usize = 64;

/// What a user may do; the coordinator's authorisation function gives these words their meaning.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum UserRole {
    Admin,
    Operator,
    Submitter,
    Viewer,
}

/// Who holds a certificate.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Subject {
    /// The one coordinator of the cluster.
    Coordinator,
    /// A person or a program that submits and looks.
    User { role: UserRole, name: String },
    /// The agent of a machine.
    Node(NodeId),
    /// A worker process, in one generation of its job only.
    Rank { job: JobId, generation: Generation, rank: Rank },
}

/// A subject of one cluster, as its certificate's URI says it: `spiffe://<cluster>/node/7`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Identity {
    pub cluster: ClusterId,
    pub subject: Subject,
}

/// Why a name is not an identity.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    #[error(
        "{input:?} is not an identity: expected spiffe://<cluster>/coordinator, /user/<role>/<name>, /node/<n> or /rank/<job>/<generation>/<rank>"
    )]
    Uri { input: String },
    #[error("{input:?} is not a role: expected admin, operator, submitter or viewer")]
    Role { input: String },
    #[error("{input:?} is not a user name: 1 to {USER_NAME_BYTES_MAX} letters, digits and any of . _ - @")]
    User { input: String },
}

impl Subject {
    /// A user, if the name is one.
    pub fn user(role: UserRole, name: &str) -> Result<Self, NameError> {
        let fits = (1..=USER_NAME_BYTES_MAX).contains(&name.len());
        let plain = name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._-@".contains(&byte));
        if !fits || !plain {
            return Err(NameError::User { input: name.to_owned() });
        }
        Ok(Self::User { role, name: name.to_owned() })
    }

    fn parse(path: &str) -> Option<Self> {
        let mut parts = path.split('/');
        let subject = match parts.next()? {
            "coordinator" => Self::Coordinator,
            "user" => Self::user(parts.next()?.parse().ok()?, parts.next()?).ok()?,
            "node" => Self::Node(NodeId(parts.next()?.parse().ok()?)),
            "rank" => Self::Rank {
                job: JobId(parts.next()?.parse().ok()?),
                generation: Generation(parts.next()?.parse().ok()?),
                rank: Rank(parts.next()?.parse().ok()?),
            },
            _ => return None,
        };
        parts.next().is_none().then_some(subject)
    }
}

/// The path of the URI without its leading slash: also how people read a subject ("node/7").
impl fmt::Display for Subject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Coordinator => f.write_str("coordinator"),
            Self::User { role, name } => write!(f, "user/{role}/{name}"),
            Self::Node(node) => write!(f, "node/{}", node.0),
            Self::Rank { job, generation, rank } => write!(f, "rank/{}/{}/{}", job.0, generation.0, rank.0),
        }
    }
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "spiffe://{}/{}", self.cluster, self.subject)
    }
}

impl FromStr for Identity {
    type Err = NameError;
    fn from_str(input: &str) -> Result<Self, NameError> {
        let refused = || NameError::Uri { input: input.to_owned() };
        let rest = input.strip_prefix("spiffe://").ok_or_else(refused)?;
        let (cluster, path) = rest.split_once('/').ok_or_else(refused)?;
        let cluster = cluster.parse().map_err(|_| refused())?;
        let subject = Subject::parse(path).ok_or_else(refused)?;
        let identity = Self { cluster, subject };
        // Rejects "node/007", "node/+7" and upper-case cluster ids.
        if identity.to_string() == input { Ok(identity) } else { Err(refused()) }
    }
}

impl fmt::Display for UserRole {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Admin => "admin",
            Self::Operator => "operator",
            Self::Submitter => "submitter",
            Self::Viewer => "viewer",
        })
    }
}

impl FromStr for UserRole {
    type Err = NameError;
    fn from_str(input: &str) -> Result<Self, NameError> {
        match input {
            "admin" => Ok(Self::Admin),
            "operator" => Ok(Self::Operator),
            "submitter" => Ok(Self::Submitter),
            "viewer" => Ok(Self::Viewer),
            _ => Err(NameError::Role { input: input.to_owned() }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity(subject: Subject) -> Identity {
        Identity { cluster: ClusterId([0xab; 16]), subject }
    }

    #[test]
    fn identities_print_and_parse_back() {
        let rank = Subject::Rank { job: JobId(3), generation: Generation(2), rank: Rank(1) };
        let user = Subject::user(UserRole::Submitter, "ada@example.org").unwrap();
        for subject in [Subject::Coordinator, user, Subject::Node(NodeId(7)), rank] {
            let identity = identity(subject);
            assert_eq!(identity.to_string().parse(), Ok(identity));
        }
        assert_eq!(identity(Subject::Node(NodeId(7))).to_string(), "spiffe://abababababababababababababababab/node/7");
    }

    #[test]
    fn no_identity_has_two_spellings() {
        let base = "spiffe://abababababababababababababababab";
        for path in [
            "/node/07",
            "/node/+7",
            "/node/7/",
            "/node/-1",
            "/node/",
            "/node",
            "//node/7",
            "/coordinator/x",
            "/user/root/ada",
            "/user/admin/",
            "/user/admin/a b",
            "/user/admin/a/b",
            "/rank/1/2",
            "/rank/1/2/3/4",
            "/Node/7",
            "",
            "/node/7?x",
            "/node/18446744073709551616",
        ] {
            assert!(format!("{base}{path}").parse::<Identity>().is_err(), "{path}");
        }
        assert!("spiffe://ABABABABABABABABABABABABABABABAB/node/7".parse::<Identity>().is_err());
        assert!("https://abababababababababababababababab/node/7".parse::<Identity>().is_err());
    }

    #[test]
    fn user_names_are_bounded() {
        assert!(Subject::user(UserRole::Viewer, &"a".repeat(64)).is_ok());
        assert!(Subject::user(UserRole::Viewer, &"a".repeat(65)).is_err());
        assert!(Subject::user(UserRole::Viewer, "../etc").is_err());
    }
}
