//! One question, from the head that is asked first to the last frame of the answer. Owns retry and replay: a head that is lost, has moved or
//! breaks the rules is left for another one, which goes on behind what is there (I27). Knows no HTTP.
//!
//! G3: a question ends: by its answer, by a refusal that every head would give, at its deadline, after `silence` without a frame, or when no head
//! could be asked for `wait` (`replay_wait` once an answer has begun).
//! G4: who drops an asking takes the question back: its stream goes with it.
//! G9 (I27): an answer that has begun goes on at a head of the same revision and at no other. Until one has it, it counts as a question of the job
//! where it was, so that a job that leaves waits for it.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use stoke_protocol::codec::{self, CodecError, FrameCap};
use stoke_protocol::ids::JobId;
use stoke_protocol::message::rank::RankId;
use stoke_protocol::message::serve::{Answer, Ask, Head, Question, Refusal, Routes};
use stoke_protocol::spec::Task;
use stoke_protocol::transport::Endpoint;
use tokio::sync::watch;
use tokio::time::{sleep, sleep_until, timeout, timeout_at};

use super::error::{Kind, Problem};
use super::heads::{Heads, Stream, Unreached};
use super::received::{Event, Received, Taken};
use super::routes::{Aim, Pick, Standing, Table};
use super::shadow::Copies;
use super::tally::{Place, Tallies};

/// A question that a head has not taken in after this long is asked elsewhere: its connection carries nothing more.
pub(super) const SEND_MAX: Duration = Duration::from_secs(5);
/// A head whose connections are full is left alone for so long.
pub(super) const FULL_REST: Duration = Duration::from_secs(1);
/// A head that is busy is passed over for so long: its places free in milliseconds, whatever it tells clients.
pub(super) const BUSY_REST: Duration = Duration::from_millis(10);

/// How long a question waits.
#[derive(Clone, Copy, Debug)]
pub(super) struct Patience {
    /// For a head, before there is any answer.
    pub(super) wait: Duration,
    /// For a head, once there is some of the answer.
    pub(super) replay_wait: Duration,
    /// For the next frame of a head that lives.
    pub(super) silence: Duration,
}

/// Where questions are asked.
pub(super) struct Desk {
    table: Mutex<Table>,
    /// Counts the routes that came.
    changed: watch::Sender<u64>,
    pub(super) heads: Heads,
    pub(super) patience: Patience,
    pub(super) counters: Counters,
    pub(super) tallies: Tallies,
}

/// Since the start.
#[derive(Default, Debug)]
pub(super) struct Counters {
    pub(super) questions: AtomicU64,
    /// Answers that another head went on with, or began again.
    pub(super) replays: AtomicU64,
    pub(super) tokens: AtomicU64,
    /// Frames that broke the rules.
    pub(super) broken: AtomicU64,
    /// Of questions, to shadows; and those that shadows have not answered.
    pub(super) copies: AtomicU64,
    pub(super) copies_failed: AtomicU64,
}

/// A question that so many heads in a row have died of is given up: it may be what they die of.
const LOSSES_MAX: u32 = 5;

/// One question. Its events come by [`Asking::next`], and dropping it takes it back (G4).
pub(super) struct Asking {
    desk: Arc<Desk>,
    model: String,
    tasks: &'static [Task],
    received: Received,
    /// The one job to ask, where it matters which.
    only: Option<JobId>,
    /// Where a new question falls among those of its model.
    draw: Option<u64>,
    /// Of the head that began the answer.
    revision: Option<u64>,
    deadline: Option<Instant>,
    changed: watch::Receiver<u64>,
    current: Option<Current>,
    /// Where the answer was, until another head has it (G9).
    left: Option<Running>,
    copies: Copies,
    asked: Instant,
    /// Of a new question of a model that is served, until it is over.
    place: Option<Place>,
    tries: u64,
    /// Since when it does not get on.
    troubled: Option<Instant>,
    /// Heads that were lost over it since it got on last.
    losses: u32,
    /// When to come back, as the last head that was busy said.
    busy: Option<Duration>,
}

/// The head that answers now.
struct Current {
    job: JobId,
    revision: u64,
    stream: Stream,
    running: Running,
}

