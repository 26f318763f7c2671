//! The connection of the command line to a coordinator: credentials from a folder, an address that answers, questions with deadlines. Owns
//! retrying; the only file that maps what the coordinator and the transport say to exit codes.
//!
//! I9: a time-out is unknown, not failure. Requests that may be repeated are asked again on a fresh connection until the patience is spent;
//! the others say that the outcome is unknown, and how to find out.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use serde::{Deserialize, Serialize};
use stoke_protocol::identity::{Credentials, KeyRequest, Subject};
use stoke_protocol::ids::Generation;
use stoke_protocol::message::client::{JobState, JobView, Reply, Request};
use stoke_protocol::transport::{CloseCode, Closed, Connection, Endpoint, FrameReceiver, Io, Settings, TransportError};
use tokio::task::JoinSet;

use crate::failure::{Exit, Failure, OrFail};
use crate::place::CLUSTER_FILE;

/// One answer. The coordinator answers from memory, or after a write to its journal.
const ANSWER_MAX: Duration = Duration::from_secs(10);
/// How long a command outlasts a coordinator that restarts.
pub const PATIENCE: Duration = Duration::from_secs(15);
/// The same for `stoke run` and whoever watches a job: a restart with a long journal, and some.
pub const PATIENCE_WATCHING: Duration = Duration::from_secs(90);
const RETRY_WAIT: Duration = Duration::from_millis(100);
const RETRY_WAIT_MAX: Duration = Duration::from_secs(1);

/// `cluster.toml`: where the coordinator of a folder's credentials answers.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ClusterFile {
    /// The cluster's id; for people.
    pub cluster: String,
    /// `host:port`, tried at the same time.
    pub coordinator: Vec<String>,
    /// URL of the HTTP API, where it has one: for other people's clients.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub api: Option<String>,
}

impl ClusterFile {
    pub fn read(dir: &Path) -> Result<Self, Failure> {
        let path = dir.join(CLUSTER_FILE);
        let text = std::fs::read_to_string(&path).or_fail(Exit::NotFound, format!("read {}", path.display()))?;
        toml::from_str(&text).or_fail(Exit::Usage, format!("read {}", path.display()))
    }

    pub fn write(&self, dir: &Path) -> Result<(), Failure> {
        let path = dir.join(CLUSTER_FILE);
        let text = toml::to_string(self).or_fail(Exit::Negative, "encode cluster.toml")?;
        std::fs::write(&path, text).or_fail(Exit::Negative, format!("write {}", path.display()))
    }
}

/// Whether asking twice does the same as asking once.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Repeat {
    Safe,
    /// A lost answer leaves the outcome unknown; the text says how to find out.
    Unsafe(&'static str),
}

pub struct Client {
    dir: PathBuf,
    addresses: Vec<String>,
    credentials: Credentials,
    patience: Duration,
    io: Io,
    connection: Option<Connection>,
}

/// What there is to see of a watched job.
pub enum Sight<'a> {
    Job(&'a JobView),
    /// A generation ended, and no view told of it.
    Ended {
        generation: Generation,
        reason: String,
    },
    /// The coordinator does not answer; it is asked again until the patience is spent.
    Silent,
    Back,
}

/// The frames of an answer that has many.
pub struct Answers {
    receiver: FrameReceiver,
}

impl Client {
    /// Loads the credentials in `dir` and connects. One try at each address: a wrong address should fail now.
    pub async fn open(dir: &Path) -> Result<Self, Failure> {
        let mut client = Self::new(dir, PATIENCE)?;
        client.connect().await?;
        client.renew_when_due().await;
        Ok(client)
    }

    /// The same for a cluster that is known to be coming up.
    pub async fn open_patiently(dir: &Path, patience: Duration) -> Result<Self, Failure> {
        let mut client = Self::new(dir, patience)?;
        let deadline = Instant::now() + patience;
        let mut wait = RETRY_WAIT;
        while let Err(failure) = client.connect().await {
            if failure.exit != Exit::Unavailable || Instant::now() + wait > deadline {
                return Err(failure);
            }
            pause(&mut wait).await;
        }
        Ok(client)
    }

    fn new(dir: &Path, patience: Duration) -> Result<Self, Failure> {
        let file = ClusterFile::read(dir)?;
        let credentials = Credentials::load(dir).map_err(|error| {
            Failure::from_error(Exit::Denied, error)
                .context(format!("load credentials from {}", dir.display()))
                .help("log in again with `stoke login --join TOKEN --coordinator HOST:PORT`")
        })?;
        let io = Io::thread("stoke-net").map_err(transport_failure)?;
        Ok(Self { dir: dir.to_owned(), addresses: file.coordinator, credentials, patience, io, connection: None })
    }

