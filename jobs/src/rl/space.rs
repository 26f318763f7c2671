//! Which values an observation or an action can have: gymnasium's `Discrete` and `Box` (gymnasium 1.4.0, `spaces/discrete.py`, `spaces/box.py`).
//! Observations of other kinds are flattened before they come here; actions of other kinds are refused where an environment is made.

/// The set of values of one env.
#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase", tag = "kind", deny_unknown_fields)]
pub enum Space {
    /// One of the whole numbers `0..n`.
    Discrete { n: u32 },
    /// A vector of numbers, each between its bounds; a bound may be infinite. `low` and `high` have the same length.
    Box { low: Vec<f32>, high: Vec<f32> },
}

impl Space {
    /// Numbers that one value takes as a vector: those of a box, or one a choice (one-hot, or logits of a policy).
    pub fn len(&self) -> usize {
        match self {
            Space::Discrete { n } => *n as usize,
            Space::Box { low, .. } => low.len(),
        }
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// A box with the same bounds, once with a minus, as most environments have.
    pub(crate) fn symmetric(high: &[f32]) -> Self {
        Space::Box { low: high.iter().map(|bound| -bound).collect(), high: high.to_vec() }
    }
}
