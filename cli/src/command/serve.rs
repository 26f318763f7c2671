//! `stoke serve`: a model that answers requests, on the cluster; and `stoke run` of such a spec, on a cluster of its own. Owns the wait until it
//! answers and what people are told then; asks no model anything itself.

use std::cell::RefCell;
use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use stoke_protocol::ids::JobId;
use stoke_protocol::message::client::{JobState, JobView, NodeState, NodeView, Reply, Request};
use stoke_protocol::spec::JobSpec;

use super::run::{hear, never_placed};
use super::{connect, revision, stop_signal, submit, up};
use crate::Global;
use crate::chaos::schedule;
use crate::client::{Client, PATIENCE_WATCHING, Repeat, unexpected};
use crate::detection::Detection;
use crate::example::{self, Question};
use crate::failure::{Exit, Failure, OrFail};
use crate::local::folder::Folder;
use crate::local::gateways::GatewayFiles;
use crate::local::handle::{Life, LocalCluster, Wish};
use crate::local::supervisor::end_orphans;
use crate::progress::Progress;
use crate::spec::{self, SpecArgs};
use crate::{named, output, place, report};

/// Between two looks at the job: a watch of it ends with the job only. How long a model takes to load, or to find room, nobody here knows: Ctrl-C ends
/// the wait, --timeout and the end of the job do.
const LOOK_EVERY: Duration = Duration::from_millis(100);

const EXAMPLES: &str = "\
Examples:
  python3 jobs/models/fetch.py smollm2-135m-instruct     once, on every node
  stoke serve jobs/specs/serve-smollm2.toml
  stoke serve SPEC --replicas 2                  two jobs that share the requests
  stoke serve SPEC --set serve.replicas.max=4    as many jobs as the requests need, up to four
  stoke serve NEW --set serve.share=0.1          a tenth of the requests, to try another revision
  stoke serve promote job-2                      it is good: all requests, and the others leave
  stoke serve rollback smollm2-135m-instruct     it is not
  curl -s http://GATEWAY/v1/chat/completions -H 'content-type: application/json' -d '
    {\"model\": \"smollm2-135m-instruct\", \"max_tokens\": 100, \"temperature\": 0,
     \"messages\": [{\"role\": \"user\", \"content\": \"What is a TLS certificate?\"}]}'

Ends with 0 when the model answers; it goes on serving until `stoke cancel JOB`. Ends with 1 when the job can never answer, for example
because no node has its model, or --timeout is over.";

/// Serve a model on the cluster, and wait until it answers
///
/// Every node has a gateway that speaks the OpenAI API (/v1) and the Open Inference Protocol (/v2).
#[derive(clap::Args, Debug)]
#[command(after_help = EXAMPLES, args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub struct Args {
    #[command(subcommand)]
    command: Option<Serve>,

    /// The job spec (TOML) with a section [serve]; `-` reads it from standard input
    #[arg(value_name = "SPEC", required = true)]
    spec: Option<PathBuf>,

    /// Change a key of the spec, e.g. `--set serve.stages=2`; repeatable
    #[arg(long = "set", value_name = "KEY=VALUE")]
    sets: Vec<String>,

    /// Idempotency key: the same key with the same spec is the same job [default: a fresh one]
    #[arg(long, value_name = "KEY")]
    key: Option<String>,

    /// Submit so many jobs, with the keys KEY-1 to KEY-N, and wait until all of them answer
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1000))]
    replicas: Option<u32>,

    /// How long to wait for the model to answer, e.g. 90s or 5m; the job comes up all the same [default: as long as it takes]
    #[arg(long, value_name = "TIME", value_parser = schedule::duration)]
    timeout: Option<Duration>,
}

#[derive(clap::Subcommand, Debug)]
enum Serve {
    Promote(revision::Promote),
    Rollback(revision::Rollback),
}

