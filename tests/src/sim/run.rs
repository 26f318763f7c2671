//! A run from its first event to its verdict: makes the faults happen and heal, calms down, waits for convergence (I37). Owns the two phases.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::panic::{AssertUnwindSafe, catch_unwind};

use stoke_coordinator::state::placement::Wait;
use stoke_node::agent::state::Event as AgentEvent;
use stoke_protocol::ids::JobId;
use stoke_protocol::message::client::JobState;
use stoke_protocol::message::rank::Exit;

use super::coverage::Coverage;
use super::faults::{Fault, Rates};
use super::network::Side;
use super::plan::Plan;
use super::planted::Planted;
use super::random::{Choices, Source};
use super::world::{Happening, Ms, World};

/// After the faults have stopped, everything converges within this.
const CONVERGES_MS: Ms = 300_000;
/// How often convergence is looked for.
const LOOK_MS: Ms = 1_000;
/// More events than any sound run has.
const EVENTS_MAX: u64 = 400_000;

/// All that a run depends on.
#[derive(Clone, PartialEq, Debug)]
pub struct Setting {
    pub plan: Plan,
    pub source: Source,
    pub planted: Planted,
    /// Lines of the story that are kept.
    pub story: usize,
}

impl Setting {
    pub fn of_seed(seed: u64) -> Self {
        Self { plan: Plan::draw(seed), source: Source::Seed(seed), planted: Planted::Nothing, story: 0 }
    }

    pub fn planted(self, planted: Planted) -> Self {
        Self { planted, ..self }
    }

    pub fn story(self, story: usize) -> Self {
        Self { story, ..self }
    }
}

/// What a run has come to.
#[derive(Clone, Debug)]
pub struct Outcome {
    pub hash: u64,
    pub events: u64,
    pub simulated_ms: Ms,
    pub jobs: usize,
    pub replays: u64,
    pub spawned: u64,
    pub violation: Option<Violation>,
    pub story: Vec<String>,
    /// Every choice of the run: with the plan, they are the run.
    pub drawn: Choices,
    pub coverage: Coverage,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Violation {
    pub invariant: String,
    pub what: String,
    pub at_ms: Ms,
}

impl Violation {
    /// The invariant, or of an assertion its place: what two runs have in common that fail alike.
    pub fn name(&self) -> String {
        let first = |ends: char| self.what.split(ends).next().unwrap_or_default().trim().to_owned();
        match self.invariant.as_str() {
            "noted" | "state" => first(':'),
            // "panicked at FILE:LINE:COLUMN:", and the message with its numbers.
            "assertion" => first('\n'),
            other => other.to_owned(),
        }
    }
}

thread_local! {
    static PANIC: RefCell<Option<String>> = const { RefCell::new(None) };
}

pub fn run(setting: &Setting) -> Outcome {
    quiet_panics();
    let mut world = World::new(setting.plan.clone(), &setting.source, setting.planted, setting.story);
    PANIC.with_borrow_mut(|told| *told = Some(String::new()));
    let ended = catch_unwind(AssertUnwindSafe(|| world.run()));
    let told = PANIC.take().unwrap_or_default();
    let violation = match ended {
        Ok(Ok(())) => None,
        Ok(Err((invariant, what))) => Some((invariant.to_owned(), what)),
        Err(_) => Some(("assertion".to_owned(), told)),
    };
    let at_ms = world.now;
    let story = world.story();
    let mut coverage = std::mem::take(&mut world.coverage);
    world.streams.all().for_each(|stream| coverage.note_chances(stream));
    Outcome {
        hash: world.hash(),
        events: world.events,
        simulated_ms: at_ms,
        jobs: world.shadow.jobs().iter().len(),
        replays: world.oracle.replays,
        spawned: world.oracle.spawned,
        violation: violation.map(|(invariant, what)| Violation { invariant, what, at_ms }),
        story,
        drawn: world.streams.drawn(),
        coverage,
    }
}

/// An assertion that fails in a run is its verdict, not a message on the screen.
fn quiet_panics() {
    static ONCE: std::sync::Once = std::sync::Once::new();
    ONCE.call_once(|| {
        let usual = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            let running = PANIC.with_borrow_mut(|told| match told {
                Some(told) => {
                    *told = info.to_string();
                    true
                }
                None => false,
            });
            if !running {
                usual(info);
            }
        }));
    });
}

