//! A cluster of machines of their own: three network namespaces, each with its own address, on a bridge in a fourth, where the user sits.
//! Here words and gradients cross links that can be cut, and every process is started as on bare metal. Needs root and iproute2; says so and
//! proves nothing where they are missing. Owns its namespaces and whatever runs in them, and removes both by name.

use std::fs::File;
use std::io::Write;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tempfile::TempDir;

use crate::harness::{Background, Ended, Run, poll, signal, spec, stoke, text};

const STEPS: u64 = 60;
const CHECKPOINT_EVERY: u64 = 10;
const LOCAL_STEPS: u64 = 5;
/// What a node hears beside gradients while a job runs.
const OTHER_BYTES: u64 = 400_000;
/// The gradients of 80,202 parameters. Each step carries half of them and half of their sum each way between two machines, however many ranks they have.
const STEP_BYTES: u64 = 80_202 * 4;

/// Where the user sits: it holds the bridge, and an address on it.
const DESK: Machine = Machine { name: "desk", ip: "10.77.0.1" };
const HEAD: Machine = Machine { name: "head", ip: "10.77.0.10" };
const NODES: [Machine; 2] = [Machine { name: "left", ip: "10.77.0.11" }, Machine { name: "right", ip: "10.77.0.12" }];
const PORT: u16 = 7878;

#[test]
fn machines_of_their_own_train_the_same_bits_whatever_happens_to_the_network_and_the_coordinator() {
    let network = match Network::build() {
        Ok(network) => network,
        // Past the capture of the test runner: nobody should take this for a test that was done.
        Err(why) => return writeln!(std::io::stderr(), "not tested with network namespaces: {why}").expect("stderr"),
    };
    let mut lab = Lab::start(network);
    let reference = Run::new("digits.toml", 1).set("train.steps", STEPS).set("checkpoint.every", CHECKPOINT_EVERY);
    let (reference, _scratch) = reference.finish();
    lab.trains_over_the_wire(&reference);
    lab.adds_in_memory_first(&reference);
    lab.sends_what_local_steps_have_changed();
    lab.sends_half_the_bytes_when_gradients_are_rounded(&reference);
    lab.sends_gradients_while_it_computes_others();
    lab.outlives_a_firewall_that_forgets_connections(&reference);
    lab.outlives_a_link_cut_one_way(&reference);
    lab.outlives_its_coordinator(&reference);
}

/// The services are ended first, then their namespaces go, then their files.
struct Lab {
    coordinator: Option<Background>,
    nodes: Vec<Background>,
    network: Network,
    scratch: TempDir,
}

impl Lab {
    /// As on bare metal: a coordinator, a token for each machine and for the user, joins over the network.
    fn start(network: Network) -> Self {
        let scratch = tempfile::tempdir().expect("a temporary folder");
        let mut lab = Self { coordinator: None, nodes: Vec::new(), network, scratch };
        lab.write_settings();
        lab.start_coordinator();
        poll("the coordinator", || (lab.admin(&["status"]).code() == 0).then_some(()));
        for node in &NODES {
            let dir = lab.path(node.name);
            let arguments = ["node", "--join", "-", "--cpus", "2", "--name", node.name, "--dir", &dir];
            let service = lab.with_token("node", node, &arguments);
            lab.nodes.push(Background::start(service));
        }
        let login = lab.with_token(
            "submitter",
            &DESK,
            &["login", "--join", "-", "--name", "ada", "--cluster", &lab.path("ada")],
        );
        Background::start(login).wait().expect(0);
        let nodes = poll("both nodes", || {
            let nodes = lab.ask(&["nodes"])?["nodes"].as_array()?.clone();
            (nodes.iter().filter(|node| node["state"] == "up").count() == NODES.len()).then_some(nodes)
        });
        for node in &NODES {
            let seen = nodes.iter().find(|seen| seen["name"] == node.name).expect("it has joined");
            assert!(text(&seen["address"]).starts_with(&format!("{}:", node.ip)), "{seen:#}");
        }
        lab
    }

