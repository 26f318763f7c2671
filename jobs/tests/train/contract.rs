//! The contract of `Train`, on both trainers with the committed data and small models.

use stoke_jobs::{Diloco, Floats, JobError, LaneWork, NamedTensor, Plan, Pulse};

use crate::common;

const TRAINERS: [&str; 3] = ["domains", "digits", "language"];

fn spec(trainer: &str) -> String {
    common::spec(&format!("reference/golden/{trainer}.toml"))
}

/// The spec with its `[optimizer]` replaced.
fn with_optimizer(trainer: &str, optimizer: &str) -> String {
    let spec = spec(trainer);
    let (head, rest) = spec.split_once("[optimizer]").expect("the spec has an optimizer");
    let (_, tail) = rest.split_once("[schedule]").expect("the spec has a schedule");
    format!("{head}[optimizer]\n{optimizer}\n[schedule]{tail}")
}

#[test]
fn pieces_cover_the_flat_vector_once() {
    for trainer in TRAINERS {
        let spec = spec(trainer);
        let plan = common::plan(&spec);
        let mut train = common::load(&spec, &plan);
        let layout = train.layout().clone();
        let mut next = 0;
        for param in &layout.params {
            assert_eq!((param.offset, param.len), (next, param.shape.iter().product()), "{}", param.path);
            next += param.len;
        }
        let mut seen = vec![0; layout.flat_len()];
        let samples = plan.lane_samples(train.samples(), 0, 0);
        let work = LaneWork::new(0, 0, &samples);
        let mut count =
            |offset: usize, piece: &[f32]| seen[offset..offset + piece.len()].iter_mut().for_each(|n| *n += 1);
        train.lane(work, &mut count).expect("a good lane");
        assert!(seen.iter().all(|&times| times == 1), "{trainer}");
    }
}

#[test]
fn lane_gives_the_same_bits_anywhere() {
    for trainer in TRAINERS {
        // The shipped spec too: its model is large enough for the backend to use its threads.
        for file in [format!("reference/golden/{trainer}.toml"), format!("specs/{trainer}.toml")] {
            let spec = common::spec(&file);
            let plan = common::plan(&spec);
            let first = common::lane(&mut *common::load(&spec, &plan), &plan, 3, 5);
            for threads in [1, 2, 3] {
                let plan = Plan { threads, ..plan.clone() };
                let mut train = common::load(&spec, &plan);
                common::lane(&mut *train, &plan, 3, 1);
                assert!(common::lane(&mut *train, &plan, 3, 5) == first, "{file}, {threads} threads");
            }
        }
    }
}

fn small(batch: usize, lanes: usize) -> Plan {
    let (accumulate, threads, precision) = (1, 1, Floats::F32);
    Plan { seed: 1, batch, lanes, steps: 9, accumulate, threads, clip_norm: None, precision, diloco: None }
}

#[test]
fn lanes_of_any_number_cover_the_batch() {
    let plan = |lanes| small(50, lanes);
    let all = |lanes: usize, step| -> Vec<u64> {
        (0..lanes as u32).flat_map(|lane| plan(lanes).lane_samples(120, step, lane)).collect()
    };
    for step in 0..9 {
        assert_eq!(all(1, step).len(), 50);
        for lanes in [2, 3, 8, 50] {
            assert_eq!(all(lanes, step), all(1, step), "{lanes} lanes");
        }
    }
}

