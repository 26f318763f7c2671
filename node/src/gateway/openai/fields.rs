//! The bodies of OpenAI's requests: which fields there are, what they may be, and the question that they make. Pure.
//!
//! A field that would change the answer and is not done here is an error that names it, unless its value asks for nothing. Other fields that are
//! not known are ignored, as vLLM does: clients send many that mean nothing here. One that is nearly the name of a field is a mistake, and is told of.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde::de::{DeserializeOwned, IgnoredAny};
use stoke_protocol::list::List;
use stoke_protocol::message::serve::{Generate, Message, Prompt, Sampling};
use stoke_protocol::spec::plain_json;

use super::value::{Asked, Content, OneOrMany, Prompts, TEXTS_MAX};
use crate::gateway::error::{Kind, Problem};

/// As OpenAI has it.
const STOPS_MAX: usize = 4;
const STOP_BYTES_MAX: usize = 1024;
/// Answers to one request: each is a question of its own to the gang.
const CHOICES_MAX: usize = 16;
const MESSAGES_MAX: usize = 4096;
/// As OpenAI has them. A model's template would write any other into the prompt, and the model would answer somehow.
const ROLES: [&str; 6] = ["system", "developer", "user", "assistant", "tool", "function"];
/// Fields of a request for text that change its answer.
const FIELDS: [&str; 16] = [
    "model",
    "messages",
    "prompt",
    "stream",
    "stream_options",
    "max_tokens",
    "max_completion_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "seed",
    "stop",
    "n",
    "response_format",
];
/// What other servers call them.
const OTHERS: [(&str, &str); 3] =
    [("max_new_tokens", "max_tokens"), ("num_predict", "max_tokens"), ("repeat_penalty", "repetition_penalty")];
/// What OpenAI takes where a completion (not a chat) says nothing.
const COMPLETION_TOKENS: u32 = 16;

/// A request for text, checked.
#[derive(Debug, PartialEq)]
pub(in crate::gateway) struct TextRequest {
    pub(in crate::gateway) model: String,
    /// One for each choice.
    pub(in crate::gateway) questions: Vec<Generate>,
    /// Questions that share a prompt, which is counted once.
    pub(in crate::gateway) choices_a_prompt: usize,
    pub(in crate::gateway) stream: bool,
    pub(in crate::gateway) include_usage: bool,
}

/// A request for vectors, checked.
#[derive(Debug, PartialEq)]
pub(in crate::gateway) struct EmbeddingRequest {
    pub(in crate::gateway) model: String,
    pub(in crate::gateway) texts: Vec<String>,
    pub(in crate::gateway) base64: bool,
}

/// The body of a chat or a completion. Both have the same fields but for what is asked.
#[derive(Deserialize)]
struct TextFields {
    model: String,
    messages: Option<Vec<ChatMessage>>,
    prompt: Option<Prompts>,
    #[serde(default)]
    stream: Option<bool>,
    stream_options: Option<StreamOptions>,
    max_tokens: Option<u64>,
    max_completion_tokens: Option<u64>,
    temperature: Option<f64>,
    top_p: Option<f64>,
    top_k: Option<i64>,
    min_p: Option<f64>,
    repetition_penalty: Option<f64>,
    seed: Option<serde_json::Number>,
    stop: Option<OneOrMany>,
    n: Option<u64>,
    // From here on: what is not done.
    #[serde(default)]
    tools: Asked,
    #[serde(default)]
    tool_choice: Asked,
    #[serde(default)]
    functions: Asked,
    #[serde(default)]
    function_call: Asked,
    #[serde(default)]
    logprobs: Asked,
    #[serde(default)]
    top_logprobs: Asked,
    #[serde(default)]
    prompt_logprobs: Asked,
    #[serde(default)]
    response_format: Asked,
    #[serde(default)]
    modalities: Asked,
    #[serde(default)]
    audio: Asked,
    #[serde(default)]
    prediction: Asked,
    #[serde(default)]
    web_search_options: Asked,
    #[serde(default)]
    frequency_penalty: Asked,
    #[serde(default)]
    presence_penalty: Asked,
    #[serde(default)]
    logit_bias: Asked,
    #[serde(default)]
    best_of: Asked,
    #[serde(default)]
    use_beam_search: Asked,
    #[serde(default)]
    echo: Asked,
    #[serde(default)]
    suffix: Asked,
    #[serde(default)]
    ignore_eos: Asked,
    #[serde(default)]
    min_tokens: Asked,
    #[serde(default)]
    stop_token_ids: Asked,
    #[serde(default)]
    bad_words: Asked,
    #[serde(default)]
    guided_json: Asked,
    #[serde(default)]
    guided_regex: Asked,
    #[serde(default)]
    guided_choice: Asked,
    #[serde(default)]
    guided_grammar: Asked,
    #[serde(default)]
    structured_outputs: Asked,
    #[serde(default)]
    allowed_token_ids: Asked,
    #[serde(default)]
    truncate_prompt_tokens: Asked,
    #[serde(default)]
    include_stop_str_in_output: Asked,
    #[serde(default)]
    chat_template: Asked,
    #[serde(default)]
    chat_template_kwargs: Asked,
    #[serde(default)]
    documents: Asked,
    #[serde(default)]
    continue_final_message: Asked,
    #[serde(default)]
    reasoning_effort: Asked,
}

