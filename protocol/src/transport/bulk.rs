//! Bulk bytes: a small framed header, then raw bytes that no codec touches, on a unidirectional stream, as often as wanted. Owns the
//! framing; the meaning of headers and the number of bytes after each are its users'.

use std::sync::Arc;

use bytes::Bytes;
use quinn::{RecvStream, SendStream};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::connection::Shared;
use super::error::{CloseCode, TransportError};
use super::frames::{PartialFrame, frame};
use crate::codec::{self, FrameCap};

/// The sending side. Dropping it without [`BulkSender::finish`] resets the stream.
pub struct BulkSender {
    stream: SendStream,
    finished: bool,
    _shared: Arc<Shared>,
}

/// The receiving side. Reads never take more than they are asked for, so that the bytes after a run stay for the next header.
pub struct BulkReceiver {
    stream: RecvStream,
    header: PartialFrame,
    shared: Arc<Shared>,
}

impl BulkSender {
    pub(super) fn new(stream: SendStream, shared: Arc<Shared>) -> Self {
        Self { stream, finished: false, _shared: shared }
    }

    /// Writes a header; it must say how many bytes follow.
    pub async fn write_header<T: Serialize>(&mut self, header: &T) -> Result<(), TransportError> {
        let mut parts = frame(header, FrameCap::Header)?;
        Ok(self.stream.write_all_chunks(&mut parts).await?)
    }

    /// Hands over bytes without a copy. They are read until the peer has acknowledged them, so the memory behind them must not change.
    pub async fn write_chunk(&mut self, bytes: Bytes) -> Result<(), TransportError> {
        Ok(self.stream.write_chunk(bytes).await?)
    }

    /// [`BulkSender::write_chunk`] for several at once.
    pub async fn write_chunks(&mut self, chunks: &mut [Bytes]) -> Result<(), TransportError> {
        Ok(self.stream.write_all_chunks(chunks).await?)
    }

    /// Higher goes first when several streams have something to send; 0 unless set.
    pub fn set_priority(&self, priority: i32) {
        let _ = self.stream.set_priority(priority);
    }

    /// The clean end.
    pub fn finish(mut self) -> Result<(), TransportError> {
        self.finished = true;
        self.stream.finish().map_err(|_| TransportError::Ended)
    }

    /// Gives up with a code that the peer sees.
    pub fn reset(mut self, code: CloseCode) {
        self.finished = true;
        let _ = self.stream.reset(code.into());
    }
}

impl Drop for BulkSender {
    fn drop(&mut self) {
        if !self.finished {
            let _ = self.stream.reset(CloseCode::Abandoned.into());
        }
    }
}

impl BulkReceiver {
    pub(super) fn new(stream: RecvStream, shared: Arc<Shared>) -> Self {
        Self { stream, header: PartialFrame::default(), shared }
    }

    /// The next header; none only after the peer's explicit end. Cancel-safe. A header over its cap or malformed closes the connection.
    pub async fn read_header<T: DeserializeOwned>(&mut self) -> Result<Option<T>, TransportError> {
        let read = self.header.read(&mut self.stream, FrameCap::Header).await;
        let decoded = match read {
            Ok(None) => return Ok(None),
            Ok(Some(payload)) => codec::decode(&payload, FrameCap::Header).map(Some).map_err(TransportError::from),
            Err(error) => Err(error),
        };
        if let Err(TransportError::Frame(refused)) = &decoded {
            self.shared.refuse(refused);
        }
        decoded
    }

    /// Between 1 and `bytes_max` bytes as they lie in a packet, without a copy. Cancel-safe.
    pub async fn read_chunk(&mut self, bytes_max: usize) -> Result<Bytes, TransportError> {
        let chunk = self.stream.read_chunk(bytes_max, true).await?;
        Ok(chunk.ok_or(TransportError::Truncated)?.bytes)
    }

    /// Fills `bytes`. Not cancel-safe.
    pub async fn read_exact(&mut self, bytes: &mut [u8]) -> Result<(), TransportError> {
        let mut filled = 0;
        while filled < bytes.len() {
            filled += self.stream.read(&mut bytes[filled..]).await?.ok_or(TransportError::Truncated)?;
        }
        Ok(())
    }

    /// Stops reading with a code that the peer sees.
    pub fn stop(mut self, code: CloseCode) {
        let _ = self.stream.stop(code.into());
    }
}

impl std::fmt::Debug for BulkSender {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "BulkSender({})", self.stream.id())
    }
}

impl std::fmt::Debug for BulkReceiver {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "BulkReceiver({})", self.stream.id())
    }
}