/// Where values are wanted early the last layers' come first, with the bits that they have otherwise, however many passes a lane takes.
#[test]
fn gradients_leave_as_backward_computes_them() {
    let spec = spec("language");
    for (accumulate, threads) in [(1, 1), (2, 1), (1, 3)] {
        let plan = Plan { accumulate, threads, ..common::plan(&spec) };
        let mut train = common::load(&spec, &plan);
        assert!(train.gives_early());
        let expected = common::lane(&mut *train, &plan, 0, 1);
        let (mut flat, mut offsets) = (vec![f32::NAN; expected.len()], Vec::new());
        let samples = plan.lane_samples(train.samples(), 0, 1);
        let work = LaneWork { early: true, ..LaneWork::new(0, 1, &samples) };
        let mut put = |offset: usize, piece: &[f32]| {
            flat[offset..offset + piece.len()].copy_from_slice(piece);
            offsets.push(offset);
        };
        train.lane(work, &mut put).expect("a good lane");
        assert!(flat == expected, "{accumulate} passes, {threads} threads");
        let layout = train.layout();
        assert_eq!(offsets.len(), layout.params.len() + 1);
        assert_eq!(offsets.pop(), Some(layout.len()), "the figures come last");
        assert!(offsets.iter().rev().is_sorted(), "{offsets:?}");
    }
    let [domains, local] = ["domains", "language"].map(|trainer| {
        let diloco = (trainer == "language").then_some(Diloco { local_steps: 2, outer_lr: 0.7, outer_momentum: 0.9 });
        let spec = common::spec(&format!("reference/golden/{trainer}.toml"));
        common::load(&spec, &Plan { diloco, ..common::plan(&spec) })
    });
    assert!(!domains.gives_early() && !local.gives_early(), "all of theirs is there at once");
}

#[test]
fn accumulation_changes_only_the_rounding() {
    let spec = spec("domains");
    let plan = common::plan(&spec);
    let whole = common::lane(&mut *common::load(&spec, &plan), &plan, 0, 0);
    let plan = Plan { accumulate: 3, ..plan };
    let parts = common::lane(&mut *common::load(&spec, &plan), &plan, 0, 0);
    let largest = whole.iter().fold(0f32, |largest, value| largest.max(value.abs()));
    assert!(whole.iter().zip(&parts).all(|(a, b)| (a - b).abs() < 1e-5 * largest));
    assert_eq!(whole[whole.len() - 1], parts[parts.len() - 1], "samples");
}

/// One local step of plain descent, and its change applied whole, is a step of plain descent on the lanes' mean gradient.
#[test]
fn one_local_step_is_a_step() {
    let spec = with_optimizer("digits", "name = 'sgd'");
    let plain = Plan { clip_norm: None, ..common::plan(&spec) };
    let diloco = Some(Diloco { local_steps: 1, outer_lr: 1.0, outer_momentum: 0.0 });
    let local = Plan { diloco, ..plain.clone() };
    let [mut one, mut other] = [&plain, &local].map(|plan| common::load(&spec, plan));
    for step in 0..4 {
        let [one, other] =
            [(&mut one, &plain), (&mut other, &local)].map(|(train, plan)| common::step(&mut **train, plan, step));
        assert!((one.loss - other.loss).abs() < 1e-5 && one.samples == other.samples, "{one:?}, {other:?}");
        assert_eq!(one.lr, other.lr);
    }
    let weights = [one, other].map(|train| train.save().expect("a state"));
    let pairs = weights[0].iter().zip(&weights[1]).flat_map(|(a, b)| a.values.iter().zip(&b.values));
    assert!(pairs.into_iter().all(|(a, b)| (a - b).abs() < 1e-5));
}

