//! What a rank's trainer is told while it works: the newest membership, and to stop. Owns the one place where the link's actor and the compute
//! thread meet; never waits on the actor's side.
//!
//! O1: only the newest membership counts. O2: one that is not planned interrupts what is under way, also an exchange that has just begun.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use stoke_protocol::ids::{Generation, Step};
use stoke_protocol::message::rank::{Member, Membership};
use tokio::sync::watch;

use super::failure::Failure;
use crate::exchange::AbortHandle;
use crate::rollout::Cast;

/// Shared by the link's actor and the trainer.
#[derive(Clone)]
pub struct Orders(Arc<Shared>);

struct Shared {
    told: watch::Sender<Told>,
    /// Of the exchange that the trainer is in.
    running: Mutex<Option<(Generation, AbortHandle)>>,
    /// Where a bit is to be flipped, for a chaos test.
    damage: Mutex<Option<u64>>,
}

#[derive(Clone, Default)]
struct Told {
    newest: Option<Arc<Membership>>,
    /// The highest step whose checkpoint is in the catalogue.
    committed: Option<Step>,
    stopped: bool,
    /// Ranks that are ready to play environments.
    rollouts: Vec<Member>,
    /// The agent has no session with the coordinator: no membership can come.
    alone: bool,
}

impl Told {
    fn cast(&self) -> Cast {
        let learners = self.newest.iter().flat_map(|newest| newest.members.iter()).map(|member| member.id);
        Cast { learners: learners.collect(), players: self.rollouts.clone() }
    }

    /// O2.
    fn interrupts(&self, current: Generation) -> bool {
        self.stopped || self.follower(current).is_some_and(|newest| newest.after != Some(current))
    }

    fn follower(&self, current: Generation) -> Option<&Arc<Membership>> {
        self.newest.as_ref().filter(|newest| newest.generation > current)
    }
}

impl Orders {
    pub fn new() -> Self {
        Self(Arc::new(Shared { told: watch::Sender::default(), running: Mutex::default(), damage: Mutex::default() }))
    }

    /// A membership has come; an older one, or the same again, changes nothing.
    pub fn membership(&self, membership: Membership) {
        self.0.told.send_if_modified(|told| {
            let newer = told.newest.as_ref().is_none_or(|newest| newest.generation < membership.generation);
            if newer {
                told.newest = Some(Arc::new(membership));
            }
            newer
        });
        self.interrupt();
    }

    pub fn rollouts(&self, rollouts: Vec<Member>) {
        self.0.told.send_modify(|told| told.rollouts = rollouts);
    }

    /// Who learns and who is ready to play, when it is somebody else than `known`; none: this rank is to stop.
    pub async fn other_cast(&self, known: &Cast) -> Option<Cast> {
        let mut told = self.0.told.subscribe();
        let found = told.wait_for(|told| told.stopped || told.cast() != *known).await.ok()?;
        (!found.stopped).then(|| found.cast())
    }

    /// Waits until this rank is to stop.
    pub async fn stopped(&self) {
        let _ = self.0.told.subscribe().wait_for(|told| told.stopped).await;
    }

    pub fn committed(&self, step: Step) {
        self.0.told.send_modify(|told| told.committed = told.committed.max(Some(step)));
    }

    pub fn stop(&self) {
        self.0.told.send_modify(|told| told.stopped = true);
        self.interrupt();
    }

    /// Whether the coordinator can tell this rank anything.
    pub fn coordinator(&self, reachable: bool) {
        self.0.told.send_modify(|told| told.alone = !reachable);
    }

    pub fn highest_committed(&self) -> Option<Step> {
        self.0.told.borrow().committed
    }

    pub fn damage(&self, draw: u64) {
        *self.0.damage.lock().unwrap_or_else(PoisonError::into_inner) = Some(draw);
    }

