//! `/v1/chat/completions` and `/v1/completions`: the answers to the questions of a request, whole or as they come.

use std::sync::Arc;
use std::time::{Instant, SystemTime};

use futures_util::{StreamExt, TryStreamExt, stream as streams};
use hyper::{Response, StatusCode};
use serde::Serialize;
use stoke_protocol::message::serve::{Ask, Finish, Generate};
use stoke_protocol::spec::Task;

use super::fields::TextRequest;
use super::stream;
use crate::gateway::asking::{Asking, Desk};
use crate::gateway::error::{Kind, Problem};
use crate::gateway::received::Event;
use crate::gateway::service::{Body, json};

/// Questions of a request that are asked at the same time; the others wait for their ends, so that many prompts in a request are not as many clients.
pub(super) const ASKED_MAX: usize = 32;

/// Which of the two endpoints.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(in crate::gateway) enum Form {
    Chat,
    Completion,
}

/// What every part of an answer says of the whole.
#[derive(Clone, Debug)]
pub(super) struct Header {
    pub(super) form: Form,
    pub(super) id: String,
    pub(super) created: u64,
    pub(super) model: String,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize)]
pub(super) struct Usage {
    pub(super) prompt_tokens: u64,
    pub(super) completion_tokens: u64,
    pub(super) total_tokens: u64,
}

/// One answer.
#[derive(Default)]
struct Choice {
    text: String,
    prompt_tokens: u32,
    tokens: usize,
    why: Option<Finish>,
}

#[derive(Serialize)]
struct Whole<'a> {
    id: &'a str,
    object: &'static str,
    created: u64,
    model: &'a str,
    choices: Vec<WholeChoice<'a>>,
    usage: Usage,
}

#[derive(Serialize)]
struct WholeChoice<'a> {
    index: usize,
    #[serde(flatten)]
    content: Content<'a>,
    logprobs: Option<()>,
    finish_reason: Option<&'static str>,
}

#[derive(Serialize)]
#[serde(untagged)]
enum Content<'a> {
    Chat { message: Message<'a> },
    Completion { text: &'a str },
}

#[derive(Serialize)]
struct Message<'a> {
    role: &'static str,
    content: &'a str,
    refusal: Option<()>,
}

impl Form {
    pub(super) fn object(self) -> &'static str {
        match self {
            Self::Chat => "chat.completion",
            Self::Completion => "text_completion",
        }
    }

    fn id(self) -> String {
        let number = rand::random::<u128>();
        match self {
            Self::Chat => format!("chatcmpl-{number:032x}"),
            Self::Completion => format!("cmpl-{number:032x}"),
        }
    }
}

/// As OpenAI names it.
pub(super) fn reason(why: Finish) -> &'static str {
    match why {
        Finish::Stop => "stop",
        Finish::Length => "length",
    }
}

/// Asks and answers. Where the answer is a stream, this returns when its first part is there, so that a refusal has its status.
pub(in crate::gateway) async fn generate(
    desk: &Arc<Desk>,
    form: Form,
    request: TextRequest,
    deadline: Option<Instant>,
) -> Result<Response<Body>, Problem> {
    let TextRequest { model, questions, choices_a_prompt, stream, include_usage } = request;
    let ask = |question: Generate| desk.ask(&model, &[Task::Generate], Ask::Generate(question), deadline);
    let askings: Vec<Asking> = questions.into_iter().map(ask).collect();
    let created = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
    let header = Header { form, id: form.id(), created, model };
    if stream {
        return stream::stream(header, askings, choices_a_prompt, include_usage).await;
    }
    let answers = streams::iter(askings).map(collect).buffered(ASKED_MAX);
    let choices: Vec<Choice> = answers.try_collect().await?;
    Ok(json(StatusCode::OK, &whole(&header, &choices, choices_a_prompt)))
}

async fn collect(mut asking: Asking) -> Result<Choice, Problem> {
    let mut choice = Choice::default();
    loop {
        match asking.next().await? {
            Event::Begun { prompt_tokens } => choice.prompt_tokens = prompt_tokens,
            Event::Text(text) => choice.text.push_str(&text),
            Event::Ended { why, text } => {
                choice.text.push_str(&text);
                choice.tokens = asking.tokens();
                choice.why = Some(why);
                return Ok(choice);
            }
            other => return Err(misplaced(&other)),
        }
    }
}

pub(super) fn misplaced(event: &Event) -> Problem {
    Problem::new(Kind::Broken, format!("a head answered a request for text with {event:?}"))
}

fn whole<'a>(header: &'a Header, choices: &'a [Choice], choices_a_prompt: usize) -> Whole<'a> {
    let mut usage = Usage::default();
    let one = |(index, choice): (usize, &'a Choice)| {
        let prompt_tokens = if index.is_multiple_of(choices_a_prompt) { choice.prompt_tokens } else { 0 };
        usage.add(prompt_tokens, choice.tokens);
        let content = match header.form {
            Form::Chat => {
                Content::Chat { message: Message { role: "assistant", content: &choice.text, refusal: None } }
            }
            Form::Completion => Content::Completion { text: &choice.text },
        };
        WholeChoice { index, content, logprobs: None, finish_reason: choice.why.map(reason) }
    };
    let choices = choices.iter().enumerate().map(one).collect();
    let Header { id, created, model, form } = header;
    Whole { id, object: form.object(), created: *created, model, choices, usage }
}

impl Usage {
    pub(super) fn add(&mut self, prompt_tokens: u32, tokens: usize) {
        self.prompt_tokens += u64::from(prompt_tokens);
        self.completion_tokens += tokens as u64;
        self.total_tokens = self.prompt_tokens + self.completion_tokens;
    }
}
