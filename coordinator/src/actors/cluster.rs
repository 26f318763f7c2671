//! The cluster actor: the one owner of the control machine, its journal and its tickets. It takes inputs in, hands records to the journal and
//! runs effects when they are durable. It decides nothing, and never waits for the network.
//!
//! A journal that fails ends the actor at once: nothing that was not durable is ever answered, and the process recovers from disk (I12).

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use ractor::{Actor, ActorProcessingErr, ActorRef};
use stoke_protocol::ids::{ClusterId, JobId, LogIndex};
use stoke_protocol::message::client::{JobState, JobView, Reply};
use stoke_protocol::message::rank::{RankId, StepTimes};
use tokio::sync::{mpsc, oneshot, watch};

use super::messages::{Answer, Link, Message, Question, Source, Words};
use super::outbox::Outbox;
use super::session;
use super::watchers::Watchers;
use crate::coordinator::Ended;
use crate::environment::{Clock, JournalMode};
use crate::gauges;
use crate::journal::{Durable, JournalError, Log, Room, Work, Writer};
use crate::metrics::Metrics;
use crate::recovery::{record_bytes, snapshot_bytes};
use crate::state::requests::not_found;
use crate::state::words::state_word;
use crate::state::{Control, Effect, Input, SessionId, Step, Ticket};
use crate::traces::{self, Traces};

/// Between ticks: leases are told apart to so much.
pub(crate) const TICK_MS: u64 = 100;
/// Watchers are told every so many ticks: five times a second.
const TICKS_A_VIEW: u64 = 2;
/// Metrics that are counted from the state: once a second.
const TICKS_A_COUNT: u64 = 10;
/// While no entry is written nobody tells how full the disk is: asked every two seconds.
const TICKS_A_LOOK: u64 = 20;

pub(crate) struct ClusterActor;

pub(crate) struct Arguments {
    pub control: Control,
    pub cluster: ClusterId,
    pub admin: String,
    pub version: String,
    pub log: Box<dyn Log>,
    pub journal: JournalMode,
    pub journal_path: String,
    pub snapshot_entries: u64,
    /// The last entry of the newest snapshot.
    pub snapshot_at: LogIndex,
    pub clock: Clock,
    pub metrics: Arc<Metrics>,
    /// Where spans go, if anywhere.
    pub traces: Option<traces::Queue>,
    pub ended: watch::Sender<Option<Ended>>,
}

pub(crate) struct State {
    control: Control,
    traces: Option<Traces>,
    writer: Option<Writer>,
    /// The newest durable entry, as the journal thread knows it.
    durable: Arc<AtomicU64>,
    outbox: Outbox<Outgoing>,
    asking: BTreeMap<Ticket, oneshot::Sender<Answer>>,
    links: BTreeMap<SessionId, Link>,
    watchers: Watchers,
    last_ticket: Ticket,
    snapshot_at: u64,
    ticks: u64,
    room: Option<Room>,
    settings: Settings,
}

struct Settings {
    snapshot_entries: u64,
    journal_path: String,
    clock: Clock,
    metrics: Arc<Metrics>,
    ended: watch::Sender<Option<Ended>>,
}

enum Outgoing {
    Effect(Effect),
    View(Box<JobView>),
    Sources(
        oneshot::Sender<Result<Vec<Source>, stoke_protocol::message::client::Refusal>>,
        Result<Vec<Source>, stoke_protocol::message::client::Refusal>,
    ),
}

impl Actor for ClusterActor {
    type Msg = Message;
    type State = State;
    type Arguments = Arguments;

    async fn pre_start(&self, myself: ActorRef<Message>, arguments: Arguments) -> Result<State, ActorProcessingErr> {
        let Arguments { control, cluster, admin, version, log, journal, traces, .. } = arguments;
        let now = arguments.clock.now().wall;
        let traces = traces.map(|queue| Traces::new(cluster, control.cluster(), now, queue));
        let durable = Arc::new(AtomicU64::new(control.cluster().index().0));
        let reached = durable.clone();
        let tell = Box::new(move |committed: Result<Durable, JournalError>| {
            if let Ok(Durable { last, records: 1.., .. }) = &committed {
                reached.store(last.0, Ordering::Release);
            }
            // After the actor there is nobody to tell.
            let _ended = myself.send_message(Message::Committed(committed));
        });
        let writer = match journal {
            JournalMode::Thread => Writer::thread(log, tell)?,
            JournalMode::Inline => Writer::inline(log, tell),
        };
        let index = control.cluster().index();
        let mut state = State {
            outbox: Outbox::new(index),
            writer: Some(writer),
            durable,
            asking: BTreeMap::new(),
            links: BTreeMap::new(),
            watchers: Watchers::default(),
            last_ticket: Ticket(0),
            snapshot_at: arguments.snapshot_at.0,
            ticks: 0,
            room: None,
            settings: Settings {
                snapshot_entries: arguments.snapshot_entries,
                journal_path: arguments.journal_path,
                clock: arguments.clock,
                metrics: arguments.metrics,
                ended: arguments.ended,
            },
            control,
            traces,
        };
        if state.control.cluster().id().is_none() {
            state.drive(Input::Found { cluster, admin });
        }
        state.drive(Input::Start { version });
        state.count();
        Ok(state)
    }

