//! A model's chat template: messages to the one text that the model was trained on. Owns how templates are rendered (as transformers
//! does: Jinja with blocks trimmed, Python's methods of strings, a few functions) and the limit on their work. Never tokenises (`prompt.rs`).

use std::io::Write;
use std::path::{Path, PathBuf};

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Serde, Value};
use minijinja::{Environment, Error, ErrorKind, context};
use serde::{Deserialize, Serialize};
use time::OffsetDateTime;
use time::format_description::parse_strftime_owned;

use super::tokenizer::{read, read_json, token_id};
use super::{Gguf, ModelError, Weights};

/// What a rendering may cost: an instruction costs one, and so do 64 bytes that are made. A chat of a thousand turns takes some tens of
/// thousands; a template that loops or doubles a string without end is stopped before it has made 128 MB.
const FUEL: u64 = 2_000_000;
/// The longest template taken. Those with tools in them have 10 KB.
const TEMPLATE_BYTES_MAX: usize = 1 << 20;
const NAME: &str = "chat";

/// One turn of a chat.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// "system", "user" or "assistant"; a template may know others, and refuse those that it does not.
    pub role: String,
    pub content: String,
}

/// A model's chat template, parsed.
pub struct ChatTemplate {
    path: PathBuf,
    environment: Environment<'static>,
    beginning: String,
    end: String,
}

/// A template as it was found, with the texts that its `bos_token` and `eos_token` stand for.
struct Found {
    path: PathBuf,
    source: String,
    beginning: String,
    end: String,
}

impl ChatTemplate {
    /// Reads and parses the template that comes with `weights`.
    pub fn open(weights: &Weights) -> Result<Self, ModelError> {
        match weights.gguf() {
            Some(gguf) => Self::parse(in_gguf(gguf)?),
            None => Self::parse(in_folder(weights.path())?),
        }
    }

    /// The text of a chat, up to where the assistant's answer begins if `add_generation_prompt`. A template may refuse messages, for
    /// example two of one role in a row: the error gives its words.
    pub fn render(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String, ModelError> {
        let refused = |cause: Error| ModelError::Chat { problem: words(&cause) };
        let template = self.environment.get_template(NAME).map_err(refused)?;
        let messages = Value::from(Serde(messages));
        let (bos_token, eos_token) = (self.beginning.as_str(), self.end.as_str());
        let values = context! { messages, add_generation_prompt, bos_token, eos_token };
        template.render(values).map_err(refused)
    }

    /// Whether the template itself, or a text that it puts in, has this letter.
    pub(super) fn contains(&self, letter: char) -> bool {
        let source = self.environment.get_template(NAME).is_ok_and(|template| template.source().contains(letter));
        source || self.beginning.contains(letter) || self.end.contains(letter)
    }

    fn parse(found: Found) -> Result<Self, ModelError> {
        let path = found.path;
        let failed = |problem: String| ModelError::Template { path: path.clone(), problem };
        if found.source.len() > TEMPLATE_BYTES_MAX {
            return Err(failed(format!("has {} bytes, the limit is {TEMPLATE_BYTES_MAX}", found.source.len())));
        }
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.expect("the delimiters are the usual ones"));
        environment.set_fuel(Some(FUEL));
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", raise);
        environment.add_function("strftime_now", now);
        environment.add_filter("tojson", to_json);
        environment
            .add_template_owned(NAME, unmarked(found.source))
            .map_err(|cause| failed(format!("cannot be parsed: {cause}")))?;
        Ok(Self { path, environment, beginning: found.beginning, end: found.end })
    }
}

impl std::fmt::Debug for ChatTemplate {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(out, "ChatTemplate({})", self.path.display())
    }
}

fn in_gguf(gguf: &Gguf) -> Result<Found, ModelError> {
    const KEY: &str = "tokenizer.chat_template";
    let path = gguf.path().to_owned();
    let Some(source) = gguf.optional_string(KEY)? else { return Err(absent(path)) };
    let tokens = gguf.optional_strings("tokenizer.ggml.tokens")?.unwrap_or_default();
    let text = |key: &str| {
        let id = token_id(gguf, key, tokens.len())?;
        Ok::<_, ModelError>(id.map_or_else(String::new, |id| tokens[id as usize].to_owned()))
    };
    Ok(Found {
        path,
        source: source.to_owned(),
        beginning: text("tokenizer.ggml.bos_token_id")?,
        end: text("tokenizer.ggml.eos_token_id")?,
    })
}