pub async fn run(args: Args, global: &Global) -> Result<Exit, Failure> {
    match args.command {
        Some(Serve::Promote(promote)) => return revision::promote(promote, global).await,
        Some(Serve::Rollback(rollback)) => return revision::rollback(rollback, global).await,
        None => {}
    }
    let began = Instant::now();
    let spec = args.spec.ok_or_else(|| Failure::usage("give a SPEC, or `promote` or `rollback`"))?;
    let job_spec = spec::prepare(&SpecArgs { spec, ranks: None, sets: args.sets, resume: None })?;
    let Some(mut wanted) = Wanted::of(&job_spec) else {
        return Err(Failure::usage("the spec has no section [serve]").help("`stoke submit` is for jobs that train"));
    };
    let mut client = connect(global).await?.with_patience(PATIENCE_WATCHING);
    let known = Folder::new(&place::cluster_dir(global.cluster.as_deref())?).read_state();
    wanted.door = known.map(|state| state.gateways).unwrap_or_default();
    let interrupted = stop_signal()?;
    let key = args.key.unwrap_or_else(submit::fresh_key);
    let before = named::serving(&mut client, &wanted.model).await?;
    let mut jobs = Vec::new();
    for key in keys(&key, args.replicas) {
        jobs.push(submit::submit(&mut client, &key, &job_spec).await?.0);
    }
    if let Some(words) = named::beside(&wanted.model, &before, &jobs) {
        output::say(words);
    }
    let progress = RefCell::new(Progress::new());
    let all = async {
        let mut served = Vec::with_capacity(jobs.len());
        for job in &jobs {
            served.push(until_it_answers(&mut client, *job, &progress).await?);
        }
        Ok::<_, Failure>(served)
    };
    let timeout = args.timeout.unwrap_or(Duration::MAX);
    let left = |exit: Exit, what: String| {
        let names = jobs.iter().map(JobId::to_string).collect::<Vec<_>>().join(", ");
        let failure = Failure::new(exit, format!("{what}; {names}: coming up all the same"));
        failure.help("`stoke explain JOB` shows how far one is, `stoke cancel JOB` ends it")
    };
    let served = tokio::select! {
        served = tokio::time::timeout(timeout, all) => {
            served.map_err(|_| left(Exit::Negative, format!("no answer within {timeout:?}")))??
        }
        () = interrupted => return Err(left(Exit::Interrupted, "interrupted".to_owned())),
    };
    progress.borrow().finish();
    tell(&served, &wanted, began.elapsed(), global.json)?;
    Ok(Exit::Ok)
}

/// One for each replica; the key itself where nobody has asked for replicas.
fn keys(key: &str, replicas: Option<u32>) -> Vec<String> {
    match replicas {
        Some(replicas) => (1..=replicas).map(|number| format!("{key}-{number}")).collect(),
        None => vec![key.to_owned()],
    }
}

/// What a spec serves.
struct Wanted {
    /// As clients name it.
    model: String,
    question: Question,
    /// Of the cluster's gateways.
    door: GatewayFiles,
}

impl Wanted {
    fn of(job_spec: &JobSpec) -> Option<Self> {
        let serve = job_spec.serve.as_ref()?;
        let model = serve.name.clone().unwrap_or_else(|| job_spec.name.clone());
        Some(Self { model, question: Question::of(serve.task, &serve.model), door: GatewayFiles::default() })
    }
}

/// A job whose model answers.
struct Served {
    job: JobId,
    /// URLs.
    gateways: Vec<String>,
    view: JobView,
}

/// On a cluster of its own that ends with this command.
pub async fn here(job_spec: &JobSpec, nodes: u32, keep: bool, global: &Global) -> Result<Exit, Failure> {
    let interrupted = stop_signal()?;
    let mut builder = tempfile::Builder::new();
    // It holds the keys of a cluster, whatever the umask.
    builder.prefix("stoke-run-").permissions(Permissions::from_mode(0o700));
    let dir = builder.tempdir().or_fail(Exit::Negative, "make a temporary folder")?;
    let life = if keep { Life::OursKeepFolder } else { Life::Ours };
    let folder = Folder::new(dir.path());
    let (detection, gateways) = (Detection::Default, GatewayFiles::default());
    let wish = Wish { nodes, listen: up::any_port(), metrics: None, api: None, otlp: None, detection, gateways, life };
    let mut cluster = LocalCluster::start(&folder, &wish)?;
    let progress = RefCell::new(Progress::new());
    let ended = tokio::select! {
        // Whoever stops it has seen enough: that is how it ends.
        () = interrupted => Ok(Exit::Ok),
        ended = drive(&folder, job_spec, nodes, &mut cluster, (&progress, global.json)) => ended,
    };
    progress.borrow().finish();
    cluster.end().await;
    if keep {
        output::say(format_args!("the cluster's folder is kept: {}", dir.keep().display()));
    } else {
        // A supervisor that was killed has left this to us.
        end_orphans(&folder, nodes);
        let _ = std::fs::remove_dir_all(dir.path());
    }
    ended
}

