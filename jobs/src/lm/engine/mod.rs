//! Wiring of the engine: which requests are computed together, where their keys and values lie, and what is made of them.

mod answer;
mod batch;
mod compute;
mod head;
mod pages;
mod schedule;
mod stage;

pub use answer::{Answer, Piece, Why};
pub use batch::{AskRow, Batch, BatchRow, Room, WrongBatch};
pub use compute::Engine;
pub use head::{Ask, Head};
pub use pages::{Name, Named, Pages, Table};
pub use schedule::{Limits, Made, Plan, Refused, Request, Row, Schedule, Unexpected};
pub use stage::Stage;
