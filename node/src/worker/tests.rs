//! Ranks of one generation in this process, over socket pairs to an agent that a test plays, with the real trainers and the real network.

mod gangs;
mod sharded;

use std::collections::BTreeMap;
use std::io::Write;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use stoke_jobs::Trainers;
use stoke_protocol::identity::{Authority, Subject};
use stoke_protocol::ids::{ClusterId, Generation, JobId, Rank, Step};
use stoke_protocol::ledger::Ledger;
use stoke_protocol::message::rank::{
    FromRank, Member, Membership, Origin, Outcome, Purpose, RankEvent, RankId, ShardRecord, StartFrom, StartRank,
    ToRank,
};
use stoke_protocol::spec::JobSpec;
use stoke_protocol::transport::Io;
use tokio::io::AsyncWriteExt;
use tokio::net::UnixStream;
use tokio::net::unix::OwnedWriteHalf;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::timeout;

use super::{End, Place, run};
use crate::checkpoint;
use crate::link as frames;

const HOUR: Duration = Duration::from_secs(3600);
/// A rank answers within this, or the test has failed.
pub(super) const PATIENCE: Duration = Duration::from_secs(60);
/// What a test waits for happens within this, however much is said meanwhile.
const PLAY_MAX: Duration = Duration::from_secs(300);

/// A folder with a small data set, and the specs over it.
pub(super) struct Bench {
    dir: tempfile::TempDir,
}

impl Bench {
    pub(super) fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut csv = std::fs::File::create(dir.path().join("domains.csv")).unwrap();
        writeln!(csv, "domain,label,registered").unwrap();
        for i in 0..120 {
            writeln!(csv, "garden{i}.example{i}.com,benign,example{i}.com").unwrap();
            writeln!(csv, "login-verify-{}.bank{i}.top,phishing,bank{i}.top", i * 7919).unwrap();
        }
        Self { dir }
    }

    pub(super) fn path(&self) -> &Path {
        self.dir.path()
    }

    pub(super) fn spec(&self, train: &str, checkpoint: &str) -> String {
        let data = self.path().join("domains.csv");
        let text = format!(
            "name = \"t\"\ntrainer = \"domains\"\n[train]\n{train}\nbatch = 48\nlanes = 6\nseed = 3\n[checkpoint]\n{checkpoint}\n\
             [data]\ntrain = {data:?}\nregistered = \"registered\"\n[model]\nlength = 24\nembedding = 4\nwidths = [3]\nchannels = 8\nhidden = 8\n"
        );
        JobSpec::parse(&text).unwrap().to_toml()
    }

    /// The checkpoints of a run.
    pub(super) fn base(&self, name: &str) -> String {
        format!("file://{}/{name}", self.path().display())
    }
}

/// Ranks of a job, and the agent and coordinator that the test plays for them.
struct Stage {
    authority: Authority,
    links: Vec<OwnedWriteHalf>,
    ids: Vec<RankId>,
    members: Vec<Member>,
    joining: Vec<Member>,
    /// Of the newest membership, and the newest that was given out.
    current: Generation,
    generation: Generation,
    hear: mpsc::UnboundedSender<(usize, FromRank)>,
    heard: mpsc::UnboundedReceiver<(usize, FromRank)>,
    ranks: Vec<JoinHandle<End>>,
    shards: BTreeMap<(Generation, Step), Vec<ShardRecord>>,
    /// Steps of committed checkpoints.
    committed: Vec<u64>,
    /// Names of their folders.
    kept: Vec<String>,
    /// Where generations went on.
    resumed: Vec<(u64, u64)>,
    /// Of ranks that have finished, by their index.
    outcomes: BTreeMap<usize, Outcome>,
    progress: u32,
    /// Ranks that went on without the coordinator.
    went_on: usize,
    /// The highest step that was told of.
    step: u64,
    /// Where ranks keep shards in memory.
    memory: Option<PathBuf>,
}

impl Stage {
    /// Starts every rank of a gang.
    async fn open(world: u32, start: impl Fn(RankId) -> StartRank) -> Self {
        Self::open_on(world, None, start).await
    }

