//! `stoke run`: one job on a throwaway cluster of this machine. Owns the order of a run: cluster up, submit, watch, report, everything down
//! again, whatever happens in between.

use std::cell::{OnceCell, RefCell};
use std::fs::{File, Permissions};
use std::future::Future;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use stoke_node::artifact::Packed;
use stoke_protocol::ids::JobId;
use stoke_protocol::message::client::{Explanation, JobState, Reply, Request};
use stoke_protocol::message::split::SURVEYING;
use stoke_protocol::spec::JobSpec;

use super::{chaos, checkpoint, explain, serve, stop_signal, submit, up};
use crate::chaos::schedule::Schedule;
use crate::chaos::storm::Storm;
use crate::client::{Client, PATIENCE_WATCHING, Repeat, Sight, unexpected};
use crate::detection::Detection;
use crate::failure::{Exit, Failure, OrFail};
use crate::local::folder::Folder;
use crate::local::handle::{Life, LocalCluster, Wish, failed};
use crate::local::notice::Notice;
use crate::local::supervisor::end_orphans;
use crate::output;
use crate::progress::Progress;
use crate::report::{Report, failed_logs};
use crate::spec::{self, SpecArgs};
use crate::{Global, artifact};

const EXAMPLES: &str = "\
Examples:
  stoke run jobs/specs/domains.toml
  stoke run jobs/specs/serve-smollm2.toml --nodes 2         a language model over HTTP
  stoke run jobs/specs/digits.toml --nodes 3 --set train.epochs=1
  stoke run SPEC --json | jq -r .weights_blake3
  stoke run SPEC --nodes 3 --chaos \"kill-rank every 3s\" --seed 7     the same weights as without
  stoke run SPEC --chaos \"pause-node every 5s for 2s, kill-coordinator at 4s\"
  stoke run SPEC --resume stoke-runs/NAME/TIME/JOB/step-00000100-g1     continue an interrupted run

Checkpoints go to [checkpoint] to of the spec, else to --out, else to ./stoke-runs/NAME/TIME/.
One coordinator and N agents run as separate processes on the loopback, and are gone when this command is.";

/// The last lines of a command come after its end.
const OUTPUT_MAX: Duration = Duration::from_secs(5);
/// A job that fits is placed in milliseconds; one that waits this long on an empty cluster waits for ever.
const PLACED_MAX: Duration = Duration::from_secs(2);

/// Train, serve or run a command on a throwaway cluster of this machine, and clean up
#[derive(clap::Args, Debug)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    #[command(flatten)]
    spec: SpecArgs,

    /// Agents to start; one rank on each unless the spec or --ranks says otherwise
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=64))]
    nodes: u32,

    /// Empty or new folder for checkpoints and summary.json [default: ./stoke-runs/NAME/TIME]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,

    /// Keep the cluster's folder (journal, logs) for a look afterwards
    #[arg(long)]
    keep: bool,

    /// Faults on this cluster while the job trains, as for `stoke chaos`, with an account at the end (in --json: `chaos`)
    #[arg(long, value_name = "SCHEDULE")]
    chaos: Option<String>,

    /// Moments and victims of --chaos; the same seed strikes in the same way [default: a fresh one, told in the account]
    #[arg(long, value_name = "N", requires = "chaos")]
    seed: Option<u64>,
}

/// What the job needs beside its spec.
struct Scene {
    folder: Folder,
    out: PathBuf,
    nodes: u32,
    began: Instant,
    /// URI of the newest committed checkpoint.
    newest: RefCell<Option<String>>,
    /// What a job that runs a command takes along.
    packed: Option<Packed>,
    /// With its seed.
    chaos: Option<(Schedule, u64)>,
    /// From the submission on.
    storm: OnceCell<Storm>,
}