/// Whatever was computed before, on however many threads; its state is continued by another process; and it is given up between two local steps.
#[test]
fn local_steps_are_a_function_of_model_step_and_lane() {
    for trainer in TRAINERS {
        let spec = spec(trainer);
        let diloco = Some(Diloco { local_steps: 3, outer_lr: 0.7, outer_momentum: 0.9 });
        let plan = common::plan(&spec);
        let plan = Plan { diloco, batch: plan.batch * 3, ..plan };
        let mut train = common::load(&spec, &plan);
        let layout = train.layout().clone();
        for step in 0..2 {
            common::step(&mut *train, &plan, step);
        }
        let lane = common::lane(&mut *train, &plan, 2, 5);
        assert_eq!(lane[layout.samples_at()], (plan.batch / plan.lanes) as f32, "{trainer}");
        let mut other = common::load(&spec, &Plan { threads: 2, ..plan.clone() });
        common::lane(&mut *other, &plan, 0, 1);
        other.restore(train.save().expect("a state")).expect("the same model");
        assert!(common::lane(&mut *other, &plan, 2, 5) == lane, "{trainer}");
        let [a, b] = [&mut train, &mut other].map(|train| common::step(&mut **train, &plan, 2));
        assert_eq!((a, train.fingerprint()), (b, other.fingerprint()), "{trainer}");

        let asked = std::sync::atomic::AtomicU32::new(0);
        let goes_on = || asked.fetch_add(1, std::sync::atomic::Ordering::Relaxed) < 1;
        let samples = plan.lane_samples(train.samples(), 3, 0);
        let work = LaneWork { pulse: Pulse::new(&goes_on), ..LaneWork::new(3, 0, &samples) };
        let given_up = train.lane(work, &mut |_, _| panic!("nothing came of it")).expect_err("given up");
        assert!(matches!(given_up, JobError::GivenUp), "{given_up}");
        assert_eq!(train.fingerprint(), other.fingerprint(), "{trainer}");
    }
}

const OPTIMIZERS: [(&str, &str); 4] = [
    ("domains", "name = 'adamw'\nweight_decay = 0.1"),
    ("digits", "name = 'adam'\namsgrad = true\nweight_decay = 0.01"),
    ("domains", "name = 'sgd'\nmomentum = 0.9\nnesterov = true"),
    ("domains", "name = 'sgd'"),
];

#[test]
fn a_snapshot_is_of_its_step_whatever_is_trained_meanwhile() {
    for (trainer, optimizer) in OPTIMIZERS {
        let spec = with_optimizer(trainer, optimizer);
        let plan = common::plan(&spec);
        let (mut watched, mut alone) = (common::load(&spec, &plan), common::load(&spec, &plan));
        let (mut held, mut read) = (Vec::new(), Vec::new());
        for step in 0..6 {
            let now = alone.save().expect("a saved state");
            held.push((watched.snapshot(), now.clone()));
            // One that is read while the next step is done.
            let snapshot = watched.snapshot();
            read.push(std::thread::spawn(move || assert!(snapshot.tensors().expect("a state") == now)));
            let (a, b) = (common::step(&mut *watched, &plan, step), common::step(&mut *alone, &plan, step));
            assert_eq!(a, b, "{optimizer}, step {step}");
        }
        for (step, (snapshot, then)) in held.into_iter().enumerate() {
            assert!(snapshot.tensors().expect("a state") == then, "{optimizer}, step {step}");
        }
        read.into_iter().for_each(|reader| reader.join().expect("the state of its step"));
        let tensors = watched.save().expect("a saved state");
        assert_eq!(stoke_jobs::weights_blake3(&tensors), alone.weights_blake3(), "{optimizer}");
    }
}

#[test]
fn resumed_training_gives_the_same_bits() {
    for (trainer, optimizer) in OPTIMIZERS {
        let spec = with_optimizer(trainer, optimizer);
        let plan = common::plan(&spec);
        let mut straight = common::load(&spec, &plan);
        for step in 0..10 {
            common::step(&mut *straight, &plan, step);
        }
        let saved = straight.save().expect("a saved state");

        let mut resumed = common::load(&spec, &Plan { seed: plan.seed + 1, ..plan.clone() });
        resumed.restore(saved.clone()).expect("the same model");
        assert_eq!(resumed.save().expect("a saved state"), saved, "{optimizer}");
        for step in 10..20 {
            let (a, b) = (common::step(&mut *straight, &plan, step), common::step(&mut *resumed, &plan, step));
            assert_eq!(a, b, "{optimizer}, step {step}");
        }
        assert_eq!(straight.weights_blake3(), resumed.weights_blake3(), "{optimizer}");
    }
}

#[test]
fn state_of_before_the_first_step_restores() {
    let spec = spec("domains");
    let plan = common::plan(&spec);
    let fresh = common::load(&spec, &plan);
    let mut other = common::load(&spec, &Plan { seed: 99, ..plan.clone() });
    assert_ne!(fresh.weights_blake3(), other.weights_blake3());
    common::step(&mut *other, &plan, 0);
    other.restore(fresh.save().expect("a saved state")).expect("the same model");
    assert_eq!(fresh.save().expect("a saved state"), other.save().expect("a saved state"));
}

