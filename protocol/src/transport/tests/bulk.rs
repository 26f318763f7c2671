//! Bulk streams over the loopback at the packet sizes of each path.

use std::time::Instant;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use super::super::*;
use super::{ANY, HOUR, authority, io, rank};
use crate::identity::Credentials;
use crate::ids::Digest;

#[derive(Serialize, Deserialize)]
struct Run {
    bytes: u64,
    blake3: Digest,
}

/// Sends runs of `bytes` each with a header, receives them, compares hashes. Returns the seconds of the second run (after discovery).
async fn transfer(settings: Settings, bytes: usize) -> f64 {
    let authority = authority(1);
    let credentials = |number| -> Credentials { authority.credentials(&rank(number), HOUR).unwrap() };
    let server = Endpoint::server(&io(), ANY, settings.clone(), credentials(0)).unwrap();
    let client = Endpoint::client(&io(), ANY, settings, credentials(1)).unwrap();
    let dialled = client.connect(server.local_addr().unwrap(), &rank(0)).await.unwrap();
    let Some(Accepted::Session(accepted)) = server.accept().await else { panic!("expected a session") };

    let data: Bytes = (0..bytes as u32 / 4).flat_map(|word| word.wrapping_mul(0x9E37_79B9).to_le_bytes()).collect();
    let blake3 = Digest(*blake3::hash(&data).as_bytes());
    let send = async move {
        let mut sender = dialled.open_bulk().await.unwrap();
        for _ in 0..2 {
            sender.write_header(&Run { bytes: data.len() as u64, blake3 }).await.unwrap();
            for start in (0..data.len()).step_by(256 * 1024) {
                let end = (start + 256 * 1024).min(data.len());
                sender.write_chunk(data.slice(start..end)).await.unwrap();
            }
        }
        sender.finish().unwrap();
        dialled.closed().await;
    };
    let receive = async move {
        let mut receiver = accepted.accept_bulk().await.unwrap();
        let mut seconds = 0.0;
        while let Some(run) = receiver.read_header::<Run>().await.unwrap() {
            let start = Instant::now();
            let mut chunks = Vec::new();
            let mut left = run.bytes as usize;
            while left > 0 {
                let chunk = receiver.read_chunk(left).await.unwrap();
                left -= chunk.len();
                chunks.push(chunk);
            }
            seconds = start.elapsed().as_secs_f64();
            let mut hasher = blake3::Hasher::new();
            chunks.iter().for_each(|chunk| {
                hasher.update(chunk);
            });
            assert_eq!(Digest(*hasher.finalize().as_bytes()), run.blake3);
        }
        accepted.close(CloseCode::Done, "received");
        (seconds, accepted.stats())
    };
    let ((), (seconds, stats)) = tokio::join!(send, receive);
    println!("{} MiB in {seconds:.3} s, {stats:?}", bytes >> 20);
    seconds
}

#[tokio::test]
async fn bulk_bytes_arrive_whole_in_jumbo_packets() {
    transfer(Settings::bulk().with_path(PathMtu::Jumbo), 64 << 20).await;
}

#[tokio::test]
async fn bulk_bytes_arrive_whole_in_loopback_packets() {
    transfer(Settings::bulk(), 64 << 20).await;
}

#[tokio::test]
async fn bulk_bytes_arrive_whole_in_ethernet_packets() {
    transfer(Settings::bulk().with_path(PathMtu::Ethernet), 16 << 20).await;
}
