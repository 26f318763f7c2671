//! A collector that reads OpenTelemetry's own messages gets the trace of a job: what it waited for, its ranks, its checkpoints and the times of its steps.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Command, Stdio};

use rustix::process::Signal;
use serde_json::Value;
use tempfile::TempDir;

use crate::harness::{Background, Cluster, poll, python_with, root, run, signal, text};
use crate::health::workers;

struct Collector {
    process: Background,
    url: String,
    spans: PathBuf,
    _folder: TempDir,
}

impl Collector {
    /// None, and said, where the package cannot be installed.
    fn start() -> Option<Self> {
        let python =
            python_with("otlp-1.45.2", &["opentelemetry-proto==1.45.2"], "opentelemetry.proto.trace.v1.trace_pb2")?;
        let folder = tempfile::tempdir().expect("a temporary folder");
        let spans = folder.path().join("spans");
        let mut command = Command::new(python);
        command.arg(root().join("tests/integration/otlp.py")).arg(&spans);
        let mut child = command.stdout(Stdio::piped()).spawn().expect("a collector");
        let mut port = String::new();
        BufReader::new(child.stdout.take().expect("its output")).read_line(&mut port).expect("its port");
        let url = format!("http://127.0.0.1:{}", port.trim());
        Some(Self { process: Background::of(child), url, spans, _folder: folder })
    }

    /// What has come of a job, when its trace is whole.
    fn trace(&self, job: &str) -> Vec<Value> {
        let root = poll("the job's root span", || {
            self.spans().into_iter().find(|span| span["name"] == "job" && span["attributes"]["stoke.job.id"] == job)
        });
        self.spans().into_iter().filter(|span| span["trace"] == root["trace"]).collect()
    }

    fn spans(&self) -> Vec<Value> {
        let lines = std::fs::read_to_string(&self.spans).unwrap_or_default();
        // The last line may be half written.
        lines.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
    }
}

fn named<'a>(spans: &'a [Value], name: &str) -> Vec<&'a Value> {
    spans.iter().filter(|span| span["name"] == name).collect()
}

fn nanos(span: &Value) -> (u64, u64) {
    (span["from"].as_u64().expect("nanoseconds"), span["until"].as_u64().expect("nanoseconds"))
}

