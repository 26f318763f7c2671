//! A head in the process of the test: a real QUIC endpoint whose answers are a function of the question, and which fails as it is told.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use stoke_protocol::identity::{Authority, Subject};
use stoke_protocol::ids::{ClusterId, Generation, JobId, LogIndex, NodeId, Rank};
use stoke_protocol::message::rank::RankId;
use stoke_protocol::message::serve::{
    Answer, Ask, Datatype, Finish, Generate, Head, Prompt, Question, Refusal, Route, Routes, Tensor, TensorKind,
    Traffic,
};
use stoke_protocol::spec::Task;
use stoke_protocol::transport::{Accepted, CloseCode, Connection, Endpoint, FrameSender, Io, Settings};
use tokio::sync::watch;

use crate::gateway::{Gateway, Options};

const HOUR: Duration = Duration::from_secs(3600);
pub(super) const PROMPT_TOKENS: u32 = 5;

/// What a head does with its next question.
#[derive(Clone, Debug)]
pub(super) enum Deed {
    Answer,
    /// The stream is reset after so many tokens of this try.
    Reset(usize),
    /// The connection is closed after so many tokens.
    Close(usize),
    /// The answer just ends after so many tokens.
    End(usize),
    Refuse(Refusal),
    /// So many tokens, then a refusal.
    RefuseAfter(usize, Refusal),
    /// So many tokens, then one that was there already.
    Repeat(usize),
    /// So many tokens, then one that leaves one out.
    Skip(usize),
    /// Nothing more after so many tokens, until the gateway stops reading.
    Stall(usize),
    /// So many vectors, then a loss.
    Vectors(usize),
}

pub(super) struct TestHead {
    pub(super) id: RankId,
    pub(super) address: SocketAddr,
    endpoint: Endpoint,
    shared: Arc<Shared>,
}

struct Shared {
    deeds: Mutex<VecDeque<Deed>>,
    questions: Mutex<Vec<Question>>,
    /// Answers that the gateway stopped reading.
    stopped: watch::Sender<usize>,
    /// Questions that came.
    asked: watch::Sender<usize>,
    /// Answers that the gateway has, or its QUIC.
    whole: watch::Sender<usize>,
}

/// What heads and a gateway have in common.
pub(super) struct Cluster {
    authority: Authority,
    io: Io,
}

impl Cluster {
    pub(super) fn new() -> Self {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let authority = Authority::in_memory(ClusterId([7; 16])).unwrap();
        Self { authority, io: Io::thread("stoke-test-net").unwrap() }
    }

    pub(super) fn head(&self, job: u64, generation: u64, deeds: Vec<Deed>) -> TestHead {
        let id = RankId { job: JobId(job), generation: Generation(generation), rank: Rank(0) };
        let subject = Subject::Rank { job: id.job, generation: id.generation, rank: id.rank };
        let credentials = self.authority.credentials(&subject, HOUR).unwrap();
        let bind = SocketAddr::from(([127, 0, 0, 1], 0));
        let endpoint = Endpoint::server(&self.io, bind, Settings::bulk(), credentials).unwrap();
        let address = endpoint.local_addr().unwrap();
        let shared = Arc::new(Shared {
            deeds: Mutex::new(deeds.into()),
            questions: Mutex::default(),
            stopped: watch::Sender::new(0),
            asked: watch::Sender::new(0),
            whole: watch::Sender::new(0),
        });
        tokio::spawn(serve(endpoint.clone(), shared.clone()));
        TestHead { id, address, endpoint, shared }
    }

    pub(super) async fn gateway(&self, change: impl FnOnce(&mut Options)) -> Gateway {
        let mut options = Options::new(([127, 0, 0, 1], 0).into());
        change(&mut options);
        Gateway::start(options, self.client()).await.unwrap()
    }

    pub(super) fn client(&self) -> Endpoint {
        let credentials = self.authority.credentials(&Subject::Node(NodeId(1)), HOUR).unwrap();
        let bind = SocketAddr::from(([127, 0, 0, 1], 0));
        Endpoint::client(&self.io, bind, Settings::bulk(), credentials).unwrap()
    }
}

impl TestHead {
    pub(super) fn head(&self) -> Head {
        Head { id: self.id, address: self.address, generation: self.id.generation }
    }

    pub(super) fn route(&self, model: &str, task: Task) -> Route {
        Route {
            model: model.into(),
            job: self.id.job,
            task,
            created_ms: 1_700_000_000_000,
            head: Some(self.head()),
            revision: 1,
            traffic: Traffic::Rest,
        }
    }

