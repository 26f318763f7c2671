//! Prometheus and Alertmanager themselves watch a cluster that trains, plays and serves: every panel of every dashboard has data, every rule is right, and a
//! node that falls silent becomes an alert, as every other fault that an alert is for.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::net::TcpListener;
use std::path::Path;
use std::process::Command;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::bad_disk::Tmpfs;
use crate::harness::{Background, Cluster, poll, process_of, python_with, root, run_with_input, signal, spec, text};
use crate::health::{Brake, workers};
use crate::serving::RUNTIME;

/// Whether Debian's programs are there; said, where they are not.
fn are_installed(programs: &[&str]) -> bool {
    let missing = programs.iter().find(|program| Command::new(program).arg("--version").output().is_err());
    if let Some(program) = missing {
        use std::io::Write;
        writeln!(std::io::stderr(), "not watched by Prometheus: {program} is not installed").expect("stderr");
    }
    missing.is_none()
}

fn port() -> u16 {
    TcpListener::bind("127.0.0.1:0").and_then(|free| free.local_addr()).expect("a free port").port()
}

fn get(url: &str, query: &[(&str, &str)]) -> Option<Value> {
    let mut command = Command::new("curl");
    command.args(["-s", "-G", "--max-time", "10"]);
    for (key, value) in query {
        command.args(["--data-urlencode", &format!("{key}={value}")]);
    }
    serde_json::from_slice(&command.arg(url).output().ok()?.stdout).ok()
}

/// A process that may have ended meanwhile.
fn kill(pid: u32) {
    let _ = Pid::from_raw(pid.cast_signed()).map(|pid| kill_process(pid, Signal::KILL));
}

/// Names of all alerts.
fn alerts() -> BTreeSet<String> {
    let rules = std::fs::read_to_string(root().join("monitoring/alerts.yml")).expect("rules");
    rules.lines().filter_map(|line| Some(line.trim().strip_prefix("- alert: ")?.to_owned())).collect()
}

#[test]
fn rules_and_dashboards_are_right_and_every_alert_has_a_test() {
    let folder = root().join("monitoring");
    let generated = Command::new("python3").args(["grafana/generate.py", "--check"]).current_dir(&folder).output();
    let generated = generated.expect("run python3");
    assert!(generated.status.success(), "{}", String::from_utf8_lossy(&generated.stderr));
    let tests = std::fs::read_to_string(folder.join("alerts_test.yml")).expect("tests of rules");
    for alert in alerts() {
        for name in [format!("- name: {alert} fires\n"), format!("- name: {alert} does not\n")] {
            assert!(tests.contains(&name), "there is no test {name}");
        }
    }
    if !are_installed(&["promtool"]) {
        return;
    }
    for arguments in
        [["check", "rules", "alerts.yml"], ["test", "rules", "alerts_test.yml"], ["check", "config", "prometheus.yml"]]
    {
        let checked = Command::new("promtool").args(arguments).current_dir(&folder).output().expect("run promtool");
        assert!(checked.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&checked.stderr));
    }
}

/// Prometheus, and where its alerts go.
struct Watch {
    prometheus: String,
    alertmanager: String,
    /// Alerts that have not fired yet.
    left: RefCell<BTreeSet<String>>,
    _processes: [Background; 2],
}

/// Thresholds and windows of rules, and what they are in a test that does not wait for an hour: the faults are real, and so is everything else of the rules.
const SHORTENED: [(&str, &str); 6] = [
    ("_moved_timestamp_seconds > 900", "_moved_timestamp_seconds > 4"),
    ("_submitted_timestamp_seconds > 7200", "_submitted_timestamp_seconds > 4"),
    ("_checkpoint_timestamp_seconds > 3600", "_checkpoint_timestamp_seconds > 1"),
    ("[1h] offset 10m", "[1m] offset 5s"),
    ("environment_failures_total[10m]) > 50", "environment_failures_total[10m]) > 1"),
    // The coordinator's lives for a month.
    ("time() < 3 * 86400", "time() < 40 * 86400"),
];