pub async fn run(args: Args, global: &Global) -> Result<Exit, Failure> {
    let began = Instant::now();
    let chaos = args.chaos.as_deref().map(Schedule::parse_for_use).transpose()?;
    let chaos = chaos.map(|schedule| (schedule, args.seed.unwrap_or_else(chaos::fresh_seed)));
    let mut spec_args = args.spec;
    spec_args.resume = checkpoint::locate_resume(spec_args.resume, global).await?;
    let mut job_spec = spec::prepare(&spec_args)?;
    if job_spec.serve.is_some() {
        let training = [("--chaos", args.chaos.is_some()), ("--out", args.out.is_some())];
        if let Some((name, _)) = training.iter().find(|(_, given)| *given) {
            return Err(Failure::usage(format!("{name} is for jobs that train")).help(match *name {
                "--chaos" => "`stoke up`, `stoke serve SPEC` and `stoke chaos SCHEDULE` strike a model that is served",
                _ => "a model that is served writes nothing: leave it out",
            }));
        }
        return serve::here(&job_spec, args.nodes, args.keep, global).await;
    }
    if job_spec.train.is_some() {
        check_inputs(&job_spec)?;
    }
    if let Some(note) = spec::default_ranks(&mut job_spec, args.nodes) {
        output::say(note);
    }
    let packed = artifact::take(&mut job_spec)?;
    let interrupted = stop_signal()?;
    let out = make_out(args.out.as_deref(), &job_spec.name)?;
    let _claim = claim(&out)?;
    if job_spec.train.is_some() && job_spec.checkpoint.to.is_none() {
        job_spec.checkpoint.to = Some(spec::file_uri(&out)?);
    }
    let mut builder = tempfile::Builder::new();
    // It holds the keys of a cluster, whatever the umask.
    builder.prefix("stoke-run-").permissions(Permissions::from_mode(0o700));
    let dir = builder.tempdir().or_fail(Exit::Negative, "make a temporary folder")?;
    // The supervisor removes it too, for the case that nobody is left here to do so.
    let life = if args.keep { Life::OursKeepFolder } else { Life::Ours };
    let newest = RefCell::new(None);
    let scene = Scene {
        folder: Folder::new(dir.path()),
        out,
        nodes: args.nodes,
        began,
        newest,
        packed,
        chaos,
        storm: OnceCell::new(),
    };
    let ended = live(&scene, life, &job_spec, interrupted).await;
    if args.keep {
        output::say(format_args!("the cluster's folder is kept: {}", dir.keep().display()));
    } else {
        // A supervisor that was killed has left this to us.
        end_orphans(&scene.folder, scene.nodes);
        let _ = std::fs::remove_dir_all(dir.path());
    }
    let ended = ended.and_then(|report| report.publish(&scene.out, global.json));
    remove_if_empty(&scene.out);
    ended
}

impl Scene {
    fn interrupted(&self) -> Failure {
        let failure = match &*self.newest.borrow() {
            Some(uri) => Failure::new(Exit::Interrupted, format!("interrupted; the newest checkpoint is {uri}"))
                .help(format!("go on from it with --resume {}", output::quoted(uri))),
            None => Failure::new(Exit::Interrupted, "interrupted; no checkpoint was committed yet"),
        };
        let Some(storm) = self.storm.get() else { return failure };
        let account = storm.account();
        output::say(format_args!("\n{}", account.text().trim_end()));
        failure.beside(serde_json::json!({ "chaos": account.json_of_run() }))
    }
}

/// What can be known before anything is started: here the ranks read the files that this process can read.
fn check_inputs(job_spec: &JobSpec) -> Result<(), Failure> {
    stoke_jobs::check_files(&job_spec.to_toml())
        .map_err(|error| Failure::from_error(Exit::Usage, error).help("paths in a spec are relative to its folder"))?;
    let Some(uri) = &job_spec.checkpoint.resume else { return Ok(()) };
    let manifest = stoke_node::checkpoint::open(uri).map_err(|error| {
        Failure::from_error(Exit::Usage, error)
            .context(format!("resume from {uri}"))
            .help("--resume takes a checkpoint's folder, its URI, or a job (its newest checkpoint)")
    })?;
    if manifest.trainer != job_spec.trainer {
        let (theirs, ours) = (&manifest.trainer, &job_spec.trainer);
        return Err(Failure::usage(format!("checkpoint {uri} is of trainer {theirs}, the spec names {ours}")));
    }
    Ok(())
}

async fn live(
    scene: &Scene,
    life: Life,
    job_spec: &JobSpec,
    interrupted: impl Future<Output = ()>,
) -> Result<Report, Failure> {
    let detection = Detection::Default;
    let wish = Wish {
        nodes: scene.nodes,
        listen: up::any_port(),
        metrics: None,
        otlp: None,
        api: None,
        detection,
        gateways: Default::default(),
        life,
    };
    let mut cluster = LocalCluster::start(&scene.folder, &wish)?;
    let ended = tokio::select! {
        () = interrupted => Err(scene.interrupted()),
        ended = drive(scene, job_spec, &mut cluster) => ended,
    };
    cluster.end().await;
    ended
}

