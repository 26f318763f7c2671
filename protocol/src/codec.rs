//! Frames: what turns a message into bytes and back. The only file that knows bincode (pinned, unmaintained: see deny.toml), so that it can
//! be replaced in one place. Owns the version byte and the size caps; never touches a socket.
//!
//! A payload is one version byte, then the message. On a stream each payload is preceded by its length as a little-endian u32 (transport.rs).
//!
//! I31: decoding n bytes allocates at most 2n + 64 KiB and never panics. Strings and byte strings are copied when they were found in the frame
//! (`borrowed.rs`), sequences are bounded by the budget of [`crate::list::List`]; a plain `Vec` of anything but bytes does not belong in a wire
//! message. A limit of bincode's own would not do: it counts eight bytes for a number that takes one.

use std::marker::PhantomData;

use bincode::error::{DecodeError, EncodeError};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::borrowed::Borrowed;

/// Grows with any change of any message: peers of another version are told so and refused, not misread.
pub const PROTOCOL_VERSION: u8 = 10;

/// Bytes on top of twice the frame that a decode may allocate.
const SLACK_BYTES: usize = 64 * 1024;

/// The planes have caps of their own, so that a large answer cannot stall a heartbeat.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FrameCap {
    /// Session control frames and heartbeats: 64 KiB. More would delay the next heartbeat on a slow link.
    Control,
    /// Request and reply streams of clients and nodes: 1 MiB. More belongs in several frames.
    Request,
    /// What the ranks of a serving gang are told of a batch: 16 MiB, for the histories that repetition penalties need.
    Batch,
    /// Headers of bulk transfers: 256 bytes. They are read on the hot path into a fixed buffer.
    Header,
}

impl FrameCap {
    /// The largest payload in bytes, version byte included.
    pub const fn bytes(self) -> usize {
        match self {
            Self::Control => 64 * 1024,
            Self::Request => 1024 * 1024,
            Self::Batch => 16 * 1024 * 1024,
            Self::Header => 256,
        }
    }
}