#[test]
fn a_job_is_a_trace_of_what_it_waited_for_and_where_its_steps_spent_their_time() {
    let Some(collector) = Collector::start() else { return };
    let cluster = Cluster::start_with(tempfile::tempdir().expect("a temporary folder"), 2, &["--otlp", &collector.url]);
    let job = cluster.submit(400, &["--ranks", "2", "--set", "checkpoint.every=100"]);
    poll("the job trains", || cluster.job(&job)["progress"]["step"].as_u64().filter(|step| *step > 40));
    signal(workers(&cluster, 2)[1], Signal::KILL);
    cluster.wait_for_state(&job, "succeeded");

    let spans = collector.trace(&job);
    let whole = named(&spans, "job");
    let [whole] = whole[..] else { panic!("{whole:#?}") };
    assert_eq!((&whole["status"], &whole["parent"]), (&"STATUS_CODE_OK".into(), &"".into()), "{whole:#?}");
    assert_eq!(whole["attributes"]["stoke.job.state"], "succeeded");
    assert_eq!(whole["resource"]["service.name"], "stoke");
    let ids: BTreeSet<&str> = spans.iter().filter_map(|span| span["id"].as_str()).collect();
    assert_eq!(ids.len(), spans.len(), "every span has an id of its own");
    for span in &spans {
        let (from, until) = nanos(span);
        assert!(from <= until, "{span:#?}");
        assert!(span == whole || ids.contains(span["parent"].as_str().expect("a parent")), "{span:#?}");
    }

    // What it went through follows each other, from the submission to the end.
    let went: Vec<&Value> = spans
        .iter()
        .filter(|span| ["queued", "starting", "running", "recovering"].contains(&span["name"].as_str().unwrap_or("")))
        .collect();
    assert_eq!(nanos(went[0]).0, nanos(whole).0);
    assert!(went.windows(2).all(|pair| nanos(pair[0]).1 == nanos(pair[1]).0), "{went:#?}");
    assert_eq!(nanos(went[went.len() - 1]).1, nanos(whole).1);
    let submit = named(&spans, "submit");
    assert_eq!((submit.len(), &submit[0]["kind"]), (1, &"SPAN_KIND_SERVER".into()));
    assert!(named(&spans, "rank start").len() >= 3, "two, and the one in the place of the killed one");
    let checkpoints: BTreeSet<u64> =
        named(&spans, "checkpoint").iter().filter_map(|span| span["attributes"]["stoke.step"].as_u64()).collect();
    assert!(checkpoints.is_superset(&[100, 200, 300].into()), "{checkpoints:?}");

    // Both ranks tell the same steps of the first generation, and where their time went.
    let generations = named(&spans, "generation");
    assert!(generations.len() >= 2, "{generations:#?}");
    let lost = |generation: &&&Value| generation["status"] == "STATUS_CODE_ERROR";
    let why = generations.iter().filter(lost).map(|generation| text(&generation["message"])).collect::<Vec<_>>();
    assert!(why.len() == 1 && why[0].contains("was killed by signal 9"), "{generations:#?}");
    assert!(spans.iter().all(|span| span["attributes"]["stoke.job.id"] == job), "every span names its job");
    let mut told: BTreeMap<(u64, u64), BTreeSet<u64>> = BTreeMap::new();
    for step in named(&spans, "step") {
        let number = |name: &str| step["attributes"][name].as_u64().expect("a number");
        told.entry((number("stoke.generation"), number("stoke.rank"))).or_default().insert(number("stoke.step"));
        let generation =
            generations.iter().find(|generation| generation["id"] == step["parent"]).expect("its generation");
        assert_eq!(generation["attributes"]["stoke.generation"], number("stoke.generation"));
        let mut parts: Vec<&Value> = spans.iter().filter(|span| span["parent"] == step["id"]).collect();
        parts.sort_by_key(|part| nanos(part));
        let names: BTreeSet<&str> = parts.iter().filter_map(|part| part["name"].as_str()).collect();
        assert_eq!(names, ["apply", "compute", "exchange"].into(), "{step:#?}");
        assert_eq!((nanos(parts[0]).0, nanos(parts[2]).1), nanos(step), "{parts:#?}");
    }
    let first: BTreeSet<u64> = (1..=32).collect();
    for rank in [0, 1] {
        let steps = &told[&(1, rank)];
        assert!(steps.is_superset(&first), "rank {rank}: {steps:?}");
        let bits = |step: &u64| u64::BITS - step.leading_zeros() - step.trailing_zeros();
        assert!(steps.iter().all(|step| bits(step) <= 5), "{steps:?}");
    }

    // A job that fails says why.
    let folder = tempfile::tempdir().expect("a temporary folder");
    let fails = folder.path().join("fails.toml");
    let lines = "name = \"fails\"\n[exec]\ncommand = [\"false\"]\nfail_on = [1]\n[resources]\nranks = 1\ncpus = 1\nmemory = \"64MiB\"\n";
    std::fs::write(&fails, lines).expect("a spec");
    let wrong = text(&cluster.json(&["submit", fails.to_str().expect("UTF-8")])["job"]);
    cluster.wait_for_state(&wrong, "failed");
    let spans = collector.trace(&wrong);
    let whole = named(&spans, "job")[0];
    assert_eq!(whole["status"], "STATUS_CODE_ERROR", "{whole:#?}");
    assert!(text(&whole["message"]).contains("1"), "{whole:#?}");
}

#[test]
fn a_collector_that_is_away_costs_its_spans_and_nothing_else() {
    let Some(collector) = Collector::start() else { return };
    let parent = tempfile::tempdir().expect("a temporary folder");
    let cluster = Cluster::start_with(parent, 1, &["--otlp", &collector.url, "--metrics", "127.0.0.1:0"]);
    drop(collector.process);
    let job = cluster.submit(30, &[]);
    cluster.wait_for_state(&job, "succeeded");
    let metrics = format!("http://{}/metrics", text(&cluster.state()["metrics"]));
    poll("the spans are counted", || {
        let told = Command::new("curl").args(["-s", &metrics]).output().expect("curl").stdout;
        let told = String::from_utf8_lossy(&told).into_owned();
        let count = told.lines().find_map(|line| line.strip_prefix("stoke_trace_spans_total{result=\"failed\"} "))?;
        count.parse::<u64>().ok().filter(|lost| *lost >= 5)
    });
    let folder = tempfile::tempdir().expect("a temporary folder");
    let dir = folder.path().to_str().expect("UTF-8");
    let ended = run(["coordinator", "--dir", dir, "--listen", "127.0.0.1:0", "--otlp", "tempo:4317"]).expect(1);
    ended.says(&["send traces (otlp)", "\"tempo:4317\"", "http://127.0.0.1:4318"]);
}
