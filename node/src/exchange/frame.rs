//! Frames of a bulk stream: a length (u32, little-endian), a header of that many bytes, then the header's values as raw bytes.
//! Turns received chunks into frames without copying the values; knows nothing of operations.

use std::collections::VecDeque;

use bytes::Bytes;
use stoke_protocol::codec::{self, CodecError, FrameCap};
use stoke_protocol::message::peer::TensorHeader;
use tokio::sync::OwnedSemaphorePermit;

use super::plan::PIECE_VALUES_MAX;
use super::sum::{VALUE_BYTES, add_bytes, copy_bytes};

const LENGTH_BYTES: usize = 4;

/// A received header with its values.
#[derive(Debug)]
pub struct Frame {
    pub header: TensorHeader,
    pub values: Rope,
    /// Its place in the sender's receive window, given back when the frame is dropped. None where there is no window.
    pub place: Option<OwnedSemaphorePermit>,
}

/// Values as they arrived: a few chunks of bytes, cut anywhere.
#[derive(Debug, Default)]
pub struct Rope(Vec<Bytes>);

/// A place in a rope.
pub struct Cursor<'a> {
    head: &'a [u8],
    rest: std::slice::Iter<'a, Bytes>,
}

/// Cuts a stream of chunks into frames.
#[derive(Default)]
pub struct FrameReader {
    chunks: VecDeque<Bytes>,
    /// Bytes in `chunks`.
    bytes: usize,
    header: Option<TensorHeader>,
}

/// Why a peer's bytes are not frames.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    #[error(transparent)]
    Codec(#[from] CodecError),
    #[error("frame of {count} values is over the cap of {PIECE_VALUES_MAX}")]
    TooLarge { count: u32 },
    #[error("stream ended inside a frame")]
    Cut,
}

/// The bytes that go before the values.
pub fn encode(header: &TensorHeader) -> Result<Bytes, CodecError> {
    let payload = codec::encode(header, FrameCap::Header)?;
    let mut frame = Vec::with_capacity(LENGTH_BYTES + payload.len());
    frame.extend_from_slice(&(payload.len() as u32).to_le_bytes());
    frame.extend_from_slice(&payload);
    Ok(frame.into())
}

impl FrameReader {
    /// Takes bytes in stream order.
    pub fn push(&mut self, chunk: Bytes) {
        self.bytes += chunk.len();
        if !chunk.is_empty() {
            self.chunks.push_back(chunk);
        }
    }

    /// The next whole frame, if its bytes are all there.
    pub fn next(&mut self) -> Result<Option<Frame>, FrameError> {
        let header = match self.header {
            Some(header) => header,
            None => {
                let Some(header) = self.header()? else { return Ok(None) };
                *self.header.insert(header)
            }
        };
        let bytes = header.count as usize * VALUE_BYTES;
        if self.bytes < bytes {
            return Ok(None);
        }
        self.header = None;
        Ok(Some(Frame { header, values: self.take(bytes), place: None }))
    }

    /// The stream ended: an error if it did so inside a frame.
    pub fn end(&self) -> Result<(), FrameError> {
        if self.bytes == 0 && self.header.is_none() { Ok(()) } else { Err(FrameError::Cut) }
    }

    fn header(&mut self) -> Result<Option<TensorHeader>, FrameError> {
        let mut buffer = [0u8; LENGTH_BYTES + FrameCap::Header.bytes()];
        if self.bytes < LENGTH_BYTES {
            return Ok(None);
        }
        self.peek(&mut buffer[..LENGTH_BYTES]);
        let length = u32::from_le_bytes(buffer[..LENGTH_BYTES].try_into().expect("four bytes")) as usize;
        if length > FrameCap::Header.bytes() {
            return Err(CodecError::TooLarge { bytes: length, cap: FrameCap::Header.bytes() }.into());
        }
        if self.bytes < LENGTH_BYTES + length {
            return Ok(None);
        }
        self.peek(&mut buffer[..LENGTH_BYTES + length]);
        let header: TensorHeader = codec::decode(&buffer[LENGTH_BYTES..LENGTH_BYTES + length], FrameCap::Header)?;
        if header.count as usize > PIECE_VALUES_MAX {
            return Err(FrameError::TooLarge { count: header.count });
        }
        self.take(LENGTH_BYTES + length);
        Ok(Some(header))
    }

    /// Copies the next bytes, which are there, and leaves them.
    fn peek(&self, mut out: &mut [u8]) {
        for chunk in &self.chunks {
            let count = chunk.len().min(out.len());
            let (now, later) = out.split_at_mut(count);
            now.copy_from_slice(&chunk[..count]);
            out = later;
        }
    }

