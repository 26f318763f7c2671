//! Prometheus's text format, for numbers of models that are kept as they are sent: in coordinator and gateway alike. Owns the shape of the text; names
//! and help stand in each role's `metrics.rs`.

use std::fmt::Write;

use crate::message::load::{FIRST_TOKEN_MS, FirstTokens};

/// What a number is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    Counter,
    Gauge,
    Histogram,
}

/// A text that grows.
#[derive(Default)]
pub struct Exposition(String);

impl Exposition {
    /// Before the values of a name.
    pub fn family(&mut self, kind: Kind, name: &str, help: &str) {
        let kind = match kind {
            Kind::Counter => "counter",
            Kind::Gauge => "gauge",
            Kind::Histogram => "histogram",
        };
        self.line(format_args!("# HELP {name} {help}\n# TYPE {name} {kind}"));
    }

    /// Of the role.
    pub fn plain(&mut self, name: &str, value: u64) {
        self.line(format_args!("{name} {value}"));
    }

    /// Of one model. Names of models have no character that would have to be escaped.
    pub fn value(&mut self, name: &str, model: &str, value: u64) {
        self.line(format_args!("{name}{{model=\"{model}\"}} {value}"));
    }

    /// With labels whose values have no character that would have to be escaped.
    pub fn labelled(&mut self, name: &str, labels: &[(&str, &str)], value: f64) {
        let labels: Vec<String> = labels.iter().map(|(label, value)| format!("{label}=\"{value}\"")).collect();
        self.line(format_args!("{name}{{{}}} {value}", labels.join(",")));
    }

    /// In seconds, as all times of Prometheus.
    pub fn times(&mut self, name: &str, model: &str, times: &FirstTokens) {
        let mut below = 0u64;
        for (most_ms, count) in FIRST_TOKEN_MS.iter().zip(times.counts) {
            below = below.saturating_add(count);
            let most = f64::from(*most_ms) / 1_000.0;
            self.line(format_args!("{name}_bucket{{model=\"{model}\",le=\"{most}\"}} {below}"));
        }
        let count = times.count();
        self.line(format_args!("{name}_bucket{{model=\"{model}\",le=\"+Inf\"}} {count}"));
        let sum = times.sum_ms as f64 / 1_000.0;
        self.line(format_args!("{name}_sum{{model=\"{model}\"}} {sum}\n{name}_count{{model=\"{model}\"}} {count}"));
    }

    pub fn text(self) -> String {
        self.0
    }

    fn line(&mut self, line: std::fmt::Arguments<'_>) {
        writeln!(self.0, "{line}").expect("text grows");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn histograms_add_up_to_their_count() {
        let (mut text, mut times) = (Exposition::default(), FirstTokens::default());
        [3, 7, 90_000].into_iter().for_each(|ms| times.add(ms));
        text.family(Kind::Histogram, "t", "Help");
        text.times("t", "m", &times);
        let text = text.text();
        assert!(
            text.starts_with("# HELP t Help\n# TYPE t histogram\nt_bucket{model=\"m\",le=\"0.005\"} 1\n"),
            "{text}"
        );
        assert!(text.contains("t_bucket{model=\"m\",le=\"60\"} 2\nt_bucket{model=\"m\",le=\"+Inf\"} 3\n"), "{text}");
        assert!(text.ends_with("t_sum{model=\"m\"} 90.01\nt_count{model=\"m\"} 3\n"), "{text}");
    }
}
