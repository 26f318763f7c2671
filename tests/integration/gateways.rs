//! A gateway that other machines may reach: TLS, tokens, and files that change while it serves.

use std::fs::File;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use serde_json::json;
use tempfile::TempDir;

use crate::harness::{Background, Cluster, poll, spec, stoke, text};

/// An agent of its own beside those of the cluster, whose gateway asks for tokens over TLS.
struct Door {
    files: TempDir,
    address: String,
    _agent: Background,
}

impl Door {
    fn open(cluster: &Cluster) -> Self {
        let files = tempfile::tempdir().expect("a temporary folder");
        let path = |name: &str| files.path().join(name).to_str().expect("UTF-8").to_owned();
        write(Path::new(&path("tokens")), "anna 0123456789abcdef\n");
        std::fs::write(path("join"), cluster.token("node")).expect("written");
        let (tokens, certificate, key) = (path("tokens"), path("door.pem"), path("door.key"));
        certify(&certificate, &key);
        let mut command = stoke(["node", "--join", "-", "--name", "door", "--coordinator", &cluster.address()]);
        command.args(["--dir", &path("node"), "--gateway", "127.0.0.1:0", "--gateway-tokens", &tokens]);
        command.args(["--gateway-certificate", &certificate, "--gateway-key", &key]);
        command.stdin(File::open(path("join")).expect("it was written"));
        let agent = Background::start(command);
        let address = poll("the gateway", || {
            let nodes = cluster.json(&["nodes"]);
            let node = nodes["nodes"].as_array()?.iter().find(|node| node["name"] == "door")?.clone();
            node["gateway"].as_str().map(str::to_owned)
        });
        assert!(address.starts_with("https://127.0.0.1:"), "{address}");
        Self { files, address, _agent: agent }
    }

    /// The status of a request, and the certificate that was shown.
    fn ask(&self, token: Option<&str>) -> (u16, Vec<u8>) {
        let body = json!({"inputs": [{"name": "x", "datatype": "FP32", "shape": [1], "data": [2.5]}]}).to_string();
        let _there_already = rustls::crypto::ring::default_provider().install_default();
        let client = reqwest::Client::builder().no_proxy().tls_info(true).danger_accept_invalid_certs(true);
        let mut request = client
            .build()
            .expect("an HTTP client")
            .post(format!("{}/v2/models/noop/infer", self.address))
            .header("content-type", "application/json")
            .body(body);
        if let Some(token) = token {
            request = request.header("authorization", format!("Bearer {token}"));
        }
        let runtime = tokio::runtime::Runtime::new().expect("a runtime");
        let response = runtime.block_on(request.send()).expect("an answer");
        let shown = response.extensions().get::<reqwest::tls::TlsInfo>().expect("TLS").peer_certificate();
        (response.status().as_u16(), shown.expect("a certificate").to_vec())
    }
}

/// In its place at once, and its owner's.
fn write(file: &Path, text: &str) {
    let beside = file.with_extension("beside");
    std::fs::write(&beside, text).expect("written");
    std::fs::set_permissions(&beside, std::fs::Permissions::from_mode(0o600)).expect("permissions");
    std::fs::rename(&beside, file).expect("renamed");
}

fn certify(certificate: &str, key: &str) {
    let made = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).expect("a certificate");
    write(Path::new(certificate), &made.cert.pem());
    write(Path::new(key), &made.signing_key.serialize_pem());
}

#[test]
fn a_gateway_asks_for_tokens_over_tls_and_follows_its_files() {
    let cluster = Cluster::start(1);
    let sets = ["serve.task=infer", "serve.model=identity", "serve.stages=1", "serve.name=noop"];
    let sets: Vec<&str> = sets.into_iter().flat_map(|set| ["--set", set]).collect();
    let serve = spec("serve-smollm2.toml");
    cluster.json(&[&["serve", serve.to_str().expect("UTF-8")][..], &sets].concat());
    let door = Door::open(&cluster);
    let (status, shown) =
        poll("routes", || Some(door.ask(Some("0123456789abcdef"))).filter(|(status, _)| *status != 404));
    assert_eq!(status, 200);
    assert_eq!((door.ask(None).0, door.ask(Some("0123456789abcdeX")).0), (401, 401));
    // A token is taken back, another one given, and the certificate renewed: nothing is started again.
    let path = |name: &str| door.files.path().join(name);
    write(&path("tokens"), "ben fedcba9876543210\n");
    certify(path("door.pem").to_str().expect("UTF-8"), path("door.key").to_str().expect("UTF-8"));
    poll("the new token", || (door.ask(Some("fedcba9876543210")).0 == 200).then_some(()));
    assert_eq!(door.ask(Some("0123456789abcdef")).0, 401);
    poll("the new certificate", || (door.ask(Some("fedcba9876543210")).1 != shown).then_some(()));
}

#[test]
fn a_gateway_that_everybody_could_use_does_not_start() {
    let cluster = Cluster::shared();
    let dir = tempfile::tempdir().expect("a temporary folder");
    let path = |name: &str| dir.path().join(name).to_str().expect("UTF-8").to_owned();
    let start = |more: &[&str]| {
        let join = path("join");
        std::fs::write(&join, cluster.token("node")).expect("written");
        let mut command = stoke(["node", "--join", "-", "--dir", &path("node"), "--coordinator", &cluster.address()]);
        command.args(more).stdin(File::open(join).expect("it was written"));
        Background::start(command).wait()
    };
    start(&["--gateway", "0.0.0.0:0"]).expect(2).says(&["tokens", "127.0.0.1"]);
    write(Path::new(&path("short")), "anna short\n");
    start(&["--gateway", "0.0.0.0:0", "--gateway-tokens", &path("short")])
        .expect(2)
        .says(&["short:1:", "16 characters"]);
    start(&["--gateway", "127.0.0.1:0", "--gateway-key", &path("key")]).expect(2).says(&["certificate"]);
    let taken = text(&cluster.json(&["nodes"])["nodes"][0]["gateway"]);
    start(&["--gateway", taken.trim_start_matches("http://")]).expect(6).says(&["is another process listening there"]);
    assert!(text(&cluster.json(&["nodes"])["nodes"][0]["gateway"]).starts_with("http://"));
}
