//! An answer as it comes: server-sent events. What is not read by the client is not read from the head either, and waits in the window of its
//! QUIC stream; when the client goes, the body is dropped, and with it the questions (G4).

use std::collections::VecDeque;
use std::convert::Infallible;
use std::pin::Pin;

use bytes::Bytes;
use futures_util::stream::{self, Stream, StreamExt, unfold};
use http_body_util::{BodyExt, StreamBody};
use hyper::Response;
use hyper::body::Frame;
use serde::Serialize;

use super::generate::{ASKED_MAX, Form, Header, Usage, misplaced, reason};
use super::{Failure, event_stream};
use crate::gateway::asking::Asking;
use crate::gateway::error::Problem;
use crate::gateway::received::Event;
use crate::gateway::service::Body;

const DONE: &[u8] = b"data: [DONE]\n\n";

/// What has come of a choice, and how many tokens it has now.
type Come = (usize, Result<Event, Problem>, usize);
type Choices = Pin<Box<dyn Stream<Item = Come> + Send>>;

/// An answer that is being written.
struct Writing {
    header: Header,
    choices: Choices,
    choices_a_prompt: usize,
    /// Choices that have not ended.
    open: usize,
    usage: Usage,
    include_usage: bool,
    /// What came before the head of the response was sent.
    first: Option<Come>,
    ready: VecDeque<Bytes>,
}

#[derive(Serialize)]
struct Chunk<'a> {
    id: &'a str,
    object: &'static str,
    created: u64,
    model: &'a str,
    choices: &'a [ChunkChoice<'a>],
    /// There in every chunk if it was asked for, and null in all but the last.
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<Option<Usage>>,
}

#[derive(Serialize)]
struct ChunkChoice<'a> {
    index: usize,
    #[serde(flatten)]
    content: Content<'a>,
    logprobs: Option<()>,
    finish_reason: Option<&'static str>,
}

#[derive(Serialize)]
#[serde(untagged)]
enum Content<'a> {
    Chat { delta: Delta<'a> },
    Completion { text: &'a str },
}

#[derive(Default, Serialize)]
struct Delta<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    role: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    content: Option<&'a str>,
}

/// Returns when the first part is there.
pub(super) async fn stream(
    header: Header,
    askings: Vec<Asking>,
    choices_a_prompt: usize,
    include_usage: bool,
) -> Result<Response<Body>, Problem> {
    let open = askings.len();
    let events = stream::iter(askings).enumerate().map(|(index, asking)| events(index, asking));
    let mut choices: Choices = Box::pin(events.flatten_unordered(ASKED_MAX));
    let first = match choices.next().await {
        Some((_, Err(problem), _)) => return Err(problem),
        first => first,
    };
    let (usage, ready) = (Usage::default(), VecDeque::new());
    let writing = Writing { header, choices, choices_a_prompt, open, usage, include_usage, first, ready };
    let parts = unfold(writing, |mut writing| async move {
        let bytes = writing.next().await?;
        Some((Ok::<_, Infallible>(Frame::data(bytes)), writing))
    });
    Ok(event_stream(BodyExt::boxed_unsync(StreamBody::new(parts))))
}

/// The events of one choice up to its end or its problem.
fn events(index: usize, asking: Asking) -> Choices {
    Box::pin(unfold(Some(asking), move |asking| async move {
        let mut asking = asking?;
        let event = asking.next().await;
        let tokens = asking.tokens();
        let is_over = matches!(event, Err(_) | Ok(Event::Ended { .. }));
        Some(((index, event, tokens), Some(asking).filter(|_| !is_over)))
    }))
}

impl Writing {
    /// The next bytes of the body. None at its end.
    async fn next(&mut self) -> Option<Bytes> {
        loop {
            if let Some(bytes) = self.ready.pop_front() {
                return Some(bytes);
            }
            let come = match self.first.take() {
                Some(first) => first,
                None if self.open == 0 => return None,
                None => self.choices.next().await?,
            };
            self.write(come);
        }
    }

    fn write(&mut self, (index, event, tokens): Come) {
        match event {
            Ok(Event::Begun { prompt_tokens }) => {
                let counted = if index.is_multiple_of(self.choices_a_prompt) { prompt_tokens } else { 0 };
                self.usage.add(counted, 0);
                if self.header.form == Form::Chat {
                    let delta = Delta { role: Some("assistant"), content: Some("") };
                    self.chunk(index, Content::Chat { delta }, None);
                }
            }
            Ok(Event::Text(text)) => self.text(index, &text),
            Ok(Event::Ended { why, text }) => {
                self.text(index, &text);
                self.usage.add(0, tokens);
                let nothing = match self.header.form {
                    Form::Chat => Content::Chat { delta: Delta::default() },
                    Form::Completion => Content::Completion { text: "" },
                };
                self.chunk(index, nothing, Some(reason(why)));
                self.open -= 1;
                if self.open == 0 {
                    self.end();
                }
            }
            Ok(other) => self.fail(&misplaced(&other)),
            Err(problem) => self.fail(&problem),
        }
    }

    fn text(&mut self, index: usize, text: &str) {
        // Bytes of a character that is not whole yet, or what may become a stop text.
        if text.is_empty() {
            return;
        }
        let content = match self.header.form {
            Form::Chat => Content::Chat { delta: Delta { role: None, content: Some(text) } },
            Form::Completion => Content::Completion { text },
        };
        self.chunk(index, content, None);
    }

    fn chunk(&mut self, index: usize, content: Content<'_>, finish_reason: Option<&'static str>) {
        let choice = ChunkChoice { index, content, logprobs: None, finish_reason };
        let chunk = self.part(&[choice], None);
        self.ready.push_back(chunk);
    }

    fn part(&self, choices: &[ChunkChoice<'_>], usage: Option<Usage>) -> Bytes {
        let Header { form, id, created, model } = &self.header;
        let object = match form {
            Form::Chat => "chat.completion.chunk",
            Form::Completion => form.object(),
        };
        let usage = self.include_usage.then_some(usage);
        written(&Chunk { id, object, created: *created, model, choices, usage })
    }

    fn end(&mut self) {
        if self.include_usage {
            let part = self.part(&[], Some(self.usage));
            self.ready.push_back(part);
        }
        self.ready.push_back(Bytes::from_static(DONE));
    }

    /// The status has been sent: the error is an event, and the last one. The other choices go with it.
    fn fail(&mut self, problem: &Problem) {
        tracing::info!(model = self.header.model, problem = problem.message, "a stream has failed");
        self.ready.push_back(written(&Failure::new(problem)));
        self.choices = Box::pin(stream::empty());
        self.open = 0;
    }
}

fn written<T: Serialize>(value: &T) -> Bytes {
    let mut bytes = b"data: ".to_vec();
    serde_json::to_writer(&mut bytes, value).expect("what we send has names for keys and no failing part");
    bytes.extend_from_slice(b"\n\n");
    bytes.into()
}
