//! Every number that the coordinator tells, name and help side by side. Actors touch them; `state/` never does.

use std::sync::{Mutex, PoisonError};
use std::time::SystemTime;

use prometheus::{
    Encoder, Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry, TextEncoder,
};
use stoke_protocol::exposition::{Exposition, Kind};

use crate::state::view::ModelFigures;

/// A number's kind, its name, its help, and where it is.
type Figure<T> = (Kind, &'static str, &'static str, fn(&T) -> u64);

/// What is told of each model that is served: of all its replicas, without those with a share or a shadow.
const MODELS: [Figure<ModelFigures>; 8] = [
    (Kind::Gauge, "stoke_model_replicas", "Jobs that serve the model", |model| model.replicas.into()),
    (Kind::Gauge, "stoke_model_answering", "Jobs that serve the model and answer", |model| model.answering.into()),
    (Kind::Gauge, "stoke_model_running", "Requests that are computed", |model| model.running),
    (Kind::Gauge, "stoke_model_waiting", "Requests that wait at heads", |model| model.waiting),
    (Kind::Gauge, "stoke_model_held", "Requests that wait at gateways for a head", |model| model.held.into()),
    (
        Kind::Counter,
        "stoke_model_answers_total",
        "Answers that came to their end, those of shares and shadows too",
        |model| model.total.answers,
    ),
    (Kind::Counter, "stoke_model_tokens_total", "Tokens of answers, or of texts with vectors", |model| {
        model.total.tokens
    }),
    (
        Kind::Counter,
        "stoke_model_refused_total",
        "Requests that gateways refused: no head had room or came up in time",
        |model| model.total.refused,
    ),
];
const FIRST_TOKEN: (&str, &str) =
    ("stoke_model_first_token_seconds", "From a question's arrival at the head to the first token of its answer");

/// Buckets from 10 µs to 10 s, in seconds: a plan of a small cluster, an fsync, a slow disk.
const SECONDS: [f64; 13] = [1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0, 10.0];

pub(crate) struct Metrics {
    registry: Registry,
    pub epoch: IntGauge,
    pub nodes: IntGaugeVec,
    pub jobs: IntGaugeVec,
    pub checkpoints: IntGauge,
    pub tokens_open: IntGauge,
    pub placements: IntGauge,
    pub sessions: IntGauge,
    pub clients: IntGauge,
    pub heartbeats: IntCounter,
    pub reports: IntCounter,
    pub foreign_reports: IntGauge,
    pub stale_reports: IntGauge,
    pub refused_frames: IntCounter,
    pub requests: IntCounterVec,
    pub refused_requests: IntCounterVec,
    pub unaudited: IntGauge,
    pub joins: IntCounterVec,
    pub rank_certificates: IntCounter,
    pub journal_index: IntGauge,
    pub journal_records: IntCounter,
    pub journal_bytes: IntCounter,
    pub journal_free_bytes: IntGauge,
    pub commit_seconds: Histogram,
    pub step_seconds: Histogram,
    pub waiting_effects: IntGauge,
    pub ranks_miscomputed: IntGauge,
    pub steps_skipped: IntGauge,
    pub ranks_slow: IntGauge,
    pub trace_spans: IntCounterVec,
    /// Ends of lives: of the coordinator's certificate, of the authority.
    certificate_expiry: IntGaugeVec,
    /// Of models that are served, as text.
    models: Mutex<String>,
    /// Of live jobs and of nodes, as text.
    live: Mutex<String>,
}

