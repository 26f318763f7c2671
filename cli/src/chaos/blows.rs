//! Faults, carried out. Owns what lasts until it is over (`lasting.rs`) and the list of what was done; decides neither when nor whom by itself: the
//! plan's draw does.

use std::fs::OpenOptions;
use std::net::SocketAddr;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::process::Signal;
use stoke_node::checkpoint::{self, CheckpointError};
use stoke_node::worker;
use stoke_protocol::transport::{Harm, Spell};

use super::cast::{Actor, Cast};
use super::disk::FullDisk;
use super::lasting::{Lasting, Weather, harm};
use super::plan::Strike;
use super::schedule::{Amount, Fault};
use crate::failure::Failure;
use crate::local::folder::{Folder, node_index, node_ip};
use crate::output;

/// A fault that was due, and what came of it as far as the processes tell.
#[derive(Clone, PartialEq, Debug)]
pub struct Struck {
    /// From the beginning.
    pub at: Duration,
    /// Milliseconds since the Unix epoch, to compare with the coordinator's clock, which is this machine's.
    pub at_ms: u64,
    pub fault: Fault,
    /// Whom it met; none when nobody was there.
    pub victim: Option<Victim>,
    /// How long it was meant to last.
    pub hold: Duration,
    pub amount: Option<Amount>,
    /// The supervisor had the process running again after this long.
    pub back_after: Option<Duration>,
    /// What lasts was over after this long.
    pub resumed_after: Option<Duration>,
    /// Why it met nobody, or what became of a damaged checkpoint.
    pub remark: Option<String>,
    /// Damage that a verification did not find.
    pub undetected: bool,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Victim {
    /// For people.
    pub text: String,
    pub pids: Vec<u32>,
}

pub struct Blows {
    folder: Folder,
    struck: Vec<Struck>,
    held: Vec<Held>,
    awaited: Vec<Awaited>,
    damaged: Vec<Damaged>,
}

/// What lasts; over when this is dropped.
struct Held {
    index: usize,
    until: Duration,
    /// Processes that it is about.
    pids: Vec<u32>,
    _lasting: Lasting,
}

/// A process that the supervisor starts again.
struct Awaited {
    index: usize,
    name: String,
    killed: u32,
}

struct Damaged {
    index: usize,
    uri: String,
}

impl Blows {
    pub fn new(folder: Folder) -> Self {
        Self { folder, struck: Vec::new(), held: Vec::new(), awaited: Vec::new(), damaged: Vec::new() }
    }

    pub fn struck(&self) -> &[Struck] {
        &self.struck
    }

    /// Does it. `newest` is the URI of the newest committed checkpoint. An error means that the cluster is gone.
    pub fn strike(&mut self, now: Duration, strike: Strike, newest: Option<&str>) -> Result<&Struck, Failure> {
        let cast = Cast::look(&self.folder)?;
        self.struck.push(Struck {
            at: now,
            at_ms: output::now_ms(),
            fault: strike.fault,
            victim: None,
            hold: strike.hold,
            amount: strike.amount,
            back_after: None,
            resumed_after: None,
            remark: None,
            undetected: false,
        });
        let index = self.struck.len() - 1;
        let met = match strike.fault {
            Fault::CorruptShard => self.corrupt(index, strike.draw, newest),
            Fault::FillDisk => self.fill(index, now + strike.hold, newest),
            fault => {
                victims(cast, fault, strike.draw, &self.held_pids()).and_then(|found| self.meet(index, strike, found))
            }
        };
        match met {
            Ok(victim) => self.struck[index].victim = Some(victim),
            Err(reason) => self.struck[index].remark = Some(reason),
        }
        Ok(&self.struck[index])
    }

    /// Ends the pauses that are over, and sees who is back.
    pub fn look(&mut self, now: Duration) {
        let struck = &mut self.struck;
        self.held.retain(|held| {
            let over = held.until <= now;
            if over {
                struck[held.index].resumed_after = Some(now.saturating_sub(struck[held.index].at));
            }
            !over
        });
        if self.awaited.is_empty() {
            return;
        }
        let Some(state) = self.folder.read_state() else { return };
        self.awaited.retain(|awaited| {
            let back = |pid: u32| pid > 0 && pid != awaited.killed;
            let found = state.processes.iter().any(|process| process.name == awaited.name && back(process.pid));
            if found {
                struck[awaited.index].back_after = Some(now.saturating_sub(struck[awaited.index].at));
            }
            !found
        });
    }

    /// Ends every pause and partition now.
    pub fn resume(&mut self, now: Duration) {
        for held in &mut self.held {
            held.until = now;
        }
        self.look(now);
    }

    /// Whether everybody who was struck is back.
    pub fn is_over(&self) -> bool {
        self.held.is_empty() && self.awaited.is_empty()
    }

