//! A checkpoint as the world treats it: written by some ranks, read by others, damaged, half written, on a full disk.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use stoke_jobs::NamedTensor;
use stoke_protocol::ids::{ClusterId, Digest, Generation, JobId, Step};
use stoke_protocol::ledger::Ledger;

use super::*;

fn tensors() -> Vec<NamedTensor> {
    let tensor = |i: usize| NamedTensor {
        name: format!("model.block{i}.weight"),
        shape: vec![i + 1, 50],
        values: (0..(i + 1) * 50).map(|v| (v as f32).mul_add(0.37, i as f32)).collect(),
    };
    let mut all: Vec<NamedTensor> = (0..9).map(tensor).collect();
    all.push(NamedTensor { name: "optimizer.step".into(), shape: vec![], values: vec![-0.0] });
    all
}

fn uri(dir: &Path) -> String {
    format!("file://{}/job-1/{}", dir.display(), folder_name(Step(120), Generation(1)))
}

fn write(uri: &str, tensors: &[NamedTensor], world: u32) -> Manifest {
    write_step(uri, Step(120), tensors, world)
}

/// What the ranks of `world` write of these tensors after `step`.
pub(super) fn write_step(uri: &str, step: Step, tensors: &[NamedTensor], world: u32) -> Manifest {
    let folder = Folder::at(uri).unwrap();
    let shards = plan_shards(tensors, world);
    let write = |(index, shard): (usize, &Vec<usize>)| {
        let owned: Vec<NamedTensor> = shard.iter().map(|&i| tensors[i].clone()).collect();
        write_shard(&folder, index as u32, world, &owned).unwrap().into()
    };
    let manifest = Manifest {
        format: FORMAT.into(),
        cluster: ClusterId([0xab; 16]),
        job: JobId(1),
        name: "t".into(),
        trainer: "digits".into(),
        generation: Generation(1),
        step,
        cursor: step.0 * 64,
        ledger: Some(Ledger { first: 0, end: step.0 * 64 }),
        world,
        lanes: 8,
        seed: 7,
        spec: "name = \"t\"\n".into(),
        shards: shards.iter().enumerate().map(write).collect(),
        loss: Some(0.25),
        weights_blake3: Digest([1; 32]),
        metrics: BTreeMap::from([("roc_auc".to_owned(), 0.97)]),
    };
    write_manifest(&folder, &manifest).unwrap();
    manifest
}

pub(super) fn sorted(mut tensors: Vec<NamedTensor>) -> Vec<NamedTensor> {
    tensors.sort_by(|a, b| a.name.cmp(&b.name));
    tensors
}

#[test]
fn what_any_number_of_ranks_wrote_is_read_back() {
    for world in [1, 2, 3, 12] {
        let dir = tempfile::tempdir().unwrap();
        let uri = uri(dir.path());
        let manifest = write(&uri, &tensors(), world);
        assert_eq!(open(&uri).unwrap(), manifest);
        let verified = verify(&uri, None).unwrap();
        assert_eq!((verified.tensors, verified.bytes), (10, manifest.bytes()));
        let (_, read) = load(&uri, None).unwrap();
        assert_eq!(sorted(read), sorted(tensors()));
        // A plain path is the same place.
        assert_eq!(open(uri.strip_prefix("file://").unwrap()).unwrap(), manifest);
        let left: Vec<_> = fs::read_dir(uri.strip_prefix("file://").unwrap()).unwrap().collect();
        assert_eq!(left.len(), world as usize + 1, "a staging file was left: {left:?}");
    }
}

#[test]
fn a_shard_larger_than_one_part_is_read_back_and_opens_with_the_safetensors_crate() {
    let dir = tempfile::tempdir().unwrap();
    let uri = uri(dir.path());
    let big =
        NamedTensor { name: "big".into(), shape: vec![5_000_000], values: (0..5_000_000).map(|i| i as f32).collect() };
    write(&uri, std::slice::from_ref(&big), 1);
    assert_eq!(load(&uri, None).unwrap().1, std::slice::from_ref(&big));
    let bytes = fs::read(format!("{}/shard-0-of-1.safetensors", uri.strip_prefix("file://").unwrap())).unwrap();
    let theirs = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(theirs.tensor("big").unwrap().data().len(), 20_000_000);
}

