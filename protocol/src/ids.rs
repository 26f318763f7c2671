//! The names of things: newtypes over integers, so that a step is never passed for a generation. Nothing here has behaviour beyond
//! printing and parsing.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// A 128-bit cluster identity, drawn once when the certificate authority is made; printed as 32 hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ClusterId(pub [u8; 16]);

/// A BLAKE3 digest; printed as 64 hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Digest(pub [u8; 32]);

/// A fast checksum over the bits of a replica's numbers: against faults, not against people; printed as 16 hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default, Serialize, Deserialize)]
pub struct Fingerprint(pub u64);

/// What could not be parsed as an id, and what it should look like.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{input:?} is not {expected}")]
pub struct IdError {
    pub input: String,
    pub expected: &'static str,
}

/// A number with a meaning. `$prefix` is what people read and type ("job-7"); bare digits parse too.
macro_rules! number_id {
    ($(#[$doc:meta])* $name:ident, $int:ty, $prefix:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default, Serialize, Deserialize)]
        pub struct $name(pub $int);

        impl $name {
            /// The id after this one.
            #[must_use]
            pub fn next(self) -> Self {
                Self(self.0 + 1)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!($prefix, "{}"), self.0)
            }
        }

        impl FromStr for $name {
            type Err = IdError;
            fn from_str(input: &str) -> Result<Self, IdError> {
                let digits = input.strip_prefix($prefix).unwrap_or(input);
                digits.parse().map(Self).map_err(|_| IdError {
                    input: input.to_owned(),
                    expected: concat!("an id like ", $prefix, "7"),
                })
            }
        }
    };
}

number_id!(/** A machine with an agent; given by the coordinator when it joins. */ NodeId, u64, "node-");
number_id!(/** A submitted job. */ JobId, u64, "job-");
number_id!(/** A join token; the secret is never part of it. */ TokenId, u64, "token-");
number_id!(/** A coordinator's life: grows by one at each start, fences older coordinators (I1). */ Epoch, u64, "epoch-");
number_id!(/** One membership of a job's ranks; fences everything stale (I2). */ Generation, u64, "g");
number_id!(/** A count of committed optimizer steps. */ Step, u64, "step-");
number_id!(/** One worker process of a job. */ Rank, u32, "rank-");
number_id!(/** A start of an agent process: messages of an older incarnation are dropped (I5). */ Incarnation, u64, "i");
number_id!(/** Position in the journal; the first entry is 1. */ LogIndex, u64, "log-");

/// Slots of ranks that play environments for those that learn begin here: no job has so many members.
pub const ROLLOUT_SLOTS: u32 = 1_000;

impl Rank {
    /// Whether it plays environments, and is no member.
    pub fn is_rollout(self) -> bool {
        self.0 >= ROLLOUT_SLOTS
    }
}

/// What fences the frames of ranks from each other: a generation, and what its members have made of it while the coordinator was away. Ballot 0
/// is the coordinator's own membership; higher ones are drawn by members (`message::peer::Proposal`).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default, Serialize, Deserialize)]
pub struct Term {
    pub generation: Generation,
    pub ballot: u32,
}

impl fmt::Display for Term {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.ballot {
            0 => self.generation.fmt(f),
            ballot => write!(f, "{}+{ballot}", self.generation),
        }
    }
}

impl fmt::Display for ClusterId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_hex(f, &self.0)
    }
}

impl fmt::Debug for ClusterId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ClusterId({self})")
    }
}

impl FromStr for ClusterId {
    type Err = IdError;
    fn from_str(input: &str) -> Result<Self, IdError> {
        parse_hex(input)
            .map(Self)
            .ok_or(IdError { input: input.to_owned(), expected: "a cluster id of 32 hexadecimal digits" })
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_hex(f, &self.0)
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Digest({self})")
    }
}

impl FromStr for Digest {
    type Err = IdError;
    fn from_str(input: &str) -> Result<Self, IdError> {
        parse_hex(input)
            .map(Self)
            .ok_or(IdError { input: input.to_owned(), expected: "a digest of 64 hexadecimal digits" })
    }
}

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

fn write_hex(f: &mut fmt::Formatter<'_>, bytes: &[u8]) -> fmt::Result {
    bytes.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
}

/// Exactly `2 * N` hexadecimal digits, or nothing.
pub fn parse_hex<const N: usize>(input: &str) -> Option<[u8; N]> {
    let digits = input.as_bytes();
    if digits.len() != 2 * N {
        return None;
    }
    let mut bytes = [0; N];
    for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
        let high = char::from(pair[0]).to_digit(16)?;
        let low = char::from(pair[1]).to_digit(16)?;
        *byte = (high * 16 + low) as u8;
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_print_and_parse_back() {
        assert_eq!(JobId(7).to_string(), "job-7");
        assert_eq!("job-7".parse(), Ok(JobId(7)));
        assert_eq!("7".parse(), Ok(JobId(7)));
        assert!("job-x".parse::<JobId>().is_err());
        let cluster = ClusterId([0xab; 16]);
        assert_eq!(cluster.to_string().parse(), Ok(cluster));
        assert!("abc".parse::<ClusterId>().is_err());
    }
}