    /// Reads what was damaged: a flipped byte must be found. Blocks, reading whole checkpoints.
    pub fn verify(&mut self) {
        for damaged in &self.damaged {
            let struck = &mut self.struck[damaged.index];
            let found = match checkpoint::verify(&damaged.uri, None) {
                Err(CheckpointError::Missing { .. }) => "removed since then, as older ones are".to_owned(),
                Err(error) => format!("found by a verification: {error}"),
                Ok(_) => {
                    struck.undetected = true;
                    "NOT FOUND by a verification".to_owned()
                }
            };
            struck.remark = Some(found);
        }
    }

    fn held_pids(&self) -> Vec<u32> {
        self.held.iter().flat_map(|held| held.pids.iter().copied()).collect()
    }

    fn meet(&mut self, index: usize, strike: Strike, found: Found) -> Result<Victim, String> {
        let (Found { text, actors }, fault) = (found, strike.fault);
        let pids: Vec<u32> = actors.iter().map(|actor| actor.pid).collect();
        let ended = || format!("{text} ended before it was struck");
        if fault == Fault::CorruptRank {
            let ask = |actor: &Actor| worker::ask_for_damage(&self.folder.weather(), actor.pid, strike.draw);
            actors.iter().try_for_each(ask).map_err(|error| format!("ask {text} for damage: {error}"))?;
            return Ok(Victim { text, pids });
        }
        if fault.lasts() {
            let lasting = match harm(fault, strike.amount) {
                Some(harm) => self.weather(&actors, strike.hold, harm)?,
                None => Lasting::of_processes(actors, strike.amount)
                    .map_err(|error| format!("slow {text} down: {error}"))?
                    .ok_or_else(ended)?,
            };
            let until = self.struck[index].at + strike.hold;
            self.held.push(Held { index, until, pids: pids.clone(), _lasting: lasting });
            return Ok(Victim { text, pids });
        }
        // An agent goes first, so that it tells nobody of the end of its ranks.
        let kept = |fault| matches!(fault, Fault::KillNode | Fault::KillAgent | Fault::KillCoordinator);
        let supervised = actors.first().filter(|_| kept(fault));
        if let Some(actor) = supervised {
            self.folder.pardon(actor.pid).map_err(|failure| failure.message())?;
        }
        let hit = actors.iter().filter(|actor| actor.signal(Signal::KILL)).count();
        if let Some(actor) = supervised {
            self.awaited.push(Awaited { index, name: actor.name.clone(), killed: actor.pid });
        }
        if hit == 0 { Err(ended()) } else { Ok(Victim { text, pids }) }
    }

    /// Lets bad weather begin at the node of these processes.
    fn weather(&self, actors: &[Actor], hold: Duration, harm: Harm) -> Result<Lasting, String> {
        let address = self.folder.read_state().map(|state| state.address).unwrap_or_default();
        if address.parse::<SocketAddr>().is_ok_and(|address| address.is_ipv6()) {
            return Err(format!("the coordinator is at {address}: packets are struck on IPv4 only"));
        }
        let index = actors.first().and_then(|agent| node_index(&agent.name)).ok_or("no node was there")?;
        let until_ms = output::now_ms().saturating_add(u64::try_from(hold.as_millis()).unwrap_or(u64::MAX));
        let spell = Spell { address: node_ip(index).into(), until_ms, harm };
        let file = self.folder.weather();
        let weather = Weather { file: file.clone(), spell };
        weather.begin().map_err(|error| format!("write {}: {error}", file.display()))
    }

    /// Lets nothing more be written beside the newest checkpoint.
    fn fill(&mut self, index: usize, until: Duration, newest: Option<&str>) -> Result<Victim, String> {
        if self.held.iter().any(|held| self.struck[held.index].fault == Fault::FillDisk) {
            return Err("the disk is full already".to_owned());
        }
        let folder = folder_of(newest)?.parent().map(Path::to_owned).ok_or("the checkpoint is in no folder")?;
        let lasting = Lasting::FullDisk(FullDisk::begin(&folder, &self.folder.dir.join("full-disk"))?);
        self.held.push(Held { index, until, pids: Vec::new(), _lasting: lasting });
        Ok(Victim { text: format!("the checkpoints in {}", folder.display()), pids: Vec::new() })
    }