#[test]
fn foreign_state_is_refused_and_changes_nothing() {
    let spec = spec("domains");
    let plan = common::plan(&spec);
    let mut train = common::load(&spec, &plan);
    common::step(&mut *train, &plan, 0);
    let (good, hash) = (train.save().expect("a saved state"), train.weights_blake3());
    let refused = |change: &dyn Fn(&mut Vec<NamedTensor>)| {
        let mut tensors = good.clone();
        change(&mut tensors);
        common::load(&spec, &plan).restore(tensors).expect_err("a wrong state").to_string()
    };
    assert_eq!(refused(&|tensors| drop(tensors.remove(0))), "restore tensor model.embedding.weight: missing");
    assert_eq!(
        refused(&|tensors| tensors[0].shape = vec![8, 41]),
        "restore tensor model.embedding.weight: shape [8, 41], expected [41, 8]: saved with another [model]?"
    );
    assert_eq!(
        refused(&|tensors| tensors[0].values.truncate(5)),
        "restore tensor model.embedding.weight: 5 values in the shape [41, 8]"
    );
    assert_eq!(
        refused(&|tensors| tensors[0].name = "model.other".to_owned()),
        "restore tensor model.embedding.weight: missing"
    );
    assert!(refused(&|tensors| tensors.push(tensors[0].clone())).ends_with("given twice"));
    let moment = "optimizer.output.bias.momentum.moment_2";
    let message = refused(&|tensors| tensors.retain(|tensor| tensor.name != moment));
    assert!(message.starts_with("restore tensor optimizer.output.bias: a field"), "{message}");
    let sgd = with_optimizer("domains", "name = 'sgd'\nmomentum = 0.9");
    assert!(common::load(&sgd, &plan).restore(good.clone()).is_err());

    let mut broken = good.clone();
    broken.retain(|tensor| tensor.name != moment);
    broken[0].values.fill(0.0);
    train.restore(broken).expect_err("a wrong state");
    assert_eq!(train.weights_blake3(), hash);
}

#[test]
fn sums_that_are_not_finite_are_refused() {
    let spec = spec("domains");
    let plan = common::plan(&spec);
    let mut train = common::load(&spec, &plan);
    let hash = train.weights_blake3();
    let sum = common::sum(&mut *train, &plan, 0);
    let len = train.layout().len();
    for (at, what) in [(len, "the loss"), (3, "the gradient")] {
        let mut sum = sum.clone();
        sum[at] = f32::NAN;
        let error = train.apply(41, &sum).expect_err("not finite");
        assert!(matches!(error, JobError::NonFinite { step: 41, what: part } if part == what), "{error}");
    }
    let error = train.apply(0, &sum[1..]).expect_err("too short").to_string();
    assert_eq!(error, format!("length of the gradient sum: got {}, expected {}", len + 2, len + 3));
    assert_eq!(train.weights_blake3(), hash);
    let samples = train.samples();
    let beyond = [0, samples];
    let work = LaneWork::new(0, 0, &beyond);
    let error = train.lane(work, &mut |_, _| ()).expect_err("out of range").to_string();
    assert_eq!(error, format!("sample index below the set's size: got {samples}, expected {samples}"));
}

#[test]
fn steps_that_were_left_out_are_part_of_the_state() {
    let spec = spec("domains");
    let plan = common::plan(&spec);
    let (mut train, mut other) = (common::load(&spec, &plan), common::load(&spec, &plan));
    common::step(&mut *train, &plan, 0);
    let (hash, tensors) = (train.weights_blake3(), train.save().expect("a saved state").len());
    train.skip();
    train.skip();
    assert_eq!((train.weights_blake3(), train.skipped()), (hash, 2));
    let saved = train.save().expect("a saved state");
    assert_eq!(saved.len(), tensors + 1);
    other.restore(saved).expect("the same model");
    assert_eq!((other.weights_blake3(), other.skipped()), (hash, 2));
    // The update of a later step is that of an optimizer which never saw the others, at that step's rate.
    for train in [&mut train, &mut other] {
        common::step(&mut **train, &plan, 3);
    }
    assert_eq!(train.weights_blake3(), other.weights_blake3());
}

