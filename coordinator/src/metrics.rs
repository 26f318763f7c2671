//! Every metric of the coordinator: name and help side by side. Actors touch them; `state/` never does. Labels are bounded: job states and
//! verbs, never job names.

use prometheus::{
    Gauge, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry,
    TextEncoder,
};

/// See the module. Cloning shares the numbers.
#[derive(Clone)]
pub struct Metrics {
    registry: Registry,
    pub epoch: IntGauge,
    pub nodes: IntGaugeVec,
    pub jobs: IntGaugeVec,
    pub sessions: IntGauge,
    pub placements: IntGauge,
    pub heartbeats: IntCounter,
    pub reports: IntCounter,
    pub connections_refused: IntCounterVec,
    pub requests: IntCounterVec,
    pub requests_refused: IntCounterVec,
    pub joins: IntCounterVec,
    pub checkpoints_committed: IntCounter,
    pub journal_entries: IntCounter,
    pub journal_bytes: IntCounter,
    pub journal_commit_seconds: Histogram,
    pub journal_free_bytes: Gauge,
    pub step_seconds: HistogramVec,
}

/// From a tenth of a millisecond to ten seconds: an fsync and a plan both lie in it.
const SECONDS: [f64; 11] = [0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0];

impl Metrics {
    /// Fresh metrics in a registry of their own, so that several coordinators may live in one process.
    pub fn new() -> Self {
        let registry = Registry::new_custom(Some("stoke".into()), None).expect("a constant prefix");
        let add = Adder(&registry);
        Self {
            epoch: add.gauge("coordinator_epoch", "Starts of this coordinator since the cluster was made."),
            nodes: add.gauges("nodes", "Nodes by state.", "state"),
            jobs: add.gauges("jobs", "Jobs by state.", "state"),
            sessions: add.gauge("node_sessions", "Open sessions of nodes."),
            placements: add.gauge("gangs_placed", "Gangs placed since the cluster was made."),
            heartbeats: add.counter("heartbeats_total", "Heartbeats that renewed a lease."),
            reports: add.counter("rank_reports_total", "Rank events that nodes reported, repeats included."),
            connections_refused: add.counters(
                "connections_refused_total",
                "Connections closed by the coordinator, by reason.",
                "reason",
            ),
            requests: add.counters("requests_total", "Questions of clients, by verb.", "verb"),
            requests_refused: add.counters("requests_refused_total", "Questions that were refused, by code.", "code"),
            joins: add.counters("joins_total", "Joins by token, by outcome.", "outcome"),
            checkpoints_committed: add
                .counter("checkpoints_committed_total", "Checkpoints that became visible since this start."),
            journal_entries: add.counter("journal_entries_total", "Entries made durable since this start."),
            journal_bytes: add.counter("journal_bytes_total", "Bytes of those entries."),
            journal_commit_seconds: add.histogram("journal_commit_seconds", "One group commit, fsync included."),
            journal_free_bytes: add.float("journal_free_bytes", "Room on the journal's disk."),
            step_seconds: add.histograms(
                "control_step_seconds",
                "One decision of the control machine, placement included, by input.",
                "input",
            ),
            registry,
        }
    }

    /// Prometheus' text format.
    pub fn render(&self) -> String {
        TextEncoder::new().encode_to_string(&self.registry.gather()).expect("gathered metrics are well formed")
    }
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

/// Makes and registers; the names are constants, so a clash is a bug of ours and shows in the first test.
struct Adder<'a>(&'a Registry);

impl Adder<'_> {
    fn register<C: prometheus::core::Collector + Clone + 'static>(&self, made: prometheus::Result<C>) -> C {
        let collector = made.expect("a constant name and help");
        self.0.register(Box::new(collector.clone())).expect("each name once");
        collector
    }

    fn gauge(&self, name: &str, help: &str) -> IntGauge {
        self.register(IntGauge::new(name, help))
    }

    fn float(&self, name: &str, help: &str) -> Gauge {
        self.register(Gauge::new(name, help))
    }

    fn gauges(&self, name: &str, help: &str, label: &str) -> IntGaugeVec {
        self.register(IntGaugeVec::new(Opts::new(name, help), &[label]))
    }

    fn counter(&self, name: &str, help: &str) -> IntCounter {
        self.register(IntCounter::new(name, help))
    }

    fn counters(&self, name: &str, help: &str, label: &str) -> IntCounterVec {
        self.register(IntCounterVec::new(Opts::new(name, help), &[label]))
    }

    fn histogram(&self, name: &str, help: &str) -> Histogram {
        self.register(Histogram::with_opts(HistogramOpts::new(name, help).buckets(SECONDS.to_vec())))
    }

    fn histograms(&self, name: &str, help: &str, label: &str) -> HistogramVec {
        self.register(HistogramVec::new(HistogramOpts::new(name, help).buckets(SECONDS.to_vec()), &[label]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metrics_carry_the_prefix_and_their_labels() {
        let metrics = Metrics::new();
        metrics.jobs.with_label_values(&["running"]).set(3);
        let text = metrics.render();
        assert!(text.contains("stoke_jobs{state=\"running\"} 3"), "{text}");
        assert!(text.contains("# HELP stoke_journal_commit_seconds"), "{text}");
    }
}
