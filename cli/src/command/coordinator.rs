//! `stoke coordinator`: the control plane of a cluster.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;

use stoke_coordinator::{Config, Coordinator};

use super::{DEFAULT_PORT, read_config, stop_signal};
use crate::Global;
use crate::detection::Detection;
use crate::failure::{Exit, Failure, OrFail};
use crate::local::notice::Listening;
use crate::output;
use crate::service::Service;

const EXAMPLES: &str = "\
Examples:
  stoke coordinator --dir /var/lib/stoke --advertise head.example.org:7878
  stoke --cluster /var/lib/stoke token create --role node      on the same machine, as its admin

The first start makes the cluster: its authority in DIR/ca, an admin's credentials in DIR/admin, the journal in DIR/journal.redb.";

/// Run the coordinator of a cluster in the foreground
#[derive(clap::Args, Debug)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// Authority, journal and admin credentials; back it up, and never run two coordinators on it
    #[arg(long, value_name = "DIR", required_unless_present = "config")]
    dir: Option<PathBuf>,

    /// Settings (TOML: dir, listen, advertise, metrics, api, otlp, checkpoints, timings); options given here win over it
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,

    /// UDP address for nodes and users [default: 0.0.0.0:7878]
    #[arg(long, value_name = "ADDR")]
    listen: Option<SocketAddr>,

    /// HTTP address of Prometheus metrics [default: none]
    #[arg(long, value_name = "ADDR")]
    metrics: Option<SocketAddr>,

    /// HTTPS address of the API and the dashboard [default: none]
    #[arg(long, value_name = "ADDR")]
    api: Option<SocketAddr>,

    /// URL of an OpenTelemetry collector (OTLP over HTTP, such as http://127.0.0.1:4318): a trace of each job goes there [default: none]
    #[arg(long, value_name = "URL")]
    otlp: Option<String>,

    /// How others reach it; repeatable [default: the listen address]
    #[arg(long, value_name = "HOST:PORT")]
    advertise: Vec<String>,

    /// URI (file:///, s3://, az://) below which jobs that name no folder keep their checkpoints; every node must reach it [default: DIR/checkpoints]
    #[arg(long, value_name = "URI")]
    checkpoints: Option<String>,

    /// How soon a node that says nothing is taken as lost: `default` after 4 s, `fast` after 1.1 s, for networks that hold no packet
    /// back for half a second [default: what the settings file says of timings]
    #[arg(long, value_name = "PROFILE")]
    detection: Option<Detection>,
}

impl Args {
    fn config(self) -> Result<Config, Failure> {
        let mut config = match (&self.config, &self.dir) {
            (Some(file), _) => read_config(file)?,
            (None, Some(dir)) => Config::new(dir, SocketAddr::from((Ipv4Addr::UNSPECIFIED, DEFAULT_PORT))),
            (None, None) => return Err(Failure::usage("give --dir DIR or --config FILE")),
        };
        config.dir = self.dir.unwrap_or(config.dir);
        config.listen = self.listen.unwrap_or(config.listen);
        config.metrics = self.metrics.or(config.metrics);
        config.api = self.api.or(config.api);
        config.otlp = self.otlp.or(config.otlp);
        config.checkpoints = self.checkpoints.or(config.checkpoints);
        if let Some(uri) = &config.checkpoints
            && let Err(problem) = stoke_protocol::spec::check_uri(uri)
        {
            return Err(Failure::usage(format!("checkpoints = {uri:?}: {problem}")));
        }
        config.timings = self.detection.map_or(config.timings, Detection::timings);
        if !self.advertise.is_empty() {
            config.advertise = self.advertise;
        }
        Ok(config)
    }
}

pub async fn run(args: Args, global: &Global) -> Result<Exit, Failure> {
    let stop = stop_signal()?;
    let running = Coordinator::start(args.config()?).await.map_err(start_failure)?;
    let listening = Listening {
        address: running.address().to_string(),
        metrics: running.metrics_address().map(|address| address.to_string()),
        api: running.api_address().map(|address| address.to_string()),
    };
    if global.json {
        let line = serde_json::to_string(&listening).or_fail(Exit::Negative, "encode the address")?;
        output::print(&format!("{line}\n"))?;
    } else {
        output::print(&format!("coordinator listens on {}\n", listening.address))?;
        if let Some(url) = running.api_url() {
            output::print(&format!(
                "API and dashboard at {url}, for users' certificates (`stoke dashboard` opens it)\n"
            ))?;
        }
    }
    let service = Service::from_environment();
    tokio::select! {
        () = stop => {}
        // Never ends. It listens and has recovered by now.
        () = service.attend(async {}, async || running.beat().await) => {}
        ended = running.wait() => return ended.map(|()| Exit::Ok).or_fail(Exit::Negative, "run the coordinator"),
    }
    service.stopping();
    running.stop().await;
    Ok(Exit::Ok)
}

/// Another coordinator on the folder and a port in use are conflicts: nothing is wrong with the arguments.
fn start_failure(error: stoke_coordinator::StartError) -> Failure {
    let exit = if error.is_conflict() { Exit::Conflict } else { Exit::Negative };
    Failure::from_error(exit, error).context("start the coordinator")
}