#[test]
fn replicas_have_one_fingerprint_and_every_parameter_counts() {
    let spec = spec("domains");
    let plan = common::plan(&spec);
    let (mut train, mut other) = (common::load(&spec, &plan), common::load(&spec, &plan));
    common::step(&mut *train, &plan, 0);
    common::step(&mut *other, &plan, 0);
    let fingerprint = train.fingerprint();
    assert_eq!(fingerprint, other.fingerprint());
    let saved = other.save().expect("a saved state");
    assert_eq!(stoke_jobs::fingerprint(&saved), stoke_jobs::fingerprint(&train.save().expect("a saved state")));
    for at in (0..saved.len()).filter(|at| saved[*at].name.starts_with("model.")) {
        let mut changed = saved.clone();
        let value = changed[at].values.last_mut().expect("values");
        *value = f32::from_bits(value.to_bits() ^ 1);
        other.restore(changed).expect("the same model");
        assert_ne!(other.fingerprint(), fingerprint, "{}", saved[at].name);
    }
    other.restore(saved).expect("the same model");
    assert_eq!(other.fingerprint(), fingerprint);
}

#[test]
fn trained_weights_classify() {
    let spec = spec("domains");
    let plan = common::plan(&spec);
    let mut train = common::load(&spec, &plan);
    for step in 0..80 {
        common::step(&mut *train, &plan, step);
    }
    let metrics = train.evaluate().expect("metrics");
    assert!(metrics["roc_auc"] > 0.85 && metrics["accuracy"] > 0.75, "{metrics:?}");
    assert!(metrics.contains_key("precision_at_1pct_fpr") && metrics.contains_key("recall_at_1pct_fpr"));
    let mut classifier =
        stoke_jobs::classifier(&spec, "domains", train.save().expect("a state")).expect("the same model");
    let lines = ["myetherwallet-login.com", "not a domain", "wikipedia.org"];
    let [phishing, bad, benign] = &classifier.predict(&lines)[..] else { panic!("an answer for each line") };
    let (phishing, benign) = (phishing.as_ref().expect("a name"), benign.as_ref().expect("a name"));
    assert_eq!((phishing.label.as_str(), benign.label.as_str()), ("phishing", "benign"));
    assert!((phishing.scores.iter().map(|(_, score)| score).sum::<f32>() - 1.0).abs() < 1e-6);
    let alone = classifier.predict(&lines[2..]).remove(0).expect("one name");
    assert!((alone.scores[0].1 - benign.scores[0].1).abs() < 1e-6, "an answer depends on its neighbours");
    assert_eq!(*bad, Err("expected a domain name, found \"not a domain\"".to_owned()));
}

#[test]
fn digits_are_read_from_lines() {
    let spec = spec("digits");
    let train = common::load(&spec, &common::plan(&spec));
    let mut classifier =
        stoke_jobs::classifier(&spec, "digits", train.save().expect("a state")).expect("the same model");
    let blank = format!("[{}0]", "0,".repeat(783));
    let row = format!("{{\"label\": 0, \"pixels\": {blank}}}");
    let answers = classifier.predict(&[&blank, &row, "[1,2]", "0 0 0", "{}"]);
    assert_eq!(answers[0].as_ref().expect("an image").scores.len(), 10);
    assert_eq!(answers[1], answers[0], "a row to train on is its image");
    assert_eq!(answers[2], Err("expected 784 values, found 2".to_owned()));
    let expected = "expected a JSON array of 784 numbers, or an object with \"pixels\"";
    assert_eq!(&answers[3..], [Err(expected.to_owned()), Err(expected.to_owned())]);
}

