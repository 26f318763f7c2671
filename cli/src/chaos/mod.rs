//! Faults on a local cluster, by a seeded schedule, and the account of what they did. Wiring only.
//!
//! [`schedule`] reads what a person wrote, [`plan`] turns it into moments and draws, [`cast`] knows which processes belong to the cluster,
//! [`blows`] carries out and [`lasting`] ends it, [`course`] follows the jobs, [`account`] adds up, [`storm`] runs it all beside a job.

pub mod account;
mod blows;
mod cast;
mod course;
mod disk;
mod lasting;
mod plan;
pub mod schedule;
pub mod storm;
