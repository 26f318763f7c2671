//! Wiring of the engine: which requests are computed together, where their keys and values lie, and what is made of them.

mod compute;
mod pages;
mod schedule;

pub use compute::{Ask, Engine, Made};
pub use pages::{Pages, Table};
pub use schedule::{Ends, Limits, Refused, Request, Row, Schedule};
