//! `stoke serve promote` and `stoke serve rollback`: a revision of a model takes over, or is taken back. Also what is said of who serves a model.

use stoke_protocol::ids::JobId;
use stoke_protocol::message::client::{JobView, Reply, Request};

use super::connect;
use crate::Global;
use crate::client::{Client, Repeat, unexpected};
use crate::failure::{Exit, Failure};
use crate::{named, output};

const PROMOTE_EXAMPLES: &str = "\
Examples:
  stoke serve new.toml --set serve.share=0.1      # job-7 gets a tenth of the new requests
  stoke serve promote job-7                       # now it gets all of them, and the others leave
  stoke serve promote smollm2-135m-instruct       # the same, where only job-7 is tried";

const ROLLBACK_EXAMPLES: &str = "\
Examples:
  stoke serve new.toml --set serve.share=0.1
  stoke serve rollback smollm2-135m-instruct      # as it was before";

/// Let a revision have all requests of its model: its share or shadow ends, and jobs of other revisions leave
///
/// Jobs that leave take no new requests, end the answers that they have begun (for up to ten minutes), and are cancelled then.
#[derive(clap::Args, Debug)]
#[command(after_help = PROMOTE_EXAMPLES)]
pub struct Promote {
    /// A job of the revision; the others of the same revision are promoted with it. Or the model, where one job has a share or a shadow
    #[arg(value_name = "JOB|MODEL")]
    job: String,
}

/// Take back what is tried: jobs of a model with a share or a shadow leave
///
/// Answers that they have begun are ended (for up to ten minutes); then they are cancelled.
#[derive(clap::Args, Debug)]
#[command(after_help = ROLLBACK_EXAMPLES)]
pub struct Rollback {
    /// The model, as clients name it; or a job that serves it
    #[arg(value_name = "MODEL|JOB")]
    model: String,
}

pub async fn promote(args: Promote, global: &Global) -> Result<Exit, Failure> {
    let mut client = connect(global).await?;
    let job = match args.job.parse() {
        Ok(job) => job,
        Err(_) => tried(&mut client, &args.job).await?,
    };
    let before = match named::jobs(&mut client, &job.to_string()).await?.pop().and_then(|view| view.serves) {
        Some(serves) => named::serving(&mut client, &serves.model).await?,
        None => Vec::new(),
    };
    // R2: those that are not tried are of one revision.
    let is_done = before.iter().any(|view| view.job == job) && !before.iter().any(named::is_tried);
    let nothing = is_done.then(|| format!("{} had all new requests before", named::ids(&before)));
    change_or_not(&mut client, (Request::Promote { job }, nothing), global).await
}

/// The one job of a model that may be promoted.
async fn tried(client: &mut Client, model: &str) -> Result<JobId, Failure> {
    let serving = named::serving(client, model).await?;
    let tried: Vec<&JobView> = serving.iter().filter(|view| named::is_tried(view)).collect();
    match tried[..] {
        [view] => Ok(view.job),
        [] if serving.is_empty() => {
            Err(Failure::new(Exit::NotFound, format!("no job serves {model:?}"))
                .help("`stoke jobs` shows what is served"))
        }
        [] => Err(Failure::new(
            Exit::Conflict,
            format!("no job of {model} has a share or a shadow: nothing waits to be promoted"),
        )
        .help(format!(
            "{} has all its requests; `stoke serve SPEC --set serve.share=0.1` tries another revision",
            named::ids(&serving)
        ))),
        ref several => Err(named::ambiguous(model, several)),
    }
}

pub async fn rollback(args: Rollback, global: &Global) -> Result<Exit, Failure> {
    let mut client = connect(global).await?;
    let model = named::model(&mut client, &args.model).await?;
    let nothing = !named::serving(&mut client, &model).await?.iter().any(named::is_tried);
    let nothing = nothing.then(|| {
        format!(
            "no job of {model} has a share or a shadow. What was promoted is taken back by its predecessor's spec: \
             serve that with --set serve.share=0.1, then promote it"
        )
    });
    change_or_not(&mut client, (Request::Rollback { model }, nothing), global).await
}

/// Asks for a change of who serves a model, and says what came of it.
pub async fn change(client: &mut Client, request: Request, global: &Global) -> Result<Exit, Failure> {
    change_or_not(client, (request, None), global).await
}

/// With the reason, where there was nothing to change. It is asked all the same: whether a caller may is not known here.
async fn change_or_not(
    client: &mut Client,
    (request, nothing): (Request, Option<String>),
    global: &Global,
) -> Result<Exit, Failure> {
    let reply = client.ask(&request, Repeat::Safe).await?;
    let Reply::Serving { model, jobs, added, leaving } = reply else { return Err(unexpected()) };
    if global.json {
        let texts = |jobs: &[JobId]| -> Vec<String> { jobs.iter().map(JobId::to_string).collect() };
        output::print_json(&serde_json::json!({
            "model": model, "jobs": texts(&jobs), "added": texts(&added), "leaving": texts(&leaving), "nothing": nothing,
        }))?;
        return Ok(Exit::Ok);
    }
    let mut text = nothing.map(|why| format!("nothing was changed: {why}\n")).unwrap_or_default();
    text += &format!("{model} is served by {}\n", list(&jobs));
    if !added.is_empty() {
        text += &format!("new: {}; `stoke status JOB` shows how far they are\n", list(&added));
    }
    if !leaving.is_empty() {
        text += &format!("leaving, when their answers are over: {}\n", list(&leaving));
    }
    output::print(&text)?;
    Ok(Exit::Ok)
}

fn list(jobs: &[JobId]) -> String {
    jobs.iter().map(JobId::to_string).collect::<Vec<_>>().join(", ")
}
