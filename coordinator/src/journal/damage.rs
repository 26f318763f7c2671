//! Thousands of random damages of a journal: each is told, or changes nothing of what is read. Owns the kinds of damage; seeded.

use std::fs;
use std::path::{Path, PathBuf};

use rustix::process::{Resource, getrlimit, setrlimit};
use stoke_protocol::ids::LogIndex;

use super::redb_log::{BALLAST_FILE, TAIL_FILE};
use super::{JOURNAL_FILE, JournalError, Log, Recovered, RedbLog};

const DAMAGES: u64 = 5_000;
const RECORDS: u8 = 30;
const SNAPSHOT_AT: u8 = 12;

/// Numbers that follow from a seed.
struct Dice(blake3::OutputReader);

impl Dice {
    fn new(seed: u64) -> Self {
        Self(blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof())
    }

    fn below(&mut self, bound: usize) -> usize {
        let mut bytes = [0; 8];
        self.0.fill(&mut bytes);
        (u64::from_le_bytes(bytes) % bound as u64) as usize
    }
}

/// In memory where there is such a folder: thousands of fsyncs show nothing here.
fn place(name: &str) -> PathBuf {
    let memory = Path::new("/dev/shm");
    let parent = if memory.is_dir() { memory.to_owned() } else { std::env::temp_dir() };
    let folder = parent.join(format!("stoke-journal-{name}-{}", std::process::id()));
    drop(fs::remove_dir_all(&folder));
    fs::create_dir_all(&folder).unwrap();
    folder
}

fn read(folder: &Path) -> Result<Recovered, JournalError> {
    RedbLog::open(folder)?.recover()
}

/// Journals with a snapshot and records after it: one as it was some commits ago, one as it is.
fn journals(folder: &Path) -> (Vec<u8>, Vec<u8>, Vec<u8>, Recovered) {
    let path = folder.join(JOURNAL_FILE);
    let mut log = RedbLog::open(folder).unwrap();
    log.recover().unwrap();
    let mut older = Vec::new();
    for number in 0..RECORDS {
        let last = log.append(&[vec![number; 20 + 37 * usize::from(number)]]).unwrap();
        if last == LogIndex(u64::from(SNAPSHOT_AT)) {
            log.snapshot(last, &[7; 3000]).unwrap();
        }
        if last == LogIndex(u64::from(RECORDS) - 5) {
            drop(log);
            older = fs::read(&path).unwrap();
            log = RedbLog::open(folder).unwrap();
            log.recover().unwrap();
        }
    }
    drop(log);
    let good = fs::read(&path).unwrap();
    let tail = fs::read(folder.join(TAIL_FILE)).unwrap();
    (good, older, tail, read(folder).unwrap())
}

/// Where damage is tried: all over the file, its first page (redb's header) more often than chance would.
fn at(dice: &mut Dice, length: usize) -> usize {
    if dice.below(4) == 0 { dice.below(length.min(320)) } else { dice.below(length) }
}

fn damage(dice: &mut Dice, good: &[u8], older: &[u8]) -> (String, Vec<u8>) {
    let mut bytes = good.to_vec();
    let what = match dice.below(8) {
        0..=2 => {
            let flips = 1 + dice.below(4);
            let flipped: Vec<(usize, usize)> = (0..flips).map(|_| (at(dice, bytes.len()), dice.below(8))).collect();
            flipped.iter().for_each(|(byte, bit)| bytes[*byte] ^= 1 << bit);
            format!("flipped {flipped:?}")
        }
        3 => {
            bytes.truncate(at(dice, good.len()));
            format!("cut to {}", bytes.len())
        }
        4 => {
            let more = 1 + dice.below(10_000);
            bytes.extend((0..more).map(|_| dice.below(256) as u8));
            format!("{more} bytes behind its end")
        }
        5 => {
            let length = 1 + dice.below(4096);
            let (a, b) = (at(dice, good.len() - length), at(dice, good.len() - length));
            bytes[a..][..length].copy_from_slice(&good[b..][..length]);
            bytes[b..][..length].copy_from_slice(&good[a..][..length]);
            format!("{length} bytes swapped between {a} and {b}")
        }
        6 => {
            let end = 4096 * (1 + dice.below(older.len().min(good.len()) / 4096));
            let start = 4096 * dice.below(end / 4096);
            bytes[start..end].copy_from_slice(&older[start..end]);
            format!("an older {start}..{end}")
        }
        _ => {
            let length = 1 + dice.below(4096);
            let start = at(dice, good.len() - length);
            bytes[start..][..length].fill(0);
            format!("{length} zeros at {start}")
        }
    };
    (what, bytes)
}

#[test]
fn no_random_damage_of_a_journal_is_served() {
    // What redb panicked over stays open.
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    let _ = setrlimit(Resource::Nofile, limit);
    let folder = place("damages");
    let (good, older, tail, whole) = journals(&folder);
    let (mut told, mut harmless, mut wrong) = (0, 0, Vec::new());
    for seed in 0..DAMAGES {
        let mut dice = Dice::new(seed);
        let (what, bytes) = damage(&mut dice, &good, &older);
        // Another file each time: one that redb panicked over is still locked.
        [JOURNAL_FILE, BALLAST_FILE].iter().for_each(|file| drop(fs::remove_file(folder.join(file))));
        fs::write(folder.join(JOURNAL_FILE), &bytes).unwrap();
        fs::write(folder.join(TAIL_FILE), &tail).unwrap();
        match std::panic::catch_unwind(|| read(&folder)) {
            Ok(Err(JournalError::Damaged { .. })) => told += 1,
            Ok(Ok(recovered)) if recovered == whole => harmless += 1,
            Ok(Ok(recovered)) => wrong.push(format!("seed {seed}: {what}: served up to {}", recovered.last())),
            Ok(Err(other)) => wrong.push(format!("seed {seed}: {what}: {other}")),
            Err(_) => wrong.push(format!("seed {seed}: {what}: panicked")),
        }
    }
    fs::remove_dir_all(&folder).unwrap();
    println!("{DAMAGES} damages of {} bytes: {told} told, {harmless} changed nothing", good.len());
    assert!(wrong.is_empty(), "{} of {DAMAGES}: {:#?}", wrong.len(), &wrong[..wrong.len().min(40)]);
}

#[test]
fn a_damaged_tail_costs_only_its_check() {
    let folder = place("tail");
    let (_, _, tail, whole) = journals(&folder);
    for byte in 0..tail.len() {
        let mut bytes = tail.clone();
        bytes[byte] ^= 1;
        fs::write(folder.join(TAIL_FILE), &bytes).unwrap();
        assert_eq!(read(&folder).unwrap(), whole);
    }
    fs::remove_file(folder.join(TAIL_FILE)).unwrap();
    assert_eq!(read(&folder).unwrap(), whole);
    fs::remove_dir_all(&folder).unwrap();
}