    pub(super) fn questions(&self) -> Vec<Question> {
        self.shared.questions.lock().unwrap().clone()
    }

    /// Questions for text, and how many tokens of the answer each had already.
    pub(super) fn answered(&self) -> Vec<usize> {
        let of = |question: &Question| match &question.ask {
            Ask::Generate(generate) => Some(generate.answered.len()),
            _ => None,
        };
        self.questions().iter().filter_map(of).collect()
    }

    /// Waits until the gateway has stopped reading so many answers.
    pub(super) async fn stopped(&self, count: usize) {
        let mut stopped = self.shared.stopped.subscribe();
        let waiting = stopped.wait_for(|stopped| *stopped >= count);
        tokio::time::timeout(Duration::from_secs(20), waiting).await.expect("the head hears of it").unwrap();
    }

    /// Waits until so many questions have come.
    pub(super) async fn asked(&self, count: usize) {
        let mut asked = self.shared.asked.subscribe();
        let waiting = asked.wait_for(|asked| *asked >= count);
        tokio::time::timeout(Duration::from_secs(20), waiting).await.expect("the head is asked").unwrap();
    }

    /// Waits until so many answers are out of the head's hands.
    pub(super) async fn answered_whole(&self, count: usize) {
        let mut whole = self.shared.whole.subscribe();
        let waiting = whole.wait_for(|whole| *whole >= count);
        tokio::time::timeout(Duration::from_secs(60), waiting).await.expect("the answer is taken").unwrap();
    }

    pub(super) async fn die(&self) {
        self.endpoint.close(CloseCode::Abandoned, "died").await;
    }
}

pub(super) fn routes(index: u64, routes: Vec<Route>) -> Routes {
    Routes { index: LogIndex(index), routes: routes.into() }
}

async fn serve(endpoint: Endpoint, shared: Arc<Shared>) {
    while let Some(accepted) = endpoint.accept().await {
        let Accepted::Session(connection) = accepted else { continue };
        let shared = shared.clone();
        tokio::spawn(async move {
            while let Ok(request) = connection.accept_request().await {
                let (shared, connection) = (shared.clone(), connection.clone());
                tokio::spawn(async move {
                    let Ok((question, reply)) = request.read::<Question>().await else { return };
                    shared.questions.lock().unwrap().push(question.clone());
                    let deed = shared.deeds.lock().unwrap().pop_front().unwrap_or(Deed::Answer);
                    shared.asked.send_modify(|asked| *asked += 1);
                    let sender = reply.into_frames();
                    answer(question, deed, sender, &connection, &shared).await;
                });
            }
        });
    }
}

async fn answer(question: Question, deed: Deed, mut sender: FrameSender, connection: &Connection, shared: &Shared) {
    if let Deed::Refuse(refusal) = &deed {
        sender.send(&Answer::Refused(refusal.clone())).await.ok();
        sender.finish().ok();
        return;
    }
    let (frames, end) = frames(&question, &deed);
    for frame in frames {
        if sender.send(&frame).await.is_err() {
            shared.stopped.send_modify(|stopped| *stopped += 1);
            return;
        }
    }
    match end {
        After::Finish => {
            if sender.finish_delivered().await.is_ok() {
                shared.whole.send_modify(|whole| *whole += 1);
            }
        }
        After::Reset => sender.reset(CloseCode::Abandoned),
        After::Close => {
            // What was sent is read first, so that the loss comes where the test wants it.
            let _ = sender.finish_delivered().await;
            connection.close(CloseCode::Abandoned, "died");
        }
        After::Stall => {
            sender.stopped().await;
            shared.stopped.send_modify(|stopped| *stopped += 1);
        }
    }
}

enum After {
    Finish,
    Reset,
    Close,
    Stall,
}

