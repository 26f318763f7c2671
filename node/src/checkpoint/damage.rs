//! Ten thousand random damages of a checkpoint: each is found, and none is loaded. Owns the kinds of damage; seeded.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use stoke_jobs::NamedTensor;
use stoke_protocol::ids::{Generation, Step};

use super::tests::{sorted, write_step};
use super::*;

const DAMAGES: u64 = 10_000;
const WORLD: u32 = 3;

/// In memory where there is such a folder: thousands of fsyncs show nothing here.
fn place() -> tempfile::TempDir {
    let memory = Path::new("/dev/shm");
    if memory.is_dir() { tempfile::tempdir_in(memory).unwrap() } else { tempfile::tempdir().unwrap() }
}

/// A small checkpoint whose shards have equal sizes, as those of another step have.
fn write(folder: &Path, step: u64) -> (String, Vec<NamedTensor>) {
    let tensor = |i: usize| NamedTensor {
        name: format!("model.block{i}.weight"),
        shape: vec![4, 25],
        values: (0..100).map(|v| (v as f32).mul_add(0.37, (i as f32) + step as f32)).collect(),
    };
    let tensors: Vec<NamedTensor> = (0..6).map(tensor).collect();
    let uri = format!("file://{}/job-1/{}", folder.display(), folder_name(Step(step), Generation(1)));
    write_step(&uri, Step(step), &tensors, WORLD);
    (uri, tensors)
}

/// Name and bytes of every file.
type Files = BTreeMap<PathBuf, Vec<u8>>;

fn files(uri: &str) -> Files {
    let folder = fs::read_dir(uri.strip_prefix("file://").unwrap()).unwrap();
    folder.map(|entry| entry.unwrap().path()).map(|path| (path.clone(), fs::read(&path).unwrap())).collect()
}

/// What the files are afterwards, where they differ.
fn damage(dice: &mut ChaCha8Rng, good: &Files, older: &Files) -> (String, Files) {
    let names: Vec<&PathBuf> = good.keys().collect();
    let (one, other) = (names[dice.random_range(0..names.len())], names[dice.random_range(0..names.len())]);
    let mut bytes = good[one].clone();
    let range = |dice: &mut ChaCha8Rng, length: usize| {
        let start = dice.random_range(0..length);
        start..dice.random_range(start + 1..=length)
    };
    let mut also = None;
    let what = match dice.random_range(0..8) {
        0 | 1 => {
            let flips = dice.random_range(1..5);
            (0..flips).for_each(|_| bytes[dice.random_range(0..good[one].len())] ^= 1 << dice.random_range(0..8));
            format!("{flips} flips")
        }
        2 => {
            bytes.truncate(dice.random_range(0..good[one].len()));
            format!("cut to {}", bytes.len())
        }
        3 => {
            let more = dice.random_range(1..300);
            bytes.extend((0..more).map(|_| dice.random::<u8>()));
            format!("{more} more")
        }
        4 => {
            bytes = good[other].clone();
            also = Some((other.clone(), good[one].clone()));
            format!("swapped with {}", other.display())
        }
        5 => {
            let length = dice.random_range(1..=bytes.len() / 2);
            let (a, b) = (dice.random_range(0..=bytes.len() - length), dice.random_range(0..=bytes.len() - length));
            bytes[a..][..length].copy_from_slice(&good[one][b..][..length]);
            bytes[b..][..length].copy_from_slice(&good[one][a..][..length]);
            format!("{length} bytes swapped between {a} and {b}")
        }
        6 => {
            let place = names.iter().position(|name| *name == one).unwrap();
            bytes = older.values().nth(place).unwrap().clone();
            "that of an older checkpoint".to_owned()
        }
        _ => {
            let source = older.values().nth(names.iter().position(|name| *name == one).unwrap()).unwrap();
            let range = range(dice, bytes.len().min(source.len()));
            bytes[range.clone()].copy_from_slice(&source[range.clone()]);
            format!("{range:?} of an older checkpoint")
        }
    };
    let changed = std::iter::once((one.clone(), bytes)).chain(also);
    (format!("{}: {what}", one.display()), changed.filter(|(path, bytes)| good[path] != *bytes).collect())
}

#[test]
fn no_random_damage_of_a_checkpoint_is_loaded() {
    let dir = place();
    let older = files(&write(dir.path(), 100).0);
    let (uri, tensors) = write(dir.path(), 120);
    let good = files(&uri);
    let whole = sorted(tensors);
    let (mut found, mut no_change, mut wrong) = (0, 0, Vec::new());
    for seed in 0..DAMAGES {
        let (what, changed) = damage(&mut ChaCha8Rng::seed_from_u64(seed), &good, &older);
        changed.iter().for_each(|(path, bytes)| fs::write(path, bytes).unwrap());
        match std::panic::catch_unwind(|| load(&uri, None)) {
            Ok(Err(error)) if error.is_damage() => found += 1,
            Ok(Ok((_, tensors))) if changed.is_empty() => {
                assert_eq!(sorted(tensors), whole);
                no_change += 1;
            }
            Ok(Ok(_)) => wrong.push(format!("seed {seed}: {what}: loaded")),
            Ok(Err(error)) => wrong.push(format!("seed {seed}: {what}: not said as damage: {error:?}")),
            Err(_) => wrong.push(format!("seed {seed}: {what}: panicked")),
        }
        changed.keys().for_each(|path| fs::write(path, &good[path]).unwrap());
    }
    println!("{DAMAGES} damages: {found} found, {no_change} changed no byte");
    assert!(wrong.is_empty(), "{} of {DAMAGES}: {:#?}", wrong.len(), &wrong[..wrong.len().min(40)]);
    assert!(no_change < DAMAGES / 10, "{no_change} damages changed no byte");
}

#[test]
fn an_older_checkpoint_in_the_folder_of_another_is_refused() {
    let dir = place();
    let (older, newer) = (write(dir.path(), 100).0, write(dir.path(), 120).0);
    for (path, bytes) in files(&older) {
        fs::write(Path::new(newer.strip_prefix("file://").unwrap()).join(path.file_name().unwrap()), bytes).unwrap();
    }
    let error = load(&newer, None).unwrap_err();
    assert!(error.is_damage() && error.to_string().contains("step-00000120-g1"), "{error}");
    // Under a name of its own it is a checkpoint like any other.
    let copy = dir.path().join("copy");
    fs::rename(older.strip_prefix("file://").unwrap(), &copy).unwrap();
    load(copy.to_str().unwrap(), None).unwrap();
}
