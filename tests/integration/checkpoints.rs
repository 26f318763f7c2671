//! Checkpoints as people meet them: which one it is, and what becomes of it outside a cluster.

use std::fs;
use std::path::Path;

use crate::harness::{Cluster, text};

/// Two jobs alike, so that nothing but the catalogue tells their checkpoints apart.
#[test]
fn the_checkpoint_of_another_job_in_the_place_of_ones_own_is_refused_by_name() {
    let cluster = Cluster::start(1);
    let alike = ["--ranks", "1", "--set", "name=alike"];
    let (first, second) = (cluster.submit(2, &alike), cluster.submit(2, &alike));
    let committed = |job: &str| {
        cluster.wait_for_state(job, "succeeded");
        let listed = cluster.json(&["checkpoint", "list", job]);
        let checkpoint = &listed["checkpoints"][0];
        (text(&checkpoint["uri"]), text(&checkpoint["manifest_blake3"]))
    };
    let ((ours, our_hash), (theirs, their_hash)) = (committed(&first), committed(&second));
    let folder = |uri: &str| Path::new(uri.strip_prefix("file://").expect("a file URI")).to_owned();
    let (here, there) = (folder(&ours), folder(&theirs));
    assert_eq!(here.file_name(), there.file_name(), "the same step and generation");
    let aside = here.with_file_name("aside");
    fs::rename(&here, &aside).expect("rename");
    fs::rename(&there, &here).expect("rename");
    fs::rename(&aside, &there).expect("rename");
    let words = ["another checkpoint lies in the place", &our_hash, &their_hash, "earlier checkpoint"];
    cluster.run(&["checkpoint", "verify", &first]).expect(1).says(&words);
    // A person may look at whatever lies there, and a job must not begin with it.
    cluster.run(&["checkpoint", "verify", &ours]).expect(0);
    let after = cluster.submit(4, &["--ranks", "1", "--resume", &first]);
    let failed = cluster.wait_for_state(&after, "failed");
    let reason = text(&failed["reason"]);
    assert!(words.iter().all(|word| reason.contains(word)), "{reason}");
}