#[test]
fn damage_is_found_and_named() {
    let dir = tempfile::tempdir().unwrap();
    let uri = uri(dir.path());
    write(&uri, &tensors(), 3);
    let folder = uri.strip_prefix("file://").unwrap();
    let shard = format!("{folder}/shard-1-of-3.safetensors");
    let good = fs::read(&shard).unwrap();
    let broken = |bytes: Option<&[u8]>| {
        match bytes {
            Some(bytes) => fs::write(&shard, bytes).unwrap(),
            None => fs::remove_file(&shard).unwrap(),
        }
        let error = verify(&uri, None).unwrap_err().to_string();
        assert_eq!(load(&uri, None).unwrap_err().to_string(), error);
        assert!(
            error.contains("shard 1 (shard-1-of-3.safetensors)") && error.contains("earlier checkpoint"),
            "{error}"
        );
        error
    };
    let mut flipped = good.clone();
    *flipped.last_mut().unwrap() ^= 1;
    assert!(broken(Some(&flipped)).contains("BLAKE3"));
    let cut = good.len() - 10;
    assert!(broken(Some(&good[..cut])).contains(&format!("byte {cut}")));
    let mut header = good.clone();
    header[..8].copy_from_slice(&(u64::MAX / 2).to_le_bytes());
    assert!(broken(Some(&header)).contains("limit is 16777216"));
    let mut json = good.clone();
    json[9] = b'{';
    assert!(broken(Some(&json)).contains("header"));
    assert!(broken(None).contains("missing"));
}

#[test]
fn a_checkpoint_that_is_not_the_committed_one_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let digest = |uri: &str| {
        let json = fs::read(format!("{}/manifest.json", uri.strip_prefix("file://").unwrap())).unwrap();
        Digest(*blake3::hash(&json).as_bytes())
    };
    let (ours, theirs) = (uri(dir.path()), uri(&dir.path().join("other")));
    write(&ours, &tensors(), 2);
    // The same step, generation, spec and shape, and other numbers.
    let mut others = tensors();
    others[0].values[0] += 1.0;
    write(&theirs, &others, 2);
    let (committed, other) = (digest(&ours), digest(&theirs));
    load(&ours, Some(committed)).unwrap();
    verify(&ours, Some(committed)).unwrap();
    let place = Path::new(ours.strip_prefix("file://").unwrap());
    fs::remove_dir_all(place).unwrap();
    fs::rename(theirs.strip_prefix("file://").unwrap(), place).unwrap();
    for error in [load(&ours, Some(committed)).unwrap_err(), verify(&ours, Some(committed)).unwrap_err()] {
        let words = error.to_string();
        assert!(error.is_damage(), "{words}");
        for part in [&ours, &committed.to_string(), &other.to_string(), "earlier checkpoint"] {
            assert!(words.contains(part), "{words}");
        }
    }
    // Nobody says which one was committed there.
    load(&ours, None).unwrap();
}

#[test]
fn overlapping_offsets_and_foreign_types_are_refused() {
    let refuse = |json: &str, data: usize| {
        let damage = super::shard::Header::parse(json.as_bytes(), 8 + json.len() as u64 + data as u64).err().unwrap();
        damage.problem
    };
    let overlap = r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}"#;
    assert!(refuse(overlap, 12).contains("invalid offset"));
    let gap = r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[1],"data_offsets":[12,16]}}"#;
    assert!(refuse(gap, 16).contains("invalid offset"));
    let wide = r#"{"a":{"dtype":"F64","shape":[1],"data_offsets":[0,8]}}"#;
    assert!(refuse(wide, 8).contains("F64"));
    let short = r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#;
    assert!(refuse(short, 8).contains("the file has"));
    let huge = r#"{"a":{"dtype":"F32","shape":[18446744073709551615,2],"data_offsets":[0,8]}}"#;
    assert!(refuse(huge, 8).contains("overflow"));
}

