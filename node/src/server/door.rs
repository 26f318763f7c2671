//! Where gateways ask: connections of nodes, one stream a question. Owns text on its way to tokens and back, deadlines, and how many questions are
//! held; computes nothing of the model.
//!
//! B5: at most `running + waiting` questions are held, and those over it are refused before their text is looked at. B6: a question whose stream is
//! gone is taken back at once.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::Sender;
use std::time::Duration;

use stoke_jobs::lm::engine::{Answer as Text, Piece, Why};
use stoke_jobs::lm::prompt::chat;
use stoke_jobs::lm::{Message, Sampling};
use stoke_protocol::message::serve::{Answer, Ask, Finish, Generate, Prompt, Question, Refusal};
use stoke_protocol::spec::Serve;
use stoke_protocol::transport::{Connection, FrameSender, Request, TransportError};
use tokio::sync::Semaphore;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::time::{Instant, timeout, timeout_at};

use super::Event;
use super::model::{Model, Words};
use crate::exchange::Mesh;
use crate::worker::text_of;

/// A question comes whole within this.
const QUESTION_MAX: Duration = Duration::from_secs(10);
/// Texts that end an answer, and bytes of each.
const STOPS_MAX: usize = 16;
const STOP_BYTES_MAX: usize = 1024;
/// What who is refused is told to wait.
const RETRY_AFTER_MS: u32 = 1_000;
/// A deadline that nobody set.
const FOR_EVER: Duration = Duration::from_secs(30 * 24 * 3600);

/// A question in tokens.
pub struct Asked {
    /// This rank's own number of it.
    pub number: u64,
    pub prompt: Vec<u32>,
    pub answered: Vec<u32>,
    /// Of the whole answer.
    pub tokens_max: usize,
    pub sampling: Sampling,
    pub reply: UnboundedSender<Said>,
}

/// What the compute thread says of one.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Said {
    /// The token at this index of the answer, and whether it is the last.
    Token {
        index: u64,
        token: u32,
        over: bool,
    },
    Refused(Refusal),
}

/// Open until the rank's mesh is closed.
pub struct Door {
    shared: Arc<Shared>,
}

struct Shared {
    words: Words,
    context: usize,
    vocabulary: usize,
    inbox: Sender<Event>,
    places: Arc<Semaphore>,
    numbers: AtomicU64,
}

impl Door {
    pub fn open(mesh: &Mesh, words: Words, inbox: Sender<Event>, serve: &Serve, model: &Model) -> Self {
        let places = Arc::new(Semaphore::new((serve.running + serve.waiting) as usize));
        let (context, vocabulary) = (model.context, model.config.vocab);
        let shared = Arc::new(Shared { words, context, vocabulary, inbox, places, numbers: AtomicU64::new(1) });
        let (mut entered, visited) = (mesh.open_door(), shared.clone());
        mesh.io().spawn(async move {
            while let Some(connection) = entered.recv().await {
                tokio::spawn(visited.clone().receive(connection));
            }
        });
        Self { shared }
    }

    /// Tokens that end every answer.
    pub fn ends(&self) -> &[u32] {
        self.shared.words.tokenizer.end_of_sequence()
    }
}

impl Shared {
    async fn receive(self: Arc<Self>, connection: Connection) {
        while let Ok(request) = connection.accept_request().await {
            tokio::spawn(self.clone().answer(request));
        }
    }

    async fn answer(self: Arc<Self>, request: Request) {
        let Ok(Ok((question, reply))) = timeout(QUESTION_MAX, request.read::<Question>()).await else { return };
        let mut frames = reply.into_frames();
        let last = match self.places.clone().try_acquire_owned() {
            Ok(_place) => self.take(question, &mut frames).await,
            Err(_) => Ok(Answer::Refused(Refusal::Busy { retry_after_ms: RETRY_AFTER_MS })),
        };
        // Whoever is gone needs no last word.
        let Ok(last) = last else { return };
        if frames.send(&last).await.is_ok() {
            let _ = frames.finish();
        }
    }

    /// The last frame of the answer. An error: nobody listens any more.
    async fn take(self: Arc<Self>, question: Question, frames: &mut FrameSender) -> Result<Answer, TransportError> {
        let Question { deadline_ms, ask, .. } = question;
        let deadline = match deadline_ms {
            0 => FOR_EVER,
            ms => Duration::from_millis(ms.into()),
        };
        let deadline = Instant::now() + deadline;
        let generate = match ask {
            Ask::Generate(generate) => generate,
            Ask::Probe => probe(),
            Ask::Embed { .. } | Ask::Infer { .. } | Ask::Describe => {
                let problem =
                    "this model answers chats and continues texts, and gives no vectors or tensors".to_owned();
                return Ok(Answer::Refused(Refusal::Invalid { problem }));
            }
        };
        let shared = self.clone();
        let read = tokio::task::spawn_blocking(move || shared.read(generate));
        let (asked, text, told) = match read.await {
            Ok(Ok(read)) => read,
            Ok(Err(refusal)) => return Ok(Answer::Refused(refusal)),
            Err(error) => {
                return Ok(Answer::Refused(Refusal::Invalid { problem: format!("the text cannot be read: {error}") }));
            }
        };
        frames.send(&Answer::Begun { prompt_tokens: asked.prompt.len() as u32 }).await?;
        let number = asked.number;
        let mut open = Open { text, told, deadline };
        if let Some(why) = open.text.over() {
            // Only its last frame was lost.
            let (why, text) = open.end(why);
            return Ok(Answer::Ended { why, text });
        }
        let _ = self.inbox.send(Event::Asked(Box::new(asked)));
        // B6: also when this is dropped in the middle.
        let _taken_back = TakenBack { number, inbox: self.inbox.clone() };
        open.speak(frames).await
    }

