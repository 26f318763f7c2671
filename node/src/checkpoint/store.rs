//! Where a checkpoint's URI leads: to this machine's files or to a bucket of an object store. Owns the clients of object stores, what they are
//! allowed to do and for how long, and the one place that reads credentials; knows nothing of what is stored.
//!
//! Credentials are standard variables (`AWS_*`, `AZURE_*`, `GOOGLE_*`) of the agent, or what the machine's identity gives. A rank is handed
//! them over its link and keeps them in memory (I35): they are in no environment of a rank, no spec, no entry of the journal and no message.

use std::collections::BTreeMap;
use std::str::FromStr;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use object_store::aws::{AmazonS3Builder, AmazonS3ConfigKey};
use object_store::azure::{AzureConfigKey, MicrosoftAzureBuilder};
use object_store::gcp::{GoogleCloudStorageBuilder, GoogleConfigKey};
use object_store::local::LocalFileSystem;
use object_store::path::Path;
use object_store::{BackoffConfig, ClientOptions, ObjectStore, RetryConfig};
use tokio::runtime::Runtime;

use super::answer::missing;
use super::error::CheckpointError;

/// A request that fails for a reason that may pass is tried again for so long; longer, and training would wait for its next checkpoint.
const RETRY_MAX: Duration = Duration::from_secs(10);
const RETRIES_MAX: usize = 20;
const BACKOFF_FIRST: Duration = Duration::from_millis(100);
const BACKOFF_MAX: Duration = Duration::from_secs(2);
/// One request, with its part of a shard: 8 MiB take this long at 280 kB/s.
const REQUEST_MAX: Duration = Duration::from_secs(30);
const CONNECT_MAX: Duration = Duration::from_secs(5);
/// Parts of one shard that are on their way at once. Each is `PART_BYTES` of memory.
const PARTS_IN_FLIGHT_MAX: usize = 4;

/// Variables that are given to object stores begin with one of these.
const PREFIXES: [&str; 3] = ["AWS_", "AZURE_", "GOOGLE_"];
/// Not taken from the environment: what would weaken TLS or the rule that a manifest is never replaced, and what the URI says.
const IGNORED: [&str; 13] = [
    "AWS_ALLOW_HTTP",
    "AWS_ALLOW_INVALID_CERTIFICATES",
    "AWS_CONDITIONAL_PUT",
    "AWS_BUCKET",
    "AWS_BUCKET_NAME",
    "AZURE_ALLOW_HTTP",
    "AZURE_ALLOW_INVALID_CERTIFICATES",
    "AZURE_CONTAINER_NAME",
    "AZURE_STORAGE_USE_EMULATOR",
    "GOOGLE_ALLOW_HTTP",
    "GOOGLE_ALLOW_INVALID_CERTIFICATES",
    "GOOGLE_BUCKET",
    "GOOGLE_BUCKET_NAME",
];

/// Names and values of variables.
pub type Settings = BTreeMap<String, String>;

/// What a place is part of.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) enum Kind {
    File,
    S3,
    Azure,
    Google,
}

/// A folder of a store.
pub(crate) struct Place {
    pub kind: Kind,
    pub store: Arc<dyn ObjectStore>,
    pub path: Path,
    /// Always with its scheme, without a slash at the end.
    pub uri: String,
}

/// Settings come once, and a bucket's client is made once: it keeps connections and the tokens of an identity. Process-wide, like the
/// environment that it stands for.
#[derive(Default)]
struct Clients {
    given: Option<Settings>,
    open: BTreeMap<(Kind, String), Arc<dyn ObjectStore>>,
}

static CLIENTS: Mutex<Clients> = Mutex::new(Clients { given: None, open: BTreeMap::new() });

/// The variables of this process that are for object stores.
pub fn settings() -> Settings {
    let wanted = |name: &str| PREFIXES.iter().any(|prefix| name.starts_with(prefix)) && !IGNORED.contains(&name);
    let variables =
        std::env::vars_os().filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)));
    variables.filter(|(name, value)| wanted(name) && !value.is_empty()).collect()
}

/// Uses these in place of this process's own from now on.
pub fn provide(settings: Settings) {
    let mut clients = CLIENTS.lock().unwrap_or_else(PoisonError::into_inner);
    *clients = Clients { given: Some(settings), open: BTreeMap::new() };
}

/// Which settings count, and who has them: for advice.
pub(super) fn given() -> (Settings, &'static str) {
    CLIENTS.lock().unwrap_or_else(PoisonError::into_inner).known()
}

impl Clients {
    fn known(&self) -> (Settings, &'static str) {
        match &self.given {
            Some(given) => (given.clone(), "the environment of the node's agent"),
            None => (settings(), "the environment"),
        }
    }
}

impl Kind {
    pub(super) fn parts_in_flight_max(self) -> usize {
        match self {
            Self::File => 1,
            Self::S3 | Self::Azure | Self::Google => PARTS_IN_FLIGHT_MAX,
        }
    }
}

