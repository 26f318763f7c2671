//! What a supervisor of services needs: signs of life by systemd's protocol, a join apart from the service, and what a package holds beside the binary.

use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::Signal;

use crate::harness::{Background, Cluster, LIMIT, poll, process_of, rank_on, run, run_with_input, signal, spec, stoke};

/// How long the supervisor waits for a sign of life.
const PATIENCE: Duration = Duration::from_millis(300);

/// A supervisor's end of the protocol, as systemd's.
struct Supervisor {
    socket: UnixDatagram,
    path: std::path::PathBuf,
}

impl Supervisor {
    fn listen(dir: &Path) -> Self {
        let path = dir.join("notify");
        let socket = UnixDatagram::bind(&path).expect("a socket");
        Self { socket, path }
    }

    fn watch(&self, mut command: Command) -> Background {
        command.env("NOTIFY_SOCKET", &self.path).env("WATCHDOG_USEC", PATIENCE.as_micros().to_string());
        Background::start(command)
    }

    /// The next words that come within so long.
    fn heard(&self, within: Duration) -> Option<String> {
        let mut buffer = [0; 256];
        self.socket.set_read_timeout(Some(within)).expect("a socket");
        let bytes = self.socket.recv(&mut buffer).ok()?;
        Some(String::from_utf8_lossy(&buffer[..bytes]).into_owned())
    }

    /// The next words, of which all until them were signs of life.
    #[track_caller]
    fn expect(&self, words: &str) {
        let is_new = |heard: &String| heard != "WATCHDOG=1" || words == "WATCHDOG=1";
        let next = poll(words, || self.heard(LIMIT).filter(is_new));
        assert_eq!(next, words);
    }
}

#[test]
fn a_coordinator_says_that_it_is_ready_that_it_lives_and_that_it_stops() {
    let scratch = tempfile::tempdir().expect("a temporary folder");
    let supervisor = Supervisor::listen(scratch.path());
    let dir = scratch.path().join("cluster");
    let command = stoke(["coordinator", "--listen", "127.0.0.1:0", "--dir", dir.to_str().expect("a path in UTF-8")]);
    let coordinator = supervisor.watch(command);
    supervisor.expect("READY=1");
    assert!(dir.join("admin/cluster.toml").exists(), "ready before its folder is");
    supervisor.expect("WATCHDOG=1");
    supervisor.expect("WATCHDOG=1");
    signal(coordinator.pid(), Signal::STOP);
    // What it had said before the signal came.
    poll("silence", || supervisor.heard(PATIENCE).is_none().then_some(()));
    signal(coordinator.pid(), Signal::CONT);
    supervisor.expect("WATCHDOG=1");
    signal(coordinator.pid(), Signal::TERM);
    supervisor.expect("STOPPING=1");
    coordinator.wait().expect(0);
}

#[test]
fn an_agent_that_joined_apart_runs_without_a_token_and_is_ready_with_its_session() {
    let cluster = Cluster::start(1);
    let scratch = tempfile::tempdir().expect("a temporary folder");
    let dir = scratch.path().join("node");
    let (dir, address) = (dir.to_str().expect("a path in UTF-8"), cluster.address());
    let agent = ["node", "--dir", dir, "--coordinator", &address, "--name", "apart", "--gateway", "none"];
    let join = [&agent[..], &["--join", "-", "--join-only"]].concat();
    let joined = run_with_input(&join, &cluster.token("node")).expect(0);
    assert!(joined.stdout.contains("this machine is node-2"), "{joined:?}");
    // Once more with another token: nothing changes.
    run_with_input(&join, &cluster.token("node")).expect(0);
    run([&agent[..], &["--join-only"]].concat()).expect(2).says(&["--join"]);
    assert_eq!(cluster.json(&["nodes"])["nodes"].as_array().map(Vec::len), Some(2));

    // A coordinator that does not answer is waited for; nothing is said until one does.
    let supervisor = Supervisor::listen(scratch.path());
    let coordinator = process_of(cluster.dir(), "coordinator");
    signal(coordinator, Signal::STOP);
    let agent = supervisor.watch(stoke(agent));
    assert_eq!(supervisor.heard(PATIENCE * 2), None, "ready without a session");
    signal(coordinator, Signal::CONT);
    supervisor.expect("READY=1");
    let nodes = cluster.json(&["nodes"]);
    assert_eq!((&nodes["nodes"][1]["name"], &nodes["nodes"][1]["state"]), (&"apart".into(), &"up".into()));
    supervisor.expect("WATCHDOG=1");
    signal(agent.pid(), Signal::TERM);
    supervisor.expect("STOPPING=1");
    agent.wait().expect(0);
}

