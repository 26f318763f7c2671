//! Which job or model people mean: a job by its id, by the model that it serves, or by its own name. Owns the look-up and the words for names that mean
//! nothing or too much; changes nothing.

use stoke_protocol::ids::JobId;
use stoke_protocol::message::client::{JobView, Reply, Request, ServesView};
use stoke_protocol::message::serve::Traffic;

use crate::client::{Client, Repeat, unexpected};
use crate::failure::{Exit, Failure};
use crate::{json, output};

/// Names in an error; who has more asks `stoke jobs`.
const SHOWN_MAX: usize = 8;

/// Which jobs a name may stand for. An id stands for its job in any case.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Among {
    /// Those that have not ended.
    Living,
    /// Or, where none of them has the name, the newest that has ended: to look at what became of it.
    All,
}

/// The one job that is meant.
pub async fn job(client: &mut Client, text: &str, among: Among) -> Result<JobId, Failure> {
    if let Ok(job) = text.parse() {
        return Ok(job);
    }
    let views = list(client).await?;
    match matching(text, &views, among)?[..] {
        [job] => Ok(job.job),
        ref several => Err(ambiguous(text, several)),
    }
}

/// All jobs that are meant, oldest first: one by its id, those that serve the model or have the name otherwise.
pub async fn jobs(client: &mut Client, text: &str) -> Result<Vec<JobView>, Failure> {
    if let Ok(job) = text.parse() {
        return Ok(vec![view(client, job).await?]);
    }
    let views = list(client).await?;
    Ok(matching(text, &views, Among::All)?.into_iter().cloned().collect())
}

/// The model that is meant: by its own name, or by a job that serves it. Whether anybody serves it the coordinator says.
pub async fn model(client: &mut Client, text: &str) -> Result<String, Failure> {
    let Ok(job) = text.parse() else { return Ok(text.to_owned()) };
    match view(client, job).await?.serves {
        Some(serves) => Ok(serves.model),
        None => {
            Err(Failure::usage(format!("{job} trains, and serves no model")).help("`stoke jobs` shows what is served"))
        }
    }
}

/// Jobs that serve a model and get its requests, or a share or a copy of them; oldest first.
pub async fn serving(client: &mut Client, model: &str) -> Result<Vec<JobView>, Failure> {
    let mut views: Vec<JobView> = list(client).await?.into_iter().filter(|view| serves(view, model)).collect();
    views.retain(|view| is_living(view) && view.traffic != Some(Traffic::Leaving));
    Ok(views)
}

/// What to say of jobs that were submitted for a model, where they are replicas of others: whoever serves a spec twice may not have meant that.
pub fn beside(model: &str, before: &[JobView], jobs: &[JobId]) -> Option<String> {
    let new: Vec<String> =
        jobs.iter().filter(|job| before.iter().all(|view| view.job != **job)).map(JobId::to_string).collect();
    let regular = before.iter().filter(|view| !is_tried(view));
    let there = ids(regular);
    (!new.is_empty() && !there.is_empty()).then(|| {
        let new = new.join(", ");
        format!("{model} is served by {there} already: {new} comes beside it; `stoke cancel JOB` takes one back")
    })
}

/// Whether a job has a share or a shadow: it is tried, and may be promoted or rolled back.
pub fn is_tried(view: &JobView) -> bool {
    matches!(view.traffic, Some(Traffic::Share { .. } | Traffic::Shadow))
}

pub fn ids<'a>(views: impl IntoIterator<Item = &'a JobView>) -> String {
    views.into_iter().map(|view| view.job.to_string()).collect::<Vec<_>>().join(", ")
}

