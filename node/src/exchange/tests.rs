//! Ranks of one generation in one process, over real connections on the loopback.

use std::net::{IpAddr, Ipv4Addr};
use std::thread;
use std::time::{Duration, Instant};

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use stoke_protocol::identity::{Authority, Credentials, Subject};
use stoke_protocol::ids::{ClusterId, Generation, JobId, Rank, Step};
use stoke_protocol::lanes::{self, Subtree};
use stoke_protocol::message::peer::{Part, TensorHeader};
use stoke_protocol::message::rank::PeerAddress;
use stoke_protocol::transport::{Bind, Endpoint, Io, Settings};

use super::sum::add;
use super::*;

const HOUR: Duration = Duration::from_secs(3600);
const LOOPBACK: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

struct Cluster {
    authority: Authority,
    io: Io,
}

impl Cluster {
    fn new() -> Self {
        let authority = Authority::in_memory(ClusterId([7; 16])).unwrap();
        Self { authority, io: Io::thread("stoke-test-net").unwrap() }
    }

    fn credentials(&self, generation: u64, rank: u32) -> Credentials {
        let subject = Subject::Rank { job: JobId(1), generation: Generation(generation), rank: Rank(rank) };
        self.authority.credentials(&subject, HOUR).unwrap()
    }

    fn endpoint(&self, generation: u64, rank: u32) -> PeerEndpoint {
        PeerEndpoint::bind(&self.io, LOOPBACK, self.credentials(generation, rank)).unwrap()
    }

    fn mesh(&self, world: u32, shape: Shape) -> Vec<Exchange> {
        let endpoints: Vec<PeerEndpoint> = (0..world).map(|rank| self.endpoint(1, rank)).collect();
        let peers = addresses(&endpoints);
        let connects = endpoints.into_iter().map(|endpoint| endpoint.connect(&peers, shape));
        runtime().block_on(futures_util::future::try_join_all(connects)).unwrap()
    }
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
}

fn addresses(endpoints: &[PeerEndpoint]) -> Vec<PeerAddress> {
    let address =
        |(rank, endpoint): (usize, &PeerEndpoint)| PeerAddress { rank: Rank(rank as u32), address: endpoint.address() };
    endpoints.iter().enumerate().map(address).collect()
}

fn gradient(seed: u64, step: u64, lane: u32, values: usize) -> Vec<f32> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed ^ (step << 32) ^ u64::from(lane));
    (0..values).map(|_| (rng.random::<f32>() - 0.5) * 2f32.powi(rng.random_range(-9..9))).collect()
}

fn plain(node: Subtree, lane: &dyn Fn(u32) -> Vec<f32>) -> Vec<f32> {
    let Some((left, right)) = node.children() else { return lane(node.start) };
    let (mut left, right) = (plain(left, lane), plain(right, lane));
    add(&mut left, &right);
    left
}

fn give(sums: &mut LaneSums, gradient: impl Fn(u32) -> Vec<f32>) {
    for lane in sums.owned() {
        sums.begin(lane);
        sums.push(0, &gradient(lane));
    }
}

fn lane_sums(shape: Shape, world: u32, rank: usize) -> LaneSums {
    LaneSums::new(shape.values, shape.lanes, lanes::assign(shape.lanes, world)[rank].clone())
}

/// Steps of every rank on a thread of its own; rank by rank, the sums as bits.
fn train(cluster: &Cluster, world: u32, shape: Shape, steps: u64) -> Vec<Vec<Vec<u32>>> {
    let ranks: Vec<_> = cluster
        .mesh(world, shape)
        .into_iter()
        .enumerate()
        .map(|(rank, mut exchange)| {
            thread::spawn(move || {
                let mut sums = lane_sums(shape, world, rank);
                let results = (0..steps)
                    .map(|step| {
                        give(&mut sums, |lane| gradient(9, step, lane, shape.values));
                        let sum = exchange.all_reduce(Step(step), &mut sums).unwrap();
                        sum.iter().map(|value| value.to_bits()).collect()
                    })
                    .collect();
                exchange.close();
                results
            })
        })
        .collect();
    ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
}

