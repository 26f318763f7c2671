//! Logs: lines of ranks, relayed from their nodes to a user. The coordinator keeps none of them and holds a bounded number of chunks; a
//! reader that is slow slows the nodes' reading down, not the cluster.

use std::time::Duration;

use stoke_protocol::ids::{Generation, JobId, NodeId, Rank};
use stoke_protocol::list::List;
use stoke_protocol::message::client::Reply;
use stoke_protocol::message::node::{LogChunk, ReadLog};
use stoke_protocol::message::rank::RankId;
use stoke_protocol::transport::{Connection, FrameSender, TransportError};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::gateway::send;
use super::handle::ClusterHandle;
use super::messages::{Message, Sources};

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

/// Relays until the last chunk. A followed job is followed through its generations.
pub(super) async fn relay(
    cluster: &ClusterHandle,
    mut frames: FrameSender,
    wanted: Wanted,
) -> Result<(), TransportError> {
    let mut seen = Generation(0);
    loop {
        let (answer, answered) = oneshot::channel();
        cluster.send(Message::Sources { job: wanted.job, rank: wanted.rank, answer });
        let sources = match answered.await {
            Ok(Ok(sources)) => sources,
            Ok(Err(refusal)) => return send(frames, vec![Reply::Refused(refusal)]).await,
            Err(_) => return Err(TransportError::Ended),
        };
        if sources.generation > seen {
            seen = sources.generation;
            read_all(&mut frames, sources, wanted).await?;
        }
        if !wanted.follow || !next_generation(cluster, &mut frames, wanted.job, seen).await {
            let id = RankId { job: wanted.job, generation: seen, rank: wanted.rank.unwrap_or_default() };
            return send(frames, vec![Reply::Log(LogChunk { id, lines: List::default(), last: true })]).await;
        }
    }
}

/// Reads all ranks at the same time; their chunks come as they come.
async fn read_all(frames: &mut FrameSender, sources: Sources, wanted: Wanted) -> Result<(), TransportError> {
    let (chunks, mut arriving) = mpsc::channel(CHUNKS_WAITING_MAX);
    // Dropped at the end of this function, whatever ends it: the nodes are told to stop.
    let mut readers = JoinSet::new();
    for (id, node, connection) in sources.ranks {
        readers.spawn(read(id, node, connection, wanted, chunks.clone()));
    }
    drop(chunks);
    loop {
        let chunk = tokio::select! {
            biased;
            chunk = arriving.recv() => chunk,
            () = frames.stopped() => return Err(TransportError::Ended),
        };
        match chunk {
            Some(chunk) => frames.send(&Reply::Log(chunk)).await?,
            None => return Ok(()),
        }
    }
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

/// Waits until the job has a newer generation; false when it has ended, or the reader is gone.
async fn next_generation(cluster: &ClusterHandle, frames: &mut FrameSender, job: JobId, seen: Generation) -> bool {
    let (views, mut changes) = mpsc::channel(VIEWS_WAITING_MAX);
    cluster.send(Message::Watch { job, views });
    loop {
        let view = tokio::select! {
            biased;
            view = changes.recv() => view,
            () = frames.stopped() => None,
        };
        match view {
            Some(view) if view.generation > seen => return true,
            Some(view) if view.state.is_terminal() => return false,
            Some(_) => {}
            None => return false,
        }
    }
}
