//! The same by TCP beside the mesh.

use std::net::SocketAddr;

use stoke_protocol::message::peer::{ByTcp, Way};
use stoke_protocol::transport::{Accepted, BulkTcp};

use super::*;

fn by_tcp(machines: impl IntoIterator<Item = Option<u8>>) -> Cluster {
    Cluster { machines: machines.into_iter().collect(), tcp: UseTcp::Always, ..Cluster::new() }
}

/// What each rank gets of each step.
fn sums(gang: Vec<(Mesh, Exchange)>, shape: Shape, steps: std::ops::Range<u64>) -> Vec<Vec<Vec<f32>>> {
    let ranks = gang.into_iter().map(|(mesh, mut exchange)| {
        let steps = steps.clone();
        thread::spawn(move || {
            let mut lanes = exchange.lane_sums();
            let step = |step| {
                give(&mut lanes, |lane| gradient(9, step, lane, shape.values));
                exchange.all_reduce(Step(step), &mut lanes, None).unwrap().to_vec()
            };
            let sums = steps.map(step).collect();
            exchange.finish();
            drop(mesh);
            sums
        })
    });
    let ranks: Vec<_> = ranks.collect();
    ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
}

#[test]
fn values_by_tcp_have_the_same_bits() {
    let mut rng = ChaCha8Rng::seed_from_u64(13);
    for round in 0..12 {
        let world = rng.random_range(2..=5);
        let values = [0, 1, 1023, 600_001][round % 4];
        let shape = Shape { values, lanes: rng.random_range(world..10) };
        let cluster = by_tcp((0..world).map(|_| Some(rng.random_range(0..3)).filter(|name| *name > 0)));
        for sums in sums(cluster.gang(world, shape), shape, 0..3) {
            for (step, sum) in (0..).zip(sums) {
                let expected = plain(Subtree::root(shape.lanes), &|lane| gradient(9, step, lane, values));
                assert!(expected.iter().map(|v| v.to_bits()).eq(sum.iter().map(|v| v.to_bits())), "{shape:?}");
            }
        }
    }
}

/// Ranks that have some, and some that do not: each pair by what both have.
#[test]
fn each_pair_has_its_way() {
    let shape = Shape { values: 5000, lanes: 6 };
    let cluster = by_tcp([None]);
    let choices = [UseTcp::Always, UseTcp::Never, UseTcp::Always];
    let meshes: Vec<Mesh> = (0..).zip(choices).map(|(rank, choice)| cluster.mesh(1, rank).using_tcp(choice)).collect();
    let formed: Vec<Formed> =
        form(1, &meshes, &[], &vec![at(0, None); 3], shape).into_iter().map(Result::unwrap).collect();
    assert_eq!(formed.iter().map(|formed| formed.by_tcp).collect::<Vec<_>>(), [1, 0, 1]);
    let gang = meshes.into_iter().zip(formed.into_iter().map(|formed| formed.exchange)).collect();
    let expected = plain(Subtree::root(6), &|lane| gradient(9, 0, lane, 5000));
    assert!(sums(gang, shape, 0..1).iter().all(|sums| sums[0] == expected));
}

#[test]
fn a_member_that_is_late_is_waited_for() {
    // More than fits into windows and kernels: the others' values are not read before it is there.
    let shape = Shape { values: 12_000_000, lanes: 2 };
    let gang = by_tcp([None]).gang(2, shape);
    let ranks = gang.into_iter().enumerate().map(|(rank, (mesh, mut exchange))| {
        thread::spawn(move || {
            let mut lanes = lane_sums(shape, 2, rank);
            give(&mut lanes, |lane| vec![lane as f32 + 1.0; shape.values]);
            if rank == 1 {
                thread::sleep(Duration::from_secs(2));
            }
            let sum = exchange.all_reduce(Step(1), &mut lanes, None).map(|sum| (sum[0], sum[shape.values - 1]));
            exchange.finish();
            drop(mesh);
            sum
        })
    });
    let ranks: Vec<_> = ranks.collect();
    ranks.into_iter().for_each(|rank| assert_eq!(rank.join().unwrap().unwrap(), (3.0, 3.0)));
}

