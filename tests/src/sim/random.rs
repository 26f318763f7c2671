//! Random numbers. What is drawn depends on the seed, the concern, the site and the time, and on nothing that was drawn before: who takes something
//! out of a run shifts nothing else in it. What was drawn can be written down and played again: then a draw that is not written down is 0, which
//! everywhere means the least that may happen (no loss, the shortest delay, the first of a list).

use std::collections::BTreeMap;

/// Millisecond, and the how manieth draw of the site in it.
pub type Moment = (u64, u64);
/// What was drawn, by site and moment; zeros are left out.
pub type Sites = BTreeMap<String, BTreeMap<Moment, u64>>;
/// By stream.
pub type Choices = BTreeMap<String, Sites>;

/// Where the numbers of a run come from.
#[derive(Clone, PartialEq, Debug)]
pub enum Source {
    Seed(u64),
    Written(Choices),
}

/// The random numbers of one concern.
#[derive(Clone, Debug)]
pub struct Stream {
    name: String,
    key: u64,
    written: Option<Sites>,
    now: u64,
    sites: BTreeMap<&'static str, Site>,
}

#[derive(Clone, Debug, Default)]
struct Site {
    /// Of the next draw, if no time passes.
    next: Moment,
    /// Draws that were chances, and how many of those came true.
    chances: u64,
    hits: u64,
    drawn: BTreeMap<Moment, u64>,
}

impl Stream {
    pub fn new(seed: u64, name: &str) -> Self {
        Self { name: name.to_owned(), key: mixed(seed ^ named(name)), written: None, now: 0, sites: BTreeMap::new() }
    }

    pub fn of(source: &Source, name: &str) -> Self {
        match source {
            Source::Seed(seed) => Self::new(*seed, name),
            Source::Written(choices) => {
                let written = Some(choices.get(name).cloned().unwrap_or_default());
                Self { written, ..Self::new(0, name) }
            }
        }
    }

    pub fn set_time(&mut self, now: u64) {
        self.now = now;
    }

    /// Between 0 and 1.
    pub fn unit(&mut self, site: &'static str) -> f64 {
        self.draw(site, |raw| raw >> 11) as f64 / (1u64 << 53) as f64
    }

    /// What cannot happen does not, whatever is written.
    pub fn chance(&mut self, site: &'static str, probability: f64) -> bool {
        if probability <= 0.0 {
            return false;
        }
        let hit = self.draw(site, |raw| u64::from(((raw >> 11) as f64 / (1u64 << 53) as f64) < probability)) > 0;
        let site = self.sites.entry(site).or_default();
        (site.chances, site.hits) = (site.chances + 1, site.hits + u64::from(hit));
        hit
    }

    /// Both ends included.
    pub fn between(&mut self, site: &'static str, low: u64, high: u64) -> u64 {
        (low + self.draw(site, |raw| raw % (high - low + 1))).min(high)
    }

    pub fn pick<'a, T>(&mut self, site: &'static str, items: &'a [T]) -> Option<&'a T> {
        let many = items.len().max(1) as u64;
        let at = self.draw(site, |raw| raw % many) % many;
        items.get(at as usize)
    }

    /// A duration of a clock that runs up to a twentieth too fast or too slow, as a factor.
    pub fn drift(&mut self, site: &'static str) -> f64 {
        // 0 is a clock that runs right.
        let step = self.between(site, 0, 100);
        let off = step.div_ceil(2) as f64 / 1_000.0;
        if step.is_multiple_of(2) { 1.0 + off } else { 1.0 - off }
    }

    /// Name and everything that was drawn.
    pub fn drawn(&self) -> (String, Sites) {
        let sites = self.sites.iter().filter(|(_, site)| !site.drawn.is_empty());
        (self.name.clone(), sites.map(|(name, site)| ((*name).to_owned(), site.drawn.clone())).collect())
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// Sites with chances, and how many of them came true.
    pub fn hits(&self) -> impl Iterator<Item = (&'static str, u64)> + '_ {
        let chances = self.sites.iter().filter(|(_, site)| site.chances > 0);
        chances.map(|(name, site)| (*name, site.hits))
    }

    fn draw(&mut self, name: &'static str, choose: impl FnOnce(u64) -> u64) -> u64 {
        let site = self.sites.entry(name).or_default();
        let nth = if site.next.0 == self.now { site.next.1 } else { 0 };
        let at = (self.now, nth);
        site.next = (self.now, nth + 1);
        let chosen = match &self.written {
            Some(sites) => sites.get(name).and_then(|site| site.get(&at)).copied().unwrap_or(0),
            None => choose(mixed(mixed(self.key ^ named(name)) ^ (at.0 << 20 | at.1))),
        };
        if chosen > 0 {
            site.drawn.insert(at, chosen);
        }
        chosen
    }
}

/// FNV-1a: any function that tells the names apart does.
fn named(name: &str) -> u64 {
    name.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

/// The finish of splitmix64.
fn mixed(word: u64) -> u64 {
    let word = word.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    word ^ (word >> 31)
}
