//! Frames over the socket pair between an agent and a rank: a little-endian u32 length, then one `codec` payload. Owns the framing on both
//! sides; what is said is in `protocol::message::rank`.

use std::io;

use serde::Serialize;
use serde::de::DeserializeOwned;
use stoke_protocol::codec::{self, CodecError, FrameCap};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// The largest frame either way: a start with its spec, or the shards of a checkpoint.
const CAP: FrameCap = FrameCap::Control;

#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    #[error("link between agent and rank")]
    Io(#[from] io::Error),
    #[error("frame between agent and rank")]
    Frame(#[from] CodecError),
}

/// Writes one frame.
pub async fn send<T: Serialize>(link: &mut (impl AsyncWrite + Unpin), message: &T) -> Result<(), LinkError> {
    let payload = codec::encode(message, CAP)?;
    let mut frame = Vec::with_capacity(4 + payload.len());
    frame.extend_from_slice(&u32::try_from(payload.len()).expect("the cap is below 4 GiB").to_le_bytes());
    frame.extend_from_slice(&payload);
    Ok(link.write_all(&frame).await?)
}

/// The next frame; none when the other side has hung up between frames. Not cancel-safe.
pub async fn receive<T: DeserializeOwned>(link: &mut (impl AsyncRead + Unpin)) -> Result<Option<T>, LinkError> {
    let mut length = [0; 4];
    match link.read_exact(&mut length).await {
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Ok(None),
        Err(error) => return Err(error.into()),
    }
    let bytes = u32::from_le_bytes(length) as usize;
    if bytes > CAP.bytes() {
        return Err(CodecError::TooLarge { bytes, cap: CAP.bytes() }.into());
    }
    let mut payload = vec![0; bytes];
    link.read_exact(&mut payload).await?;
    Ok(Some(codec::decode(&payload, CAP)?))
}
