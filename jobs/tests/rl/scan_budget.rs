//! The simulated internet: the same world from the same seed, nothing found that was not there, and an order of merit among the baselines.

use stoke_jobs::rl::scan_budget::{Baseline, Oracle, ScanBudget, WorldConfig, consult, play, rivals};
use stoke_jobs::rl::{Actions, EnvError, StepBuffer, VecEnv};

#[test]
fn who_thinks_finds_more_than_who_counts_and_who_counts_more_than_who_guesses() {
    let config = WorldConfig::default();
    let mean = |baseline| {
        let scores: Vec<_> = (100..120).map(|seed| play(baseline, &config, seed).expect("an episode")).collect();
        for score in &scores {
            assert!(score.found <= score.existed, "{baseline:?} found more than there was: {score:?}");
            assert_eq!(score.probes, u64::from(config.budget) * config.batch as u64);
        }
        scores.iter().map(|score| score.per_probe()).sum::<f64>() / scores.len() as f64
    };
    let [random, frequency, bayesian] = [Baseline::Random, Baseline::Frequency, Baseline::Bayesian].map(mean);
    println!("services found per probe: random {random:.4}, frequency {frequency:.4}, Bayesian {bayesian:.4}");
    assert!(bayesian > 1.5 * frequency && frequency > 1.5 * random, "{random} {frequency} {bayesian}");
}

/// How much there is to be had: who is told every chance from the beginning, and so explores nothing, finds about 1.55 times what the best baseline does. A policy
/// that has to find out cannot be much more than that above it.
#[test]
fn oracles_bound_what_a_policy_can_find() {
    let config = WorldConfig::default();
    let mean = |play: &dyn Fn(u64) -> f64| (100..120).map(play).sum::<f64>() / 20.0;
    let bayesian = mean(&|seed| play(Baseline::Bayesian, &config, seed).expect("an episode").per_probe());
    let [rates, services] = [Oracle::Rates, Oracle::Services]
        .map(|oracle| mean(&|seed| consult(oracle, &config, seed).expect("an episode").per_probe()));
    println!("services found per probe: Bayesian {bayesian:.4}, told rates {rates:.4}, told services {services:.4}");
    assert!(rates > 1.4 * bayesian && rates < 1.7 * bayesian && services > rates, "{bayesian} {rates} {services}");
    let told = rivals(&config, 7, 2).expect("episodes");
    assert_eq!(told, rivals(&config, 7, 2).expect("episodes"), "the same worlds");
    assert!(
        told.iter().all(|rival| rival.per_probe.len() == 2) && told.iter().filter(|rival| rival.oracle).count() == 2
    );
}

/// A world that stands still, small enough to be scanned whole.
fn still() -> WorldConfig {
    let cells = 4 * 3;
    WorldConfig {
        groups: 4,
        systems: 2,
        hosts: 20,
        ports: 3,
        batch: 5,
        budget: cells * 4 * 2,
        renumbered: 0.0,
        updates: 0.0,
        outbreaks: 0.0,
        ..WorldConfig::default()
    }
}

#[test]
fn whole_scan_of_a_still_world_finds_every_service_once() {
    let config = still();
    let mut env = ScanBudget::new(config.clone(), 1).expect("good options");
    let mut buffer = StepBuffer::new(&env);
    env.reset(&[9], &mut buffer.observations).expect("a reset");
    let existed = env.existed(0);
    let (mut found, mut open) = ([0, 0], [0, 0]);
    for pass in 0..2 {
        for cell in (0..config.cells() as u32).flat_map(|cell| [cell; 4]) {
            assert!(!buffer.terminated[0]);
            env.step(Actions::Discrete(&[cell]), buffer.step()).expect("a step");
            let probed = env.probed(0).expect("a batch");
            assert_eq!(buffer.rewards[0], probed.found as f32 / 5.0);
            found[pass] += u64::from(probed.found);
            open[pass] += u64::from(probed.open);
        }
    }
    assert!(buffer.terminated[0] && existed > 10, "the budget is spent");
    assert_eq!((found, open), ([existed, 0], [existed, existed]));
}

#[test]
fn drift_brings_new_services_and_takes_old_ones() {
    let config = WorldConfig { renumbered: 50.0, updates: 0.5, outbreaks: 0.2, ..still() };
    let mut env = ScanBudget::new(config.clone(), 1).expect("good options");
    let mut buffer = StepBuffer::new(&env);
    env.reset(&[9], &mut buffer.observations).expect("a reset");
    let first = env.existed(0);
    let mut found = 0;
    while !buffer.terminated[0] {
        env.step(Actions::Discrete(&[4]), buffer.step()).expect("a step");
        found += u64::from(env.probed(0).expect("a batch").found);
        assert!(buffer.observations.iter().all(|value| (0.0..=1.0).contains(value)), "{:?}", buffer.observations);
    }
    assert!(found > 20 && env.existed(0) > first + found, "{found} of {}", env.existed(0));
    assert_eq!(buffer.observations.last(), Some(&0.0), "nothing is left of the budget");
}

#[test]
fn impossible_worlds_are_refused() {
    let wrong = [
        WorldConfig { groups: 0, ..WorldConfig::default() },
        WorldConfig { systems: 40, ..WorldConfig::default() },
        WorldConfig { batch: 65, ..WorldConfig::default() },
        WorldConfig { ports: 61, ..WorldConfig::default() },
        WorldConfig { updates: f64::NAN, ..WorldConfig::default() },
        WorldConfig { groups: usize::MAX, ..WorldConfig::default() },
    ];
    for config in wrong {
        let Err(error) = ScanBudget::new(config, 1) else { panic!("an impossible world") };
        assert!(matches!(error, EnvError::Options { .. }), "{error}");
    }
}