    async fn handle(
        &self,
        myself: ActorRef<Message>,
        message: Message,
        state: &mut State,
    ) -> Result<(), ActorProcessingErr> {
        match message {
            Message::Hello { session, node, address, hello, link } => {
                state.links.insert(session, link);
                state.drive(Input::Hello { session, node, address, hello: *hello });
            }
            Message::Heard { session, words, permit } => {
                state.heard(session, words);
                drop(permit);
            }
            Message::Closed { session } => {
                state.links.remove(&session);
                state.drive(Input::Closed { session });
            }
            Message::Ask { question, answer } => state.ask(question, answer),
            Message::Watch { job, views } => state.watch(job, views),
            Message::Sources { job, rank, answer } => {
                let sources = state.sources(job, rank);
                state.queue(Outgoing::Sources(answer, sources));
            }
            Message::Committed(Ok(durable)) => state.committed(&durable),
            Message::Committed(Err(error)) => state.fail(&myself, error),
            Message::Tick => state.tick(),
            Message::Beat { done } => drop(done.send(())),
            Message::Stop { done } => {
                state.stop();
                // The asker may have given up waiting.
                let _unheard = done.send(());
                myself.stop(None);
            }
        }
        Ok(())
    }
}

impl State {
    fn drive(&mut self, input: Input) {
        let (started, now) = (Instant::now(), self.settings.clock.now());
        let Step { records, effects } = self.control.step(now, input);
        self.settings.metrics.step_seconds.observe(started.elapsed().as_secs_f64());
        if let Some(traces) = &mut self.traces {
            traces.hear(self.control.cluster(), now.wall, (&records, &effects));
        }
        if !records.is_empty() {
            let payloads = records.iter().map(record_bytes).collect();
            self.write(Work::Append(payloads));
            let index = self.control.cluster().index();
            if index.0 - self.snapshot_at >= self.settings.snapshot_entries {
                self.snapshot_at = index.0;
                self.write(Work::Snapshot { at: index, payload: snapshot_bytes(self.control.cluster()) });
            }
        }
        let after = self.control.cluster().index();
        effects.into_iter().for_each(|effect| self.outbox.push(after, Outgoing::Effect(effect)));
        self.flush();
    }

    fn write(&mut self, work: Work) {
        if let Some(writer) = &mut self.writer {
            writer.submit(work);
        }
    }

    fn queue(&mut self, outgoing: Outgoing) {
        self.outbox.push(self.control.cluster().index(), outgoing);
        self.flush();
    }

    /// Runs everything whose entries are durable.
    fn flush(&mut self) {
        while let Some(outgoing) = self.outbox.pop() {
            match outgoing {
                Outgoing::Effect(effect) => self.run(effect),
                Outgoing::View(view) => self.watchers.tell(&view),
                Outgoing::Sources(answer, sources) => drop(answer.send(sources)),
            }
        }
        self.settings.metrics.waiting_effects.set(self.outbox.len() as i64);
    }

    fn run(&mut self, effect: Effect) {
        match effect {
            Effect::Send { session, message } => self.tell(session, session::Message::Send(Box::new(message))),
            Effect::Close { session, reason } => {
                tracing::info!(session = session.0, %reason, "session closed");
                self.tell(session, session::Message::Close { reason });
                self.links.remove(&session);
            }
            Effect::Revoke { session, reason } => {
                tracing::warn!(session = session.0, %reason, "session revoked");
                self.tell(session, session::Message::Revoke { reason });
                self.links.remove(&session);
            }
            Effect::Reply { ticket, reply } => {
                if let Reply::Refused(refusal) = &*reply {
                    let code = format!("{:?}", refusal.code).to_lowercase();
                    self.settings.metrics.refused_requests.with_label_values(&[&code]).inc();
                }
                self.answer(ticket, Answer::Reply(reply));
            }
            Effect::TokenMade { ticket, token } => self.answer(ticket, Answer::Token(token)),
            Effect::Admit { ticket, member } => self.answer(ticket, Answer::Member(member)),
            Effect::Deny { ticket, reason } => self.answer(ticket, Answer::Denied(reason)),
            Effect::SignRank { ticket, id } => self.answer(ticket, Answer::Sign(id)),
            Effect::Artifacts { ticket, needed } => self.answer(ticket, Answer::Artifacts(needed)),
            Effect::Granted { ticket } => self.answer(ticket, Answer::Granted),
            Effect::Changed { job } => self.watchers.changed(job),
        }
    }