impl World {
    fn run(&mut self) -> Result<(), (&'static str, String)> {
        let deadline = self.plan.chaos_ms + CONVERGES_MS;
        let mut look = self.plan.chaos_ms;
        while self.step()? {
            if !self.calm || self.now < look {
                continue;
            }
            look = self.now + LOOK_MS;
            let open = self.unsettled();
            if open.is_empty() {
                return Ok(());
            }
            if self.now > deadline || self.events > EVENTS_MAX {
                return Err(("I37", format!("does not converge: {}", open.join("; "))));
            }
        }
        Err(("I37", "nothing happens any more".into()))
    }

    pub fn inject(&mut self, fault: Fault) {
        if self.calm {
            return;
        }
        self.coverage.note("fault", &fault);
        self.say(|_| format!("FAULT {fault:?}"));
        let heals = |lasts: Ms| Some(lasts);
        let lasts = match fault {
            Fault::CoordinatorCrash { down } => {
                self.crash_coordinator();
                heals(down)
            }
            Fault::CoordinatorPause { lasts } => {
                self.paused = self.coordinator.is_some();
                self.stopped_at = self.now;
                heals(lasts)
            }
            Fault::OldCopy { depth, lasts } => {
                self.crash_coordinator();
                let booted = self.boot_copy(depth);
                heals(if booted { lasts } else { 100 })
            }
            Fault::AgentCrash { node, down } => {
                self.agent_crash(node);
                heals(down)
            }
            Fault::NodeCrash { node, down } => {
                self.node_crash(node);
                heals(down)
            }
            Fault::AgentStop { node, down } => {
                if let Some(life) = self.machines[node].agent.as_ref().map(|agent| agent.life) {
                    self.tell(node, life, AgentEvent::ShutDown { grace_ms: 2_000 });
                }
                heals(down + 4_000)
            }
            Fault::NodePause { node, lasts } => {
                self.machines[node].paused = true;
                heals(lasts)
            }
            Fault::CutUp { node, lasts } => {
                self.machines[node].cut_up = true;
                heals(lasts)
            }
            Fault::CutDown { node, lasts } => {
                self.machines[node].cut_down = true;
                heals(lasts)
            }
            Fault::CutBoth { node, lasts } => {
                (self.machines[node].cut_up, self.machines[node].cut_down) = (true, true);
                heals(lasts)
            }
            Fault::SessionBreak { node } => {
                if let Some(session) = self.machines[node].agent.as_ref().and_then(|agent| agent.session) {
                    self.lost(session, Side::Agent);
                }
                None
            }
            Fault::RankKill { pick, signal } => {
                let living: Vec<_> = self.processes.keys().copied().collect();
                if let Some(process) = living.get(pick as usize % living.len().max(1)).copied() {
                    self.end_process(process, Exit::Signal(signal));
                }
                None
            }
            Fault::JobKill { pick } => {
                let jobs: BTreeSet<JobId> = self.processes.values().map(|process| process.id.job).collect();
                let job = jobs.iter().nth(pick as usize % jobs.len().max(1)).copied();
                self.kill_ranks(|process| Some(process.id.job) == job);
                None
            }
            Fault::RankPause { pick, lasts } => {
                let living: Vec<_> = self.processes.keys().copied().collect();
                if let Some(process) = living.get(pick as usize % living.len().max(1)) {
                    self.pause_rank(*process, lasts);
                }
                None
            }
            Fault::Lie { node, pick } => {
                self.lie(node, pick);
                self.agent_crash(node);
                heals(100)
            }
            Fault::SyncFails => {
                self.sync_fails = true;
                None
            }
            Fault::DiskLimit { bytes, lasts } => {
                self.disk.limit(bytes);
                heals(lasts)
            }
            Fault::WallJump { ms } => {
                self.wall_ms += ms;
                None
            }
            Fault::Flap { .. } => None,
        };
        if let Some(lasts) = lasts {
            self.after(lasts, Happening::Heal { fault });
        }
    }

