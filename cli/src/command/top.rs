//! `stoke top`: the cluster on a terminal, looked at every second. Owns the terminal while it runs, and gives it back however it ends.

use std::io::IsTerminal;
use std::time::Duration;

use ratatui::Terminal;
use ratatui::backend::TestBackend;
use stoke_protocol::ids::JobId;
use stoke_protocol::message::client::{Reply, Request};
use tokio::sync::{mpsc, watch};

use super::{connect, stop_signal};
use crate::Global;
use crate::client::{Client, Repeat, unexpected};
use crate::failure::{Exit, Failure, OrFail};
use crate::top::draw::draw;
use crate::top::model::{Model, Seen, Turn};
use crate::top::screen::{Screen, keys};
use crate::{json, output};

const EXAMPLES: &str = "\
Examples:
  stoke top                 # q ends it, ? names the keys
  stoke top --once          # one picture as text, for scripts
  stoke top --json | jq '.nodes[].cpu_load'";

const EVERY: Duration = Duration::from_secs(1);
/// Jobs that have ended, besides those that wait or run.
const ENDED_SHOWN: u32 = 20;
/// Of so many jobs, the newest that run, the curve since their beginning is asked for; of others it begins with the first look.
const CURVES_ASKED_MAX: usize = 16;
/// Of the picture of `--once`.
const ONCE: (u16, u16) = (120, 40);
/// Looks and keys that wait to be drawn.
const WAITING_MAX: usize = 16;

/// See the cluster on this terminal: nodes with their devices, jobs with their curves, what happens
#[derive(clap::Args, Debug)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// Print one picture as text and end
    #[arg(long)]
    once: bool,
}

pub async fn run(args: Args, global: &Global) -> Result<Exit, Failure> {
    let watches = !args.once && !global.json;
    if watches && !(std::io::stdout().is_terminal() && std::io::stdin().is_terminal()) {
        return Err(Failure::usage("this is no terminal").help("`stoke top --once` prints one picture as text"));
    }
    let mut client = connect(global).await?;
    let mut model = Model::default();
    if !watches {
        let seen = look(&mut client, &model.wish()).await?;
        if global.json {
            output::print_json(&seen_json(&seen))?;
            return Ok(Exit::Ok);
        }
        model.take(Ok(seen));
        output::print(&picture(&model))?;
        return Ok(Exit::Ok);
    }
    // A coordinator that is away is told at once, and asked again at the next look.
    let client = client.with_patience(Duration::ZERO);
    let stop = stop_signal()?;
    let mut terminal = Terminal::new(Screen::take()).or_fail(Exit::Negative, "take the terminal")?;
    tokio::select! {
        ended = show(&mut terminal, model, client) => ended.map(|()| Exit::Ok),
        () = stop => Ok(Exit::Interrupted),
    }
}

/// What is to be looked at besides everything.
#[derive(Clone, Default, PartialEq, Eq, Debug)]
pub struct Wish {
    /// The job whose page is open.
    pub job: Option<JobId>,
    /// The newest entry that is known.
    pub after: stoke_protocol::ids::LogIndex,
    /// Jobs whose curves are known.
    pub curves: std::collections::BTreeSet<JobId>,
}

async fn show(terminal: &mut Terminal<Screen>, mut model: Model, client: Client) -> Result<(), Failure> {
    let (wish, wishes) = watch::channel(model.wish());
    let (looks, mut looked) = mpsc::channel(WAITING_MAX);
    tokio::spawn(look_on(client, wishes, looks));
    let mut keys = keys();
    loop {
        terminal.draw(|frame| draw(frame, &model)).or_fail(Exit::Negative, "draw on the terminal")?;
        tokio::select! {
            seen = looked.recv() => match seen {
                Some(seen) => model.take(seen),
                None => return Ok(()),
            },
            key = keys.recv() => match key.map(|key| model.press(&key)) {
                Some(Turn::On) => {}
                Some(Turn::End) | None => return Ok(()),
            },
        }
        let wanted = model.wish();
        wish.send_if_modified(|wish| {
            let opened = wish.job != wanted.job;
            *wish = wanted;
            opened
        });
    }
}

/// Looks every second, and at once when another job is opened.
async fn look_on(mut client: Client, mut wishes: watch::Receiver<Wish>, looks: mpsc::Sender<Result<Seen, Failure>>) {
    let mut ticks = tokio::time::interval(EVERY);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            _ = ticks.tick() => {}
            changed = wishes.changed() => if changed.is_err() {
                return;
            },
        }
        let wish = wishes.borrow_and_update().clone();
        if looks.send(look(&mut client, &wish).await).await.is_err() {
            return;
        }
    }
}

async fn look(client: &mut Client, wish: &Wish) -> Result<Seen, Failure> {
    let mut ask = async |request: Request| client.ask(&request, Repeat::Safe).await;
    let Reply::Pulse(pulse) = ask(Request::Pulse { after: wish.after }).await? else { return Err(unexpected()) };
    let Reply::Nodes(nodes) = ask(Request::Nodes).await? else { return Err(unexpected()) };
    let Reply::Jobs(jobs) = ask(Request::Recent { ended: ENDED_SHOWN }).await? else { return Err(unexpected()) };
    let mut curves = Vec::new();
    let training = jobs.iter().filter(|job| job.progress.is_some() && !wish.curves.contains(&job.job));
    for job in training.map(|job| job.job).take(CURVES_ASKED_MAX) {
        let Reply::History(points) = ask(Request::History { job, after_ms: 0 }).await? else {
            return Err(unexpected());
        };
        curves.push((job, points));
    }
    let detail = match wish.job {
        Some(job) => match ask(Request::Explain { job }).await? {
            Reply::Explained(explanation) => Some(Box::new(explanation)),
            _ => return Err(unexpected()),
        },
        None => None,
    };
    Ok(Seen { pulse, nodes, jobs, curves, detail })
}

fn seen_json(seen: &Seen) -> serde_json::Value {
    let nodes: Vec<_> = seen.nodes.iter().map(json::node).collect();
    let jobs: Vec<_> = seen.jobs.iter().map(json::job).collect();
    serde_json::json!({ "cluster": json::pulse(&seen.pulse), "nodes": nodes, "jobs": jobs })
}

/// One picture, without what only a terminal has.
fn picture(model: &Model) -> String {
    let Ok(mut terminal) = Terminal::new(TestBackend::new(ONCE.0, ONCE.1));
    let Ok(_) = terminal.draw(|frame| draw(frame, model));
    let buffer = terminal.backend().buffer();
    let line = |y| (0..ONCE.0).map(|x| buffer[(x, y)].symbol()).collect::<String>().trim_end().to_owned();
    let text: Vec<String> = (0..ONCE.1).map(line).collect();
    format!("{}\n", text.join("\n").trim_end())
}
