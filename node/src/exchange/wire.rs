//! The way of a pair's values: a stream of the mesh's connection, or a connection by TCP beside it. Both carry headers with raw bytes in order; owns nothing
//! but the choice between them.

use bytes::Bytes;
use stoke_protocol::message::peer::TensorHeader;
use stoke_protocol::transport::{BulkReceiver, BulkSender, TcpReceiver, TcpSender, TransportError};

pub enum Sender {
    Quic(BulkSender),
    /// With the mesh's stream, which ends after it.
    Tcp(TcpSender, BulkSender),
}

pub enum Receiver {
    Quic(BulkReceiver),
    Tcp(TcpReceiver),
}

impl Sender {
    pub async fn write(&mut self, header: &TensorHeader, values: Bytes) -> Result<(), TransportError> {
        match self {
            Self::Quic(stream) => {
                stream.write_header(header).await?;
                stream.write_chunk(values).await
            }
            Self::Tcp(stream, _) => stream.write(header, values).await,
        }
    }

    /// Until nobody answers any more, where the transport does not tell by itself.
    pub fn silenced(&self) -> impl Future<Output = ()> + Send + use<> {
        let watch = match self {
            Self::Quic(_) => None,
            Self::Tcp(stream, _) => Some(stream.watch()),
        };
        async {
            match watch {
                Some(watch) => watch.silenced().await,
                None => std::future::pending().await,
            }
        }
    }

    /// The clean end.
    pub async fn finish(self) -> Result<(), TransportError> {
        match self {
            Self::Quic(stream) => stream.finish(),
            Self::Tcp(stream, mesh) => {
                stream.finish().await?;
                mesh.finish()
            }
        }
    }
}

impl Receiver {
    pub async fn read_header(&mut self) -> Result<Option<TensorHeader>, TransportError> {
        match self {
            Self::Quic(stream) => stream.read_header().await,
            Self::Tcp(stream) => stream.read_header().await,
        }
    }
}

/// Where raw bytes come from.
pub trait Chunks {
    /// Between 1 and `bytes_max` bytes.
    fn read_chunk(&mut self, bytes_max: usize) -> impl Future<Output = Result<Bytes, TransportError>> + Send;
}

impl Chunks for BulkReceiver {
    async fn read_chunk(&mut self, bytes_max: usize) -> Result<Bytes, TransportError> {
        Self::read_chunk(self, bytes_max).await
    }
}

impl Chunks for Receiver {
    async fn read_chunk(&mut self, bytes_max: usize) -> Result<Bytes, TransportError> {
        match self {
            Self::Quic(stream) => stream.read_chunk(bytes_max).await,
            Self::Tcp(stream) => stream.read_chunk(bytes_max).await,
        }
    }
}
