//! Nodes that come and go: what a node has is compared with what it should have. Adopt first, decide after. Part of `cluster.rs`.

use std::collections::{BTreeMap, BTreeSet};

use stoke_protocol::ids::{JobId, NodeId};
use stoke_protocol::message::node::NodeHello;
use stoke_protocol::message::rank::RankId;

use super::cluster::Cluster;
use super::elastic::End;
use super::machine::{Scene, stop_order};
use super::members::Offer;

impl Cluster {
    /// Inventory sync: what the node has is compared with what it should have. Adopt first, decide after.
    pub(super) fn node_up(&mut self, scene: &mut Scene<'_>, hello: &NodeHello, address: &str) {
        let node = hello.node;
        let restarted = self.members.node(node).is_some_and(|found| found.incarnation != hello.incarnation);
        let NodeHello { name, capacity, gateway, .. } = hello.clone();
        let offer = Offer { name, address: address.to_owned(), capacity, gateway };
        self.members.open(scene.at, node, (hello.incarnation, hello.session), offer);
        self.replan = true;
        let has: BTreeMap<RankId, bool> = hello.ranks.iter().map(|rank| (rank.id, rank.alive)).collect();
        let held: BTreeSet<RankId> =
            self.members.node(node).map(|node| node.held.keys().copied().collect()).unwrap_or_default();
        let mut gone: BTreeMap<JobId, Vec<RankId>> = BTreeMap::new();
        for id in held.iter().copied() {
            match has.get(&id) {
                Some(true) => self.remind(scene, node, id),
                // The report of its end is on its way.
                Some(false) => {}
                None if !restarted && self.never_started(id) => self.remind(scene, node, id),
                None => {
                    self.members.release(node, id, self.bug);
                    gone.entry(id.job).or_default().push(id);
                }
            }
        }
        for (job, ids) in gone {
            self.gone(scene, job, &ids, "went with its agent, which was restarted");
        }
        for (id, _) in has.iter().filter(|(id, alive)| **alive && !held.contains(*id)) {
            scene.orders.push(stop_order(node, *id, "this coordinator does not know it"));
        }
        self.sweep_again(scene, node);
    }

    /// Expected, and the order to start it may not have arrived.
    fn never_started(&self, id: RankId) -> bool {
        self.jobs.get(id.job).is_some_and(|job| job.unready(id).is_some())
    }

    fn remind(&self, scene: &mut Scene<'_>, node: NodeId, id: RankId) {
        match self.jobs.get(id.job) {
            Some(job) => job.remind(scene, node, id, self.catalogue.kept(id.job)),
            None => scene.orders.push(stop_order(node, id, "its job is forgotten")),
        }
    }

    pub(super) fn gone(&mut self, scene: &mut Scene<'_>, job: JobId, ids: &[RankId], how: &str) {
        self.replan = true;
        self.jobs.drive(job, self.placements, |job| job.gone(scene, ids, how, End::Machine));
    }

    /// Its ranks are gone as far as their jobs go; their room on the node stays held until the node tells (K4).
    pub(super) fn node_lost(&mut self, scene: &mut Scene<'_>, node: NodeId) {
        self.members.lose(scene.at, node);
        let mut held: BTreeMap<JobId, Vec<RankId>> = BTreeMap::new();
        for id in self.members.node(node).into_iter().flat_map(|node| node.held.keys()) {
            held.entry(id.job).or_default().push(*id);
        }
        for (job, ids) in held {
            self.gone(scene, job, &ids, "is lost: its node fell silent");
        }
        self.sweep_elsewhere(scene, node);
    }
}
