//! The HTTP API: the Python client against a live cluster, who is let in, and the loopback door of `stoke dashboard`.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};

use rustix::process::Signal;
use serde_json::Value;
use tempfile::TempDir;

use crate::harness::{Background, Cluster, process_of, root, signal, spec};

/// A folder's URL of the API.
fn api(credentials: &Path) -> String {
    let text = std::fs::read_to_string(credentials.join("cluster.toml")).expect("credentials");
    let file: toml::Table = text.parse().expect("TOML");
    file["api"].as_str().expect("the cluster has an API").to_owned()
}

fn cluster() -> Cluster {
    Cluster::start_with(tempfile::tempdir().expect("a temporary folder"), 2, &["--api", "127.0.0.1:0"])
}

/// A script of these tests with the client of this repository, and nothing installed.
fn python(script: &str, cluster: &str, arguments: &[&str]) -> Command {
    let mut command = Command::new("python3");
    command.arg(root().join("tests/integration").join(script)).args(arguments);
    command.env("PYTHONPATH", root().join("clients/python/src")).env("STOKE_CLUSTER", cluster);
    command
}

/// `curl` with the certificate in a folder, if there is one: status and body.
fn curl(authority: &Path, identity: Option<&Path>, url: &str, more: &[&str]) -> (u16, Value) {
    let mut command = Command::new("curl");
    command.args(["-s", "-w", "\n%{http_code}", "--max-time", "20", "--cacert"]).arg(authority).args(more);
    if let Some(identity) = identity {
        command.arg("--cert").arg(identity);
    }
    let output = command.arg(url).output().expect("run curl");
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let (body, status) = said.rsplit_once('\n').expect("a status");
    (status.parse().expect("a number"), serde_json::from_str(body).unwrap_or(Value::Null))
}

#[test]
fn python_client_submits_waits_cancels_and_reads_what_the_command_line_says() {
    let cluster = cluster();
    let folder = tempfile::tempdir().expect("a temporary folder");
    let data = root().join("jobs/data/digits.jsonl.gz");
    let short = std::fs::read_to_string(spec("digits.toml")).expect("a spec").replace("epochs = 8", "steps = 30");
    // Relative to the spec, as `stoke submit` takes it.
    std::os::unix::fs::symlink(&data, folder.path().join("digits.jsonl.gz")).expect("a link");
    let short = short.replace("../data/digits.jsonl.gz", "digits.jsonl.gz");
    std::fs::write(folder.path().join("short.toml"), short).expect("written");
    let (spec, data) = (folder.path().join("short.toml"), data.to_str().expect("UTF-8").to_owned());
    let dir = cluster.dir().to_str().expect("UTF-8").to_owned();
    let told =
        Background::start(python("api.py", &dir, &[spec.to_str().expect("UTF-8"), &data])).wait().expect(0).json();
    let job = cluster.job("job-1");
    for key in ["job", "name", "state", "outcome", "checkpoint", "world_sizes", "ended_ms"] {
        assert_eq!(told["job"][key], job[key], "{key}");
    }
    assert_eq!((&job["state"], &job["outcome"]["step"]), (&"succeeded".into(), &30.into()), "{job:#}");
    assert_eq!(told["cluster"]["you"], "user/admin/admin");
    assert_eq!(told["nodes"], serde_json::json!(["node-1", "node-2"]));
    assert_eq!((&told["again"], &told["log_ranks"]), (&true.into(), &serde_json::json!([0, 1])));
    assert_eq!(told["states"].as_array().and_then(|states| states.last()), Some(&"succeeded".into()));
    assert!(told["history"].as_array().is_some_and(|steps| !steps.is_empty()), "{told:#}");
    assert_eq!(told["checkpoints"], cluster.json(&["checkpoint", "list", "job-1"])["checkpoints"]);
    for (key, words) in [
        ("conflict", "key"),
        ("absent", "job-999"),
        ("no_id", "banana"),
        ("bad_spec", "trainr"),
        ("cancelled", "was cancelled"),
    ] {
        assert!(told[key]["message"].as_str().is_some_and(|said| said.contains(words)), "{key}: {told:#}");
    }
    assert_eq!(told["cancelled_again"], "cancelled");
}

