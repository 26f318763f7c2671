//! Ranks of a job in one process, over real connections on the loopback.

use std::net::{IpAddr, Ipv4Addr};
use std::thread;
use std::time::{Duration, Instant};

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use stoke_protocol::identity::{Authority, Credentials, Subject};
use stoke_protocol::ids::{ClusterId, Fingerprint, Generation, JobId, Rank, Step, Term};
use stoke_protocol::lanes::{self, Subtree};
use stoke_protocol::message::peer::{Door, Keeps, Machine, Opening, Part, Restores, Sharing, Standing, TensorHeader};
use stoke_protocol::message::rank::{Member, Membership, Purpose, RankId};
use stoke_protocol::transport::{Bind, Endpoint, Io, Settings};

use super::sum::add;
use super::*;

mod bf16;
mod by_tcp;
mod early;
mod gathering;
mod hosts;
mod in_memory;

const HOUR: Duration = Duration::from_secs(3600);
const LOOPBACK: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

struct Cluster {
    authority: Authority,
    io: Io,
    /// The machine of each rank, by name; nameless ones share no memory. One that is not listed is as the last.
    machines: Vec<Option<u8>>,
    tcp: UseTcp,
}

impl Cluster {
    fn new() -> Self {
        let authority = Authority::in_memory(ClusterId([7; 16])).unwrap();
        Self { authority, io: Io::thread("stoke-test-net").unwrap(), machines: vec![None], tcp: UseTcp::WhereFaster }
    }

    fn credentials(&self, generation: u64, rank: u32) -> Credentials {
        let subject = Subject::Rank { job: JobId(1), generation: Generation(generation), rank: Rank(rank) };
        self.authority.credentials(&subject, HOUR).unwrap()
    }

    fn mesh(&self, generation: u64, rank: u32) -> Mesh {
        let mesh = Mesh::bind(&self.io, LOOPBACK, self.credentials(generation, rank)).unwrap();
        let machine = self.machines.get(rank as usize).or(self.machines.last()).copied().flatten();
        mesh.on_machine(machine.map(|name| Machine([name; 16]))).using_tcp(self.tcp)
    }

    /// A gang: every rank has done no step.
    fn formed(&self, world: u32, shape: Shape) -> Vec<(Mesh, Formed)> {
        let meshes: Vec<Mesh> = (0..world).map(|rank| self.mesh(1, rank)).collect();
        let formed = form(1, &meshes, &[], &vec![at(0, None); world as usize], shape);
        meshes.into_iter().zip(formed.into_iter().map(Result::unwrap)).collect()
    }

    fn gang(&self, world: u32, shape: Shape) -> Vec<(Mesh, Exchange)> {
        exchanges(self.formed(world, shape))
    }

    /// What a rank would dial with, in the hands of a test that plays it.
    fn played(&self, generation: u64, rank: u32) -> Endpoint {
        let bind = Bind::Address((LOOPBACK, 0).into());
        Endpoint::client(&self.io, bind, Settings::bulk(), self.credentials(generation, rank)).unwrap()
    }
}

fn exchanges(formed: Vec<(Mesh, Formed)>) -> Vec<(Mesh, Exchange)> {
    formed.into_iter().map(|(mesh, formed)| (mesh, formed.exchange)).collect()
}

fn subject(id: RankId) -> Subject {
    let RankId { job, generation, rank } = id;
    Subject::Rank { job, generation, rank }
}

fn membership(generation: u64, members: Vec<Member>, joining: Vec<Member>) -> Membership {
    Membership {
        generation: Generation(generation),
        members: members.into(),
        joining: joining.into(),
        after: None,
        ballot: 0,
        purpose: Purpose::Train,
        restarts: 0,
    }
}

/// Of a rank that has done so many steps, and offers nothing.
fn standing(generation: u64, step: u64) -> Standing {
    Standing {
        term: term(generation),
        step: Some(Step(step)),
        has_sum: false,
        restores: None,
        files: None,
        machine: None,
        door: None,
        tcp: None,
        keeps: Keeps::default(),
    }
}

fn term(generation: u64) -> Term {
    Term { generation: Generation(generation), ballot: 0 }
}

fn member(mesh: &Mesh) -> Member {
    Member { id: mesh.own(), address: mesh.address() }
}

fn at(step: u64, sum: Option<&[f32]>) -> State {
    let sum = sum.map(|sum| bytes::Bytes::copy_from_slice(super::sum::as_bytes(sum)));
    State { step: Some(Step(step)), sum, ..State::default() }
}

