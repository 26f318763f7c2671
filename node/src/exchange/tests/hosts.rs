//! The same where some ranks share memory and others do not: hosts of any sizes.

use super::*;

fn on(machines: impl IntoIterator<Item = Option<u8>>) -> Cluster {
    Cluster { machines: machines.into_iter().collect(), ..Cluster::new() }
}

#[test]
fn any_hosts_get_the_same_bits() {
    let mut rng = ChaCha8Rng::seed_from_u64(12);
    for round in 0..25 {
        let world = rng.random_range(2..=6);
        let values = [0, 1, 100, 1023, 150_001][round % 5];
        let shape = Shape { values, lanes: rng.random_range(world..10), ..Shape::default() };
        let machines: Vec<_> = (0..world).map(|_| Some(rng.random_range(0..3)).filter(|name| *name > 0)).collect();
        let cluster = on(machines.iter().copied());
        for (rank, (sums, _)) in train(cluster.gang(world, shape), shape, 4, round % 2 == 0).into_iter().enumerate() {
            for (step, sum) in (0..).zip(sums) {
                assert!(sum == expected(shape, step), "{shape:?}, {machines:?}, rank {rank}, step {step}");
            }
        }
    }
}

/// Two hosts of two ranks: each gives the half that the other owns and brings its own half's sum, once, where ranks by themselves would send three
/// times as much.
#[test]
fn each_value_goes_from_host_to_host_once() {
    let shape = Shape { values: 64 * 1024, lanes: 8, ..Shape::default() };
    let sent = |machines: [Option<u8>; 4]| -> Vec<u64> {
        train(on(machines).gang(4, shape), shape, 2, true).into_iter().map(|(_, sent)| sent / 2 / 4).collect()
    };
    let values = shape.values as u64;
    assert_eq!(sent([Some(1), Some(1), Some(2), Some(2)]), [values / 2; 4]);
    assert_eq!(sent([None; 4]), [3 * values / 2; 4]);
}

#[test]
fn everybody_learns_which_replicas_differ() {
    // Within a host, between hosts, both; and with so few values that some own none.
    for (replicas, values) in
        [([1, 2, 1, 1], 1000), ([1, 1, 2, 2], 1000), ([1, 2, 3, 3], 1000), ([1, 1, 2, 2], 16), ([1, 2, 1, 1], 33)]
    {
        let shape = Shape { values, lanes: 8, ..Shape::default() };
        let cluster = on([Some(1), Some(1), Some(2), Some(2)]);
        let ranks = cluster.gang(4, shape).into_iter().zip(replicas).map(|((mesh, mut exchange), replica)| {
            thread::spawn(move || {
                let mut lanes = exchange.lane_sums();
                give(&mut lanes, |_| vec![1.0; shape.values]);
                let error = exchange.all_reduce(Step(4), &mut lanes, Some(Fingerprint(replica))).unwrap_err();
                // They stay until everybody knows. For a job it is enough that the first to leave does.
                (mesh, exchange, error)
            })
        });
        let ranks: Vec<_> = ranks.collect();
        let ended: Vec<_> = ranks.into_iter().map(|rank| rank.join().unwrap()).collect();
        for (.., error) in ended {
            let ExchangeError::Differ { step: Step(4), replicas: told } = error else { panic!("{error}") };
            assert_eq!(told.iter().map(|(_, replica)| replica.0).collect::<Vec<_>>(), replicas);
        }
    }
}

/// One that says so though it is not so ends the step of all, and nobody is voted out for it.
#[test]
fn replicas_that_are_the_same_are_not_said_to_differ() {
    let cluster = Cluster::new();
    let shape = Shape { values: 64, lanes: 2, ..Shape::default() };
    let one = cluster.mesh(2, 1);
    let zero = cluster.played(2, 0);
    let peer = RankId { rank: Rank(0), ..one.own() };
    let membership = membership(2, vec![Member { id: peer, address: one.address() }, member(&one)], vec![]);
    let (formed, _said) = runtime().block_on(async {
        let said = async {
            let connection = zero.connect(one.address(), &subject(one.own())).await.unwrap();
            let mut stream = connection.open_bulk().await.unwrap();
            stream.write_header(&Opening::Exchange(standing(2, 0))).await.unwrap();
            let replica = Some(Fingerprint(7));
            let header =
                TensorHeader { term: term(2), step: Step(1), part: Part::Replica, offset: 0, count: 0, replica };
            stream.write_header(&header).await.unwrap();
            (connection, stream)
        };
        tokio::join!(one.form(&membership, at(0, None), shape), said)
    });
    let mut exchange = formed.unwrap().exchange;
    let mut lanes = exchange.lane_sums();
    give(&mut lanes, |_| vec![1.0; 64]);
    let error = exchange.all_reduce(Step(1), &mut lanes, Some(Fingerprint(7))).unwrap_err();
    assert!(matches!(&error, ExchangeError::State { peer: from, .. } if *from == peer), "{error}");
}

