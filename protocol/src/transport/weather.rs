//! Bad weather on one machine: what happens to packets from and to some of its addresses, as a file tells. Owns the file's format, its reading
//! and each packet's fate; sends and drops nothing itself. Only processes whose environment names a file look at one: those of a local cluster,
//! whose nodes have an address of the loopback each. So it needs no root and no network namespace, and the packets that it strikes are real ones.
//!
//! W1: a spell strikes packets between its address and any other; an address always reaches itself.
//! W2: a spell ends by itself at its time, also when whoever made it is gone.

use std::fs;
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, PoisonError, RwLock};
use std::thread;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Names the file. Read once a process.
pub const WEATHER_VARIABLE: &str = "STOKE_WEATHER";

/// How often the file is looked at, a read of some bytes: a spell begins and ends this much late. Its end has to be seen by the clock anyway.
const LOOK: Duration = Duration::from_millis(20);

/// A packet that is to come out of order is held back by up to this: on the loopback a thousand others pass it.
const HELD_BACK_MS_MAX: u64 = 20;

/// Bad weather at an address.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Spell {
    pub address: IpAddr,
    /// When it ends, in milliseconds since the Unix epoch by this machine's clock.
    pub until_ms: u64,
    pub harm: Harm,
}

/// What it does to packets. Shares are of a thousand.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Harm {
    /// None passes, in no direction.
    Cut,
    /// None comes in.
    CutInbound,
    /// None goes out.
    CutOutbound,
    Loses(u16),
    /// Each comes so many milliseconds late.
    DelaysMs(u16),
    /// So many are held back, each by a time of its own, and others pass them.
    Reorders(u16),
    /// So many come twice.
    Duplicates(u16),
}

/// What becomes of a packet.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Fate {
    Lost,
    Sent { copies: u8, after: Duration },
}

impl Harm {
    fn words(self) -> (&'static str, u16) {
        match self {
            Self::Cut => ("cut", 0),
            Self::CutInbound => ("cut-inbound", 0),
            Self::CutOutbound => ("cut-outbound", 0),
            Self::Loses(share) => ("loses", share),
            Self::DelaysMs(ms) => ("delays", ms),
            Self::Reorders(share) => ("reorders", share),
            Self::Duplicates(share) => ("duplicates", share),
        }
    }

    fn parse(word: &str, amount: u16) -> Option<Self> {
        let all = [
            Self::Cut,
            Self::CutInbound,
            Self::CutOutbound,
            Self::Loses(amount),
            Self::DelaysMs(amount),
            Self::Reorders(amount),
            Self::Duplicates(amount),
        ];
        all.into_iter().find(|harm| harm.words().0 == word)
    }
}

/// Replaces the file at once: a reader sees all spells or those before.
pub fn write_weather(path: &Path, spells: &[Spell]) -> io::Result<()> {
    let line = |spell: &Spell| {
        let (word, amount) = spell.harm.words();
        format!("{} {} {word} {amount}\n", spell.address, spell.until_ms)
    };
    let fresh = path.with_extension("fresh");
    fs::write(&fresh, spells.iter().map(line).collect::<String>())?;
    fs::rename(&fresh, path)
}

/// A file that is not there is fair weather; a line that is no spell is none.
pub fn read_weather(path: &Path) -> Vec<Spell> {
    let text = fs::read_to_string(path).unwrap_or_default();
    let spell = |line: &str| {
        let [address, until, word, amount] = line.split(' ').collect::<Vec<_>>()[..] else { return None };
        let harm = Harm::parse(word, amount.parse().ok()?)?;
        Some(Spell { address: address.parse().ok()?, until_ms: until.parse().ok()?, harm })
    };
    text.lines().filter_map(spell).collect()
}

