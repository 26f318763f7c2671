//! What the death of a rank costs, through the `stoke` binary on three local nodes: from `kill -9` to the generation that goes on without it,
//! and to the one in which its successor owns lanes. What deaths cost in the end: the bench `goodput`.
//!
//!     cargo bench -p stoke-cli -p stoke-tests --bench recovery
//!
//! Times are the coordinator's, in milliseconds after the kill; the step that is done again is not in them.

use std::path::Path;

use rustix::process::Signal;
use stoke_tests::local::{LocalCluster, now_ms, quantile, signal};

const NODES: usize = 3;
const KILLS: usize = 30;

fn main() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("tests/ lies in the workspace").to_owned();
    let stoke = stoke_tests::binary::build(&root);
    let spec = root.join("jobs/specs/domains.toml");
    let cluster = LocalCluster::up(&stoke, NODES, &[]);
    latencies(&cluster, &spec);
}

fn latencies(cluster: &LocalCluster<'_>, spec: &Path) {
    let job = cluster.submit(spec, &["train.epochs=400".to_owned()]);
    let (mut on, mut whole) = (Vec::new(), Vec::new());
    for kill in 0..KILLS {
        let members = cluster.members(&job);
        let (victim, others) = (members[kill % members.len()], members.len() - 1);
        let killed_ms = now_ms();
        signal(victim, Signal::KILL);
        on.push(cluster.event(&job, killed_ms, "goes on at") - killed_ms);
        whole.push(cluster.event(&job, killed_ms, &format!(": {NODES} ranks")) - killed_ms);
        let left = cluster.members(&job);
        assert_eq!(members.iter().filter(|member| left.contains(member)).count(), others, "a survivor was restarted");
    }
    cluster.ask(&["cancel", &job]);
    println!("{KILLS} ranks killed, {NODES} nodes       median ms    p99 ms");
    print_row("to the generation that goes on", &mut on);
    print_row("to full strength again", &mut whole);
}

fn print_row(what: &str, values: &mut [f64]) {
    println!("{what:<34} {:>9.0} {:>9.0}", quantile(values, 0.5), quantile(values, 0.99));
}