#[test]
fn every_world_gets_the_same_bits_over_the_network() {
    let cluster = Cluster::new();
    let mut rng = ChaCha8Rng::seed_from_u64(5);
    for values in [0, 1, 100, 1023, 150_001] {
        let shape = Shape { values, lanes: rng.random_range(4..10) };
        for world in [1, 2, 3, rng.random_range(4..=shape.lanes)] {
            for sums in train(&cluster, world, shape, 3) {
                for (step, sum) in sums.iter().enumerate() {
                    let lane = |lane| gradient(9, step as u64, lane, values);
                    let expected = plain(Subtree::root(shape.lanes), &lane);
                    let same = expected.iter().map(|value| value.to_bits()).eq(sum.iter().copied());
                    assert!(same, "{shape:?}, {world} ranks, step {step}");
                }
            }
        }
    }
}

#[test]
fn a_lost_peer_is_named_and_stays_lost() {
    let cluster = Cluster::new();
    let shape = Shape { values: 100_000, lanes: 8 };
    let mut mesh = cluster.mesh(3, shape);
    drop(mesh.remove(1));
    let mut sums = lane_sums(shape, 3, 0);
    give(&mut sums, |lane| gradient(1, 0, lane, shape.values));
    for _ in 0..2 {
        let lost = mesh[0].all_reduce(Step(1), &mut sums).unwrap_err();
        assert!(matches!(lost, ExchangeError::PeerLost { rank: Rank(1), .. }), "{lost:?}");
    }
}

#[test]
fn an_abort_frees_a_blocked_rank_at_once() {
    let cluster = Cluster::new();
    let shape = Shape { values: 100_000, lanes: 8 };
    let mut mesh = cluster.mesh(2, shape);
    let mut waiting = mesh.remove(0);
    let abort = waiting.abort_handle();
    let blocked = thread::spawn(move || {
        let mut sums = lane_sums(shape, 2, 0);
        give(&mut sums, |lane| gradient(1, 0, lane, shape.values));
        let first = waiting.all_reduce(Step(1), &mut sums).unwrap_err();
        (first, waiting.all_reduce(Step(2), &mut sums).unwrap_err(), Instant::now())
    });
    // Rank 1 never joins in; the first frames of rank 0 show that it is inside the call.
    let deadline = Instant::now() + Duration::from_secs(5);
    while mesh[0].stats().received_bytes == 0 && Instant::now() < deadline {
        thread::yield_now();
    }
    let aborted_at = Instant::now();
    abort.abort("cancelled by a user");
    let (first, second, ended_at) = blocked.join().unwrap();
    assert!(ended_at - aborted_at < Duration::from_secs(1));
    for error in [first, second] {
        assert!(matches!(&error, ExchangeError::Aborted { reason } if reason == "cancelled by a user"), "{error}");
    }
}

#[test]
fn steps_must_grow() {
    let cluster = Cluster::new();
    let shape = Shape { values: 10, lanes: 2 };
    let mut alone = cluster.mesh(1, shape).remove(0);
    let mut sums = lane_sums(shape, 1, 0);
    give(&mut sums, |_| vec![1.0; 10]);
    assert_eq!(alone.all_reduce(Step(4), &mut sums).unwrap(), [2.0; 10]);
    let error = alone.all_reduce(Step(4), &mut sums).unwrap_err();
    assert!(matches!(error, ExchangeError::StepOrder { step: Step(4), last: Step(4) }), "{error}");
}

#[test]
fn ranks_with_other_models_find_out() {
    let cluster = Cluster::new();
    let endpoints = [cluster.endpoint(1, 0), cluster.endpoint(1, 1)];
    let peers = addresses(&endpoints);
    let connects = endpoints
        .into_iter()
        .zip([1000, 2000])
        .map(|(endpoint, values)| endpoint.connect(&peers, Shape { values, lanes: 2 }));
    let mesh = runtime().block_on(futures_util::future::try_join_all(connects)).unwrap();
    let ranks: Vec<_> = mesh
        .into_iter()
        .zip([1000, 2000])
        .enumerate()
        .map(|(rank, (mut exchange, values))| {
            thread::spawn(move || {
                let mut sums = lane_sums(Shape { values, lanes: 2 }, 2, rank);
                give(&mut sums, |_| vec![1.0; values]);
                exchange.all_reduce(Step(1), &mut sums).unwrap_err()
            })
        })
        .collect();
    let errors: Vec<ExchangeError> = ranks.into_iter().map(|rank| rank.join().unwrap()).collect();
    assert!(errors.iter().any(|error| matches!(error, ExchangeError::Refused { .. })), "{errors:?}");
}

