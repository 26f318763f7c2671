//! The HTTP side: `/metrics` and `/healthz`. Read only, without secrets and without authentication, so on the loopback by default.

use std::net::SocketAddr;
use std::sync::Arc;

use axum::Router;
use axum::http::StatusCode;
use axum::routing::get;
use tokio::net::TcpListener;

use crate::metrics::Metrics;

/// Binds at once, so that a port in use is an error of the start.
pub(crate) async fn bind(address: SocketAddr) -> std::io::Result<TcpListener> {
    TcpListener::bind(address).await
}

/// Serves until it is aborted. `healthy` tells whether the journal still takes records.
pub(crate) async fn serve(listener: TcpListener, metrics: Arc<Metrics>, healthy: Arc<dyn Fn() -> bool + Send + Sync>) {
    let text = move || {
        let metrics = metrics.clone();
        async move { ([("content-type", "text/plain; version=0.0.4")], metrics.text()) }
    };
    let health = move || {
        let healthy = healthy();
        async move { if healthy { (StatusCode::OK, "ok\n") } else { (StatusCode::SERVICE_UNAVAILABLE, "ending\n") } }
    };
    let router = Router::new().route("/metrics", get(text)).route("/healthz", get(health));
    if let Err(error) = axum::serve(listener, router).await {
        tracing::error!(%error, "metrics are not served any more");
    }
}