impl Watch {
    fn start(folder: &Path, coordinator: &str, gateway: &str) -> Self {
        let [prometheus, alertmanager] = [port(), port()].map(|port| format!("127.0.0.1:{port}"));
        let rules = std::fs::read_to_string(root().join("monitoring/alerts.yml")).expect("rules");
        // An alert that waits for minutes would hold up the test, not change it.
        let rules: Vec<String> = rules
            .lines()
            .map(|line| match line.trim_start().starts_with("for: ") {
                true => "        for: 1s".to_owned(),
                false => SHORTENED.iter().fold(line.to_owned(), |line, (long, short)| line.replace(long, short)),
            })
            .collect();
        let config = std::fs::read_to_string(root().join("monitoring/prometheus.yml")).expect("a configuration");
        let config = config.replace("127.0.0.1:9090", coordinator).replace("127.0.0.1:8400", gateway);
        let config = config.replace("127.0.0.1:9093", &alertmanager).replace("5s", "1s");
        let route = "route: { receiver: nobody, group_wait: 1s }\nreceivers: [{ name: nobody }]\n";
        for (name, text) in
            [("alerts.yml", rules.join("\n")), ("prometheus.yml", config), ("alertmanager.yml", route.into())]
        {
            std::fs::write(folder.join(name), text).expect("written");
        }
        let mut watching = Command::new("prometheus");
        watching
            .args(["--config.file=prometheus.yml", "--storage.tsdb.path=tsdb"])
            .arg(format!("--web.listen-address={prometheus}"));
        let mut telling = Command::new("prometheus-alertmanager");
        telling.args(["--config.file=alertmanager.yml", "--storage.path=alerts", "--cluster.listen-address="]);
        telling.arg(format!("--web.listen-address={alertmanager}"));
        let processes = [watching, telling].map(|mut command| {
            command.current_dir(folder);
            Background::start(command)
        });
        Self {
            prometheus: format!("http://{prometheus}"),
            alertmanager: format!("http://{alertmanager}"),
            left: RefCell::new(alerts()),
            _processes: processes,
        }
    }

    /// Waits until an alert is at Alertmanager.
    #[track_caller]
    fn fires(&self, alert: &str) {
        assert!(alerts().contains(alert), "there is no alert {alert}");
        poll(&format!("{alert} at Alertmanager"), || {
            let alerts = get(&format!("{}/api/v2/alerts", self.alertmanager), &[])?;
            alerts.as_array()?.iter().any(|told| told["labels"]["alertname"] == alert).then_some(())
        });
        self.left.borrow_mut().remove(alert);
    }

    /// What its fault needs is not on this machine.
    fn passes_over(&self, alert: &str) {
        self.left.borrow_mut().remove(alert);
    }

    /// How many series an expression has now.
    fn series(&self, expression: &str) -> Option<usize> {
        let answer = get(&format!("{}/api/v1/query", self.prometheus), &[("query", expression)])?;
        assert_eq!(answer["status"], "success", "{expression}: {answer}");
        Some(answer["data"]["result"].as_array()?.len())
    }
}

#[test]
fn every_panel_has_data_while_a_cluster_works_and_a_silent_node_is_an_alert() {
    if !are_installed(&["prometheus", "prometheus-alertmanager"]) {
        return;
    }
    let parent = tempfile::tempdir().expect("a temporary folder");
    let cluster = Cluster::start_with(parent, 4, &["--metrics", "127.0.0.1:0"]);
    let coordinator = cluster.state()["metrics"].as_str().expect("metrics").to_owned();
    let served = cluster.serve("m", &["resources.labels={}"]);
    let gateway = served.gateways[0].trim_start_matches("http://").to_owned();
    cluster.submit(1_000_000, &["--ranks", "1", "--set", "checkpoint.every=20"]);
    // One that plays elsewhere, and is behind: panels for that have data too.
    let sets = ["--set", "rl.total_steps=1000000000", "--set", "rl.algorithm=impala", "--set", "resources.rollouts=1"];
    let learning = spec("ppo-cartpole.toml");
    cluster.json(&[&["submit", learning.to_str().expect("UTF-8"), "--ranks", "1"][..], &sets].concat());
    let folder = tempfile::tempdir().expect("a temporary folder");
    let watch = Watch::start(folder.path(), &coordinator, &gateway);
    poll("a first scrape", || watch.series("stoke_job_step").filter(|series| *series > 0));
    let mut panels = Vec::new();
    for file in std::fs::read_dir(root().join("monitoring/grafana")).expect("dashboards").flatten() {
        let Some(text) = std::fs::read_to_string(file.path())
            .ok()
            .filter(|_| file.path().extension().is_some_and(|kind| kind == "json"))
        else {
            continue;
        };
        let dashboard: Value = serde_json::from_str(&text).expect("JSON");
        for panel in dashboard["panels"].as_array().expect("panels") {
            let title = format!("{}: {}", dashboard["title"], panel["title"]);
            let targets = panel["targets"].as_array().expect("targets");
            panels.extend(
                targets
                    .iter()
                    .map(|target| (title.clone(), target["expr"].as_str().expect("an expression").to_owned())),
            );
        }
    }
    assert!(panels.len() > 30, "{}", panels.len());
    for (title, expression) in panels {
        poll(&format!("data of {title}: {expression}"), || {
            // Rates of what is answered need answers.
            served.chats(2, 4, |_| {});
            watch.series(&expression).filter(|series| *series > 0)
        });
    }
    // A node whose agent is stopped says nothing; its name comes with the alert.
    let agent = process_of(cluster.dir(), "node-4");
    signal(agent, Signal::STOP);
    poll("an alert at Alertmanager", || {
        let alerts = get(&format!("{}/api/v2/alerts", watch.alertmanager), &[])?;
        let named =
            |alert: &Value| alert["labels"]["alertname"] == "StokeNodeDown" && alert["labels"]["name"] == "node-4";
        alerts.as_array()?.iter().any(named).then_some(())
    });
    signal(agent, Signal::CONT);
}

