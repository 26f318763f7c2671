//! Ranks that keep parts of the optimizer's state.

use super::*;

const SHARDED: &str = "sharding = \"zero1\"\n";

fn sharded(bench: &Bench, steps: u64, every: u64) -> (String, String) {
    let spec = |train: String| bench.spec(&train, &format!("every = {every}"));
    (spec(format!("steps = {steps}")), spec(format!("{SHARDED}steps = {steps}")))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn parts_of_the_state_change_no_bit_on_any_number_of_ranks_and_checkpoints_are_the_same() {
    let bench = Bench::new();
    let (whole, parts) = sharded(&bench, 9, 3);
    let (alone, _) = train(1, &whole, &bench.base("calm"), None).await;
    for world in 1..=5 {
        let base = bench.base(&format!("parts-{world}"));
        let (outcomes, committed) = train(world, &parts, &base, None).await;
        assert_eq!(committed, [3, 6, 9]);
        for outcome in &outcomes {
            assert_eq!(outcome.weights_blake3, alone[0].weights_blake3, "{world} ranks");
            assert_eq!(outcome.loss.to_bits(), alone[0].loss.to_bits());
        }
        assert_eq!(outcomes[0].metrics, alone[0].metrics);
        // Either way goes on from the other's.
        let half = |base: &str| Some(format!("{base}/step-00000006-g1"));
        for (spec, from, resumed) in [(&whole, half(&base), 2), (&parts, half(&bench.base("calm")), world)] {
            let again = bench.base(&format!("again-{world}-{resumed}-{}", from.is_some()));
            let (outcomes, _) = train(resumed, spec, &again, from).await;
            assert!(outcomes.iter().all(|outcome| outcome.weights_blake3 == alone[0].weights_blake3), "{world} ranks");
            std::fs::remove_dir_all(again.strip_prefix("file://").unwrap()).unwrap();
        }
    }
}

/// Local steps step lanes by themselves, with the whole state of their own optimizer; what is sharded is the outer one's.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_state_of_what_applies_local_steps_is_sharded_too() {
    let bench = Bench::new();
    let spec = |sharding: &str| {
        let spec = bench.spec(&format!("{sharding}steps = 5"), "every = 3");
        format!("{spec}\n[train.diloco]\nlocal_steps = 2\n")
    };
    let (alone, _) = train(1, &spec(""), &bench.base("whole"), None).await;
    let (parts, _) = train(4, &spec(SHARDED), &bench.base("parts"), None).await;
    assert!(parts.iter().all(|outcome| outcome.weights_blake3 == alone[0].weights_blake3));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ranks_that_die_and_are_replaced_are_handed_their_part() {
    let bench = Bench::new();
    let (whole, parts) = sharded(&bench, 3000, 500);
    let (calm, _) = train(1, &whole, &bench.base("calm"), None).await;
    for world in [2, 4] {
        die_and_are_replaced(world, &parts, &bench.base(&format!("wild-{world}")), (&calm[0], 3000)).await;
    }
}

/// Of four, those at places 0 and 2 are each other's buddies.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_that_are_not_buddies_lose_nothing_and_two_that_are_are_told_of() {
    let bench = Bench::new();
    let (whole, parts) = sharded(&bench, 2000, 500);
    let (calm, _) = train(1, &whole, &bench.base("calm"), None).await;
    for (second, is_lost) in [(1, false), (2, true)] {
        let base = bench.base(&format!("two-{second}"));
        let mut stage = Stage::open(4, start(&parts, &base, None)).await;
        stage.play(|_, event| matches!(event, RankEvent::Resumed { .. })).await;
        stage.until_step(50).await;
        for victim in [stage.members[0].id, stage.members[second].id] {
            stage.lose(victim).await;
            stage.members.retain(|member| member.id != victim);
        }
        stage.regroup(false).await;
        if !is_lost {
            let outcomes = stage.finish().await;
            assert_eq!(outcomes.len(), 2);
            assert!(outcomes.iter().all(|outcome| outcome.weights_blake3 == calm[0].weights_blake3));
            continue;
        }
        let mut told = Vec::new();
        stage
            .play(|rank, event| {
                if let RankEvent::StateLost { error, .. } = event {
                    assert!(error.contains("nobody has the optimizer's state of"), "{error}");
                    told.push(rank);
                }
                told.len() == 2
            })
            .await;
        assert_ne!(told[0], told[1]);
        stage.tell_all(ToRank::Stop { reason: "back to the last checkpoint".into() }).await;
    }
}

/// What one steps wrongly the other sees, before any step is computed from it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_that_step_a_part_otherwise_are_told_of() {
    let bench = Bench::new();
    let (_, right) = sharded(&bench, 2000, 500);
    let wrong = format!("{right}\n[schedule]\nlr = 0.02\n");
    let base = bench.base("wrong");
    let given = |id: RankId| start(if id.rank == Rank(1) { &wrong } else { &right }, &base, None)(id);
    let mut stage = Stage::open(3, given).await;
    stage
        .play(|_, event| match event {
            RankEvent::StateLost { step, error, .. } => {
                assert_eq!(*step, Step(1));
                assert!(error.contains("rank-1") && error.contains("both stepped the parameter"), "{error}");
                true
            }
            _ => false,
        })
        .await;
    stage.tell_all(ToRank::Stop { reason: "back to the last checkpoint".into() }).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_quorum_hands_parts_over_while_the_coordinator_is_away() {
    let bench = Bench::new();
    let (whole, parts) = sharded(&bench, 3000, 500);
    let (calm, _) = train(1, &whole, &bench.base("calm"), None).await;
    let mut stage = Stage::open(4, start(&parts, &bench.base("alone"), None)).await;
    stage.play(|_, event| matches!(event, RankEvent::Resumed { .. })).await;
    stage.until_step(100).await;
    stage.tell_all(ToRank::Coordinator { reachable: false }).await;
    let victim = stage.members[1].id;
    stage.lose(victim).await;
    while stage.went_on < 3 {
        stage.play(|_, event| matches!(event, RankEvent::WentOn { .. })).await;
    }
    let lost_at = stage.step;
    stage.until_step(lost_at + 300).await;
    stage.tell_all(ToRank::Coordinator { reachable: true }).await;
    stage.members.retain(|member| member.id != victim);
    stage.regroup(false).await;
    let outcomes = stage.finish().await;
    assert_eq!(outcomes.len(), 3);
    assert!(outcomes.iter().all(|outcome| outcome.weights_blake3 == calm[0].weights_blake3), "{:?}", stage.resumed);
}
