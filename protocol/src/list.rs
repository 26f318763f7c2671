//! A vector that a peer cannot make us over-allocate: decoding starts empty, grows as elements really arrive, and stops when the frame's
//! memory budget is spent (I31: decoding n bytes allocates at most 2n + 64 KiB). Owns the budget; never touches the wire format itself
//! (a `List` is encoded exactly as a `Vec`).

use std::cell::Cell;
use std::fmt;
use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};

use serde::de::{Error, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

thread_local! {
    /// Bytes that lists may still allocate in the decode that runs on this thread.
    static BUDGET: Cell<usize> = const { Cell::new(0) };
}

/// Runs `decode` with a fresh memory budget for the lists that it meets.
pub(crate) fn with_budget<T>(bytes: usize, decode: impl FnOnce() -> T) -> T {
    BUDGET.set(bytes);
    let decoded = decode();
    BUDGET.set(0);
    decoded
}

/// A sequence in a wire message. Use it instead of `Vec` wherever a peer chooses the length.
#[derive(Clone, PartialEq, Eq)]
pub struct List<T>(pub Vec<T>);

impl<T> Default for List<T> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<T: fmt::Debug> fmt::Debug for List<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl<T> Deref for List<T> {
    type Target = Vec<T>;
    fn deref(&self) -> &Vec<T> {
        &self.0
    }
}

impl<T> DerefMut for List<T> {
    fn deref_mut(&mut self) -> &mut Vec<T> {
        &mut self.0
    }
}

impl<T> From<Vec<T>> for List<T> {
    fn from(items: Vec<T>) -> Self {
        Self(items)
    }
}

impl<T> FromIterator<T> for List<T> {
    fn from_iter<I: IntoIterator<Item = T>>(items: I) -> Self {
        Self(items.into_iter().collect())
    }
}

impl<T> IntoIterator for List<T> {
    type Item = T;
    type IntoIter = std::vec::IntoIter<T>;
    fn into_iter(self) -> Self::IntoIter {
        self.0.into_iter()
    }
}

impl<T: Serialize> Serialize for List<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.0.serialize(serializer)
    }
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for List<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_seq(Grow(PhantomData))
    }
}

struct Grow<T>(PhantomData<T>);

impl<'de, T: Deserialize<'de>> Visitor<'de> for Grow<T> {
    type Value = List<T>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a sequence")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut sequence: A) -> Result<List<T>, A::Error> {
        let mut items = Vec::new();
        while let Some(item) = sequence.next_element()? {
            if items.len() == items.capacity() {
                // Growing by half keeps the copy cost linear and the charge exact.
                let more = (items.capacity() / 2).max(4);
                charge::<A::Error>(more * size_of::<T>())?;
                items.reserve_exact(more);
            }
            items.push(item);
        }
        Ok(List(items))
    }
}

fn charge<E: Error>(bytes: usize) -> Result<(), E> {
    let left = BUDGET.get();
    let Some(rest) = left.checked_sub(bytes) else {
        return Err(E::custom("frame decodes to more memory than its size allows"));
    };
    BUDGET.set(rest);
    Ok(())
}