/// Whoever is lost, of the own host or of another, and whoever speaks with it: nobody waits for ever, and an abort wakes who waits.
#[test]
fn a_lost_rank_ends_the_exchange_of_all() {
    let shape = Shape { values: 100_000, lanes: 8, ..Shape::default() };
    for lost in 0..4 {
        let mut gang = on([Some(1), Some(1), Some(2), Some(2)]).gang(4, shape);
        let left = gang[lost].0.own();
        drop(gang.remove(lost));
        let ranks = gang.into_iter().map(|(mesh, mut exchange)| {
            thread::spawn(move || {
                let mut lanes = exchange.lane_sums();
                give(&mut lanes, |lane| gradient(1, 0, lane, shape.values));
                let error = exchange.all_reduce(Step(1), &mut lanes, None).unwrap_err();
                drop(mesh);
                error
            })
        });
        let ranks: Vec<_> = ranks.collect();
        let errors: Vec<_> = ranks.into_iter().map(|rank| rank.join().unwrap()).collect();
        let names_it = |error: &ExchangeError| matches!(error, ExchangeError::PeerLeft { peer } if *peer == left);
        assert!(errors.iter().any(names_it), "{errors:?}");
    }
    let (mesh, mut waiting) = on([Some(1), Some(1), Some(2)]).gang(3, shape).remove(2);
    let abort = waiting.abort_handle();
    let blocked = thread::spawn(move || {
        let mut lanes = waiting.lane_sums();
        give(&mut lanes, |lane| gradient(1, 0, lane, shape.values));
        waiting.all_reduce(Step(1), &mut lanes, None).unwrap_err()
    });
    abort.abort("cancelled by a user");
    assert!(matches!(blocked.join().unwrap(), ExchangeError::Aborted { .. } | ExchangeError::PeerLeft { .. }));
    drop(mesh);
}

/// A rank that cannot get at the memory of its machine is enough: nobody of the machine uses it, and everybody knows.
#[test]
fn all_of_a_machine_share_memory_or_none_does() {
    let cluster = on([Some(1), Some(1), None]);
    let shape = Shape { values: 48, lanes: 3, ..Shape::default() };
    let (one, two) = (cluster.mesh(2, 1), cluster.mesh(2, 2));
    let zero = cluster.played(2, 0);
    let peer = RankId { rank: Rank(0), ..one.own() };
    let membership =
        membership(2, vec![Member { id: peer, address: one.address() }, member(&one), member(&two)], vec![]);
    // Nobody listens there.
    let door = Some(Door { name: [9; 16], cookie: [9; 16] });
    let standing = Standing { machine: Some(Machine([1; 16])), door, ..standing(2, 0) };
    let header = |part, offset| TensorHeader { term: term(2), step: Step(1), part, offset, count: 16, replica: None };
    let play = async |mesh: &Mesh| {
        let connection = zero.connect(mesh.address(), &subject(mesh.own())).await.unwrap();
        let mut stream = connection.open_bulk().await.unwrap();
        stream.write_header(&Opening::Exchange(standing)).await.unwrap();
        stream.write_header(&Sharing { term: term(2), shares: false }).await.unwrap();
        // What a rank by itself gives.
        let own = Part::Partial(Subtree { start: 0, len: 1 });
        for header in [header(own, 32 - 16 * u64::from(mesh.own().rank.0)), header(Part::Sum, 32)] {
            stream.write_header(&header).await.unwrap();
            stream.write_chunk(bytes::Bytes::from(vec![0; 64])).await.unwrap();
        }
        (connection, stream)
    };
    let (formed, _played) = runtime().block_on(async {
        let forming = [&one, &two].map(|mesh| mesh.form(&membership, at(0, None), shape));
        let played = async { tokio::join!(play(&one), play(&two)) };
        tokio::join!(futures_util::future::join_all(forming), played)
    });
    let ranks = formed.into_iter().zip([1, 2]).map(|(formed, lane)| {
        let mut exchange = formed.unwrap().exchange;
        thread::spawn(move || {
            let mut lanes = exchange.lane_sums();
            give(&mut lanes, |_| vec![lane as f32; 48]);
            let sum = exchange.all_reduce(Step(1), &mut lanes, None).unwrap().to_vec();
            // The other may still wait for this one's.
            (exchange, sum)
        })
    });
    let ranks: Vec<_> = ranks.collect();
    let ended: Vec<_> = ranks.into_iter().map(|rank| rank.join().unwrap()).collect();
    for (_, sum) in ended {
        assert_eq!(sum, [[3.0; 16], [3.0; 16], [0.0; 16]].concat());
    }
}
