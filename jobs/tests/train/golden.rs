//! The trainers against PyTorch: the same first weights, samples, order and schedule. The golden files are made by
//! jobs/reference/make_golden.sh.
//!
//! Tolerances: PyTorch adds the same f32 products in another order (one batch of 64 there, eight lanes here), so figures
//! agree to the rounding of f32 sums and not to the bit. Gradients: 2e-5 of the tensor's largest element (a few hundred
//! roundings of 6e-8). Losses: 5e-4, because twenty AdamW steps carry such differences on, and Adam divides a small
//! gradient by its own size, so that its rounding becomes a whole step of that weight.

use safetensors::SafeTensors;

use crate::common;

const GRADIENT_TOLERANCE: f32 = 2e-5;
const LOSS_TOLERANCE: f64 = 5e-4;

#[test]
fn domains_match_pytorch() {
    compare("domains");
}

#[test]
fn digits_match_pytorch() {
    compare("digits");
}

#[test]
fn language_models_match_transformers() {
    compare("language");
}

/// Local steps: the lanes' mean change, and losses over six steps of five. AdamW divides a gradient by its own size, so that the rounding of a small one shows
/// in what five of its steps change.
#[test]
fn local_steps_match_pytorch() {
    compare_within("diloco", 1e-3);
}

fn compare(trainer: &str) {
    compare_within(trainer, GRADIENT_TOLERANCE);
}

fn compare_within(trainer: &str, gradient_tolerance: f32) {
    let golden = std::fs::read(common::jobs().join(format!("reference/golden/{trainer}.safetensors"))).expect("golden");
    let golden = SafeTensors::deserialize(&golden).expect("a safetensors file");
    let values = |name: &str| -> Vec<f32> {
        let bytes = golden.tensor(name).unwrap_or_else(|_| panic!("no golden tensor {name}")).data();
        bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
    };
    let spec = common::spec(&format!("reference/golden/{trainer}.toml"));
    let plan = common::plan(&spec);
    let mut train = common::load(&spec, &plan);
    for tensor in train.save().expect("a saved state") {
        let name = tensor.name.replace("model.", "first.");
        assert!(
            close(&tensor.values, &values(&name), 1e-6) < 1e-6,
            "{name}: run make_golden.sh after a change of init"
        );
    }
    let sum = common::sum(&mut *train, &plan, 0);
    let (gradient, stats) = sum.split_at(train.layout().len());
    let parts = if plan.diloco.is_some() { plan.lanes as f32 } else { stats[2] };
    for param in &train.layout().params {
        let mean: Vec<f32> = gradient[param.offset..][..param.len].iter().map(|g| g / parts).collect();
        let error = close(&mean, &values(&format!("gradient.{}", param.path)), 1e-12);
        assert!(error < gradient_tolerance, "gradient of {}: {error:e} of its largest element", param.path);
    }
    for (step, expected) in values("losses").into_iter().enumerate() {
        let loss = common::step(&mut *train, &plan, step as u64).loss;
        assert!((loss - f64::from(expected)).abs() < LOSS_TOLERANCE, "step {step}: loss {loss}, PyTorch {expected}");
    }
}

/// The largest difference, as a share of the largest expected element (at least `floor`).
fn close(got: &[f32], expected: &[f32], floor: f32) -> f32 {
    assert_eq!(got.len(), expected.len());
    let largest = expected.iter().fold(floor, |largest, value| largest.max(value.abs()));
    got.iter().zip(expected).fold(0f32, |worst, (a, b)| worst.max((a - b).abs())) / largest
}
