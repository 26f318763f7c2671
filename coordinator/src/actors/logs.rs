//! Logs: lines of ranks, relayed from their nodes to a user. The coordinator keeps none of them and holds a bounded number of chunks; a
//! reader that is slow slows the nodes' reading down, not the cluster.

use std::collections::BTreeSet;
use std::time::Duration;

use stoke_protocol::ids::{JobId, NodeId, Rank};
use stoke_protocol::list::List;
use stoke_protocol::message::client::{Refusal, Reply};
use stoke_protocol::message::node::{LogChunk, ReadLog};
use stoke_protocol::message::rank::RankId;
use stoke_protocol::transport::{Connection, TransportError};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::conversation::{Gone, send};
use super::handle::ClusterHandle;
use super::messages::{Message, Source};

/// Chunks between the nodes and one reader.
const CHUNKS_WAITING_MAX: usize = 16;
/// Views of the job that wait while its logs are read.
const VIEWS_WAITING_MAX: usize = 4;
/// A node that does not answer for so long is passed over, unless its log is followed.
const CHUNK_MAX: Duration = Duration::from_secs(10);

/// What the user asked for.
#[derive(Clone, Copy)]
pub(super) struct Wanted {
    pub job: JobId,
    pub rank: Option<Rank>,
    pub tail: Option<u32>,
    pub follow: bool,
}

/// Relays until the last chunk. A followed job is followed to its end, with every rank that is added to it.
pub(super) async fn relay(cluster: &ClusterHandle, replies: &mpsc::Sender<Reply>, wanted: Wanted) -> Result<(), Gone> {
    let (chunks, mut arriving) = mpsc::channel(CHUNKS_WAITING_MAX);
    let (views, mut changes) = mpsc::channel(VIEWS_WAITING_MAX);
    if wanted.follow {
        cluster.send(Message::Watch { job: wanted.job, views });
    }
    // Dropped at the end of this function, whatever ends it: the nodes are told to stop.
    let mut readers = JoinSet::new();
    let mut seen = BTreeSet::new();
    let (mut stale, mut ended, mut generation) = (true, !wanted.follow, None);
    loop {
        if std::mem::take(&mut stale) {
            let ranks = match sources(cluster, wanted).await? {
                Ok(ranks) => ranks,
                Err(refusal) => return send(replies, Reply::Refused(refusal)).await,
            };
            for (id, node, connection) in ranks.into_iter().filter(|(id, ..)| seen.insert(*id)) {
                readers.spawn(read(id, node, connection, wanted, chunks.clone()));
            }
        }
        if ended && readers.is_empty() && arriving.is_empty() {
            let rank = wanted.rank.unwrap_or_default();
            let id = RankId { job: wanted.job, generation: generation.unwrap_or_default(), rank };
            return send(replies, Reply::Log(LogChunk { id, lines: List::default(), last: true })).await;
        }
        tokio::select! {
            biased;
            Some(chunk) = arriving.recv() => send(replies, Reply::Log(chunk)).await?,
            () = replies.closed() => return Err(Gone),
            Some(_) = readers.join_next(), if !readers.is_empty() => {}
            view = changes.recv(), if !ended => match view {
                Some(view) => {
                    ended = view.state.is_terminal();
                    // Ranks are added in a generation of their own.
                    stale = generation.replace(view.generation) != Some(view.generation) || ended;
                }
                None => ended = true,
            },
        }
    }
}

async fn sources(cluster: &ClusterHandle, wanted: Wanted) -> Result<Result<Vec<Source>, Refusal>, Gone> {
    let (answer, answered) = oneshot::channel();
    cluster.send(Message::Sources { job: wanted.job, rank: wanted.rank, answer });
    answered.await.map_err(|_| Gone)
}

async fn read(
    id: RankId,
    node: NodeId,
    connection: Option<Connection>,
    wanted: Wanted,
    chunks: mpsc::Sender<LogChunk>,
) {
    let why = match connection {
        None => format!("{node} is not connected"),
        Some(connection) => match read_node(id, &connection, wanted, &chunks).await {
            Ok(()) => return,
            Err(error) => format!("{node}: {error}"),
        },
    };
    let line = format!("(the log of {} cannot be read now: {why})", id.rank);
    // The reader may be gone.
    let _gone = chunks.send(LogChunk { id, lines: vec![line].into(), last: false }).await;
}

async fn read_node(
    id: RankId,
    connection: &Connection,
    wanted: Wanted,
    chunks: &mpsc::Sender<LogChunk>,
) -> Result<(), TransportError> {
    let question = ReadLog { id, tail: wanted.tail, follow: wanted.follow };
    let mut receiver = connection.request_frames(&question).await?;
    loop {
        let chunk = if wanted.follow {
            receiver.recv::<LogChunk>().await?
        } else {
            let late = TransportError::Deadline { what: "wait for a log", after: CHUNK_MAX };
            timeout(CHUNK_MAX, receiver.recv::<LogChunk>()).await.map_err(|_| late)??
        };
        let Some(LogChunk { lines, last, .. }) = chunk else { return Ok(()) };
        // The id is ours: a node speaks of the rank that it was asked for.
        if !lines.is_empty() && chunks.send(LogChunk { id, lines, last: false }).await.is_err() {
            return Ok(());
        }
        if last {
            return Ok(());
        }
    }
}