/// Breaks down at every fortieth step that it does for the first time, and takes it when it is asked again.
const BRITTLE: &str = "
import os, gymnasium, numpy

class Brittle(gymnasium.Env):
    observation_space = gymnasium.spaces.Box(0, 1, (1,), numpy.float32)
    action_space = gymnasium.spaces.Discrete(2)

    def __init__(self, marks):
        self.marks = marks

    def reset(self, seed=None, options=None):
        self.steps = 0
        return numpy.zeros(1, numpy.float32), {}

    def step(self, action):
        self.steps += 1
        mark = os.path.join(self.marks, str(self.steps))
        if self.steps % 40 == 0 and not os.path.exists(mark):
            open(mark, 'x').close()
            raise RuntimeError('brittle')
        return numpy.zeros(1, numpy.float32), 1.0, False, False, {}

gymnasium.register('Brittle-v0', Brittle, max_episode_steps=400)
";

#[test]
fn every_alert_fires_when_its_fault_is_there() {
    if !are_installed(&["prometheus", "prometheus-alertmanager"]) {
        return;
    }
    let parent = tempfile::tempdir().expect("a temporary folder");
    // Smaller than what the alert asks for; without root the disk is the machine's, and that alert alone is not tried.
    let disk = Tmpfs::mount(&parent.path().join("cluster/coordinator"), "256m");
    let marks = tempfile::tempdir().expect("a temporary folder");
    // Nobody takes traces there.
    let cluster = Cluster::start_with(parent, 3, &["--metrics", "127.0.0.1:0", "--otlp", "http://127.0.0.1:1"]);
    let coordinator = cluster.state()["metrics"].as_str().expect("metrics").to_owned();
    let folder = tempfile::tempdir().expect("a temporary folder");
    let watch = Watch::start(folder.path(), &coordinator, "127.0.0.1:1");
    poll("a first scrape", || watch.series("stoke_nodes").filter(|series| *series > 0));
    match &disk {
        Some(_) => watch.fires("StokeJournalDiskLow"),
        None => watch.passes_over("StokeJournalDiskLow"),
    }
    let waiting = cluster.submit(10, &["--set", "resources.labels={nobody = \"has\"}"]);
    let address = cluster.address();
    let home = folder.path().join("nobody").to_str().expect("UTF-8").to_owned();
    let token = cluster.token("viewer");
    run_with_input(["--cluster", &home, "login", "--join", "-", "--name", "a", "--coordinator", &address], &token)
        .expect(0);
    for number in 0..24 {
        let home = format!("{home}-{number}");
        run_with_input(["--cluster", &home, "login", "--join", "-", "--name", "a", "--coordinator", &address], &token)
            .expect(4);
    }
    watch.fires("StokeJoinsRefused");
    watch.fires("StokeCertificateExpires");
    watch.fires("StokeJobWaits");
    cluster.run(&["cancel", &waiting]).expect(0);
    watch.fires("StokeTraceSpansLost");
    ranks_that_are_slow_wrong_and_stuck(&cluster, &watch);
    match python_with("gymnasium-1.4.0-numpy-2.4.6", &["gymnasium==1.4.0", "numpy==2.4.6"], "gymnasium, numpy") {
        Some(python) => {
            std::fs::write(marks.path().join("brittle.py"), BRITTLE).expect("written");
            let learning = spec("ppo-cartpole.toml");
            let sets = [
                "rl.environment=brittle:Brittle-v0".to_owned(),
                format!("rl.folders=[{:?}]", marks.path()),
                format!("rl.python={}", python.display()),
                format!("rl.options={{marks = {:?}}}", marks.path()),
                "train.lanes=1".to_owned(),
                "rl.total_steps=1000000".to_owned(),
            ];
            let sets = sets.iter().flat_map(|set| ["--set", set]);
            let submit: Vec<&str> =
                ["submit", learning.to_str().expect("UTF-8"), "--ranks", "1"].into_iter().chain(sets).collect();
            let job = text(&cluster.json(&submit)["job"]);
            watch.fires("StokeEnvironmentsFail");
            cluster.run(&["cancel", &job]).expect(0);
        }
        None => watch.passes_over("StokeEnvironmentsFail"),
    }
    let served = cluster.serve("m", &["serve.stages=1", "serve.running=1", "serve.waiting=1"]);
    let ask = |number: usize, prompt: String| {
        let url = served.url(number, "/v1/completions");
        let body = format!("{{\"model\":\"m\",\"prompt\":\"{prompt}\",\"max_tokens\":24}}");
        RUNTIME.spawn(async move {
            let sent = crate::serving::client().post(url).header("content-type", "application/json").body(body);
            sent.send().await.map(|response| response.status().as_u16()).unwrap_or_default()
        })
    };
    let crowd = |count| -> Vec<u16> {
        let asked: Vec<_> = (0..count).map(|number| ask(number, number.to_string())).collect();
        asked.into_iter().map(|asked| RUNTIME.block_on(asked).expect("an answer")).collect()
    };
    poll("refusals are counted", || {
        crowd(8);
        watch.series("stoke:model_refused_ratio1h > 0.0144").filter(|series| *series > 0)
    });
    watch.fires("StokeModelRefuses");
    let ranks = workers(&cluster, 3);
    let mut asked = 0;
    poll("first tokens that come late", || {
        asked += 1;
        // Long, so that its ranks stop while they read it.
        let asked = ask(0, format!("{asked} ").repeat(400));
        std::thread::sleep(std::time::Duration::from_millis(200));
        ranks.iter().for_each(|rank| signal(*rank, Signal::STOP));
        std::thread::sleep(std::time::Duration::from_secs(3));
        ranks.iter().for_each(|rank| signal(*rank, Signal::CONT));
        RUNTIME.block_on(asked).expect("an answer");
        watch.series("stoke:model_first_token_seconds_p99 > 2").filter(|series| *series > 0)
    });
    watch.fires("StokeModelSlow");
    // Its ranks die as soon as they are there.
    poll("a model that does not answer", || {
        workers(&cluster, 3).into_iter().for_each(kill);
        watch.series("ALERTS{alertname=\"StokeModelUnanswered\", alertstate=\"firing\"}").filter(|series| *series > 0)
    });
    watch.fires("StokeModelUnanswered");
    let agent = process_of(cluster.dir(), "node-3");
    signal(agent, Signal::STOP);
    watch.fires("StokeNodeDown");
    signal(agent, Signal::CONT);
    let head = process_of(cluster.dir(), "coordinator");
    signal(head, Signal::STOP);
    watch.fires("StokeCoordinatorDown");
    signal(head, Signal::CONT);
    assert!(watch.left.borrow().is_empty(), "no fault is here for {:?}", watch.left);
}

