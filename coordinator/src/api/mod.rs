//! The HTTP API: the coordinator's questions and answers as JSON over HTTP, for programs and for the dashboard. Wiring, and what an API asks through: the coordinator serves it
//! for whoever shows a certificate (`server`), and `stoke dashboard` for its own user on the loopback.

mod dashboard;
mod error;
pub mod json;
mod routes;
mod server;

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;

use axum::Router;
use stoke_protocol::message::client::{Refusal, Reply, Request};
use tokio::sync::mpsc;

pub(crate) use server::{Api, serve};

/// The OpenAPI document, which names every route.
pub const OPENAPI: &str = include_str!("openapi.json");

/// Replies to a question, as they come; dropping the receiver takes the question back.
pub type Asked = Pin<Box<dyn Future<Output = Result<mpsc::Receiver<Reply>, Refusal>> + Send>>;

/// A user's way to the cluster.
pub trait Ask: Send + Sync + 'static {
    fn ask(&self, request: Request) -> Asked;
}

/// All routes, for one user.
pub fn router(ask: Arc<dyn Ask>) -> Router {
    routes::router(ask).merge(dashboard::router())
}
