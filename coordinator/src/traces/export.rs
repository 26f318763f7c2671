//! Spans on their way to a collector: OTLP over HTTP, protobuf. Owns the queue and the connection; what becomes a span is `mod.rs`.

use std::time::Duration;

use opentelemetry::KeyValue;
use opentelemetry_otlp::{ExporterBuildError, SpanExporter, WithExportConfig, WithHttpConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::trace::{SpanData, SpanExporter as _};
use prometheus::IntCounterVec;
use stoke_protocol::ids::ClusterId;
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout};

/// Spans that wait for the collector; what comes when it is full is dropped and counted. About 4 MiB.
const QUEUE_MAX: usize = 8_192;
/// Of one request: about 200 KiB.
const BATCH_MAX: usize = 512;
/// The first span of a request waits so long for others.
const BATCH_WAIT: Duration = Duration::from_millis(500);
/// Of a request, its repetitions included.
const REQUEST_MAX: Duration = Duration::from_secs(10);
/// Between two lines of the log about a collector that does not take spans.
const LOG_EVERY: Duration = Duration::from_secs(60);
/// Where collectors take traces, unless the endpoint has a path.
const PATH: &str = "/v1/traces";

/// Why spans cannot be sent.
#[derive(Debug, thiserror::Error)]
pub enum OtlpError {
    #[error("{0:?} is no http:// or https:// URL such as http://127.0.0.1:4318")]
    Endpoint(String),
    /// Not told: it holds a secret.
    #[error("the URL has a user or a password: give those in OTEL_EXPORTER_OTLP_HEADERS, which is not logged")]
    Secret,
    #[error("make the client of the collector")]
    Client(#[from] reqwest::Error),
    #[error("make the exporter of traces")]
    Exporter(#[from] ExporterBuildError),
}

/// The way into the queue. When it is dropped, what is in the queue is still sent.
pub(crate) struct Queue {
    sender: mpsc::Sender<SpanData>,
    spans: IntCounterVec,
}

impl Queue {
    /// Whether there is room for what comes in any number; the other half is for what happens to jobs.
    pub fn has_room(&self) -> bool {
        self.sender.capacity() > QUEUE_MAX / 2
    }

    pub fn push(&self, span: SpanData) {
        if self.sender.try_send(span).is_err() {
            self.spans.with_label_values(&["dropped"]).inc();
        }
    }
}

/// A queue, and what sends its spans until the queue is dropped and empty. `spans` counts them by result.
pub(crate) fn start(
    endpoint: &str,
    cluster: ClusterId,
    spans: IntCounterVec,
) -> Result<(Queue, impl Future<Output = ()> + use<>), OtlpError> {
    let endpoint = url(endpoint)?;
    // Another one may be there already.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let client = reqwest::Client::builder().timeout(REQUEST_MAX).build()?;
    let mut exporter = SpanExporter::builder()
        .with_http()
        .with_http_client(client)
        .with_endpoint(endpoint.as_str())
        .with_timeout(REQUEST_MAX)
        .build()?;
    exporter.set_resource(
        &Resource::builder_empty()
            .with_attributes([
                KeyValue::new("service.name", "stoke"),
                KeyValue::new("service.version", env!("CARGO_PKG_VERSION")),
                KeyValue::new("stoke.cluster.id", cluster.to_string()),
            ])
            .build(),
    );
    let (sender, receiver) = mpsc::channel(QUEUE_MAX);
    let queue = Queue { sender, spans: spans.clone() };
    Ok((queue, send(exporter, endpoint, receiver, spans)))
}

async fn send(exporter: SpanExporter, endpoint: String, mut queue: mpsc::Receiver<SpanData>, spans: IntCounterVec) {
    let mut complained: Option<Instant> = None;
    loop {
        let mut batch = Vec::new();
        if queue.recv_many(&mut batch, BATCH_MAX).await == 0 {
            return;
        }
        let full = async {
            loop {
                let room = BATCH_MAX - batch.len();
                if room == 0 || queue.recv_many(&mut batch, room).await == 0 {
                    return;
                }
            }
        };
        let _ended_by_time = timeout(BATCH_WAIT, full).await;
        let count = batch.len() as u64;
        match exporter.export(batch).await {
            Ok(()) => spans.with_label_values(&["sent"]).inc_by(count),
            Err(error) => {
                spans.with_label_values(&["failed"]).inc_by(count);
                if complained.is_none_or(|at| at.elapsed() >= LOG_EVERY) {
                    tracing::warn!(%endpoint, %error, spans = count, "the collector did not take spans: they are lost");
                    complained = Some(Instant::now());
                }
            }
        }
    }
}

/// Where traces go: the path of OTLP where the endpoint has none.
fn url(endpoint: &str) -> Result<String, OtlpError> {
    let wrong = || OtlpError::Endpoint(endpoint.to_owned());
    let mut url = reqwest::Url::parse(endpoint).map_err(|_| wrong())?;
    if !url.username().is_empty() || url.password().is_some() {
        return Err(OtlpError::Secret);
    }
    if !matches!(url.scheme(), "http" | "https") || !url.has_host() {
        return Err(wrong());
    }
    if matches!(url.path(), "" | "/") {
        url.set_path(PATH);
    }
    url.set_fragment(None);
    Ok(url.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoint_without_a_path_gets_that_of_traces() {
        assert_eq!(url("http://127.0.0.1:4318").unwrap(), "http://127.0.0.1:4318/v1/traces");
        assert_eq!(url("https://otel.example.org/").unwrap(), "https://otel.example.org/v1/traces");
        assert_eq!(url("http://tempo:4318/otlp/v1/traces").unwrap(), "http://tempo:4318/otlp/v1/traces");
        assert_eq!(url("http://tempo:4318?tenant=a#x").unwrap(), "http://tempo:4318/v1/traces?tenant=a");
        let secret = url("http://ada:s3cret@tempo:4318").unwrap_err().to_string();
        assert!(!secret.contains("s3cret") && secret.contains("OTEL_EXPORTER_OTLP_HEADERS"), "{secret}");
        for wrong in ["127.0.0.1:4318", "tempo", "grpc://tempo:4317", "http://", ""] {
            assert!(url(wrong).unwrap_err().to_string().contains("http://127.0.0.1:4318"), "{wrong}");
        }
    }
}
