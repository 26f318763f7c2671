//! Prometheus and Alertmanager themselves watch a cluster that trains, plays and serves: every panel of every dashboard has data, every rule is right, and a
//! node that falls silent becomes an alert.

use std::collections::BTreeSet;
use std::net::TcpListener;
use std::path::Path;
use std::process::Command;

use rustix::process::Signal;
use serde_json::Value;

use crate::harness::{Background, Cluster, poll, process_of, root, signal, spec};

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
    _processes: [Background; 2],
}

impl Watch {
    fn start(folder: &Path, coordinator: &str, gateway: &str) -> Self {
        let [prometheus, alertmanager] = [port(), port()].map(|port| format!("127.0.0.1:{port}"));
        let rules = std::fs::read_to_string(root().join("monitoring/alerts.yml")).expect("rules");
        // An alert that waits for minutes would hold up the test, not change it.
        let rules: Vec<String> = rules
            .lines()
            .map(|line| match line.trim_start().starts_with("for: ") {
                true => "        for: 1s".to_owned(),
                false => line.to_owned(),
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
            _processes: processes,
        }
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
    let learning = spec("ppo-cartpole.toml");
    cluster.json(&["submit", learning.to_str().expect("UTF-8"), "--ranks", "1", "--set", "rl.total_steps=1000000000"]);
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