/// A name that several jobs have, where one is needed.
pub fn ambiguous(text: &str, several: &[&JobView]) -> Failure {
    let each: Vec<String> = several.iter().take(SHOWN_MAX).map(|view| told(view)).collect();
    let more = several.len().saturating_sub(SHOWN_MAX);
    let more = if more == 0 { String::new() } else { format!(", and {more} more") };
    let jobs = output::count(several.len() as u64, "job");
    Failure::usage(format!("{text:?} is the name of {jobs}: {}{more}", each.join(", ")))
        .help(format!("name one of them, for example {}", several[0].job))
}

async fn list(client: &mut Client) -> Result<Vec<JobView>, Failure> {
    let Reply::Jobs(views) = client.ask(&Request::Jobs, Repeat::Safe).await? else { return Err(unexpected()) };
    let mut views: Vec<JobView> = views.into_iter().collect();
    views.sort_by_key(|view| view.job);
    Ok(views)
}

async fn view(client: &mut Client, job: JobId) -> Result<JobView, Failure> {
    match client.ask(&Request::Job { job }, Repeat::Safe).await? {
        Reply::Job(view) => Ok(*view),
        _ => Err(unexpected()),
    }
}

/// At least one. A model's name goes before the name of a job.
fn matching<'v>(text: &str, views: &'v [JobView], among: Among) -> Result<Vec<&'v JobView>, Failure> {
    let named = |view: &JobView| view.name == text;
    let of_model: Vec<&JobView> = views.iter().filter(|view| serves(view, text)).collect();
    let of_name: Vec<&JobView> = views.iter().filter(|view| named(view)).collect();
    for found in [&of_model, &of_name] {
        let living: Vec<&JobView> = found.iter().copied().filter(|view| is_living(view)).collect();
        if !living.is_empty() {
            return Ok(living);
        }
    }
    let newest = of_model.last().or(of_name.last());
    match (newest, among) {
        (Some(ended), Among::All) => Ok(vec![ended]),
        (Some(ended), Among::Living) => Err(Failure::new(
            Exit::NotFound,
            format!("no job is {text:?} any more: {} is {}", ended.job, json::job_state(ended.state)),
        )
        .help(format!("`stoke explain {}` tells what became of it", ended.job))),
        (None, _) => Err(unknown(text, views)),
    }
}

/// Says what there is instead.
fn unknown(text: &str, views: &[JobView]) -> Failure {
    let mut there: Vec<String> = Vec::new();
    for view in views.iter().rev().filter(|view| is_living(view)) {
        let name = told(view);
        if there.len() < SHOWN_MAX && !there.contains(&name) {
            there.push(name);
        }
    }
    let failure = Failure::new(Exit::NotFound, format!("no job is {text:?}, and no model that is served"));
    match there.is_empty() {
        true => failure.help("nothing runs or waits; `stoke jobs --all` lists what has ended"),
        false => failure.help(format!("there is {}; `stoke jobs` lists all", there.join(", "))),
    }
}

/// A job with what it is for, and what sets it apart from others of its model.
fn told(view: &JobView) -> String {
    let what = match (&view.serves, view.traffic) {
        (Some(ServesView { model, .. }), Some(traffic @ Traffic::Share { .. })) => {
            format!("{model}, a share of {}", json::share(traffic).unwrap_or_default())
        }
        (Some(ServesView { model, .. }), Some(Traffic::Shadow)) => format!("{model}, a shadow"),
        (Some(ServesView { model, .. }), Some(Traffic::Leaving)) => format!("{model}, leaving"),
        (Some(ServesView { model, .. }), Some(Traffic::Rest) | None) => model.clone(),
        (None, _) => view.name.clone(),
    };
    format!("{} ({what})", view.job)
}

fn serves(view: &JobView, model: &str) -> bool {
    view.serves.as_ref().is_some_and(|serves| serves.model == model)
}

fn is_living(view: &JobView) -> bool {
    !view.state.is_terminal()
}

#[cfg(test)]
pub mod tests {
    use stoke_protocol::ids::Generation;
    use stoke_protocol::message::client::JobState;
    use stoke_protocol::spec::{Precision, Task};

    use super::*;

