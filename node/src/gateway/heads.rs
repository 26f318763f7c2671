//! The connections to heads: dialled when a question needs one, shared by the questions to the same head, and let go with its route. Owns
//! connections only; what is asked and answered on them is the asking's.
//!
//! G2: a head is reached at the address of its route and only if its certificate names the rank that the route names.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use stoke_protocol::identity::Subject;
use stoke_protocol::message::rank::RankId;
use stoke_protocol::message::serve::{Head, Question};
use stoke_protocol::transport::{Connection, Endpoint, FrameReceiver, TransportError};

/// Questions on one connection at a time: well below the streams that a bulk endpoint lets a peer have (1024), because one more would wait without
/// a word, and few enough that the connection's window (64 MiB) has room for all their answers.
const STREAMS_MAX: usize = 256;
/// Connections to one head: together they carry as many questions as a gateway has requests.
const LINES_MAX: usize = 8;

/// Every head that this gateway talks to.
pub(super) struct Heads {
    endpoint: Endpoint,
    known: Mutex<BTreeMap<(RankId, SocketAddr), Arc<Lines>>>,
}

/// The connections to one head. Locked while one is dialled, so that those who come meanwhile share it.
type Lines = tokio::sync::Mutex<Vec<Line>>;

struct Line {
    connection: Connection,
    open: Arc<AtomicUsize>,
}

/// An answer on its way. Dropping it tells the head to stop.
pub(super) struct Stream {
    pub(super) frames: FrameReceiver,
    _open: Open,
}

struct Open(Arc<AtomicUsize>);

/// Why a question did not reach a head.
#[derive(Debug)]
pub(super) enum Unreached {
    /// As many questions as connections carry are under way.
    Full,
    Transport(TransportError),
}

impl Heads {
    pub(super) fn new(endpoint: Endpoint) -> Self {
        Self { endpoint, known: Mutex::default() }
    }

    /// Lets go of the connections to all but these. Answers that are on their way keep theirs.
    pub(super) fn keep(&self, heads: impl Iterator<Item = Head>) {
        let named: Vec<_> = heads.map(|head| (head.id, head.address)).collect();
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        known.retain(|key, _| named.contains(key));
    }

    /// Sends a question to a head (G2).
    pub(super) async fn ask(&self, head: Head, question: &Question) -> Result<Stream, Unreached> {
        let lines = {
            let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
            known.entry((head.id, head.address)).or_default().clone()
        };
        let (connection, open) = self.line(&lines, head).await?;
        let frames = connection.request_frames(question).await.map_err(Unreached::Transport)?;
        Ok(Stream { frames, _open: open })
    }

    async fn line(&self, lines: &Lines, head: Head) -> Result<(Connection, Open), Unreached> {
        let mut lines = lines.lock().await;
        lines.retain(|line| line.connection.close_reason().is_none());
        let free = lines.iter().find(|line| line.open.load(Ordering::Relaxed) < STREAMS_MAX);
        if let Some(line) = free {
            return Ok((line.connection.clone(), Open::new(&line.open)));
        }
        if lines.len() >= LINES_MAX {
            return Err(Unreached::Full);
        }
        let RankId { job, generation, rank } = head.id;
        let expected = Subject::Rank { job, generation, rank };
        let connection = self.endpoint.connect(head.address, &expected).await.map_err(Unreached::Transport)?;
        let line = Line { connection: connection.clone(), open: Arc::default() };
        let open = Open::new(&line.open);
        lines.push(line);
        Ok((connection, open))
    }
}

impl Open {
    /// Counted under the lock of the lines, so that no line gets more than its share.
    fn new(open: &Arc<AtomicUsize>) -> Self {
        open.fetch_add(1, Ordering::Relaxed);
        Self(open.clone())
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}
