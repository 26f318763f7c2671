//! `stoke supervise` (hidden): the process that keeps a local cluster running for `stoke run` and `stoke up`.

use std::future::Future;
use std::net::SocketAddr;
use std::path::PathBuf;

use tokio::io::AsyncReadExt;

use super::stop_signal;
use crate::detection::Detection;
use crate::failure::{Exit, Failure, OrFail};
use crate::local::gateways::GatewayFiles;
use crate::local::supervisor::{self, Options};

#[derive(clap::Args, Debug)]
pub struct Args {
    #[arg(long)]
    dir: PathBuf,
    #[arg(long)]
    nodes: u32,
    #[arg(long)]
    listen: SocketAddr,
    #[arg(long)]
    metrics: Option<SocketAddr>,
    #[arg(long)]
    api: Option<SocketAddr>,
    #[arg(long)]
    otlp: Option<String>,
    #[arg(long, default_value = "default")]
    detection: Detection,
    #[command(flatten)]
    gateways: GatewayFiles,
    /// Stop when standard input is closed
    #[arg(long)]
    lifeline: bool,
    /// Remove the folder at the end
    #[arg(long)]
    remove: bool,
    /// Leave the session of whoever started us
    #[arg(long)]
    detach: bool,
}

pub async fn run(args: Args) -> Result<Exit, Failure> {
    if args.detach {
        rustix::process::setsid().or_fail(Exit::Negative, "leave the session of the terminal")?;
    }
    let stop = stop(stop_signal()?, args.lifeline);
    let Args { dir, nodes, listen, metrics, api, otlp, detection, gateways, .. } = args;
    let options = Options { dir: dir.clone(), nodes, listen, metrics, api, otlp, detection, gateways };
    let ended = supervisor::run(options, stop).await;
    if args.remove {
        std::fs::remove_dir_all(&dir).or_fail(Exit::Negative, format!("remove {}", dir.display()))?;
    }
    ended
}

async fn stop(signal: impl Future<Output = ()>, lifeline: bool) {
    if !lifeline {
        return signal.await;
    }
    let mut stdin = tokio::io::stdin();
    let mut bytes = [0; 64];
    tokio::select! {
        () = signal => {}
        // Nobody writes to it: whatever ends it, whoever held it is gone.
        () = async { while matches!(stdin.read(&mut bytes).await, Ok(read) if read > 0) {} } => {}
    }
}