#[derive(Deserialize)]
struct StreamOptions {
    #[serde(default)]
    include_usage: Option<bool>,
}

#[derive(Deserialize)]
struct ChatMessage {
    role: String,
    #[serde(default)]
    content: Option<Content>,
    #[serde(default)]
    tool_calls: Asked,
    #[serde(default)]
    function_call: Asked,
}

#[derive(Deserialize)]
struct EmbeddingFields {
    model: String,
    input: Prompts,
    encoding_format: Option<String>,
    #[serde(default)]
    dimensions: Asked,
}

/// The question of a chat. `seed`: where the request has none.
pub(in crate::gateway) fn chat_question(body: &[u8], seed: u64) -> Result<TextRequest, Problem> {
    let mut fields: TextFields = parse(body)?;
    check_names(body)?;
    fields.refuse_undone()?;
    if !fields.logprobs.is_nothing() {
        return Err(undone("logprobs"));
    }
    let messages = fields.messages.take().ok_or_else(|| missing("messages"))?;
    if messages.is_empty() || messages.len() > MESSAGES_MAX {
        return Err(Problem::field("messages", format!("messages: send 1 to {MESSAGES_MAX} of them")));
    }
    let messages: Result<Vec<Message>, Problem> =
        messages.into_iter().enumerate().map(|(index, message)| message.checked(index)).collect();
    let tokens_max = match (fields.max_completion_tokens, fields.max_tokens) {
        (Some(most), _) => Some(tokens("max_completion_tokens", most)?),
        (None, Some(most)) => Some(tokens("max_tokens", most)?),
        (None, None) => None,
    };
    fields.request(vec![Prompt::Chat(messages?.into())], tokens_max, seed)
}

/// The question of a completion. `seed`: where the request has none.
pub(in crate::gateway) fn completion_question(body: &[u8], seed: u64) -> Result<TextRequest, Problem> {
    let mut fields: TextFields = parse(body)?;
    check_names(body)?;
    fields.refuse_undone()?;
    if !matches!(fields.logprobs, Asked::Nothing) {
        // 0 asks for those of the tokens that were chosen.
        return Err(undone("logprobs"));
    }
    let prompts = match fields.prompt.take().ok_or_else(|| missing("prompt"))? {
        Prompts::Texts(texts) => texts.into_iter().map(Prompt::Text).collect(),
        Prompts::Tokens(lists) => lists.into_iter().map(|tokens| Prompt::Tokens(tokens.into())).collect(),
    };
    let tokens_max = fields.max_tokens.map(|most| tokens("max_tokens", most)).transpose()?;
    fields.request(prompts, Some(tokens_max.unwrap_or(COMPLETION_TOKENS)), seed)
}