/// Why a frame was refused. A peer that causes one of these is disconnected with a code.
#[derive(Debug, thiserror::Error)]
pub enum CodecError {
    #[error("frame of {bytes} bytes is over the cap of {cap} bytes")]
    TooLarge { bytes: usize, cap: usize },
    #[error(
        "peer speaks protocol version {theirs}, this binary speaks {PROTOCOL_VERSION}: run the same stoke release on both sides"
    )]
    Version { theirs: u8 },
    #[error("frame is empty")]
    Empty,
    #[error("frame has {bytes} bytes after its message")]
    Trailing { bytes: usize },
    #[error("decode frame")]
    Malformed(#[source] Box<DecodeError>),
    #[error("encode frame")]
    Unencodable(#[source] Box<EncodeError>),
}

/// The payload of one frame.
pub fn encode<T: Serialize>(message: &T, cap: FrameCap) -> Result<Vec<u8>, CodecError> {
    let mut payload = Vec::with_capacity(128);
    payload.push(PROTOCOL_VERSION);
    bincode::serde::encode_into_std_write(message, &mut payload, bincode::config::standard())
        .map_err(|error| CodecError::Unencodable(Box::new(error)))?;
    if payload.len() > cap.bytes() {
        return Err(CodecError::TooLarge { bytes: payload.len(), cap: cap.bytes() });
    }
    Ok(payload)
}

/// The message of one payload, whole: bytes after it are an error.
pub fn decode<T: DeserializeOwned>(payload: &[u8], cap: FrameCap) -> Result<T, CodecError> {
    if payload.len() > cap.bytes() {
        return Err(CodecError::TooLarge { bytes: payload.len(), cap: cap.bytes() });
    }
    let (&version, body) = payload.split_first().ok_or(CodecError::Empty)?;
    if version != PROTOCOL_VERSION {
        return Err(CodecError::Version { theirs: version });
    }
    decode_within(body)
}

/// Bytes for the journal: no version byte (the journal carries its own) and no cap but memory's.
pub fn encode_record<T: Serialize>(record: &T) -> Result<Vec<u8>, CodecError> {
    bincode::serde::encode_to_vec(record, bincode::config::standard())
        .map_err(|error| CodecError::Unencodable(Box::new(error)))
}

/// The opposite of [`encode_record`], for bytes whose checksum was verified.
pub fn decode_record<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, CodecError> {
    let decode = || bincode::serde::decode_from_slice(bytes, bincode::config::standard());
    let (record, read) =
        crate::list::with_budget(usize::MAX, decode).map_err(|error| CodecError::Malformed(Box::new(error)))?;
    whole(record, bytes.len() - read)
}

fn decode_within<T: DeserializeOwned>(body: &[u8]) -> Result<T, CodecError> {
    let decode = || bincode::serde::seed_decode_from_slice(Borrowed(PhantomData), body, bincode::config::standard());
    let decoded = crate::list::with_budget(2 * body.len() + SLACK_BYTES, decode);
    let (message, used) = decoded.map_err(|error| CodecError::Malformed(Box::new(error)))?;
    whole(message, body.len() - used)
}

fn whole<T>(message: T, rest: usize) -> Result<T, CodecError> {
    if rest > 0 { Err(CodecError::Trailing { bytes: rest }) } else { Ok(message) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::list::List;

    #[test]
    fn frames_round_trip_and_refuse_what_is_not_theirs() {
        let payload = encode(&(7u64, "lane".to_owned()), FrameCap::Control).unwrap();
        assert_eq!(decode::<(u64, String)>(&payload, FrameCap::Control).unwrap(), (7, "lane".to_owned()));
        let mut other = payload.clone();
        other[0] = PROTOCOL_VERSION + 1;
        assert!(matches!(decode::<(u64, String)>(&other, FrameCap::Control), Err(CodecError::Version { .. })));
        let mut longer = payload.clone();
        longer.push(0);
        assert!(matches!(decode::<(u64, String)>(&longer, FrameCap::Control), Err(CodecError::Trailing { bytes: 1 })));
        for cut in 0..payload.len() {
            assert!(decode::<(u64, String)>(&payload[..cut], FrameCap::Control).is_err());
        }
    }

    #[test]
    fn a_frame_cannot_claim_more_than_it_carries() {
        // A list of 2^32 elements, a string of 2^40 bytes: both in frames of a few bytes.
        let list = [&[PROTOCOL_VERSION, 252][..], &u32::MAX.to_le_bytes()].concat();
        assert!(decode::<List<[u64; 8]>>(&list, FrameCap::Control).is_err());
        let text = [&[PROTOCOL_VERSION, 253][..], &(1u64 << 40).to_le_bytes()].concat();
        assert!(decode::<String>(&text, FrameCap::Control).is_err());
    }

    #[test]
    fn a_list_stops_at_the_memory_budget_of_its_frame() {
        // One byte an element on the wire, 512 bytes in memory: 20,000 of them would take 10 MB.
        let wide: List<Option<[u64; 32]>> = vec![None; 20_000].into();
        let payload = encode(&wide, FrameCap::Control).unwrap();
        assert!(decode::<List<Option<[u64; 32]>>>(&payload, FrameCap::Control).is_err());
        let narrow: List<u64> = (0..2_000).collect();
        let payload = encode(&narrow, FrameCap::Control).unwrap();
        assert_eq!(decode::<List<u64>>(&payload, FrameCap::Control).unwrap(), narrow);
    }

    #[test]
    fn frames_of_every_size_are_read_as_they_were_written() {
        // Short texts have more of their lengths in a frame, and small numbers take less there than in memory.
        for count in (1..2_000).step_by(7) {
            let texts: Vec<(String, u64)> = (0..count).map(|index| ("x".repeat(index % 100), index as u64)).collect();
            let payload = encode(&List::from(texts.clone()), FrameCap::Request).unwrap();
            assert_eq!(decode::<List<(String, u64)>>(&payload, FrameCap::Request).unwrap().0, texts);
        }
        for bytes in (60_000..70_000).step_by(13).chain([131_072, 262_143]) {
            let payload = encode(&List::from(vec![7u8; bytes]), FrameCap::Request).unwrap();
            assert_eq!(decode::<List<u8>>(&payload, FrameCap::Request).unwrap().len(), bytes);
        }
    }

    #[test]
    fn encode_refuses_what_its_plane_cannot_carry() {
        let long = "x".repeat(FrameCap::Header.bytes());
        assert!(matches!(encode(&long, FrameCap::Header), Err(CodecError::TooLarge { .. })));
    }
}