/// A place in the table's count.
struct Running {
    desk: Arc<Desk>,
    head: RankId,
}

/// What a head does next.
enum Read {
    Frame(Answer),
    Lost(String),
    Replaced,
    Silent,
}

impl Desk {
    pub(super) fn new(endpoint: Endpoint, patience: Patience) -> Self {
        let (table, counters, tallies) = (Mutex::default(), Counters::default(), Tallies::default());
        Self { table, changed: watch::Sender::new(0), heads: Heads::new(endpoint), patience, counters, tallies }
    }

    pub(super) fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The newest routes count.
    pub(super) fn renew(&self, routes: Routes) {
        let mut table = self.table();
        if table.renew(routes) {
            self.heads.keep(table.heads());
            self.tallies.keep(|model| table.serves(model));
            drop(table);
            self.changed.send_modify(|count| *count += 1);
        }
    }

    /// A question to a model that does one of `tasks`. Nothing happens before the first [`Asking::next`].
    pub(super) fn ask(
        self: &Arc<Self>,
        model: &str,
        tasks: &'static [Task],
        ask: Ask,
        deadline: Option<Instant>,
    ) -> Asking {
        self.counters.questions.fetch_add(1, Ordering::Relaxed);
        Asking {
            desk: self.clone(),
            model: model.to_owned(),
            tasks,
            received: Received::new(ask),
            only: None,
            draw: None,
            revision: None,
            deadline,
            changed: self.changed.subscribe(),
            current: None,
            left: None,
            copies: Copies::default(),
            asked: Instant::now(),
            place: None,
            tries: 0,
            troubled: None,
            losses: 0,
            busy: None,
        }
    }
}

impl Asking {
    /// Asks no other job than this one.
    pub(super) fn only(self, job: Option<JobId>) -> Self {
        Self { only: job, ..self }
    }

    /// Tokens of the answer that have come.
    pub(super) fn tokens(&self) -> usize {
        self.received.tokens()
    }

    /// The next event. After `Event::Ended` or a problem there is none to wait for.
    pub(super) async fn next(&mut self) -> Result<Event, Problem> {
        let deadline = self.deadline;
        let event = match deadline {
            Some(deadline) => {
                timeout_at(deadline.into(), self.advance()).await.unwrap_or_else(|_| Err(Problem::late()))
            }
            None => self.advance().await,
        };
        match &event {
            Ok(Event::Ended { .. }) => {
                self.copies.let_go();
                self.place = None;
            }
            Ok(_) => {}
            Err(problem) => {
                self.place.take().inspect(|place| place.refused(problem));
                (self.current, self.left, self.copies) = (None, None, Copies::default());
            }
        }
        event
    }

    async fn advance(&mut self) -> Result<Event, Problem> {
        loop {
            let mut current = match self.current.take() {
                Some(current) => current,
                None => self.reach().await?,
            };
            let head = current.running.head;
            let before = self.received.tokens();
            let taken = match current.read(&mut self.changed).await {
                Read::Frame(answer) => self.received.take(answer),
                Read::Replaced => {
                    self.part(current);
                    self.trouble("it is the head no more", head)?;
                    continue;
                }
                Read::Lost(why) => {
                    self.part(current);
                    self.desk.table().lost(head, Instant::now());
                    self.losses += 1;
                    if self.losses >= LOSSES_MAX {
                        let problem = format!("{LOSSES_MAX} heads were lost over it before it got on");
                        return Err(Problem::new(Kind::Broken, problem));
                    }
                    self.trouble(&why, head)?;
                    continue;
                }
                Read::Silent => {
                    let silence = self.desk.patience.silence.as_secs();
                    return Err(Problem::new(Kind::Late, format!("nothing came of the answer for {silence} s")));
                }
            };
            match taken {
                Taken::Event(event) => {
                    let more = (self.received.tokens() - before) as u64;
                    self.desk.counters.tokens.fetch_add(more, Ordering::Relaxed);
                    if let Some(place) = &mut self.place {
                        place.heard(&event, more);
                    }
                    self.troubled = None;
                    self.revision.get_or_insert(current.revision);
                    if !matches!(event, Event::Begun { .. }) {
                        self.losses = 0;
                    }
                    self.current = Some(current).filter(|_| !matches!(event, Event::Ended { .. }));
                    return Ok(event);
                }
                Taken::Nothing => self.current = Some(current),
                Taken::Refused(refusal) => {
                    self.part(current);
                    self.refused(refusal, head)?;
                }
                Taken::Broken(what) => {
                    self.part(current);
                    self.desk.counters.broken.fetch_add(1, Ordering::Relaxed);
                    tracing::warn!(model = self.model, %head, what, "a head broke the rules of an answer");
                    self.desk.table().lost(head, Instant::now());
                    self.trouble(what, head)?;
                }
            }
        }
    }