/// The texts of a request for vectors.
pub(in crate::gateway) fn embedding_texts(body: &[u8]) -> Result<EmbeddingRequest, Problem> {
    let fields: EmbeddingFields = parse(body)?;
    if !fields.dimensions.is_nothing() {
        return Err(undone("dimensions"));
    }
    let Prompts::Texts(texts) = fields.input else {
        return Err(Problem::field("input", "input: lists of tokens are not supported, send texts"));
    };
    if texts.is_empty() || texts.len() > TEXTS_MAX {
        return Err(Problem::field("input", format!("input: send 1 to {TEXTS_MAX} texts")));
    }
    if let Some(at) = texts.iter().position(String::is_empty) {
        return Err(Problem::field("input", format!("input: text {at} is empty (counted from 0): leave it out")));
    }
    let base64 = match fields.encoding_format.as_deref() {
        None | Some("float") => false,
        Some("base64") => true,
        Some(_) => return Err(Problem::field("encoding_format", "encoding_format: use \"float\" or \"base64\"")),
    };
    Ok(EmbeddingRequest { model: fields.model, texts, base64 })
}

impl TextFields {
    fn refuse_undone(&self) -> Result<(), Problem> {
        let fields = [
            ("tools", &self.tools),
            ("functions", &self.functions),
            ("top_logprobs", &self.top_logprobs),
            ("prompt_logprobs", &self.prompt_logprobs),
            ("audio", &self.audio),
            ("prediction", &self.prediction),
            ("web_search_options", &self.web_search_options),
            ("frequency_penalty", &self.frequency_penalty),
            ("presence_penalty", &self.presence_penalty),
            ("logit_bias", &self.logit_bias),
            ("use_beam_search", &self.use_beam_search),
            ("echo", &self.echo),
            ("suffix", &self.suffix),
            ("ignore_eos", &self.ignore_eos),
            ("min_tokens", &self.min_tokens),
            ("stop_token_ids", &self.stop_token_ids),
            ("bad_words", &self.bad_words),
            ("guided_json", &self.guided_json),
            ("guided_regex", &self.guided_regex),
            ("guided_choice", &self.guided_choice),
            ("guided_grammar", &self.guided_grammar),
            ("structured_outputs", &self.structured_outputs),
            ("allowed_token_ids", &self.allowed_token_ids),
            ("truncate_prompt_tokens", &self.truncate_prompt_tokens),
            ("include_stop_str_in_output", &self.include_stop_str_in_output),
            ("chat_template", &self.chat_template),
            ("chat_template_kwargs", &self.chat_template_kwargs),
            ("documents", &self.documents),
            ("continue_final_message", &self.continue_final_message),
            ("reasoning_effort", &self.reasoning_effort),
        ];
        if let Some((name, _)) = fields.iter().find(|(_, asked)| !asked.is_nothing()) {
            return Err(undone(name));
        }
        let harmless = [
            ("tool_choice", &self.tool_choice, "none"),
            ("function_call", &self.function_call, "none"),
            ("response_format", &self.response_format, "text"),
            ("modalities", &self.modalities, "text"),
            ("best_of", &self.best_of, "1"),
        ];
        match harmless.iter().find(|(_, asked, value)| !asked.is_nothing() && !asked.is(value)) {
            // Without tools nothing is there to choose.
            Some(("tool_choice", asked, _)) if asked.is("auto") => Ok(()),
            Some((name, _, value)) => {
                Err(Problem::field(*name, format!("{name}: only {value:?} is supported, leave it out")))
            }
            None => Ok(()),
        }
    }