async fn drive(scene: &Scene, job_spec: &JobSpec, cluster: &mut LocalCluster) -> Result<Report, Failure> {
    let progress = RefCell::new(Progress::new());
    progress
        .borrow()
        .note(&format!("starting a coordinator and {} on this machine", output::count(scene.nodes, "node")));
    cluster.ready(&scene.folder).await?;
    let admin = scene.folder.coordinator().join("admin");
    let mut client = Client::open_patiently(&admin, PATIENCE_WATCHING).await?;
    if let Some(packed) = &scene.packed {
        artifact::send(&mut client, packed).await?;
    }
    let (job, _) = submit::submit(&mut client, &submit::fresh_key(), job_spec).await?;
    let request = Request::Watch { job };
    let begin = |(schedule, seed): &(Schedule, u64)| Storm::new(&scene.folder, schedule, *seed, Some(job));
    let storm = scene.chaos.as_ref().map(|chaos| scene.storm.get_or_init(|| begin(chaos)));
    let restarts = RefCell::new(0);
    let watched = async {
        tokio::select! {
        view = client.watch(&request, |sight| {
            if let Sight::Job(view) = &sight && let Some(checkpoint) = &view.checkpoint {
                *scene.newest.borrow_mut() = Some(checkpoint.uri.clone());
            }
            progress.borrow_mut().show(sight);
        }) => view,
        failure = hear(cluster, &progress, &restarts) => Err(failure),
        failure = never_placed(&admin, job) => Err(failure),
        failure = chaos::rage(storm, |text| progress.borrow().note(text)) => Err(failure),
        }
    };
    let shown = async {
        if job_spec.exec.is_some() {
            show_output(&admin, job, &progress).await;
        }
    };
    let view = beside(watched, shown).await?;
    progress.borrow().finish();
    let logs = match view.state {
        JobState::Succeeded => Vec::new(),
        // All of it has been shown.
        _ if job_spec.exec.is_some() => Vec::new(),
        _ => failed_logs(&mut client, &view).await,
    };
    let wall = scene.began.elapsed();
    let chaos = match storm {
        Some(storm) => Some(storm.settle(chaos::SETTLE_MAX).await),
        None => None,
    };
    Ok(Report { view, wall, restarts: restarts.into_inner(), logs, chaos })
}

/// What the command prints, as it does. The cluster's logs go with it.
async fn show_output(admin: &Path, job: JobId, progress: &RefCell<Progress>) {
    let Ok(mut client) = Client::open_patiently(admin, PATIENCE_WATCHING).await else { return };
    let request = Request::Logs { job, rank: None, tail: None, follow: true };
    let Ok(mut answers) = client.stream(&request).await else { return };
    while let Ok(Some(Reply::Log(chunk))) = answers.next().await {
        let shown = progress.borrow();
        chunk.lines.iter().for_each(|line| shown.note(&format!("[{}] {line}", chunk.id.rank)));
        if chunk.last {
            return;
        }
    }
}

/// Runs `second` beside `first`, and for a moment longer.
async fn beside<T>(first: impl Future<Output = T>, second: impl Future<Output = ()>) -> T {
    let (mut first, mut second) = (std::pin::pin!(first), std::pin::pin!(second));
    let done = tokio::select! {
        done = &mut first => done,
        () = &mut second => return first.await,
    };
    let _ = tokio::time::timeout(OUTPUT_MAX, second).await;
    done
}

/// Tells of restarts as they happen; resolves only when the cluster cannot go on.
pub(super) async fn hear(cluster: &mut LocalCluster, progress: &RefCell<Progress>, restarts: &RefCell<u32>) -> Failure {
    loop {
        match cluster.next_notice().await {
            Some(Notice::Restarting { process, reason, .. }) => {
                *restarts.borrow_mut() += 1;
                progress.borrow().note(&format!("the {process} {reason}: starting it again"));
            }
            Some(Notice::Restarted { process, pid }) => {
                progress.borrow().note(&format!("the {process} is back (process {pid})"));
            }
            Some(notice @ Notice::Failed { .. }) => return failed(notice),
            Some(Notice::Ready { .. }) => {}
            None => return Failure::new(Exit::Negative, "the supervisor of the local cluster died"),
        }
    }
}

