//! Values that leave while others of the step are still computed.

use super::*;

fn shape(values: usize, lanes: u32) -> Shape {
    Shape { values, tail: values.min(5), lanes, early: true, ..Shape::default() }
}

/// Gives a lane as backward does: the last layers first, what is no gradient at the end.
fn give_lane(exchange: &mut Exchange, sums: &mut LaneSums, (step, lane): (u64, u32), shape: Shape) {
    let values = gradient(9, step, lane, shape.values);
    let gradients = shape.values - shape.tail;
    let mut cuts: Vec<usize> = (0..=7).map(|part| gradients * part / 7).collect();
    sums.begin(lane);
    while let Some(end) = cuts.pop() {
        let start = cuts.last().copied().unwrap_or(0);
        sums.push(start, &values[start..end]);
        if sums.is_taken_early(lane) {
            exchange.give_early(Step(step), true, sums);
        }
    }
    sums.push(gradients, &values[gradients..]);
}

fn step(exchange: &mut Exchange, sums: &mut LaneSums, step: u64, shape: Shape) -> Result<Vec<u32>, ExchangeError> {
    sums.owned().for_each(|lane| give_lane(exchange, sums, (step, lane), shape));
    let sum = exchange.all_reduce(Step(step), sums, Some(Fingerprint(step)))?;
    Ok(sum.iter().map(|value| value.to_bits()).collect())
}

#[test]
fn values_that_leave_early_have_the_same_bits() {
    let mut rng = ChaCha8Rng::seed_from_u64(17);
    for (round, values) in [0, 1, 6, 1023, 150_001, 600_001].into_iter().cycle().take(18).enumerate() {
        let shape = shape(values, rng.random_range(5..10));
        let world = rng.random_range(1..=5);
        // Some share memory: there nothing leaves early.
        let machines = if round % 3 == 0 { vec![Some(1), None, Some(1), None] } else { vec![None] };
        let cluster = Cluster { machines, ..Cluster::new() };
        let ranks = cluster.gang(world, shape).into_iter().map(|(mesh, mut exchange)| {
            thread::spawn(move || {
                let mut sums = exchange.lane_sums();
                let steps: Vec<_> = (0..3).map(|at| step(&mut exchange, &mut sums, at, shape).unwrap()).collect();
                exchange.finish();
                drop(mesh);
                steps
            })
        });
        for rank in ranks.collect::<Vec<_>>() {
            let steps = rank.join().unwrap();
            assert!((0..).zip(steps).all(|(step, sum)| sum == expected(shape, step)), "{shape:?}, {world} ranks");
        }
    }
}

#[test]
fn rounded_values_that_leave_early_are_the_same_for_all_and_for_who_joins() {
    let cluster = Cluster::new();
    let shape = Shape { rounded: true, ..shape(300_000, 4) };
    let (members, joining) = ([cluster.mesh(1, 0), cluster.mesh(1, 1)], [cluster.mesh(2, 2)]);
    let states = [at(0, None), at(0, None), State::default()];
    let formed = form(2, &members, &joining, &states, shape);
    let ranks = formed.into_iter().map(|formed| {
        let mut exchange = formed.unwrap().exchange;
        thread::spawn(move || {
            let bits = |sum: &[f32]| sum.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
            if exchange.place().is_observer() {
                return (0..4).map(|step| bits(exchange.observe(Step(step), true).unwrap())).collect();
            }
            let mut sums = exchange.lane_sums();
            let steps: Vec<_> = (0..4).map(|at| step(&mut exchange, &mut sums, at, shape).unwrap()).collect();
            exchange.finish();
            steps
        })
    });
    let ranks: Vec<_> = ranks.collect();
    let sums: Vec<Vec<Vec<u32>>> = ranks.into_iter().map(|rank| rank.join().unwrap()).collect();
    assert!(sums.iter().all(|rank| *rank == sums[0]));
    let far = |(rounded, exact): (&u32, &u32)| (f32::from_bits(*rounded) - f32::from_bits(*exact)).abs() > 16.0;
    assert!((0..).zip(&sums[0]).all(|(step, sum)| !sum.iter().zip(&expected(shape, step)).any(far)));
}