impl Metrics {
    pub fn new() -> Self {
        let registry = Registry::new();
        let gauge = |name: &str, help: &str| register(&registry, IntGauge::new(name, help));
        let counter = |name: &str, help: &str| register(&registry, IntCounter::new(name, help));
        let gauges = |name: &str, help: &str, label: &str| {
            register(&registry, IntGaugeVec::new(Opts::new(name, help), &[label]))
        };
        let counters = |name: &str, help: &str, label: &str| {
            register(&registry, IntCounterVec::new(Opts::new(name, help), &[label]))
        };
        let seconds = |name: &str, help: &str| {
            register(&registry, Histogram::with_opts(HistogramOpts::new(name, help).buckets(SECONDS.to_vec())))
        };
        // There from the start, or the first refusals would be a series that begins with them, which `increase` does not see.
        let joins = counters("stoke_joins_total", "Joins by result: accepted, refused", "result");
        for result in ["accepted", "refused"] {
            joins.with_label_values(&[result]);
        }
        let trace_spans =
            counters("stoke_trace_spans_total", "Spans of traces by result: sent, failed, dropped", "result");
        for result in ["sent", "failed", "dropped"] {
            trace_spans.with_label_values(&[result]);
        }
        Self {
            epoch: gauge("stoke_epoch", "Starts of the coordinator on its journal"),
            nodes: gauges("stoke_nodes", "Nodes by state: up, silent, lost, draining, drained, quarantined", "state"),
            jobs: gauges("stoke_jobs", "Jobs by state", "state"),
            checkpoints: gauge("stoke_checkpoints", "Visible checkpoints of all jobs"),
            tokens_open: gauge("stoke_tokens_open", "Join tokens that still let in"),
            placements: gauge("stoke_placements", "Gangs placed since the journal began"),
            sessions: gauge("stoke_sessions", "Open sessions of nodes"),
            clients: gauge("stoke_clients", "Open connections of users"),
            heartbeats: counter("stoke_heartbeats_total", "Heartbeats heard"),
            reports: counter("stoke_reports_total", "Reports of ranks heard, repeated ones included"),
            foreign_reports: gauge("stoke_reports_foreign", "Reports of ranks that the node does not hold"),
            stale_reports: gauge("stoke_reports_stale", "Reports of generations that were over"),
            refused_frames: counter("stoke_refused_frames_total", "Frames that ended their connection"),
            requests: counters("stoke_requests_total", "Questions of users and nodes by verb", "verb"),
            refused_requests: counters("stoke_refused_requests_total", "Refused questions by code", "code"),
            unaudited: gauge(
                "stoke_refusals_unaudited",
                "Refusals that were too many to be journalled, since this start",
            ),
            joins,
            rank_certificates: counter("stoke_rank_certificates_total", "Certificates signed for ranks"),
            journal_index: gauge("stoke_journal_index", "Index of the newest durable entry"),
            journal_records: counter("stoke_journal_entries_total", "Entries made durable by this process"),
            journal_bytes: counter("stoke_journal_bytes_total", "Bytes of entries made durable by this process"),
            journal_free_bytes: gauge("stoke_journal_free_bytes", "Room on the journal's disk"),
            commit_seconds: seconds("stoke_journal_commit_seconds", "Time of a group commit, fsync included"),
            step_seconds: seconds("stoke_step_seconds", "Time that the state takes for one input, placement included"),
            waiting_effects: gauge("stoke_effects_waiting", "Steps whose effects wait for the journal"),
            ranks_miscomputed: gauge("stoke_ranks_miscomputed", "Ranks with wrong numbers, on nodes that serve"),
            steps_skipped: gauge("stoke_steps_skipped", "Steps of running jobs that were not finite and left out"),
            ranks_slow: gauge("stoke_ranks_slow", "Ranks that compute more slowly than their peers"),
            trace_spans,
            certificate_expiry: gauges(
                "stoke_certificate_expiry_timestamp_seconds",
                "When a certificate ends: the coordinator's own, which renews itself, and the authority's",
                "of",
            ),
            models: Mutex::default(),
            live: Mutex::default(),
            registry,
        }
    }

    /// The figures of all models, in place of the last ones.
    pub fn served(&self, models: &[ModelFigures]) {
        let mut text = Exposition::default();
        for (kind, name, help, figure) in MODELS {
            text.family(kind, name, help);
            models.iter().for_each(|model| text.value(name, &model.model, figure(model)));
        }
        let (name, help) = FIRST_TOKEN;
        text.family(Kind::Histogram, name, help);
        models.iter().for_each(|model| text.times(name, &model.model, &model.total.first_tokens));
        *self.models.lock().unwrap_or_else(PoisonError::into_inner) = text.text();
    }

    /// When a certificate ends.
    pub fn expires(&self, of: &str, at: SystemTime) {
        let at = at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        self.certificate_expiry.with_label_values(&[of]).set(at.as_secs() as i64);
    }

    /// The figures of live jobs and of nodes, in place of the last ones.
    pub fn live(&self, text: String) {
        *self.live.lock().unwrap_or_else(PoisonError::into_inner) = text;
    }

    /// The text that Prometheus reads.
    pub fn text(&self) -> String {
        let mut text = Vec::new();
        TextEncoder::new().encode(&self.registry.gather(), &mut text).expect("metrics encode into memory");
        let text = String::from_utf8(text).expect("the text format is UTF-8");
        text + &self.models.lock().unwrap_or_else(PoisonError::into_inner)
            + &self.live.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn register<T: prometheus::core::Collector + Clone + 'static>(registry: &Registry, made: prometheus::Result<T>) -> T {
    let metric = made.expect("names of metrics are valid");
    registry.register(Box::new(metric.clone())).expect("names of metrics are unique");
    metric
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_metric_has_a_help_text() {
        let metrics = Metrics::new();
        metrics.nodes.with_label_values(&["up"]).set(3);
        let text = metrics.text();
        assert!(text.contains("stoke_nodes{state=\"up\"} 3"), "{text}");
        assert!(text.contains("# HELP stoke_journal_commit_seconds"));
    }
}
