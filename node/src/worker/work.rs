//! What is around the trainer of a rank: its assignment, its orders, the ways to its peers and to the disk. Owns the wait for what comes next;
//! computes nothing.

use std::sync::Arc;

use stoke_protocol::message::rank::{Membership, StartRank};
use stoke_protocol::spec::{JobSpec, Wire};
use tokio::runtime::Handle;

use super::beat::Beat;
use super::failure::Failure;
use super::orders::Orders;
use super::trainer::Told;
use super::vault::Vault;
use crate::checkpoint::ShardMemory;
use crate::exchange::Mesh;

/// What is around the trainer.
pub struct Work<'a> {
    pub start: StartRank,
    pub spec: JobSpec,
    pub memory: Option<ShardMemory>,
    pub orders: Orders,
    pub runtime: Handle,
    pub mesh: Arc<Mesh>,
    pub vault: Vault,
    pub beat: Beat,
    pub tell: &'a dyn Fn(Told),
}

impl Work<'_> {
    /// What comes after a membership of the coordinator's: its next one, or, while it is away and ranks are parted, what a quorum agrees on.
    pub async fn next(&self, given: &Membership, parted: bool) -> Result<Arc<Membership>, Failure> {
        let agreed = async {
            // T4.
            if !parted || self.spec.train.as_ref().is_some_and(|train| train.wire == Wire::Bf16) {
                std::future::pending::<()>().await;
            }
            loop {
                self.orders.alone(true).await;
                let floor = self.spec.resources.ranks_min.unwrap_or(1) as usize;
                tokio::select! {
                    agreed = self.mesh.go_on(given, floor) => break Arc::new(agreed),
                    () = self.orders.alone(false) => {}
                }
            }
        };
        tokio::select! {
            biased;
            told = self.orders.next(given.generation) => told,
            agreed = agreed => Ok(agreed),
        }
    }
}