/// Its certificate lives for two seconds here, not for a week.
#[test]
fn a_machine_that_was_away_for_longer_than_its_certificate_joins_anew_with_a_token() {
    let scratch = tempfile::tempdir().expect("a temporary folder");
    let path = |name: &str| scratch.path().join(name).to_str().expect("a path in UTF-8").to_owned();
    let (cluster, config, node) = (path("cluster"), path("stoke.toml"), path("node"));
    let settings = format!("dir = {cluster:?}\nlisten = \"127.0.0.1:0\"\n[lifetimes]\nnode_s = 2\n");
    std::fs::write(&config, settings).expect("written");
    let supervisor = Supervisor::listen(scratch.path());
    let coordinator = supervisor.watch(stoke(["coordinator", "--config", &config]));
    supervisor.expect("READY=1");
    let admin = |arguments: &[&str]| run([&["--cluster", &cluster], arguments].concat()).expect(0).json();
    let told = std::fs::read_to_string(scratch.path().join("cluster/admin/cluster.toml")).expect("cluster.toml");
    let address = told.split('"').find(|word| word.starts_with("127.0.0.1:")).expect("an address").to_owned();
    let agent = ["node", "--dir", &node, "--coordinator", &address, "--name", "away", "--gateway", "none"];
    let join = [&agent[..], &["--join", "-", "--join-only"]].concat();
    let token =
        || admin(&["token", "create", "--role", "node", "--json"])["text"].as_str().expect("a token").to_owned();
    assert!(run_with_input(&join, &token()).expect(0).stdout.contains("this machine is node-1"));
    // An agent that is started before that renews it.
    let joined = Instant::now();
    poll("the end of the certificate", || (joined.elapsed() > Duration::from_secs(3)).then_some(()));
    run(&agent[..]).expect(4).says(&["was away for longer than its certificate lives", "--join TOKEN"]);
    let joined = run_with_input(&join, &token()).expect(0);
    assert!(joined.stdout.contains("this machine is node-2"), "{joined:?}");
    signal(coordinator.pid(), Signal::TERM);
    coordinator.wait().expect(0);
}