    /// On nodes that keep shards in their memory.
    async fn open_on(world: u32, memory: Option<PathBuf>, start: impl Fn(RankId) -> StartRank) -> Self {
        let (hear, heard) = mpsc::unbounded_channel();
        let authority = Authority::in_memory(ClusterId([7; 16])).unwrap();
        let mut stage = Self {
            authority,
            links: Vec::new(),
            ids: Vec::new(),
            members: Vec::new(),
            joining: Vec::new(),
            current: Generation(1),
            generation: Generation(1),
            hear,
            heard,
            ranks: Vec::new(),
            shards: BTreeMap::new(),
            committed: Vec::new(),
            kept: Vec::new(),
            resumed: Vec::new(),
            outcomes: BTreeMap::new(),
            progress: 0,
            went_on: 0,
            step: 0,
            memory,
        };
        for rank in 0..world {
            stage.launch(start(RankId { job: JobId(1), generation: Generation(1), rank: Rank(rank) })).await;
        }
        stage
    }

    async fn launch(&mut self, start: StartRank) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let io = Io::thread("stoke-test-net").unwrap();
        // Each rank on a machine of its own.
        let memory = self.memory.as_ref().map(|memory| memory.join(start.id.rank.to_string()));
        let place = Place { ip: Ipv4Addr::LOCALHOST.into(), shards: memory, trainers: Trainers::BuiltIn };
        self.ranks.push(tokio::spawn(run(theirs, place, io)));
        let (mut read, mut write) = ours.into_split();
        self.ids.push(start.id);
        frames::send(&mut write, &ToRank::Start(start)).await.unwrap();
        let index = self.links.len();
        self.links.push(write);
        let hear = self.hear.clone();
        tokio::spawn(async move {
            while let Ok(Some(frame)) = frames::receive(&mut read).await {
                let _ = hear.send((index, frame));
            }
        });
    }

    /// Another generation of those who are in it.
    async fn regroup(&mut self, planned: bool) {
        let after = planned.then_some(self.current);
        self.generation = self.generation.next();
        self.current = self.generation;
        self.tell_membership(after).await;
    }

    async fn tell_membership(&mut self, after: Option<Generation>) {
        let (members, joining) = (self.members.clone().into(), self.joining.clone().into());
        let membership = Membership {
            generation: self.current,
            members,
            joining,
            after,
            ballot: 0,
            purpose: Purpose::Train,
            restarts: 0,
        };
        self.tell_all(ToRank::Membership(membership)).await;
    }

    async fn tell(&mut self, rank: usize, frame: ToRank) {
        // A rank that has failed does not listen any more.
        let _ = frames::send(&mut self.links[rank], &frame).await;
    }

    async fn tell_all(&mut self, frame: ToRank) {
        for rank in 0..self.links.len() {
            self.tell(rank, frame.clone()).await;
        }
    }

    /// Plays on until `until` has seen enough of the events.
    async fn play(&mut self, mut until: impl FnMut(usize, &RankEvent) -> bool) {
        let begun = Instant::now();
        loop {
            assert!(begun.elapsed() < PLAY_MAX, "ranks go on, and what was waited for does not happen");
            let (rank, frame) = timeout(PATIENCE, self.heard.recv()).await.expect("ranks are silent").unwrap();
            let event = match frame {
                FromRank::Load(load) => panic!("nobody serves here: {load:?}"),
                FromRank::Timed(_) => continue,
                FromRank::Progress(progress) => {
                    self.progress += 1;
                    self.step = self.step.max(progress.step.0);
                    continue;
                }
                FromRank::Alive | FromRank::Leaving { .. } | FromRank::Return { .. } => continue,
                FromRank::Hello { csr, .. } | FromRank::Renew { csr } => {
                    self.certify(rank, &csr).await;
                    continue;
                }
                FromRank::Event(event) => event,
            };
            let enough = until(rank, &event);
            if let (RankEvent::Failed { error, .. }, false) = (&event, enough) {
                panic!("rank {rank} failed: {error}");
            }
            self.act(rank, event).await;
            if enough {
                return;
            }
        }
    }

    async fn act(&mut self, rank: usize, event: RankEvent) {
        let id = self.ids[rank];
        match event {
            RankEvent::Ready { address } => self.ready(Member { id, address }).await,
            RankEvent::Joined { generation, .. } => {
                assert_eq!(generation, self.current);
                self.members.append(&mut self.joining);
                self.members.sort_by_key(|member| member.id.rank);
                self.regroup(true).await;
            }
            RankEvent::ShardStored { generation, step, shard, .. } => self.stored(generation, step, shard).await,
            RankEvent::ManifestStored { step, uri, .. } => {
                checkpoint::verify(&uri, None).unwrap();
                self.committed.push(step.0);
                self.kept.extend(uri.rsplit('/').next().map(str::to_owned));
                self.tell_all(ToRank::Committed { step, keep: self.kept.clone().into() }).await;
            }
            RankEvent::Resumed { generation, step } => self.resumed.push((generation.0, step.0)),
            RankEvent::Finished { outcome, .. } => drop(self.outcomes.insert(rank, outcome)),
            RankEvent::PeerLost { .. } | RankEvent::Failed { .. } => {}
            RankEvent::WentOn { generation, members, .. } => {
                assert_eq!((generation, members.len()), (self.current, self.members.len() - 1));
                self.went_on += 1;
            }
            RankEvent::NotStored { generation, step, .. } => self.tell_all(ToRank::Abandon { generation, step }).await,
            RankEvent::Damaged { .. } => {}
            RankEvent::Differ { .. } | RankEvent::NotFinite { .. } | RankEvent::CommandEnded { .. } => {}
            RankEvent::StateLost { .. } => {}
            RankEvent::Exited { .. } => panic!("a rank does not report its own end"),
        }
    }

    async fn ready(&mut self, member: Member) {
        if !self.members.is_empty() && member.id.generation > Generation(1) {
            self.joining.push(member);
            return self.regroup(true).await;
        }
        self.members.push(member);
        if self.members.len() == self.links.len() {
            self.members.sort_by_key(|member| member.id.rank);
            // Twice: it may come again after a reconnect.
            self.tell_membership(None).await;
            self.tell_membership(None).await;
        }
    }

    async fn certify(&mut self, rank: usize, csr: &[u8]) {
        let RankId { job, generation, rank: slot } = self.ids[rank];
        let subject = Subject::Rank { job, generation, rank: slot };
        let certificate = self.authority.issue(csr, &subject, HOUR).unwrap().certificate.into();
        let authority = self.authority.certificate().to_vec().into();
        self.tell(rank, ToRank::Certificate { certificate, authority }).await;
    }

    async fn stored(&mut self, generation: Generation, step: Step, shard: ShardRecord) {
        if generation != self.current {
            return;
        }
        let stored = self.shards.entry((generation, step)).or_default();
        stored.push(shard);
        stored.sort_by_key(|shard| shard.index);
        if stored.len() == self.members.len() {
            let shards = stored.clone().into();
            let first = self.ids.iter().position(|id| *id == self.members[0].id).unwrap();
            self.tell(first, ToRank::Commit { generation, step, shards }).await;
        }
    }

    /// To the end of a job that goes well.
    async fn conclude(mut self) -> (Vec<Outcome>, Vec<u64>) {
        let outcomes = self.finish().await;
        assert!(self.progress > 0);
        assert!(self.ends().await.iter().all(|end| *end == End::Released));
        (outcomes, self.committed)
    }

    /// Until all members have finished; they are released.
    async fn finish(&mut self) -> Vec<Outcome> {
        while self.members.is_empty() || !self.members.iter().all(|member| self.has_finished(member.id)) {
            self.play(|_, event| matches!(event, RankEvent::Finished { .. })).await;
        }
        self.tell_all(ToRank::Release).await;
        self.members.iter().map(|member| self.outcomes[&self.index_of(member.id)].clone()).collect()
    }

    fn index_of(&self, id: RankId) -> usize {
        self.ids.iter().position(|other| *other == id).unwrap()
    }

    fn has_finished(&self, id: RankId) -> bool {
        self.outcomes.contains_key(&self.index_of(id))
    }

    /// Until a rank has told of `step` steps, or has done the last one.
    async fn until_step(&mut self, step: u64) {
        while self.step < step && self.outcomes.is_empty() {
            let (rank, frame) = timeout(PATIENCE, self.heard.recv()).await.expect("ranks are silent").unwrap();
            match frame {
                FromRank::Load(_) | FromRank::Timed(_) => {}
                FromRank::Progress(progress) => self.step = self.step.max(progress.step.0),
                FromRank::Alive | FromRank::Leaving { .. } | FromRank::Return { .. } => {}
                FromRank::Hello { csr, .. } | FromRank::Renew { csr } => self.certify(rank, &csr).await,
                FromRank::Event(event) => self.act(rank, event).await,
            }
        }
    }

    /// A rank is gone without a word; the others hear of it by another generation.
    async fn kill(&mut self, id: RankId) {
        let index = self.ids.iter().position(|other| *other == id).unwrap();
        self.ranks[index].abort();
        self.members.retain(|member| member.id != id);
        self.regroup(false).await;
    }

    /// A rank ends, and nobody is there to tell the others.
    async fn lose(&mut self, id: RankId) {
        let index = self.ids.iter().position(|other| *other == id).unwrap();
        self.links[index].shutdown().await.unwrap();
    }

    /// Until a rank fails; its words.
    async fn failure(&mut self) -> String {
        let mut words = String::new();
        self.play(|_, event| {
            if let RankEvent::Failed { error, .. } = event {
                words.clone_from(error);
            }
            !words.is_empty()
        })
        .await;
        words
    }

    async fn ends(&mut self) -> Vec<End> {
        let mut ends = Vec::new();
        for rank in self.ranks.drain(..) {
            ends.push(timeout(PATIENCE, rank).await.expect("a rank does not end").unwrap());
        }
        ends
    }
}

