//! The HTTP side: `/metrics` and `/healthz`. Read only, without secrets and without authentication, so on the loopback by default.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::http::StatusCode;
use axum::routing::get;
use hyper::server::conn::http1;
use hyper_util::rt::TokioIo;
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpSocket};
use tokio::sync::Semaphore;
use tokio::time::timeout;

use crate::metrics::Metrics;

/// Connections that wait in the kernel. One more would not be refused there: its client would try again for a minute, and seem to hang.
const WAITING_MAX: u32 = 1024;

/// Binds at once, so that a port in use is an error of the start.
pub(crate) async fn bind(address: SocketAddr) -> std::io::Result<TcpListener> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(WAITING_MAX)
}

/// Connections at a time: each costs memory and a file; more wait in the kernel.
const CONNECTIONS_MAX: usize = 64;
/// A connection carries one request and is over after this time: a client that is slow on purpose holds its place for no longer.
const CONNECTION_MAX: Duration = Duration::from_secs(5);
/// When the process has no file left for another connection.
const ACCEPT_RETRY: Duration = Duration::from_millis(100);

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
    let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        let Ok(place) = places.clone().acquire_owned().await else { return };
        let stream = match listener.accept().await {
            Ok((stream, _)) => TokioIo::new(stream),
            Err(error) => {
                tracing::warn!(%error, "a connection for metrics was not taken");
                tokio::time::sleep(ACCEPT_RETRY).await;
                continue;
            }
        };
        let service = TowerToHyperService::new(router.clone());
        let conversation = http1::Builder::new().keep_alive(false).serve_connection(stream, service);
        tokio::spawn(async move {
            // What goes wrong here is the client's own matter.
            let _ended = timeout(CONNECTION_MAX, conversation).await;
            drop(place);
        });
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpStream;

    use super::*;

    #[tokio::test]
    async fn slow_clients_hold_their_places_only_for_a_while() {
        let listener = bind(([127, 0, 0, 1], 0).into()).await.unwrap();
        let address = listener.local_addr().unwrap();
        let server = tokio::spawn(serve(listener, Arc::new(Metrics::new()), Arc::new(|| true)));
        let mut slow = Vec::new();
        for _ in 0..2 * CONNECTIONS_MAX {
            let mut stream = TcpStream::connect(address).await.unwrap();
            stream.write_all(b"GET /healthz HT").await.unwrap();
            slow.push(stream);
        }
        let mut client = TcpStream::connect(address).await.unwrap();
        client.write_all(b"GET /healthz HTTP/1.1\r\nhost: a\r\n\r\n").await.unwrap();
        let mut answer = String::new();
        timeout(6 * CONNECTION_MAX, client.read_to_string(&mut answer)).await.unwrap().unwrap();
        assert!(answer.starts_with("HTTP/1.1 200") && answer.ends_with("ok\n"), "{answer}");
        let ended = slow[0].read(&mut [0; 16]).await;
        assert!(!matches!(ended, Ok(1..)), "{ended:?}");
        server.abort();
    }
}
