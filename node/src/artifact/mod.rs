//! Artifacts: folders that jobs which run commands take along, packed as a tar file with gzip, and programs; each known by the hash of its bytes. Wiring.
//!
//! - `pack`: from a folder to the same bytes on every machine; `ignore`: what of it is left out.
//! - `unpack`: into a fresh folder, and nowhere else.
//! - `program`: a single file instead, which runs as a rank.
//! - `cache`: those that this node has fetched.

mod cache;
mod ignore;
mod pack;
mod program;
mod unpack;

use std::path::{Component, Path};

pub use cache::Fetched;
pub(crate) use cache::{ARTIFACTS, Cache};
pub use pack::{PackError, Packed, pack};
pub(crate) use program::MARK;
pub use program::{Unfit, inspect, read as read_program};
pub(crate) use unpack::unpack;

/// Whether a link at `at` (relative to the folder, its parents no links) leads to something within the folder. `..` only at its beginning: behind another
/// link it would lead from where that one leads to.
fn leads_inside(at: &Path, target: &Path) -> bool {
    let mut depth = at.components().count() as i64 - 1;
    let mut descends = false;
    target.components().all(|part| match part {
        Component::Normal(_) => {
            descends = true;
            true
        }
        Component::CurDir => true,
        Component::ParentDir if !descends => {
            depth -= 1;
            depth >= 0
        }
        Component::ParentDir | Component::RootDir | Component::Prefix(_) => false,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_that_could_lead_outside_are_seen() {
        let inside = |at: &str, target: &str| leads_inside(Path::new(at), Path::new(target));
        assert!(inside("a", "b/c") && inside("a/b", "../c") && inside("a/b/c", "../../d") && inside("a", "./b"));
        for (at, target) in [("a", "/etc"), ("a", ".."), ("a/b", "../.."), ("a", "b/../c"), ("a/b", "../../c")] {
            assert!(!inside(at, target), "{at} -> {target}");
        }
    }
}