    /// The head that answers is left (G9).
    fn part(&mut self, current: Current) {
        self.left = Some(current.running).filter(|_| self.revision.is_some());
    }

    /// A head has refused: another one is asked, unless it would say the same.
    fn refused(&mut self, refusal: Refusal, head: RankId) -> Result<(), Problem> {
        let now = Instant::now();
        match refusal {
            Refusal::Invalid { .. } | Refusal::TooLong { .. } | Refusal::Late | Refusal::Failed { .. } => {
                return Err(Problem::refused(&self.model, &refusal));
            }
            Refusal::Busy { retry_after_ms } => {
                self.busy = Some(Duration::from_millis(retry_after_ms.into()));
                self.desk.table().busy(head, now + BUSY_REST);
            }
            Refusal::Moved => self.desk.table().lost(head, now),
        }
        self.trouble("it refused", head)
    }

    /// Something stands in the way. An error when it has for too long (G3).
    fn trouble(&mut self, why: &str, head: RankId) -> Result<(), Problem> {
        tracing::debug!(model = self.model, %head, why, tokens = self.tokens(), "a question goes to another head");
        let since = *self.troubled.get_or_insert_with(Instant::now);
        match since.elapsed() < self.wait_max() {
            true => Ok(()),
            false => {
                tracing::warn!(model = self.model, %head, why, "gave up a question: no head has taken it in time");
                Err(Problem::no_head(&self.model, since.elapsed()))
            }
        }
    }

    fn wait_max(&self) -> Duration {
        match self.received.is_begun() {
            true => self.desk.patience.replay_wait,
            false => self.desk.patience.wait,
        }
    }

    /// A head that has taken the question in.
    async fn reach(&mut self) -> Result<Current, Problem> {
        loop {
            self.changed.borrow_and_update();
            let (pick, is_known) = self.pick();
            match pick {
                Pick::Ask { job, head, revision } => {
                    let running = Running { desk: self.desk.clone(), head: head.id };
                    if let Some(stream) = self.send(head).await? {
                        self.left = None;
                        return Ok(Current { job, revision, stream, running });
                    }
                }
                // It was refused itself, and every other head is as busy.
                Pick::Later { busy: true, .. } if !self.received.is_begun() && self.busy.is_some() => {
                    return Err(Problem::busy(&self.model, self.busy.unwrap_or_default()));
                }
                Pick::Later { after, .. } => self.wait(after).await?,
                Pick::NoHead => self.wait(Duration::MAX).await?,
                Pick::NoRevision => return Err(Problem::no_revision(&self.model)),
                Pick::Unknown { .. } if !is_known => self.wait(Duration::MAX).await?,
                Pick::Unknown { .. } if self.received.is_begun() => {
                    let message = format!("model {:?} is served no more: its job was stopped", self.model);
                    return Err(Problem::new(Kind::NoHead, message));
                }
                Pick::Unknown { known } => return Err(Problem::unknown_model(&self.model, &known)),
                Pick::OtherTask(task) => return Err(Problem::other_task(&self.model, task)),
            }
        }
    }

    /// Where to ask, counted there already: a job that leaves is not to go in between.
    fn pick(&mut self) -> (Pick, bool) {
        let mut table = self.desk.table();
        self.draw = self.draw.or_else(|| match self.received.is_new_work() {
            true => table.draw(&self.model),
            false => None,
        });
        if self.draw.is_some() && self.place.is_none() {
            self.place = Some(self.desk.tallies.enter(&self.model, self.asked));
        }
        let aim = match (self.only, self.revision) {
            (Some(job), _) => Aim::Job(job),
            (None, Some(revision)) => Aim::Revision(revision),
            (None, None) => Aim::Drawn(self.draw.unwrap_or(u64::MAX)),
        };
        let pick = table.pick(&self.model, self.tasks, aim, Instant::now());
        if let Pick::Ask { head, .. } = &pick {
            table.begin(head.id);
        }
        (pick, table.is_known())
    }

