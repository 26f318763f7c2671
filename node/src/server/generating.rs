//! Questions for text: prompts to tokens, and tokens back to text, as they are made. Owns what is wrong with a question, and where an answer ends;
//! computes nothing of the model.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::Sender;

use stoke_jobs::lm::engine::{Answer as Text, Piece, Why};
use stoke_jobs::lm::prompt::chat;
use stoke_jobs::lm::{Message, Sampling};
use stoke_protocol::message::serve::{self as wire, Answer, Finish, Generate, Prompt, Refusal};
use stoke_protocol::transport::TransportError;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::time::{Instant, timeout_at};

use super::Event;
use super::door::invalid;
use super::meter::Voice;
use super::model::{Model, Words};
use crate::worker::text_of;

/// Texts that end an answer, and bytes of each.
const STOPS_MAX: usize = 16;
const STOP_BYTES_MAX: usize = 1024;

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

/// Reads questions for the head of a gang.
pub struct Generating {
    words: Words,
    context: usize,
    vocabulary: usize,
    inbox: Sender<Event>,
    numbers: AtomicU64,
}

impl Generating {
    pub fn new(words: Words, model: &Model, inbox: Sender<Event>) -> Self {
        let (context, vocabulary) = (model.context, model.config.vocab);
        Self { words, context, vocabulary, inbox, numbers: AtomicU64::new(1) }
    }

    /// Sends an answer as it is made; gives its last frame. An error: nobody listens any more.
    pub async fn answer(
        self: Arc<Self>,
        generate: Generate,
        deadline: Instant,
        frames: &mut Voice,
    ) -> Result<Answer, TransportError> {
        let shared = self.clone();
        let read = tokio::task::spawn_blocking(move || shared.read(generate));
        let (asked, text, told) = match read.await {
            Ok(Ok(read)) => read,
            Ok(Err(refusal)) => return Ok(Answer::Refused(refusal)),
            Err(error) => return Ok(Answer::Refused(invalid(format!("the text cannot be read: {error}")))),
        };
        frames.send(&Answer::Begun { prompt_tokens: asked.prompt.len() as u32 }).await?;
        self.speak(asked, Open { text, told, deadline }, Some(frames)).await
    }

    /// A token that goes through every rank; only its end is told.
    pub async fn probe(self: Arc<Self>, deadline: Instant) -> Result<Answer, TransportError> {
        match self.read(probe()) {
            Ok((asked, text, told)) => self.speak(asked, Open { text, told, deadline }, None).await,
            Err(refusal) => Ok(Answer::Refused(refusal)),
        }
    }

    async fn speak(&self, asked: Asked, mut open: Open, frames: Option<&mut Voice>) -> Result<Answer, TransportError> {
        let number = asked.number;
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
            let tokens = u32::try_from(prompt.len() + tokens_max.max(1)).unwrap_or(u32::MAX);
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

    /// Sends tokens as they come, to whoever wants them; gives the last frame.
    async fn speak(&mut self, mut frames: Option<&mut Voice>) -> Result<Answer, TransportError> {
        loop {
            let stopped = async {
                match &mut frames {
                    Some(frames) => frames.stopped().await,
                    None => std::future::pending().await,
                }
            };
            let said = tokio::select! {
                biased;
                said = timeout_at(self.deadline, self.told.recv()) => said,
                () = stopped => return Err(TransportError::Ended),
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
            if let Some(frames) = &mut frames {
                frames.send(&Answer::Tokens { index, tokens: tokens.into(), text }).await?;
            }
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
    let sampling =
        wire::Sampling { temperature: 0.0, top_k: 0, top_p: 1.0, min_p: 0.0, repetition_penalty: 1.0, seed: 0 };
    let (stop, answered) = (Vec::new().into(), Vec::new().into());
    Generate { prompt: Prompt::Tokens(vec![0].into()), sampling, tokens_max: Some(1), stop, answered }
}
