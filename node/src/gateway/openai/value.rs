//! Values that OpenAI's clients write in more than one way, read without keeping more than is needed. Pure.

use std::fmt;

use serde::Deserialize;
use serde::de::{Deserializer, Error, IgnoredAny, MapAccess, SeqAccess, Visitor};

/// Texts or prompts of one request, as OpenAI has it.
pub(super) const TEXTS_MAX: usize = 2048;

/// What a field that is not done here asks for. Its value is not kept.
#[derive(Default, Debug, PartialEq)]
pub(super) enum Asked {
    /// It is absent or null.
    #[default]
    Nothing,
    /// False, zero, or an empty list, object or text: what it is without.
    Default,
    /// A short text or a number, the one short text in a list, or the text `type` in an object.
    Word(String),
    Something,
}

impl Asked {
    pub(super) fn is_nothing(&self) -> bool {
        matches!(self, Self::Nothing | Self::Default)
    }

    /// Whether it asks for this and nothing else.
    pub(super) fn is(&self, word: &str) -> bool {
        matches!(self, Self::Word(found) if found == word)
    }
}

impl<'de> Deserialize<'de> for Asked {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(AskedVisitor)
    }
}

struct AskedVisitor;

impl<'de> Visitor<'de> for AskedVisitor {
    type Value = Asked;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("any value")
    }

    fn visit_unit<E: Error>(self) -> Result<Asked, E> {
        Ok(Asked::Nothing)
    }

    fn visit_bool<E: Error>(self, value: bool) -> Result<Asked, E> {
        Ok(if value { Asked::Something } else { Asked::Default })
    }

    fn visit_i64<E: Error>(self, _value: i64) -> Result<Asked, E> {
        Ok(Asked::Something)
    }

    fn visit_u64<E: Error>(self, value: u64) -> Result<Asked, E> {
        Ok(if value == 0 { Asked::Default } else { Asked::Word(value.to_string()) })
    }

    fn visit_f64<E: Error>(self, value: f64) -> Result<Asked, E> {
        Ok(if value == 0.0 { Asked::Default } else { Asked::Something })
    }

    fn visit_str<E: Error>(self, value: &str) -> Result<Asked, E> {
        Ok(match value.len() {
            0 => Asked::Default,
            1..=16 => Asked::Word(value.to_owned()),
            _ => Asked::Something,
        })
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Asked, A::Error> {
        let Some(first) = list.next_element::<Asked>()? else { return Ok(Asked::Default) };
        let mut more = false;
        while list.next_element::<IgnoredAny>()?.is_some() {
            more = true;
        }
        Ok(if more { Asked::Something } else { first })
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Asked, A::Error> {
        let mut asked = Asked::Default;
        while let Some(key) = map.next_key::<String>()? {
            let value = map.next_value::<Asked>()?;
            asked = match (key.as_str(), asked) {
                ("type", Asked::Default) => value,
                _ => Asked::Something,
            };
        }
        Ok(asked)
    }
}

/// A text, or several.
pub(super) struct OneOrMany(pub(super) Vec<String>);

impl<'de> Deserialize<'de> for OneOrMany {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        match Prompts::deserialize(deserializer)? {
            Prompts::Texts(texts) => Ok(Self(texts)),
            Prompts::Tokens(_) => Err(D::Error::custom("expected a text or a list of texts")),
        }
    }
}

/// Texts or lists of tokens, one or several.
pub(super) enum Prompts {
    Texts(Vec<String>),
    Tokens(Vec<Vec<u32>>),
}

impl<'de> Deserialize<'de> for Prompts {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(PromptsVisitor)
    }
}

struct PromptsVisitor;

/// What a list of prompts may hold.
enum Element {
    Token(u32),
    Text(String),
    Tokens(Vec<u32>),
}

impl<'de> Deserialize<'de> for Element {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(ElementVisitor)
    }
}

struct ElementVisitor;

impl<'de> Visitor<'de> for ElementVisitor {
    type Value = Element;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a text, a token or a list of tokens")
    }

    fn visit_u64<E: Error>(self, value: u64) -> Result<Element, E> {
        u32::try_from(value).map(Element::Token).map_err(|_| E::custom(format!("no token has the number {value}")))
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<Element, E> {
        Ok(Element::Text(text.to_owned()))
    }

    fn visit_string<E: Error>(self, text: String) -> Result<Element, E> {
        Ok(Element::Text(text))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Element, A::Error> {
        let mut tokens = Vec::new();
        while let Some(token) = list.next_element::<u32>()? {
            tokens.push(token);
        }
        Ok(Element::Tokens(tokens))
    }
}

impl<'de> Visitor<'de> for PromptsVisitor {
    type Value = Prompts;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a text, a list of texts, a list of tokens or a list of such lists")
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<Prompts, E> {
        Ok(Prompts::Texts(vec![text.to_owned()]))
    }

    fn visit_string<E: Error>(self, text: String) -> Result<Prompts, E> {
        Ok(Prompts::Texts(vec![text]))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Prompts, A::Error> {
        let (mut texts, mut lists, mut tokens) = (Vec::new(), Vec::new(), Vec::new());
        while let Some(element) = list.next_element::<Element>()? {
            match element {
                Element::Token(token) => tokens.push(token),
                Element::Text(text) => texts.push(text),
                Element::Tokens(tokens) => lists.push(tokens),
            }
            let kinds = [texts.is_empty(), lists.is_empty(), tokens.is_empty()];
            if kinds.iter().filter(|is_empty| !**is_empty).count() > 1 {
                return Err(A::Error::custom("expected either texts or tokens"));
            }
            if texts.len() > TEXTS_MAX || lists.len() > TEXTS_MAX {
                return Err(A::Error::custom(format!("expected {TEXTS_MAX} of them at most")));
            }
        }
        if !tokens.is_empty() {
            lists.push(tokens);
        }
        Ok(if lists.is_empty() { Prompts::Texts(texts) } else { Prompts::Tokens(lists) })
    }
}

/// A message's text: as it is, or in parts.
pub(super) struct Content(pub(super) String);

impl<'de> Deserialize<'de> for Content {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(ContentVisitor)
    }
}

struct ContentVisitor;

#[derive(Deserialize)]
struct ContentPart {
    r#type: String,
    text: Option<String>,
}

impl<'de> Visitor<'de> for ContentVisitor {
    type Value = Content;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a text or a list of text parts")
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<Content, E> {
        Ok(Content(text.to_owned()))
    }

    fn visit_string<E: Error>(self, text: String) -> Result<Content, E> {
        Ok(Content(text))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut parts: A) -> Result<Content, A::Error> {
        let mut content = String::new();
        while let Some(part) = parts.next_element::<ContentPart>()? {
            match (part.r#type.as_str(), part.text) {
                ("text", Some(text)) => content.push_str(&text),
                ("text", None) => return Err(A::Error::missing_field("text")),
                _ => return Err(A::Error::custom("only parts of type \"text\" are supported")),
            }
        }
        Ok(Content(content))
    }
}
