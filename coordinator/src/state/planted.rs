//! Faults that tests plant on purpose, to show that the simulator finds them. Production code holds none: only `Cluster::with_planted_bug`
//! sets one, and only tests call it. Each variant names the one line of defence that it takes away.

/// One broken defence.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum PlantedBug {
    /// Reports of an older generation act on the current one (I2).
    ReportsUnfenced,
    /// Shards and manifests of an older generation are taken (I2).
    ShardsUnfenced,
    /// Messages of an older incarnation are taken (I5).
    IncarnationUnfenced,
    /// A hello that a newer one of the same agent has overtaken is taken (I15).
    SessionUnfenced,
    /// A slot is free as soon as its rank is told to stop (I15).
    SlotFreedBeforeExit,
    /// A gang is placed as far as there is room (I14).
    GangPlacedPartially,
    /// The planner takes a node's memory for endless (I13).
    MemoryOvercommitted,
    /// The planner takes nodes that are silent or lost (I16).
    SilentNodePlaced,
    /// The planner takes nodes that are being drained (I16).
    DrainedNodePlaced,
    /// A token lets in twice (I33).
    UsedTokenAccepted,
    /// A key that was used before makes another job (I7).
    KeyIgnored,
    /// A queued job that was cancelled stays in the queue (I10).
    CancelledStaysQueued,
    /// A cancel is answered while ranks may still start (I10).
    CancelAckedEarly,
    /// A checkpoint is committed with one shard missing (I21).
    ShardMissing,
    /// One checkpoint more than asked is removed (I23).
    PrunedOneMore,
    /// The committed step may go back (I17).
    CommittedStepBack,
    /// A start does not raise the epoch (I1).
    EpochNotRaised,
    /// A job is tried again for ever (I11).
    AttemptsUnbounded,
    /// The room of an exited rank is given back twice (I13).
    ReleasedTwice,
    /// Replicas with different weights succeed (I19).
    DigestsUncompared,
    /// The next generation starts before the old ranks are gone (I3).
    RequeuedBeforeGone,
    /// A report that was delivered twice counts twice (at-least-once delivery).
    ReportsCountedTwice,
    /// Members are told to remove what they have stored of a checkpoint that is committed (I21).
    CommittedAbandoned,
    /// Nodes are lost at once after a coordinator's restart (F17).
    FailoverGraceSkipped,
    /// A rank that is ready owns lanes before it has the state (X10).
    ReadyOwnsLanes,
    /// A run goes on with fewer ranks than it may (J9).
    TooFewGoOn,
    /// Ranks that lost each other wait for ever (I37).
    PartedForgotten,
    /// Nodes are lost by the time for which the coordinator itself was stopped (H4).
    StopCountsAsSilence,
    /// For the simulated shell: effects run before their entries are durable (I6).
    AckBeforeDurable,
}

impl PlantedBug {
    pub const ALL: [Self; 29] = [
        Self::ReportsUnfenced,
        Self::ShardsUnfenced,
        Self::IncarnationUnfenced,
        Self::SessionUnfenced,
        Self::SlotFreedBeforeExit,
        Self::GangPlacedPartially,
        Self::MemoryOvercommitted,
        Self::SilentNodePlaced,
        Self::DrainedNodePlaced,
        Self::UsedTokenAccepted,
        Self::KeyIgnored,
        Self::CancelledStaysQueued,
        Self::CancelAckedEarly,
        Self::ShardMissing,
        Self::PrunedOneMore,
        Self::CommittedStepBack,
        Self::EpochNotRaised,
        Self::AttemptsUnbounded,
        Self::ReleasedTwice,
        Self::DigestsUncompared,
        Self::RequeuedBeforeGone,
        Self::ReportsCountedTwice,
        Self::CommittedAbandoned,
        Self::FailoverGraceSkipped,
        Self::AckBeforeDurable,
        Self::StopCountsAsSilence,
        Self::ReadyOwnsLanes,
        Self::TooFewGoOn,
        Self::PartedForgotten,
    ];
}