#[test]
fn api_lets_in_users_with_their_roles_and_nobody_else() {
    let cluster = cluster();
    let homes = tempfile::tempdir().expect("a temporary folder");
    let viewer = Path::new(&cluster.login(&homes, "viewer").dir).to_owned();
    let url = api(&viewer);
    let (authority, identity) = (viewer.join("ca.pem"), viewer.join("identity.pem"));
    let at = |path: &str| format!("{url}{path}");
    let (status, said) = curl(&authority, Some(&identity), &at("/v1/cluster"), &[]);
    assert_eq!((status, said["you"].as_str()), (200, Some("user/viewer/viewer")), "{said:#}");
    let (status, said) = curl(&authority, Some(&identity), &at("/v1/nodes/node-1/drain"), &["-X", "POST"]);
    assert_eq!((status, said["error"]["code"].as_str()), (403, Some("forbidden")), "{said:#}");
    let (status, said) = curl(&authority, None, &at("/v1/cluster"), &[]);
    assert_eq!((status, said["error"]["code"].as_str()), (401, Some("unauthenticated")), "{said:#}");
    // A node is a member, but no user.
    let node = cluster.dir().join("node-1/identity/identity.pem");
    assert_eq!(curl(&authority, Some(&node), &at("/v1/cluster"), &[]).0, 401);
    // Of another cluster: not even a handshake.
    let other = Cluster::start(1);
    let stranger = other.dir().join("coordinator/admin/identity.pem");
    assert_eq!(curl(&authority, Some(&stranger), &at("/v1/cluster"), &[]).0, 0);
    // What is wrong with a request is said.
    let refused = |path: &str, more: &[&str], status: u16, words: &str| {
        let (found, said) = curl(&authority, Some(&identity), &at(path), more);
        let message = said["error"]["message"].as_str().unwrap_or_default();
        assert!(found == status && message.contains(words), "{path}: {found} {said:#}");
        assert!(said["error"]["mend"].as_str().is_some_and(|mend| !mend.is_empty()), "{said:#}");
    };
    refused("/v1/nothing", &[], 404, "nothing at this path");
    refused("/v1/jobs/job-7", &["-X", "DELETE"], 405, "no such method");
    refused("/v1/jobs/job-7", &[], 404, "job-7");
    refused("/v1/jobs/job-7/watch", &[], 404, "job-7");
    refused("/v1/jobs/job-7/logs?rank=x", &[], 400, "rank");
    refused("/v1/jobs", &["-d", "name = 1"], 400, "Idempotency-Key");
    refused("/v1/jobs", &["-H", "Idempotency-Key: k", "-d", "name = 1"], 400, "spec: line 1");
    refused("/v1/jobs/job-7/scale", &["-d", "{\"ranks\": -1}"], 400, "the body");
    // Every route that the document names is there.
    let (_, document) = curl(&authority, Some(&identity), &at("/v1/openapi.json"), &[]);
    for (path, methods) in document["paths"].as_object().expect("paths") {
        let named = path.replace("{job}", "job-999").replace("{node}", "node-999");
        for method in methods.as_object().expect("methods").keys() {
            let (status, said) = curl(&authority, Some(&identity), &at(&named), &["-X", &method.to_uppercase()]);
            let message = said["error"]["message"].as_str().unwrap_or_default();
            let is_there = status != 405 && !message.contains("nothing at this path");
            assert!(is_there, "{method} {path}: {status} {said:#}");
        }
    }
}

#[test]
fn dashboard_is_on_the_loopback_for_whoever_has_its_key_and_outlasts_a_coordinator() {
    let cluster = cluster();
    let mut command = cluster.command(&["dashboard", "--listen", "127.0.0.1:0", "--json"]);
    let mut process = command.stdout(Stdio::piped()).spawn().expect("it starts");
    let mut line = String::new();
    BufReader::new(process.stdout.take().expect("a pipe")).read_line(&mut line).expect("it speaks");
    let told: Value = serde_json::from_str(&line).expect("JSON");
    let key = told["url"].as_str().and_then(|url| url.split_once("#key=")).expect("a key").1.to_owned();
    let url = format!("http://{}", told["address"].as_str().expect("an address"));
    let none = Path::new("/dev/null");
    let bearer = format!("Authorization: Bearer {key}");
    let ask = |path: &str, more: &[&str]| curl(none, None, &format!("{url}{path}"), more);
    assert_eq!(ask("/", &[]).0, 200);
    assert_eq!(ask("/v1/jobs", &[]).0, 401);
    assert_eq!(ask("/v1/jobs", &["-H", "Authorization: Bearer 00000000000000000000000000000000"]).0, 401);
    let (status, said) = ask("/v1/nodes", &["-H", &bearer]);
    assert_eq!((status, said["nodes"].as_array().map(Vec::len)), (200, Some(2)), "{said:#}");
    // The next question finds the coordinator that comes after.
    signal(process_of(cluster.dir(), "coordinator"), Signal::KILL);
    crate::harness::poll("an answer of the next coordinator", || {
        (ask("/v1/nodes", &["-H", &bearer]).0 == 200).then_some(())
    });
    let process = Background::of(process);
    signal(process.pid(), Signal::TERM);
    process.wait().expect(0);
    let refused = cluster.run(&["dashboard", "--listen", "0.0.0.0:0"]);
    refused.expect(2).says(&["not on the loopback", "--api"]);
}

#[test]
fn python_client_waits_through_a_coordinator_that_is_killed() {
    let cluster = cluster();
    let job = cluster.submit(400, &[]);
    let folder: TempDir = tempfile::tempdir().expect("a temporary folder");
    let script = folder.path().join("wait.py");
    std::fs::write(
        &script,
        "import sys\nfrom stoke import Client\nprint(Client().wait(sys.argv[1], timeout=150).step)\n",
    )
    .expect("written");
    let waiting =
        Background::start(python(script.to_str().expect("UTF-8"), cluster.dir().to_str().expect("UTF-8"), &[&job]));
    crate::harness::poll("some steps", || cluster.job(&job)["progress"]["step"].as_u64().filter(|step| *step > 20));
    signal(process_of(cluster.dir(), "coordinator"), Signal::KILL);
    assert_eq!(waiting.wait().expect(0).stdout.trim(), "400");
}
