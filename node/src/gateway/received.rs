//! What has come of one answer, over every head that was asked for it. Pure: decides what each frame is worth and what to ask for after a loss.
//!
//! I27: each token of an answer reaches the client once, in order and without a gap: a frame that begins anywhere but behind what is there is
//! not taken, and the head that sent it is not trusted with the rest.

use stoke_protocol::message::serve::{Answer, Ask, Finish, Refusal, Tensor, TensorKind};

/// Tokens of an answer that says no limit: all of them fit into the question that asks for what follows (1 MiB).
const TOKENS_MAX: usize = 150_000;

/// What was asked, and how far its answer is.
#[derive(Debug)]
pub(super) struct Received {
    ask: Ask,
    begun: bool,
    vectors: usize,
    /// Vectors that were there when the head that answers now was asked.
    vectors_before: usize,
    /// The one frame of those that have one.
    whole: bool,
}

/// What a client gets.
#[derive(Clone, PartialEq, Debug)]
pub(super) enum Event {
    Begun { prompt_tokens: u32 },
    Text(String),
    Vector { tokens: u32, values: Vec<f32> },
    Tensors(Vec<Tensor>),
    Described { inputs: Vec<TensorKind>, outputs: Vec<TensorKind> },
    Ended { why: Finish, text: String },
}

/// What a frame is worth.
#[derive(Clone, PartialEq, Debug)]
pub(super) enum Taken {
    Event(Event),
    /// It says nothing new.
    Nothing,
    Refused(Refusal),
    /// It breaks the rules.
    Broken(&'static str),
}

impl Received {
    pub(super) fn new(ask: Ask) -> Self {
        Self { ask, begun: false, vectors: 0, vectors_before: 0, whole: false }
    }

    /// Whether a head has taken the question.
    pub(super) fn is_begun(&self) -> bool {
        self.begun
    }

    /// Whether it asks a model to compute: one of the questions that shares are of.
    pub(super) fn is_new_work(&self) -> bool {
        match &self.ask {
            Ask::Generate(_) | Ask::Embed { .. } | Ask::Infer { .. } => true,
            Ask::Describe | Ask::Probe => false,
        }
    }

    /// Tokens that have come.
    pub(super) fn tokens(&self) -> usize {
        match &self.ask {
            Ask::Generate(generate) => generate.answered.len(),
            Ask::Embed { .. } | Ask::Infer { .. } | Ask::Describe | Ask::Probe => 0,
        }
    }

    /// The question for what is not there yet, to another head.
    pub(super) fn again(&mut self) -> Ask {
        self.vectors_before = self.vectors;
        match &self.ask {
            Ask::Embed { texts } => Ask::Embed { texts: texts[self.vectors..].to_vec().into() },
            Ask::Generate(_) | Ask::Infer { .. } | Ask::Describe | Ask::Probe => self.ask.clone(),
        }
    }

    /// The next frame of the head that was asked last.
    pub(super) fn take(&mut self, answer: Answer) -> Taken {
        match answer {
            Answer::Begun { prompt_tokens } => self.begin(prompt_tokens),
            Answer::Tokens { index, tokens, text } => self.take_tokens(index, &tokens, text),
            Answer::Vector { index, tokens, values } => self.take_vector(index, tokens, values.0),
            Answer::Tensors { outputs } => match &self.ask {
                Ask::Infer { .. } => self.one(Event::Tensors(outputs.0)),
                _ => Taken::Broken("tensors that nobody asked for"),
            },
            Answer::Described { inputs, outputs } => match &self.ask {
                Ask::Describe => self.one(Event::Described { inputs: inputs.0, outputs: outputs.0 }),
                _ => Taken::Broken("a description that nobody asked for"),
            },
            Answer::Ended { why, text } => self.end(why, text),
            Answer::Refused(refusal) => Taken::Refused(refusal),
        }
    }

    fn begin(&mut self, prompt_tokens: u32) -> Taken {
        if !matches!(self.ask, Ask::Generate(_)) {
            return Taken::Broken("a beginning where nothing is generated");
        }
        if std::mem::replace(&mut self.begun, true) {
            return Taken::Nothing;
        }
        Taken::Event(Event::Begun { prompt_tokens })
    }

    fn take_tokens(&mut self, index: u32, tokens: &[u32], text: String) -> Taken {
        let Ask::Generate(generate) = &mut self.ask else { return Taken::Broken("tokens that nobody asked for") };
        if !self.begun {
            return Taken::Broken("tokens before the beginning");
        }
        if index as usize != generate.answered.len() {
            return Taken::Broken("tokens that do not follow those before");
        }
        if tokens.is_empty() {
            return Taken::Broken("text without a token");
        }
        let most = generate.tokens_max.map_or(TOKENS_MAX, |most| (most as usize).min(TOKENS_MAX));
        if generate.answered.len() + tokens.len() > most {
            return Taken::Broken("more tokens than were asked for");
        }
        generate.answered.0.extend_from_slice(tokens);
        Taken::Event(Event::Text(text))
    }

    fn take_vector(&mut self, index: u32, tokens: u32, values: Vec<f32>) -> Taken {
        let Ask::Embed { texts } = &self.ask else { return Taken::Broken("a vector that nobody asked for") };
        if self.vectors_before + index as usize != self.vectors || self.vectors >= texts.len() {
            return Taken::Broken("a vector that does not follow those before");
        }
        self.vectors += 1;
        self.begun = true;
        Taken::Event(Event::Vector { tokens, values })
    }

