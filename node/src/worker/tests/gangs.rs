//! Gangs that begin again.

use super::*;

/// The store has lost every shard, and the gang has another size: each machine but the new one has one shard in memory, and gives it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_gang_that_begins_again_gives_each_other_what_its_machines_have_in_memory() {
    let bench = Bench::new();
    let spec = bench.spec("steps = 40", "every = 20");
    let (calm, _) = train(1, &spec, &bench.base("calm"), None).await;
    let (base, memory) = (bench.base("lost"), bench.path().join("memory"));
    let machines: Vec<PathBuf> = (0..4).map(|rank| memory.join(Rank(rank).to_string())).collect();
    machines.iter().for_each(|machine| std::fs::create_dir_all(machine).unwrap());
    let mut stage = Stage::open_on(3, Some(memory.clone()), start(&spec, &base, None)).await;
    stage.play(|_, event| matches!(event, RankEvent::ManifestStored { .. })).await;
    let begun = Instant::now();
    let of_first = |entry: &std::fs::DirEntry| entry.file_name().to_string_lossy().starts_with("20-");
    let kept = |machine: &PathBuf| std::fs::read_dir(machine.join("job-1")).into_iter().flatten().flatten();
    while machines.iter().flat_map(kept).filter(of_first).count() < 3 {
        assert!(begun.elapsed() < PATIENCE, "the first checkpoint is not in memory, or not any more");
        tokio::task::yield_now().await;
    }
    stage.tell_all(ToRank::Stop { reason: "the gang is lost".into() }).await;
    stage.ends().await;
    let folder = bench.path().join("lost/step-00000020-g1");
    for file in std::fs::read_dir(&folder).unwrap().flatten() {
        if file.file_name() != checkpoint::MANIFEST_FILE {
            std::fs::remove_file(file.path()).unwrap();
        }
    }
    let origin = format!("{base}/step-00000020-g1");
    let second = bench.base("again");
    let again = start(&spec, &second, Some(origin.clone()));
    let (outcomes, _) = Stage::open_on(4, Some(memory.clone()), again).await.conclude().await;
    assert!(outcomes.iter().all(|outcome| outcome.weights_blake3 == calm[0].weights_blake3));
    assert!(outcomes.iter().all(|outcome| outcome.ledger == Ledger { first: 0, end: 40 * 48 }), "{outcomes:?}");
    assert!(machines.iter().flat_map(kept).next().is_none(), "a job that is done leaves nothing in memory");
    let error = Stage::open_on(2, Some(memory), start(&spec, &base, Some(origin))).await.failure().await;
    assert!(error.contains("is missing"), "{error}");
}

/// The second rank's place is taken, so that it cannot store its shard: the first one's would only fill the disk.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_stored_of_a_checkpoint_that_will_not_be_is_removed() {
    let bench = Bench::new();
    let spec = bench.spec("steps = 60", "every = 20");
    let folder = bench.path().join("partial/step-00000020-g1");
    let taken = folder.join("shard-1-of-2.safetensors");
    std::fs::create_dir_all(taken.join("in the way")).unwrap();
    let mut stage = Stage::open(2, start(&spec, &bench.base("partial"), None)).await;
    // A later commit does not clear the folder.
    stage.kept.push("step-00000020-g1".to_owned());
    let (_, committed) = stage.conclude().await;
    assert_eq!(committed.last(), Some(&60));
    assert!(!committed.contains(&20) && taken.exists() && !folder.join("shard-0-of-2.safetensors").exists());
}
