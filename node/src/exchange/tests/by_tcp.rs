//! The same by TCP beside the mesh.

use std::net::SocketAddr;
use std::sync::atomic::Ordering;

use stoke_protocol::message::peer::{ByTcp, Way};
use stoke_protocol::transport::{Accepted, BulkTcp};

use super::*;

/// One frame more than a link holds that nobody takes frames from (L5).
const WINDOW_BYTES: u64 = 19 * 256 * 1024;

fn by_tcp(machines: impl IntoIterator<Item = Option<u8>>) -> Cluster {
    Cluster { machines: machines.into_iter().collect(), tcp: UseTcp::Always, ..Cluster::new() }
}

#[test]
fn values_by_tcp_have_the_same_bits() {
    let mut rng = ChaCha8Rng::seed_from_u64(13);
    for round in 0..12 {
        let world = rng.random_range(2..=5);
        let values = [0, 1, 1023, 600_001][round % 4];
        let shape = Shape { values, lanes: rng.random_range(world..10), ..Shape::default() };
        let machines: Vec<_> = (0..world).map(|_| Some(rng.random_range(0..3)).filter(|name| *name > 0)).collect();
        let is_spread = machines.contains(&None) || machines.iter().any(|machine| *machine != machines[0]);
        let formed = by_tcp(machines).formed(world, shape);
        assert_eq!(formed.iter().any(|(_, formed)| formed.by_tcp > 0), is_spread, "{shape:?}");
        for (sums, _) in train(exchanges(formed), shape, 3, true) {
            assert!((0..).zip(sums).all(|(step, sum)| sum == expected(shape, step)), "{shape:?}");
        }
    }
}

/// Ranks that have some, and some that do not: each pair by what both have.
#[test]
fn each_pair_has_its_way() {
    let shape = Shape { values: 5000, lanes: 6, ..Shape::default() };
    let cluster = by_tcp([None]);
    let choices = [UseTcp::Always, UseTcp::Never, UseTcp::Always];
    let meshes: Vec<Mesh> = (0..).zip(choices).map(|(rank, choice)| cluster.mesh(1, rank).using_tcp(choice)).collect();
    let formed = form(1, &meshes, &[], &vec![at(0, None); 3], shape).into_iter().map(Result::unwrap);
    let formed: Vec<_> = meshes.into_iter().zip(formed).collect();
    assert_eq!(formed.iter().map(|(_, formed)| formed.by_tcp).collect::<Vec<_>>(), [1, 0, 1]);
    assert!(train(exchanges(formed), shape, 1, true).iter().all(|(sums, _)| sums[0] == expected(shape, 0)));
}

/// Its link reads no more than a window, and the kernels fill: nobody takes that for a loss.
#[test]
fn a_member_that_is_late_is_waited_for() {
    let shape = Shape { values: 12_000_000, lanes: 2, ..Shape::default() };
    let gang = by_tcp([None]).gang(2, shape);
    let first = gang[0].0.counters().clone();
    let ranks = gang.into_iter().enumerate().map(|(rank, (mesh, mut exchange))| {
        let first = first.clone();
        thread::spawn(move || {
            let mut lanes = lane_sums(shape, 2, rank);
            give(&mut lanes, |lane| vec![lane as f32 + 1.0; shape.values]);
            // It comes when more was written than its link takes in.
            let deadline = Instant::now() + Duration::from_secs(30);
            while rank == 1 && first.sent_bytes.load(Ordering::Relaxed) < WINDOW_BYTES {
                assert!(Instant::now() < deadline, "nothing was written");
                thread::yield_now();
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
    let shape = Shape { values: 1000, lanes: 8, ..Shape::default() };
    let formed = by_tcp([None]).formed(3, shape);
    assert!(formed.iter().all(|(_, formed)| formed.by_tcp == 2));
    let mut gang = exchanges(formed);
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
    let shape = Shape { values: 64, lanes: 2, ..Shape::default() };
    let zero = cluster.mesh(2, 0);
    let one = Endpoint::server(&cluster.io, SocketAddr::new(LOOPBACK, 0), Settings::bulk(), cluster.credentials(2, 1))
        .unwrap();
    let peer = RankId { rank: Rank(1), ..zero.own() };
    let membership =
        membership(2, vec![member(&zero), Member { id: peer, address: one.local_addr().unwrap() }], vec![]);
    // Bound and closed again.
    let nobody = std::net::TcpListener::bind((LOOPBACK, 0)).unwrap().local_addr().unwrap().port();
    let standing = Standing { tcp: Some(nobody), ..standing(2, 0) };
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
    // A rank that is not the lower one, somebody who speaks no TLS, one of another cluster: none gets in, and the port lives.
    let Some(Opening::Exchange(Standing { tcp: Some(port), .. })) = theirs else { panic!("{theirs:?}") };
    let address = SocketAddr::new(LOOPBACK, port);
    let to_zero = subject(zero.own());
    runtime().block_on(async {
        let mut refused =
            BulkTcp::dial(&cluster.credentials(2, 5), address, &to_zero, Duration::from_secs(5)).await.unwrap();
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
