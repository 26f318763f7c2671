//! Integration tests through the `stoke` binary: real processes, real sockets, real disks. One module a topic; `harness` starts and ends
//! everything. Nothing here looks inside a crate but for the job spec's files and the wire that a hostile peer would speak.

mod api;
mod bad_disk;
mod bad_spec;
mod bad_token;
mod chaos;
mod checkpoints;
mod control;
mod crash_points;
mod dashboard;
mod descriptors;
mod exec;
mod exhausted;
mod gateways;
mod guides;
mod harness;
mod health;
mod hostile;
mod inference;
mod lifecycle;
mod namespaces;
mod nodes;
mod orphans;
mod pruning;
mod recovery;
mod rl;
mod scaling;
mod services;
mod serving;
mod slow_disk;
mod splitting;
mod stores;
mod training;
mod urgent;
mod watching;
mod workflows;