    fn request(self, prompts: Vec<Prompt>, tokens_max: Option<u32>, seed: u64) -> Result<TextRequest, Problem> {
        let choices = self.n.unwrap_or(1);
        let most = CHOICES_MAX / prompts.len().max(1);
        if prompts.is_empty() || most == 0 {
            return Err(Problem::field("prompt", format!("prompt: send 1 to {CHOICES_MAX} prompts")));
        }
        if choices == 0 || choices > most as u64 {
            let message = format!("n is {choices}: use 1 to {most} (a request has {CHOICES_MAX} answers at most)");
            return Err(Problem::field("n", message));
        }
        let stop = self.stops()?;
        let sampling = self.sampling(seed)?;
        let mut questions = Vec::with_capacity(prompts.len() * choices as usize);
        for prompt in prompts {
            for choice in 0..choices {
                let sampling = Sampling { seed: sampling.seed.wrapping_add(choice), ..sampling };
                let (prompt, stop, answered) = (prompt.clone(), stop.clone(), Default::default());
                questions.push(Generate { prompt, sampling, tokens_max, stop, answered });
            }
        }
        let stream = self.stream.unwrap_or(false);
        let include_usage = self.stream_options.and_then(|options| options.include_usage).unwrap_or(false);
        Ok(TextRequest { model: self.model, questions, choices_a_prompt: choices as usize, stream, include_usage })
    }

    fn stops(&self) -> Result<List<String>, Problem> {
        let stops = match &self.stop {
            None => Vec::new(),
            Some(OneOrMany(stops)) => stops.clone(),
        };
        let is_good = |stop: &String| !stop.is_empty() && stop.len() <= STOP_BYTES_MAX;
        if stops.len() > STOPS_MAX || !stops.iter().all(is_good) {
            let message = format!("stop: send up to {STOPS_MAX} texts of 1 to {STOP_BYTES_MAX} bytes");
            return Err(Problem::field("stop", message));
        }
        Ok(stops.into())
    }

    fn sampling(&self, seed: u64) -> Result<Sampling, Problem> {
        let top_k = match self.top_k.unwrap_or(0) {
            // vLLM's word for all of them.
            -1 => 0,
            top_k => u32::try_from(top_k)
                .map_err(|_| Problem::field("top_k", format!("top_k is {top_k}: use 0 (all of them) or more")))?,
        };
        let seed = match &self.seed {
            None => seed,
            Some(given) => given
                .as_u64()
                .or_else(|| given.as_i64().map(|given| given as u64))
                .ok_or_else(|| Problem::field("seed", format!("seed is {given}: use an integer of 64 bits")))?,
        };
        Ok(Sampling {
            temperature: within("temperature", self.temperature, 1.0, (0.0, 2.0))?,
            top_k,
            top_p: within("top_p", self.top_p, 1.0, (f64::from(f32::MIN_POSITIVE), 1.0))?,
            min_p: within("min_p", self.min_p, 0.0, (0.0, 1.0))?,
            repetition_penalty: within("repetition_penalty", self.repetition_penalty, 1.0, (0.01, 100.0))?,
            seed,
        })
    }
}

impl ChatMessage {
    fn checked(self, index: usize) -> Result<Message, Problem> {
        let param = |field: &str| format!("messages[{index}].{field}");
        if !ROLES.contains(&self.role.as_str()) {
            let role: String = self.role.chars().take(64).collect();
            let message = format!("{}: {role:?} is none; use {}", param("role"), ROLES.join(", "));
            return Err(Problem::field(param("role"), message));
        }
        for (name, asked) in [("tool_calls", &self.tool_calls), ("function_call", &self.function_call)] {
            if !asked.is_nothing() {
                return Err(undone(&param(name)));
            }
        }
        let Some(Content(content)) = self.content else {
            return Err(Problem::field(param("content"), "a message has a content: a text, or a list of text parts"));
        };
        Ok(Message { role: self.role, content })
    }
}

