//! The one function that says who may do what (I32). Default deny: what is not listed is refused.

use stoke_protocol::identity::{Subject, UserRole};
use stoke_protocol::message::client::{Refusal, RefusalCode, Request};

/// What kind of thing is asked, without its details.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Verb {
    /// Jobs, nodes, checkpoints, logs.
    Look,
    Submit,
    /// Cancel or resize a job of one's own, pin or prune its checkpoints.
    ChangeOwn,
    /// Anybody's job.
    ChangeAny,
    /// Drain a node, let it serve again, remove it.
    Nodes,
    /// Join tokens: make, list, revoke.
    Tokens,
    /// A fresh certificate for oneself.
    Renew,
    /// An agent's session.
    Session,
}

impl Verb {
    /// As the audit log spells it.
    pub fn word(self) -> &'static str {
        match self {
            Self::Look => "look",
            Self::Submit => "submit",
            Self::ChangeOwn => "change",
            Self::ChangeAny => "change-any",
            Self::Nodes => "nodes",
            Self::Tokens => "tokens",
            Self::Renew => "renew",
            Self::Session => "session",
        }
    }

    /// As a refusal says it.
    fn phrase(self) -> &'static str {
        match self {
            Self::Look => "look at the cluster",
            Self::Submit => "submit jobs",
            Self::ChangeOwn => "change jobs",
            Self::ChangeAny => "change another user's job",
            Self::Nodes => "drain or remove nodes",
            Self::Tokens => "manage tokens",
            Self::Renew => "renew its certificate",
            Self::Session => "open a node's session",
        }
    }

    /// Whether it changes something; refusals of these are audited.
    pub fn is_changing(self) -> bool {
        !matches!(self, Self::Look)
    }

    /// What a request needs. Whether a change is of one's own job is found out later.
    pub fn of(request: &Request) -> Self {
        match request {
            Request::Submit { .. } => Self::Submit,
            Request::Cancel { .. } | Request::Scale { .. } => Self::ChangeOwn,
            Request::Promote { .. } | Request::Rollback { .. } | Request::Replicas { .. } => Self::ChangeOwn,
            Request::Drain { .. } | Request::Undrain { .. } | Request::RemoveNode { .. } => Self::Nodes,
            Request::ReleaseNode { .. } => Self::Nodes,
            Request::Pin { .. } | Request::Unpin { .. } | Request::Prune { .. } => Self::ChangeOwn,
            Request::TokenCreate { .. } | Request::TokenList | Request::TokenRevoke { .. } => Self::Tokens,
            Request::Renew { .. } => Self::Renew,
            Request::Cluster | Request::Jobs | Request::Job { .. } | Request::Nodes | Request::Explain { .. } => {
                Self::Look
            }
            Request::Plan { .. } | Request::Artifact { .. } | Request::ArtifactPart { .. } => Self::Submit,
            Request::Checkpoints { .. } | Request::Logs { .. } | Request::Watch { .. } => Self::Look,
            Request::History { .. } | Request::Recent { .. } | Request::Pulse { .. } => Self::Look,
        }
    }
}

pub fn authorise(subject: &Subject, verb: Verb) -> Result<(), Refusal> {
    let allowed = match subject {
        Subject::User { role, .. } => match role {
            UserRole::Admin => verb != Verb::Session,
            UserRole::Operator => {
                matches!(
                    verb,
                    Verb::Look | Verb::Submit | Verb::ChangeOwn | Verb::ChangeAny | Verb::Nodes | Verb::Renew
                )
            }
            UserRole::Submitter => matches!(verb, Verb::Look | Verb::Submit | Verb::ChangeOwn | Verb::Renew),
            UserRole::Viewer => matches!(verb, Verb::Look | Verb::Renew),
        },
        Subject::Node(_) => matches!(verb, Verb::Session | Verb::Renew),
        Subject::Rank { .. } | Subject::Coordinator => false,
    };
    if allowed {
        return Ok(());
    }
    let mend = match verb {
        Verb::Tokens => "ask an admin",
        Verb::Nodes => "ask an operator or an admin",
        Verb::ChangeAny => "ask the job's owner, an operator or an admin",
        Verb::Session => "use the certificate that `stoke node --join` has stored",
        Verb::Look | Verb::Submit | Verb::ChangeOwn | Verb::Renew => {
            "ask an admin for a token of another role: `stoke token create --role submitter`"
        }
    };
    Err(Refusal {
        code: RefusalCode::Forbidden,
        message: format!("{subject} may not {}", verb.phrase()),
        mend: mend.to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use stoke_protocol::ids::{Generation, JobId, NodeId, Rank};

    #[test]
    fn each_role_may_do_what_is_listed_and_nothing_else() {
        let user = |role| Subject::user(role, "ada").unwrap();
        let all =
            [Verb::Look, Verb::Submit, Verb::ChangeOwn, Verb::ChangeAny, Verb::Tokens, Verb::Renew, Verb::Session];
        let allowed = |subject: Subject| all.map(|verb| authorise(&subject, verb).is_ok());
        assert_eq!(allowed(user(UserRole::Admin)), [true, true, true, true, true, true, false]);
        assert_eq!(allowed(user(UserRole::Operator)), [true, true, true, true, false, true, false]);
        assert_eq!(allowed(user(UserRole::Submitter)), [true, true, true, false, false, true, false]);
        assert_eq!(allowed(user(UserRole::Viewer)), [true, false, false, false, false, true, false]);
        assert_eq!(allowed(Subject::Node(NodeId(1))), [false, false, false, false, false, true, true]);
        let rank = Subject::Rank { job: JobId(1), generation: Generation(1), rank: Rank(0) };
        assert_eq!(allowed(rank), [false; 7]);
        assert_eq!(allowed(Subject::Coordinator), [false; 7]);
    }
}