    /// Another head says the same when only the end of the answer was lost.
    fn one(&mut self, event: Event) -> Taken {
        match std::mem::replace(&mut self.whole, true) {
            false => Taken::Event(event),
            true => Taken::Nothing,
        }
    }

    fn end(&mut self, why: Finish, text: String) -> Taken {
        let is_whole = match &self.ask {
            Ask::Generate(_) => self.begun,
            Ask::Embed { texts } => self.vectors == texts.len(),
            Ask::Infer { .. } | Ask::Describe => self.whole,
            Ask::Probe => true,
        };
        match is_whole {
            true => Taken::Event(Event::Ended { why, text }),
            false => Taken::Broken("an end before the answer is whole"),
        }
    }
}

#[cfg(test)]
mod tests {
    use stoke_protocol::message::serve::{Generate, Prompt, Sampling};

    use super::*;

    fn generate(tokens_max: Option<u32>) -> Received {
        let sampling =
            Sampling { temperature: 0.0, top_k: 0, top_p: 1.0, min_p: 0.0, repetition_penalty: 1.0, seed: 0 };
        let prompt = Prompt::Text("a".into());
        let (stop, answered) = (Default::default(), Default::default());
        Received::new(Ask::Generate(Generate { prompt, sampling, tokens_max, stop, answered }))
    }

    fn tokens(index: u32, tokens: &[u32]) -> Answer {
        Answer::Tokens { index, tokens: tokens.to_vec().into(), text: format!("<{index}>") }
    }

    fn begun() -> Answer {
        Answer::Begun { prompt_tokens: 3 }
    }

    #[test]
    fn tokens_follow_those_before_over_any_number_of_heads() {
        let mut received = generate(None);
        assert_eq!(received.take(begun()), Taken::Event(Event::Begun { prompt_tokens: 3 }));
        assert_eq!(received.take(tokens(0, &[7, 8])), Taken::Event(Event::Text("<0>".into())));
        let Ask::Generate(again) = received.again() else { panic!("another question") };
        assert_eq!(again.answered.0, [7, 8]);
        assert_eq!(received.take(begun()), Taken::Nothing);
        assert!(matches!(received.take(tokens(0, &[7])), Taken::Broken(_)), "a repeat");
        assert!(matches!(received.take(tokens(3, &[9])), Taken::Broken(_)), "a gap");
        assert_eq!(received.take(tokens(2, &[9])), Taken::Event(Event::Text("<2>".into())));
        assert_eq!(received.tokens(), 3);
    }

    #[test]
    fn what_breaks_the_rules_is_not_taken() {
        let mut received = generate(Some(2));
        assert!(matches!(received.take(tokens(0, &[1])), Taken::Broken(_)), "nothing has begun");
        let end = Answer::Ended { why: Finish::Stop, text: String::new() };
        assert!(matches!(received.take(end.clone()), Taken::Broken(_)), "nothing has begun");
        received.take(begun());
        assert!(matches!(received.take(tokens(0, &[])), Taken::Broken(_)), "text without a token");
        assert!(matches!(received.take(tokens(0, &[1, 2, 3])), Taken::Broken(_)), "too many");
        assert!(matches!(received.take(Answer::Tensors { outputs: Default::default() }), Taken::Broken(_)));
        let vector = Answer::Vector { index: 0, tokens: 1, values: vec![1.0].into() };
        assert!(matches!(received.take(vector), Taken::Broken(_)));
        received.take(tokens(0, &[1, 2]));
        assert_eq!(received.take(end), Taken::Event(Event::Ended { why: Finish::Stop, text: String::new() }));
    }

    #[test]
    fn tensors_whose_end_was_lost_are_given_once() {
        let mut received = Received::new(Ask::Infer { inputs: Default::default() });
        let tensors = || Answer::Tensors { outputs: Default::default() };
        assert_eq!(received.take(tensors()), Taken::Event(Event::Tensors(Vec::new())));
        assert_eq!(received.again(), Ask::Infer { inputs: Default::default() });
        assert_eq!(received.take(tensors()), Taken::Nothing);
        let end = Answer::Ended { why: Finish::Stop, text: String::new() };
        assert!(matches!(received.take(end), Taken::Event(Event::Ended { .. })));
    }

    #[test]
    fn vectors_that_are_there_are_not_asked_for_again() {
        let texts = ["a", "b", "c"].map(str::to_owned).to_vec();
        let mut received = Received::new(Ask::Embed { texts: texts.into() });
        let vector = |index| Answer::Vector { index, tokens: 1, values: vec![index as f32].into() };
        assert!(matches!(received.take(vector(0)), Taken::Event(_)));
        assert_eq!(received.again(), Ask::Embed { texts: vec!["b".to_owned(), "c".to_owned()].into() });
        assert!(matches!(received.take(vector(1)), Taken::Broken(_)), "the second of the new question is the third");
        assert!(matches!(received.take(vector(0)), Taken::Event(_)));
        let end = Answer::Ended { why: Finish::Stop, text: String::new() };
        assert!(matches!(received.take(end.clone()), Taken::Broken(_)), "one is missing");
        assert!(matches!(received.take(vector(1)), Taken::Event(_)));
        assert!(matches!(received.take(vector(2)), Taken::Broken(_)), "one too many");
        assert!(matches!(received.take(end), Taken::Event(_)));
    }
}
