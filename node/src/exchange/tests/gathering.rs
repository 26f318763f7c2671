//! Parameters that each rank steps a share of, among ranks that share memory and ranks that do not.

use super::*;

/// The parameters after a step: what anybody may expect of a rank's share.
fn parameter(step: u64, place: usize) -> f32 {
    (step as f32) * 1000.0 + place as f32
}

/// What one rank sees of some steps: the parameters before the first, then each sum and the parameters after it.
fn see(
    exchange: &mut Exchange,
    shares: &Shares,
    shape: Shape,
    steps: std::ops::Range<u64>,
) -> Result<(), ExchangeError> {
    let position = exchange.place().position;
    let mut sums = exchange.lane_sums();
    for step in steps {
        let mut gathering = exchange.gather(Step(step), shares)?;
        let own = shares.range(position);
        own.clone().zip(gathering.own()).for_each(|(place, value)| *value = parameter(step, place));
        let all = gathering.complete()?;
        assert!((0..).zip(&all[..shares.values()]).all(|(place, value)| *value == parameter(step, place)), "{step}");
        give(&mut sums, |lane| gradient(9, step, lane, shape.values));
        let sum = exchange.all_reduce(Step(step), &mut sums, Some(Fingerprint(step)))?;
        let bits: Vec<u32> = sum.iter().map(|value| value.to_bits()).collect();
        // Rounded sums are others; what is gathered is exact all the same.
        assert!(shape.rounded || bits == expected(shape, step), "{shape:?}, step {step}");
    }
    Ok(())
}

#[test]
fn parameters_come_to_all_between_the_sums_whatever_the_hosts() {
    let mut rng = ChaCha8Rng::seed_from_u64(21);
    for round in 0..16 {
        let world = rng.random_range(1..=6);
        let machines: Vec<_> = (0..world).map(|_| Some(rng.random_range(0..3)).filter(|name| *name > 0)).collect();
        let cluster = Cluster { machines: machines.clone(), ..Cluster::new() };
        // Also fewer parameters than ranks.
        let sizes: Vec<usize> = (0..[2, 9, 30][round % 3]).map(|_| rng.random_range(1..20_000)).collect();
        let tail = 7;
        let values = sizes.iter().sum::<usize>() + tail;
        let lanes = rng.random_range(world..10);
        let shape = Shape { values, tail, lanes, rounded: round % 4 == 3, early: round % 2 == 0 };
        let shares = Shares::deal(&sizes, world);
        let ranks = cluster.gang(world, shape).into_iter().map(|(mesh, mut exchange)| {
            let shares = shares.clone();
            thread::spawn(move || {
                see(&mut exchange, &shares, shape, 3..7).unwrap();
                exchange.finish();
                drop(mesh);
            })
        });
        for rank in ranks.collect::<Vec<_>>() {
            rank.join().unwrap_or_else(|_| panic!("{shape:?}, {machines:?}"));
        }
    }
}

/// It goes when the others have its sums and not its parameters.
#[test]
fn a_rank_that_goes_before_it_has_given_its_parameters_ends_the_generation() {
    let shape = Shape { values: 3_000, lanes: 8, ..Shape::default() };
    let shares = Shares::deal(&[1_000; 3], 3);
    for machines in [vec![None], vec![Some(1)], vec![Some(1), None, Some(1)]] {
        let cluster = Cluster { machines, ..Cluster::new() };
        let mut gang = cluster.gang(3, shape);
        let (mesh, mut leaves) = gang.remove(1);
        let stays = gang.into_iter().map(|(mesh, mut exchange)| {
            let shares = shares.clone();
            thread::spawn(move || {
                let mut sums = exchange.lane_sums();
                give(&mut sums, |lane| gradient(9, 0, lane, shape.values));
                exchange.all_reduce(Step(0), &mut sums, None).unwrap();
                let error =
                    exchange.gather(Step(1), &shares).and_then(|gathering| gathering.complete().map(drop)).unwrap_err();
                // Or the first that has found it, which goes for it.
                assert!(matches!(error, ExchangeError::PeerLeft { .. }), "{error}");
                assert!(exchange.gather(Step(1), &shares).is_err(), "X9");
                // Of the step that all have summed.
                assert!(exchange.into_last_sum().is_some_and(|(step, _)| step == Step(0)));
                mesh
            })
        });
        let stays: Vec<_> = stays.collect();
        let mut sums = leaves.lane_sums();
        give(&mut sums, |lane| gradient(9, 0, lane, shape.values));
        leaves.all_reduce(Step(0), &mut sums, None).unwrap();
        leaves.leave();
        drop(leaves);
        stays.into_iter().for_each(|stays| drop(stays.join().unwrap()));
        drop(mesh);
    }
}

/// The memory of a sum is written again by the second operation after it: it is not handed to anybody then.
#[test]
fn a_sum_that_was_written_over_is_nobodys_last_sum() {
    let shape = Shape { values: 3_000, lanes: 8, ..Shape::default() };
    let shares = Shares::deal(&[1_000; 3], 2);
    let cluster = Cluster { machines: vec![Some(1)], ..Cluster::new() };
    let mut gang = cluster.gang(2, shape);
    let (other_mesh, mut other) = gang.pop().unwrap();
    let shared = shares.clone();
    let other = thread::spawn(move || {
        see(&mut other, &shared, shape, 0..2).unwrap();
        other.gather(Step(2), &shared).unwrap().complete().unwrap();
        drop(other);
        other_mesh
    });
    let (_mesh, mut exchange) = gang.pop().unwrap();
    see(&mut exchange, &shares, shape, 0..2).unwrap();
    exchange.gather(Step(2), &shares).unwrap().complete().unwrap();
    drop(other.join().unwrap());
    let mut sums = exchange.lane_sums();
    give(&mut sums, |lane| gradient(9, 2, lane, shape.values));
    assert!(exchange.all_reduce(Step(2), &mut sums, None).is_err());
    assert!(exchange.into_last_sum().is_none());
}
