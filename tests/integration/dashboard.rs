//! The dashboard in a browser: Chromium without a screen starts a job by keyboard, sees its curve grow, a node being lost and a coordinator that is away, reads logs and cancels;
//! every page is looked at by axe in light and dark. Pictures are left in `target/dashboard`.

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use rustix::process::Signal;
use serde_json::Value;

use crate::harness::{Background, Cluster, poll, process_of, root, signal, spec};

/// Of npm, as they were tested.
const PACKAGES: [&str; 2] = ["playwright-core@1.65.1", "axe-core@4.14.1"];

/// Where the packages are, made once below the user's cache. None, and said why, where there is no browser or they cannot be had.
fn browser() -> Option<PathBuf> {
    let folder = std::env::home_dir()?.join(".cache/stoke-tests/browser-1");
    let has = |program: &str| Command::new(program).arg("--version").output().is_ok_and(|said| said.status.success());
    let why = if !has("chromium") {
        "chromium is not installed".to_owned()
    } else if PACKAGES.iter().all(|package| folder.join("node_modules").join(name(package)).is_dir()) {
        return Some(folder);
    } else {
        std::fs::create_dir_all(&folder).expect("a folder");
        let mut install = Command::new("npm");
        install.args(["install", "--no-audit", "--no-fund", "--no-save"]).args(PACKAGES).current_dir(&folder);
        match install.output() {
            Ok(output) if output.status.success() => return Some(folder),
            Ok(output) => String::from_utf8_lossy(&output.stderr).into_owned(),
            Err(error) => error.to_string(),
        }
    };
    // Past the capture of the test runner: nobody should take this for a test that was done.
    writeln!(std::io::stderr(), "not tested in a browser: {why}").expect("stderr");
    None
}

fn name(package: &str) -> &str {
    package.split_once('@').map_or(package, |(name, _)| name)
}

/// Goes on with a process that was stopped, however the test ends.
struct Stopped(u32);

impl Drop for Stopped {
    fn drop(&mut self) {
        let pid = rustix::process::Pid::from_raw(self.0.cast_signed());
        let _gone = pid.map(|pid| rustix::process::kill_process(pid, Signal::CONT));
    }
}

#[test]
fn a_job_is_started_watched_and_cancelled_in_a_browser_by_keyboard() {
    let Some(packages) = browser() else { return };
    let cluster = Cluster::start(3);
    let mut serving = cluster.command(&["dashboard", "--listen", "127.0.0.1:0", "--json"]);
    let mut serving = serving.stdout(Stdio::piped()).spawn().expect("it starts");
    let mut line = String::new();
    BufReader::new(serving.stdout.take().expect("a pipe")).read_line(&mut line).expect("it speaks");
    let _serving = Background::of(serving);
    let told: Value = serde_json::from_str(&line).expect("JSON");
    let pictures = root().join("target/dashboard");
    std::fs::create_dir_all(&pictures).expect("a folder");
    let [node, coordinator] = ["node-3", "coordinator"].map(|name| Stopped(process_of(cluster.dir(), name)));
    let mut command = Command::new("node");
    command
        .arg(root().join("tests/integration/dashboard.mjs"))
        .env("STOKE_URL", told["url"].as_str().expect("a URL"))
        .env("STOKE_PACKAGES", packages)
        .env("STOKE_PICTURES", &pictures)
        .env("STOKE_SPEC", long_spec())
        .env("STOKE_NODE", node.0.to_string())
        .env("STOKE_COORDINATOR", coordinator.0.to_string());
    let ended = Background::start(command).wait().expect(0);
    assert!(ended.stdout.trim_end().ends_with("done"), "{ended:#?}");
    let job = cluster.job("job-1");
    assert_eq!((&job["state"], &job["owner"]), (&"cancelled".into(), &"admin".into()), "{job:#}");
    for picture in ["overview-dark.png", "job-light.png"] {
        let bytes = std::fs::metadata(pictures.join(picture)).expect("a picture").len();
        assert!((5_000..400_000).contains(&bytes), "{picture}: {bytes}");
    }
    signal(coordinator.0, Signal::CONT);
}

/// The digits, for as long as somebody looks, with a rank a node and paths that nodes see.
fn long_spec() -> String {
    let text = std::fs::read_to_string(spec("digits.toml")).expect("a spec");
    let data = root().join("jobs/data/digits.jsonl.gz");
    let data = Path::new(&data).to_str().expect("UTF-8").to_owned();
    text.replace("../data/digits.jsonl.gz", &data)
        .replace("epochs = 8", "steps = 1_000_000")
        .replace("cpus = 1", "ranks = 3\ncpus = 1")
}

#[test]
fn top_prints_one_picture_as_text_and_takes_keys_on_a_terminal() {
    let cluster = Cluster::start(2);
    let job = cluster.submit(1_000_000, &["--ranks", "2"]);
    poll("a picture with a curve", || {
        let said = cluster.run(&["top", "--once"]).expect(0).stdout;
        let all =
            ["node-1", "node-2", job.as_str(), "running", "1 job running", "/1000000", "loss ", "submitted by admin"];
        let curve = |line: &str| line.contains(job.as_str()) && line.contains(['▁', '█']);
        (all.iter().all(|words| said.contains(words)) && said.lines().any(curve)).then_some(())
    });
    let told = cluster.json(&["top"]);
    assert_eq!(told["cluster"]["nodes_up"], 2);
    assert_eq!(told["jobs"][0]["job"], job.as_str());
    cluster.run(&["top"]).expect(2).says(&["no terminal", "--once"]);
    let mut command = Command::new("python3");
    command.arg(root().join("tests/integration/top.py")).arg(crate::harness::binary()).arg(cluster.dir()).arg(&job);
    Background::start(command).wait().expect(0);
}
