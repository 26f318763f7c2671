//! The section `[serve.replicas]`: between which bounds a model that is served has as many jobs as its requests need. Owns its keys, defaults and checks.

use serde::{Deserialize, Serialize};

use super::Span;

/// Of a model: more would be more than a cluster has places for.
pub const REPLICAS_MAX: u32 = 1_000;
/// What is remembered of a model's requests.
const WINDOW_MAX: Span = Span(3_600_000);
const FIRST_TOKEN_MAX: Span = Span(60_000);

#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Replicas {
    #[serde(default = "super::one")]
    pub min: u32,
    pub max: u32,
    /// Requests that one replica is to have, those that wait included.
    #[serde(default = "default_requests")]
    pub requests: u32,
    /// 99 of 100 answers are to have their first token within this.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub first_token: Option<Span>,
    /// So long there must have been too many requests before there are more replicas.
    #[serde(default = "default_grow_after")]
    pub grow_after: Span,
    /// So long fewer must have been enough before there are fewer.
    #[serde(default = "default_shrink_after")]
    pub shrink_after: Span,
}

fn default_requests() -> u32 {
    16
}

fn default_grow_after() -> Span {
    Span(10_000)
}

fn default_shrink_after() -> Span {
    Span(60_000)
}

impl Replicas {
    /// The key that is wrong, and what to write instead. `most`: requests that a replica takes at all.
    pub(super) fn check(&self, most: u32) -> Result<(), (&'static str, String)> {
        let Self { min, max, requests, first_token, grow_after, shrink_after } = *self;
        if !(1..=REPLICAS_MAX).contains(&max) {
            return Err(("max", format!("max = {max}: use 1 to {REPLICAS_MAX}")));
        }
        if !(1..=max).contains(&min) {
            return Err(("min", format!("min = {min} with max = {max}: use 1 to {max}")));
        }
        if !(1..=most).contains(&requests) {
            return Err((
                "requests",
                format!("requests = {requests}: a replica takes up to {most} (running and waiting), use 1 to {most}"),
            ));
        }
        if first_token.is_some_and(|target| !(Span(1)..=FIRST_TOKEN_MAX).contains(&target)) {
            return Err(("first_token", format!("first_token: use \"1ms\" to \"{FIRST_TOKEN_MAX}\"")));
        }
        for (key, window) in [("grow_after", grow_after), ("shrink_after", shrink_after)] {
            if window > WINDOW_MAX {
                return Err((key, format!("{key} = \"{window}\": use up to \"{WINDOW_MAX}\"")));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use crate::spec::JobSpec;

    fn parse(keys: &str) -> Result<JobSpec, String> {
        let text = format!("name = \"m\"\n[serve]\nmodel = \"/m\"\nreplicas = {{ {keys} }}\n");
        JobSpec::parse(&text).map_err(|error| error.to_string())
    }

    #[test]
    fn bounds_have_defaults_and_read_back_as_they_are_written() {
        let spec = parse("max = 4, first_token = \"2s\"").unwrap();
        let text = spec.to_toml();
        let lines = [
            "min = 1",
            "max = 4",
            "requests = 16",
            "first_token = \"2s\"",
            "grow_after = \"10s\"",
            "shrink_after = \"1m\"",
        ];
        assert!(lines.iter().all(|line| text.contains(line)), "{text}");
        assert_eq!(JobSpec::parse(&text).unwrap(), spec);
    }

    #[test]
    fn bounds_that_cannot_be_are_refused() {
        for (keys, words) in [
            ("min = 1", "missing field `max`"),
            ("max = 0", "max = 0: use 1 to 1000"),
            ("min = 3, max = 2", "min = 3 with max = 2: use 1 to 2"),
            ("max = 2, requests = 289", "takes up to 288 (running and waiting)"),
            ("max = 2, first_token = \"2h\"", "\"1ms\" to \"1m\""),
            ("max = 2, grow_after = \"2h\"", "grow_after = \"2h\": use up to \"1h\""),
            ("max = 2, shrink_after = 5", "expected a string"),
            ("max = 2, minimum = 1", "unknown field"),
        ] {
            assert!(parse(keys).is_err_and(|error| error.contains(words)), "{keys}: {:?}", parse(keys));
        }
    }
}