fn start(spec: &str, base: &str, resume: Option<String>) -> impl Fn(RankId) -> StartRank {
    let (spec, checkpoints) = (spec.to_owned(), base.to_owned());
    let origin = |uri| StartFrom::Checkpoint(Origin { uri, manifest_blake3: None });
    let from = resume.map_or(StartFrom::Seed, origin);
    move |id| StartRank {
        id,
        spec: spec.clone(),
        checkpoints: checkpoints.clone(),
        from: from.clone(),
        memory_bytes: 1 << 20,
    }
}

async fn train(world: u32, spec: &str, base: &str, resume: Option<String>) -> (Vec<Outcome>, Vec<u64>) {
    Stage::open(world, start(spec, base, resume)).await.conclude().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn any_number_of_ranks_trains_to_the_same_bits_and_continues_from_each_others_checkpoints() {
    let bench = Bench::new();
    let spec = bench.spec("epochs = 2", "every = 3");
    let (alone, committed) = train(1, &spec, &bench.base("one"), None).await;
    let one = &alone[0];
    assert_eq!((one.step, one.samples, one.ledger), (Step(9), 9 * 48, Ledger { first: 0, end: 9 * 48 }));
    assert_eq!(committed, [3, 6, 9]);
    assert!(one.loss.is_finite() && one.metrics.contains_key("roc_auc"), "{one:?}");
    for world in [2, 3] {
        let (outcomes, committed) = train(world, &spec, &bench.base(&format!("world-{world}")), None).await;
        assert_eq!(committed, [3, 6, 9]);
        for outcome in &outcomes {
            assert_eq!(outcome.weights_blake3, one.weights_blake3, "{world} ranks");
            assert_eq!(outcome.loss.to_bits(), one.loss.to_bits());
        }
        assert_eq!(outcomes[0].metrics, one.metrics);
        assert!(outcomes[1].metrics.is_empty());
    }
    let from_three = format!("{}/step-00000003-g1", bench.base("world-3"));
    let (resumed, committed) = train(2, &spec, &bench.base("resumed"), Some(from_three)).await;
    assert_eq!(resumed[1].weights_blake3, one.weights_blake3);
    assert_eq!(committed, [6, 9]);
    let last = format!("{}/step-00000009-g1", bench.base("resumed"));
    let manifest = checkpoint::open(&last).unwrap();
    assert_eq!((manifest.world, manifest.cursor, manifest.weights_blake3), (2, 9 * 48, one.weights_blake3));
    assert_eq!((manifest.ledger, resumed[1].ledger), (Some(one.ledger), one.ledger), "it spans the restart");
    assert_eq!(manifest.metrics, one.metrics);
    // Nothing is left to train: what the checkpoint holds is the outcome.
    let (again, committed) = train_without_progress(&spec, &bench.base("again"), last).await;
    assert_eq!(committed, [9]);
    assert_eq!(
        (again.weights_blake3, again.loss.to_bits(), &again.metrics),
        (one.weights_blake3, one.loss.to_bits(), &one.metrics)
    );
}

async fn train_without_progress(spec: &str, base: &str, resume: String) -> (Outcome, Vec<u64>) {
    let mut stage = Stage::open(1, start(spec, base, Some(resume))).await;
    stage.progress = 1;
    let (mut outcomes, committed) = stage.conclude().await;
    (outcomes.swap_remove(0), committed)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rank_that_is_told_to_stop_ends_at_once_and_so_does_one_whose_agent_is_gone() {
    let bench = Bench::new();
    let spec = bench.spec("steps = 1000000", "every = 10");
    let mut stage = Stage::open(2, start(&spec, &bench.base("stopped"), None)).await;
    stage.play(|_, event| matches!(event, RankEvent::ManifestStored { .. })).await;
    let begun = std::time::Instant::now();
    stage.tell(0, ToRank::Stop { reason: "cancelled".into() }).await;
    stage.links.remove(1);
    assert_eq!(stage.ends().await, [End::Stopped, End::HungUp]);
    assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn checkpoints_that_cannot_be_written_stop_training_only_at_the_end() {
    let bench = Bench::new();
    std::fs::write(bench.path().join("file"), "not a folder").unwrap();
    let spec = bench.spec("steps = 6", "every = 2");
    let mut stage = Stage::open(1, start(&spec, &bench.base("file"), None)).await;
    let words = stage.failure().await;
    assert!(words.contains("the last checkpoint, at step-6, was not written"), "{words}");
    assert_eq!(stage.ends().await, [End::Failed]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_wrong_with_data_or_checkpoint_is_said_by_name() {
    let bench = Bench::new();
    let spec = bench.spec("steps = 6", "every = 2");
    let csv = bench.path().join("domains.csv");
    let good = std::fs::read_to_string(&csv).unwrap();
    std::fs::write(&csv, good.replacen("phishing", "fishing", 1)).unwrap();
    let words = Stage::open(1, start(&spec, &bench.base("x"), None)).await.failure().await;
    assert!(words.contains("domains.csv, line 3"), "{words}");
    std::fs::write(&csv, good).unwrap();
    let nowhere = Some(bench.base("nowhere"));
    let words = Stage::open(1, start(&spec, &bench.base("x"), nowhere)).await.failure().await;
    assert!(words.contains("continue from") && words.contains("manifest.json is missing"), "{words}");
    train(1, &spec, &bench.base("six"), None).await;
    let six = Some(format!("{}/step-00000006-g1", bench.base("six")));
    let other = spec.replace("seed = 3", "seed = 4");
    let words = Stage::open(1, start(&other, &bench.base("x"), six.clone())).await.failure().await;
    assert!(words.contains("seed = 3, the spec says 4"), "{words}");
    let shorter = spec.replace("steps = 6", "steps = 5");
    let words = Stage::open(1, start(&shorter, &bench.base("x"), six)).await.failure().await;
    assert!(words.contains("ask for more steps"), "{words}");
}

/// I20, with a fault that is planted in one rank: it takes another batch for its lanes than the others do.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rank_that_computes_other_samples_is_found_in_the_sum_and_nothing_is_committed() {
    let bench = Bench::new();
    let right = bench.spec("steps = 20", "every = 2");
    let wrong = right.replace("batch = 48", "batch = 96");
    let base = bench.base("planted");
    let given = |id: RankId| start(if id.rank == Rank(1) { &wrong } else { &right }, &base, None)(id);
    let mut stage = Stage::open(2, given).await;
    let words = stage.failure().await;
    assert!(words.contains("step 0 is refused: lane"), "{words}");
    assert!(words.contains("was computed from others") || words.contains("counts"), "{words}");
    // The other one may be left alone before it has the whole sum.
    stage.tell_all(ToRank::Stop { reason: "its peer has failed".into() }).await;
    let ends = stage.ends().await;
    assert!(
        ends.contains(&End::Failed) && ends.iter().all(|end| matches!(end, End::Failed | End::Stopped)),
        "{ends:?}"
    );
    assert!(stage.committed.is_empty());
}

/// The coordinator is away: of three ranks two go on, and of two the first one; what they do stands when it is back.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_quorum_goes_on_while_the_coordinator_is_away() {
    let bench = Bench::new();
    let spec = bench.spec("steps = 4000", "every = 500");
    let (calm, _) = train(1, &spec, &bench.base("calm"), None).await;
    for (world, victim) in [(3, 0), (3, 2), (2, 1)] {
        let base = bench.base(&format!("alone-{world}-{victim}"));
        let mut stage = Stage::open(world, start(&spec, &base, None)).await;
        stage.play(|_, event| matches!(event, RankEvent::Resumed { .. })).await;
        stage.until_step(100).await;
        let committed = stage.committed.len();
        stage.tell_all(ToRank::Coordinator { reachable: false }).await;
        let victim = stage.members[victim].id;
        stage.lose(victim).await;
        let survivors = world as usize - 1;
        while stage.went_on < survivors {
            stage.play(|_, event| matches!(event, RankEvent::WentOn { .. })).await;
        }
        let lost_at = stage.step;
        stage.until_step(lost_at + 600).await;
        assert!(stage.committed.len() <= committed + 1, "only the coordinator's memberships commit");
        stage.tell_all(ToRank::Coordinator { reachable: true }).await;
        stage.members.retain(|member| member.id != victim);
        stage.regroup(false).await;
        let outcomes = stage.finish().await;
        assert_eq!(outcomes.len(), survivors);
        assert!(outcomes.iter().all(|outcome| outcome.weights_blake3 == calm[0].weights_blake3), "{:?}", stage.resumed);
        assert!(stage.resumed.last().is_some_and(|(_, step)| *step >= lost_at + 600), "{:?}", stage.resumed);
        assert!(stage.committed.iter().any(|step| step % 500 != 0), "what was done alone is stored at once");
    }
}

/// A newcomer that waits for shards of which one does not come any more asks the others for the state anew.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_that_goes_while_its_state_is_wanted_does_not_keep_the_newcomer_waiting() {
    let bench = Bench::new();
    let spec = bench.spec("steps = 1000000", "every = 1000000");
    let base = bench.base("givers");
    let mut stage = Stage::open(3, start(&spec, &base, None)).await;
    stage.play(|_, event| matches!(event, RankEvent::Resumed { .. })).await;
    for _ in 0..2 {
        stage.generation = stage.generation.next();
        let id = RankId { job: JobId(1), generation: stage.generation, rank: Rank(7) };
        stage.launch(StartRank { from: StartFrom::Peers, ..start(&spec, &base, None)(id) }).await;
        let newcomer = stage.index_of(id);
        stage.play(|rank, event| rank == newcomer && matches!(event, RankEvent::Ready { .. })).await;
        let giver = stage.members[1].id;
        stage.lose(giver).await;
        stage.members.retain(|member| member.id != giver);
        stage.regroup(false).await;
        stage.play(|_, event| matches!(event, RankEvent::Joined { .. })).await;
    }
    assert_eq!(stage.members.len(), 3);
    stage.tell_all(ToRank::Stop { reason: "enough".into() }).await;
}

/// What a generation says of itself must not depend on how it came to be.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ranks_that_die_and_are_replaced_change_no_bit() {
    let bench = Bench::new();
    let spec = bench.spec("steps = 4000", "every = 500");
    let (calm, _) = train(1, &spec, &bench.base("calm"), None).await;
    for (seed, world) in [(1, 2), (2, 3)] {
        die_and_are_replaced(world, &spec, &bench.base(&format!("wild-{seed}")), (&calm[0], 4000)).await;
    }
}

/// Members die one after the other, and another process joins for each; all end as a calm run of so many steps did.
async fn die_and_are_replaced(world: u32, spec: &str, base: &str, (calm, steps): (&Outcome, u64)) {
    let mut stage = Stage::open(world, start(spec, base, None)).await;
    stage.play(|_, event| matches!(event, RankEvent::Resumed { .. })).await;
    for number in 0..3u32 {
        let begun = stage.step;
        stage.until_step(begun + 100).await;
        let victim = stage.members[(number % world) as usize].id;
        stage.kill(victim).await;
        stage.play(|_, event| matches!(event, RankEvent::Resumed { .. })).await;
        stage.generation = stage.generation.next();
        let id = RankId { generation: stage.generation, ..victim };
        stage.launch(StartRank { from: StartFrom::Peers, ..start(spec, base, None)(id) }).await;
        stage.play(|_, event| matches!(event, RankEvent::Joined { .. } | RankEvent::Finished { .. })).await;
        // On a busy machine the others may be done before it has started.
        if !stage.outcomes.is_empty() {
            break;
        }
        stage.play(|_, event| matches!(event, RankEvent::Resumed { .. } | RankEvent::Finished { .. })).await;
        assert_eq!(stage.members.len(), world as usize);
    }
    let outcomes = stage.finish().await;
    assert!(outcomes.iter().all(|outcome| outcome.weights_blake3 == calm.weights_blake3), "{:?}", stage.resumed);
    assert!(outcomes.iter().all(|outcome| outcome.ledger == Ledger { first: 0, end: steps * 48 }), "{outcomes:?}");
    assert!(stage.resumed.is_sorted_by_key(|(_, step)| *step), "{:?}", stage.resumed);
    assert_eq!(stage.committed.last(), Some(&steps));
}
