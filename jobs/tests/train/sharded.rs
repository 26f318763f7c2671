//! Engines that keep the optimizer's state of some parameters each: together they have what one has that keeps all.

use std::collections::BTreeMap;

use stoke_jobs::{NamedTensor, Train};

use crate::common::{load, plan, spec, step, sum};

fn tensors(train: &dyn Train) -> BTreeMap<String, (Vec<usize>, Vec<u32>)> {
    let bits = |tensor: NamedTensor| {
        (tensor.name, (tensor.shape, tensor.values.iter().map(|value| value.to_bits()).collect()))
    };
    train.save().expect("a state").into_iter().map(bits).collect()
}

/// With another `[optimizer]`, if one is given.
fn with_rule(spec: &str, rule: &str) -> String {
    let mut table: toml::Table = spec.parse().expect("a good spec");
    if !rule.is_empty() {
        table["optimizer"] = rule.parse::<toml::Table>().expect("a good section").into();
    }
    table.to_string()
}

/// The parameters of both, each from the one that steps it.
fn exchange(halves: &mut [Box<dyn Train>; 2], places: &[Vec<usize>; 2]) {
    let mut all: BTreeMap<usize, Vec<f32>> = BTreeMap::new();
    for (half, places) in halves.iter().zip(places) {
        half.parameters(places, &mut |place, values| drop(all.insert(place, values.to_vec())));
    }
    for (half, own) in halves.iter_mut().zip(places) {
        half.set_parameters(&mut |place| (!own.contains(&place)).then(|| &all[&place][..]));
    }
}

#[test]
fn parts_of_the_state_are_the_whole_bit_for_bit_and_move_between_engines() {
    let files = [
        ("domains", ""),
        ("digits", ""),
        ("language", ""),
        ("digits", "name = \"sgd\""),
        ("domains", "name = \"sgd\"\nmomentum = 0.9"),
    ];
    for (file, rule) in files {
        let text = with_rule(&spec(&format!("specs/{file}.toml")), rule);
        let mut plan = plan(&text);
        (plan.batch, plan.lanes) = (16, 2);
        let mut whole = load(&text, &plan);
        let mut halves = [load(&text, &plan), load(&text, &plan)];
        let count = whole.layout().params.len();
        let places = [0, 1].map(|half| (0..count).filter(|place| place % 2 == half).collect::<Vec<_>>());
        halves.iter_mut().zip(&places).for_each(|(half, places)| half.keep(places));
        for at in 0..3 {
            step(&mut *whole, &plan, at);
            let total = sum(&mut *halves[1], &plan, at);
            for half in &mut halves {
                half.apply(at, &total).expect("a finite step");
            }
            exchange(&mut halves, &places);
        }
        let expected = tensors(&*whole);
        let saved = halves.each_ref().map(|half| tensors(&**half));
        let moments = |saved: &BTreeMap<String, _>| saved.keys().filter(|name| name.starts_with("optimizer.")).count();
        assert_eq!(moments(&saved[0]) + moments(&saved[1]), moments(&expected), "{file}");
        for saved in &saved {
            assert!(saved.iter().all(|(name, tensor)| expected[name] == *tensor), "{file}");
        }
        // What a half saves it takes again, also out of the whole.
        let all = whole.save().expect("a state");
        halves[0].restore(all.clone()).expect("the whole");
        assert!(tensors(&*halves[0]) == saved[0], "{file}");
        let own = halves[1].save().expect("a state");
        halves[1].restore(own).expect("its own");
        assert!(tensors(&*halves[1]) == saved[1], "{file}");
        // One that has nothing is handed both parts, in two pieces of which one has what is in no parameter.
        let mut newcomer = load(&text, &plan);
        for (half, places) in halves.iter().zip(&places) {
            let part = half.snapshot().part(places, true).tensors().expect("a part");
            newcomer.take_part(part).expect("a good part");
        }
        assert!(tensors(&*newcomer) == expected, "{file}");
        let mut wrong = halves[0].snapshot().part(&places[0], true).tensors().expect("a part");
        wrong[0].shape.push(1);
        assert!(newcomer.take_part(wrong).is_err());
        assert!(tensors(&*newcomer) == expected, "nothing has changed");
    }
}
