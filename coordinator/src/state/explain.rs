//! Why a job fits or does not fit on each node, in words. Decides nothing.

use stoke_protocol::ids::NodeId;
use stoke_protocol::spec::Bytes;

use super::machine::Ask;
use super::members::{Node, Room};
use super::placement::View;
use super::room::{Left, carries};
use super::words::rank_count;

/// Nodes that are told of: an explanation fits in one reply.
const NODES_SHOWN_MAX: usize = 1_000;

/// A line for each node.
pub fn explain(view: &View<'_>, ask: &Ask) -> Vec<(NodeId, String)> {
    let left = Left::new(view.members, view.live, view.bug);
    view.members.nodes().take(NODES_SHOWN_MAX).map(|node| (node.id, line(&left, node, ask))).collect()
}

fn line(left: &Left<'_>, node: &Node, ask: &Ask) -> String {
    if node.incarnation.0 == 0 {
        return "has joined and not connected yet".into();
    }
    if !node.up {
        return "is lost".into();
    }
    if node.is_quarantined() {
        return format!("is quarantined: {}", node.quarantine_words());
    }
    if node.drain.is_some() {
        return "is being drained: it gets no ranks (`stoke drain --undo` lets it serve again)".into();
    }
    if !left.is_usable(node) {
        return "is silent: no heartbeat within its lease".into();
    }
    if !carries(node, ask) {
        let missing = ask.labels.iter().filter(|(key, value)| node.labels.get(*key) != Some(value));
        let missing: Vec<String> = missing.map(|(key, value)| format!("{key}={value}")).collect();
        return format!("lacks the label {}", missing.join(" and "));
    }
    let (free, whole) = (left.free(node), Room::of(&node.capacity));
    let slots = free.slots(&ask.room);
    if slots > 0 {
        return format!("has room for {}", rank_count(slots));
    }
    let mut short = Vec::new();
    if free.cpus < ask.room.cpus {
        short.push(format!("{} of {} cpus free, {} needed", free.cpus, whole.cpus, ask.room.cpus));
    }
    if free.memory_bytes < ask.room.memory_bytes {
        let [free, whole, need] = [free.memory_bytes, whole.memory_bytes, ask.room.memory_bytes].map(mebibytes);
        short.push(format!("{free} of {whole} memory free, {need} needed"));
    }
    if free.gpus < ask.room.gpus {
        short.push(format!("{} of {} gpus free, {} needed", free.gpus, whole.gpus, ask.room.gpus));
    }
    short.join("; ")
}

/// Rounded down, so that a shortage never reads as enough.
fn mebibytes(bytes: u64) -> Bytes {
    Bytes(bytes >> 20 << 20)
}