/// Theirs live for twelve seconds here, not for a week.
#[test]
fn a_job_outlives_the_certificates_of_its_ranks() {
    let scratch = tempfile::tempdir().expect("a temporary folder");
    let path = |name: &str| scratch.path().join(name).to_str().expect("a path in UTF-8").to_owned();
    let (cluster, config, digits) = (path("cluster"), path("stoke.toml"), spec("digits.toml"));
    let settings = format!("dir = {cluster:?}\nlisten = \"127.0.0.1:0\"\n[lifetimes]\nrank_s = 12\n");
    std::fs::write(&config, settings).expect("written");
    let supervisor = Supervisor::listen(scratch.path());
    let coordinator = supervisor.watch(stoke(["coordinator", "--config", &config]));
    supervisor.expect("READY=1");
    let admin = |arguments: &[&str]| run([&["--cluster", &cluster, "--json"], arguments].concat()).expect(0).json();
    let told = std::fs::read_to_string(scratch.path().join("cluster/admin/cluster.toml")).expect("cluster.toml");
    let address = told.split('"').find(|word| word.starts_with("127.0.0.1:")).expect("an address").to_owned();
    let agents = ["one", "two"].map(|name| {
        let dir = path(name);
        let agent = ["node", "--dir", &dir, "--coordinator", &address, "--name", name, "--gateway", "none"];
        let token = admin(&["token", "create", "--role", "node"])["text"].as_str().expect("a token").to_owned();
        run_with_input([&agent[..], &["--join", "-", "--join-only"]].concat(), &token).expect(0);
        Background::start(stoke(agent))
    });
    poll("two nodes", || {
        let nodes = admin(&["nodes"]);
        nodes["nodes"].as_array()?.iter().filter(|node| node["state"] == "up").nth(1).map(drop)
    });
    let submitted = admin(&["submit", digits.to_str().expect("UTF-8"), "--ranks", "2", "--set", "train.steps=1000000"]);
    let job = submitted["job"].as_str().expect("a job").to_owned();
    let view = || admin(&["jobs"])["jobs"][0].clone();
    let step = || view()["progress"]["step"].as_u64();
    poll("a step", || step().filter(|step| *step > 0));
    let (trains, [one, two]) = (Instant::now(), ["one", "two"].map(|name| rank_on(&scratch.path().join(name))));
    poll("the end of the first certificates", || (trains.elapsed() > Duration::from_secs(14)).then_some(()));
    signal(one, Signal::KILL);
    // The two meet again, each with a certificate that lives.
    poll("steps of two ranks after the loss", || {
        let (view, before) = (view(), step()?);
        let again = view["world_sizes"].as_array().is_some_and(|sizes| sizes.len() > 1 && sizes.ends_with(&[2.into()]));
        (again && poll("a step", || step().filter(|step| *step > before)) > before).then_some(())
    });
    assert_eq!(rank_on(&scratch.path().join("two")), two, "the survivor was started anew");
    let log = run(["--cluster", &cluster, "logs", &job, "--rank", "1"]).expect(0).stdout;
    assert!(log.contains("certificate of this rank was renewed"), "{log}");
    run(["--cluster", &cluster, "cancel", &job]).expect(0);
    for agent in agents {
        signal(agent.pid(), Signal::TERM);
        agent.wait().expect(0);
    }
    signal(coordinator.pid(), Signal::TERM);
    coordinator.wait().expect(0);
}

#[test]
fn completions_and_man_pages_are_those_of_the_command_line() {
    for (shell, word) in [("bash", "--join-only"), ("zsh", "--join-only"), ("fish", "join-only")] {
        let completions = run(["completions", shell]).expect(0).stdout;
        assert!(completions.contains(word) && completions.contains("checkpoint"), "{shell}");
    }
    let bash = run(["completions", "bash"]).expect(0).stdout;
    let mut checked = Command::new("bash").arg("-n").stdin(Stdio::piped()).spawn().expect("bash starts");
    std::io::Write::write_all(&mut checked.stdin.take().expect("a pipe"), bash.as_bytes()).expect("bash reads");
    assert!(checked.wait().expect("bash ends").success());

    let scratch = tempfile::tempdir().expect("a temporary folder");
    let dir = scratch.path().join("man1");
    run(["man", dir.to_str().expect("a path in UTF-8")]).expect(0);
    let pages: Vec<String> = std::fs::read_dir(&dir)
        .expect("man pages")
        .map(|entry| entry.expect("an entry").file_name().to_string_lossy().into_owned())
        .collect();
    for page in ["stoke.1", "stoke-submit.1", "stoke-node.1", "stoke-node-remove.1", "stoke-checkpoint-prune.1"] {
        assert!(pages.iter().any(|name| name == page), "{page} is not among {pages:?}");
    }
    for hidden in ["stoke-worker.1", "stoke-survey.1", "stoke-supervise.1"] {
        assert!(!pages.iter().any(|name| name == hidden), "{hidden} is a page");
    }
    let page = std::fs::read_to_string(dir.join("stoke-node.1")).expect("a page");
    assert!(
        page.starts_with(".ie") && page.contains(".TH stoke-node 1") && page.contains("\n.SH EXAMPLES\n"),
        "{page}"
    );
    assert!(run(["man"]).expect(0).stdout.contains("stoke\\-submit(1)"));
}
