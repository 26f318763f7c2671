//! Models that one rank has whole, and that answer a question at once: encoders, classifiers, and the one that does nothing. Owns which questions are
//! computed together: whatever has come while the last ones were computed, a piece of each in turn.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;
use std::sync::mpsc::Sender;

use stoke_jobs::Predict;
use stoke_jobs::lm::{Encoder, Reader, Weights};
use stoke_protocol::ids::Generation;
use stoke_protocol::list::List;
use stoke_protocol::message::serve::{Answer, Ask, Datatype, Finish, Refusal, Tensor, TensorKind};
use stoke_protocol::spec::{IDENTITY, Serve, Task};
use stoke_protocol::transport::TransportError;
use tokio::sync::oneshot;
use tokio::time::{Instant, timeout_at};

use super::door::{Desk, invalid};
use super::meter::Voice;
use super::model::folder;
use super::{Event, Gone, Post};
use crate::checkpoint;
use crate::worker::text_of;

/// Rows of a piece of computing, of one question or several: texts of an encoder, where the longest have 512 tokens.
const PIECE: usize = 16;
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

/// A model of one rank, and the questions that it has not answered.
pub struct Single<'w> {
    model: Model<'w>,
    open: VecDeque<Open>,
}

enum Model<'w> {
    Encoder(Box<Encoder<'w>>),
    Classifier(Box<dyn Predict>),
    Identity,
}

/// A question that is being answered.
struct Open {
    given: Given,
    answers: Vec<Answer>,
    /// That were computed.
    rows: usize,
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
        let model = match weights {
            Some(weights) => {
                Model::Encoder(Box::new(Encoder::open(weights).map_err(|error| match weights.config() {
                    Ok(_) => {
                        format!("{}: it generates text: serve it with task = \"generate\"", weights.path().display())
                    }
                    Err(_) => text_of(&error),
                })?))
            }
            None if serve.model == IDENTITY => Model::Identity,
            None => {
                let (manifest, tensors) = checkpoint::load(&serve.model, None).map_err(|error| text_of(&error))?;
                let classifier = stoke_jobs::classifier(&manifest.spec, &manifest.trainer, tensors);
                Model::Classifier(classifier.map_err(|error| text_of(&error))?)
            }
        };
        Ok(Self { model, open: VecDeque::new() })
    }

    pub fn desk(&self, inbox: Sender<Event>) -> Desk {
        let reads = match &self.model {
            Model::Encoder(encoder) => Reads::Texts(encoder.reader()),
            Model::Classifier(_) => Reads::Lines,
            Model::Identity => Reads::Tensors,
        };
        Desk::Single(Arc::new(Asking { reads, inbox }))
    }

    /// Answers until the generation is over. Questions of one that has ended are answered in the next.
    pub fn lead(&mut self, post: &Post<'_>, generation: Generation) -> Gone {
        loop {
            let first = match self.open.is_empty() {
                true => post.inbox.recv().ok(),
                false => None,
            };
            for event in first.into_iter().chain(post.inbox.try_iter()) {
                match event {
                    Event::Given(given) => self.open.push_back(Open { given: *given, answers: Vec::new(), rows: 0 }),
                    Event::Superseded(ended) if ended == generation => return Gone::Superseded,
                    Event::Superseded(_) | Event::Asked(_) | Event::Dropped(_) => {}
                    Event::Frame(_) | Event::Lost { .. } | Event::Left { .. } => {}
                }
            }
            self.open.retain(|question| !question.given.reply.is_closed());
            post.meter.computes(self.open.len());
            post.beat.piece(|| self.model.piece(&mut self.open));
            post.meter.computes(self.open.len());
        }
    }
}

impl Model<'_> {
    /// Computes some rows of the first questions, and answers those that are whole. One that is not goes behind the others: a long question holds
    /// nobody up for longer than a piece.
    fn piece(&mut self, open: &mut VecDeque<Open>) {
        let mut room = PIECE;
        let mut taken = Vec::new();
        while room > 0
            && let Some(question) = open.pop_front()
        {
            let rows = question.rows..(question.rows + room).min(question.given.work.rows());
            room -= rows.len();
            taken.push((question, rows));
        }
        let made = self.compute(&taken);
        for ((mut question, rows), made) in taken.into_iter().zip(made) {
            match made {
                Ok(answers) => question.answers.extend(answers),
                Err(refusal) => {
                    let _ = question.given.reply.send(Err(refusal));
                    continue;
                }
            }
            question.rows = rows.end;
            match question.rows >= question.given.work.rows() {
                true => drop(question.given.reply.send(Ok(question.answers))),
                false => open.push_back(question),
            }
        }
    }

    /// For each question what its rows give.
    fn compute(&mut self, taken: &[(Open, Range<usize>)]) -> Vec<Result<Vec<Answer>, Refusal>> {
        match self {
            Self::Encoder(encoder) => {
                let its = |(question, rows): &(Open, Range<usize>)| question.given.work.texts_of(rows).to_vec();
                let texts: Vec<Vec<u32>> = taken.iter().flat_map(its).collect();
                let mut vectors = encoder.encode(&texts).into_iter();
                let answers = |(question, rows): &(Open, Range<usize>)| {
                    let texts = rows.clone().zip(question.given.work.texts_of(rows));
                    let vector = |((row, text), values): ((usize, &Vec<u32>), Vec<f32>)| {
                        let tokens = text.len() as u32;
                        Answer::Vector { index: row as u32, tokens, values: values.into() }
                    };
                    Ok(texts.zip(vectors.by_ref()).map(vector).collect())
                };
                taken.iter().map(answers).collect()
            }
            // A classifier's answer is one tensor over all lines.
            Self::Classifier(classifier) => {
                let classify = |(question, _): &(Open, Range<usize>)| {
                    let lines: Vec<&str> = question.given.work.lines().iter().map(String::as_str).collect();
                    classified(classifier.predict(&lines)).map(Vec::from_iter)
                };
                taken.iter().map(classify).collect()
            }
            Self::Identity => {
                let give_back = |(question, _): &(Open, Range<usize>)| match &question.given.work {
                    Work::Tensors(outputs) => Ok(vec![Answer::Tensors { outputs: outputs.clone() }]),
                    Work::Texts(_) | Work::Lines(_) | Work::Nothing => Ok(Vec::new()),
                };
                taken.iter().map(give_back).collect()
            }
        }
    }
}

impl Work {
    /// Of which a piece may have some.
    fn rows(&self) -> usize {
        match self {
            Self::Texts(texts) => texts.len().max(1),
            Self::Lines(_) | Self::Tensors(_) | Self::Nothing => 1,
        }
    }

    fn texts_of(&self, rows: &Range<usize>) -> &[Vec<u32>] {
        let Self::Texts(texts) = self else { return &[] };
        texts.get(rows.clone()).unwrap_or_default()
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
        frames: &mut Voice,
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