    fn trains_over_the_wire(&self, reference: &Value) {
        let job = self.carries_each_value_once(2, STEPS, reference);
        let placement = job["placement"].as_array().expect("a placement");
        assert_ne!(placement[0]["node"], placement[1]["node"], "{job:#}");
    }

    /// Two ranks a machine, undisturbed and when one of them is killed.
    fn adds_in_memory_first(&self, reference: &Value) {
        self.carries_each_value_once(4, STEPS, reference);
        let job = self.submit_and_wait_for_steps(4);
        let ranks = crate::nodes::children(self.nodes[0].pid());
        assert_eq!(ranks.len(), 2, "{ranks:?}");
        signal(ranks[0], Signal::KILL);
        let job = self.succeeds(&job, reference);
        assert_eq!(job["recoveries"], 1, "{job:#}");
    }

    /// As many samples as the others, and a sum for each `LOCAL_STEPS` of their steps.
    fn sends_what_local_steps_have_changed(&self) {
        let run = Run::new("digits.toml", 1).set("train.steps", STEPS / LOCAL_STEPS);
        let (reference, _scratch) = run.set("train.diloco.local_steps", LOCAL_STEPS).finish();
        assert_eq!(reference["samples"], STEPS * 128);
        self.carries_each_value_once(2, STEPS / LOCAL_STEPS, &reference);
    }

    /// On ranks that each compare their parameters with the other's at every step.
    fn sends_half_the_bytes_when_gradients_are_rounded(&self, reference: &Value) {
        let before = NODES.each_ref().map(|node| self.network.received_bytes(node));
        let job = self.submit(2, STEPS, &["--set", "train.wire=\"bf16\""]);
        let job = self.ends(&job);
        for (node, before) in NODES.iter().zip(before) {
            let received = self.network.received_bytes(node) - before;
            let expected = STEPS * STEP_BYTES / 2..STEPS * STEP_BYTES * 3 / 4 + OTHER_BYTES;
            assert!(expected.contains(&received), "{received} bytes came to {}", node.name);
        }
        let [rounded, exact] =
            [&job["outcome"], reference].map(|of| of["metrics"]["accuracy"].as_f64().expect("a number"));
        assert!(
            (rounded - exact).abs() < 0.02 && job["outcome"]["weights_blake3"] != reference["weights_blake3"],
            "{job:#}"
        );
    }

    /// A language model's leave while backward runs, on ranks that compare their parameters behind them; one of the ranks is killed.
    fn sends_gradients_while_it_computes_others(&self) {
        let small =
            [("model.hidden", 64), ("model.layers", 2), ("model.heads", 2), ("model.context", 32), ("train.steps", 40)];
        let run = small.iter().fold(Run::new("language.toml", 1), |run, (key, value)| run.set(key, *value));
        let (reference, _scratch) = run.finish();
        let sets: Vec<String> = small.iter().map(|(key, value)| format!("{key}={value}")).collect();
        let spec = spec("language.toml");
        let mut arguments = vec!["submit", spec.to_str().expect("UTF-8"), "--ranks", "2", "--json"];
        sets.iter().for_each(|set| arguments.extend(["--set", set]));
        let job = text(&self.user(&arguments).expect(0).json()["job"]);
        poll("a few steps", || self.job(&job)?["progress"]["step"].as_u64().filter(|step| *step >= 3));
        signal(crate::nodes::children(self.nodes[1].pid())[0], Signal::KILL);
        let job = self.succeeds(&job, &reference);
        assert_eq!(job["recoveries"], 1, "{job:#}");
    }

