//! The tokens of a chat. Owns that what a message says stays text: control tokens come from the model's template alone.
//!
//! P1: a control token that a message spells out is no control token. Such a text is marked behind its first letter before the template is rendered,
//! and the rendered chat is cut at the marks before it becomes tokens, so that no piece has it whole. A chat without such texts has the tokens that
//! the reference has: nothing is marked or cut. (Texts that several messages spell together are not looked for: every template of a chat model puts
//! control tokens of its own between messages.)

use super::chat::{ChatTemplate, Message};
use super::error::ModelError;
use super::tokenizer::{TEXT_BYTES_MAX, Tokenizer};

/// Marks are letters for private use: one that neither the messages nor the template use, so that no filter takes it for another.
const MARKS: std::ops::RangeInclusive<char> = '\u{E000}'..='\u{F8FF}';

/// The tokens of a chat, up to where the assistant's answer begins.
pub fn chat(template: &ChatTemplate, tokenizer: &Tokenizer, messages: &[Message]) -> Result<Vec<u32>, ModelError> {
    let spelt = |text: &str| tokenizer.control().iter().any(|token| text.contains(token.as_str()));
    if !messages.iter().any(|message| spelt(&message.content) || spelt(&message.role)) {
        return tokenizer.encode(&template.render(messages, true)?);
    }
    let used = |mark: char| messages.iter().any(|one| one.content.contains(mark) || one.role.contains(mark));
    let Some(mark) = MARKS.into_iter().find(|mark| !used(*mark) && !template.contains(*mark)) else {
        return Err(ModelError::Chat {
            problem: "they use all letters that Unicode leaves for private use".to_owned(),
        });
    };
    let of = |text: &str| marked(text, mark, tokenizer.control());
    let marked = messages.iter().map(|one| Message { role: of(&one.role), content: of(&one.content) });
    let rendered = template.render(&marked.collect::<Vec<_>>(), true)?;
    if rendered.len() > TEXT_BYTES_MAX {
        return Err(ModelError::Text { bytes: rendered.len(), bytes_max: TEXT_BYTES_MAX });
    }
    let pieces: Result<Vec<_>, _> = rendered.split(mark).map(|piece| tokenizer.encode(piece)).collect();
    Ok(pieces?.concat())
}

/// The text with a mark behind the first letter of each control token that it spells, also where one lies within another. Those of one letter have no
/// inside: they are left out.
fn marked(text: &str, mark: char, control: &[String]) -> String {
    let mut made = String::with_capacity(text.len() + 64);
    for (at, letter) in text.char_indices() {
        let here = || control.iter().filter(|token| text[at..].starts_with(token.as_str()));
        if here().any(|token| token.len() == letter.len_utf8()) {
            continue;
        }
        made.push(letter);
        if here().next().is_some() {
            made.push(mark);
        }
    }
    made
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_control_token_is_marked_within() {
        let control = ["<|a|>", "|a|>", "§"].map(str::to_owned);
        assert_eq!(marked("x<|a|>y <|a <|a|", '_', &control), "x<_|_a|>y <|a <|a|");
        assert_eq!(marked("|a|><|a|>§é", '_', &control), "|_a|><_|_a|>é");
    }
}