#[test]
fn a_peer_that_leaves_is_named_though_its_values_came_by_tcp() {
    let shape = Shape { values: 1000, lanes: 8 };
    let mut gang = by_tcp([None]).gang(3, shape);
    let left = gang[1].0.own();
    drop(gang.remove(1));
    let mut lanes = lane_sums(shape, 3, 0);
    give(&mut lanes, |_| vec![1.0; 1000]);
    let error = gang[0].1.all_reduce(Step(1), &mut lanes, None).unwrap_err();
    assert!(matches!(error, ExchangeError::PeerLeft { peer } if peer == left), "{error}");
}

/// A peer that says that it can be reached by TCP and cannot, and strangers at the port: the mesh carries the values.
#[test]
fn a_way_that_is_closed_is_not_taken() {
    let cluster = by_tcp([None]);
    let shape = Shape { values: 64, lanes: 2 };
    let zero = cluster.mesh(2, 0);
    let one = Endpoint::server(&cluster.io, SocketAddr::new(LOOPBACK, 0), Settings::bulk(), cluster.credentials(2, 1))
        .unwrap();
    let peer = RankId { rank: Rank(1), ..zero.own() };
    let membership = Membership {
        generation: Generation(2),
        members: vec![member(&zero), Member { id: peer, address: one.local_addr().unwrap() }].into(),
        joining: vec![].into(),
        after: None,
        ballot: 0,
        purpose: Purpose::Train,
        restarts: 0,
    };
    // Bound and closed again.
    let nobody = std::net::TcpListener::bind((LOOPBACK, 0)).unwrap().local_addr().unwrap().port();
    let standing = Standing {
        term: term(2),
        step: Some(Step(0)),
        has_sum: false,
        restores: None,
        files: None,
        machine: None,
        door: None,
        tcp: Some(nobody),
    };
    let (formed, (_connection, _stream, theirs, way)) = runtime().block_on(async {
        let played = async {
            let Some(Accepted::Session(connection)) = one.accept().await else { panic!("nobody came") };
            let mut stream = connection.open_bulk().await.unwrap();
            stream.write_header(&Opening::Exchange(standing)).await.unwrap();
            let mut heard = connection.accept_bulk().await.unwrap();
            let theirs = heard.read_header::<Opening>().await.unwrap();
            let way = heard.read_header::<Way>().await.unwrap();
            (connection, stream, theirs, way)
        };
        tokio::join!(zero.form(&membership, at(0, None), shape), played)
    });
    formed.unwrap();
    assert_eq!(way, Some(Way { term: term(2), tcp: false }));
    // Of another job, higher than the rank that it dials, or with no word of a generation: none is kept, and the port lives.
    let Some(Opening::Exchange(Standing { tcp: Some(port), .. })) = theirs else { panic!("{theirs:?}") };
    let address = SocketAddr::new(LOOPBACK, port);
    let RankId { job, generation, rank } = zero.own();
    let to_zero = Subject::Rank { job, generation, rank };
    let higher = cluster.credentials(2, 5);
    runtime().block_on(async {
        let mut refused = BulkTcp::dial(&higher, address, &to_zero, Duration::from_secs(5)).await.unwrap();
        refused.sender.write(&ByTcp { term: term(2) }, bytes::Bytes::new()).await.unwrap();
        let end = refused.receiver.read_header::<ByTcp>().await;
        assert!(!matches!(end, Ok(Some(_))), "it has nothing to say to it");
        let stranger = std::net::TcpStream::connect(address).unwrap();
        std::io::Write::write_all(&mut &stranger, b"GET / HTTP/1.1\r\n\r\n").unwrap();
        let other = Authority::in_memory(ClusterId([8; 16])).unwrap();
        let foreign = other.credentials(&to_zero, HOUR).unwrap();
        assert!(BulkTcp::dial(&foreign, address, &to_zero, Duration::from_secs(5)).await.is_err());
    });
}
