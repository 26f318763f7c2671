//! Weights as PyTorch lays them out, under the names that a plain `nn.Module` has. Owns the one transposition; which tensor is what, its trainer
//! says.
//!
//! P1: tensors come from `check_model`: their names and shapes are the model's.

use super::NamedTensor;

/// What a weight of ours is over there. Ours are [inputs, outputs]; a convolution's inputs are position by position, then channel by channel.
pub(crate) enum Kind {
    /// The same in both: embeddings and biases.
    Plain,
    /// `nn.Linear`: [outputs, inputs].
    Linear,
    /// `nn.Linear` behind a flattened image of this many pixels: [outputs, channels * pixels], channels first.
    Flattened { pixels: usize },
    /// A convolution with this window: [outputs, channels, window...].
    Convolution { window: Vec<usize> },
}

/// `model.<path>` as `<path>`, for PyTorch.
pub(crate) fn to_pytorch(tensor: NamedTensor, kind: &Kind) -> NamedTensor {
    let NamedTensor { name, shape, values } = tensor;
    let name = name.strip_prefix("model.").unwrap_or(&name).to_owned();
    let positions = match kind {
        Kind::Plain => return NamedTensor { name, shape, values },
        Kind::Linear => 1,
        Kind::Flattened { pixels } => *pixels,
        Kind::Convolution { window } => window.iter().product(),
    };
    let &[inputs, outputs] = shape.as_slice() else { unreachable!("P1: {name} was checked to be a matrix") };
    let channels = inputs / positions;
    let mut theirs = Vec::with_capacity(values.len());
    for output in 0..outputs {
        for channel in 0..channels {
            theirs.extend((0..positions).map(|position| values[(position * channels + channel) * outputs + output]));
        }
    }
    let shape = match kind {
        Kind::Convolution { window } => [&[outputs, channels], window.as_slice()].concat(),
        Kind::Plain | Kind::Linear | Kind::Flattened { .. } => vec![outputs, inputs],
    };
    NamedTensor { name, shape, values: theirs }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ours(shape: [usize; 2]) -> NamedTensor {
        let values = (0..shape[0] * shape[1]).map(|i| i as f32).collect();
        NamedTensor { name: "model.a.weight".into(), shape: shape.to_vec(), values }
    }

    #[test]
    fn a_linear_layer_is_transposed() {
        let theirs = to_pytorch(ours([3, 2]), &Kind::Linear);
        assert_eq!((theirs.name.as_str(), theirs.shape), ("a.weight", vec![2, 3]));
        assert_eq!(theirs.values, [0., 2., 4., 1., 3., 5.]);
        assert_eq!(to_pytorch(ours([3, 2]), &Kind::Plain).values, ours([3, 2]).values);
    }

    #[test]
    fn positions_come_behind_channels() {
        // Two positions of two channels: rows are (position, channel).
        let theirs = to_pytorch(ours([4, 1]), &Kind::Convolution { window: vec![2] });
        assert_eq!((theirs.shape, theirs.values), (vec![1, 2, 2], vec![0., 2., 1., 3.]));
        let theirs = to_pytorch(ours([4, 1]), &Kind::Flattened { pixels: 2 });
        assert_eq!((theirs.shape, theirs.values), (vec![1, 4], vec![0., 2., 1., 3.]));
    }
}
