//! The same through memory, which ranks of one machine share.

use std::sync::Arc;

use super::super::machine::{self, Open};
use super::super::memory::Layout;
use super::super::plan::{Hosts, Plan};
use super::*;

/// Ranks that exchange through memory.
fn neighbours() -> Cluster {
    Cluster { machines: vec![Some(1)], ..Cluster::new() }
}

#[test]
fn every_world_gets_the_same_bits_through_memory() {
    let cluster = neighbours();
    let mut rng = ChaCha8Rng::seed_from_u64(6);
    for values in [0, 1, 100, 1023, 150_001] {
        let shape = Shape { values, lanes: rng.random_range(4..10), ..Shape::default() };
        for world in [2, 3, rng.random_range(4..=shape.lanes)] {
            for in_place in [true, false] {
                let ranks = cluster.gang(world, shape).into_iter().enumerate().map(|(rank, (mesh, mut exchange))| {
                    thread::spawn(move || {
                        let mut sums = if in_place { exchange.lane_sums() } else { lane_sums(shape, world, rank) };
                        for step in 0..5 {
                            if step == 3 {
                                // One that is given up halfway.
                                sums.begin(sums.owned().start);
                                sums.push(0, &vec![f32::NAN; shape.values]);
                            }
                            give(&mut sums, |lane| gradient(9, step, lane, shape.values));
                            let sum = exchange.all_reduce(Step(step), &mut sums, None).unwrap();
                            let lane = |lane| gradient(9, step, lane, shape.values);
                            let expected = plain(Subtree::root(shape.lanes), &lane);
                            let same = expected.iter().map(|v| v.to_bits()).eq(sum.iter().map(|v| v.to_bits()));
                            assert!(same, "{shape:?}, {world} ranks, rank {rank}, step {step}");
                        }
                        exchange.finish();
                        let stats = exchange.stats();
                        assert_eq!((stats.sent_bytes, stats.received_bytes), (0, 0), "no value went over the network");
                        drop(mesh);
                    })
                });
                let ranks: Vec<_> = ranks.collect();
                ranks.into_iter().for_each(|rank| rank.join().unwrap());
            }
        }
    }
}

#[test]
fn a_neighbour_that_leaves_is_named_and_an_abort_wakes_who_waits() {
    let cluster = neighbours();
    let shape = Shape { values: 1_000, lanes: 8, ..Shape::default() };
    let mut gang = cluster.gang(3, shape);
    let left = gang[1].0.own();
    drop(gang.remove(1));
    let mut sums = gang[0].1.lane_sums();
    give(&mut sums, |lane| gradient(1, 0, lane, shape.values));
    for _ in 0..2 {
        let lost = gang[0].1.all_reduce(Step(1), &mut sums, None).unwrap_err();
        assert!(matches!(lost, ExchangeError::PeerLeft { peer } if peer == left), "{lost:?}");
    }

    let mut gang = cluster.gang(2, shape);
    let (_mesh, mut waiting) = gang.remove(0);
    let abort = waiting.abort_handle();
    let blocked = thread::spawn(move || {
        let mut sums = waiting.lane_sums();
        give(&mut sums, |lane| gradient(1, 0, lane, shape.values));
        waiting.all_reduce(Step(1), &mut sums, None).unwrap_err()
    });
    // Before it waits, or while it does.
    abort.abort("cancelled by a user");
    assert!(matches!(blocked.join().unwrap(), ExchangeError::Aborted { .. }));
}

#[test]
fn the_last_sum_outlives_the_exchange_and_what_others_do_next() {
    let cluster = neighbours();
    let shape = Shape { values: 5_000, lanes: 4, ..Shape::default() };
    let ranks: Vec<_> = cluster.gang(2, shape).into_iter().collect();
    let ranks = ranks.into_iter().map(|(mesh, mut exchange)| {
        thread::spawn(move || {
            let mut sums = exchange.lane_sums();
            for step in 0..3 {
                give(&mut sums, |lane| gradient(3, step, lane, shape.values));
                exchange.all_reduce(Step(step), &mut sums, None).unwrap();
            }
            // Half of the next step, as when somebody is lost.
            sums.begin(sums.owned().start);
            sums.push(0, &vec![1.0; shape.values]);
            exchange.leave();
            drop(mesh);
            exchange.into_last_sum().unwrap()
        })
    });
    let expected = plain(Subtree::root(4), &|lane| gradient(3, 2, lane, shape.values));
    let ranks: Vec<_> = ranks.collect();
    for rank in ranks {
        let (step, sum) = rank.join().unwrap();
        assert!(step == Step(2) && sum.as_ref() == super::super::sum::as_bytes(&expected));
    }
}

#[test]
fn replicas_that_differ_and_other_steps_are_not_summed() {
    use stoke_protocol::ids::Fingerprint;
    let cluster = neighbours();
    let shape = Shape { values: 100, lanes: 4, ..Shape::default() };
    let errors = |calls: [(Step, Option<Fingerprint>); 2]| -> Vec<ExchangeError> {
        let ranks = cluster.gang(2, shape).into_iter().zip(calls).map(|((mesh, mut exchange), (step, replica))| {
            thread::spawn(move || {
                let mut sums = exchange.lane_sums();
                give(&mut sums, |_| vec![1.0; shape.values]);
                let error = exchange.all_reduce(step, &mut sums, replica).unwrap_err();
                drop(mesh);
                error
            })
        });
        let ranks: Vec<_> = ranks.collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    };
    for error in errors([(Step(4), Some(Fingerprint(1))), (Step(4), Some(Fingerprint(2)))]) {
        let ExchangeError::Differ { step: Step(4), replicas } = error else { panic!("{error}") };
        assert_eq!(replicas.iter().map(|(_, replica)| replica.0).collect::<Vec<_>>(), [1, 2]);
    }
    for error in errors([(Step(4), None), (Step(5), None)]) {
        assert!(matches!(error, ExchangeError::Refused { .. }), "{error}");
    }
}

#[test]
fn memory_is_for_those_with_the_cookie_and_of_one_size() {
    let layout = |values| Layout::of(&Plan::new((values, 0), 4, (2, 0), 0, &Hosts::of([Some(1), Some(1)]))).unwrap();
    runtime().block_on(async {
        let open = Open::new().unwrap();
        let door = open.door;
        let stranger = stoke_protocol::message::peer::Door { cookie: [0; 16], ..door };
        let (given, (refused, taken)) = tokio::join!(open.give(layout(100), 1), async {
            (machine::take(&stranger, layout(100)).await, machine::take(&door, layout(100)).await)
        });
        let (given, taken) = (Arc::new(given.unwrap()), taken.unwrap());
        assert!(refused.is_err());
        given.line(1).given.store(7, std::sync::atomic::Ordering::Release);
        assert_eq!(taken.line(1).given.load(std::sync::atomic::Ordering::Acquire), 7);

        let open = Open::new().unwrap();
        let door = open.door;
        let taking = async { machine::take(&door, layout(100_000)).await.map(drop) };
        let giving = async { tokio::time::timeout(Duration::from_millis(200), open.give(layout(100), 1)).await };
        let (given, taken) = tokio::join!(giving, taking);
        assert!(given.is_err(), "nobody has mapped it, and it waits");
        assert!(taken.unwrap_err().to_string().contains("is not what this generation exchanges through"));
    });
}
