//! Models that one rank has whole, and that answer a question at once: encoders, classifiers, and the one that does nothing. Owns which questions are
//! computed together: whatever has come while the last ones were computed.

use std::sync::Arc;
use std::sync::mpsc::Sender;

use stoke_jobs::Predict;
use stoke_jobs::lm::{Encoder, Reader, Weights};
use stoke_protocol::ids::Generation;
use stoke_protocol::list::List;
use stoke_protocol::message::serve::{Answer, Ask, Datatype, Finish, Refusal, Tensor, TensorKind};
use stoke_protocol::spec::{IDENTITY, Serve, Task};
use stoke_protocol::transport::{FrameSender, TransportError};
use tokio::sync::oneshot;
use tokio::time::{Instant, timeout_at};

use super::door::{Desk, invalid};
use super::model::folder;
use super::{Event, Gone, Post};
use crate::checkpoint;
use crate::worker::{Beat, text_of};

/// Questions that are computed together.
const TOGETHER_MAX: usize = 64;
/// Texts or lines of a piece of computing.
const PIECE: usize = 64;
/// Texts or lines of a question.
const TEXTS_MAX: usize = 2048;
/// The tensors of a classifier, by name.
const LINE: &str = "line";
const LABEL: &str = "label";
const SCORES: &str = "scores";

/// A question in the form that the model takes, and who waits for its answer.
pub struct Given {
    work: Work,
    reply: oneshot::Sender<Result<Vec<Answer>, Refusal>>,
}

enum Work {
    Texts(Vec<Vec<u32>>),
    Lines(Vec<String>),
    Tensors(List<Tensor>),
    /// Whether anybody computes.
    Nothing,
}

/// A model with its compute.
pub enum Single<'w> {
    Encoder(Box<Encoder<'w>>),
    Classifier(Box<dyn Predict>),
    Identity,
}

/// What stays mapped while an encoder lives.
pub fn weights(serve: &Serve) -> Result<Option<Weights>, String> {
    match serve.task {
        Task::Embed => Weights::open(&folder(&serve.model)?).map(Some).map_err(|error| text_of(&error)),
        Task::Infer | Task::Generate => Ok(None),
    }
}

impl<'w> Single<'w> {
    /// The error is for people.
    pub fn open(serve: &Serve, weights: Option<&'w Weights>) -> Result<Self, String> {
        match weights {
            Some(weights) => {
                let encoder = Encoder::open(weights).map_err(|error| text_of(&error))?;
                Ok(Self::Encoder(Box::new(encoder)))
            }
            None if serve.model == IDENTITY => Ok(Self::Identity),
            None => {
                let (manifest, tensors) = checkpoint::load(&serve.model, None).map_err(|error| text_of(&error))?;
                let classifier = stoke_jobs::classifier(&manifest.spec, &manifest.trainer, tensors);
                classifier.map(Self::Classifier).map_err(|error| text_of(&error))
            }
        }
    }

    pub fn desk(&self, inbox: Sender<Event>) -> Desk {
        let reads = match self {
            Self::Encoder(encoder) => Reads::Texts(encoder.reader()),
            Self::Classifier(_) => Reads::Lines,
            Self::Identity => Reads::Tensors,
        };
        Desk::Single(Arc::new(Asking { reads, inbox }))
    }

    /// Answers until the generation is over. Questions of one that has ended are answered in the next.
    pub fn lead(&mut self, post: &Post<'_>, generation: Generation) -> Gone {
        loop {
            let Ok(first) = post.inbox.recv() else { return Gone::Left };
            let more = post.inbox.try_iter().take(TOGETHER_MAX - 1);
            let (mut given, mut gone) = (Vec::new(), None);
            for event in std::iter::once(first).chain(more) {
                match event {
                    Event::Given(question) => given.push(*question),
                    Event::Superseded(ended) if ended == generation => gone = Some(Gone::Superseded),
                    Event::Superseded(_) | Event::Asked(_) | Event::Dropped(_) => {}
                    Event::Frame(_) | Event::Lost { .. } | Event::Left { .. } => {}
                }
            }
            given.retain(|question| !question.reply.is_closed());
            self.compute(given, &post.beat);
            if let Some(gone) = gone {
                return gone;
            }
        }
    }