/// The spells that hold now, shared by the sockets of a process.
#[derive(Debug, Default)]
pub(super) struct Weather {
    /// There are none: spares every packet the lock.
    is_fair: AtomicBool,
    spells: RwLock<Vec<Spell>>,
    /// Packets that were looked at: each has a draw of its own.
    packets: AtomicU64,
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
            started.inspect_err(|error| tracing::warn!(%error, "no bad weather: its thread cannot start")).ok()?;
            Some(weather)
        };
        WEATHER.get_or_init(begin).clone()
    }

    /// Whether packets between these two are struck by anything. `own` is the address that a socket is bound to.
    pub(super) fn strikes(&self, own: IpAddr, peer: IpAddr) -> bool {
        !self.is_fair.load(Ordering::Relaxed) && self.between(own, peer.to_canonical()).next().is_some()
    }

    /// Of one packet from `own` to `peer`.
    pub(super) fn fate(&self, own: IpAddr, peer: IpAddr) -> Fate {
        let peer = peer.to_canonical();
        let (mut copies, mut after) = (1, Duration::ZERO);
        for spell in self.between(own, peer) {
            let drawn = self.draw();
            let struck = |share: u16| drawn % 1000 < u64::from(share);
            match spell.harm {
                Harm::Cut => return Fate::Lost,
                Harm::CutInbound if spell.address == peer => return Fate::Lost,
                Harm::CutOutbound if spell.address == own => return Fate::Lost,
                Harm::CutInbound | Harm::CutOutbound => {}
                Harm::Loses(share) if struck(share) => return Fate::Lost,
                Harm::DelaysMs(ms) => after += Duration::from_millis(ms.into()),
                Harm::Reorders(share) if struck(share) => {
                    after += Duration::from_millis(1 + drawn / 1000 % HELD_BACK_MS_MAX);
                }
                Harm::Duplicates(share) if struck(share) => copies = 2,
                Harm::Loses(_) | Harm::Reorders(_) | Harm::Duplicates(_) => {}
            }
        }
        Fate::Sent { copies, after }
    }

    /// W1.
    fn between(&self, own: IpAddr, peer: IpAddr) -> impl Iterator<Item = Spell> {
        let spells = self.spells.read().unwrap_or_else(PoisonError::into_inner);
        let here = |spell: &Spell| own != peer && (spell.address == own || spell.address == peer);
        spells.iter().copied().filter(here).collect::<Vec<_>>().into_iter()
    }

    /// SplitMix64 over the number of the packet: as even as shares of a thousand need.
    fn draw(&self) -> u64 {
        let mut bits = self.packets.fetch_add(1, Ordering::Relaxed).wrapping_add(1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        bits = (bits ^ bits >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        bits = (bits ^ bits >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
        bits ^ bits >> 31
    }

    fn look(&self, path: &Path) {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_millis() as u64);
        // W2.
        let spells: Vec<Spell> = read_weather(path).into_iter().filter(|spell| spell.until_ms > now).collect();
        let is_fair = spells.is_empty();
        *self.spells.write().unwrap_or_else(PoisonError::into_inner) = spells;
        self.is_fair.store(is_fair, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SENT: Fate = Fate::Sent { copies: 1, after: Duration::ZERO };

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn weather(spells: &[Spell]) -> Weather {
        let dir = tempfile::tempdir().unwrap();
        let (path, weather) = (dir.path().join("weather"), Weather::default());
        write_weather(&path, spells).unwrap();
        assert_eq!(read_weather(&path), spells);
        weather.look(&path);
        weather
    }

    #[test]
    fn who_is_cut_off_reaches_itself_alone_until_its_time() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("weather");
        let fair = Weather::default();
        fair.look(&path);
        assert!(!fair.strikes(ip("127.0.1.1"), ip("127.0.0.1")), "fair where there is no file");
        let cut = |address, until_ms| Spell { address: ip(address), until_ms, harm: Harm::Cut };
        let weather = weather(&[cut("127.0.1.1", u64::MAX), cut("127.0.1.2", 1)]);
        let parts = |own, peer| weather.strikes(ip(own), ip(peer)) && weather.fate(ip(own), ip(peer)) == Fate::Lost;
        assert!(parts("127.0.1.1", "127.0.0.1") && parts("127.0.0.1", "127.0.1.1"));
        assert!(parts("0.0.0.0", "::ffff:127.0.1.1"), "W1, as a dual-stack socket sees it");
        assert!(!weather.strikes(ip("127.0.1.1"), ip("127.0.1.1")), "W1");
        assert!(!weather.strikes(ip("127.0.1.2"), ip("127.0.0.1")), "W2");
        fs::write(&path, "no spell at all\n127.0.1.3 7 cut\nx 7 cut 0\n127.0.1.3 9999999999999 rains 0\n").unwrap();
        assert_eq!(read_weather(&path), []);
    }

    #[test]
    fn a_cut_one_way_lets_the_other_way_pass() {
        let (node, other) = (ip("127.0.1.1"), ip("127.0.0.1"));
        let one = |harm| weather(&[Spell { address: node, until_ms: u64::MAX, harm }]);
        let inbound = one(Harm::CutInbound);
        assert_eq!((inbound.fate(other, node), inbound.fate(node, other)), (Fate::Lost, SENT));
        let outbound = one(Harm::CutOutbound);
        assert_eq!((outbound.fate(other, node), outbound.fate(node, other)), (SENT, Fate::Lost));
    }

    #[test]
    fn amounts_are_kept_over_many_packets_and_spells_add_up() {
        let (node, other) = (ip("127.0.1.1"), ip("127.0.0.1"));
        let one = |harm| Spell { address: node, until_ms: u64::MAX, harm };
        let fates = |spells: &[Spell]| {
            let weather = weather(spells);
            (0..10_000).map(|_| weather.fate(node, other)).collect::<Vec<_>>()
        };
        let near = |count: usize, share: usize| (count * 10).abs_diff(share * 10 * 10) < 1_500;
        let lost = fates(&[one(Harm::Loses(100))]).iter().filter(|fate| **fate == Fate::Lost).count();
        assert!(near(lost, 100), "{lost}");
        let twice = |fate: &&Fate| matches!(fate, Fate::Sent { copies: 2, .. });
        let doubled = fates(&[one(Harm::Duplicates(300))]).iter().filter(twice).count();
        assert!(near(doubled, 300), "{doubled}");
        let delayed = fates(&[one(Harm::DelaysMs(50)), one(Harm::Reorders(500))]);
        let after = |fate: &Fate| match fate {
            Fate::Sent { after, .. } => after.as_millis() as u64,
            Fate::Lost => 0,
        };
        assert!(delayed.iter().all(|fate| (50..=50 + HELD_BACK_MS_MAX).contains(&after(fate))));
        let held = delayed.iter().filter(|fate| after(fate) > 50).count();
        assert!(near(held, 500), "{held}");
    }
}
