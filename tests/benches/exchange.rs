//! All-reduce of 1, 16 and 100 MiB over 2 and 4 rank processes on this machine: ours (fixed tree order, always encrypted between machines) against PyTorch's
//! gloo (plain TCP), taking turns in the same run. Prints medians and ratios; checks every sum. The links:
//! - memory: all ranks on one machine;
//! - hosts: every two ranks on one, QUIC over the loopback between them;
//! - network: each rank on a machine of its own, QUIC over the loopback, whose packets have 64 KiB;
//! - wire: the same in network namespaces of their own, whose packets have 1,500 bytes (needs root): TLS over TCP, as Stoke chooses there;
//! - wire-quic: that by QUIC, to see what the choice is worth;
//! - wire-bf16: wire with values that are rounded to bf16, against gloo's f32.
//!
//! `cargo bench -p stoke-cli -p stoke-tests --bench exchange`; gloo needs the Python of `jobs/reference/setup.sh`, or STOKE_TORCH_PYTHON.
//! Of three worlds or more (STOKE_BENCH_RANKS=2,4,8) the CPU of each rank is told by a model of bytes, frames and operations, which is compared with the largest
//! and told of up to 1,000 machines.
//! Lists separated by commas replace the defaults: STOKE_BENCH_LINKS, STOKE_BENCH_RANKS, STOKE_BENCH_MIB, and STOKE_BENCH_TURNS, how often each side
//! has its turn of a few rounds. Ranks are this binary again, with a role in the environment.

