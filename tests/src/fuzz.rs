//! The fuzz targets: every decoder that reads bytes of a peer, a file or a person, with a small corpus of real inputs. Owns the list; the
//! short run in `tests/fuzz_smoke.rs` and the libFuzzer targets in `fuzz/` both read it from here.

mod serving;

use std::collections::BTreeMap;
use std::sync::LazyLock;
use std::time::Duration;

use serde::Serialize;
use serde::de::DeserializeOwned;
use stoke_node::gateway::untrusted;
use stoke_protocol::codec::{self, FrameCap};
use stoke_protocol::identity::{Authority, Identity, JoinToken, KeyRequest, Subject};
use stoke_protocol::ids::{
    ClusterId, Digest, Epoch, Fingerprint, Generation, Incarnation, JobId, LogIndex, NodeId, Rank, Step, Term, TokenId,
};
use stoke_protocol::lanes::Subtree;
use stoke_protocol::ledger::Ledger;
use stoke_protocol::message::client::{Refusal, RefusalCode, Reply, Request, TokenScope};
use stoke_protocol::message::join::{JoinReply, JoinRequest, Wants};
use stoke_protocol::message::load::{Demand, FirstTokens, Load};
use stoke_protocol::message::node::{
    Capacity, FromNode, Gpu, Heartbeat, LogChunk, NodeHello, NodeReply, NodeRequest, RankInventory, ReadLog, Report,
    ToNode,
};
use stoke_protocol::message::peer::{FromPlayer, Part, TensorHeader, ToPlayer, WeightsId};
use stoke_protocol::message::rank::{
    Exit, FromRank, Given, Member, Membership, Origin, Outcome, Progress, Purpose, RankEvent, RankId, ShardRecord,
    StartFrom, StartRank, StepTimes, StoreSettings, ToRank,
};
use stoke_protocol::message::serve;
use stoke_protocol::spec::Artifact;
use stoke_protocol::spec::JobSpec;

/// One decoder.
pub struct Target {
    pub name: &'static str,
    /// Must return for every input.
    pub decode: fn(&[u8]),
    pub corpus: Vec<Vec<u8>>,
    /// Bytes a byte of input that may be held besides the 64 KiB of I31: 2 for frames, more for text formats that build trees.
    pub factor: usize,
}

impl Target {
    /// What the decoder may hold at once for an input of `bytes`.
    pub fn memory_bound(&self, bytes: usize) -> usize {
        self.factor * bytes + 64 * 1024 + 4 * 1024
    }
}

fn frame<T: Serialize>(messages: Vec<T>, cap: FrameCap) -> Vec<Vec<u8>> {
    messages.iter().map(|message| codec::encode(message, cap).expect("corpus message fits its cap")).collect()
}

fn decode_frame<T: DeserializeOwned, const CAP: u8>(bytes: &[u8]) {
    let cap = [FrameCap::Control, FrameCap::Request, FrameCap::Header, FrameCap::Batch][CAP as usize];
    // Frames and errors are both fine; a panic or too much memory is not.
    drop(codec::decode::<T>(bytes, cap));
}

const CONTROL: u8 = 0;
const REQUEST: u8 = 1;
const HEADER: u8 = 2;
const BATCH: u8 = 3;