    pub fn take_damage(&self) -> Option<u64> {
        self.0.damage.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// The trainer is in an exchange from here on.
    pub fn entered(&self, generation: Generation, abort: AbortHandle) {
        *self.running() = Some((generation, abort));
        self.interrupt();
    }

    pub fn left(&self) {
        *self.running() = None;
    }

    /// Whether what this rank does in `current` is to be given up.
    pub fn check(&self, current: Generation) -> Result<(), Failure> {
        let told = self.0.told.borrow();
        match told.interrupts(current) {
            true if told.stopped => Err(Failure::Stopped),
            true => Err(Failure::Interrupted),
            false => Ok(()),
        }
    }

    /// Waits for a reason to give up what this rank does in `current`.
    pub async fn interrupted(&self, current: Generation) -> Failure {
        let mut told = self.0.told.subscribe();
        // Without a sender nobody can ask for more.
        let _ = told.wait_for(|told| told.interrupts(current)).await;
        self.check(current).err().unwrap_or(Failure::Stopped)
    }

    /// Whether a membership waits that follows `current` between two steps.
    pub fn is_told_of_next(&self, current: Generation) -> bool {
        self.0.told.borrow().follower(current).is_some()
    }

    /// Waits for a membership that follows `current`.
    pub async fn next(&self, current: Generation) -> Result<Arc<Membership>, Failure> {
        let mut told = self.0.told.subscribe();
        let found = told.wait_for(|told| told.stopped || told.follower(current).is_some()).await;
        let told = found.map_err(|_| Failure::Stopped)?;
        match told.follower(current) {
            Some(newest) if !told.stopped => Ok(newest.clone()),
            Some(_) | None => Err(Failure::Stopped),
        }
    }

    /// Waits until the coordinator is away (`true`), or back.
    pub async fn alone(&self, alone: bool) {
        let mut told = self.0.told.subscribe();
        if told.wait_for(|told| told.alone == alone).await.is_err() {
            std::future::pending::<()>().await;
        }
    }

    /// Waits for a reason not to form `current` any more: a planned follower is one too, for no step is under way yet.
    pub async fn superseded(&self, current: Generation) -> Failure {
        match self.next(current).await {
            Ok(_) => Failure::Interrupted,
            Err(failure) => failure,
        }
    }

    fn interrupt(&self) {
        let running = self.running();
        if let Some((generation, abort)) = running.as_ref()
            && self.0.told.borrow().interrupts(*generation)
        {
            abort.abort("another generation begins, or this rank is told to stop");
        }
    }

    fn running(&self) -> MutexGuard<'_, Option<(Generation, AbortHandle)>> {
        self.0.running.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use stoke_protocol::message::rank::Purpose;

    use super::*;

    fn membership(generation: u64, after: Option<u64>) -> Membership {
        let (members, joining) = (vec![].into(), vec![].into());
        Membership {
            generation: Generation(generation),
            members,
            joining,
            after: after.map(Generation),
            ballot: 0,
            purpose: Purpose::Train,
            restarts: 0,
        }
    }

    #[tokio::test]
    async fn a_planned_membership_waits_for_the_end_of_a_step_and_any_other_interrupts() {
        let orders = Orders::new();
        let (g1, g2) = (Generation(1), Generation(2));
        orders.membership(membership(1, None));
        assert_eq!(orders.next(Generation(0)).await.unwrap().generation, g1);
        orders.membership(membership(2, Some(1)));
        orders.membership(membership(1, None));
        assert!(orders.check(g1).is_ok() && orders.is_told_of_next(g1) && !orders.is_told_of_next(g2));
        // It follows generation 2, which this rank has not reached: its members do not wait for this one's step.
        orders.membership(membership(3, Some(2)));
        assert!(matches!(orders.check(g1), Err(Failure::Interrupted)));
        assert!(orders.check(g2).is_ok());
        assert!(matches!(orders.superseded(g2).await, Failure::Interrupted));
        orders.stop();
        assert!(matches!(orders.superseded(g2).await, Failure::Stopped));
        assert!(matches!(orders.next(g2).await, Err(Failure::Stopped)));
    }
}