impl Place {
    /// `file:///absolute/folder`, a plain path of this machine, `s3://bucket/folder`, `az://container/folder` or `gs://bucket/folder`.
    pub(crate) fn of(uri: &str) -> Result<Self, CheckpointError> {
        let refused = |problem: String| CheckpointError::Uri { uri: uri.to_owned(), problem };
        match uri.split_once("://") {
            // Taken literally, as it is written into manifests: no percent escapes.
            Some(("file", path)) if path.starts_with('/') => Self::local(Path::parse(path.trim_matches('/'))),
            Some(("file", _)) => return Err(refused("write file:///absolute/folder, with three slashes".into())),
            Some(("s3", rest)) => return Self::remote(Kind::S3, uri, rest),
            Some(("az", rest)) => return Self::remote(Kind::Azure, uri, rest),
            Some(("gs", rest)) => return Self::remote(Kind::Google, uri, rest),
            Some((scheme, _)) => {
                return Err(refused(format!(
                    "{scheme}:// is no store that is known: use file:///, s3://, az:// or gs://"
                )));
            }
            None => {
                let absolute = std::path::absolute(uri).map_err(|error| refused(error.to_string()))?;
                Self::local(Path::from_absolute_path(absolute))
            }
        }
        .map_err(|error| refused(error.to_string()))
    }

    fn local(path: Result<Path, object_store::path::Error>) -> Result<Self, object_store::path::Error> {
        let path = path?;
        let store = Arc::new(LocalFileSystem::new().with_fsync(true));
        Ok(Self { kind: Kind::File, store, uri: format!("file:///{path}"), path })
    }

    fn remote(kind: Kind, uri: &str, rest: &str) -> Result<Self, CheckpointError> {
        let refused = |problem: String| CheckpointError::Uri { uri: uri.to_owned(), problem };
        let uri = uri.trim_end_matches('/').to_owned();
        let (bucket, path) = rest.split_once('/').unwrap_or((rest, ""));
        if bucket.is_empty() || !bucket.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-._".contains(&byte)) {
            return Err(refused(
                "name a bucket or container, then a folder, and nothing else: s3://bucket/folder".into(),
            ));
        }
        let path = Path::parse(path.trim_matches('/')).map_err(|error| refused(error.to_string()))?;
        let mut clients = CLIENTS.lock().unwrap_or_else(PoisonError::into_inner);
        let key = (kind, bucket.to_owned());
        if let Some(store) = clients.open.get(&key) {
            return Ok(Self { kind, store: store.clone(), path, uri });
        }
        let (settings, whose) = clients.known();
        if let Some(problem) = missing(kind, &settings, whose) {
            return Err(refused(problem));
        }
        let store = client(kind, bucket, &settings).map_err(|error| refused(super::error::plain_text(&error)))?;
        clients.open.insert(key, store.clone());
        Ok(Self { kind, store, path, uri })
    }
}

/// The threads on which requests to object stores make progress, whoever waits for them.
pub(crate) fn runtime() -> &'static Runtime {
    static RUNTIME: OnceLock<Runtime> = OnceLock::new();
    RUNTIME.get_or_init(|| {
        let mut builder = tokio::runtime::Builder::new_multi_thread();
        let built = builder.worker_threads(1).thread_name("store").enable_all().build();
        built.expect("a process that could start its other threads can start this one")
    })
}

fn client(kind: Kind, bucket: &str, settings: &Settings) -> object_store::Result<Arc<dyn ObjectStore>> {
    // Plain HTTP only where somebody has written it out.
    let is_plain =
        |names: &[&str]| names.iter().any(|name| settings.get(*name).is_some_and(|url| url.starts_with("http://")));
    let options = |names: &[&str]| {
        let options = ClientOptions::new().with_timeout(REQUEST_MAX).with_connect_timeout(CONNECT_MAX);
        options.with_allow_http(is_plain(names))
    };
    let backoff = BackoffConfig { init_backoff: BACKOFF_FIRST, max_backoff: BACKOFF_MAX, base: 2.0 };
    let retry = RetryConfig { backoff, max_retries: RETRIES_MAX, retry_timeout: RETRY_MAX };
    // The second call finds it done.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let _entered = runtime().enter();
    Ok(match kind {
        Kind::File => unreachable!("files have no client"),
        Kind::S3 => {
            let endpoints = ["AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"];
            let mut builder = AmazonS3Builder::new().with_client_options(options(&endpoints));
            for (key, value) in known::<AmazonS3ConfigKey>(settings) {
                builder = builder.with_config(key, value);
            }
            Arc::new(builder.with_bucket_name(bucket).with_retry(retry).build()?)
        }
        Kind::Azure => {
            let endpoints = ["AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT"];
            let mut builder = MicrosoftAzureBuilder::new().with_client_options(options(&endpoints));
            for (key, value) in known::<AzureConfigKey>(settings) {
                builder = builder.with_config(key, value);
            }
            Arc::new(builder.with_container_name(bucket).with_retry(retry).build()?)
        }
        Kind::Google => {
            let mut builder = GoogleCloudStorageBuilder::new().with_client_options(options(&["GOOGLE_BASE_URL"]));
            for (key, value) in known::<GoogleConfigKey>(settings) {
                builder = builder.with_config(key, value);
            }
            Arc::new(builder.with_bucket_name(bucket).with_retry(retry).build()?)
        }
    })
}

/// The settings that a kind of store knows.
fn known<K: FromStr>(settings: &Settings) -> impl Iterator<Item = (K, &String)> {
    settings.iter().filter_map(|(name, value)| Some((name.to_ascii_lowercase().parse().ok()?, value)))
}
