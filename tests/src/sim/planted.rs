//! Every broken defence that a run can be given: those of the coordinator's state, of its disk, and of the agent's shell. The simulator must
//! find each.

use stoke_coordinator::state::PlantedBug;

/// What is broken in a run.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Planted {
    #[default]
    Nothing,
    State(PlantedBug),
    /// The disk says that it has synced and has not (I6).
    LyingDisk,
    Agent(AgentBug),
    Rank(RankBug),
}

/// A defence of the ranks that is gone.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum RankBug {
    /// Any of the members go on while the coordinator is away, however few (I18).
    QuorumIgnored,
}

/// A defence of the agent or of its shell that is gone.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum AgentBug {
    /// What was sent in a session that broke is not sent again.
    ReportsNotResent,
    /// The fence is neither kept nor compared: an old coordinator is obeyed (I1).
    FenceForgotten,
    /// A start that comes twice starts two processes (I3).
    StartedTwice,
    /// A rank is reported as gone when it was told to stop (I15).
    ExitReportedEarly,
    /// Ranks are never stopped (I10).
    StopIgnored,
    /// A restarted agent takes itself for the old one (I5).
    IncarnationReused,
    /// A restarted agent does not know of the processes that the one before has started (I15).
    InventoryForgotten,
    /// A restarted agent takes any process of a slot for the newest one (I3).
    AdoptedBySlot,
}

impl Planted {
    /// All of them.
    pub fn all() -> Vec<Self> {
        let agents = [
            AgentBug::ReportsNotResent,
            AgentBug::FenceForgotten,
            AgentBug::StartedTwice,
            AgentBug::ExitReportedEarly,
            AgentBug::StopIgnored,
            AgentBug::IncarnationReused,
            AgentBug::InventoryForgotten,
            AgentBug::AdoptedBySlot,
        ];
        let state = PlantedBug::ALL.into_iter().map(Self::State);
        state
            .chain([Self::LyingDisk])
            .chain(agents.into_iter().map(Self::Agent))
            .chain([Self::Rank(RankBug::QuorumIgnored)])
            .collect()
    }

    /// As trace files have it.
    pub fn name(self) -> String {
        match self {
            Self::Nothing | Self::LyingDisk => format!("{self:?}"),
            Self::State(bug) => format!("{bug:?}"),
            Self::Agent(bug) => format!("{bug:?}"),
            Self::Rank(bug) => format!("{bug:?}"),
        }
    }

    pub fn named(name: &str) -> Option<Self> {
        Self::all().into_iter().find(|planted| planted.name() == name)
    }

    pub fn state(self) -> Option<PlantedBug> {
        match self {
            Self::State(bug) => Some(bug),
            Self::Nothing | Self::LyingDisk | Self::Agent(_) | Self::Rank(_) => None,
        }
    }
}