/// Replicas are told behind the values: whoever has them all has no sum of different ones (X12).
#[test]
fn different_replicas_have_no_sum_though_all_values_are_there() {
    let cluster = Cluster::new();
    let shape = shape(200_000, 6);
    let (members, joining) = ([0, 1, 2].map(|rank| cluster.mesh(1, rank)), [cluster.mesh(2, 3)]);
    let states = [at(0, None), at(0, None), at(0, None), State::default()];
    let ranks = form(2, &members, &joining, &states, shape).into_iter().zip([7, 7, 8, 0]).map(|(formed, replica)| {
        let mut exchange = formed.unwrap().exchange;
        thread::spawn(move || {
            if exchange.place().is_observer() {
                return exchange.observe(Step(0), true).unwrap_err();
            }
            let mut sums = exchange.lane_sums();
            sums.owned().for_each(|lane| give_lane(&mut exchange, &mut sums, (0, lane), shape));
            exchange.all_reduce(Step(0), &mut sums, Some(Fingerprint(replica))).unwrap_err()
        })
    });
    for rank in ranks.collect::<Vec<_>>() {
        match rank.join().unwrap() {
            ExchangeError::Differ { replicas, .. } => {
                assert_eq!(replicas.iter().map(|(_, replica)| replica.0).collect::<Vec<_>>(), [7, 7, 8]);
            }
            // Those who have found it leave.
            ExchangeError::PeerLeft { .. } => {}
            other => panic!("{other}"),
        }
    }
}

/// One that joins and reads nothing for some steps: what replicas are is not behind the sums of later ones.
#[test]
fn who_joins_and_is_slow_gets_every_sum() {
    const STEPS: u64 = 5;
    let cluster = Cluster::new();
    let shape = shape(8_000_000, 2);
    let (members, joining) = ([cluster.mesh(1, 0), cluster.mesh(1, 1)], [cluster.mesh(2, 2)]);
    let states = [at(0, None), at(0, None), State::default()];
    let mut formed: Vec<Formed> = form(2, &members, &joining, &states, shape).into_iter().map(Result::unwrap).collect();
    let mut observer = formed.pop().unwrap().exchange;
    let (told, steps) = std::sync::mpsc::channel();
    for mut member in formed.into_iter().map(|formed| formed.exchange) {
        let told = told.clone();
        thread::spawn(move || {
            let mut sums = member.lane_sums();
            for step in 0..STEPS {
                give(&mut sums, |lane| vec![lane as f32 + step as f32; shape.values]);
                member.give_early(Step(step), true, &mut sums);
                member.all_reduce(Step(step), &mut sums, Some(Fingerprint(step))).unwrap();
                told.send(step).unwrap();
            }
            member.finish();
        });
    }
    // Both have summed so many.
    for _ in 0..2 * 2 {
        steps.recv().unwrap();
    }
    let (told, seen) = std::sync::mpsc::channel();
    thread::spawn(move || {
        for step in 0..STEPS {
            let sum = observer.observe(Step(step), true).unwrap();
            told.send(sum.iter().all(|value| *value == 1.0 + 2.0 * step as f32)).unwrap();
        }
    });
    for step in 0..STEPS {
        assert_eq!(seen.recv_timeout(Duration::from_secs(60)), Ok(true), "step {step}");
    }
}

/// One that is lost when it has given everything, and before it has said what it was computed from: nobody has a sum.
#[test]
fn values_without_a_word_on_their_parameters_make_no_sum() {
    let cluster = Cluster::new();
    let shape = shape(100_000, 2);
    let mut gang = cluster.gang(2, shape);
    let ((lost_mesh, mut lost), (_mesh, mut other)) = (gang.remove(0), gang.remove(0));
    let peer = lost_mesh.own();
    let waiting = thread::spawn(move || {
        let mut sums = other.lane_sums();
        step(&mut other, &mut sums, 0, shape).unwrap_err()
    });
    let mut sums = lost.lane_sums();
    give_lane(&mut lost, &mut sums, (0, 0), shape);
    sums.finish();
    lost.give_early(Step(0), true, &mut sums);
    // Until the other has given its half of the partial sums, and its half of the sum.
    let all = (shape.values * 4) as u64;
    let deadline = Instant::now() + Duration::from_secs(10);
    while lost.stats().received_bytes < all && Instant::now() < deadline {
        thread::yield_now();
    }
    assert_eq!(lost.stats().received_bytes, all, "the sums leave when their values are there");
    drop((lost, lost_mesh));
    let error = waiting.join().unwrap();
    let gone = matches!(&error, ExchangeError::PeerLeft { peer: of } | ExchangeError::PeerLost { peer: of, .. } if *of == peer);
    assert!(gone, "{error}");
}