    #[must_use]
    pub fn with_patience(mut self, patience: Duration) -> Self {
        self.patience = patience;
        self
    }

    /// One question, one answer; a refusal is a failure with its exit code.
    pub async fn ask(&mut self, request: &Request, repeat: Repeat) -> Result<Reply, Failure> {
        let deadline = Instant::now() + self.patience;
        let mut wait = RETRY_WAIT;
        loop {
            let failure = match self.ask_once(request).await {
                Ok(Reply::Refused(refusal)) => return Err(refusal.into()),
                Ok(reply) => return Ok(reply),
                Err(Asked::Failed(failure)) => return Err(failure),
                Err(Asked::NotSent(failure)) => failure,
                Err(Asked::Unknown(failure)) => match repeat {
                    Repeat::Safe => failure,
                    Repeat::Unsafe(check) => {
                        let context = "the connection was lost: it is unknown whether the coordinator did it";
                        return Err(failure.context(context).help(check));
                    }
                },
            };
            if Instant::now() + wait > deadline {
                return Err(failure);
            }
            pause(&mut wait).await;
        }
    }

    /// One question, many answers. Reconnecting is the caller's: only it knows where to continue.
    pub async fn stream(&mut self, request: &Request) -> Result<Answers, Failure> {
        let connection = self.connected().await?;
        match connection.request_frames(request).await {
            Ok(receiver) => Ok(Answers { receiver }),
            Err(error) => {
                self.connection = None;
                Err(transport_failure(error))
            }
        }
    }