    /// All texts of all questions at once, in pieces that take no longer than a batch should; each question takes its own from what comes back.
    fn compute(&mut self, given: Vec<Given>, beat: &Beat) {
        match self {
            Self::Encoder(encoder) => {
                let texts: Vec<Vec<u32>> = given.iter().flat_map(|question| question.work.texts()).cloned().collect();
                let mut vectors = texts.chunks(PIECE).flat_map(|piece| beat.piece(|| encoder.encode(piece)));
                for Given { work, reply } in given {
                    let its = work.texts().iter().zip(vectors.by_ref());
                    let vector = |(index, (text, values)): (usize, (&Vec<u32>, Vec<f32>))| {
                        let tokens = text.len() as u32;
                        Answer::Vector { index: index as u32, tokens, values: values.into() }
                    };
                    let _ = reply.send(Ok(its.enumerate().map(vector).collect()));
                }
            }
            Self::Classifier(classifier) => {
                let lines: Vec<&str> =
                    given.iter().flat_map(|question| question.work.lines()).map(String::as_str).collect();
                let answers = lines.chunks(PIECE).flat_map(|piece| beat.piece(|| classifier.predict(piece)));
                let mut answers = answers.collect::<Vec<_>>().into_iter();
                let counts: Vec<usize> = given.iter().map(|question| question.work.lines().len()).collect();
                for (question, count) in given.into_iter().zip(counts) {
                    let its: Vec<_> = answers.by_ref().take(count).collect();
                    let _ = question.reply.send(classified(its).map(Vec::from_iter));
                }
            }
            Self::Identity => {
                for Given { work, reply } in given {
                    let answers = match work {
                        Work::Tensors(outputs) => vec![Answer::Tensors { outputs }],
                        Work::Texts(_) | Work::Lines(_) | Work::Nothing => Vec::new(),
                    };
                    let _ = reply.send(Ok(answers));
                }
            }
        }
    }
}

impl Work {
    fn texts(&self) -> &[Vec<u32>] {
        if let Self::Texts(texts) = self { texts } else { &[] }
    }

    fn lines(&self) -> &[String] {
        if let Self::Lines(lines) = self { lines } else { &[] }
    }
}

/// Labels and scores of lines; none for no lines.
fn classified(answers: Vec<Result<stoke_jobs::Prediction, String>>) -> Result<Option<Answer>, Refusal> {
    let (mut labels, mut scores, rows) = (Vec::new(), Vec::new(), answers.len() as u64);
    for (row, answer) in answers.into_iter().enumerate() {
        let prediction = answer.map_err(|problem| invalid(format!("{LINE}[{row}]: {problem}")))?;
        labels.extend((prediction.label.len() as u32).to_le_bytes());
        labels.extend(prediction.label.bytes());
        scores.extend(prediction.scores.iter().flat_map(|(_, score)| score.to_le_bytes()));
    }
    if rows == 0 {
        return Ok(None);
    }
    let columns = scores.len() as u64 / 4 / rows;
    let tensor = |name: &str, datatype, shape: Vec<u64>, values: Vec<u8>| Tensor {
        name: name.into(),
        datatype,
        shape: shape.into(),
        values: values.into(),
    };
    let label = tensor(LABEL, Datatype::Bytes, vec![rows], labels);
    let scores = tensor(SCORES, Datatype::F32, vec![rows, columns], scores);
    Ok(Some(Answer::Tensors { outputs: vec![label, scores].into() }))
}

/// Reads questions for a model of one rank.
pub struct Asking {
    reads: Reads,
    inbox: Sender<Event>,
}

#[derive(Clone)]
enum Reads {
    Texts(Reader),
    Lines,
    Tensors,
}

