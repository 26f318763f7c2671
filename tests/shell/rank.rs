//! Ranks without processes: tasks that say to their agent what a worker says, in simulated time. They do not talk to each other.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use stoke_node::agent::{Kept, RankEvents, RankProcess, Spawner};
use stoke_protocol::identity::KeyRequest;
use stoke_protocol::ids::{Digest, Fingerprint, Generation, Step};
use stoke_protocol::ledger::Ledger;
use stoke_protocol::message::rank::{
    Exit, FromRank, Membership, Outcome, RankEvent, RankId, ShardRecord, StartFrom, StartRank, ToRank,
};
use stoke_protocol::spec::JobSpec;
use tokio::sync::mpsc;

use super::socket::Trace;

const STEP: Duration = Duration::from_millis(100);

pub struct SimulatedRanks {
    trace: Trace,
}

struct Handle {
    frames: mpsc::UnboundedSender<Told>,
}

enum Told {
    Frame(ToRank),
    Kill,
}

/// The seed of one thing of a run.
pub fn seed(run: u64, number: u64) -> [u8; 32] {
    let mut seed = [0; 32];
    seed[..8].copy_from_slice(&run.to_le_bytes());
    seed[8..16].copy_from_slice(&number.to_le_bytes());
    seed
}

impl SimulatedRanks {
    pub fn new(trace: Trace) -> Self {
        Self { trace }
    }
}

impl Spawner for SimulatedRanks {
    fn spawn(&self, start: StartRank, ip: IpAddr, events: RankEvents) -> Result<Box<dyn RankProcess>, String> {
        let (frames, told) = mpsc::unbounded_channel();
        let trace = self.trace.clone();
        tokio::spawn(async move {
            let id = start.id;
            trace.note(format!("{id} starts"));
            let events_of_life = events.clone();
            let life = Life { start, membership: None, committed: 0, ip, events: events_of_life, told };
            let exit = life.live().await;
            trace.note(format!("{id} ends: {exit:?}"));
            events.exited(exit);
        });
        Ok(Box::new(Handle { frames }))
    }

    fn adopt(&self, kept: Kept, _: RankEvents) -> Box<dyn RankProcess> {
        unreachable!("{:?} was recorded, and these ranks are not", kept.id)
    }

    fn forget(&self, _: RankId) {}
}

impl RankProcess for Handle {
    fn send(&self, frame: ToRank) {
        // A rank that is gone reads nothing.
        let _ = self.frames.send(Told::Frame(frame));
    }

    fn kill(&self) {
        let _ = self.frames.send(Told::Kill);
    }
}

struct Life {
    start: StartRank,
    membership: Option<Membership>,
    /// The highest step whose checkpoint is in the catalogue.
    committed: u64,
    ip: IpAddr,
    events: RankEvents,
    told: mpsc::UnboundedReceiver<Told>,
}

impl Life {
    async fn live(mut self) -> Exit {
        let spec = JobSpec::parse(&self.start.spec).expect("the coordinator has parsed it");
        let (steps, every) = (spec.training().steps.unwrap_or(1), spec.checkpoint.every.unwrap_or(u64::MAX));
        let resumed = match &self.start.from {
            StartFrom::Checkpoint(origin) => origin.uri.rsplit('/').next().and_then(|name| name.get(5..13)),
            StartFrom::Seed | StartFrom::Peers => None,
        };
        let mut at: u64 = resumed.and_then(|digits| digits.parse().ok()).unwrap_or(0);
        let csr = KeyRequest::new().expect("a key").csr().to_vec().into();
        self.events.frame(FromRank::Hello { csr, artifact: None }).await;
        loop {
            let told = tokio::select! {
                biased;
                told = self.told.recv() => told,
                () = tokio::time::sleep(STEP), if self.is_member() && at < steps => {
                    at += 1;
                    if at.is_multiple_of(every) || at == steps {
                        self.store(at).await;
                    }
                    continue;
                }
            };
            match told {
                None | Some(Told::Kill) => return Exit::Signal(9),
                Some(Told::Frame(frame)) => match frame {
                    ToRank::Start(_) | ToRank::Stores(_) | ToRank::Coordinator { .. } => {}
                    ToRank::Settle(_) | ToRank::Adopted | ToRank::Taken { .. } | ToRank::Abandon { .. } => {}
                    ToRank::Rollouts { .. } => {}
                    ToRank::Certificate { .. } => {
                        let address = SocketAddr::new(self.ip, 9_000 + self.start.id.rank.0 as u16);
                        self.say(RankEvent::Ready { address }).await;
                    }
                    ToRank::Membership(membership) => at = self.enter(membership, at, steps).await,
                    ToRank::Commit { generation, step, .. } => {
                        let (uri, manifest_blake3) = (self.folder(generation, step), Digest([2; 32]));
                        self.say(RankEvent::ManifestStored { generation, step, uri, manifest_blake3 }).await;
                    }
                    ToRank::Committed { step, .. } => {
                        self.committed = self.committed.max(step.0);
                        if step.0 == steps {
                            self.say(finished(self.generation(), step)).await;
                        }
                    }
                    ToRank::Release => return Exit::Code(0),
                    ToRank::Stop { .. } => return Exit::Code(4),
                },
            }
        }
    }

    async fn say(&self, event: RankEvent) {
        self.events.frame(FromRank::Event(event)).await;
    }

    fn generation(&self) -> Generation {
        self.membership.as_ref().map(|membership| membership.generation).unwrap_or_default()
    }

    fn is_member(&self) -> bool {
        self.membership.as_ref().is_some_and(|membership| membership.position(self.start.id).is_some())
    }

    /// Says what a rank says when a generation begins; one that joins takes the last step, for these ranks have no state.
    async fn enter(&mut self, membership: Membership, at: u64, steps: u64) -> u64 {
        let (generation, position) = (membership.generation, membership.position(self.start.id));
        if self.membership.as_ref().is_some_and(|before| before.generation >= generation) {
            return at;
        }
        self.membership = Some(membership);
        let step = Step(at);
        match position {
            None => {
                self.say(RankEvent::Joined { generation, step: Step(steps) }).await;
                return steps;
            }
            Some(0) => self.say(RankEvent::Resumed { generation, step }).await,
            Some(_) => {}
        }
        if at == steps && self.committed < steps {
            self.store(at).await;
        } else if at == steps {
            self.say(finished(generation, step)).await;
        }
        at
    }

    fn folder(&self, generation: Generation, step: Step) -> String {
        format!("{}/step-{:08}-{generation}", self.start.checkpoints, step.0)
    }

    async fn store(&self, at: u64) {
        let Some(membership) = &self.membership else { return };
        let Some(index) = membership.position(self.start.id) else { return };
        let file = format!("shard-{index}-of-{}.safetensors", membership.members.len());
        let shard = ShardRecord { index, file, bytes: 64, blake3: Digest([3; 32]) };
        let (generation, state) = (membership.generation, Fingerprint(0));
        self.say(RankEvent::ShardStored { generation, step: Step(at), shard, state }).await;
    }
}

fn finished(generation: Generation, step: Step) -> RankEvent {
    let weights_blake3 = Digest([1; 32]);
    let ledger = Ledger { first: 0, end: 8 * step.0 };
    let outcome =
        Outcome { step, loss: 0.5, samples: ledger.end, ledger, skipped: 0, weights_blake3, metrics: BTreeMap::new() };
    RankEvent::Finished { generation, outcome }
}
