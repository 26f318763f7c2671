//! The HTTP side: metrics for Prometheus and a health check. Owns the listener; answers nothing that changes anything, so it has no
//! identities yet and listens where the operator says, loopback in a local cluster.

use std::io;
use std::net::SocketAddr;

use axum::Router;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::get;
use tokio::sync::watch;

use crate::metrics::Metrics;

/// A listener that serves until its stop signal changes.
pub struct Http {
    pub address: SocketAddr,
    pub task: tokio::task::JoinHandle<io::Result<()>>,
}

/// Binds and serves. `healthy` turns `/healthz` into 503 when false.
pub async fn serve(
    address: SocketAddr,
    metrics: Metrics,
    healthy: watch::Receiver<bool>,
    mut stop: watch::Receiver<bool>,
) -> io::Result<Http> {
    let listener = tokio::net::TcpListener::bind(address).await?;
    let address = listener.local_addr()?;
    let render = move || {
        let text = metrics.render();
        async move { ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], text) }
    };
    let health = move || {
        let healthy = *healthy.borrow();
        async move {
            if healthy {
                (StatusCode::OK, "ok\n").into_response()
            } else {
                (StatusCode::SERVICE_UNAVAILABLE, "journal is not writable or has no room\n").into_response()
            }
        }
    };
    let routes = Router::new().route("/metrics", get(render)).route("/healthz", get(health));
    let stopped = async move {
        // An error means that the coordinator is gone, which is as good a reason to stop.
        drop(stop.wait_for(|stop| *stop).await);
    };
    let task = tokio::spawn(async move { axum::serve(listener, routes).with_graceful_shutdown(stopped).await });
    Ok(Http { address, task })
}