    fn tell(&self, session: SessionId, message: session::Message) {
        if let Some(link) = self.links.get(&session) {
            // A session that has ended tells so itself.
            let _ended = link.actor.send_message(message);
        }
    }

    fn answer(&mut self, ticket: Ticket, answer: Answer) {
        if let Some(asker) = self.asking.remove(&ticket) {
            // An asker that is gone asks again, with the same key.
            let _gone = asker.send(answer);
        }
    }

    fn ask(&mut self, question: Question, answer: oneshot::Sender<Answer>) {
        self.last_ticket = Ticket(self.last_ticket.0 + 1);
        let ticket = self.last_ticket;
        self.asking.insert(ticket, answer);
        self.drive(match question {
            Question::Request { caller, request, secret_hash } => {
                Input::Request { ticket, caller, request, secret_hash }
            }
            Question::Join { token, secret_hash, wants } => Input::Join { ticket, token, secret_hash, wants },
            Question::SignRank { session, id } => Input::SignRank { ticket, session, id },
            Question::RenewNode { session } => Input::RenewNode { ticket, session },
        });
    }

    fn heard(&mut self, session: SessionId, words: Words) {
        self.drive(match words {
            Words::Timed { id, steps } => return self.timed(session, id, &steps),
            Words::Report(report) => {
                self.settings.metrics.reports.inc();
                Input::Report { session, report }
            }
            Words::Progress { id, progress } => Input::Progress { session, id, progress },
            Words::Load { id, load } => Input::Load { session, id, load },
            Words::Demand(demands) => Input::Demand { session, demands },
            Words::Swept(sweep) => Input::Swept { session, sweep },
            Words::Surveyed { rtt_us, survey, found } => Input::Surveyed { session, rtt_us, survey, found },
            Words::Heartbeat(heartbeat) => {
                self.settings.metrics.heartbeats.inc();
                Input::Heartbeat { session, heartbeat: *heartbeat }
            }
        });
    }

    fn timed(&self, session: SessionId, id: RankId, steps: &[StepTimes]) {
        let Some((node, _)) = self.control.liveness().node(session) else { return };
        if let Some(traces) = &self.traces {
            traces.steps(self.control.cluster(), (id, node), steps);
        }
    }

    fn watch(&mut self, job: JobId, views: mpsc::Sender<JobView>) {
        self.watchers.add(job, views);
        self.tell_watchers();
    }

    fn tell_watchers(&mut self) {
        for id in self.watchers.take_changed() {
            if let Some(job) = self.control.cluster().jobs().get(id) {
                let view = Box::new(self.control.job_view(job));
                self.queue(Outgoing::View(view));
            }
        }
    }

    fn sources(
        &self,
        id: JobId,
        rank: Option<stoke_protocol::ids::Rank>,
    ) -> Result<Vec<Source>, stoke_protocol::message::client::Refusal> {
        let job = self.control.cluster().jobs().get(id).ok_or_else(|| not_found(id))?;
        let connection = |session: Option<SessionId>| Some(self.links.get(&session?)?.connection.clone());
        let ranks = self.control.log_sources(job, rank).into_iter();
        Ok(ranks.map(|(id, node, session)| (id, node, connection(session))).collect())
    }

    fn committed(&mut self, durable: &Durable) {
        let metrics = &self.settings.metrics;
        if durable.records > 0 {
            metrics.commit_seconds.observe(durable.took.as_secs_f64());
            metrics.journal_records.inc_by(durable.records.into());
            metrics.journal_bytes.inc_by(durable.bytes);
            metrics.journal_index.set(durable.last.0 as i64);
            self.outbox.durable(durable.last);
        }
        if let Some(traces) = &mut self.traces {
            traces.durable(durable.last, self.settings.clock.now().wall);
        }
        metrics.journal_free_bytes.set(i64::try_from(durable.room.free).unwrap_or(i64::MAX));
        if self.room.map(Room::is_enough).unwrap_or(true) != durable.room.is_enough() {
            let low = (!durable.room.is_enough()).then(|| self.low_words(durable.room));
            match &low {
                Some(words) => tracing::error!("{words}: no new jobs are taken until there is room"),
                None => tracing::info!("the journal's disk has room again"),
            }
            self.drive(Input::Storage { low });
        }
        self.room = Some(durable.room);
        self.flush();
    }

