//! What arrived: headers with their values as the chunks in which they came. Owns reading values across chunk boundaries, without a copy
//! of the whole; knows nothing of operations.

use bytes::Bytes;
use stoke_protocol::message::peer::TensorHeader;
use tokio::sync::OwnedSemaphorePermit;

use super::sum::{NARROW_BYTES, VALUE_BYTES, add_bytes, add_narrow, copy_bytes, copy_narrow};

/// A received header with its values.
#[derive(Debug)]
pub struct Frame {
    pub header: TensorHeader,
    pub values: Rope,
    /// Its place in the sender's receive window, given back when the frame is dropped. None where there is no window.
    pub _place: Option<OwnedSemaphorePermit>,
}

/// Values as they arrived: a few chunks of bytes, cut anywhere.
#[derive(Debug, Default)]
pub struct Rope {
    chunks: Vec<Bytes>,
    /// The first so many are bf16, the others f32.
    narrow: usize,
}

/// A place in a rope.
pub struct Cursor<'a> {
    head: &'a [u8],
    rest: std::slice::Iter<'a, Bytes>,
    /// The next so many values are bf16.
    narrow: usize,
}

/// What is done with values from bytes: of f32, of bf16.
type Operations = (fn(&mut [f32], &[u8]), fn(&mut [f32], &[u8]));

impl Rope {
    /// Values that lie in one piece.
    pub fn whole(bytes: Bytes) -> Self {
        Self { chunks: vec![bytes], narrow: 0 }
    }

    /// Adds the next bytes.
    pub fn push(&mut self, chunk: Bytes) {
        self.chunks.push(chunk);
    }

    /// The same, of which the first so many values are bf16.
    pub fn narrow(self, values: usize) -> Self {
        Self { narrow: values, ..self }
    }

    pub fn cursor(&self) -> Cursor<'_> {
        Cursor { head: &[], rest: self.chunks.iter(), narrow: self.narrow }
    }
}

impl<'a> Cursor<'a> {
    /// Over values that lie in one piece.
    pub fn of(bytes: &'a [u8]) -> Self {
        Self { head: bytes, rest: [].iter(), narrow: 0 }
    }

    /// `out[i] = next[i]`
    pub fn copy_to(&mut self, out: &mut [f32]) {
        self.read(out, (copy_bytes, copy_narrow));
    }

    /// `out[i] += next[i]`
    pub fn add_to(&mut self, out: &mut [f32]) {
        self.read(out, (add_bytes, add_narrow));
    }

    fn read(&mut self, out: &mut [f32], (wide, narrow): Operations) {
        let (narrow_out, wide_out) = out.split_at_mut(self.narrow.min(out.len()));
        self.narrow -= narrow_out.len();
        self.read_each::<NARROW_BYTES>(narrow_out, narrow);
        self.read_each::<VALUE_BYTES>(wide_out, wide);
    }

    /// Values of so many bytes each.
    fn read_each<const BYTES: usize>(&mut self, mut out: &mut [f32], operation: fn(&mut [f32], &[u8])) {
        while !out.is_empty() {
            self.refill();
            let whole = (self.head.len() / BYTES).min(out.len());
            if whole == 0 {
                operation(&mut out[..1], &self.cut_value::<BYTES>());
                out = &mut out[1..];
                continue;
            }
            let (bytes, head) = self.head.split_at(whole * BYTES);
            self.head = head;
            let (now, later) = out.split_at_mut(whole);
            operation(now, bytes);
            out = later;
        }
    }

    /// A value whose bytes are spread over chunks.
    fn cut_value<const BYTES: usize>(&mut self) -> [u8; BYTES] {
        let mut value = [0; BYTES];
        for byte in &mut value {
            self.refill();
            *byte = self.head[0];
            self.head = &self.head[1..];
        }
        value
    }

    fn refill(&mut self) {
        while self.head.is_empty() {
            self.head = self.rest.next().expect("a frame has the bytes that its header counts");
        }
    }
}

#[cfg(test)]
mod tests {
    use rand::{Rng, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    use super::super::sum::as_bytes;
    use super::*;

    #[test]
    fn values_are_read_as_they_were_written_however_they_were_cut() {
        let mut rng = ChaCha8Rng::seed_from_u64(3);
        for _ in 0..500 {
            let values: Vec<f32> = (0..rng.random_range(0..60)).map(|_| rng.random::<f32>()).collect();
            let (mut rope, mut bytes) = (Rope::default(), Bytes::copy_from_slice(as_bytes(&values)));
            let chunk_max = rng.random_range(1..50);
            while !bytes.is_empty() {
                rope.push(bytes.split_to(rng.random_range(0..=chunk_max.min(bytes.len()))));
            }
            let mut sum: Vec<f32> = values.iter().map(|value| value * 3.0).collect();
            let expected: Vec<f32> = sum.iter().zip(&values).map(|(sum, value)| sum + value).collect();
            rope.cursor().add_to(&mut sum);
            assert_eq!(sum, expected);
            // In two goes: a cursor keeps its place.
            let (mut copy, mut cursor) = (vec![0.0; values.len()], rope.cursor());
            let (first, second) = copy.split_at_mut(values.len() / 3);
            cursor.copy_to(first);
            cursor.copy_to(second);
            assert_eq!(copy, values);
        }
    }
}
