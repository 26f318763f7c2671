//! Trying again where a store may come back, or its credentials are renewed. Owns for how long; decides nothing else.

use std::thread;
use std::time::{Duration, Instant};

use super::error::CheckpointError;

/// What must be read or written for a job to go on at all is tried for so long: a store that is restarted is back by then.
const PATIENCE_MAX: Duration = Duration::from_secs(60);
/// Between two tries. Requests that are not denied have been repeated for some seconds before each.
const AGAIN_AFTER: Duration = Duration::from_secs(2);

/// Does `work` until it succeeds, fails for good, or [`PATIENCE_MAX`] is over. Blocks.
pub fn patiently<T>(mut work: impl FnMut() -> Result<T, CheckpointError>) -> Result<T, CheckpointError> {
    let begun = Instant::now();
    loop {
        match work() {
            Err(error) if error.may_pass() && begun.elapsed() < PATIENCE_MAX => {
                tracing::warn!(%error, "tried again");
                thread::sleep(AGAIN_AFTER);
            }
            ended => return ended,
        }
    }
}
