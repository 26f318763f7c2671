//! Tokens that must not let anybody in.

use std::sync::atomic::{AtomicU32, Ordering};

use crate::harness::{Cluster, Ended, poll, run_with_input, text};

/// Tries to become a user; each time another one, because a name joins once.
fn login(address: &str, token: &str) -> Ended {
    static NAMES: AtomicU32 = AtomicU32::new(0);
    let name = format!("user-{}", NAMES.fetch_add(1, Ordering::Relaxed));
    let dir = tempfile::tempdir().expect("a temporary folder");
    let dir = dir.path().join("user");
    let dir = dir.to_str().expect("UTF-8");
    run_with_input(["--cluster", dir, "login", "--join", "-", "--name", &name, "--coordinator", address], token)
}

/// Tries to become a node.
fn join(address: &str, token: &str) -> Ended {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let dir = dir.path().join("node");
    run_with_input(["node", "--dir", dir.to_str().expect("UTF-8"), "--join", "-", "--coordinator", address], token)
}

#[test]
fn a_token_is_used_once() {
    let cluster = Cluster::shared();
    let token = cluster.token("viewer");
    login(&cluster.address(), &token).expect(0);
    let used = login(&cluster.address(), &token).expect(4).says(&["used", "stoke token create"]);
    assert!(!used.stderr.contains("--name"), "{used:#?}");
}

#[test]
fn a_token_is_for_one_role() {
    let cluster = Cluster::shared();
    login(&cluster.address(), &cluster.token("node")).expect(4).says(&["node"]);
    join(&cluster.address(), &cluster.token("submitter")).expect(4).says(&["submitter"]);
}

#[test]
fn an_expired_token_is_refused() {
    let cluster = Cluster::shared();
    let made = cluster.json(&["token", "create", "--role", "viewer", "--ttl", "1s"]);
    let state = || {
        let tokens = cluster.json(&["token", "list"]);
        let found = tokens["tokens"].as_array()?.iter().find(|token| token["token"] == made["token"])?.clone();
        (found["state"] == "expired").then_some(())
    };
    poll("the token's expiry", state);
    login(&cluster.address(), &text(&made["text"])).expect(4).says(&["expired"]);
}

#[test]
fn a_revoked_token_is_refused_and_listed() {
    let cluster = Cluster::shared();
    let made = cluster.json(&["token", "create", "--role", "node"]);
    let revoked = cluster.json(&["token", "revoke", &text(&made["token"])]);
    assert_eq!(revoked["revoked"], true);
    join(&cluster.address(), &text(&made["text"])).expect(4).says(&["revoked"]);
    let tokens = cluster.json(&["token", "list"]);
    let listed = tokens["tokens"].as_array().into_iter().flatten().find(|token| token["token"] == made["token"]);
    assert_eq!(listed.map(|token| &token["state"]), Some(&"revoked".into()), "{tokens:#}");
    assert!(!tokens.to_string().contains(&text(&made["text"])), "a secret is listed");
}

#[test]
fn a_token_of_another_cluster_gives_nothing_away() {
    let other = Cluster::start(0);
    let token = other.token("viewer");
    let shared = Cluster::shared();
    login(&shared.address(), &token).expect(4).says(&["another cluster"]);
    // Its secret was not sent: it still opens the cluster that it is for.
    login(&other.address(), &token).expect(0);
}

#[test]
fn a_token_that_was_cut_or_guessed_is_refused() {
    let cluster = Cluster::shared();
    let token = cluster.token("viewer");
    login(&cluster.address(), &token[..token.len() - 3]).expect(2).says(&["cut"]);
    login(&cluster.address(), "not a token").expect(2).says(&["join token"]);
    let (known, secret) = token.split_at(token.len() - 32);
    let guessed: String = secret.chars().map(|digit| if digit == '0' { '1' } else { '0' }).collect();
    login(&cluster.address(), &format!("{known}{guessed}")).expect(4);
    // A wrong guess does not use it up.
    login(&cluster.address(), &token).expect(0);
}

#[test]
fn a_node_without_identity_and_token_is_told_what_to_do() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let dir = dir.path().to_str().expect("UTF-8");
    crate::harness::run(["node", "--dir", dir, "--coordinator", "127.0.0.1:1"])
        .expect(4)
        .says(&["stoke token create --role node"]);
}