    /// A job that runs; it serves if there is a model.
    pub fn job(id: u64, name: &str, model: Option<&str>) -> JobView {
        let serves = model.map(|model| ServesView {
            model: model.into(),
            task: Task::Generate,
            weights: "/m".into(),
            precision: Precision::Rounded,
            ready: true,
            load: None,
            replicas: 1,
            answering: 1,
            held: 0,
            scale: None,
        });
        JobView {
            job: JobId(id),
            name: name.into(),
            trainer: String::new(),
            exec: None,
            traffic: serves.as_ref().map(|_| Traffic::Rest),
            serves,
            owner: "admin".into(),
            state: JobState::Running,
            reason: String::new(),
            priority: 0,
            generation: Generation(1),
            failures: 0,
            recoveries: 0,
            preemptions: 0,
            world_sizes: Vec::new().into(),
            placement: Vec::new().into(),
            progress: None,
            slow: Vec::new().into(),
            checkpoint: None,
            outcome: None,
            submitted_ms: 0,
            started_ms: None,
            ended_ms: None,
        }
    }

    pub fn ended(job: JobView) -> JobView {
        JobView { state: JobState::Cancelled, ..job }
    }

    fn found(text: &str, views: &[JobView], among: Among) -> Result<Vec<u64>, (Exit, String)> {
        let found = matching(text, views, among);
        found
            .map(|found| found.iter().map(|view| view.job.0).collect())
            .map_err(|failure| (failure.exit, format!("{} {}", failure.message(), failure.help_text())))
    }

    #[test]
    fn a_name_means_those_that_live_and_a_model_goes_before_a_name() {
        let views = [
            ended(job(1, "s", Some("chat"))),
            job(2, "s", Some("chat")),
            job(3, "chat", None),
            job(4, "s", Some("e")),
            job(5, "digits", None),
        ];
        assert_eq!(found("chat", &views, Among::All), Ok(vec![2]));
        assert_eq!(found("digits", &views, Among::Living), Ok(vec![5]));
        assert_eq!(found("s", &views, Among::Living), Ok(vec![2, 4]));
        let both: Vec<&JobView> = views[1..4].iter().collect();
        let said = ambiguous("s", &both);
        assert_eq!(said.message(), "\"s\" is the name of 3 jobs: job-2 (chat), job-3 (chat), job-4 (e)");
    }

    #[test]
    fn a_name_of_what_has_ended_is_for_those_who_only_look() {
        let views = [ended(job(1, "s", Some("chat"))), ended(job(2, "s", Some("chat"))), job(3, "digits", None)];
        assert_eq!(found("chat", &views, Among::All), Ok(vec![2]));
        let (exit, said) = found("chat", &views, Among::Living).unwrap_err();
        assert!(exit == Exit::NotFound && said.contains("job-2 is cancelled"), "{said}");
        let (exit, said) = found("nothing", &views, Among::All).unwrap_err();
        assert!(exit == Exit::NotFound && said.contains("there is job-3 (digits)"), "{said}");
    }

    #[test]
    fn a_model_that_is_served_twice_is_told_of() {
        let before = [job(1, "s", Some("chat"))];
        assert_eq!(beside("chat", &[], &[JobId(2)]), None);
        assert_eq!(beside("chat", &before, &[JobId(1)]), None, "the same key");
        let said = beside("chat", &before, &[JobId(2), JobId(3)]).expect("words");
        assert!(said.contains("served by job-1 already: job-2, job-3 comes beside it"), "{said}");
    }

    #[test]
    fn what_sets_jobs_of_a_model_apart_is_said() {
        let canary = JobView { traffic: Some(Traffic::Share { millionths: 100_000 }), ..job(2, "s", Some("chat")) };
        assert_eq!((told(&canary), is_tried(&canary)), ("job-2 (chat, a share of 0.1)".into(), true));
        assert_eq!(told(&job(3, "digits", None)), "job-3 (digits)");
    }
}