    fn carries_each_value_once(&self, ranks: u32, steps: u64, reference: &Value) -> Value {
        let count = |node| (self.network.received_bytes(node), self.network.received_by_tcp(node));
        let before = NODES.each_ref().map(count);
        let job = self.succeeds(&self.submit(ranks, steps, &[]), reference);
        assert_eq!((&job["generation"], &job["world_sizes"]), (&1.into(), &serde_json::json!([ranks])), "{job:#}");
        for (node, (before, by_tcp_before)) in NODES.iter().zip(before) {
            let received = self.network.received_bytes(node) - before;
            // Half as much again for packets, acknowledgements and whatever else a node hears meanwhile.
            let expected = steps * STEP_BYTES..steps * STEP_BYTES * 3 / 2 + OTHER_BYTES;
            assert!(expected.contains(&received), "{ranks} ranks: {received} bytes came to {}", node.name);
            // Packets of this network are small. The kernel counts what it has joined, 64 KiB at most.
            let by_tcp = self.network.received_by_tcp(node) - by_tcp_before;
            assert!(by_tcp > steps * STEP_BYTES / 65_536, "{by_tcp} segments of TCP came to {}", node.name);
        }
        job
    }

    /// What goes by TCP is lost without a word, and QUIC passes: the job goes on by that.
    fn outlives_a_firewall_that_forgets_connections(&self, reference: &Value) {
        let left = &NODES[0];
        let firewall = |change: &str| {
            ip(&["netns", "exec", &left.namespace(), "iptables", change, "OUTPUT", "-p", "tcp", "-j", "DROP"])
        };
        let job = self.submit_and_wait_for_steps(2);
        if let Err(why) = firewall("-A") {
            writeln!(std::io::stderr(), "not tested with a firewall: {why}").expect("stderr");
            self.succeeds(&job, reference);
            return;
        }
        let job = self.succeeds(&job, reference);
        firewall("-D").expect("it was added");
        assert_eq!((&job["recoveries"], &job["state"]), (&1.into(), &"succeeded".into()), "{job:#}");
    }

    /// The node hears everyone and nobody hears it, until it is given up.
    fn outlives_a_link_cut_one_way(&self, reference: &Value) {
        let job = self.submit_and_wait_for_steps(2);
        let [left, right] = &NODES;
        self.network.cut(right, &[left, &HEAD]);
        poll("the end of a node that nobody hears", || {
            let nodes = self.ask(&["nodes"])?;
            let cut = nodes["nodes"].as_array()?.iter().find(|node| node["name"] == right.name)?;
            (cut["state"] == "lost").then_some(())
        });
        self.network.heal(right, &[left, &HEAD]);
        let job = self.succeeds(&job, reference);
        assert_eq!(job["recoveries"], 1, "no flapping: {job:#}");
    }

    fn outlives_its_coordinator(&mut self, reference: &Value) {
        let job = self.submit_and_wait_for_steps(2);
        // Dropping it kills it with SIGKILL and waits for its end.
        self.coordinator = None;
        assert_eq!(self.user(&["jobs"]).code(), 5, "nobody answers");
        self.start_coordinator();
        let job = self.succeeds(&job, reference);
        assert_eq!(job["generation"], 1, "ranks went on while it was away: {job:#}");
    }

    /// The checkpoints lie where all machines see them.
    fn write_settings(&self) {
        let checkpoints = self.path("checkpoints");
        // The graces are shorter than the defaults, so that a cut node is soon given up; still longer than a reconnect takes.
        let settings = format!(
            "dir = {:?}\nlisten = \"0.0.0.0:{PORT}\"\nadvertise = [\"{}:{PORT}\"]\ncheckpoints = \"file://{checkpoints}\"\n\
             timings = {{ lost_grace_ms = 3000, failover_grace_ms = 15000 }}\n",
            self.path("head"),
            HEAD.ip
        );
        std::fs::write(self.path("coordinator.toml"), settings).expect("written");
    }

    fn start_coordinator(&mut self) {
        let command = stoke(["coordinator", "--config", &self.path("coordinator.toml")]);
        self.coordinator = Some(Background::start(self.network.service(&HEAD, command)));
    }

    /// A command that reads a fresh token from its standard input and dials the coordinator.
    fn with_token(&self, role: &str, machine: &Machine, arguments: &[&str]) -> Command {
        let created = self.admin(&["token", "create", "--role", role]).expect(0);
        let path = self.path(&format!("{}.token", machine.name));
        std::fs::write(&path, created.stdout).expect("written");
        let coordinator = format!("{}:{PORT}", HEAD.ip);
        let command = stoke([arguments, &["--coordinator", &coordinator]].concat());
        let mut command = self.network.service(machine, command);
        command.stdin(File::open(&path).expect("it was written"));
        command
    }

