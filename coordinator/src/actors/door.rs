//! The door: takes what the transport's gate has let in, and gives it to a session, a gateway or the join desk. Owns how many of each there
//! may be; nothing is decoded here.

use std::sync::Arc;
use std::time::Duration;

use ractor::Actor;
use stoke_protocol::identity::{Authority, Subject, TokenSecret, UserRole};
use stoke_protocol::label::check_node_name;
use stoke_protocol::message::client::TokenScope;
use stoke_protocol::message::join::{JoinReply, Wants};
use stoke_protocol::transport::{Accepted, CloseCode, Connection, Endpoint, JoinAttempt};
use tokio::sync::Semaphore;

use super::gateway::Gateway;
use super::handle::ClusterHandle;
use super::messages::{Answer, Question};
use super::session::{self, SessionActor};
use crate::artifacts::Artifacts;
use crate::config::Lifetimes;
use crate::metrics::Metrics;
use crate::state::SessionId;
use crate::state::effect::Member;
use crate::state::members::NODES_MAX;

/// Connections of users: each holds windows and buffers.
const CLIENTS_MAX: usize = 1_024;
/// Joins at a time: each costs a signature and a journal entry.
const JOINS_MAX: usize = 64;

#[derive(Clone)]
pub(crate) struct Door {
    pub cluster: ClusterHandle,
    pub authority: Arc<Authority>,
    pub lifetimes: Lifetimes,
    pub metrics: Arc<Metrics>,
    pub artifacts: Artifacts,
    pub secret: Arc<dyn Fn() -> TokenSecret + Send + Sync>,
}

impl Door {
    /// Until the endpoint is closed.
    pub async fn run(self, endpoint: Endpoint) {
        let [nodes, clients, joins] =
            [NODES_MAX + JOINS_MAX, CLIENTS_MAX, JOINS_MAX].map(|places| Arc::new(Semaphore::new(places)));
        let mut last = SessionId(0);
        while let Some(accepted) = endpoint.accept().await {
            match accepted {
                Accepted::Join(attempt) => {
                    let Ok(place) = joins.clone().try_acquire_owned() else { continue };
                    let door = self.clone();
                    tokio::spawn(async move {
                        door.join(attempt).await;
                        drop(place);
                    });
                }
                Accepted::Session(connection) => match connection.peer().subject.clone() {
                    Subject::Node(node) => {
                        let Ok(place) = nodes.clone().try_acquire_owned() else {
                            connection.close(CloseCode::Overloaded, "too many sessions are open");
                            continue;
                        };
                        last = SessionId(last.0 + 1);
                        self.session(last, node, connection, place).await;
                    }
                    subject @ Subject::User { .. } => {
                        let Ok(place) = clients.clone().try_acquire_owned() else {
                            connection.close(CloseCode::Overloaded, "too many users are connected");
                            continue;
                        };
                        let gateway = Gateway { door: self.clone(), subject, connection };
                        tokio::spawn(async move {
                            gateway.run().await;
                            drop(place);
                        });
                    }
                    Subject::Rank { .. } | Subject::Coordinator => {
                        connection.close(CloseCode::WrongRole, "only nodes and users talk to the coordinator");
                    }
                },
            }
        }
    }

    async fn session(
        &self,
        session: SessionId,
        node: stoke_protocol::ids::NodeId,
        connection: Connection,
        place: tokio::sync::OwnedSemaphorePermit,
    ) {
        let arguments = session::Arguments {
            session,
            node,
            connection,
            cluster: self.cluster.clone(),
            authority: self.authority.clone(),
            lifetimes: self.lifetimes,
            metrics: self.metrics.clone(),
            artifacts: self.artifacts.clone(),
        };
        match Actor::spawn(None, SessionActor, arguments).await {
            Ok((_, ended)) => drop(tokio::spawn(async move {
                // However it ended, its place is free again.
                let _panicked = ended.await;
                drop(place);
            })),
            Err(error) => tracing::error!(%error, %node, "start a session"),
        }
    }

    async fn join(&self, attempt: JoinAttempt) {
        let remote = attempt.remote_address();
        let reply = self.admit(&attempt).await;
        let result = match &reply {
            JoinReply::Accepted { .. } => "accepted",
            JoinReply::Refused { reason } => {
                tracing::warn!(%remote, %reason, "join refused");
                "refused"
            }
        };
        self.metrics.joins.with_label_values(&[result]).inc();
        if let Err(error) = attempt.reply(&reply).await {
            tracing::debug!(%remote, %error, "answer to a join was not delivered");
        }
    }

    async fn admit(&self, attempt: &JoinAttempt) -> JoinReply {
        let request = attempt.request();
        if let Wants::Node { name } = &request.wants
            && let Err(reason) = check_node_name(name)
        {
            return JoinReply::Refused { reason };
        }
        let secret_hash = TokenSecret::from_bytes(request.secret).hash();
        let question = Question::Join { token: request.token, secret_hash, wants: request.wants.clone() };
        let (subject, seconds) = match self.cluster.ask(question).await {
            Some(Answer::Member(Member::Node { node })) => (Subject::Node(node), self.lifetimes.node_s),
            Some(Answer::Member(Member::User { name, role })) => match user(&name, role) {
                Some(subject) => (subject, self.lifetimes.user_s),
                None => return JoinReply::Refused { reason: format!("{name:?} cannot be a user") },
            },
            Some(Answer::Denied(reason)) => return JoinReply::Refused { reason },
            Some(_) | None => return JoinReply::Refused { reason: "the coordinator is going down".into() },
        };
        match self.authority.issue(&request.csr, &subject, Duration::from_secs(seconds)) {
            Ok(issued) => {
                tracing::info!(%subject, remote = %attempt.remote_address(), "joined");
                JoinReply::Accepted { certificate: issued.certificate.into() }
            }
            Err(error) => JoinReply::Refused { reason: error.to_string() },
        }
    }
}

fn user(name: &str, scope: TokenScope) -> Option<Subject> {
    let role = match scope {
        TokenScope::Admin => UserRole::Admin,
        TokenScope::Operator => UserRole::Operator,
        TokenScope::Submitter => UserRole::Submitter,
        TokenScope::Viewer => UserRole::Viewer,
        TokenScope::Node => return None,
    };
    Subject::user(role, name).ok()
}