    /// Waits for other routes, and no longer than `after`.
    async fn wait(&mut self, after: Duration) -> Result<(), Problem> {
        let now = Instant::now();
        let since = *self.troubled.get_or_insert(now);
        let until = since + self.wait_max();
        if now >= until {
            return Err(Problem::no_head(&self.model, now - since));
        }
        let next = now.checked_add(after).map_or(until, |next| next.min(until));
        let _held = self.place.as_ref().map(Place::hold);
        tokio::select! {
            // The desk, which this holds, has the sender.
            _ = self.changed.changed() => {}
            () = sleep_until(next.into()) => {}
        }
        Ok(())
    }

    async fn send(&mut self, head: Head) -> Result<Option<Stream>, Problem> {
        if self.tries > 0 {
            self.desk.counters.replays.fetch_add(1, Ordering::Relaxed);
            self.place.as_ref().inspect(|place| place.replayed());
        }
        let left = self.deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()).as_millis());
        let deadline_ms = left.map_or(0, |left| u32::try_from(left).unwrap_or(u32::MAX).max(1));
        let question = Question { generation: head.generation, deadline_ms, ask: self.received.again() };
        check_size(&question)?;
        let why = match timeout(SEND_MAX, self.desk.heads.ask(head, &question)).await {
            Ok(Ok(stream)) => {
                if self.tries == 0 && self.only.is_none() {
                    let which = (self.model.as_str(), self.tasks);
                    self.copies = Copies::send(&self.desk, which, &question.ask, deadline_ms);
                }
                self.tries += 1;
                return Ok(Some(stream));
            }
            Ok(Err(Unreached::Full)) => {
                self.desk.table().busy(head.id, Instant::now() + FULL_REST);
                "its connections are full".to_owned()
            }
            Ok(Err(Unreached::Transport(error))) => {
                self.desk.table().lost(head.id, Instant::now());
                error.to_string()
            }
            Err(_) => {
                self.desk.table().lost(head.id, Instant::now());
                "it takes nothing in".to_owned()
            }
        };
        self.trouble(&why, head.id)?;
        Ok(None)
    }
}

/// What a head could not read is not sent: it would look like a head that is lost.
fn check_size(question: &Question) -> Result<(), Problem> {
    let bytes = match codec::encode(question, FrameCap::Request) {
        Ok(bytes) => bytes,
        Err(CodecError::TooLarge { bytes, cap }) => {
            let message = format!("the request has {bytes} bytes of text or values: {cap} are taken at most");
            return Err(Problem::new(Kind::TooLarge, message));
        }
        Err(error) => return Err(Problem::new(Kind::Broken, error.to_string())),
    };
    match codec::decode::<Question>(&bytes, FrameCap::Request) {
        Ok(_) => Ok(()),
        Err(_) => {
            let message = "the request has too many small parts: send fewer messages, texts or tensors";
            Err(Problem::new(Kind::TooLarge, message))
        }
    }
}

impl Current {
    /// The next frame, or why there is none.
    async fn read(&mut self, changed: &mut watch::Receiver<u64>) -> Read {
        let desk = &self.running.desk;
        let silence = sleep(desk.patience.silence);
        tokio::pin!(silence);
        loop {
            tokio::select! {
                biased;
                frame = self.stream.frames.recv::<Answer>() => {
                    return match frame {
                        Ok(Some(answer)) => Read::Frame(answer),
                        Ok(None) => Read::Lost("it ended its answer in the middle".to_owned()),
                        Err(error) => Read::Lost(error.to_string()),
                    };
                }
                _ = changed.changed() => {
                    if desk.table().standing(self.job, self.running.head) == Standing::Replaced {
                        return Read::Replaced;
                    }
                }
                () = &mut silence => return Read::Silent,
            }
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.desk.table().end(self.head);
    }
}
