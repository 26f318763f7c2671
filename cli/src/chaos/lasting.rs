//! Faults that last: pauses, bad weather, slowness, a full disk. Each is over when its value is dropped, whatever ends this process but `kill -9`.
//! Decides neither when nor whom.

use std::path::PathBuf;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use rustix::process::Signal;
use stoke_protocol::transport::{Harm, Spell, read_weather, write_weather};

use super::cast::Actor;
use super::disk::FullDisk;
use super::schedule::{Amount, Fault};

/// A slow process stands for its share of this again and again: longer than a step takes on most machines, far shorter than any time-out.
const PERIOD: Duration = Duration::from_millis(100);

#[expect(dead_code, reason = "what is held is read by its drop alone")]
pub enum Lasting {
    Paused(Paused),
    Slow(Slow),
    Weather(Weather),
    FullDisk(FullDisk),
}

impl Lasting {
    /// Of processes: a pause or slowness. None where nobody was there to take it.
    pub fn of_processes(actors: Vec<Actor>, amount: Option<Amount>) -> std::io::Result<Option<Self>> {
        if actors.iter().filter(|actor| actor.signal(Signal::STOP)).count() == 0 {
            return Ok(None);
        }
        let paused = Paused { actors };
        Ok(Some(match amount {
            Some(Amount::Percent(share)) => Self::Slow(Slow::begin(paused, share)?),
            Some(Amount::Ms(_)) | None => Self::Paused(paused),
        }))
    }
}

/// Processes that are stopped.
pub struct Paused {
    actors: Vec<Actor>,
}

impl Paused {
    fn signal(&self, signal: Signal) {
        for actor in &self.actors {
            actor.signal(signal);
        }
    }
}

impl Drop for Paused {
    fn drop(&mut self) {
        self.signal(Signal::CONT);
    }
}

/// Processes that stand for a share of the time, by a thread.
pub struct Slow {
    over: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Slow {
    fn begin(paused: Paused, percent: u16) -> std::io::Result<Self> {
        let (over, is_over) = channel();
        let stands = PERIOD * percent.into() / 100;
        let thread = thread::Builder::new().name("slow".to_owned()).spawn(move || slow(&paused, stands, &is_over))?;
        Ok(Self { over: Some(over), thread: Some(thread) })
    }
}

impl Drop for Slow {
    fn drop(&mut self) {
        drop(self.over.take());
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

/// Until the other end is gone.
fn slow(paused: &Paused, stands: Duration, over: &Receiver<()>) {
    let goes_on = |wait| over.recv_timeout(wait) == Err(RecvTimeoutError::Timeout);
    while goes_on(stands) {
        paused.signal(Signal::CONT);
        if !goes_on(PERIOD - stands) {
            return;
        }
        paused.signal(Signal::STOP);
    }
}

/// A spell in the file that all processes of the cluster look at.
pub struct Weather {
    pub file: PathBuf,
    pub spell: Spell,
}

impl Weather {
    pub fn begin(self) -> std::io::Result<Lasting> {
        let mut spells = read_weather(&self.file);
        spells.push(self.spell);
        write_weather(&self.file, &spells)?;
        Ok(Lasting::Weather(self))
    }
}

impl Drop for Weather {
    fn drop(&mut self) {
        let mut spells = read_weather(&self.file);
        spells.retain(|spell| *spell != self.spell);
        // One that could not be removed ends at its time.
        let _ = write_weather(&self.file, &spells);
    }
}

/// What a fault does to packets, if it does anything to them.
pub fn harm(fault: Fault, amount: Option<Amount>) -> Option<Harm> {
    let per_mille = |percent: u16| percent * 10;
    match (fault, amount) {
        (Fault::PartitionNode, _) => Some(Harm::Cut),
        (Fault::PartitionInbound, _) => Some(Harm::CutInbound),
        (Fault::PartitionOutbound, _) => Some(Harm::CutOutbound),
        (Fault::LosePackets, Some(Amount::Percent(share))) => Some(Harm::Loses(per_mille(share))),
        (Fault::DelayPackets, Some(Amount::Ms(ms))) => Some(Harm::DelaysMs(ms)),
        (Fault::ReorderPackets, Some(Amount::Percent(share))) => Some(Harm::Reorders(per_mille(share))),
        (Fault::DuplicatePackets, Some(Amount::Percent(share))) => Some(Harm::Duplicates(per_mille(share))),
        _ => None,
    }
}
