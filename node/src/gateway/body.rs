//! The body of a request: read whole, within limits of bytes and time, and of what all bodies take together.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, LengthLimitError, Limited};
use hyper::body::{Body, Incoming};
use tokio::sync::Semaphore;
use tokio::time::timeout;

use super::error::{Kind, Problem};

/// More than fits a question to a head (1 MiB) even where JSON writes each character of it with several.
pub(super) const BODY_BYTES_MAX: usize = 4 << 20;
/// From the head of a request to the end of its body.
const BODY_MAX: Duration = Duration::from_secs(30);
/// Of a body that was refused: four of the largest that are taken.
const DRAIN_BYTES_MAX: usize = 4 * BODY_BYTES_MAX;
const DRAIN_MAX: Duration = Duration::from_secs(2);
/// What all bodies that are being read may take, in units of 64 KiB: 256 MiB.
const UNITS_MAX: usize = 4096;
const UNIT_BYTES: u64 = 64 * 1024;

/// Room for bodies.
pub(super) struct Bodies(Arc<Semaphore>);

impl Bodies {
    pub(super) fn new() -> Self {
        Self(Arc::new(Semaphore::new(UNITS_MAX)))
    }

    /// The bytes of a body. One that does not say how long it is takes the room of the longest.
    pub(super) async fn read(&self, body: &mut Incoming) -> Result<Bytes, Problem> {
        let most = body.size_hint().upper().unwrap_or(BODY_BYTES_MAX as u64);
        if most > BODY_BYTES_MAX as u64 {
            return Err(too_large());
        }
        let units = most.div_ceil(UNIT_BYTES) as u32;
        let room = self.0.clone().try_acquire_many_owned(units).map_err(|_| {
            let message = "too many requests are being sent at this moment: try again in 1 s";
            Problem { retry_after: Some(Duration::from_secs(1)), ..Problem::new(Kind::Busy, message) }
        })?;
        let read = timeout(BODY_MAX, Limited::new(body, BODY_BYTES_MAX).collect()).await;
        drop(room);
        match read {
            Ok(Ok(collected)) => Ok(collected.to_bytes()),
            Ok(Err(error)) if error.is::<LengthLimitError>() => Err(too_large()),
            Ok(Err(error)) => Err(Problem::new(Kind::Invalid, format!("the body did not come whole: {error}"))),
            Err(_) => {
                let message = format!("the body did not come within {} s", BODY_MAX.as_secs());
                Err(Problem::new(Kind::SlowBody, message))
            }
        }
    }
}

/// Reads what is left of a body that nobody wants, as far as that does not take long.
pub(super) async fn drain(body: &mut Incoming) {
    let mut left = DRAIN_BYTES_MAX;
    let drained = async {
        while let Some(Ok(frame)) = body.frame().await {
            let Some(rest) = left.checked_sub(frame.data_ref().map_or(0, Bytes::len)) else { return };
            left = rest;
        }
    };
    let _late = timeout(DRAIN_MAX, drained).await;
}

fn too_large() -> Problem {
    Problem::new(Kind::TooLarge, format!("the body is over {} MiB", BODY_BYTES_MAX >> 20))
}