/// Reads JSON of a client's; the error names the field.
pub(in crate::gateway) fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, Problem> {
    if body.trim_ascii_start().first().is_some_and(|byte| *byte != b'{') {
        return Err(Problem::new(Kind::Invalid, "the body is no JSON object: {\"model\": ...}"));
    }
    let mut json = serde_json::Deserializer::from_slice(body);
    let parsed = serde_path_to_error::deserialize(&mut json).map_err(|error| {
        let path = error.path().to_string();
        let inner = error.into_inner();
        match inner.classify() {
            serde_json::error::Category::Data if path != "." => Problem {
                param: Some(path.clone()),
                ..Problem::new(Kind::Invalid, format!("{path}: {}", plain_json(&inner.to_string())))
            },
            serde_json::error::Category::Data => Problem::new(Kind::Invalid, plain_json(&inner.to_string())),
            _ => Problem::new(Kind::Invalid, format!("the body is not JSON: {inner}")),
        }
    })?;
    json.end().map_err(|error| Problem::new(Kind::Invalid, format!("the body is not JSON: {error}")))?;
    Ok(parsed)
}

/// Refuses names that somebody has mistyped, or knows from another server: the answer would not be what was asked for.
fn check_names(body: &[u8]) -> Result<(), Problem> {
    let names: BTreeMap<String, IgnoredAny> = parse(body)?;
    for name in names.keys().filter(|name| !FIELDS.contains(&name.as_str())) {
        let other = OTHERS.iter().find(|(other, _)| other == name).map(|(_, meant)| *meant);
        if let Some(meant) = other.or_else(|| FIELDS.into_iter().find(|field| is_nearly(name, field))) {
            return Err(Problem::field(name.clone(), format!("{name} is not known: use {meant}")));
        }
    }
    Ok(())
}

/// Whether two names differ in one character, or in how their words are joined (`maxTokens`).
fn is_nearly(name: &str, field: &str) -> bool {
    let joined = |name: &str| name.chars().filter(char::is_ascii_alphanumeric).collect::<String>().to_ascii_lowercase();
    if name.len() > field.len() + 4 {
        return false;
    }
    let (name, field) = (joined(name), joined(field));
    let (a, b) = (name.as_bytes(), field.as_bytes());
    let same = a.iter().zip(b).take_while(|(a, b)| a == b).count();
    let (a, b) = (&a[same..], &b[same..]);
    let (after_a, after_b) = (a.get(1..).unwrap_or_default(), b.get(1..).unwrap_or_default());
    // Short names that differ in one character are names of other things.
    let is_long = field.len() >= 6;
    name == field || is_long && (after_a == after_b || a == after_b || after_a == b)
}

fn undone(name: &str) -> Problem {
    Problem::field(name, format!("{name} is not supported: leave it out"))
}

fn missing(name: &str) -> Problem {
    Problem::field(name, format!("{name} is missing"))
}

fn tokens(name: &str, most: u64) -> Result<u32, Problem> {
    match u32::try_from(most) {
        Ok(most @ 1..) => Ok(most),
        Ok(0) | Err(_) => Err(Problem::field(name, format!("{name} is {most}: use 1 to {}", u32::MAX))),
    }
}

fn within(name: &str, value: Option<f64>, default: f64, (least, most): (f64, f64)) -> Result<f32, Problem> {
    let value = value.unwrap_or(default);
    match (least..=most).contains(&value) {
        true => Ok((value as f32).max(least as f32)),
        false if least == f64::from(f32::MIN_POSITIVE) => {
            Err(Problem::field(name, format!("{name} is {value}: use a number above 0 and at most {most}")))
        }
        false => Err(Problem::field(name, format!("{name} is {value}: use {least} to {most}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_are_nearly_right_are_told_of() {
        for (name, field) in [
            ("max_token", "max_tokens"),
            ("maxTokens", "max_tokens"),
            ("temprature", "temperature"),
            ("top-p", "top_p"),
            ("max_new_tokens", "max_tokens"),
        ] {
            let problem = check_names(format!("{{\"model\": \"m\", \"{name}\": 1}}").as_bytes()).unwrap_err();
            assert_eq!(problem.message, format!("{name} is not known: use {field}"));
        }
        for name in ["user", "store", "top_a", "metadata", "models", "parallel_tool_calls", "max_tokens", "stop", "x"] {
            assert_eq!(
                check_names(format!("{{\"{name}\": {{}}}}").as_bytes()).map_err(|problem| problem.message),
                Ok(())
            );
        }
    }
}
