//! Partitions on one machine: which of its addresses are cut off from all others, as a file tells. Owns the file's format, its reading and
//! the rule; drops nothing itself. Only processes whose environment names a file look at one: those of a local cluster, whose nodes have an
//! address of the loopback each. So a partition needs no root and no network namespace, and the packets that are lost are real ones.
//!
//! W1: a packet between two addresses is lost while either is cut off; an address always reaches itself.
//! W2: a cut ends by itself at its time, also when whoever made it is gone.

use std::fs;
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock, PoisonError, RwLock};
use std::thread;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Names the file. Read once a process.
pub const WEATHER_VARIABLE: &str = "STOKE_WEATHER";

/// How often the file is looked at, a read of some bytes: a cut begins and ends this much late. Its end has to be seen by the clock anyway.
const LOOK: Duration = Duration::from_millis(20);

/// An address that is cut off.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Cut {
    pub address: IpAddr,
    /// When it ends, in milliseconds since the Unix epoch by this machine's clock.
    pub until_ms: u64,
}

/// Replaces the file at once: a reader sees all cuts or those before.
pub fn write_weather(path: &Path, cuts: &[Cut]) -> io::Result<()> {
    let lines: String = cuts.iter().map(|cut| format!("{} {}\n", cut.address, cut.until_ms)).collect();
    let fresh = path.with_extension("fresh");
    fs::write(&fresh, lines)?;
    fs::rename(&fresh, path)
}

/// A file that is not there is fair weather; a line that is no cut is none.
pub fn read_weather(path: &Path) -> Vec<Cut> {
    let text = fs::read_to_string(path).unwrap_or_default();
    let cut = |line: &str| {
        let (address, until) = line.split_once(' ')?;
        Some(Cut { address: address.parse().ok()?, until_ms: until.parse().ok()? })
    };
    text.lines().filter_map(cut).collect()
}

/// The cuts that hold now, shared by the sockets of a process.
#[derive(Debug, Default)]
pub(super) struct Weather {
    /// Nothing is cut off: spares every packet the lock.
    is_fair: AtomicBool,
    cut_off: RwLock<Vec<IpAddr>>,
}

impl Weather {
    /// None where the environment names no file.
    pub(super) fn of_process() -> Option<Arc<Self>> {
        static WEATHER: OnceLock<Option<Arc<Weather>>> = OnceLock::new();
        let begin = || {
            let path = PathBuf::from(std::env::var_os(WEATHER_VARIABLE)?);
            let weather = Arc::new(Self::default());
            weather.look(&path);
            let watching = weather.clone();
            let watch = move || {
                loop {
                    thread::sleep(LOOK);
                    watching.look(&path);
                }
            };
            let started = thread::Builder::new().name("weather".to_owned()).spawn(watch);
            started.inspect_err(|error| tracing::warn!(%error, "no partitions: their thread cannot start")).ok()?;
            Some(weather)
        };
        WEATHER.get_or_init(begin).clone()
    }

    /// W1. `own` is the address that a socket is bound to.
    pub(super) fn parts(&self, own: IpAddr, peer: IpAddr) -> bool {
        if self.is_fair.load(Ordering::Relaxed) {
            return false;
        }
        let peer = peer.to_canonical();
        let cut_off = self.cut_off.read().unwrap_or_else(PoisonError::into_inner);
        own != peer && (cut_off.contains(&own) || cut_off.contains(&peer))
    }

    fn look(&self, path: &Path) {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_millis() as u64);
        // W2.
        let holds = read_weather(path).into_iter().filter(|cut| cut.until_ms > now);
        let cut_off: Vec<IpAddr> = holds.map(|cut| cut.address).collect();
        let is_fair = cut_off.is_empty();
        *self.cut_off.write().unwrap_or_else(PoisonError::into_inner) = cut_off;
        self.is_fair.store(is_fair, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn who_is_cut_off_reaches_itself_alone_until_its_time() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("weather");
        let weather = Weather::default();
        weather.look(&path);
        assert!(!weather.parts(ip("127.0.1.1"), ip("127.0.0.1")), "fair where there is no file");
        let cut = |address, until_ms| Cut { address: ip(address), until_ms };
        let cuts = [cut("127.0.1.1", u64::MAX), cut("127.0.1.2", 1)];
        write_weather(&path, &cuts).unwrap();
        assert_eq!(read_weather(&path), cuts);
        weather.look(&path);
        assert!(weather.parts(ip("127.0.1.1"), ip("127.0.0.1")) && weather.parts(ip("127.0.0.1"), ip("127.0.1.1")));
        assert!(weather.parts(ip("0.0.0.0"), ip("::ffff:127.0.1.1")), "W1, as a dual-stack socket sees it");
        assert!(!weather.parts(ip("127.0.1.1"), ip("127.0.1.1")), "W1");
        assert!(!weather.parts(ip("127.0.1.2"), ip("127.0.0.1")), "W2");
        fs::write(&path, "no cut\n127.0.1.3\nx 7\n").unwrap();
        weather.look(&path);
        assert!(!weather.parts(ip("127.0.1.3"), ip("127.0.0.1")));
    }
}
