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
    /// Whoever listens waits until it is closed, also by a panic.
    struct Open;
    impl Drop for Open {
        fn drop(&mut self) {
            TAP.set(None);
        }
    }
    TAP.set(Some(Tap { watched: BTreeMap::new(), out, given: Vec::new() }));
    let _open = Open;
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

/// The place of a leaf that is watched; once, and not again.
pub(super) fn place(node: u64) -> Option<usize> {
    TAP.with_borrow_mut(|tap| tap.as_mut()?.watched.remove(&node))
}

/// Gives the gradient of what has this place away.
pub(super) fn give(place: usize, gradient: TensorData) {
    TAP.with_borrow_mut(|tap| {
        let tap = tap.as_mut().expect("a place is of an open tap");
        tap.given.push(place);
        // Nobody listens any more if the lane was given up.
        let _ = tap.out.send((place, gradient));
    });
}