    /// Takes the next bytes, which are there.
    fn take(&mut self, mut count: usize) -> Rope {
        self.bytes -= count;
        let mut parts = Vec::with_capacity(8);
        while count > 0 {
            let chunk = self.chunks.front_mut().expect("counted before");
            if chunk.len() > count {
                parts.push(chunk.split_to(count));
                break;
            }
            count -= chunk.len();
            parts.extend(self.chunks.pop_front());
        }
        Rope(parts)
    }
}

impl Rope {
    /// Values that lie in one piece.
    pub fn whole(bytes: Bytes) -> Self {
        Self(vec![bytes])
    }

    pub fn cursor(&self) -> Cursor<'_> {
        Cursor { head: &[], rest: self.0.iter() }
    }
}

impl Cursor<'_> {
    /// `out[i] = next[i]`
    pub fn copy_to(&mut self, out: &mut [f32]) {
        self.read(out, copy_bytes);
    }

    /// `out[i] += next[i]`
    pub fn add_to(&mut self, out: &mut [f32]) {
        self.read(out, add_bytes);
    }

    fn read(&mut self, mut out: &mut [f32], op: fn(&mut [f32], &[u8])) {
        while !out.is_empty() {
            self.refill();
            let whole = (self.head.len() / VALUE_BYTES).min(out.len());
            if whole == 0 {
                op(&mut out[..1], &self.cut_value());
                out = &mut out[1..];
                continue;
            }
            let (bytes, head) = self.head.split_at(whole * VALUE_BYTES);
            self.head = head;
            let (now, later) = out.split_at_mut(whole);
            op(now, bytes);
            out = later;
        }
    }

    /// A value whose bytes are spread over chunks.
    fn cut_value(&mut self) -> [u8; VALUE_BYTES] {
        let mut value = [0; VALUE_BYTES];
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
    use stoke_protocol::ids::{Generation, Step};
    use stoke_protocol::lanes::Subtree;
    use stoke_protocol::message::peer::Part;

    use super::super::sum::as_bytes;
    use super::*;

    fn header(count: u32) -> TensorHeader {
        let part = Part::Partial(Subtree { start: 4, len: 2 });
        TensorHeader { generation: Generation(3), step: Step(300), part, offset: 70_000, count }
    }

    #[test]
    fn frames_come_out_as_they_went_in_however_the_stream_is_cut() {
        let mut rng = ChaCha8Rng::seed_from_u64(3);
        for _ in 0..300 {
            let frames: Vec<Vec<f32>> = (0..rng.random_range(1..5))
                .map(|_| (0..rng.random_range(0..50)).map(|_| rng.random::<f32>()).collect())
                .collect();
            let mut stream = Vec::new();
            for values in &frames {
                stream.extend_from_slice(&encode(&header(values.len() as u32)).unwrap());
                stream.extend_from_slice(as_bytes(values));
            }
            let mut stream = Bytes::from(stream);
            let (mut reader, mut found) = (FrameReader::default(), Vec::new());
            while !stream.is_empty() {
                let cut_max = rng.random_range(1..100).min(stream.len());
                let cut = rng.random_range(0..=cut_max);
                reader.push(stream.split_to(cut));
                while let Some(frame) = reader.next().unwrap() {
                    found.push(frame);
                }
            }
            reader.end().unwrap();
            assert_eq!(found.len(), frames.len());
            for (frame, values) in found.iter().zip(&frames) {
                assert_eq!(frame.header, header(values.len() as u32));
                let mut sum: Vec<f32> = values.iter().map(|value| value * 3.0).collect();
                let expected: Vec<f32> = sum.iter().zip(values).map(|(sum, value)| sum + value).collect();
                frame.values.cursor().add_to(&mut sum);
                assert_eq!(sum, expected);
                // In two goes: a cursor keeps its place inside a value's neighbours.
                let (mut copy, mut cursor) = (vec![0.0; values.len()], frame.values.cursor());
                let (first, second) = copy.split_at_mut(values.len() / 3);
                cursor.copy_to(first);
                cursor.copy_to(second);
                assert_eq!(&copy, values);
            }
        }
    }

    #[test]
    fn frames_over_the_cap_and_cut_streams_are_errors() {
        let mut reader = FrameReader::default();
        reader.push(encode(&header(PIECE_VALUES_MAX as u32 + 1)).unwrap());
        assert!(matches!(reader.next(), Err(FrameError::TooLarge { .. })));
        let mut reader = FrameReader::default();
        reader.push(Bytes::from_static(&[0xff; 4]));
        assert!(matches!(reader.next(), Err(FrameError::Codec(CodecError::TooLarge { .. }))));
        let mut reader = FrameReader::default();
        reader.push(encode(&header(2)).unwrap());
        reader.push(Bytes::from_static(&[0; 7]));
        assert!(reader.next().unwrap().is_none());
        assert!(matches!(reader.end(), Err(FrameError::Cut)));
    }
}