    pub fn heal(&mut self, fault: Fault) {
        match fault {
            Fault::CoordinatorCrash { .. } => self.boot(),
            Fault::CoordinatorPause { .. } => self.resume_coordinator(),
            Fault::OldCopy { .. } => {
                if self.coordinator.as_ref().is_none_or(|coordinator| coordinator.copy) {
                    self.crash_coordinator();
                    self.boot();
                }
            }
            Fault::AgentCrash { node, .. }
            | Fault::AgentStop { node, .. }
            | Fault::NodeCrash { node, .. }
            | Fault::Lie { node, .. } => {
                self.agent_boot(node);
            }
            Fault::NodePause { node, .. } => self.resume_machine(node),
            Fault::CutUp { node, .. } => self.machines[node].cut_up = false,
            Fault::CutDown { node, .. } => self.machines[node].cut_down = false,
            Fault::CutBoth { node, .. } => (self.machines[node].cut_up, self.machines[node].cut_down) = (false, false),
            Fault::DiskLimit { .. } => self.disk.limit(u64::MAX),
            Fault::Flap { node } => {
                self.agent_crash(node);
                self.agent_boot(node);
            }
            Fault::SessionBreak { .. } | Fault::RankKill { .. } | Fault::WallJump { .. } => {}
            Fault::JobKill { .. } | Fault::RankPause { .. } | Fault::SyncFails => {}
        }
    }

    fn resume_coordinator(&mut self) {
        // Its clock may be slower.
        let long = self.plan.timings().lease_ms * 12 / 10;
        if std::mem::take(&mut self.paused) && self.now >= self.stopped_at + long {
            self.woke = Some(self.now);
        }
        for happening in std::mem::take(&mut self.deferred) {
            self.after(0, happening);
        }
    }

    fn resume_machine(&mut self, machine: usize) {
        self.machines[machine].paused = false;
        for happening in std::mem::take(&mut self.machines[machine].deferred) {
            self.after(0, happening);
        }
    }

    /// The faults stop, all of them.
    pub fn calm_down(&mut self) {
        self.say(|_| "CALM".into());
        self.calm = true;
        self.rates = Rates::default();
        self.disk.limit(u64::MAX);
        self.sync_fails = false;
        self.resume_coordinator();
        let stopped: Vec<_> = self.processes.keys().copied().collect();
        stopped.into_iter().for_each(|process| self.rank_resumes(process));
        for machine in 0..self.machines.len() {
            (self.machines[machine].cut_up, self.machines[machine].cut_down) = (false, false);
            self.resume_machine(machine);
            if self.machines[machine].agent.is_none() {
                self.agent_boot(machine);
            }
        }
        if self.coordinator.as_ref().is_none_or(|coordinator| coordinator.copy) {
            self.crash_coordinator();
            self.boot();
        }
        self.lift_drains();
    }

    /// What still stands in the way of rest.
    fn unsettled(&self) -> Vec<String> {
        let mut open: Vec<String> = self.clients.waiting();
        let Some(coordinator) = &self.coordinator else { return vec!["there is no coordinator".into()] };
        if !coordinator.is_quiet() {
            open.push("the coordinator waits for its disk".into());
        }
        for (at, machine) in self.machines.iter().enumerate() {
            match &machine.agent {
                None => open.push(format!("machine {at} has no agent")),
                Some(agent) if agent.session.is_none() => open.push(format!("machine {at} has no session")),
                Some(agent) if !agent.state.is_flushed() => open.push(format!("machine {at} has reports left")),
                Some(agent) => open.extend(agent.state.alive().map(|id| format!("{id} lives on machine {at}"))),
            }
        }
        for machine in &self.machines {
            open.extend(machine.kept.keys().map(|id| format!("{id} is recorded")));
        }
        for node in self.shadow.members().nodes() {
            open.extend(node.held.keys().map(|id| format!("{id} holds room on {}", node.id)));
        }
        open.extend(self.processes.values().map(|process| format!("{} has a process", process.id)));
        for job in self.shadow.jobs().iter().filter(|job| !job.state.is_terminal()) {
            let waits = coordinator.control.wait(job.id);
            let blocked = matches!(waits, Some(Wait::Impossible { .. } | Wait::NoNodes));
            if job.state != JobState::Queued || !blocked {
                open.push(format!("{} is {:?} ({waits:?})", job.id, job.state));
            }
        }
        open
    }
}
