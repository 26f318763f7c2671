//! Frames on streams. Owns the length prefix, the caps and the rule that only `finish` ends a stream cleanly. Receiving is cancel-safe (a
//! dropped `recv` loses nothing); a send that is cancelled half way poisons its stream.

use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use quinn::{RecvStream, SendStream};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::time::timeout;

use super::connection::Shared;
use super::error::{CloseCode, TransportError};
use crate::codec::{self, CodecError, FrameCap};

const LENGTH_BYTES: usize = 4;

/// A peer that opened a request has this long to send it whole: 1 MiB at 35 KB/s. A slower one holds a stream for nothing (F38).
const REQUEST_READ_MAX: Duration = Duration::from_secs(30);

/// What a bidirectional stream is: its first byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum StreamKind {
    Frames = 1,
    Request = 2,
}

impl StreamKind {
    pub(super) fn of(byte: u8) -> Option<Self> {
        match byte {
            1 => Some(Self::Frames),
            2 => Some(Self::Request),
            _ => None,
        }
    }
}

/// The sending half of a stream of frames. Dropping it without [`FrameSender::finish`] resets the stream.
pub struct FrameSender {
    stream: SendStream,
    cap: FrameCap,
    state: SendState,
    _shared: Option<Arc<Shared>>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum SendState {
    Open,
    /// Inside a send; seen by the next one only if this one was cancelled.
    Sending,
    Finished,
}

/// The receiving half of a stream of frames.
pub struct FrameReceiver {
    stream: RecvStream,
    frame: PartialFrame,
    cap: FrameCap,
    shared: Option<Arc<Shared>>,
}

/// Where bytes of frames come from.
pub(super) trait ByteSource: Send {
    /// Between 1 and `bytes_max` bytes; none at the clean end. Cancel-safe.
    fn chunk(&mut self, bytes_max: usize) -> impl Future<Output = Result<Option<Bytes>, TransportError>> + Send;
}

impl ByteSource for RecvStream {
    async fn chunk(&mut self, bytes_max: usize) -> Result<Option<Bytes>, TransportError> {
        Ok(self.read_chunk(bytes_max, true).await?.map(|chunk| chunk.bytes))
    }
}

/// A frame of which some bytes have arrived.
#[derive(Default)]
pub(super) struct PartialFrame {
    length: [u8; LENGTH_BYTES],
    length_read: usize,
    payload: BytesMut,
}

impl PartialFrame {
    /// The next payload, or none at a clean end between frames. Memory grows with what arrives, never with what the length claims.
    pub(super) async fn read(
        &mut self,
        source: &mut impl ByteSource,
        cap: FrameCap,
    ) -> Result<Option<Bytes>, TransportError> {
        while self.length_read < LENGTH_BYTES {
            match source.chunk(LENGTH_BYTES - self.length_read).await? {
                Some(chunk) => {
                    let read = self.length_read + chunk.len();
                    self.length[self.length_read..read].copy_from_slice(&chunk);
                    self.length_read = read;
                }
                None if self.length_read == 0 => return Ok(None),
                None => return Err(TransportError::Truncated),
            }
        }
        let bytes = u32::from_le_bytes(self.length) as usize;
        if bytes > cap.bytes() {
            return Err(CodecError::TooLarge { bytes, cap: cap.bytes() }.into());
        }
        while self.payload.len() < bytes {
            let missing = bytes - self.payload.len();
            let chunk = source.chunk(missing).await?.ok_or(TransportError::Truncated)?;
            if chunk.len() == bytes {
                self.length_read = 0;
                return Ok(Some(chunk));
            }
            self.payload.extend_from_slice(&chunk);
        }
        self.length_read = 0;
        Ok(Some(std::mem::take(&mut self.payload).freeze()))
    }
}

/// Length and payload of one frame, ready to be written.
pub(super) fn frame<T: Serialize>(message: &T, cap: FrameCap) -> Result<[Bytes; 2], CodecError> {
    let payload = codec::encode(message, cap)?;
    let length = u32::try_from(payload.len()).expect("every cap is below 4 GiB").to_le_bytes();
    Ok([Bytes::copy_from_slice(&length), payload.into()])
}

impl FrameSender {
    pub(super) fn new(stream: SendStream, cap: FrameCap, shared: Option<Arc<Shared>>) -> Self {
        Self { stream, cap, state: SendState::Open, _shared: shared }
    }

    /// Writes the byte that says what this stream is.
    pub(super) async fn announce(&mut self, kind: StreamKind) -> Result<(), TransportError> {
        self.write(&mut [Bytes::copy_from_slice(&[kind as u8])]).await
    }

    /// Hands a frame to the connection; returns when it is buffered, which waits while the peer does not read.
    pub async fn send<T: Serialize>(&mut self, message: &T) -> Result<(), TransportError> {
        let mut parts = frame(message, self.cap)?;
        self.write(&mut parts).await
    }