#[test]
fn mistakes_in_a_spec_are_named() {
    // The message for a spec with one line changed, which must name that line.
    let message = |trainer: &str, from: &str, to: &str| {
        let spec = spec(trainer);
        let line = 1 + spec.lines().position(|line| line == from).expect("the line is there");
        let error = stoke_jobs::check(&spec.replace(from, to), trainer, 4).expect_err("a wrong spec").to_string();
        error.strip_prefix(&format!("line {line}: ")).unwrap_or_else(|| panic!("not line {line}: {error}")).to_owned()
    };
    for trainer in TRAINERS {
        stoke_jobs::check(&spec(trainer), trainer, 4).expect("a good spec");
        stoke_jobs::check(&common::spec(&format!("specs/{trainer}.toml")), trainer, 4).expect("a good spec");
    }
    let widths = "widths = [2, 3, 5]";
    assert_eq!(
        message("domains", "hidden = 16", "hiden = 16"),
        "unknown field `hiden` (write one of `length`, `embedding`, `widths`, `channels`, `hidden`)"
    );
    assert!(message("domains", widths, "widths = []").starts_with("[model] widths is out of range"));
    assert!(message("domains", widths, "widths = 'x'").starts_with("invalid type: string \"x\""));
    assert!(message("domains", "held_out = 0.15", "held_out = 1.5").starts_with("[data] held_out is out of range"));
    assert!(message("digits", "held_out = 0.15", "held_out = true").contains("a fraction between 0 and 1"));
    assert!(message("digits", "channels = [4, 8]", "channels = [4, 0]").starts_with("[model] channels is out of"));
    assert!(message("digits", "channels = [4, 8]", "channels = [4]").contains("an array of length 2"));
    assert!(message("digits", "channels = [4, 8]", "channels = [4, 8, 9]").contains("an array of length 2"));
    let error = stoke_jobs::check(&spec("digits"), "digitz", 4).expect_err("no such trainer").to_string();
    assert_eq!(error, "line 3: unknown trainer \"digitz\" (write one of domains, digits, language, rl)");
}

#[test]
fn bad_rows_and_missing_files_are_named() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let file = folder.path().join("rows.csv");
    let load = |rows: &str| {
        std::fs::write(&file, rows).expect("write the rows");
        let spec = format!("trainer = 'domains'\n[data]\ntrain = '{}'\nheld_out = 0.5\n", file.display());
        let error = stoke_jobs::load(&spec, "domains", small(2, 1)).err().expect("wrong rows").to_string();
        error.replace(file.to_str().expect("utf-8"), "FILE")
    };
    assert_eq!(
        load("domain,label\na.com,benign\nb.com,odd\n"),
        "FILE, line 3: label: expected benign or phishing, found \"odd\""
    );
    assert_eq!(
        load("domain,label\nhttp://a.com/,benign\n"),
        "FILE, line 2: domain: expected a domain name, found \"http://a.com/\""
    );
    assert_eq!(load("domain,label\na.com,benign\n"), "data FILE: no training row is labelled phishing");
    std::fs::remove_file(&file).expect("remove the rows");
    let spec = format!("[data]\ntrain = '{}'\n", file.display());
    let error = stoke_jobs::load(&spec, "domains", small(2, 1)).err().expect("no file").to_string();
    assert!(error.starts_with(&format!("read data file {}: No such file", file.display())), "{error}");
}

#[test]
fn another_length_gives_what_a_trainer_of_that_length_gives() {
    for trainer in TRAINERS {
        let spec = spec(trainer);
        let (plan, short) = (common::plan(&spec), Plan { steps: 1, ..common::plan(&spec) });
        let (mut whole, mut set) = (common::load(&spec, &plan), common::load(&spec, &short));
        assert!(set.set_steps(plan.steps).expect("a good length"));
        for step in 0..7 {
            assert_eq!(
                common::step(&mut *whole, &plan, step),
                common::step(&mut *set, &plan, step),
                "{trainer} {step}"
            );
        }
        assert!(whole.weights_blake3() == set.weights_blake3(), "{trainer}");
    }
}