    /// Every state of a job until it has ended, over any number of coordinator restarts within the patience.
    pub async fn watch(&mut self, request: &Request, mut each: impl FnMut(Sight<'_>)) -> Result<JobView, Failure> {
        let (mut lost_at, mut last): (Option<Instant>, _) = (None, None);
        let mut wait = RETRY_WAIT;
        loop {
            let failure = match self.stream(request).await {
                Err(failure) => failure,
                Ok(mut answers) => loop {
                    match answers.next().await {
                        Ok(Some(Reply::Job(view))) => {
                            wait = RETRY_WAIT;
                            if lost_at.take().is_some() {
                                each(Sight::Back);
                            }
                            for (generation, reason) in self.missed_ends(last, &view).await {
                                each(Sight::Ended { generation, reason });
                            }
                            each(Sight::Job(&view));
                            last = Some((view.recoveries, view.generation));
                            if view.state.is_terminal() {
                                return Ok(*view);
                            }
                        }
                        Ok(Some(Reply::Refused(refusal))) => break refusal.into(),
                        Ok(Some(_)) => return Err(unexpected()),
                        Ok(None) => break Failure::new(Exit::Unavailable, "the coordinator stopped sending"),
                        Err(failure) => break failure,
                    }
                },
            };
            self.connection = None;
            if failure.exit != Exit::Unavailable {
                return Err(failure);
            }
            let since = *lost_at.get_or_insert_with(|| {
                each(Sight::Silent);
                Instant::now()
            });
            if since.elapsed() + wait > self.patience {
                return Err(failure);
            }
            pause(&mut wait).await;
        }
    }

    /// Views skip states that pass quickly: why generations ended is asked for when no view has told of it.
    async fn missed_ends(&mut self, last: Option<(u32, Generation)>, view: &JobView) -> Vec<(Generation, String)> {
        let Some((recoveries, seen)) = last.filter(|(recoveries, _)| *recoveries < view.recoveries) else {
            return Vec::new();
        };
        // A view of a job that recovers tells of the newest end itself.
        let told = u32::from(view.state == JobState::Recovering);
        if recoveries + told == view.recoveries {
            return Vec::new();
        }
        let Ok(Reply::Explained(explained)) = self.ask_once(&Request::Explain { job: view.job }).await else {
            return Vec::new();
        };
        let end = |text: &str| {
            let (generation, reason) = text.split_once(" ended: ")?;
            Some((generation.parse::<Generation>().ok()?, reason.to_owned()))
        };
        let ends = explained.events.iter().filter_map(|event| end(&event.text));
        ends.filter(|(generation, _)| *generation >= seen && *generation < view.generation).collect()
    }

    async fn ask_once(&mut self, request: &Request) -> Result<Reply, Asked> {
        let connection = self.connected().await.map_err(|failure| match failure.exit {
            Exit::Unavailable => Asked::NotSent(failure),
            _ => Asked::Failed(failure),
        })?;
        let answer = tokio::time::timeout(ANSWER_MAX, whole_answer(&connection, request));
        let answer =
            answer.await.unwrap_or(Err(TransportError::Deadline { what: "wait for an answer", after: ANSWER_MAX }));
        answer.map_err(|error| {
            self.connection = None;
            let failure = transport_failure(error);
            if failure.exit == Exit::Unavailable { Asked::Unknown(failure) } else { Asked::Failed(failure) }
        })
    }

    async fn connected(&mut self) -> Result<Connection, Failure> {
        match &self.connection {
            Some(connection) if connection.close_reason().is_none() => Ok(connection.clone()),
            Some(_) | None => self.connect().await,
        }
    }

    /// Tries all addresses at the same time; the first that answers as this cluster's coordinator is used.
    async fn connect(&mut self) -> Result<Connection, Failure> {
        self.connection = None;
        let mut attempts = JoinSet::new();
        let mut failures = Vec::new();
        for name in &self.addresses {
            match resolve(name).await {
                Ok(addresses) => {
                    for address in addresses {
                        let endpoint = self.endpoint(address)?;
                        attempts.spawn(async move { endpoint.connect(address, &Subject::Coordinator).await });
                    }
                }
                Err(failure) => failures.push(failure),
            }
        }
        while let Some(attempt) = attempts.join_next().await {
            match attempt.or_fail(Exit::Negative, "connect")? {
                Ok(connection) => {
                    self.connection = Some(connection.clone());
                    return Ok(connection);
                }
                Err(error) => failures.push(transport_failure(error)),
            }
        }
        // A refusal says more than silence elsewhere.
        failures.sort_by_key(|failure| failure.exit != Exit::Denied);
        let fallback = || {
            Failure::usage(format!("{} names no coordinator address", self.dir.join(CLUSTER_FILE).display()))
                .help("add one: coordinator = [\"host:7878\"]")
        };
        Err(failures.into_iter().next().unwrap_or_else(fallback))
    }

    fn endpoint(&self, towards: SocketAddr) -> Result<Endpoint, Failure> {
        Endpoint::client(&self.io, any_address(towards), Settings::control(), self.credentials.clone())
            .map_err(transport_failure)
    }

    /// At two thirds of a certificate's life. A failure is no reason to stop: a third of the life is left.
    async fn renew_when_due(&mut self) {
        if SystemTime::now() < self.credentials.renew_at() {
            return;
        }
        if let Err(failure) = self.renew().await {
            tracing::warn!("renew the certificate in {}: {}", self.dir.display(), failure.message());
        }
    }

    async fn renew(&mut self) -> Result<(), Failure> {
        let key = KeyRequest::new().or_fail(Exit::Negative, "make a key")?;
        let reply = self.ask(&Request::Renew { csr: key.csr().to_vec().into() }, Repeat::Safe).await?;
        let Reply::Certificate { certificate } = reply else { return Err(unexpected()) };
        let credentials = self.credentials.clone();
        credentials.renew(key, &certificate).or_fail(Exit::Negative, "use the renewed certificate")?;
        credentials.save(&self.dir).or_fail(Exit::Negative, "save the renewed certificate")
    }
}

impl Answers {
    /// The next frame; none at the end.
    pub async fn next(&mut self) -> Result<Option<Reply>, Failure> {
        self.receiver.recv().await.map_err(transport_failure)
    }
}

/// The answer to a question. A long list comes in several frames of its kind; any other answer is one frame.
async fn whole_answer(connection: &Connection, request: &Request) -> Result<Reply, TransportError> {
    let mut frames = connection.request_frames(request).await?;
    let mut whole: Reply = frames.expect().await?;
    while is_list(&whole)
        && let Some(more) = frames.recv().await?
    {
        match (&mut whole, more) {
            (Reply::Jobs(all), Reply::Jobs(more)) => all.extend(more),
            (Reply::Nodes(all), Reply::Nodes(more)) => all.extend(more),
            (Reply::Checkpoints(all), Reply::Checkpoints(more)) => all.extend(more),
            (Reply::Tokens(all), Reply::Tokens(more)) => all.extend(more),
            // A list that ends in something else is no answer of this protocol; the caller sees a kind it did not ask for.
            (_, other) => return Ok(other),
        }
    }
    Ok(whole)
}

fn is_list(reply: &Reply) -> bool {
    matches!(reply, Reply::Jobs(_) | Reply::Nodes(_) | Reply::Checkpoints(_) | Reply::Tokens(_))
}

/// How far a question came.
enum Asked {
    NotSent(Failure),
    Unknown(Failure),
    Failed(Failure),
}

/// The answer was of another kind: the two sides do not mean the same protocol.
pub fn unexpected() -> Failure {
    Failure::new(Exit::Negative, "the coordinator gave an answer of another kind")
        .help("run the same stoke release on both sides")
}

/// `host:port` to addresses.
pub async fn resolve(name: &str) -> Result<Vec<SocketAddr>, Failure> {
    let help = "write the coordinator as HOST:PORT, for example 10.0.0.1:7878";
    let found: Vec<SocketAddr> = tokio::net::lookup_host(name)
        .await
        .map_err(|error| {
            Failure::from_error(Exit::Unavailable, error)
                .context(format!("resolve coordinator address {name:?}"))
                .help(help)
        })?
        .collect();
    if found.is_empty() {
        return Err(Failure::new(Exit::Unavailable, format!("{name:?} has no address")).help(help));
    }
    Ok(found)
}

/// Any port of the right family.
pub fn any_address(towards: SocketAddr) -> SocketAddr {
    let ip: IpAddr = if towards.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    SocketAddr::new(ip, 0)
}

/// The exit code and the mend of what the transport says.
pub fn transport_failure(error: TransportError) -> Failure {
    let (exit, help) = match &error {
        TransportError::NoAnswer { .. } | TransportError::Deadline { .. } => (
            Exit::Unavailable,
            "check that the coordinator runs and that its UDP port is reachable; `stoke doctor` looks",
        ),
        TransportError::JoinRefused { .. } => {
            (Exit::Denied, "ask an admin for a new token: `stoke token create --role ...`")
        }
        TransportError::Peer { .. } | TransportError::NoCredentials | TransportError::Credentials(_) => (
            Exit::Denied,
            "log in again with `stoke login --join TOKEN --coordinator HOST:PORT`, and check the address",
        ),
        TransportError::Bind { .. } => (Exit::Conflict, "choose another port, or stop the process that has it"),
        // The same question would get the same answer.
        TransportError::Frame(_) => (Exit::Negative, "run the same stoke release on both sides"),
        other => closed_failure(other.closed()),
    };
    let failure = Failure::from_error(exit, error);
    if help.is_empty() { failure } else { failure.help(help) }
}

fn closed_failure(closed: Option<&Closed>) -> (Exit, &'static str) {
    let login = "log in again with `stoke login --join TOKEN --coordinator HOST:PORT`";
    match closed {
        Some(Closed::Refused { .. }) => (Exit::Denied, login),
        Some(Closed::ByPeer { code, .. }) => match code {
            CloseCode::Unauthenticated | CloseCode::WrongRole | CloseCode::Revoked => (Exit::Denied, login),
            CloseCode::Version => (Exit::Negative, "run the same stoke release on both sides"),
            _ => (Exit::Unavailable, ""),
        },
        Some(_) | None => (Exit::Unavailable, ""),
    }
}

async fn pause(wait: &mut Duration) {
    tokio::time::sleep(*wait).await;
    *wait = (*wait * 2).min(RETRY_WAIT_MAX);
}

#[cfg(test)]
mod tests {
    use stoke_protocol::codec::CodecError;

    use super::*;

    #[test]
    fn the_cluster_file_reads_back() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(ClusterFile::read(dir.path()).unwrap_err().exit, Exit::NotFound);
        let file = ClusterFile { cluster: "ab".repeat(16), coordinator: vec!["127.0.0.1:7878".into()], api: None };
        file.write(dir.path()).unwrap();
        assert_eq!(ClusterFile::read(dir.path()).unwrap(), file);
    }

    #[test]
    fn refusals_by_identity_are_told_from_silence() {
        let refused = TransportError::Closed(Closed::Refused { reason: "it demands a certificate".into() });
        assert_eq!(transport_failure(refused).exit, Exit::Denied);
        for passing in [Closed::Silent, Closed::Busy] {
            assert_eq!(transport_failure(TransportError::Closed(passing)).exit, Exit::Unavailable);
        }
        let role = Closed::ByPeer { code: CloseCode::WrongRole, reason: String::new() };
        assert_eq!(transport_failure(TransportError::Closed(role)).exit, Exit::Denied);
        let unreadable = transport_failure(TransportError::Frame(CodecError::Version { theirs: 1 }));
        assert_eq!(unreadable.exit, Exit::Negative, "asking again gives the same");
    }
}