    /// The digits in so many steps; fewer than `STEPS` are of local steps.
    fn submit(&self, ranks: u32, steps: u64, more: &[&str]) -> String {
        let (ranks, spec, local) = (ranks.to_string(), spec("digits.toml"), STEPS / steps);
        let mut sets = vec![format!("train.steps={steps}"), format!("checkpoint.every={CHECKPOINT_EVERY}")];
        sets.extend((local > 1).then(|| format!("train.diloco.local_steps={local}")));
        let mut arguments = vec!["submit", spec.to_str().expect("UTF-8"), "--ranks", &ranks, "--json"];
        sets.iter().for_each(|set| arguments.extend(["--set", set]));
        arguments.extend(more);
        let submitted = self.user(&arguments);
        text(&submitted.expect(0).json()["job"])
    }

    fn submit_and_wait_for_steps(&self, ranks: u32) -> String {
        let job = self.submit(ranks, STEPS, &[]);
        poll("a few steps", || self.job(&job)?["progress"]["step"].as_u64().filter(|step| *step >= 3));
        job
    }

    /// With the weights of the reference.
    fn succeeds(&self, job: &str, reference: &Value) -> Value {
        let view = self.ends(job);
        for key in ["weights_blake3", "loss", "samples", "step", "metrics"] {
            assert_eq!(view["outcome"][key], reference[key], "{key} differs:\n{view:#}\n{reference:#}");
        }
        view
    }

    fn ends(&self, job: &str) -> Value {
        poll(&format!("{job} to succeed"), || {
            let view = self.job(job)?;
            assert!(!["failed", "cancelled"].contains(&view["state"].as_str()?), "{view:#}");
            (view["state"] == "succeeded").then_some(view)
        })
    }

    fn job(&self, job: &str) -> Option<Value> {
        self.ask(&["jobs"])?["jobs"].as_array()?.iter().find(|view| view["job"] == job).cloned()
    }

    /// What the user is told; nothing while the coordinator is away.
    fn ask(&self, arguments: &[&str]) -> Option<Value> {
        let ended = self.user(&[arguments, &["--json"]].concat());
        (ended.code() == 0).then(|| ended.json())
    }

    fn user(&self, arguments: &[&str]) -> Ended {
        let command = stoke([arguments, &["--cluster", &self.path("ada")]].concat());
        Background::start(self.network.inside(&DESK, &command)).wait()
    }

    fn admin(&self, arguments: &[&str]) -> Ended {
        let command = stoke([arguments, &["--cluster", &self.path("head")]].concat());
        Background::start(self.network.inside(&HEAD, &command)).wait()
    }

    fn path(&self, name: &str) -> String {
        let path: PathBuf = self.scratch.path().join(name);
        path.to_str().expect("UTF-8").to_owned()
    }
}

#[derive(Debug)]
struct Machine {
    name: &'static str,
    ip: &'static str,
}

impl Machine {
    /// Unique by this process; one test makes them.
    fn namespace(&self) -> String {
        format!("stoke-{}-{}", std::process::id(), self.name)
    }
}

/// The namespaces and what connects them; they end, with every process in them, when this is dropped.
struct Network {
    machines: [&'static Machine; 4],
}

impl Network {
    /// Or what this machine does not let us do.
    fn build() -> Result<Self, String> {
        let network = Self { machines: [&DESK, &HEAD, &NODES[0], &NODES[1]] };
        for machine in network.machines {
            ip(&["netns", "add", &machine.namespace()])?;
            ip(&["netns", "exec", &machine.namespace(), "true"])?;
            ip(&["-n", &machine.namespace(), "link", "set", "lo", "up"])?;
        }
        let desk = DESK.namespace();
        let on_desk = |arguments: &[&str]| ip(&[&["-n", &desk], arguments].concat());
        on_desk(&["link", "add", "name", "bridge0", "type", "bridge"])?;
        on_desk(&["addr", "add", &format!("{}/24", DESK.ip), "dev", "bridge0"])?;
        on_desk(&["link", "set", "bridge0", "up"])?;
        for machine in &network.machines[1..] {
            let namespace = machine.namespace();
            on_desk(&[
                "link",
                "add",
                "name",
                machine.name,
                "type",
                "veth",
                "peer",
                "name",
                "eth0",
                "netns",
                &namespace,
            ])?;
            on_desk(&["link", "set", machine.name, "master", "bridge0", "up"])?;
            ip(&["-n", &namespace, "addr", "add", &format!("{}/24", machine.ip), "dev", "eth0"])?;
            ip(&["-n", &namespace, "link", "set", "eth0", "up"])?;
        }
        Ok(network)
    }

