//! Gradients that leave while backward goes on to earlier layers. Burn hands them all out at its end; a layer of ours whose weight nobody else uses knows when the
//! weight's gradient is whole, and gives it away in place of registering it. Owns who is watched on this thread, which runs forward and backward alike.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::sync::mpsc::Sender;

use burn::tensor::TensorData;

thread_local! {
    static TAP: RefCell<Option<Tap>> = const { RefCell::new(None) };
}

struct Tap {
    /// The parameter's place in the layout, by the id of its node in the graph.
    watched: BTreeMap<u64, usize>,
    out: Sender<(usize, TensorData)>,
    given: Vec<usize>,
}

/// Runs backward on this thread; `out` gets gradients of what `watch` names by [`watch`], with their places. The result, and the places that were given.
pub(crate) fn open<R>(
    watch: impl FnOnce(),
    out: Sender<(usize, TensorData)>,
    backward: impl FnOnce() -> R,
) -> (R, Vec<usize>) {
    TAP.set(Some(Tap { watched: BTreeMap::new(), out, given: Vec::new() }));
    watch();
    let result = backward();
    let given = TAP.take().map_or_else(Vec::new, |tap| tap.given);
    (result, given)
}

/// The parameter with this place is the leaf `node`.
pub(super) fn watch(node: u64, place: usize) {
    TAP.with_borrow_mut(|tap| {
        if let Some(tap) = tap {
            tap.watched.insert(node, place);
        }
    });
}

/// Gives the gradient of a leaf away if it is watched; once, and not again.
pub(super) fn take(node: u64, gradient: impl FnOnce() -> TensorData) -> bool {
    TAP.with_borrow_mut(|tap| {
        let Some(tap) = tap else { return false };
        let Some(place) = tap.watched.remove(&node) else { return false };
        tap.given.push(place);
        // Nobody listens any more if the lane was given up.
        let _ = tap.out.send((place, gradient()));
        true
    })
}