/// Until the job ends, which nobody expects.
async fn drive(
    folder: &Folder,
    job_spec: &JobSpec,
    nodes: u32,
    cluster: &mut LocalCluster,
    (progress, as_json): (&RefCell<Progress>, bool),
) -> Result<Exit, Failure> {
    let began = Instant::now();
    let text = format!("starting a coordinator and {} on this machine", output::count(nodes, "node"));
    progress.borrow().note(&text);
    cluster.ready(folder).await?;
    let admin: &Path = &folder.coordinator().join("admin");
    let mut client = Client::open_patiently(admin, PATIENCE_WATCHING).await?;
    let (job, _) = submit::submit(&mut client, &submit::fresh_key(), job_spec).await?;
    let wanted = Wanted::of(job_spec).expect("`stoke run` gives jobs that serve to this file");
    let served = async {
        let served = until_it_answers(&mut client, job, progress)
            .await
            .map_err(|failure| failure.help("`stoke run --keep` keeps the cluster's folder, with the ranks' logs"))?;
        progress.borrow().finish();
        tell(&[served], &wanted, began.elapsed(), as_json)?;
        output::say("serving until Ctrl-C");
        let mut client = Client::open_patiently(admin, PATIENCE_WATCHING).await?;
        let mut lines = Progress::new();
        let view = client.watch(&Request::Watch { job }, |sight| lines.show(sight)).await?;
        output::print(&report::summary(&view))?;
        Ok(Exit::Negative)
    };
    let restarts = RefCell::new(0);
    tokio::select! {
        ended = served => ended,
        failure = hear(cluster, progress, &restarts) => Err(failure),
        failure = never_placed(admin, job) => Err(failure),
    }
}

/// Looks at the job until its gang has shown that it answers, or it has ended.
async fn until_it_answers(client: &mut Client, job: JobId, progress: &RefCell<Progress>) -> Result<Served, Failure> {
    let mut told = String::new();
    loop {
        let Reply::Job(view) = client.ask(&Request::Job { job }, Repeat::Safe).await? else { return Err(unexpected()) };
        if view.state.is_terminal() {
            let failure = Failure::new(Exit::Negative, format!("{job} has ended: {}", view.reason));
            return Err(failure.help(format!("`stoke explain {job}` and `stoke logs {job}` say more")));
        }
        if view.serves.as_ref().is_some_and(|serves| serves.ready) {
            let Reply::Nodes(nodes) = client.ask(&Request::Nodes, Repeat::Safe).await? else {
                return Err(unexpected());
            };
            return Ok(Served { job, gateways: gateways(&nodes), view: *view });
        }
        let text = match view.state {
            JobState::Queued if view.reason.is_empty() => String::new(),
            JobState::Queued => format!("{job} waits: {}", view.reason),
            _ => format!("{job} loads the model on {}", places(&view)),
        };
        if text != told && !text.is_empty() {
            progress.borrow().note(&text);
            told = text;
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

/// Of nodes that are up.
fn gateways(nodes: &[NodeView]) -> Vec<String> {
    let up = nodes.iter().filter(|node| !matches!(node.state, NodeState::Lost | NodeState::Silent));
    up.filter_map(|node| node.gateway.clone()).collect()
}

fn places(view: &JobView) -> String {
    let nodes: std::collections::BTreeSet<String> = view.placement.iter().map(|(_, node)| node.to_string()).collect();
    nodes.into_iter().collect::<Vec<_>>().join(", ")
}

fn tell(served: &[Served], wanted: &Wanted, took: Duration, as_json: bool) -> Result<(), Failure> {
    let Wanted { model, question, door } = wanted;
    let Served { job, gateways, .. } = served.last().expect("a command serves at least one job");
    let ranks: usize = served.iter().map(|served| served.view.placement.len()).sum();
    let seconds = took.as_secs_f64();
    if as_json {
        return output::print_json(&serde_json::json!({
            "job": job.to_string(), "jobs": served.iter().map(|served| served.job.to_string()).collect::<Vec<_>>(),
            "model": model, "gateways": gateways, "ranks": ranks, "ready_after_seconds": seconds,
        }));
    }
    let mut table = output::Table::bare();
    for Served { job, view, .. } in served {
        table.row(["model".into(), format!("{model}, {job}, on {}", places(view))]);
    }
    table.row(["ready after".into(), format!("{seconds:.2} s")]);
    let Some(first) = gateways.first() else {
        table.row(["gateways".into(), "no node has one: start agents with --gateway ADDR".into()]);
        return output::print(&table.render());
    };
    table.row(["gateways".into(), gateways.join(" ")]);
    table.row(["try".into(), example::request((model, *question), first, door)]);
    output::print(&table.render())
}