/// Every target.
pub fn targets() -> Vec<Target> {
    let frames = |name, decode, corpus| Target { name, decode, corpus, factor: 2 };
    vec![
        frames("from_node", decode_frame::<FromNode, CONTROL>, frame(from_node(), FrameCap::Control)),
        frames("to_node", decode_frame::<ToNode, CONTROL>, frame(to_node(), FrameCap::Control)),
        frames("heartbeat", decode_frame::<Heartbeat, CONTROL>, frame(vec![heartbeat()], FrameCap::Control)),
        frames("node_request", decode_frame::<NodeRequest, REQUEST>, frame(node_request(), FrameCap::Request)),
        frames("node_reply", decode_frame::<NodeReply, REQUEST>, frame(node_reply(), FrameCap::Request)),
        frames(
            "read_log",
            decode_frame::<ReadLog, REQUEST>,
            frame(vec![ReadLog { id: id(), tail: Some(3), follow: true }], FrameCap::Request),
        ),
        frames("log_chunk", decode_frame::<LogChunk, REQUEST>, frame(vec![log_chunk()], FrameCap::Request)),
        frames("to_rank", decode_frame::<ToRank, CONTROL>, frame(to_rank(), FrameCap::Control)),
        frames("from_rank", decode_frame::<FromRank, CONTROL>, frame(from_rank(), FrameCap::Control)),
        frames("request", decode_frame::<Request, REQUEST>, frame(requests(), FrameCap::Request)),
        frames("reply", decode_frame::<Reply, REQUEST>, frame(replies(), FrameCap::Request)),
        frames("join_request", decode_frame::<JoinRequest, CONTROL>, frame(vec![join_request()], FrameCap::Control)),
        frames("join_reply", decode_frame::<JoinReply, CONTROL>, frame(join_reply(), FrameCap::Control)),
        frames("to_player", decode_frame::<ToPlayer, HEADER>, frame(to_player(), FrameCap::Header)),
        frames("from_player", decode_frame::<FromPlayer, HEADER>, frame(from_player(), FrameCap::Header)),
        frames("tensor_header", decode_frame::<TensorHeader, HEADER>, frame(vec![tensor_header()], FrameCap::Header)),
        frames("question", decode_frame::<serve::Question, REQUEST>, frame(serving::questions(), FrameCap::Request)),
        frames("answer", decode_frame::<serve::Answer, REQUEST>, frame(serving::answers(), FrameCap::Request)),
        frames("batch", decode_frame::<serve::Batch, BATCH>, frame(vec![serving::batch()], FrameCap::Batch)),
        frames("held", decode_frame::<serve::Held, BATCH>, frame(vec![serving::held()], FrameCap::Batch)),
        frames("resume", decode_frame::<serve::Resume, BATCH>, frame(vec![serving::resume()], FrameCap::Batch)),
        frames("stage_header", decode_frame::<serve::StageHeader, HEADER>, frame(serving::headers(), FrameCap::Header)),
        Target { name: "join_token", decode: join_token, corpus: vec![TOKEN.as_bytes().to_vec()], factor: 4 },
        Target {
            name: "identity",
            decode: identity,
            corpus: IDENTITIES.map(|name| name.as_bytes().to_vec()).into(),
            factor: 4,
        },
        Target { name: "signing_request", decode: signing_request, corpus: vec![signed_request()], factor: 64 },
        Target { name: "certificate", decode: certificate, corpus: vec![AUTHORITY.certificate().to_vec()], factor: 64 },
        Target { name: "job_spec", decode: job_spec, corpus: vec![SPEC.as_bytes().to_vec()], factor: 64 },
        Target { name: "chat", decode: untrusted::chat, corpus: bodies(&CHATS), factor: 64 },
        Target { name: "completion", decode: untrusted::completion, corpus: bodies(&COMPLETIONS), factor: 256 },
        Target { name: "embedding", decode: untrusted::embedding, corpus: bodies(&EMBEDDINGS), factor: 64 },
        Target { name: "tensors", decode: untrusted::tensors, corpus: bodies(&TENSORS), factor: 256 },
        Target { name: "call", decode: untrusted::call, corpus: vec![CALL.to_vec()], factor: 256 },
    ]
}

const SPEC: &str = "name = \"d\"\ntrainer = \"domains\"\n[train]\nepochs = 2\nbatch = 256\nclip_norm = 1.0\n[resources]\nmemory = \"512MiB\"\n\
[resources.labels]\nrack = \"a\"\n[checkpoint]\nevery = 10\nto = \"file:///tmp/x\"\n[model]\nwidths = [2, 3]\n";

