//! Where endpoints run. Owns the network thread; nothing that blocks may ever be spawned on it: packets, acknowledgements and keep-alives
//! of every connection wait behind it (a futex wait there was a deadlock once).

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Weak};
use std::thread::{self, JoinHandle};
use std::time::Instant;

use quinn::{AsyncTimer, AsyncUdpSocket, Runtime, TokioRuntime};
use tokio::runtime::Handle;
use tokio::sync::oneshot;

use super::error::TransportError;

/// Scheduler turns between the last handle's end and the thread's, so that closes which were queued leave the machine.
const FLUSH_TURNS: usize = 64;

/// A place for endpoints and their connections: a thread of its own, or the runtime of the caller. Clones share it; the thread ends when
/// the last clone, endpoint and connection are gone.
#[derive(Clone, Debug)]
pub struct Io(Arc<Place>);

#[derive(Debug)]
struct Place {
    handle: Handle,
    thread: Option<NetworkThread>,
}

#[derive(Debug)]
struct NetworkThread {
    /// Dropped to end the thread.
    stop: oneshot::Sender<()>,
    join: JoinHandle<()>,
}

impl Io {
    /// A thread with a single-threaded runtime: a third of the latency and CPU of a shared one, and compute cannot delay it.
    pub fn thread(name: &str) -> Result<Self, TransportError> {
        let error = |source| TransportError::Thread { name: name.to_owned(), source };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(error)?;
        let handle = runtime.handle().clone();
        let (stop, stopped) = oneshot::channel::<()>();
        let run = move || {
            runtime.block_on(async {
                let _ = stopped.await;
                for _ in 0..FLUSH_TURNS {
                    tokio::task::yield_now().await;
                }
            });
        };
        let join = thread::Builder::new().name(name.to_owned()).spawn(run).map_err(error)?;
        Ok(Self(Arc::new(Place { handle, thread: Some(NetworkThread { stop, join }) })))
    }

    /// The runtime in which this is called: for simulations, and for processes that do nothing else.
    pub fn ambient() -> Result<Self, TransportError> {
        let handle = Handle::try_current().map_err(|_| TransportError::NoRuntime)?;
        Ok(Self(Arc::new(Place { handle, thread: None })))
    }

    /// Runs a task beside the connections. It must never block.
    pub fn spawn<F>(&self, task: F) -> tokio::task::JoinHandle<F::Output>
    where
        F: Future<Output: Send> + Send + 'static,
    {
        self.0.handle.spawn(task)
    }

    /// What quinn spawns and times with. Holds no share of the thread, or the thread would keep itself alive.
    pub(super) fn runtime(&self) -> Arc<dyn Runtime> {
        Arc::new(OnHandle(self.0.handle.clone()))
    }

    /// Makes `work` run as if on the network thread, for sockets and timers that register themselves with their runtime.
    pub(super) fn enter<T>(&self, work: impl FnOnce() -> T) -> T {
        let _guard = self.0.handle.enter();
        work()
    }

    pub(super) fn downgrade(&self) -> WeakIo {
        WeakIo(Arc::downgrade(&self.0))
    }
}

/// A place that may be gone.
#[derive(Clone, Debug)]
pub(super) struct WeakIo(Weak<Place>);

impl WeakIo {
    pub(super) fn upgrade(&self) -> Option<Io> {
        self.0.upgrade().map(Io)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let Some(NetworkThread { stop, join }) = self.thread.take() else { return };
        drop(stop);
        // The last handle may be dropped by a task of the thread itself, which then ends on its own.
        if join.thread().id() != thread::current().id() && join.join().is_err() {
            tracing::error!("network thread panicked");
        }
    }
}

#[derive(Debug)]
struct OnHandle(Handle);

impl Runtime for OnHandle {
    fn new_timer(&self, at: Instant) -> Pin<Box<dyn AsyncTimer>> {
        let _guard = self.0.enter();
        TokioRuntime.new_timer(at)
    }

    fn spawn(&self, future: Pin<Box<dyn Future<Output = ()> + Send>>) {
        self.0.spawn(future);
    }

    fn wrap_udp_socket(&self, socket: std::net::UdpSocket) -> io::Result<Arc<dyn AsyncUdpSocket>> {
        let _guard = self.0.enter();
        TokioRuntime.wrap_udp_socket(socket)
    }

    fn now(&self) -> Instant {
        TokioRuntime.now()
    }
}
