//! `stoke down`: end the cluster of `stoke up`.

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use stoke_protocol::message::client::{Reply, Request};

use crate::Global;
use crate::client::{Client, Repeat};
use crate::failure::{Exit, Failure, OrFail};
use crate::local::folder::Folder;
use crate::{output, place};

const EXAMPLES: &str = "\
Examples:
  stoke down
  stoke down --remove      and forget its jobs, checkpoints and identities";

/// Agents and coordinator have 10 s each.
const STOP_MAX: Duration = Duration::from_secs(30);
/// Of a coordinator that is well, on this machine.
const ANSWER_MAX: Duration = Duration::from_secs(2);

/// Stop the local cluster that `stoke up` started; its folder stays, and `stoke up` continues from it
#[derive(clap::Args, Debug)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// Folder of the cluster [default: as for --cluster]
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,

    /// Remove the folder too: journal, checkpoints, identities
    #[arg(long)]
    remove: bool,
}

pub async fn run(args: Args, global: &Global) -> Result<Exit, Failure> {
    let dir = place::cluster_dir(args.dir.as_deref().or(global.cluster.as_deref()))?;
    let folder = Folder::new(&dir);
    let holder = folder.holder();
    let mut open = 0;
    match holder {
        Some(pid) => {
            open = open_jobs(&folder).await;
            stop(&folder, pid)?;
        }
        None if args.remove && folder.read_state().is_some() => {}
        None => {
            return Err(Failure::new(Exit::NotFound, format!("no local cluster runs in {}", dir.display()))
                .help("start one with `stoke up`, or name its folder with --dir"));
        }
    }
    if args.remove {
        // Only what is a local cluster's: a folder with other files in it was named by mistake.
        if folder.read_state().is_none() {
            return Err(Failure::new(Exit::Conflict, format!("{} is not a local cluster's folder", dir.display())));
        }
        std::fs::remove_dir_all(&dir).or_fail(Exit::Negative, format!("remove {}", dir.display()))?;
    }
    if global.json {
        output::print_json(&serde_json::json!({
            "dir": dir, "stopped": holder.is_some(), "removed": args.remove, "open_jobs": open,
        }))?;
    } else if args.remove {
        output::print("cluster is down, its folder removed\n")?;
    } else {
        output::print("cluster is down\n")?;
        if open > 0 {
            output::say(format_args!(
                "{} not over: `{}` goes on with what is left",
                output::count(open, "job"),
                folder.up_command()
            ));
        }
    }
    Ok(Exit::Ok)
}

/// Jobs that are not over, as far as the coordinator says so in time: stopping must not depend on it.
async fn open_jobs(folder: &Folder) -> u32 {
    let ask = async {
        let mut client = Client::open(&folder.coordinator().join("admin")).await?;
        client.ask(&Request::Cluster, Repeat::Safe).await
    };
    match tokio::time::timeout(ANSWER_MAX, ask).await {
        Ok(Ok(Reply::Cluster(view))) => view.jobs_running + view.jobs_queued,
        Ok(Ok(_) | Err(_)) | Err(_) => 0,
    }
}

fn stop(folder: &Folder, pid: u32) -> Result<(), Failure> {
    let raw = Pid::from_raw(pid.cast_signed())
        .ok_or_else(|| Failure::new(Exit::Negative, format!("the lock names process {pid}, which cannot be")))?;
    // A process id can be reused, a descriptor cannot: after it is open, the lock must still name the same holder.
    let Ok(process) = pidfd_open(raw, PidfdFlags::empty()) else { return Ok(()) };
    if folder.holder() != Some(pid) {
        return Ok(());
    }
    pidfd_send_signal(&process, Signal::TERM).or_fail(Exit::Denied, format!("stop process {pid}"))?;
    if !gone_within(&process, STOP_MAX)? {
        // Its children die with it.
        pidfd_send_signal(&process, Signal::KILL).or_fail(Exit::Negative, format!("kill process {pid}"))?;
        gone_within(&process, STOP_MAX)?;
    }
    Ok(())
}

/// A process descriptor is readable once its process is gone. Blocks: nothing else happens here.
fn gone_within(process: &OwnedFd, wait: Duration) -> Result<bool, Failure> {
    let wait = Timespec::try_from(wait).or_fail(Exit::Negative, "convert a time")?;
    let ready = poll(&mut [PollFd::new(process, PollFlags::IN)], Some(&wait));
    Ok(ready.or_fail(Exit::Negative, "watch the supervisor")? > 0)
}