/// All ranks, those that join after the members, form a generation.
fn form(
    generation: u64,
    members: &[Mesh],
    joining: &[Mesh],
    states: &[State],
    shape: Shape,
) -> Vec<Result<Formed, ExchangeError>> {
    let ids = |meshes: &[Mesh]| meshes.iter().map(member).collect();
    let membership = membership(generation, ids(members), ids(joining));
    let all = members.iter().chain(joining).zip(states);
    let forming = all.map(|(mesh, state)| mesh.form(&membership, state.clone(), shape));
    runtime().block_on(futures_util::future::join_all(forming))
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
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

/// Steps of every rank on a thread of its own; rank by rank, the sums as bits, and the bytes that it sent. `in_place`: lanes are summed where the
/// exchange needs them.
fn train(gang: Vec<(Mesh, Exchange)>, shape: Shape, steps: u64, in_place: bool) -> Vec<(Vec<Vec<u32>>, u64)> {
    let world = gang.len() as u32;
    let ranks = gang.into_iter().enumerate().map(|(rank, (mesh, mut exchange))| {
        thread::spawn(move || {
            let mut sums = if in_place { exchange.lane_sums() } else { lane_sums(shape, world, rank) };
            let step = |step| {
                give(&mut sums, |lane| gradient(9, step, lane, shape.values));
                let sum = exchange.all_reduce(Step(step), &mut sums, Some(Fingerprint(step))).unwrap();
                sum.iter().map(|value| value.to_bits()).collect()
            };
            let results = (0..steps).map(step).collect();
            exchange.finish();
            drop(mesh);
            (results, exchange.stats().sent_bytes)
        })
    });
    let ranks: Vec<_> = ranks.collect();
    ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
}

/// What every rank gets of a step of [`train`].
fn expected(shape: Shape, step: u64) -> Vec<u32> {
    let sum = plain(Subtree::root(shape.lanes), &|lane| gradient(9, step, lane, shape.values));
    sum.iter().map(|value| value.to_bits()).collect()
}

#[test]
fn every_world_gets_the_same_bits_over_the_network() {
    let cluster = Cluster::new();
    let mut rng = ChaCha8Rng::seed_from_u64(5);
    for values in [0, 1, 100, 1023, 150_001] {
        let shape = Shape { values, lanes: rng.random_range(4..10), ..Shape::default() };
        for world in [1, 2, 3, rng.random_range(4..=shape.lanes)] {
            for (sums, _) in train(cluster.gang(world, shape), shape, 3, false) {
                for (step, sum) in (0..).zip(sums) {
                    assert!(sum == expected(shape, step), "{shape:?}, {world} ranks, step {step}");
                }
            }
        }
    }
}

#[test]
fn a_peer_that_leaves_is_named_and_stays_gone() {
    let cluster = Cluster::new();
    let shape = Shape { values: 100_000, lanes: 8, ..Shape::default() };
    let mut gang = cluster.gang(3, shape);
    let left = gang[1].0.own();
    drop(gang.remove(1));
    let mut sums = lane_sums(shape, 3, 0);
    give(&mut sums, |lane| gradient(1, 0, lane, shape.values));
    for _ in 0..2 {
        let lost = gang[0].1.all_reduce(Step(1), &mut sums, None).unwrap_err();
        assert!(matches!(lost, ExchangeError::PeerLeft { peer } if peer == left), "{lost:?}");
    }
}

#[test]
fn an_abort_frees_a_blocked_rank_at_once() {
    let cluster = Cluster::new();
    let shape = Shape { values: 100_000, lanes: 8, ..Shape::default() };
    let mut gang = cluster.gang(2, shape);
    let (_mesh, mut waiting) = gang.remove(0);
    let abort = waiting.abort_handle();
    let blocked = thread::spawn(move || {
        let mut sums = lane_sums(shape, 2, 0);
        give(&mut sums, |lane| gradient(1, 0, lane, shape.values));
        let first = waiting.all_reduce(Step(1), &mut sums, None).unwrap_err();
        (first, waiting.all_reduce(Step(2), &mut sums, None).unwrap_err(), Instant::now())
    });
    // Rank 1 never joins in; the first frames of rank 0 show that it is inside the call.
    let deadline = Instant::now() + Duration::from_secs(5);
    while gang[0].1.stats().received_bytes == 0 && Instant::now() < deadline {
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

/// A rank that joins and reads nothing holds the members back, not for longer than they want.
#[test]
fn an_abort_frees_a_member_that_waits_for_an_observer() {
    let cluster = Cluster::new();
    let shape = Shape { values: 100_000, lanes: 4, ..Shape::default() };
    let (members, joining) = ([cluster.mesh(1, 0)], [cluster.mesh(2, 1)]);
    let states = [at(0, None), State::default()];
    let mut formed: Vec<Formed> = form(2, &members, &joining, &states, shape).into_iter().map(Result::unwrap).collect();
    let (observer, mut member) = (formed.pop().unwrap(), formed.pop().unwrap().exchange);
    let abort = member.abort_handle();
    let (told, steps) = std::sync::mpsc::channel();
    let stepping = thread::spawn(move || {
        let mut sums = lane_sums(shape, 1, 0);
        for step in 0.. {
            give(&mut sums, |_| vec![1.0; shape.values]);
            if let Err(error) = member.all_reduce(Step(step), &mut sums, None) {
                return error;
            }
            told.send(()).unwrap();
        }
        unreachable!("steps do not end")
    });
    while steps.recv_timeout(Duration::from_millis(500)).is_ok() {}
    abort.abort("the observer is lost");
    assert!(matches!(stepping.join().unwrap(), ExchangeError::Aborted { .. }));
    drop(observer);
}

#[test]
fn steps_must_grow() {
    let cluster = Cluster::new();
    let shape = Shape { values: 10, lanes: 2, ..Shape::default() };
    let (_mesh, mut alone) = cluster.gang(1, shape).remove(0);
    let mut sums = lane_sums(shape, 1, 0);
    give(&mut sums, |_| vec![1.0; 10]);
    assert_eq!(alone.all_reduce(Step(4), &mut sums, None).unwrap(), [2.0; 10]);
    let error = alone.all_reduce(Step(4), &mut sums, None).unwrap_err();
    assert!(matches!(error, ExchangeError::StepOrder { step: Step(4), last: Step(4) }), "{error}");
}

#[test]
fn ranks_with_other_models_find_out() {
    let cluster = Cluster::new();
    let meshes = [cluster.mesh(1, 0), cluster.mesh(1, 1)];
    let membership = membership(1, meshes.iter().map(member).collect(), vec![]);
    let forming = meshes
        .iter()
        .zip([1000, 2000])
        .map(|(mesh, values)| mesh.form(&membership, at(0, None), Shape { values, lanes: 2, ..Shape::default() }));
    let formed = runtime().block_on(futures_util::future::try_join_all(forming)).unwrap();
    let ranks: Vec<_> = formed
        .into_iter()
        .zip([1000, 2000])
        .enumerate()
        .map(|(rank, (mut formed, values))| {
            thread::spawn(move || {
                let mut sums = lane_sums(Shape { values, lanes: 2, ..Shape::default() }, 2, rank);
                give(&mut sums, |_| vec![1.0; values]);
                formed.exchange.all_reduce(Step(1), &mut sums, None).unwrap_err()
            })
        })
        .collect();
    let errors: Vec<ExchangeError> = ranks.into_iter().map(|rank| rank.join().unwrap()).collect();
    assert!(errors.iter().any(|error| matches!(error, ExchangeError::Refused { .. })), "{errors:?}");
}

/// The answer of a peer may be there before the connection to it is written down. Each rank has threads of its own, as its process would,
/// and more gangs than processors form side by side: the order of things is another one each time.
#[test]
fn gangs_that_have_just_connected_form_every_time() {
    let cluster = Cluster::new();
    let shape = Shape { values: 10, lanes: 2, ..Shape::default() };
    let gang = || {
        let meshes = [0, 1].map(|rank| {
            let io = Io::thread("stoke-test-net").unwrap();
            Mesh::bind(&io, LOOPBACK, cluster.credentials(1, rank)).unwrap()
        });
        let membership = membership(1, meshes.iter().map(member).collect(), vec![]);
        let form = |mesh: &Mesh| runtime().block_on(mesh.form(&membership, at(0, None), shape));
        let [zero, one] = &meshes;
        let (zero, one) = thread::scope(|scope| {
            let zero = scope.spawn(|| form(zero));
            (form(one), zero.join().unwrap())
        });
        // Both are kept until both stand: one that is dropped takes its streams with it.
        drop((zero.unwrap(), one.unwrap()));
    };
    thread::scope(|scope| (0..8).for_each(|_| drop(scope.spawn(|| (0..100).for_each(|_| gang())))));
}

#[test]
fn ranks_of_other_jobs_are_refused_and_streams_of_older_generations_stopped() {
    let cluster = Cluster::new();
    let shape = Shape { values: 10, lanes: 2, ..Shape::default() };
    let meshes = [cluster.mesh(2, 0), cluster.mesh(2, 1)];
    let runtime = runtime();
    let target = meshes[1].own();
    let expected = subject(target);
    let dial = |job: u64, generation: u64| {
        let subject = Subject::Rank { job: JobId(job), generation: Generation(generation), rank: Rank(0) };
        let credentials = cluster.authority.credentials(&subject, HOUR).unwrap();
        let bind = Bind::Address((LOOPBACK, 0).into());
        let endpoint = Endpoint::client(&cluster.io, bind, Settings::bulk(), credentials).unwrap();
        runtime.block_on(endpoint.connect(meshes[1].address(), &expected)).unwrap()
    };
    let stranger = dial(2, 1);
    runtime.block_on(stranger.closed());
    let mut formed = form(5, &meshes, &[], &[at(0, None), at(0, None)], shape);
    let exchange = formed.remove(1).unwrap().exchange;
    assert_eq!(exchange.stats().stale_refused, 1);
    // A rank that was replaced speaks of its own generation still.
    let replaced = dial(1, 1);
    let mut stream = runtime.block_on(replaced.open_bulk()).unwrap();
    runtime.block_on(stream.write_header(&Opening::Exchange(standing(4, 3)))).unwrap();
    let deadline = Instant::now() + Duration::from_secs(5);
    while exchange.stats().stale_refused < 2 && Instant::now() < deadline {
        thread::yield_now();
    }
    assert_eq!(exchange.stats().stale_refused, 2);
}

#[test]
fn a_frame_of_another_generation_ends_the_link() {
    let cluster = Cluster::new();
    let shape = Shape { values: 64, lanes: 2, ..Shape::default() };
    let one = cluster.mesh(2, 1);
    let runtime = runtime();
    let zero = cluster.played(2, 0);
    let peer = RankId { rank: Rank(0), ..one.own() };
    let membership = membership(2, vec![Member { id: peer, address: one.address() }, member(&one)], vec![]);
    let (_connection, mut stream, formed) = runtime.block_on(async {
        let connected = async {
            let connection = zero.connect(one.address(), &subject(one.own())).await.unwrap();
            let mut stream = connection.open_bulk().await.unwrap();
            stream.write_header(&Opening::Exchange(standing(2, 0))).await.unwrap();
            (connection, stream)
        };
        let ((connection, stream), formed) = tokio::join!(connected, one.form(&membership, at(0, None), shape));
        (connection, stream, formed.unwrap())
    });
    let mut exchange = formed.exchange;
    let part = Part::Partial(Subtree { start: 0, len: 1 });
    let header = TensorHeader { term: term(1), step: Step(1), part, offset: 32, count: 32, replica: None };
    runtime.block_on(stream.write_header(&header)).unwrap();
    let mut sums = lane_sums(shape, 2, 1);
    give(&mut sums, |_| vec![1.0; 64]);
    let error = exchange.all_reduce(Step(1), &mut sums, None).unwrap_err();
    let stale = matches!(
        error,
        ExchangeError::StaleTerm { peer: from, theirs, ours } if from == peer && theirs == term(1) && ours == term(2)
    );
    assert!(stale, "{error}");
    assert_eq!(exchange.stats().stale_refused, 1);
}

#[test]
fn memberships_that_make_no_sense_are_refused() {
    let cluster = Cluster::new();
    let shape = Shape { values: 10, lanes: 4, ..Shape::default() };
    let own = cluster.mesh(1, 3);
    let other = |rank| Member { id: RankId { rank: Rank(rank), ..own.own() }, address: own.address() };
    for (members, joining) in [(vec![0, 1], vec![]), (vec![], vec![3]), (vec![3, 3], vec![]), (vec![3], vec![3])] {
        let list = |ranks: &[u32]| ranks.iter().map(|rank| other(*rank)).collect();
        let membership = membership(1, list(&members), list(&joining));
        let refused = runtime().block_on(own.form(&membership, at(0, None), shape)).err().unwrap();
        assert!(matches!(refused, ExchangeError::Membership { .. }), "{refused}");
    }
}

/// Survivors of a step that only some of them saw complete agree on it; a third rank joins by the sums alone.
#[test]
fn the_sum_of_the_last_step_is_handed_to_those_who_lack_it() {
    let cluster = Cluster::new();
    let shape = Shape { values: 150_001, lanes: 4, ..Shape::default() };
    let members = [cluster.mesh(1, 0), cluster.mesh(1, 1), cluster.mesh(1, 2)];
    let joining = [cluster.mesh(3, 3)];
    let sum: Vec<f32> = (0..shape.values).map(|value| value as f32).collect();
    let states = [at(6, None), at(7, Some(&sum)), at(7, Some(&sum)), State::default()];
    let formed = form(4, &members, &joining, &states, shape);
    let mut formed: Vec<Formed> = formed.into_iter().map(Result::unwrap).collect();
    assert!(formed.iter().all(|formed| formed.step == Step(7)));
    assert_eq!(formed[0].catch_up.as_ref().unwrap().read(), sum);
    assert!(formed[1..].iter().all(|formed| formed.catch_up.is_none()));
    assert_eq!(formed[2].lacking, [joining[0].own()]);
    let steps: Vec<_> = formed
        .drain(..)
        .enumerate()
        .map(|(rank, mut formed)| {
            thread::spawn(move || {
                let exchange = &mut formed.exchange;
                if exchange.place().is_observer() {
                    return exchange.observe(Step(7), false).unwrap().to_vec();
                }
                let mut sums = lane_sums(shape, 3, rank);
                give(&mut sums, |lane| gradient(9, 7, lane, shape.values));
                let sum = exchange.all_reduce(Step(7), &mut sums, None).unwrap().to_vec();
                exchange.finish();
                sum
            })
        })
        .collect();
    let expected = plain(Subtree::root(shape.lanes), &|lane| gradient(9, 7, lane, shape.values));
    for step in steps {
        assert!(step.join().unwrap() == expected);
    }
    // One that is two steps behind needs the state of one that is not, and so does one whose only sum died with its holder.
    for states in [[at(5, None), at(7, Some(&sum))], [at(6, None), at(7, None)]] {
        let late: Vec<Formed> = form(5, &members[..2], &[], &states, shape).into_iter().map(Result::unwrap).collect();
        assert!(late.iter().all(|formed| formed.step == Step(7) && formed.catch_up.is_none()));
        assert_eq!((late[0].gives, late[1].gives), (None, Some((0, 1))));
        assert_eq!(late[1].lacking, [members[0].own()]);
    }
}

/// Ranks that begin with a checkpoint share its shards out; as soon as one has the state, it gives that.
#[test]
fn a_checkpoint_is_read_by_those_who_have_it_near_and_in_turn_by_others() {
    let cluster = Cluster::new();
    let shape = Shape { values: 10, lanes: 4, ..Shape::default() };
    let members = [cluster.mesh(1, 0), cluster.mesh(1, 1), cluster.mesh(1, 2)];
    let restores = |step, shards: &[u32]| State {
        restores: Some(Restores { step: Step(step), near: shards.iter().copied().collect() }),
        ..State::default()
    };
    let states = [restores(7, &[]), restores(7, &[0, 3]), restores(7, &[3, 200])];
    for formed in form(2, &members, &[], &states, shape) {
        let formed = formed.unwrap();
        let readers = formed.readers.unwrap();
        assert_eq!([0, 1, 2, 3, 4, 200].map(|shard| readers.giver(shard)), [1, 1, 2, 1, 1, 2]);
        assert_eq!([0, 1, 2].map(|member| readers.reads(member, 3)), [false, true, true]);
        assert_eq!((formed.step, formed.lacking), (Step(7), vec![]));
    }
    let states = [restores(7, &[0]), at(7, None), restores(7, &[])];
    let formed: Vec<Formed> = form(3, &members, &[], &states, shape).into_iter().map(Result::unwrap).collect();
    assert!(formed.iter().all(|formed| formed.readers.is_none()));
    assert_eq!(formed[1].lacking, [members[0].own(), members[2].own()]);
    let states = [restores(7, &[]), restores(9, &[]), restores(7, &[])];
    let errors: Vec<String> =
        form(4, &members, &[], &states, shape).into_iter().map(|formed| formed.err().unwrap().to_string()).collect();
    // Others may only see that the first one to find out has left.
    assert!(errors.iter().any(|error| error.contains("checkpoints of step-7 and step-9")), "{errors:?}");
}