/// `chat_template.jinja`, or the template in `tokenizer_config.json`: one text, or a list of named ones with a default.
fn in_folder(folder: &Path) -> Result<Found, ModelError> {
    let path = folder.join("tokenizer_config.json");
    let config = read_json(&path)?;
    let template = &config["chat_template"];
    let default = || template.as_array()?.iter().find(|one| one["name"] == "default")?["template"].as_str();
    let beside = read(&folder.join("chat_template.jinja"))?;
    let Some(source) = beside.or_else(|| template.as_str().or_else(default).map(str::to_owned)) else {
        return Err(absent(path));
    };
    // A token is a text, or an object with its content and how it is cut out.
    let text = |key: &str| config[key].as_str().or(config[key]["content"].as_str()).unwrap_or_default().to_owned();
    Ok(Found { path, source, beginning: text("bos_token"), end: text("eos_token") })
}

fn absent(path: PathBuf) -> ModelError {
    ModelError::Template {
        path,
        problem: "is not there: this is a base model, or its files are not complete".to_owned(),
    }
}

/// Templates mark the assistant's words for training with tags that only transformers knows; here they are conditions that hold.
fn unmarked(mut source: String) -> String {
    for (mark, plain) in [("generation", "if true"), ("endgeneration", "endif")] {
        for (open, close) in [("{% ", " %}"), ("{%- ", " %}"), ("{% ", " -%}"), ("{%- ", " -%}")] {
            source = source.replace(&format!("{open}{mark}{close}"), &format!("{open}{plain}{close}"));
        }
    }
    source
}

fn words(cause: &Error) -> String {
    match cause.detail() {
        Some(detail) if cause.kind() == ErrorKind::InvalidOperation => detail.to_owned(),
        Some(_) | None => cause.to_string(),
    }
}

fn raise(text: &str) -> Result<Value, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, text.to_owned()))
}

/// The time now (UTC) by Python's format, for templates that tell the model what day it is.
fn now(format: &str) -> Result<String, Error> {
    let failed =
        |problem: String| Error::new(ErrorKind::InvalidOperation, format!("strftime_now({format:?}): {problem}"));
    let parsed = parse_strftime_owned(format).map_err(|cause| failed(cause.to_string()))?;
    OffsetDateTime::now_utc().format(&parsed).map_err(|cause| failed(cause.to_string()))
}

/// JSON as Python's `json.dumps` writes it, which is what models saw in training. Not escaped for HTML, unlike minijinja's own.
fn to_json(value: &Value, options: Kwargs) -> Result<String, Error> {
    let indent: Option<usize> = options.get("indent")?;
    options.assert_all_used()?;
    let mut out = Vec::new();
    let written = match indent {
        Some(indent) => {
            let spaces = " ".repeat(indent.min(16));
            let pretty = serde_json::ser::PrettyFormatter::with_indent(spaces.as_bytes());
            value.serialize(&mut serde_json::Serializer::with_formatter(&mut out, pretty))
        }
        None => value.serialize(&mut serde_json::Serializer::with_formatter(&mut out, Spaced)),
    };
    written.map_err(|cause| Error::new(ErrorKind::BadSerialization, "tojson").with_source(cause))?;
    Ok(String::from_utf8(out).expect("serde_json writes UTF-8"))
}

/// JSON on one line with a space after every comma and colon.
struct Spaced;

impl serde_json::ser::Formatter for Spaced {
    fn begin_array_value<W: ?Sized + Write>(&mut self, out: &mut W, first: bool) -> std::io::Result<()> {
        if first { Ok(()) } else { out.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + Write>(&mut self, out: &mut W, first: bool) -> std::io::Result<()> {
        if first { Ok(()) } else { out.write_all(b", ") }
    }

    fn begin_object_value<W: ?Sized + Write>(&mut self, out: &mut W) -> std::io::Result<()> {
        out.write_all(b": ")
    }
}