const CHATS: [&str; 2] = [
    r#"{"model":"m","messages":[{"role":"system","content":"a"},{"role":"user","content":[{"type":"text","text":"b"}]}],"stream":true,"stream_options":{"include_usage":true},"stop":["x","y"],"seed":-3,"n":2}"#,
    r#"{"model":"m","messages":[{"role":"user","content":"a"}],"max_completion_tokens":7,"temperature":0.5,"top_p":0.9,"tools":[],"response_format":{"type":"text"},"logit_bias":{}}"#,
];
const COMPLETIONS: [&str; 3] = [
    r#"{"model":"m","prompt":["a","b"],"max_tokens":3,"top_k":-1,"min_p":0.1,"repetition_penalty":1.1}"#,
    r#"{"model":"m","prompt":[1,2,3],"stop":"x"}"#,
    r#"{"model":"m","prompt":[[1,2],[3]],"echo":false,"best_of":1}"#,
];
const EMBEDDINGS: [&str; 2] =
    [r#"{"model":"m","input":["a","b"],"encoding_format":"base64"}"#, r#"{"model":"m","input":"a","dimensions":null}"#];
/// Two bytes say how long the JSON is: 0, or (the last) 107.
const TENSORS: [&str; 3] = [
    "\0\0{\"id\":\"1\",\"inputs\":[{\"name\":\"text\",\"shape\":[1],\"datatype\":\"BYTES\",\"data\":[\"a\"]}],\"parameters\":{\"max_tokens\":3,\"stop\":\"x\",\"binary_data_output\":true}}",
    "\0\0{\"inputs\":[{\"name\":\"x\",\"shape\":[2,1],\"datatype\":\"FP32\",\"data\":[[1.5],[2]]}],\"outputs\":[{\"name\":\"y\",\"parameters\":{\"binary_data\":false}}]}",
    "\x6b\0{\"inputs\":[{\"name\":\"x\",\"shape\":[1],\"datatype\":\"FP32\",\"parameters\":{\"binary_data_size\":4}}]}                abcd",
];
/// A `ModelInfer` of model "t" with the tensor "x" of two FP32 values.
const CALL: &[u8] = b"\0\0\0\0\x1c\x0a\x01t\x2a\x0d\x0a\x01x\x12\x04FP32\x1a\x02\x01\x02\x3a\x08\0\0\xc0\x3f\0\0\0\xc0";

fn bodies(bodies: &[&str]) -> Vec<Vec<u8>> {
    bodies.iter().map(|body| body.as_bytes().to_vec()).collect()
}

const TOKEN: &str =
    "stoke1.0303030303030303030303030303030303030303030303030303030303030303.4.07070707070707070707070707070707";
const IDENTITIES: [&str; 3] = [
    "spiffe://01010101010101010101010101010101/node/3",
    "spiffe://01010101010101010101010101010101/user/admin/anna",
    "spiffe://01010101010101010101010101010101/rank/1/2/3",
];

static AUTHORITY: LazyLock<Authority> =
    LazyLock::new(|| Authority::in_memory(ClusterId([1; 16])).expect("an authority in memory"));

fn signed_request() -> Vec<u8> {
    KeyRequest::new().expect("a key").csr().to_vec()
}

fn join_token(bytes: &[u8]) {
    if let Ok(text) = std::str::from_utf8(bytes) {
        drop(text.parse::<JoinToken>());
    }
}

fn identity(bytes: &[u8]) {
    if let Ok(text) = std::str::from_utf8(bytes) {
        drop(text.parse::<Identity>());
    }
}

fn signing_request(bytes: &[u8]) {
    drop(AUTHORITY.issue(bytes, &Subject::Coordinator, Duration::from_secs(60)));
}

fn certificate(bytes: &[u8]) {
    drop(KeyRequest::new().expect("a key").accept(bytes, &[AUTHORITY.certificate().to_vec()]));
}

fn job_spec(bytes: &[u8]) {
    if let Ok(text) = std::str::from_utf8(bytes) {
        drop(JobSpec::parse(text));
    }
}

fn id() -> RankId {
    RankId { job: JobId(7), generation: Generation(2), rank: Rank(1) }
}

fn progress() -> Progress {
    Progress {
        generation: Generation(1),
        step: Step(120),
        steps: Step(1_000),
        loss: 0.25,
        accuracy: 0.9,
        learning_rate: 1e-3,
        samples_per_second: 12_000.0,
        compute_ms: 11.0,
        exchange_ms: 2.0,
        apply_ms: 0.5,
        samples: 30_720,
        skipped: 0,
        lanes: 2,
        rl: None,
    }
}

fn shard() -> ShardRecord {
    ShardRecord { index: 1, file: "shard-1-of-2.safetensors".into(), bytes: 4_096, blake3: Digest([3; 32]) }
}

fn events() -> Vec<RankEvent> {
    let outcome = Outcome {
        step: Step(1_000),
        loss: 0.1,
        samples: 256_000,
        ledger: Ledger { first: 0, end: 256_000 },
        skipped: 0,
        weights_blake3: Digest([9; 32]),
        metrics: BTreeMap::from([("roc_auc".to_owned(), 0.97)]),
    };
    vec![
        RankEvent::Ready { address: "127.0.0.1:4433".parse().expect("an address") },
        RankEvent::ShardStored { generation: Generation(1), step: Step(100), shard: shard(), state: Fingerprint(7) },
        RankEvent::ManifestStored {
            generation: Generation(1),
            step: Step(100),
            uri: "file:///c/step-100".into(),
            manifest_blake3: Digest([4; 32]),
        },
        RankEvent::Finished { generation: Generation(1), outcome },
        RankEvent::Failed { error: "loss is not finite at step-7".into(), permanent: true },
        RankEvent::Exited { exit: Exit::Signal(9) },
        RankEvent::NotStored { generation: Generation(2), step: Step(9), error: "disk full".into() },
        RankEvent::Damaged { uri: "file:///c/step-1".into(), error: "a bit has changed".into() },
        RankEvent::CommandEnded { generation: Generation(2), exit: Exit::Signal(9) },
        RankEvent::Resumed { generation: Generation(2), step: Step(9) },
        RankEvent::Joined { generation: Generation(2), step: Step(9) },
        RankEvent::PeerLost { generation: Generation(2), peer: id(), error: "silent".into() },
        RankEvent::WentOn { generation: Generation(2), step: Step(9), members: vec![id(); 2].into() },
        RankEvent::Differ {
            generation: Generation(2),
            step: Step(9),
            replicas: vec![(id(), Fingerprint(1)); 3].into(),
        },
        RankEvent::NotFinite { generation: Generation(2), step: Step(9), given: Given::Finite },
        RankEvent::NotFinite { generation: Generation(2), step: Step(9), given: Given::FiniteAgain },
        RankEvent::NotFinite {
            generation: Generation(2),
            step: Step(9),
            given: Given::NotFinite { lanes: vec![1, 2].into() },
        },
        RankEvent::StateLost { generation: Generation(2), step: Step(9), error: "gone".into() },
    ]
}

fn start() -> StartRank {
    StartRank {
        id: id(),
        spec: SPEC.into(),
        checkpoints: "file:///c".into(),
        from: StartFrom::Checkpoint(Origin { uri: "file:///c/step-1".into(), manifest_blake3: Some(Digest([7; 32])) }),
        memory_bytes: 1 << 30,
    }
}

fn membership() -> Membership {
    let members = vec![Member { id: id(), address: "[::1]:9".parse().expect("an address") }; 3];
    Membership {
        generation: Generation(4),
        joining: members.clone().into(),
        members: members.into(),
        after: Some(Generation(3)),
        ballot: 0,
        purpose: Purpose::Train,
        restarts: 0,
    }
}

fn capacity() -> Capacity {
    Capacity {
        cpus: 2,
        memory_bytes: 24 << 30,
        disk_bytes: 80 << 30,
        gpus: vec![Gpu { name: "H100".into(), memory_bytes: 80 << 30 }].into(),
        labels: vec![("rack".into(), "a".into())].into(),
        version: "0.1.0".into(),
    }
}

fn from_node() -> Vec<FromNode> {
    let hello = NodeHello {
        cluster: ClusterId([1; 16]),
        node: NodeId(3),
        name: "gpu-3".into(),
        incarnation: Incarnation(5),
        session: 1,
        epoch_seen: Epoch(2),
        index_seen: LogIndex(90),
        capacity: capacity(),
        gateway: None,
        ranks: vec![RankInventory { id: id(), alive: true, step: Step(4) }].into(),
    };
    let swept = FromNode::Swept { job: JobId(3), index: LogIndex(8), removed: 2, error: Some("denied".into()) };
    let demand = Demand { model: "chat".into(), held: 3, refused: 1 };
    let mut messages = vec![
        FromNode::Hello(hello),
        FromNode::Progress { id: id(), progress: progress() },
        swept,
        FromNode::Load { id: id(), load: load() },
        FromNode::Demand(vec![demand; 3].into()),
        FromNode::Timed { id: id(), steps: vec![step_times(); 3].into() },
    ];
    messages.extend(serving::surveyed().map(|found| FromNode::Surveyed { survey: serving::survey(), found }));
    messages.extend(events().into_iter().map(|event| FromNode::Report(Report { sequence: 4, id: id(), event })));
    messages
}

fn to_node() -> Vec<ToNode> {
    vec![
        ToNode::Welcome { epoch: Epoch(1), index: LogIndex(4), heartbeat_ms: 500, lease_ms: 3_000 },
        ToNode::Acknowledge { sequence: 1, index: LogIndex(5) },
        ToNode::Start(start()),
        ToNode::Membership { id: id(), membership: membership() },
        ToNode::Commit { id: id(), generation: Generation(4), step: Step(9), shards: vec![shard(); 3].into() },
        ToNode::Committed { id: id(), step: Step(9), keep: vec!["step-00000001-g1".to_owned()].into() },
        ToNode::Release { id: id() },
        ToNode::Stop { id: id(), reason: "cancelled".into(), grace_ms: 5_000 },
        ToNode::Sweep {
            job: JobId(3),
            index: LogIndex(8),
            checkpoints: "s3://bucket/job-3".into(),
            newest: (Step(9), Generation(4)),
            keep: vec!["step-00000001-g1".to_owned()].into(),
        },
        ToNode::Abandon { id: id(), generation: Generation(4), step: Step(9) },
        ToNode::Rollouts { id: id(), rollouts: membership().members },
        ToNode::Routes(serving::routes()),
        ToNode::Survey(serving::survey()),
    ]
}

fn step_times() -> StepTimes {
    let (generation, step) = (Generation(4), Step(9));
    StepTimes { generation, step, began_us: 1_700_000_000_000_000, compute_us: 900, exchange_us: 70, apply_us: 8 }
}

fn load() -> Load {
    let mut first_tokens = FirstTokens::default();
    [3, 150, 4_000, 90_000].into_iter().for_each(|ms| first_tokens.add(ms));
    Load { running: 4, waiting: 2, answers: 400, tokens: 70_000, first_tokens }
}

fn heartbeat() -> Heartbeat {
    Heartbeat {
        incarnation: Incarnation(1),
        sequence: 7,
        cpu_used: 0.5,
        memory_used_bytes: 1 << 30,
        routes: LogIndex(9),
        leaving: 2,
        heat: Default::default(),
    }
}

fn node_request() -> Vec<NodeRequest> {
    vec![
        NodeRequest::SignRank { id: id(), csr: vec![48; 300].into() },
        NodeRequest::Renew { csr: vec![48; 300].into() },
        NodeRequest::Artifact { artifact: Artifact(Digest([7; 32])), offset: 4 },
    ]
}

fn node_reply() -> Vec<NodeReply> {
    vec![
        NodeReply::Certificate { certificate: vec![48; 500].into() },
        NodeReply::Refused { reason: "not placed there".into() },
    ]
}

fn log_chunk() -> LogChunk {
    LogChunk { id: id(), lines: vec!["step 1 loss 0.7".to_owned(); 5].into(), last: false }
}

fn to_rank() -> Vec<ToRank> {
    vec![
        ToRank::Start(start()),
        ToRank::Certificate { certificate: vec![48; 500].into(), authority: vec![48; 400].into() },
        ToRank::Membership(membership()),
        ToRank::Commit { generation: Generation(4), step: Step(9), shards: vec![shard(); 3].into() },
        ToRank::Committed { step: Step(9), keep: vec!["step-00000001-g1".to_owned()].into() },
        ToRank::Release,
        ToRank::Stop { reason: "cancelled".into() },
        ToRank::Stores(StoreSettings(vec![("AWS_REGION".to_owned(), "eu-north-1".to_owned())].into())),
        ToRank::Abandon { generation: Generation(4), step: Step(9) },
        ToRank::Rollouts { rollouts: membership().members },
    ]
}

fn from_rank() -> Vec<FromRank> {
    let mut messages = vec![
        FromRank::Hello { csr: vec![48; 300].into(), artifact: None },
        FromRank::Progress(progress()),
        FromRank::Alive,
        FromRank::Load(load()),
        FromRank::Timed(vec![step_times(); 3].into()),
        FromRank::Renew { csr: vec![48; 300].into() },
    ];
    messages.extend(events().into_iter().map(FromRank::Event));
    messages
}

fn requests() -> Vec<Request> {
    vec![
        Request::Submit { key: "k-1".into(), spec: SPEC.into() },
        Request::Jobs,
        Request::Logs { job: JobId(1), rank: None, tail: Some(10), follow: true },
        Request::TokenCreate { scope: TokenScope::Node, ttl_seconds: 3_600 },
        Request::TokenRevoke { token: TokenId(4) },
        Request::Renew { csr: vec![48; 300].into() },
        Request::Artifact { artifact: Artifact(Digest([7; 32])), bytes: 1 << 20 },
        Request::ArtifactPart { artifact: Artifact(Digest([7; 32])), bytes: 9, offset: 3, part: vec![1; 6].into() },
        Request::Scale { job: JobId(1), ranks: 3 },
        Request::Pin { job: JobId(1), step: Step(9) },
        Request::Prune { job: JobId(1), keep: Some(2), dry_run: true },
        Request::Promote { job: JobId(1) },
        Request::Rollback { model: "m".into() },
        Request::Replicas { model: "m".into(), replicas: 3 },
        Request::Plan { spec: SPEC.into() },
    ]
}

fn replies() -> Vec<Reply> {
    vec![
        Reply::Submitted { job: JobId(1), created: true },
        Reply::Scaled { job: JobId(1), ranks: 3 },
        Reply::Log(log_chunk()),
        Reply::Serving {
            model: "m".into(),
            jobs: vec![JobId(1), JobId(2)].into(),
            added: vec![JobId(2)].into(),
            leaving: vec![JobId(3)].into(),
        },
        Reply::Planned(Box::new(serving::planned())),
        Reply::Token { token: TokenId(4), text: "stoke1.x".into() },
        Reply::Refused(Refusal { code: RefusalCode::Invalid, message: "no such key".into(), mend: "remove it".into() }),
    ]
}

fn join_request() -> JoinRequest {
    JoinRequest {
        token: TokenId(4),
        secret: [7; 16],
        wants: Wants::Node { name: "gpu-3".into() },
        csr: vec![48; 300].into(),
    }
}

fn join_reply() -> Vec<JoinReply> {
    vec![JoinReply::Accepted { certificate: vec![48; 500].into() }, JoinReply::Refused { reason: "expired".into() }]
}

fn to_player() -> Vec<ToPlayer> {
    let weights = WeightsId { version: 40, digest: 0x0123_4567_89ab_cdef };
    vec![
        ToPlayer::Weights { id: weights, count: 9_155 },
        ToPlayer::Play { order: 7, lane: 3, weights, bytes: 400 },
        ToPlayer::PassOn { players: membership().members },
    ]
}

fn from_player() -> Vec<FromPlayer> {
    vec![
        FromPlayer::Played { order: 7, trajectory: 30_000, state: 400, failures: 0, strays: 0 },
        FromPlayer::Failed { order: 8, error: "the process of environment Blackjack-v1 ended".into() },
        FromPlayer::Wanting { order: 9 },
        FromPlayer::Loaded { id: WeightsId { version: 40, digest: 1 } },
    ]
}

fn tensor_header() -> TensorHeader {
    TensorHeader {
        term: Term { generation: Generation(1), ballot: 0 },
        step: Step(4),
        part: Part::Partial(Subtree { start: 0, len: 4 }),
        offset: 64,
        count: 65_536,
        replica: Some(Fingerprint(u64::MAX)),
    }
}