impl Asking {
    /// Sends an answer; gives its last frame. An error: nobody listens any more.
    pub async fn answer(
        self: Arc<Self>,
        ask: Ask,
        deadline: Instant,
        frames: &mut FrameSender,
    ) -> Result<Answer, TransportError> {
        let over = Answer::Ended { why: Finish::Stop, text: String::new() };
        if matches!(ask, Ask::Describe) {
            return match self.reads.described() {
                Ok(described) => frames.send(&described).await.map(|()| over),
                Err(refusal) => Ok(Answer::Refused(refusal)),
            };
        }
        let work = match self.reads.clone() {
            Reads::Texts(_) => {
                let reads = self.reads.clone();
                let read = tokio::task::spawn_blocking(move || reads.read(ask)).await;
                read.unwrap_or_else(|error| Err(invalid(format!("the text cannot be read: {error}"))))
            }
            reads => reads.read(ask),
        };
        let work = match work {
            Ok(work) => work,
            Err(refusal) => return Ok(Answer::Refused(refusal)),
        };
        let (reply, told) = oneshot::channel();
        let _ = self.inbox.send(Event::Given(Box::new(Given { work, reply })));
        let told = tokio::select! {
            told = timeout_at(deadline, told) => told,
            () = frames.stopped() => return Err(TransportError::Ended),
        };
        match told {
            Err(_) => Ok(Answer::Refused(Refusal::Late)),
            // The rank ends: another one answers.
            Ok(Err(_)) => Ok(Answer::Refused(Refusal::Moved)),
            Ok(Ok(Err(refusal))) => Ok(Answer::Refused(refusal)),
            Ok(Ok(Ok(answers))) => {
                for answer in &answers {
                    frames.send(answer).await?;
                }
                Ok(over)
            }
        }
    }
}

impl Reads {
    fn read(&self, ask: Ask) -> Result<Work, Refusal> {
        let too_many = |count: usize| invalid(format!("{count} texts in one request: send up to {TEXTS_MAX}"));
        match (self, ask) {
            (_, Ask::Probe) => Ok(Work::Nothing),
            (Self::Texts(_), Ask::Embed { texts }) if texts.len() > TEXTS_MAX => Err(too_many(texts.len())),
            (Self::Texts(reader), Ask::Embed { texts }) => {
                let read = |(row, text): (usize, &String)| {
                    let tokens =
                        reader.read(text).map_err(|error| invalid(format!("text {row}: {}", text_of(&error))))?;
                    Ok(tokens.ids)
                };
                texts.iter().enumerate().map(read).collect::<Result<_, _>>().map(Work::Texts)
            }
            (Self::Lines, Ask::Infer { inputs }) => match &inputs[..] {
                [Tensor { name, datatype: Datatype::Bytes, values, .. }] if name == LINE => {
                    let lines = strings(values)?;
                    if lines.len() > TEXTS_MAX {
                        return Err(too_many(lines.len()));
                    }
                    Ok(Work::Lines(lines))
                }
                _ => Err(invalid(format!("the model takes one tensor, {LINE:?} of BYTES"))),
            },
            (Self::Tensors, Ask::Infer { inputs }) => Ok(Work::Tensors(inputs)),
            (Self::Texts(_), _) => Err(invalid("this model gives vectors for texts, and nothing else".into())),
            (Self::Lines | Self::Tensors, _) => {
                Err(invalid("this model takes tensors: use /v2/models/NAME/infer".into()))
            }
        }
    }

    fn described(&self) -> Result<Answer, Refusal> {
        let kind = |name: &str, datatype, shape: &[Option<u64>]| TensorKind {
            name: name.into(),
            datatype,
            shape: shape.to_vec().into(),
        };
        let (inputs, outputs) = match self {
            Self::Texts(_) => return Err(invalid("an encoder takes texts".into())),
            Self::Lines => (
                vec![kind(LINE, Datatype::Bytes, &[None])],
                vec![kind(LABEL, Datatype::Bytes, &[None]), kind(SCORES, Datatype::F32, &[None, None])],
            ),
            Self::Tensors => {
                let any = || vec![kind("x", Datatype::F32, &[None])];
                (any(), any())
            }
        };
        Ok(Answer::Described { inputs: inputs.into(), outputs: outputs.into() })
    }
}

/// Values of BYTES, each behind its length.
fn strings(mut values: &[u8]) -> Result<Vec<String>, Refusal> {
    let cut = || invalid(format!("{LINE}: its bytes end in the middle of a value"));
    let mut lines = Vec::new();
    while let Some((length, rest)) = values.split_first_chunk::<4>() {
        let (value, rest) = rest.split_at_checked(u32::from_le_bytes(*length) as usize).ok_or_else(cut)?;
        let line = std::str::from_utf8(value).map_err(|_| invalid(format!("{LINE}[{}]: is not UTF-8", lines.len())))?;
        lines.push(line.to_owned());
        values = rest;
    }
    if values.is_empty() { Ok(lines) } else { Err(cut()) }
}