#[test]
fn peers_of_other_generations_are_refused_and_counted() {
    let cluster = Cluster::new();
    let shape = Shape { values: 10, lanes: 2 };
    let (zero, one) = (cluster.endpoint(2, 0), cluster.endpoint(2, 1));
    let peers =
        [(0, zero.address()), (1, one.address())].map(|(rank, address)| PeerAddress { rank: Rank(rank), address });
    let runtime = runtime();
    let to_one = Subject::Rank { job: JobId(1), generation: Generation(2), rank: Rank(1) };
    let dial = |generation: u64| {
        let bind = Bind::Address((LOOPBACK, 0).into());
        let endpoint =
            Endpoint::client(&cluster.io, bind, Settings::bulk(), cluster.credentials(generation, 0)).unwrap();
        let to_one = &to_one;
        async move { endpoint.connect(peers[1].address, to_one).await.unwrap() }
    };
    // A rank 0 of generation 1 dials rank 1 of generation 2 before the right one does; then one that was renumbered dials afterwards.
    let old = runtime.block_on(dial(1));
    let mut mesh = runtime
        .block_on(futures_util::future::try_join_all([zero.connect(&peers, shape), one.connect(&peers, shape)]))
        .unwrap();
    runtime.block_on(old.closed());
    assert_eq!(mesh[1].stats().stale_refused, 1);
    let late = runtime.block_on(dial(3));
    runtime.block_on(late.closed());
    assert_eq!(mesh[1].stats().stale_refused, 2);
    assert_eq!(mesh.remove(0).stats().stale_refused, 0);
}

#[test]
fn a_frame_of_another_generation_ends_the_link() {
    let cluster = Cluster::new();
    let shape = Shape { values: 64, lanes: 2 };
    let one = cluster.endpoint(2, 1);
    let runtime = runtime();
    let bind = Bind::Address((LOOPBACK, 0).into());
    let zero = Endpoint::client(&cluster.io, bind, Settings::bulk(), cluster.credentials(2, 0)).unwrap();
    let peers =
        [(0, one.address()), (1, one.address())].map(|(rank, address)| PeerAddress { rank: Rank(rank), address });
    let to_one = Subject::Rank { job: JobId(1), generation: Generation(2), rank: Rank(1) };
    let (connection, mut exchange) = runtime.block_on(async {
        let connected = async { zero.connect(peers[1].address, &to_one).await.unwrap() };
        let (connection, exchange) = tokio::join!(connected, one.connect(&peers, shape));
        (connection, exchange.unwrap())
    });
    let part = Part::Partial(Subtree { start: 0, len: 1 });
    let header = TensorHeader { generation: Generation(1), step: Step(1), part, offset: 32, count: 32 };
    let mut stream = runtime.block_on(connection.open_bulk()).unwrap();
    runtime.block_on(stream.write_header(&header)).unwrap();
    let mut sums = lane_sums(shape, 2, 1);
    give(&mut sums, |_| vec![1.0; 64]);
    let error = exchange.all_reduce(Step(1), &mut sums).unwrap_err();
    let stale =
        matches!(error, ExchangeError::StaleGeneration { rank: Rank(0), theirs: Generation(1), ours: Generation(2) });
    assert!(stale, "{error}");
    assert_eq!(exchange.stats().stale_refused, 1);
}

#[test]
fn memberships_that_make_no_sense_are_refused() {
    let cluster = Cluster::new();
    let shape = Shape { values: 10, lanes: 4 };
    for ranks in [&[0, 0][..], &[0, 2], &[1, 2], &[0, 1, 2]] {
        let endpoint = cluster.endpoint(1, 3);
        let peers: Vec<PeerAddress> =
            ranks.iter().map(|rank| PeerAddress { rank: Rank(*rank), address: endpoint.address() }).collect();
        let refused = runtime().block_on(endpoint.connect(&peers, shape)).err().unwrap();
        assert!(matches!(refused, ExchangeError::Membership { .. }), "{refused}");
    }
}
