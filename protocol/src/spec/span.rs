//! A length of time as people write it: `"2s"`. Owns its units.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Milliseconds, written as `"500ms"`, `"2s"`, `"10m"` or `"1h"`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Span(pub u64);

/// The first that ends a text is its unit: `ms` before `s` and `m`.
const UNITS: [(&str, u64); 4] = [("ms", 1), ("s", 1_000), ("m", 60_000), ("h", 3_600_000)];

impl FromStr for Span {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let unit = UNITS.iter().find_map(|(unit, ms)| Some((text.trim().strip_suffix(unit)?, *ms)));
        let count = unit.and_then(|(count, ms)| Some((count.trim_end().parse::<u64>().ok()?, ms)));
        let ms = count.and_then(|(count, ms)| count.checked_mul(ms));
        ms.map(Self).ok_or_else(|| format!("{text:?} is not a time: write for example \"500ms\", \"2s\" or \"10m\""))
    }
}

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let largest = UNITS.iter().rev().find(|(_, ms)| self.0 >= *ms && self.0.is_multiple_of(*ms));
        let (unit, ms) = largest.unwrap_or(&UNITS[0]);
        write!(f, "{}{unit}", self.0 / ms)
    }
}

impl Serialize for Span {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Span {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_read_back_as_they_are_written() {
        for (text, ms) in [("500ms", 500), ("2s", 2_000), ("90s", 90_000), ("10m", 600_000), ("1h", 3_600_000)] {
            assert_eq!((text.parse::<Span>(), Span(ms).to_string()), (Ok(Span(ms)), text.to_owned()));
        }
        assert_eq!(Span(0).to_string(), "0ms");
        for text in ["", "2", "s", "-1s", "2.5s", "99999999999999999h"] {
            assert!(text.parse::<Span>().is_err_and(|problem| problem.contains("\"2s\"")), "{text}");
        }
    }
}
