//! From the tokens of one answer to its text, piece by piece. Owns what is certain of the text and when the answer is over; knows no schedule.
//!
//! A1: the pieces are a function of the tokens so far. So an answer that is begun again with some of its tokens is fed those, what they give is
//! dropped, and the text goes on without a gap or a repeat. A2: no piece ends within a character, or has text of which a stop text may still be made.

use crate::lm::tokenizer::{Decoding, Tokenizer};

/// The text of one answer.
pub struct Answer {
    decoding: Option<Decoding>,
    /// Tokens that end it.
    ends: Vec<u32>,
    stop: Vec<String>,
    tokens_max: usize,
    tokens: usize,
    /// What may become a stop text.
    kept: String,
    over: Option<Why>,
}

/// What one more token gives.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Piece {
    /// May be empty.
    pub text: String,
    /// The answer is over with it: what is left is in [`Answer::finish`].
    pub over: Option<Why>,
}

/// Why an answer is over.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Why {
    /// The model has ended it.
    End,
    /// A stop text has come. It is no part of the answer.
    Stop,
    /// It has as many tokens as it may have.
    Length,
}

impl Answer {
    /// `stop`: texts that end the answer; empty ones are none.
    pub fn new(tokenizer: &Tokenizer, stop: Vec<String>, tokens_max: usize) -> Self {
        Self {
            decoding: Some(tokenizer.stream()),
            ends: tokenizer.end_of_sequence().to_vec(),
            stop: stop.into_iter().filter(|text| !text.is_empty()).collect(),
            tokens_max,
            tokens: 0,
            kept: String::new(),
            over: None,
        }
    }

    /// Why it is over, if it is.
    pub fn over(&self) -> Option<Why> {
        self.over
    }

    /// Takes the next token. Behind its end an answer has no more text.
    pub fn push(&mut self, token: u32) -> Piece {
        if self.over.is_some() {
            return Piece { text: String::new(), over: self.over };
        }
        self.tokens += 1;
        let decoded = self.decoding.as_mut().and_then(|decoding| decoding.push(token)).unwrap_or_default();
        let text = self.certain(&decoded);
        if self.over.is_none() && self.ends.contains(&token) {
            self.over = Some(Why::End);
        } else if self.over.is_none() && self.tokens >= self.tokens_max {
            self.over = Some(Why::Length);
        }
        Piece { text, over: self.over }
    }

    /// What was kept back and is part of the answer after all. Nothing comes behind it.
    pub fn finish(&mut self) -> String {
        let rest = self.decoding.take().and_then(Decoding::finish).unwrap_or_default();
        if self.over == Some(Why::Stop) {
            return String::new();
        }
        let text = self.certain(&rest);
        text + &std::mem::take(&mut self.kept)
    }

    /// The text that is certain with what has just come. Ends the answer before the first stop text in it.
    fn certain(&mut self, decoded: &str) -> String {
        self.kept.push_str(decoded);
        if self.stop.is_empty() {
            return std::mem::take(&mut self.kept);
        }
        if let Some(at) = self.stop.iter().filter_map(|stop| self.kept.find(stop.as_str())).min() {
            self.over = Some(Why::Stop);
            self.kept.truncate(at);
            return std::mem::take(&mut self.kept);
        }
        let begins = |at: &usize| self.stop.iter().any(|stop| stop.starts_with(&self.kept[*at..]));
        let longest = self.stop.iter().map(String::len).max().unwrap_or_default();
        let from = self.kept.len().saturating_sub(longest);
        let bounds = (from..self.kept.len()).filter(|at| self.kept.is_char_boundary(*at));
        let at = bounds.into_iter().find(begins).unwrap_or(self.kept.len());
        let rest = self.kept.split_off(at);
        std::mem::replace(&mut self.kept, rest)
    }
}
