//! Every number that a gateway tells Prometheus, name and help side by side. Owns no count.

use std::sync::atomic::Ordering;

use stoke_protocol::exposition::{Exposition, Kind};

use super::Counts;
use super::tally::{Tallies, Tally};

/// A number's kind, its name, its help, and where it is.
type Figure<T> = (Kind, &'static str, &'static str, fn(&T) -> u64);

const GATEWAY: [Figure<Counts>; 6] = [
    (Kind::Counter, "stoke_gateway_requests_total", "HTTP requests and gRPC calls", |counts| counts.requests),
    (
        Kind::Counter,
        "stoke_gateway_refused_total",
        "Requests that were told of a problem before any of an answer",
        |counts| counts.refused,
    ),
    (Kind::Counter, "stoke_gateway_replays_total", "Questions that were asked of another head, or again", |counts| {
        counts.replays
    }),
    (Kind::Counter, "stoke_gateway_broken_total", "Frames of heads that broke the rules", |counts| counts.broken),
    (Kind::Counter, "stoke_gateway_copies_total", "Copies of questions to shadows", |counts| counts.copies),
    (Kind::Counter, "stoke_gateway_copies_failed_total", "Copies that had no answer", |counts| counts.copies_failed),
];

const MODELS: [Figure<Tally>; 8] = [
    (Kind::Counter, "stoke_gateway_model_questions_total", "Questions: one for each choice of an answer", |model| {
        model.questions.load(Ordering::Relaxed)
    }),
    (Kind::Counter, "stoke_gateway_model_answers_total", "Answers that came to their end", |model| {
        model.answers.load(Ordering::Relaxed)
    }),
    (Kind::Counter, "stoke_gateway_model_tokens_total", "Tokens of answers, or of texts with vectors", |model| {
        model.tokens.load(Ordering::Relaxed)
    }),
    (Kind::Counter, "stoke_gateway_model_busy_total", "Questions refused because every head was busy (429)", |model| {
        model.busy.load(Ordering::Relaxed)
    }),
    (
        Kind::Counter,
        "stoke_gateway_model_no_head_total",
        "Questions refused because no head came up in time (503)",
        |model| model.headless.load(Ordering::Relaxed),
    ),
    (
        Kind::Counter,
        "stoke_gateway_model_replays_total",
        "Questions that were asked of another head, or again",
        |model| model.replays.load(Ordering::Relaxed),
    ),
    (Kind::Gauge, "stoke_gateway_model_running", "Questions that a head has", Tally::running),
    (Kind::Gauge, "stoke_gateway_model_waiting", "Questions that wait for a head", Tally::held),
];
const FIRST_TOKEN: (&str, &str) = (
    "stoke_gateway_model_first_token_seconds",
    "From a question's arrival at the gateway to the first token of its answer",
);

/// The text that Prometheus reads.
pub(super) fn text(counts: &Counts, tallies: &Tallies) -> String {
    let mut text = Exposition::default();
    for (kind, name, help, figure) in GATEWAY {
        text.family(kind, name, help);
        text.plain(name, figure(counts));
    }
    let models = tallies.each();
    for (kind, name, help, figure) in MODELS {
        text.family(kind, name, help);
        models.iter().for_each(|(model, tally)| text.value(name, model, figure(tally)));
    }
    let (name, help) = FIRST_TOKEN;
    text.family(Kind::Histogram, name, help);
    models.iter().for_each(|(model, tally)| text.times(name, model, &tally.first_tokens()));
    text.text()
}
