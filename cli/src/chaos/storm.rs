//! Runs a schedule on a local cluster while jobs train: strikes when the plan says so, follows the jobs, and gives the account. Owns the clock
//! of a chaos run; touches no process itself.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::convert::Infallible;
use std::time::{Duration, Instant};

use stoke_protocol::ids::JobId;
use stoke_protocol::message::client::{Explanation, Reply, Request};
use tokio::time::timeout;

use super::account::Account;
use super::blows::{Blows, Struck};
use super::course::Course;
use super::plan::Plan;
use super::schedule::Schedule;
use crate::client::{Client, Repeat, unexpected};
use crate::failure::Failure;
use crate::local::folder::Folder;
use crate::output;

/// A blow is late by no more than this.
const TICK: Duration = Duration::from_millis(20);
/// Between two looks at the jobs: some for each report of a rank.
const LOOK_EVERY: Duration = Duration::from_millis(200);
/// A coordinator that was killed answers nobody: a fresh connection finds the next one sooner.
const ANSWER_MAX: Duration = Duration::from_secs(1);

pub struct Storm {
    folder: Folder,
    schedule: String,
    seed: u64,
    /// The only job that is followed; otherwise all that are not over.
    job: Option<JobId>,
    began: Instant,
    plan: RefCell<Plan>,
    blows: RefCell<Blows>,
    courses: RefCell<BTreeMap<JobId, Course>>,
}

impl Storm {
    /// Begins now.
    pub fn new(folder: &Folder, schedule: &Schedule, seed: u64, job: Option<JobId>) -> Self {
        Self {
            folder: folder.clone(),
            schedule: schedule.text.clone(),
            seed,
            job,
            began: Instant::now(),
            plan: RefCell::new(Plan::new(schedule, seed)),
            blows: RefCell::new(Blows::new(folder.clone())),
            courses: RefCell::new(BTreeMap::new()),
        }
    }

    /// Strikes and follows until it is dropped; resolves only when the cluster is gone.
    pub async fn rage(&self, note: impl Fn(&str)) -> Failure {
        tokio::select! {
            failure = self.strike(note) => failure,
            never = self.follow() => match never {},
        }
    }

    /// Ends the pauses, waits at most `patience` until everybody is back and every job goes on, then adds up.
    pub async fn settle(&self, patience: Duration) -> Account {
        self.blows.borrow_mut().resume(self.began.elapsed());
        let calm = async {
            let mut client = None;
            loop {
                let looked = timeout(ANSWER_MAX, self.look(&mut client)).await;
                self.blows.borrow_mut().look(self.began.elapsed());
                let calm = self.courses.borrow().values().all(Course::is_calm) && self.blows.borrow().is_over();
                if matches!(looked, Ok(Ok(()))) && calm {
                    return;
                }
                if !matches!(looked, Ok(Ok(()))) {
                    client = None;
                }
                tokio::time::sleep(TICK).await;
            }
        };
        let _ = timeout(patience, calm).await;
        self.blows.borrow_mut().verify();
        self.account()
    }

    /// What was seen so far.
    pub fn account(&self) -> Account {
        let (blows, now_ms) = (self.blows.borrow(), output::now_ms());
        let met = |struck: &&Struck| struck.victim.is_some() && struck.fault.is_of_ranks();
        let struck_ms: Vec<u64> = blows.struck().iter().filter(met).map(|struck| struck.at_ms).collect();
        let courses = self.courses.borrow();
        let jobs = courses.iter().map(|(job, course)| (*job, course.losses(now_ms, &struck_ms)));
        Account {
            seed: self.seed,
            schedule: self.schedule.clone(),
            faults: blows.struck().to_vec(),
            jobs: jobs.collect(),
        }
    }

    async fn strike(&self, note: impl Fn(&str)) -> Failure {
        loop {
            let now = self.began.elapsed();
            let due = self.plan.borrow_mut().take(now);
            let idle = {
                let mut blows = self.blows.borrow_mut();
                blows.look(now);
                if let Some(strike) = due {
                    let newest = self.newest_checkpoint();
                    match blows.strike(now, strike, newest.as_deref()) {
                        Ok(struck) => note(&line(struck)),
                        Err(failure) => return failure,
                    }
                    continue;
                }
                blows.is_over()
            };
            let next = self.plan.borrow().due();
            let wait = next.map_or(LOOK_EVERY, |next| next.saturating_sub(now));
            tokio::time::sleep(if idle { wait } else { wait.min(TICK) }).await;
        }
    }

    async fn follow(&self) -> Infallible {
        let mut client = None;
        loop {
            // Without an answer the next look tries again, on a fresh connection.
            if !matches!(timeout(ANSWER_MAX, self.look(&mut client)).await, Ok(Ok(()))) {
                client = None;
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    /// Sees every job that is followed.
    async fn look(&self, client: &mut Option<Client>) -> Result<(), Failure> {
        if client.is_none() {
            *client = Some(Client::open(&self.folder.coordinator().join("admin")).await?);
        }
        let Some(client) = client else { return Ok(()) };
        for job in self.followed(client).await? {
            let explained = explain(client, job).await?;
            let (mut courses, now_ms) = (self.courses.borrow_mut(), output::now_ms());
            match courses.get_mut(&job) {
                Some(course) => course.see(now_ms, &explained),
                None => {
                    courses.insert(job, Course::new(now_ms, &explained));
                }
            }
        }
        Ok(())
    }

    async fn followed(&self, client: &mut Client) -> Result<Vec<JobId>, Failure> {
        let open = |job: &JobId| self.courses.borrow().get(job).is_none_or(|course| !course.is_over());
        if let Some(job) = self.job {
            return Ok(Some(job).filter(open).into_iter().collect());
        }
        let Reply::Jobs(jobs) = client.ask(&Request::Jobs, Repeat::Safe).await? else { return Err(unexpected()) };
        // One that ended since the last look is seen once more.
        let known = |job: &JobId| self.courses.borrow().contains_key(job);
        let wanted = jobs.iter().filter(|view| !view.state.is_terminal() || known(&view.job)).map(|view| view.job);
        Ok(wanted.filter(open).collect())
    }

    fn newest_checkpoint(&self) -> Option<String> {
        let courses = self.courses.borrow();
        courses.values().filter_map(Course::newest_checkpoint).max().map(|(_, uri)| uri.to_owned())
    }
}

async fn explain(client: &mut Client, job: JobId) -> Result<Explanation, Failure> {
    match client.ask(&Request::Explain { job }, Repeat::Safe).await? {
        Reply::Explained(explanation) => Ok(explanation),
        _ => Err(unexpected()),
    }
}

fn line(struck: &Struck) -> String {
    let fault = struck.fault.name();
    match (&struck.victim, &struck.remark) {
        (Some(victim), _) if struck.fault.lasts() => {
            let by = struck.amount.map(|amount| format!(" by {amount}")).unwrap_or_default();
            format!("chaos: {fault}: {} for {:.1}s{by}", victim.text, struck.hold.as_secs_f64())
        }
        (Some(victim), _) => format!("chaos: {fault}: {}", victim.text),
        (None, remark) => format!("chaos: {fault}: {}", remark.as_deref().unwrap_or("met nobody")),
    }
}