    async fn write(&mut self, parts: &mut [Bytes]) -> Result<(), TransportError> {
        if self.state != SendState::Open {
            return Err(TransportError::Interrupted);
        }
        self.state = SendState::Sending;
        self.stream.write_all_chunks(parts).await?;
        self.state = SendState::Open;
        Ok(())
    }

    /// The clean end: the peer's `recv` gives none after the last frame.
    pub fn finish(mut self) -> Result<(), TransportError> {
        self.end()
    }

    fn end(&mut self) -> Result<(), TransportError> {
        if self.state != SendState::Open {
            return Err(TransportError::Interrupted);
        }
        self.state = SendState::Finished;
        self.stream.finish().map_err(|_| TransportError::Ended)
    }

    /// Ends cleanly and waits until the peer has everything, or has stopped reading.
    pub async fn finish_delivered(mut self) -> Result<(), TransportError> {
        self.end()?;
        match self.stream.stopped().await {
            Ok(None) => Ok(()),
            Ok(Some(code)) => Err(TransportError::StreamStopped { code: code.into() }),
            Err(quinn::StoppedError::ConnectionLost(error)) => Err(error.into()),
            Err(quinn::StoppedError::ZeroRttRejected) => unreachable!("early data is off"),
        }
    }

    /// Gives up with a code that the peer sees.
    pub fn reset(mut self, code: CloseCode) {
        self.state = SendState::Finished;
        let _ = self.stream.reset(code.into());
    }

    /// Resolves when the peer stops reading or the connection is lost: for senders of rare frames (a followed log).
    pub async fn stopped(&mut self) {
        let _ = self.stream.stopped().await;
    }

    /// Higher goes first when several streams have something to send; 0 unless set.
    pub fn set_priority(&self, priority: i32) {
        let _ = self.stream.set_priority(priority);
    }
}

impl Drop for FrameSender {
    fn drop(&mut self) {
        if self.state != SendState::Finished {
            let _ = self.stream.reset(CloseCode::Abandoned.into());
        }
    }
}

impl FrameReceiver {
    pub(super) fn new(stream: RecvStream, cap: FrameCap, shared: Option<Arc<Shared>>) -> Self {
        Self { stream, frame: PartialFrame::default(), cap, shared }
    }

    /// The next frame; none only after the peer's explicit end. A frame over the cap, of another version or malformed closes the
    /// connection with its code.
    pub async fn recv<T: DeserializeOwned>(&mut self) -> Result<Option<T>, TransportError> {
        let read = self.frame.read(&mut self.stream, self.cap).await;
        let decoded = match read {
            Ok(None) => return Ok(None),
            Ok(Some(payload)) => codec::decode(&payload, self.cap).map(Some).map_err(TransportError::from),
            Err(error) => Err(error),
        };
        if let (Err(TransportError::Frame(refused)), Some(shared)) = (&decoded, &self.shared) {
            shared.refuse(refused);
        }
        decoded
    }

    /// The next frame, where the end of the stream would be an error.
    pub async fn expect<T: DeserializeOwned>(&mut self) -> Result<T, TransportError> {
        self.recv().await?.ok_or(TransportError::Ended)
    }

    /// Stops reading with a code that the peer sees.
    pub fn stop(mut self, code: CloseCode) {
        let _ = self.stream.stop(code.into());
    }
}

impl std::fmt::Debug for FrameSender {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "FrameSender({})", self.stream.id())
    }
}

impl std::fmt::Debug for FrameReceiver {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "FrameReceiver({})", self.stream.id())
    }
}

/// A request that a peer opened and that was not read yet.
#[derive(Debug)]
pub struct Request {
    pub(super) receiver: FrameReceiver,
    pub(super) sender: FrameSender,
}

impl Request {
    /// The question and the way to answer it.
    pub async fn read<Q: DeserializeOwned>(mut self) -> Result<(Q, Reply), TransportError> {
        let question = timeout(REQUEST_READ_MAX, self.receiver.expect())
            .await
            .map_err(|_| TransportError::Deadline { what: "read request", after: REQUEST_READ_MAX })??;
        Ok((question, Reply { sender: self.sender, _receiver: self.receiver }))
    }
}

/// The answer to one request. Dropping it resets the stream: the asker gets an error, never silence.
#[derive(Debug)]
pub struct Reply {
    sender: FrameSender,
    /// Kept so that a peer which cancels its request is not told to stop sending what it has sent.
    _receiver: FrameReceiver,
}

impl Reply {
    /// One frame, and the end.
    pub async fn send<A: Serialize>(mut self, answer: &A) -> Result<(), TransportError> {
        self.sender.send(answer).await?;
        self.sender.finish()
    }

    /// Many frames; [`FrameSender::finish`] is the end.
    pub fn into_frames(self) -> FrameSender {
        self.sender
    }
}