    fn low_words(&self, room: Room) -> String {
        let path = &self.settings.journal_path;
        format!("journal disk is full: {} MiB free at {path}, needs {} MiB", room.free >> 20, room.needed >> 20)
    }

    fn fail(&mut self, myself: &ActorRef<Message>, error: JournalError) {
        tracing::error!(%error, "journal failed: this coordinator ends now and recovers from disk when it is started again");
        self.settings.ended.send_replace(Some(Ended::Journal(Arc::new(error))));
        myself.stop(None);
    }

    fn tick(&mut self) {
        self.ticks += 1;
        self.drive(Input::Tick);
        let gone: Vec<Ticket> =
            self.asking.iter().filter(|(_, asker)| asker.is_closed()).map(|(ticket, _)| *ticket).collect();
        for ticket in gone {
            self.asking.remove(&ticket);
            self.drive(Input::Dropped { ticket });
        }
        if self.ticks.is_multiple_of(TICKS_A_VIEW) {
            self.tell_watchers();
        }
        if self.ticks.is_multiple_of(TICKS_A_COUNT) {
            self.count();
        }
        if self.ticks.is_multiple_of(TICKS_A_LOOK) {
            self.write(Work::Look);
        }
    }

    /// Metrics that are counted from the state.
    fn count(&self) {
        let (metrics, cluster) = (&self.settings.metrics, self.control.cluster());
        let set = |gauges: &prometheus::IntGaugeVec, label: &str, value: usize| {
            gauges.with_label_values(&[label]).set(value as i64);
        };
        let nodes = self.control.node_views();
        gauges::by_state(&nodes).into_iter().for_each(|(state, count)| set(&metrics.nodes, state, count));
        let mut jobs: BTreeMap<&str, usize> = JOB_STATES.map(|state| (state_word(state), 0)).into();
        cluster.jobs().iter().for_each(|job| *jobs.entry(state_word(job.state)).or_default() += 1);
        jobs.into_iter().for_each(|(state, count)| set(&metrics.jobs, state, count));
        metrics.unaudited.set(self.control.unaudited() as i64);
        metrics.epoch.set(cluster.epoch().0 as i64);
        metrics.checkpoints.set(cluster.catalogue().count() as i64);
        metrics.tokens_open.set(cluster.tokens().open(cluster.clock()) as i64);
        metrics.placements.set(cluster.placements() as i64);
        metrics.sessions.set(self.control.liveness().sessions() as i64);
        metrics.foreign_reports.set(cluster.counts().foreign_reports as i64);
        metrics.stale_reports.set(cluster.counts().stale_reports as i64);
        metrics.ranks_miscomputed.set(cluster.miscomputed().values().map(|count| i64::from(*count)).sum());
        metrics.ranks_slow.set(self.control.slow_ranks() as i64);
        metrics.steps_skipped.set(self.control.skipped_steps() as i64);
        metrics.served(&self.control.models());
        metrics.live(gauges::text(&self.control.live_jobs(), &nodes));
    }

    /// Everything that was taken in becomes durable; what waits for it is still answered.
    fn stop(&mut self) {
        // Dropping the writer waits for the journal thread, a commit or two.
        self.writer = None;
        let durable = LogIndex(self.durable.load(Ordering::Acquire));
        self.outbox.durable(durable);
        self.flush();
        if let Some(traces) = &mut self.traces {
            traces.durable(durable, self.settings.clock.now().wall);
        }
        let sessions: Vec<SessionId> = self.links.keys().copied().collect();
        for session in sessions {
            self.tell(session, session::Message::ShutDown);
        }
        tracing::info!(index = self.outbox.index().0, "coordinator stopped");
        self.settings.ended.send_replace(Some(Ended::Stopped));
    }
}

const JOB_STATES: [JobState; 8] = [
    JobState::Queued,
    JobState::Starting,
    JobState::Running,
    JobState::Recovering,
    JobState::Cancelling,
    JobState::Succeeded,
    JobState::Failed,
    JobState::Cancelled,
];