/// Resolves when the job waits for something that this cluster, which is all its own, will never have.
pub(super) async fn never_placed(admin: &Path, job: JobId) -> Failure {
    tokio::time::sleep(PLACED_MAX).await;
    let explained = loop {
        let explained = explain_job(admin, job).await;
        let surveyed = |explained: &Explanation| explained.nodes.iter().all(|(_, line)| line != SURVEYING);
        if explained.as_ref().map_or(true, surveyed) {
            break explained;
        }
        // The coordinator ends a survey after half a minute; the job's own end ends this wait, too.
        tokio::time::sleep(PLACED_MAX).await;
    };
    match explained {
        Ok(explanation) if explanation.job.state == JobState::Queued && explanation.job.world_sizes.is_empty() => {
            let text = explain::render(&explanation);
            Failure::new(Exit::Negative, format!("{job} can never be placed here\n{text}"))
                .help(match explanation.job.serves.is_some() {
                    true => "where the model is missing, fetch it (jobs/models/fetch.py) or write its absolute path; where there is no room, ask for less, or start more nodes with --nodes",
                    false => "ask for less in [resources], or start more nodes with --nodes",
                })
        }
        // It was placed, or the coordinator is away: watching tells what becomes of it.
        Ok(_) | Err(_) => std::future::pending().await,
    }
}

async fn explain_job(admin: &Path, job: JobId) -> Result<Explanation, Failure> {
    let mut client = Client::open_patiently(admin, PATIENCE_WATCHING).await?;
    match client.ask(&Request::Explain { job }, Repeat::Safe).await? {
        Reply::Explained(explanation) => Ok(explanation),
        _ => Err(unexpected()),
    }
}

/// A folder that nothing else has written to: checkpoints of two runs must not mix.
fn make_out(named: Option<&Path>, name: &str) -> Result<PathBuf, Failure> {
    let doing = |path: &Path| format!("make output folder {}", path.display());
    if let Some(named) = named {
        let out = std::path::absolute(named).or_fail(Exit::Usage, doing(named))?;
        std::fs::create_dir_all(&out).or_fail(Exit::Negative, doing(&out))?;
        return Ok(out);
    }
    let base =
        std::path::absolute(Path::new("stoke-runs").join(name)).or_fail(Exit::Usage, "find the current folder")?;
    std::fs::create_dir_all(&base).or_fail(Exit::Negative, doing(&base))?;
    let stamp = stamp();
    for attempt in 1..=100 {
        let out = base.join(if attempt == 1 { stamp.clone() } else { format!("{stamp}-{attempt}") });
        match std::fs::create_dir(&out) {
            Ok(()) => return Ok(out),
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(Failure::from_error(Exit::Negative, error).context(doing(&out))),
        }
    }
    Err(Failure::new(Exit::Conflict, format!("{} has a hundred runs of this second", base.display())))
}

/// Takes an output folder for this run: nothing else writes to it while this lives, and nothing has. The kernel drops it with the process.
fn claim(out: &Path) -> Result<File, Failure> {
    let doing = || format!("claim output folder {}", out.display());
    let folder = File::open(out).or_fail(Exit::Negative, doing())?;
    let problem = if flock(&folder, FlockOperation::NonBlockingLockExclusive) == Err(Errno::WOULDBLOCK) {
        "is used by another run"
    } else if std::fs::read_dir(out).or_fail(Exit::Negative, doing())?.next().is_some() {
        "is not empty"
    } else {
        return Ok(folder);
    };
    Err(Failure::new(Exit::Conflict, format!("output folder {} {problem}", out.display()))
        .help("give --out a new folder: a run never writes over another one's checkpoints"))
}

/// `20261122-170405`, UTC.
fn stamp() -> String {
    let now = time::OffsetDateTime::now_utc();
    let (date, (hour, minute, second)) = (now.date(), now.time().as_hms());
    format!("{:04}{:02}{:02}-{hour:02}{minute:02}{second:02}", date.year(), u8::from(date.month()), date.day())
}

/// A run that failed early leaves no empty folders behind.
fn remove_if_empty(out: &Path) {
    let _ = std::fs::remove_dir(out).and_then(|()| out.parent().map_or(Ok(()), std::fs::remove_dir));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_output_folder_is_never_shared() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("out");
        assert_eq!(make_out(Some(&out), "x").unwrap(), out);
        let first = claim(&out).unwrap();
        assert!(claim(&out).unwrap_err().message().contains("another run"));
        drop(first);
        std::fs::write(out.join("file"), "").unwrap();
        let full = claim(&out).unwrap_err();
        assert_eq!((full.exit, full.message().contains("not empty")), (Exit::Conflict, true));
    }
}