/// Three ranks of one job.
fn ranks_that_are_slow_wrong_and_stuck(cluster: &Cluster, watch: &Watch) {
    let spec = spec("domains.toml");
    let sets = ["--set", "train.steps=1000000", "--set", "checkpoint.every=200"];
    let submit = [&["submit", spec.to_str().expect("UTF-8"), "--ranks", "3"][..], &sets].concat();
    let job = text(&cluster.json(&submit)["job"]);
    watch.fires("StokeCheckpointOld");
    // What its steps are compared with.
    poll("steps of half a minute", || {
        let steps = "count_over_time(stoke:job_step_seconds[1m]) > 30";
        watch.series(steps).filter(|series| *series > 0)
    });
    let brake = Brake::on(workers(cluster, 3)[1], 240);
    // First: when the whole minute was slow, this one is over.
    watch.fires("StokeStepSlow");
    watch.fires("StokeRanksSlow");
    drop(brake);
    cluster.run(&["chaos", "corrupt-rank at 1s", "--for", "3s", "--seed", "3"]).expect(0);
    watch.fires("StokeWrongNumbers");
    let ranks = workers(cluster, 3);
    ranks.iter().for_each(|rank| signal(*rank, Signal::STOP));
    watch.fires("StokeJobStuck");
    // Those that hung are replaced, and may be gone.
    let still = workers(cluster, 3);
    ranks.iter().filter(|rank| still.contains(rank)).for_each(|rank| signal(*rank, Signal::CONT));
    cluster.run(&["cancel", &job]).expect(0);
}
