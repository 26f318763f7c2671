//! Connections of clients: taken, watched and ended. Owns how many there are and how long one may do nothing; knows no request.
//!
//! G5: a connection on which the client keeps us waiting for `IDLE_MAX` is over: it has sent no whole request, or does not read its answer.
//! G6: a request whose connection is gone is dropped, with its questions.

use std::convert::Infallible;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body_util::BodyExt;
use hyper::body::{Body as HttpBody, Frame, Incoming, SizeHint};
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use tokio::time::{sleep, sleep_until, timeout};

use super::service::{Body, Room, Service};

/// See G5.
const IDLE_MAX: Duration = Duration::from_secs(60);
/// From the first byte of a request's head to its last.
const HEADER_MAX: Duration = Duration::from_secs(20);
const HEADER_BYTES_MAX: usize = 32 * 1024;
/// Requests on one HTTP/2 connection at a time.
const STREAMS_MAX: u32 = 128;
/// An HTTP/2 peer that answers no ping for so long is gone.
const PING: Duration = Duration::from_secs(20);
/// When the process has no file left for another connection.
const ACCEPT_RETRY: Duration = Duration::from_millis(100);
/// Running requests have so long when the gateway stops.
pub(super) const GRACE: Duration = Duration::from_secs(5);

/// Serves until `stopping` is true, and then until the last connection is over or the grace is.
pub(super) async fn serve(
    listener: TcpListener,
    service: Arc<Service>,
    connections_max: usize,
    mut stopping: watch::Receiver<bool>,
) {
    let places = Arc::new(Semaphore::new(connections_max));
    let stop = stopping.clone();
    let mut conversations = JoinSet::new();
    loop {
        let accept = async {
            let place = places.clone().acquire_owned().await.expect("it is never closed");
            (place, listener.accept().await)
        };
        tokio::select! {
            biased;
            () = stopped(&mut stopping) => break,
            Some(_) = conversations.join_next() => {}
            (place, accepted) = accept => match accepted {
                Ok((stream, peer)) => {
                    let _ = stream.set_nodelay(true);
                    let conversation = welcome(stream, service.clone(), stop.clone());
                    conversations.spawn(async move {
                        if let Err(error) = conversation.await {
                            // What goes wrong here is the client's own matter.
                            tracing::debug!(%peer, %error, "a connection has failed");
                        }
                        drop(place);
                    });
                }
                Err(error) => {
                    tracing::warn!(%error, "a connection was not taken");
                    sleep(ACCEPT_RETRY).await;
                }
            },
        }
    }
    drop(listener);
    let _ = timeout(GRACE, async { while conversations.join_next().await.is_some() {} }).await;
}

/// Done when the gateway stops.
async fn stopped(stopping: &mut watch::Receiver<bool>) {
    let _ = stopping.wait_for(|stopping| *stopping).await;
}

/// One connection, with TLS or without.
async fn welcome(
    stream: TcpStream,
    service: Arc<Service>,
    stopping: watch::Receiver<bool>,
) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    match service.secrets.tls() {
        None => converse(stream, service, stopping).await,
        Some(tls) => converse(tls.accept(stream).await?, service, stopping).await,
    }
}

/// One connection, until it is over.
async fn converse<S: AsyncRead + AsyncWrite + Unpin + Send + 'static>(
    stream: S,
    service: Arc<Service>,
    mut stopping: watch::Receiver<bool>,
) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let activity = Arc::new(Activity::new());
    let io = TokioIo::new(Watched { inner: stream, activity: activity.clone() });
    let answering = activity.clone();
    let answer = service_fn(move |request: Request<Incoming>| {
        let (service, activity) = (service.clone(), answering.clone());
        async move {
            let waiting = Waiting::new(&activity);
            let (response, room) = service.serve(request).await;
            drop(waiting);
            let watched = |body| WatchedBody { body, activity, waiting: None, _room: room }.boxed_unsync();
            Ok::<Response<Body>, Infallible>(response.map(watched))
        }
    });
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder.http1().timer(TokioTimer::new()).header_read_timeout(HEADER_MAX).max_buf_size(HEADER_BYTES_MAX);
    builder
        .http2()
        .timer(TokioTimer::new())
        .keep_alive_interval(PING)
        .keep_alive_timeout(PING)
        .max_concurrent_streams(STREAMS_MAX)
        .max_header_list_size(HEADER_BYTES_MAX as u32);
    let connection = builder.serve_connection(io, answer);
    tokio::pin!(connection);
    let idle = activity.idle();
    tokio::pin!(idle);
    tokio::select! {
        ended = connection.as_mut() => return ended,
        () = &mut idle => return Ok(()),
        () = stopped(&mut stopping) => connection.as_mut().graceful_shutdown(),
    }
    tokio::select! {
        ended = connection => ended,
        () = idle => Ok(()),
    }
}

/// Who waits for whom on a connection.
struct Activity {
    since: Instant,
    /// When something last went on, in milliseconds after `since`.
    progress_ms: AtomicU64,
    /// Requests and bodies that wait for this side.
    waiting: AtomicUsize,
}

impl Activity {
    fn new() -> Self {
        Self { since: Instant::now(), progress_ms: AtomicU64::new(0), waiting: AtomicUsize::new(0) }
    }

    fn progress(&self) {
        self.progress_ms.fetch_max(self.since.elapsed().as_millis() as u64, Ordering::Relaxed);
    }

    /// Done when the client has kept us waiting for too long (G5).
    async fn idle(&self) {
        loop {
            let last = self.since + Duration::from_millis(self.progress_ms.load(Ordering::Relaxed));
            let is_waited_for = self.waiting.load(Ordering::Relaxed) > 0;
            let until = if is_waited_for { Instant::now() + IDLE_MAX } else { last + IDLE_MAX };
            if until <= Instant::now() {
                return;
            }
            sleep_until(until.into()).await;
        }
    }
}

/// The client waits for this side.
struct Waiting(Arc<Activity>);

impl Waiting {
    fn new(activity: &Arc<Activity>) -> Self {
        activity.waiting.fetch_add(1, Ordering::Relaxed);
        Self(activity.clone())
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        self.0.progress();
        self.0.waiting.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A body that tells who waits for whom: nobody asks it for more while the client reads nothing.
struct WatchedBody {
    body: Body,
    activity: Arc<Activity>,
    waiting: Option<Waiting>,
    _room: Room,
}

impl HttpBody for WatchedBody {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let polled = Pin::new(&mut self.body).poll_frame(cx);
        self.waiting = match (&polled, self.waiting.take()) {
            (Poll::Ready(_), _) => None,
            (Poll::Pending, Some(waiting)) => Some(waiting),
            (Poll::Pending, None) => Some(Waiting::new(&self.activity)),
        };
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// A stream of bytes on which each write that the client makes room for counts as progress. What it sends does not: dribbling is no progress.
struct Watched<S> {
    inner: S,
    activity: Arc<Activity>,
}

impl<S: AsyncRead + Unpin> AsyncRead for Watched<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_read(cx, buffer)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Watched<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let written = ready!(Pin::new(&mut self.inner).poll_write(cx, bytes));
        self.activity.progress();
        Poll::Ready(written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = ready!(Pin::new(&mut self.inner).poll_write_vectored(cx, slices));
        self.activity.progress();
        Poll::Ready(written)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}