fn frames(question: &Question, deed: &Deed) -> (Vec<Answer>, After) {
    let end = |text: &str| Answer::Ended { why: Finish::Stop, text: text.to_owned() };
    match &question.ask {
        Ask::Generate(generate) => generated(generate, deed),
        Ask::Embed { texts } => {
            let vector = |(index, text): (usize, &String)| Answer::Vector {
                index: index as u32,
                tokens: text.len() as u32,
                values: vector_of(text).into(),
            };
            let mut frames: Vec<Answer> = texts.iter().enumerate().map(vector).collect();
            match deed {
                Deed::Vectors(most) => {
                    frames.truncate(*most);
                    (frames, After::Reset)
                }
                _ => {
                    frames.push(end(""));
                    (frames, After::Finish)
                }
            }
        }
        Ask::Infer { inputs } => {
            // Twice each value of an FP32 input; other inputs as they are.
            let outputs = inputs.iter().map(|input| {
                let values = match input.datatype {
                    Datatype::F32 => input.values.chunks_exact(4).flat_map(doubled).collect(),
                    _ => input.values.0.clone(),
                };
                Tensor { name: format!("{}_out", input.name), values: values.into(), ..input.clone() }
            });
            (vec![Answer::Tensors { outputs: outputs.collect() }, end("")], After::Finish)
        }
        Ask::Describe => {
            let kind = |name: &str| TensorKind {
                name: name.into(),
                datatype: Datatype::F32,
                shape: vec![None, Some(2)].into(),
            };
            let described = Answer::Described { inputs: vec![kind("x")].into(), outputs: vec![kind("x_out")].into() };
            (vec![described, end("")], After::Finish)
        }
        Ask::Probe => match deed {
            Deed::Stall(_) => (Vec::new(), After::Stall),
            _ => (vec![end("")], After::Finish),
        },
    }
}

fn doubled(value: &[u8]) -> [u8; 4] {
    (f32::from_le_bytes(value.try_into().unwrap()) * 2.0).to_le_bytes()
}

pub(super) fn vector_of(text: &str) -> Vec<f32> {
    vec![text.len() as f32, text.bytes().map(f32::from).sum(), 0.1]
}

fn generated(generate: &Generate, deed: &Deed) -> (Vec<Answer>, After) {
    let (tokens, why) = tokens(generate);
    let from = generate.answered.len();
    assert_eq!(generate.answered.0, tokens[..from], "what was answered is what is answered");
    let token = |index: usize| Answer::Tokens {
        index: index as u32,
        tokens: vec![tokens[index]].into(),
        text: piece(&tokens[..=index]),
    };
    let some = |count: usize| (from..tokens.len().min(from + count)).map(token);
    let mut frames = vec![Answer::Begun { prompt_tokens: PROMPT_TOKENS }];
    match deed {
        Deed::Answer | Deed::Vectors(_) => {
            frames.extend(some(usize::MAX - from));
            let text = text_of(&tokens)[certain(&tokens).len()..].to_owned();
            frames.push(Answer::Ended { why, text });
            return (frames, After::Finish);
        }
        Deed::Refuse(_) => unreachable!("answered before"),
        Deed::Reset(count) | Deed::Close(count) | Deed::End(count) | Deed::Stall(count) => frames.extend(some(*count)),
        Deed::RefuseAfter(count, refusal) => {
            frames.extend(some(*count));
            frames.push(Answer::Refused(refusal.clone()));
        }
        Deed::Repeat(count) => {
            frames.extend(some(*count));
            frames.push(token(from + count - 1));
        }
        Deed::Skip(count) => {
            frames.extend(some(*count));
            frames.push(token(from + count + 1));
        }
    }
    let after = match deed {
        Deed::Reset(_) => After::Reset,
        Deed::Close(_) => After::Close,
        Deed::Repeat(_) | Deed::Skip(_) | Deed::Stall(_) => After::Stall,
        _ => After::Finish,
    };
    (frames, after)
}

/// Each token is a function of the question and of all tokens before it.
pub(super) fn tokens(generate: &Generate) -> (Vec<u32>, Finish) {
    let most = generate.tokens_max.unwrap_or(40) as usize;
    let prompt = match &generate.prompt {
        Prompt::Chat(messages) => {
            messages.iter().map(|message| format!("{}:{};", message.role, message.content)).collect()
        }
        Prompt::Text(text) => text.clone(),
        Prompt::Tokens(tokens) => format!("{tokens:?}"),
    };
    let mut tokens = Vec::new();
    let mut state = blake3::hash(format!("{prompt}|{}", generate.sampling.seed).as_bytes());
    while tokens.len() < most {
        tokens.push(u32::from(state.as_bytes()[0]) * 7 + 3);
        state = blake3::hash(state.as_bytes());
    }
    (tokens, Finish::Length)
}

pub(super) fn text_of(tokens: &[u32]) -> String {
    tokens.iter().map(|token| format!(" é{token}")).collect()
}

/// What is certain with the last of the tokens and was not before it.
fn piece(tokens: &[u32]) -> String {
    let from = tokens.len().saturating_sub(2);
    let before = if from + 1 < tokens.len() { certain(&tokens[from..=from]).len() } else { 0 };
    certain(&tokens[from..])[before..].to_owned()
}

/// All but the last character, which is kept back.
fn certain(tokens: &[u32]) -> String {
    let mut text = text_of(tokens);
    text.pop();
    text
}
