//! Training in bf16: what is rounded, what is not, and that it is the same everywhere. How close it comes to PyTorch's is in `golden`.

use stoke_jobs::{Diloco, Floats, LaneWork, Plan, STATS};

use crate::common;

const TRAINERS: [&str; 3] = ["domains", "digits", "language"];

fn spec(trainer: &str) -> String {
    common::spec(&format!("reference/golden/{trainer}.toml"))
}

fn bf16(plan: &Plan) -> Plan {
    Plan { precision: Floats::Bf16, ..plan.clone() }
}

/// Whether a bf16 holds it.
fn is_rounded(value: &f32) -> bool {
    value.to_bits() & 0xffff == 0
}

/// A bf16 is 2^-9 off at most, and gradients are but for a few such errors on the way: below 1 % (language: 0.4 %). Where a maximum or a relu goes the other way, the
/// contribution of a whole sample is elsewhere; of the 64 of a step, which nearly cancel before the first step, that is some hundredths (domains 5 %, digits 3 %).
#[test]
fn gradients_are_close_to_those_in_f32() {
    for (trainer, most) in [("domains", 0.1), ("digits", 0.06), ("language", 0.01)] {
        let (spec, plan) = (spec(trainer), common::plan(&spec(trainer)));
        let of = |plan: &Plan| common::sum(&mut *common::load(&spec, plan), plan, 0);
        let (exact, near) = (of(&plan), of(&bf16(&plan)));
        let error = error(&exact[..exact.len() - STATS], &near);
        assert!(error > 0.0 && error < most, "{trainer}: {error}");
        assert_eq!(exact[exact.len() - 1], near[near.len() - 1], "samples");
    }
}

/// How far others are from these, as a share of their length.
fn error(exact: &[f32], near: &[f32]) -> f64 {
    let sum = |values: &mut dyn Iterator<Item = f32>| values.map(|value| f64::from(value).powi(2)).sum::<f64>();
    let apart = sum(&mut exact.iter().zip(near).map(|(a, b)| a - b));
    (apart / sum(&mut exact.iter().copied())).sqrt()
}

/// Gradients that leave early are of the parameters themselves.
#[test]
fn nothing_leaves_early() {
    let spec = spec("language");
    let plan = bf16(&common::plan(&spec));
    let mut train = common::load(&spec, &plan);
    assert!(!train.gives_early());
    let expected = common::lane(&mut *train, &plan, 0, 1);
    let samples = plan.lane_samples(train.samples(), 0, 1);
    let mut flat = vec![f32::NAN; expected.len()];
    let mut put = |offset: usize, piece: &[f32]| flat[offset..offset + piece.len()].copy_from_slice(piece);
    train.lane(LaneWork { early: true, ..LaneWork::new(0, 1, &samples) }, &mut put).expect("a good lane");
    assert!(flat == expected);
}

#[test]
fn lanes_give_the_same_bits_anywhere() {
    for trainer in TRAINERS {
        // The shipped spec too: its model is large enough for the backend to use its threads.
        for file in [format!("reference/golden/{trainer}.toml"), format!("specs/{trainer}.toml")] {
            let spec = common::spec(&file);
            let plan = bf16(&common::plan(&spec));
            let first = common::lane(&mut *common::load(&spec, &plan), &plan, 3, 5);
            let mut train = common::load(&spec, &Plan { threads: 2, ..plan.clone() });
            common::lane(&mut *train, &plan, 3, 1);
            assert!(common::lane(&mut *train, &plan, 3, 5) == first, "{file}");
        }
    }
}

/// A pass gives gradients in bf16; its sum with that of another one is f32, and so are the parameters that follow.
#[test]
fn what_is_summed_and_what_is_kept_is_f32() {
    for trainer in TRAINERS {
        let (spec, plan) = (spec(trainer), bf16(&common::plan(&spec(trainer))));
        let mut train = common::load(&spec, &plan);
        let len = train.layout().len();
        assert!(common::lane(&mut *train, &plan, 0, 0)[..len].iter().all(is_rounded), "{trainer}");
        let parts = Plan { accumulate: 2, ..plan.clone() };
        let summed = common::lane(&mut *common::load(&spec, &parts), &parts, 0, 0);
        assert!(!summed[..len].iter().all(is_rounded), "{trainer}");

        common::step(&mut *train, &plan, 0);
        let saved = train.save().expect("a saved state");
        let mut weights = saved.iter().filter(|tensor| tensor.name.starts_with("model."));
        assert!(weights.all(|tensor| !tensor.values.iter().all(is_rounded)), "{trainer}");
        // Evaluated as they are, whatever lanes compute in; and a checkpoint of the one goes on as the other.
        let mut other = common::load(&spec, &common::plan(&spec));
        other.restore(saved).expect("the same model");
        assert_eq!(other.fingerprint(), train.fingerprint(), "{trainer}");
        assert_eq!(other.evaluate().expect("metrics"), train.evaluate().expect("metrics"), "{trainer}");
    }
}

/// Each of these local steps is smaller than what a bf16 of the weight could tell, and none of them is lost.
#[test]
fn local_steps_are_of_f32_weights() {
    let text = spec("language");
    let (head, rest) = text.split_once("[optimizer]").expect("the spec has an optimizer");
    let (_, tail) = rest.split_once("[schedule]").expect("the spec has a schedule");
    let spec = format!("{head}[optimizer]\nname = 'sgd'\n[schedule]{}", tail.replace("lr = 1e-2", "lr = 1e-4"));
    let plan = common::plan(&text);
    let diloco = Some(Diloco { local_steps: 3, outer_lr: 1.0, outer_momentum: 0.0 });
    let plan = Plan { diloco, batch: plan.batch * 3, ..plan };
    let of = |plan: &Plan| common::lane(&mut *common::load(&spec, plan), plan, 0, 2);
    let (exact, near) = (of(&plan), of(&bf16(&plan)));
    let error = error(&exact[..exact.len() - STATS], &near);
    assert!(error < 0.02, "{error}");
}