use std::collections::{BTreeMap, BTreeSet};
use std::env;
use std::io::{BufRead, BufReader, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use stoke_node::exchange::{Exchange, LaneSums, Mesh, Shape, State, Traffic, UseTcp, traffic};
use stoke_protocol::identity::{Authority, Credentials, Subject};
use stoke_protocol::ids::{ClusterId, Generation, JobId, Rank, Step};
use stoke_protocol::message::peer::Machine;
use stoke_protocol::message::rank::{Member, Membership, Purpose, RankId};
use stoke_protocol::transport::Io;
use stoke_tests::cost::{Cost, Sample};
use stoke_tests::namespaces::Namespaces;
use stoke_tests::report::{Goal, Row};

/// As in the `stoke` binary: glibc's allocator returns packet buffers to the kernel and pays a third more.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const ROLE: &str = "STOKE_BENCH_EXCHANGE_ROLE";
const LINK: &str = "STOKE_BENCH_EXCHANGE_LINK";
const IP: &str = "STOKE_BENCH_EXCHANGE_IP";
const LINKS: [&str; 4] = ["memory", "hosts", "network", "wire"];
const LANES: u32 = 8;
const MIB: usize = 1024 * 1024;
const SIZES_MIB: [usize; 3] = [1, 16, 100];
const WORLDS: [usize; 2] = [2, 4];
/// Of the machines that the model tells of.
const LINK_BITS: f64 = 25e9;
const LOOPBACK: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

fn main() {
    if let Ok(dir) = env::var(ROLE) {
        return rank(Path::new(&dir));
    }
    let turns = numbers_of("STOKE_BENCH_TURNS", &[5])[0];
    let sizes: Vec<usize> = numbers_of("STOKE_BENCH_MIB", &SIZES_MIB).into_iter().map(|mib| mib * MIB).collect();
    println!("all-reduce of f32 between processes of one machine ({} cores), medians of the slowest rank", cores());
    println!(
        "{:>9} {:>5} {:>8} | {:>9} {:>9} {:>8} | {:>9} {:>9} {:>8} | {:>5} {:>5}",
        "link", "ranks", "MiB", "ours ms", "best", "CPU ms", "gloo ms", "best", "CPU ms", "time", "CPU"
    );
    let links = env::var("STOKE_BENCH_LINKS").unwrap_or_else(|_| LINKS.join(","));
    let mut measured: BTreeMap<String, Vec<(u32, usize, Sample)>> = BTreeMap::new();
    for world in numbers_of("STOKE_BENCH_RANKS", &WORLDS) {
        let world = world as u32;
        for link in links.split(',').filter(|link| *link != "hosts" || world > 2) {
            let lab = match link.starts_with("wire").then(|| Namespaces::build(world)).transpose() {
                Ok(lab) => lab,
                Err(why) => {
                    println!("{link:>9} {world:>5} not measured: {why}");
                    continue;
                }
            };
            let dir = tempfile::tempdir().expect("make a temporary folder");
            let mut ours = start_ours(world, dir.path(), link, lab.as_ref());
            let mut gloo = start_gloo(world, lab.as_ref());
            for bytes in &sizes {
                let cpu = compare((link, world), *bytes, turns, &mut ours, gloo.as_mut());
                let sent = traffic(*bytes / 4, LANES, world);
                let sample = Sample { sent, cpu: cpu / f64::from(world) };
                measured.entry(link.to_owned()).or_default().push((world, *bytes, sample));
            }
        }
    }
    measured
        .iter()
        .filter(|(link, _)| ["network", "wire"].contains(&link.as_str()))
        .for_each(|(link, all)| model(link, all));
}

/// What the exchange costs by the number of ranks: fitted to all worlds but the largest, compared with that, and told of many.
fn model(link: &str, measured: &[(u32, usize, Sample)]) {
    let largest = measured.iter().map(|(world, ..)| *world).max().unwrap_or(0);
    let (check, fit): (Vec<_>, Vec<_>) = measured.iter().copied().partition(|(world, ..)| *world == largest);
    let worlds: BTreeSet<u32> = fit.iter().map(|(world, ..)| *world).collect();
    if worlds.len() < 2 {
        return;
    }
    let cost = Cost::fit(&fit.iter().map(|(.., sample)| *sample).collect::<Vec<_>>());
    let [byte, frame, operation] = cost.0;
    println!(
        "\n{link}: CPU of a rank, from {worlds:?} ranks: {:.2} ns a byte sent and received, {:.1} us a frame, {:.0} us an operation",
        byte * 1e9,
        frame * 1e6,
        operation * 1e6
    );
    for (world, bytes, Sample { sent, cpu }) in check {
        let (told, mib) = (cost.cpu(sent), bytes / MIB);
        println!(
            "  {world} ranks, {mib:>3} MiB: {:.1} ms told, {:.1} ms measured: {:.2}",
            told * 1e3,
            cpu * 1e3,
            told / cpu
        );
    }
    for (world, mib) in [8, 64, 256, 1_000].into_iter().flat_map(|world| [16, 100, 1_400].map(|mib| (world, mib))) {
        let sent @ Traffic { bytes, frames } = traffic(mib * MIB / 4, world, world);
        let (cpu, link) = (cost.cpu(sent) * 1e3, bytes as f64 * 8.0 / LINK_BITS * 1e3);
        println!(
            "  {world:>5} machines, {mib:>5} MiB: a rank sends {:>5} MiB in {frames:>6} frames, {cpu:>7.1} ms of one core; {link:>6.1} ms of a link of 25 Gbit/s",
            bytes / MIB as u64
        );
    }
}

/// A list in the environment, or the defaults.
fn numbers_of(variable: &str, defaults: &[usize]) -> Vec<usize> {
    let Ok(list) = env::var(variable) else { return defaults.to_vec() };
    list.split(',').map(|number| number.trim().parse().expect("numbers separated by commas")).collect()
}

/// The processes of one implementation.
struct Group(Vec<Process>);

struct Process {
    child: Child,
    stdin: Option<ChildStdin>,
    stdout: BufReader<ChildStdout>,
}

/// Seconds a round of the slowest rank, and CPU seconds a round of all ranks together.
#[derive(Default)]
struct Measured {
    seconds: Vec<f64>,
    cpu: Vec<f64>,
}

/// Our CPU seconds, of all ranks.
fn compare(
    (link, world): (&str, u32),
    bytes: usize,
    turns: usize,
    ours: &mut Group,
    mut gloo: Option<&mut Group>,
) -> f64 {
    let rounds = (200 * MIB / bytes).clamp(4, 40);
    let (mut us, mut them) = (Measured::default(), Measured::default());
    for turn in 0..=turns {
        let (mut spare, mut spare_too) = (Measured::default(), Measured::default());
        // The first turn warms up.
        let (us, them) = if turn == 0 { (&mut spare, &mut spare_too) } else { (&mut us, &mut them) };
        ours.measure(bytes, rounds, us);
        if let Some(gloo) = gloo.as_deref_mut() {
            gloo.measure(bytes, rounds, them);
        }
    }
    let goal = if link == "memory" && bytes > MIB { Goal::AtMost(0.125) } else { Goal::AtMost(1.0) };
    let what = format!("all-reduce, {link}, {world} ranks, {} MiB", bytes / MIB);
    Row::new(what, "s", &us.seconds).beside("gloo", &them.seconds).goal(goal).report();
    let (our_time, our_cpu) = (median(&mut us.seconds), median(&mut us.cpu));
    let row = format!("{link:>9} {world:>5} {:>8} | {} {:>8.1}", bytes / MIB, times(&us.seconds), our_cpu * 1e3);
    if them.seconds.is_empty() {
        println!("{row} |");
        return our_cpu;
    }
    let (their_time, their_cpu) = (median(&mut them.seconds), median(&mut them.cpu));
    println!(
        "{row} | {} {:>8.1} | {:>5.2} {:>5.2}",
        times(&them.seconds),
        their_cpu * 1e3,
        our_time / their_time,
        our_cpu / their_cpu
    );
    our_cpu
}

/// Median and best of sorted seconds, in ms.
fn times(sorted: &[f64]) -> String {
    format!("{:>9.2} {:>9.2}", sorted[sorted.len() / 2] * 1e3, sorted[0] * 1e3)
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

impl Group {
    /// One turn: all ranks do the rounds at the same time.
    fn measure(&mut self, bytes: usize, rounds: usize, into: &mut Measured) {
        for process in &mut self.0 {
            process.say(&format!("{bytes} {rounds}"));
        }
        let answers: Vec<Vec<f64>> = self.0.iter_mut().map(Process::numbers).collect();
        into.cpu.push(answers.iter().map(|answer| answer[0]).sum::<f64>() / rounds as f64);
        for round in 1..=rounds {
            into.seconds.push(answers.iter().map(|answer| answer[round]).fold(0.0, f64::max));
        }
    }
}

impl Process {
    fn start(command: &mut Command) -> Option<Self> {
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().ok()?;
        let (stdin, stdout) = (child.stdin.take(), BufReader::new(child.stdout.take()?));
        Some(Self { child, stdin, stdout })
    }

    fn say(&mut self, line: &str) {
        let stdin = self.stdin.as_mut().expect("open until the end");
        writeln!(stdin, "{line}").expect("a rank reads");
    }

    /// The next line; empty when the process is gone.
    fn line(&mut self) -> String {
        let mut line = String::new();
        self.stdout.read_line(&mut line).expect("a rank answers");
        line.trim().to_owned()
    }

    fn numbers(&mut self) -> Vec<f64> {
        let line = self.line();
        line.split_whitespace().map(|word| word.parse().expect("a number of a rank")).collect()
    }
}

impl Drop for Group {
    /// None ends before the others have ended their streams: all inputs are closed before one is waited for.
    fn drop(&mut self) {
        self.0.iter_mut().for_each(|process| drop(process.stdin.take()));
    }
}

impl Drop for Process {
    /// Ranks end with their input.
    fn drop(&mut self) {
        drop(self.stdin.take());
        let _ = self.child.wait();
    }
}

fn start_ours(world: u32, dir: &Path, link: &str, lab: Option<&Namespaces>) -> Group {
    let authority = Authority::in_memory(ClusterId([1; 16])).expect("make an authority");
    let start = |rank: u32| {
        let dir = dir.join(rank.to_string());
        let subject = Subject::Rank { job: JobId(1), generation: Generation(1), rank: Rank(rank) };
        let credentials = authority.credentials(&subject, Duration::from_secs(86_400)).expect("issue");
        credentials.save(&dir).expect("save credentials");
        let binary = env::current_exe().expect("this binary");
        let mut command = command_of(rank, &binary, lab);
        command.env(ROLE, dir).env(LINK, link).env(IP, ip_of(rank, lab).to_string());
        Process::start(&mut command).expect("start a rank")
    };
    let mut group = Group((0..world).map(start).collect());
    let addresses: Vec<String> = group.0.iter_mut().map(Process::line).collect();
    group.0.iter_mut().for_each(|process| process.say(&addresses.join(" ")));
    group
}

/// None, with a word about why, where PyTorch is not installed.
fn start_gloo(world: u32, lab: Option<&Namespaces>) -> Option<Group> {
    let python = env::var_os("STOKE_TORCH_PYTHON").map(PathBuf::from).unwrap_or_else(|| {
        let home = env::var_os("HOME").unwrap_or_default();
        Path::new(&home).join(".cache/stoke-torch/bin/python")
    });
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/exchange.py");
    let port = TcpListener::bind((LOOPBACK, 0)).and_then(|socket| socket.local_addr()).expect("a free port").port();
    let start = |rank: u32| {
        let mut command = command_of(rank, &python, lab);
        command.arg(&script).envs([("RANK", rank.to_string()), ("WORLD_SIZE", world.to_string())]);
        command.envs([("MASTER_ADDR", ip_of(0, lab).to_string()), ("MASTER_PORT", port.to_string())]);
        Process::start(command.env("GLOO_SOCKET_IFNAME", if lab.is_some() { "eth0" } else { "lo" }))
    };
    let group: Option<Vec<Process>> = (0..world).map(start).collect();
    let mut group = Group(group.unwrap_or_default());
    let ready = !group.0.is_empty() && group.0.iter_mut().all(|process| process.line().starts_with("ready"));
    if !ready {
        eprintln!("no PyTorch at {} (run jobs/reference/setup.sh): ours only", python.display());
    }
    ready.then_some(group)
}

/// A rank's address.
fn ip_of(rank: u32, lab: Option<&Namespaces>) -> IpAddr {
    lab.map_or(LOOPBACK, |_| Namespaces::address(rank).into())
}

/// A program where that rank runs.
fn command_of(rank: u32, program: &Path, lab: Option<&Namespaces>) -> Command {
    let Some(lab) = lab else { return Command::new(program) };
    lab.command(rank, program)
}

/// One of our ranks: says its address, hears all, then answers each "<bytes> <rounds>" as exchange.py does. A size has its own mesh, as a
/// training job has.
fn rank(dir: &Path) {
    let credentials = Credentials::load(dir).expect("load credentials");
    let io = Io::thread("stoke-net").expect("start the network thread");
    let Subject::Rank { rank: Rank(own), .. } = credentials.identity().subject else { panic!("credentials of a rank") };
    let ip: IpAddr = env::var(IP).ok().and_then(|ip| ip.parse().ok()).expect("an address");
    let link = env::var(LINK).expect("a link");
    let machine = match link.as_str() {
        "memory" => Some(Machine([0; 16])),
        "hosts" => Some(Machine([own as u8 / 2; 16])),
        _ => None,
    };
    let tcp = if link == "wire-quic" { UseTcp::Never } else { UseTcp::WhereFaster };
    let bind = || Mesh::bind(&io, ip, credentials.clone()).expect("bind").on_machine(machine).using_tcp(tcp);
    let meshes: Vec<Mesh> = (0..SIZES_MAX).map(|_| bind()).collect();
    let addresses: Vec<String> = meshes.iter().map(|mesh| mesh.address().to_string()).collect();
    println!("{}", addresses.join(","));
    let mut lines = std::io::stdin().lines().map(|line| line.expect("read stdin"));
    let all = lines.next().expect("the addresses of all ranks");
    let mut endpoints = meshes.into_iter().enumerate();
    let mut open: Option<(usize, Mesh, Exchange, LaneSums)> = None;
    let mut step = 0;
    for line in lines {
        let mut numbers = line.split(' ').map(|word| word.parse::<usize>().expect("a number"));
        let (bytes, rounds) = (numbers.next().expect("bytes"), numbers.next().expect("rounds"));
        if open.as_ref().is_none_or(|(size, ..)| *size != bytes) {
            if let Some((.., mut exchange, _)) = open.take() {
                exchange.finish();
            }
            let (index, mesh) = endpoints.next().expect("an endpoint for each size");
            open = Some(connect(bytes, mesh, members(&all, index)));
        }
        let (.., exchange, sums) = open.as_mut().expect("opened above");
        println!("{}", rounds_of(exchange, sums, rounds, &mut step));
    }
    if let Some((.., mut exchange, _)) = open {
        exchange.finish();
    }
}

/// Endpoints that a rank binds before it knows how many sizes will be asked for.
const SIZES_MAX: usize = 8;

fn connect(bytes: usize, mesh: Mesh, members: Vec<Member>) -> (usize, Mesh, Exchange, LaneSums) {
    let values = bytes / 4;
    let rounded = env::var(LINK).is_ok_and(|link| link == "wire-bf16");
    let shape = Shape { values, lanes: LANES, rounded, ..Shape::default() };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let (members, joining) = (members.into(), Vec::new().into());
    let membership = Membership {
        generation: Generation(1),
        members,
        joining,
        after: None,
        ballot: 0,
        purpose: Purpose::Train,
        restarts: 0,
    };
    let begun = State { step: Some(Step(0)), ..State::default() };
    let exchange = runtime.block_on(mesh.form(&membership, begun, shape)).expect("connect").exchange;
    let mut sums = exchange.lane_sums();
    for lane in sums.owned() {
        sums.begin(lane);
        sums.push(0, &vec![lane as f32 + 1.0; shape.values]);
    }
    (bytes, mesh, exchange, sums)
}

/// The ranks of mesh `index`, out of "address,address,... address,address,...".
fn members(all: &str, index: usize) -> Vec<Member> {
    let address = |list: &str| list.split(',').nth(index).and_then(|address| address.parse::<SocketAddr>().ok());
    let id = |rank| RankId { job: JobId(1), generation: Generation(1), rank: Rank(rank) };
    (0..)
        .zip(all.split(' '))
        .map(|(rank, list)| Member { id: id(rank), address: address(list).expect("an address") })
        .collect()
}

/// Rounds back to back, as gloo's side does: the CPU seconds of all, then the seconds of each.
fn rounds_of(exchange: &mut Exchange, sums: &mut LaneSums, rounds: usize, step: &mut u64) -> String {
    let mut sum_of = |sums: &mut LaneSums| {
        *step += 1;
        let start = Instant::now();
        let sum = exchange.all_reduce(Step(*step), sums, None).expect("a sum");
        (start.elapsed().as_secs_f64(), sum[0], sum[sum.len() - 1])
    };
    // Lines up the ranks.
    sum_of(sums);
    let cpu = cpu_seconds();
    let measured: Vec<(f64, f32, f32)> = (0..rounds).map(|_| sum_of(sums)).collect();
    let cpu = cpu_seconds() - cpu;
    let expected = (1..=LANES).sum::<u32>() as f32;
    assert!(measured.iter().all(|(_, first, last)| *first == expected && *last == expected), "a wrong sum");
    let seconds = measured.iter().map(|(seconds, ..)| seconds.to_string());
    [cpu.to_string()].into_iter().chain(seconds).collect::<Vec<_>>().join(" ")
}

/// Of all threads of this process.
fn cpu_seconds() -> f64 {
    let tasks = std::fs::read_dir("/proc/self/task").expect("list threads");
    let nanoseconds = |task: std::io::Result<std::fs::DirEntry>| {
        let text = std::fs::read_to_string(task.expect("a thread").path().join("schedstat")).unwrap_or_default();
        text.split(' ').next().and_then(|first| first.parse::<f64>().ok()).unwrap_or(0.0)
    };
    tasks.map(nanoseconds).sum::<f64>() / 1e9
}

fn cores() -> usize {
    std::thread::available_parallelism().map_or(0, usize::from)
}
