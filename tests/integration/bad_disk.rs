//! Disks that are full, folders and ports that are taken.
//!
//! A full disk needs a file system of a known size: tmpfs, which needs root. Without root these tests say so and pass: CI has root.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use crate::harness::{Cluster, Run, poll, run};

/// A small file system that is gone when this is dropped.
pub struct Tmpfs(PathBuf);

impl Tmpfs {
    /// None without the right to mount.
    pub fn mount(at: &Path, size: &str) -> Option<Self> {
        std::fs::create_dir_all(at).expect("a folder");
        let options = format!("size={size},mode=0700");
        let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", &options, "tmpfs"]).arg(at).status();
        if mounted.is_ok_and(|status| status.success()) {
            return Some(Self(at.to_owned()));
        }
        eprintln!("not checked: mounting a tmpfs needs root");
        None
    }

    /// Takes every byte that is left.
    fn fill(&self) -> PathBuf {
        let path = self.0.join("filler");
        let mut file = File::create(&path).expect("a file");
        for size in [1 << 20, 4096, 1] {
            let block = vec![0; size];
            while file.write_all(&block).is_ok() {}
        }
        path
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

#[test]
fn a_full_disk_under_the_journal_refuses_changes_and_nothing_else() {
    let parent = tempfile::tempdir().expect("a temporary folder");
    let Some(disk) = Tmpfs::mount(&parent.path().join("cluster/coordinator"), "48m") else { return };
    let cluster = Cluster::start_in(parent, 1);
    let running = cluster.submit(1_000_000, &[]);
    cluster.wait_for_state(&running, "running");
    let filler = disk.fill();
    // The journal's file has room inside: large specs use it up. They ask for what no node has, and only wait.
    let refused = poll("a refusal", || {
        let ended = cluster.run(&large_submission());
        (ended.code() != 0).then_some(ended)
    });
    let refused = refused.expect(5).says(&["full"]);
    assert_eq!(refused.json()["error"]["code"], "unavailable");
    // What runs goes on, and people see it.
    assert_eq!(cluster.job(&running)["state"], "running");
    std::fs::remove_file(filler).expect("the filler is there");
    poll("submissions", || (cluster.run(&large_submission()).code() == 0).then_some(()));
    cluster.run(&["cancel", &running]).expect(0);
    cluster.wait_for_state(&running, "cancelled");
    drop(cluster);
}

/// A submission of a long spec: all the labels there may be.
fn large_submission() -> Vec<&'static str> {
    static LABEL: OnceLock<String> = OnceLock::new();
    static SPEC: OnceLock<String> = OnceLock::new();
    let pads = || (0..64).map(|pad| format!("pad{pad}=\"{}\"", "x".repeat(255))).collect::<Vec<_>>().join(", ");
    let label = LABEL.get_or_init(|| format!("resources.labels={{{}}}", pads()));
    let spec = SPEC.get_or_init(|| crate::harness::spec("digits.toml").to_str().expect("UTF-8").to_owned());
    vec!["submit", spec, "--set", "train.steps=1", "--set", label, "--json"]
}

#[test]
fn a_full_disk_under_the_checkpoints_fails_the_job_with_the_reason() {
    let parent = tempfile::tempdir().expect("a temporary folder");
    let Some(disk) = Tmpfs::mount(&parent.path().join("checkpoints"), "256k") else { return };
    let uri = format!("\"file://{}\"", disk.0.display());
    let run = Run::new("digits.toml", 1)
        .set("checkpoint.to", uri)
        .set("train.steps", 2)
        .set("checkpoint.every", 1)
        .set("restart.attempts", 1);
    let (running, _scratch) = run.start();
    let ended = running.wait().expect(1).says(&["disk is full", "checkpoint"]);
    let summary = ended.json();
    assert_eq!((&summary["state"], &summary["checkpoint"]), (&"failed".into(), &serde_json::Value::Null));
}

#[test]
fn a_second_coordinator_on_a_folder_is_refused() {
    let cluster = Cluster::shared();
    let dir = cluster.dir().join("coordinator");
    let dir = dir.to_str().expect("UTF-8");
    run(["coordinator", "--dir", dir, "--listen", "127.0.0.1:0"]).expect(6).says(&[dir, "coordinator"]);
    // The first one has not noticed.
    cluster.run(&["status"]).expect(0);
}

#[test]
fn a_second_agent_on_a_folder_is_refused() {
    let cluster = Cluster::shared();
    let dir = cluster.dir().join("node-1");
    let dir = dir.to_str().expect("UTF-8");
    run(["node", "--dir", dir, "--coordinator", &cluster.address()]).expect(6).says(&["is used by another agent"]);
}

#[test]
fn a_port_in_use_is_named() {
    let cluster = Cluster::shared();
    let parent = tempfile::tempdir().expect("a temporary folder");
    let dir = parent.path().join("coordinator");
    let dir = dir.to_str().expect("UTF-8");
    let address = cluster.address();
    run(["coordinator", "--dir", dir, "--listen", &address]).expect(6).says(&[&address, "in use"]);
    let dir = parent.path().join("local");
    let dir = dir.to_str().expect("UTF-8");
    run(["up", "--nodes", "1", "--dir", dir, "--listen", &address]).expect(6).says(&["in use"]);
}
