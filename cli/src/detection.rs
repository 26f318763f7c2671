//! `--detection`: how soon a silent node is lost, by name. The figures are the coordinator's.

use stoke_coordinator::state::liveness::Timings;

/// How soon a silent node is lost.
#[derive(clap::ValueEnum, Clone, Copy, PartialEq, Eq, Debug)]
pub enum Detection {
    Default,
    Fast,
}

impl Detection {
    pub fn name(self) -> &'static str {
        match self {
            Self::Default => "default",
            Self::Fast => "fast",
        }
    }

    pub fn timings(self) -> Timings {
        match self {
            Self::Default => Timings::default(),
            Self::Fast => Timings::fast(),
        }
    }
}