    /// Flips a bit of a shard in the newest checkpoint.
    fn corrupt(&mut self, index: usize, draw: u64, newest: Option<&str>) -> Result<Victim, String> {
        let (folder, uri) = (folder_of(newest)?, newest.unwrap_or_default());
        let manifest = checkpoint::open(uri).map_err(|error| error.to_string())?;
        let shards: Vec<_> = manifest.shards.iter().filter(|shard| shard.bytes > 0).collect();
        let count = shards.len() as u64;
        let shard = shards.get(usize::try_from(draw % count.max(1)).unwrap_or(0)).ok_or("the checkpoint is empty")?;
        let offset = (draw / count) % shard.bytes;
        flip(&folder.join(&shard.file), offset).map_err(|error| format!("damage {}: {error}", shard.file))?;
        self.damaged.push(Damaged { index, uri: uri.to_owned() });
        let name = folder.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        Ok(Victim { text: format!("byte {offset} of {} in {name}", shard.file), pids: Vec::new() })
    }
}

/// Of the newest committed checkpoint.
fn folder_of(newest: Option<&str>) -> Result<PathBuf, String> {
    let uri = newest.ok_or("no job that runs has committed a checkpoint yet")?;
    let folder = uri.strip_prefix("file://").map(PathBuf::from);
    folder.ok_or_else(|| format!("checkpoint {uri} is in no folder of this machine"))
}

struct Found {
    text: String,
    actors: Vec<Actor>,
}

/// Whom the draw picks among those who are there. Who is paused or cut off already is not again.
fn victims(cast: Cast, fault: Fault, draw: u64, held: &[u32]) -> Result<Found, String> {
    let free = |actor: &&Actor| !fault.lasts() || !held.contains(&actor.pid);
    match fault {
        Fault::KillRank | Fault::PauseRank | Fault::SlowRank | Fault::CorruptRank => {
            let pid = pick(cast.ranks.iter().filter(free).collect(), draw).ok_or("no rank was there")?.pid;
            let actors: Vec<Actor> = cast.ranks.into_iter().filter(|rank| rank.pid == pid).collect();
            Ok(Found { text: format!("the rank of {} (process {pid})", actors[0].name), actors })
        }
        Fault::KillAllRanks if cast.ranks.is_empty() => Err("no rank was there".to_owned()),
        Fault::KillAllRanks => {
            let ranks = output::count(cast.ranks.len() as u64, "rank");
            Ok(Found { text: format!("all {ranks}"), actors: cast.ranks })
        }
        Fault::KillAgent => {
            let agents = cast.busy_agents();
            let name = pick(agents, draw).ok_or("no node was there")?.name.clone();
            let actors: Vec<Actor> = cast.agents.into_iter().filter(|agent| agent.name == name).collect();
            Ok(Found { text: format!("the agent of {name} (process {})", actors[0].pid), actors })
        }
        Fault::KillNode
        | Fault::PauseNode
        | Fault::SlowNode
        | Fault::PartitionNode
        | Fault::PartitionInbound
        | Fault::PartitionOutbound
        | Fault::LosePackets
        | Fault::DelayPackets
        | Fault::ReorderPackets
        | Fault::DuplicatePackets => {
            let agents = cast.busy_agents().into_iter().filter(free).collect();
            let name = pick(agents, draw).ok_or("no node was there")?.name.clone();
            let of_node = |actor: &Actor| actor.name == name;
            let mut actors: Vec<Actor> = cast.agents.into_iter().filter(of_node).collect();
            let pid = actors[0].pid;
            actors.extend(cast.ranks.into_iter().filter(of_node));
            let ranks = output::count(actors.len() as u64 - 1, "rank");
            Ok(Found { text: format!("{name} (process {pid}) and its {ranks}"), actors })
        }
        Fault::KillCoordinator | Fault::PauseCoordinator => {
            let actor = cast.coordinator.filter(|actor| free(&actor)).ok_or("no coordinator was there")?;
            Ok(Found { text: format!("the coordinator (process {})", actor.pid), actors: vec![actor] })
        }
        Fault::CorruptShard | Fault::FillDisk => Err("a checkpoint is no process".to_owned()),
    }
}

fn pick(among: Vec<&Actor>, draw: u64) -> Option<&Actor> {
    let count = among.len() as u64;
    let index = draw.checked_rem(count)?;
    among.into_iter().nth(usize::try_from(index).ok()?)
}

fn flip(path: &Path, offset: u64) -> std::io::Result<()> {
    let file = OpenOptions::new().read(true).write(true).open(path)?;
    let mut byte = [0];
    file.read_exact_at(&mut byte, offset)?;
    file.write_all_at(&[byte[0] ^ 0x10], offset)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flipped_byte_is_one_byte() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), [1, 2, 3]).unwrap();
        flip(file.path(), 1).unwrap();
        assert_eq!(std::fs::read(file.path()).unwrap(), [1, 2 ^ 0x10, 3]);
        assert!(flip(file.path(), 3).is_err());
    }

    #[test]
    fn nobody_is_met_on_an_empty_scene() {
        for fault in Fault::ALL {
            let cast = Cast { coordinator: None, agents: Vec::new(), ranks: Vec::new() };
            assert!(victims(cast, fault, 7, &[]).is_err(), "{fault:?}");
        }
    }
}
