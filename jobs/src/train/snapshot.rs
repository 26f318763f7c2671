//! The state as it was after a step, held while training goes on. Owns handles of its tensors and turns them into plain numbers, on whichever
//! thread asks; it never looks at the model again.
//!
//! Taking one copies nothing on the CPU. Burn's tensors are values with a counted buffer: an operation that would write in place finds the buffer
//! shared, and writes its result elsewhere. So the next step cannot touch what is held here, and what it costs is that this one step allocates
//! the moments anew. A device's memory is scarcer and is copied to the host at once.

use std::sync::Arc;

use burn::module::Module;
use burn::tensor::{Device, Tensor};

use super::optimizer::{Update, floats};
use super::parameters::handles;
use super::{Layout, NamedTensor};
use crate::JobError;

/// The count of steps that were left out, as it is saved; there is none where none were.
pub(crate) const SKIPPED: &str = "train.skipped";

/// Parameters and optimizer state after some step. A clone shares the buffers.
#[derive(Clone)]
pub struct Snapshot {
    state: State,
    /// Steps that were left out.
    skipped: u64,
}

#[derive(Clone)]
enum State {
    /// Of a model on Burn; the weights in layout order, each with its place and flat.
    Shared { layout: Arc<Layout>, weights: Vec<(usize, Tensor<1>)>, update: Update },
    /// Plain numbers: `model.*` in layout order, then `optimizer.*`.
    Copied(Vec<NamedTensor>),
}

impl Snapshot {
    pub(crate) fn new<M: Module>(model: &M, layout: &Arc<Layout>, (update, skipped): (&Update, u64)) -> Self {
        let host = Device::flex();
        let weights = handles(model).into_iter().map(|tensor| tensor.to_device(&host)).enumerate().collect();
        let state = State::Shared { layout: layout.clone(), weights, update: update.to_device(&host) };
        Self { state, skipped }
    }

    /// Of a learner whose weights are plain numbers, so few that they are copied at once.
    pub(crate) fn copied(tensors: Vec<NamedTensor>, skipped: u64) -> Self {
        Self { state: State::Copied(tensors), skipped }
    }

    /// The part of it that is of the parameters at these places of the layout, in ascending order. What is of no parameter is in `first` parts.
    pub fn part(mut self, places: &[usize], first: bool) -> Self {
        if let State::Shared { weights, update, .. } = &mut self.state {
            weights.retain(|(place, _)| places.binary_search(place).is_ok());
            update.keep(places);
        }
        if !first {
            self.skipped = 0;
        }
        self
    }

    /// One more tensor, of a copied state.
    pub(crate) fn with(mut self, tensor: NamedTensor) -> Self {
        if let State::Copied(tensors) = &mut self.state {
            tensors.push(tensor);
        }
        self
    }

    /// All that [`super::Train::restore`] needs for the same bits afterwards: the parameters as `model.<path>` in layout order, then the
    /// optimizer's state. Copies what training still uses, so the training thread leaves it to others; each handle is let go once it was read.
    pub fn tensors(self) -> Result<Vec<NamedTensor>, JobError> {
        let mut tensors = match self.state {
            State::Shared { layout, weights, update } => {
                let mut tensors = values(&layout, weights)?;
                tensors.extend(update.save(&layout)?);
                tensors
            }
            State::Copied(tensors) => tensors,
        };
        if self.skipped > 0 {
            // As a counter of the optimizer: exact up to 2^24.
            tensors.push(NamedTensor { name: SKIPPED.to_owned(), shape: vec![1], values: vec![self.skipped as f32] });
        }
        Ok(tensors)
    }

    /// The parameters alone.
    pub fn weights(self) -> Result<Vec<NamedTensor>, JobError> {
        match self.state {
            State::Shared { layout, weights, .. } => values(&layout, weights),
            State::Copied(mut tensors) => {
                tensors.retain(|tensor| tensor.name.starts_with("model."));
                Ok(tensors)
            }
        }
    }
}

fn values(layout: &Layout, weights: Vec<(usize, Tensor<1>)>) -> Result<Vec<NamedTensor>, JobError> {
    let named = weights.into_iter().map(|(place, tensor)| {
        let param = &layout.params[place];
        let name = format!("model.{}", param.path);
        let values = floats(&name, tensor.into_data())?;
        Ok(NamedTensor { name, shape: param.shape.clone(), values })
    });
    named.collect()
}

/// BLAKE3 over the `model.*` tensors in the order given, which is layout order in what [`Snapshot::tensors`] gives: for each, the path's length
/// (u64) and bytes, the rank (u64), the dimensions (u64), then the elements as f32; all little-endian.
pub fn weights_blake3(tensors: &[NamedTensor]) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new();
    let number = |hasher: &mut blake3::Hasher, value: usize| {
        hasher.update(&(value as u64).to_le_bytes());
    };
    let weights = tensors.iter().filter_map(|tensor| Some((tensor.name.strip_prefix("model.")?, tensor)));
    for (path, tensor) in weights {
        number(&mut hasher, path.len());
        hasher.update(path.as_bytes());
        number(&mut hasher, tensor.shape.len());
        tensor.shape.iter().for_each(|&size| number(&mut hasher, size));
        // In runs: a hash that is given four bytes at a time costs many times the hash.
        let mut run = [0; 16 * 1024];
        for values in tensor.values.chunks(run.len() / 4) {
            run.chunks_exact_mut(4).zip(values).for_each(|(bytes, value)| bytes.copy_from_slice(&value.to_le_bytes()));
            hasher.update(&run[..values.len() * 4]);
        }
    }
    *hasher.finalize().as_bytes()
}