#[test]
fn a_manifest_is_written_once_and_cannot_point_elsewhere() {
    let dir = tempfile::tempdir().unwrap();
    let uri = uri(dir.path());
    let mut manifest = write(&uri, &tensors(), 2);
    let folder = Folder::at(&uri).unwrap();
    // The order to commit may come twice.
    let digest = write_manifest(&folder, &manifest).unwrap();
    let json = fs::read(format!("{}/manifest.json", uri.strip_prefix("file://").unwrap())).unwrap();
    assert_eq!(digest.0, *blake3::hash(&json).as_bytes());
    manifest.seed += 1;
    assert!(matches!(write_manifest(&folder, &manifest), Err(CheckpointError::Conflict { .. })));
    let forge = |from: &str, to: &str| {
        let text = String::from_utf8(json.clone()).unwrap().replace(from, to);
        let text = super::manifest::seal(text.split(",\n  \"seal\"").next().unwrap().to_owned());
        fs::write(format!("{}/manifest.json", uri.strip_prefix("file://").unwrap()), text).unwrap();
        open(&uri).unwrap_err().to_string()
    };
    assert!(forge("shard-1-of-2.safetensors", "../shadow").contains("plain name"));
    assert!(forge("shard-1-of-2", "shard-0-of-2").contains("two shards"));
    assert!(forge("stoke-checkpoint-2", "stoke-checkpoint-9").contains("stoke release"));
    assert!(forge("\"world\": 2", "\"world\": 3").contains("2 shards for 3 ranks"));
}

#[test]
fn removal_takes_the_manifest_first_and_leaves_what_is_not_ours() {
    let dir = tempfile::tempdir().unwrap();
    let uri = uri(dir.path());
    let path = Path::new(uri.strip_prefix("file://").unwrap()).to_owned();
    write(&uri, &tensors(), 2);
    fs::write(path.join("notes.txt"), "mine").unwrap();
    remove(&uri).unwrap();
    assert!(matches!(open(&uri), Err(CheckpointError::Missing { .. })));
    assert_eq!(fs::read_dir(&path).unwrap().count(), 1);
    fs::remove_file(path.join("notes.txt")).unwrap();
    remove(&uri).unwrap();
    assert!(!path.exists());
    // It may be asked again.
    remove(&uri).unwrap();
}

#[test]
fn older_checkpoints_go_but_those_that_are_named_and_what_killed_writers_left_goes_with_them() {
    let dir = tempfile::tempdir().unwrap();
    let job = format!("file://{}/job-1", dir.path().display());
    write(&uri(dir.path()), &tensors(), 1);
    let begun = |step, generation| {
        let name = folder_name(Step(step), Generation(generation));
        write_shard(&Folder::at(&format!("{job}/{name}")).unwrap(), 0, 2, &tensors()).unwrap();
        name
    };
    let (past, named, newest, later) = (begun(60, 2), begun(70, 2), begun(130, 2), begun(130, 3));
    fs::write(dir.path().join("job-1").join(&past).join("manifest.json#1"), "begun").unwrap();
    let whole = uri(dir.path()).rsplit('/').next().unwrap().to_owned();
    let removed = remove_older(&job, (Step(130), Generation(2)), &[named.clone(), whole.clone()]).unwrap();
    assert_eq!(removed, [past]);
    let mut left: Vec<String> = fs::read_dir(dir.path().join("job-1"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    left.sort();
    let mut expected = vec![named.clone(), newest.clone(), later, whole.clone()];
    expected.sort();
    assert_eq!(left, expected);
    // A prune's order that comes when its newest is damaged already: what the next generation writes again stays.
    let mut swept = sweep(&job, (Step(200), Generation(2)), &[whole]).unwrap();
    swept.sort();
    assert_eq!(swept, [named, newest]);
}

#[test]
fn a_full_disk_says_so_and_leaves_nothing_behind() {
    let dir = tempfile::tempdir().unwrap();
    let mounted = std::process::Command::new("mount")
        .args(["-t", "tmpfs", "-o", "size=1m", "tmpfs"])
        .arg(dir.path())
        .output()
        .is_ok_and(|output| output.status.success());
    if !mounted {
        println!("skipped: mounting a small tmpfs needs root");
        return;
    }
    let uri = uri(dir.path());
    let big = [NamedTensor { name: "big".into(), shape: vec![1 << 20], values: vec![1.0; 1 << 20] }];
    let folder = Folder::at(&uri).unwrap();
    let error = write_shard(&folder, 0, 1, &big).unwrap_err();
    let left: Vec<_> = fs::read_dir(uri.strip_prefix("file://").unwrap()).unwrap().collect();
    let unmounted = std::process::Command::new("umount").arg(dir.path()).status().unwrap();
    assert!(unmounted.success());
    assert!(matches!(error, CheckpointError::Full { .. }), "{error:?}");
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn places_that_are_none_are_refused() {
    for uri in ["ftp://bucket/x", "file://relative/x", "s3://", "s3://key:secret@bucket/x", "az:///x"] {
        assert!(matches!(open(uri), Err(CheckpointError::Uri { .. })));
    }
    assert!(open("/no/such/place").unwrap_err().to_string().contains("checkpoint list"));
}
