//! Processes that have run out of file descriptors (F27): the limit of one that runs is lowered to a little more than it has open.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Resource, Rlimit, getrlimit, prlimit};

use crate::harness::{Cluster, poll, process_of, text};

/// Far more than the coordinator may open, and few enough for the queue of its listener.
const CONNECTIONS: usize = 200;
/// Descriptors that it may open beyond those that it has.
const SPARE: u64 = 6;
/// How long its use of the processor is looked at. A loop that spins would use all of it; the machine may be busy with other tests.
const WATCHED: Duration = Duration::from_secs(3);

#[test]
fn a_coordinator_without_descriptors_keeps_its_sessions_does_not_spin_and_answers_again() {
    let parent = tempfile::tempdir().expect("a temporary folder");
    let cluster = Cluster::start_with(parent, 1, &["--metrics", "127.0.0.1:0"]);
    let metrics = text(&cluster.state()["metrics"]);
    let pid = process_of(cluster.dir(), "coordinator");
    assert!(is_healthy(&metrics));
    let job = cluster.submit(1_000_000, &[]);
    cluster.wait_for_state(&job, "running");
    let step = || cluster.job(&job)["progress"]["step"].as_u64();

    let limit = limit_files(pid, SPARE);
    let connections: Vec<TcpStream> =
        (0..CONNECTIONS).map(|_| TcpStream::connect(&metrics).expect("the kernel takes it")).collect();
    poll("the end of the descriptors", || (highest_file(pid) + 1 >= limit).then_some(()));
    let (start, before, done) = (Instant::now(), cpu_time(pid), step());
    // New users and changes come over the one socket that is open, and the journal is open too.
    while start.elapsed() < WATCHED {
        assert_eq!(cluster.json(&["status"])["nodes_up"], 1);
        let queued = cluster.submit(1, &["--set", "resources.cpus=100000"]);
        cluster.run(&["cancel", &queued]).expect(0);
    }
    let (used, passed) = (cpu_time(pid) - before, start.elapsed());
    assert!(used < passed / 4, "{used:?} of {passed:?} used with {limit} descriptors: it spins");
    poll("steps", || (step() > done).then_some(()));
    assert_eq!(cluster.job(&job)["generation"], 1, "the session of the node was lost");

    drop(connections);
    poll("an answer", || is_healthy(&metrics).then_some(()));
    assert_eq!(process_of(cluster.dir(), "coordinator"), pid, "it was restarted");
    cluster.run(&["cancel", &job]).expect(0);
    cluster.wait_for_state(&job, "cancelled");
}

#[test]
fn an_agent_without_descriptors_says_that_no_rank_can_be_started_and_starts_the_next_when_it_can() {
    let cluster = Cluster::start(1);
    let pid = process_of(cluster.dir(), "node-1");
    limit_files(pid, 1);
    // Fewer than the failed starts after which a node is given nothing more.
    let job = cluster.submit(2, &["--set", "restart.attempts=2"]);
    let failed = cluster.wait_for_state(&job, "failed");
    let reason = text(&failed["reason"]);
    for words in ["rank-0 on node-1 could not be started", "Too many open files", "attempt 2 of 2"] {
        assert!(reason.contains(words), "{reason}");
    }
    assert_eq!(cluster.json(&["status"])["nodes_up"], 1);
    lift_limit(pid);
    let next = cluster.submit(2, &[]);
    cluster.wait_for_state(&next, "succeeded");
    assert_eq!(process_of(cluster.dir(), "node-1"), pid, "the agent was restarted");
}

fn files(pid: u32) -> Vec<u64> {
    let entries = std::fs::read_dir(format!("/proc/{pid}/fd")).expect("its descriptors").flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect()
}

/// Of those below the limit.
fn highest_file(pid: u32) -> u64 {
    files(pid).into_iter().max().unwrap_or_default()
}

/// Lets a process open `spare` more; the limit is one above the highest number that it may use, and numbers in between may be free.
fn limit_files(pid: u32, spare: u64) -> u64 {
    let limit = files(pid).len() as u64 + spare;
    set_limit(pid, limit);
    limit
}

/// As many as this process may.
fn lift_limit(pid: u32) {
    set_limit(pid, getrlimit(Resource::Nofile).current.unwrap_or(1024));
}

fn set_limit(pid: u32, files: u64) {
    let pid = Pid::from_raw(pid.cast_signed());
    let maximum = prlimit(pid, Resource::Nofile, getrlimit(Resource::Nofile)).expect("its limit").maximum;
    prlimit(pid, Resource::Nofile, Rlimit { current: Some(files), maximum }).expect("another limit");
}

/// Of user and system together.
fn cpu_time(pid: u32) -> Duration {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).expect("it runs");
    let fields: Vec<&str> = stat.rsplit_once(')').expect("a name").1.split_whitespace().collect();
    let ticks: u64 = [11, 12].map(|at| fields[at].parse::<u64>().expect("ticks")).iter().sum();
    // The kernel shows it in hundredths of a second, whatever its own clock does.
    Duration::from_millis(ticks * 10)
}

fn is_healthy(address: &str) -> bool {
    let ask = || -> std::io::Result<String> {
        let mut stream = TcpStream::connect(address)?;
        stream.set_read_timeout(Some(Duration::from_secs(10)))?;
        stream.write_all(b"GET /healthz HTTP/1.1\r\nhost: a\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    };
    ask().is_ok_and(|answer| answer.starts_with("HTTP/1.1 200"))
}