    /// Text to tokens, and what is wrong with a question. May take milliseconds.
    fn read(&self, generate: Generate) -> Result<(Asked, Text, UnboundedReceiver<Said>), Refusal> {
        let invalid = |problem: String| Refusal::Invalid { problem };
        let Generate { prompt, sampling, tokens_max, stop, answered } = generate;
        let Words { tokenizer, template } = &self.words;
        let prompt = match prompt {
            Prompt::Chat(messages) => {
                let template = template.as_ref().ok_or_else(|| {
                    invalid("this model has no chat template: send a text to /v1/completions instead".into())
                })?;
                let messages: Vec<Message> = messages
                    .0
                    .into_iter()
                    .map(|message| Message { role: message.role, content: message.content })
                    .collect();
                chat(template, tokenizer, &messages).map_err(|error| invalid(text_of(&error)))?
            }
            Prompt::Text(text) => tokenizer.encode_framed(&text).map_err(|error| invalid(text_of(&error)))?,
            Prompt::Tokens(tokens) => tokens.0,
        };
        if prompt.is_empty() {
            return Err(invalid("the prompt is empty: write at least one character".into()));
        }
        if let Some(token) = prompt.iter().chain(&*answered).find(|token| **token as usize >= self.vocabulary) {
            return Err(invalid(format!("token {token}: the model knows tokens below {}", self.vocabulary)));
        }
        let room = self.context.saturating_sub(prompt.len());
        let tokens_max = tokens_max.map_or(room, |most| most as usize);
        if tokens_max == 0 && room > 0 {
            return Err(invalid("an answer of no tokens: ask for at least 1".into()));
        }
        if tokens_max > room || room == 0 {
            let tokens = (prompt.len() + tokens_max.max(1)) as u32;
            return Err(Refusal::TooLong { tokens, context: self.context as u32 });
        }
        if answered.len() > tokens_max {
            return Err(invalid(format!("{} tokens are answered of at most {tokens_max}", answered.len())));
        }
        if stop.len() > STOPS_MAX || stop.iter().any(|text| text.is_empty() || text.len() > STOP_BYTES_MAX) {
            return Err(invalid(format!("stop: use up to {STOPS_MAX} texts of 1 to {STOP_BYTES_MAX} bytes")));
        }
        let sampling = Sampling {
            temperature: sampling.temperature,
            top_k: sampling.top_k as usize,
            top_p: sampling.top_p,
            min_p: sampling.min_p,
            repetition_penalty: sampling.repetition_penalty,
            seed: sampling.seed,
        };
        sampling.check().map_err(invalid)?;
        let mut text = Text::new(tokenizer, stop.0, tokens_max);
        for token in answered.iter() {
            let _delivered = text.push(*token);
        }
        let (reply, told) = unbounded_channel();
        let number = self.numbers.fetch_add(1, Ordering::Relaxed);
        Ok((Asked { number, prompt, answered: answered.0, tokens_max, sampling, reply }, text, told))
    }
}

/// An answer that is being made.
struct Open {
    text: Text,
    told: UnboundedReceiver<Said>,
    deadline: Instant,
}

impl Open {
    fn end(&mut self, why: Why) -> (Finish, String) {
        let finish = match why {
            Why::End | Why::Stop => Finish::Stop,
            Why::Length => Finish::Length,
        };
        (finish, self.text.finish())
    }

    /// Sends tokens as they come; gives the last frame.
    async fn speak(&mut self, frames: &mut FrameSender) -> Result<Answer, TransportError> {
        loop {
            let said = tokio::select! {
                biased;
                said = timeout_at(self.deadline, self.told.recv()) => said,
                () = frames.stopped() => return Err(TransportError::Ended),
            };
            let (mut first, mut tokens, mut text) = (None, Vec::new(), String::new());
            let mut next = match said {
                Err(_) => return Ok(Answer::Refused(Refusal::Late)),
                // The rank ends: another one goes on.
                Ok(None) => return Ok(Answer::Refused(Refusal::Moved)),
                Ok(Some(said)) => Some(said),
            };
            // What has come meanwhile goes together.
            let mut ended = None;
            while let (Some(said), None) = (next, &ended) {
                match said {
                    Said::Refused(refusal) => return Ok(Answer::Refused(refusal)),
                    Said::Token { index, token, over } => {
                        first.get_or_insert(index);
                        tokens.push(token);
                        let Piece { text: piece, over: why } = self.text.push(token);
                        text.push_str(&piece);
                        ended = match why {
                            Some(why) => Some(self.end(why)),
                            // The engine ends what the text does not.
                            None if over => Some(self.end(Why::Length)),
                            None => None,
                        };
                    }
                }
                next = self.told.try_recv().ok();
            }
            let index = first.unwrap_or(0) as u32;
            frames.send(&Answer::Tokens { index, tokens: tokens.into(), text }).await?;
            if let Some((why, text)) = ended {
                return Ok(Answer::Ended { why, text });
            }
        }
    }
}

/// B6.
struct TakenBack {
    number: u64,
    inbox: Sender<Event>,
}

impl Drop for TakenBack {
    fn drop(&mut self) {
        let _ = self.inbox.send(Event::Dropped(self.number));
    }
}

/// A token that goes through every rank.
fn probe() -> Generate {
    let sampling = stoke_protocol::message::serve::Sampling {
        temperature: 0.0,
        top_k: 0,
        top_p: 1.0,
        min_p: 0.0,
        repetition_penalty: 1.0,
        seed: 0,
    };
    let (stop, answered) = (Vec::new().into(), Vec::new().into());
    Generate { prompt: Prompt::Tokens(vec![0].into()), sampling, tokens_max: Some(1), stop, answered }
}