    /// The same command on a machine. `ip` becomes it: the process id is its own.
    fn inside(&self, machine: &Machine, command: &Command) -> Command {
        let mut inside = Command::new("ip");
        inside.args(["netns", "exec", &machine.namespace()]).arg(command.get_program()).args(command.get_args());
        for (name, value) in command.get_envs() {
            match value {
                Some(value) => inside.env(name, value),
                None => inside.env_remove(name),
            };
        }
        if let Some(dir) = command.get_current_dir() {
            inside.current_dir(dir);
        }
        inside.stdin(Stdio::null());
        inside
    }

    /// A process that also ends if this one is killed.
    fn service(&self, machine: &Machine, mut command: Command) -> Command {
        command.args(["--parent", &std::process::id().to_string()]);
        self.inside(machine, &command)
    }

    /// What `from` sends to these is lost on the way, without a word: it goes to a link address that nobody has. The way back stays open.
    fn cut(&self, from: &Machine, to: &[&Machine]) {
        for machine in to {
            let nobody = ["lladdr", "02:00:00:00:de:ad", "nud", "permanent"];
            let namespace = from.namespace();
            let arguments = [&["-n", &namespace, "neigh", "replace", machine.ip, "dev", "eth0"][..], &nobody].concat();
            ip(&arguments).expect("a neighbour");
        }
    }

    fn heal(&self, from: &Machine, to: &[&Machine]) {
        for machine in to {
            ip(&["-n", &from.namespace(), "neigh", "del", machine.ip, "dev", "eth0"]).expect("a neighbour");
        }
    }

    /// Segments.
    fn received_by_tcp(&self, machine: &Machine) -> u64 {
        let shown = ip(&["netns", "exec", &machine.namespace(), "cat", "/proc/net/snmp"]).expect("counters");
        let mut lines = shown.lines().filter_map(|line| line.strip_prefix("Tcp: "));
        let (names, values) = (lines.next().expect("names"), lines.next().expect("values"));
        let mut found = names.split(' ').zip(values.split(' ')).filter(|(name, _)| *name == "InSegs");
        found.next().and_then(|(_, value)| value.parse().ok()).expect("a count")
    }

    fn received_bytes(&self, machine: &Machine) -> u64 {
        let shown = ip(&["-n", &machine.namespace(), "-s", "-j", "link", "show", "dev", "eth0"]).expect("a link");
        let links: Value = serde_json::from_str(&shown).expect("JSON");
        links[0]["stats64"]["rx"]["bytes"].as_u64().expect("a count")
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        for machine in self.machines {
            let namespace = machine.namespace();
            // Ranks outlive a killed agent for a moment.
            let left = ip(&["netns", "pids", &namespace]).unwrap_or_default();
            for pid in left.lines().filter_map(|line| Pid::from_raw(line.trim().parse().ok()?)) {
                let _ = kill_process(pid, Signal::KILL);
            }
            let _ = ip(&["netns", "del", &namespace]);
        }
    }
}

/// Standard output, or why it did not work.
fn ip(arguments: &[&str]) -> Result<String, String> {
    let line = format!("ip {}", arguments.join(" "));
    let output = Command::new("ip").args(arguments).stdin(Stdio::null()).output();
    let output = output.map_err(|error| format!("{line}: {error} (package iproute2)"))?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    Err(format!("{line}: {} (root is needed)", String::from_utf8_lossy(&output.stderr).trim()))
}
