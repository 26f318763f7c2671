//! The bridge to gymnasium: real environments that are not native, and environments and processes that fail. The Python that has gymnasium is made
//! once below the user's cache; where PyPI cannot be reached that is said, and nothing is tested.

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use serde_json::{Map, json};
use stoke_jobs::rl::{Actions, Bridge, BridgeConfig, EnvError, Pcg64, Space, StepBuffer, VecEnv, make};

/// Packages of PyPI, below the user's cache.
const PACKAGES: [&str; 2] = ["gymnasium==1.4.0", "numpy==2.4.6"];
/// Long enough for a machine under load; nothing waits for it but a test that fails.
const PATIENCE: Duration = Duration::from_secs(120);
/// Says to the test binary that it is to be the owner that dies.
const OWNER: &str = "STOKE_TEST_BRIDGE_OWNER";

/// A Python that has gymnasium. None, and said why, where the packages cannot be had.
pub(crate) fn python() -> Option<&'static Path> {
    static PYTHON: OnceLock<Option<PathBuf>> = OnceLock::new();
    PYTHON
        .get_or_init(|| {
            let folder = std::env::home_dir()?.join(".cache/stoke-tests").join(PACKAGES.join("-").replace("==", "-"));
            let python = folder.join("bin/python");
            let have = || Command::new(&python).args(["-c", "import gymnasium, numpy"]).output();
            if have().is_ok_and(|output| output.status.success()) {
                return Some(python);
            }
            let made = Command::new("python3").args(["-m", "venv", "--clear"]).arg(&folder).output();
            let installed =
                made.and_then(|_| Command::new(&python).args(["-m", "pip", "install", "-q"]).args(PACKAGES).output());
            let why = match installed {
                Ok(output) if output.status.success() => return Some(python),
                Ok(output) => String::from_utf8_lossy(&output.stderr).into_owned(),
                Err(error) => error.to_string(),
            };
            // Past the capture of the test runner: nobody should take this for a test that was done.
            writeln!(std::io::stderr(), "not tested with gymnasium: {why}").expect("stderr");
            None
        })
        .as_deref()
}

fn config(python: &Path, name: &str, num_envs: usize) -> BridgeConfig {
    BridgeConfig {
        python: python.into(),
        name: name.to_owned(),
        options: Map::new(),
        folders: vec![Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/rl")],
        num_envs,
        start_max: PATIENCE,
        step_max: PATIENCE,
    }
}

/// The environment of environments.py that fails so at its fifth step, in two envs.
fn failing(python: &Path, how: &str) -> BridgeConfig {
    let mut config = config(python, "environments:Failing-v0", 2);
    config.options.insert("how".to_owned(), json!(how));
    config
}

#[test]
fn envs_of_gymnasium_are_those_of_the_native_environment() {
    let Some(python) = python() else { return };
    for name in ["CartPole-v1", "MountainCarContinuous-v0"] {
        let seeds = [3, 1 << 33, 8];
        let mut native = make(name, 3).expect("a native environment");
        let mut bridge = Bridge::start(&config(python, name, 3)).expect("gymnasium starts");
        assert_eq!(bridge.spec(), native.spec());
        let (mut here, mut there) = (StepBuffer::new(&*native), StepBuffer::new(&bridge));
        native.reset(&seeds, &mut here.observations).expect("a reset");
        bridge.reset(&seeds, &mut there.observations).expect("a reset");
        let (mut rng, mut over) = (Pcg64::new(5), [false; 3]);
        let len = native.spec().observation_len();
        for step in 0..1_000 {
            for (index, over) in over.iter_mut().enumerate() {
                let row = |buffer: &StepBuffer| {
                    let seen = buffer.observations[index * len..][..len].to_vec();
                    (seen, buffer.rewards[index], buffer.terminated[index], buffer.truncated[index])
                };
                // Later episodes have seeds of their own there.
                assert!(*over || row(&here) == row(&there), "{name}, env {index}, step {step}");
                *over |= here.terminated[index] || here.truncated[index];
            }
            let choices: [u32; 3] = std::array::from_fn(|_| rng.below(2) as u32);
            let forces = choices.map(|choice| choice as f32 * 3.0 - 1.5);
            let actions = match native.spec().action {
                Space::Discrete { .. } => Actions::Discrete(&choices),
                Space::Box { .. } => Actions::Box(&forces),
            };
            native.step(actions, here.step()).expect("a step");
            bridge.step(actions, there.step()).expect("a step");
        }
        assert_eq!(over, [true; 3], "{name}");
    }
}

#[test]
fn environments_that_are_not_native_run_with_flattened_observations() {
    let Some(python) = python() else { return };
    // Observation numbers, and how many of them are 1: a tuple of three choices, a choice, a choice.
    for (name, len, ones, choices, limit) in [
        ("Blackjack-v1", 45, 3.0, 2, None),
        ("FrozenLake-v1", 16, 1.0, 4, Some(100)),
        ("Taxi-v4", 500, 1.0, 6, Some(200)),
    ] {
        let mut config = config(python, name, 4);
        if name == "FrozenLake-v1" {
            config.options.insert("is_slippery".to_owned(), json!(false));
        }
        let mut env = Bridge::start(&config).expect("gymnasium starts");
        assert_eq!(env.spec().observation_len(), len);
        assert_eq!((&env.spec().action, env.spec().steps_max), (&Space::Discrete { n: choices }, limit));
        let mut buffer = StepBuffer::new(&env);
        env.reset(&[1, 2, 3, 4], &mut buffer.observations).expect("a reset");
        let (mut rng, mut ends, mut ended) = (Pcg64::new(1), 0, [false; 4]);
        for _ in 0..450 {
            let actions: [u32; 4] = std::array::from_fn(|_| rng.below(choices.into()) as u32);
            env.step(Actions::Discrete(&actions), buffer.step()).expect("a step");
            assert!(buffer.observations.chunks(len).all(|row| row.iter().sum::<f32>() == ones), "{name}");
            for (index, ended) in ended.iter_mut().enumerate() {
                let end = buffer.terminated[index] || buffer.truncated[index];
                assert!(!*ended || (buffer.rewards[index] == 0.0 && !end), "{name}");
                *ended = end;
                ends += u32::from(end);
            }
        }
        assert!(ends >= 8, "{name}: {ends} ends");
    }
}

/// Steps until an error comes: at the fifth step, and what was found before it is sound.
fn fail(env: &mut Bridge) -> EnvError {
    let mut buffer = StepBuffer::new(env);
    env.reset(&[1, 2], &mut buffer.observations).expect("a reset");
    for step in 1..5 {
        env.step(Actions::Discrete(&[0, 1]), buffer.step()).expect("a step");
        assert_eq!(buffer.observations, [step as f32 / 10.0; 4]);
        assert_eq!(buffer.rewards, [1.0; 2]);
    }
    let error = env.step(Actions::Discrete(&[0, 1]), buffer.step()).expect_err("the fifth step fails");
    let after = env.step(Actions::Discrete(&[0, 1]), buffer.step()).expect_err("it is closed");
    assert!(error.is_fatal() && matches!(after, EnvError::Closed { .. }), "{error}; {after}");
    assert_eq!(env.process_id(), None);
    error
}

#[test]
fn failures_are_errors_that_tell_what_python_said() {
    let Some(python) = python() else { return };
    for how in ["raise", "exit", "nan", "inf"] {
        let mut env = Bridge::start(&failing(python, how)).expect("gymnasium starts");
        let process = env.process_id().expect("a process");
        let error = fail(&mut env);
        match (how, &error) {
            ("raise", EnvError::Raised { said, .. }) => {
                assert!(said.ends_with("RuntimeError: the world has ended"), "{said}")
            }
            ("exit", EnvError::Ended { said, status, .. }) => {
                assert!(said.contains("about to leave") && status.contains('3'), "{said}, {status}");
                assert!(said.contains("printed by an environment"), "standard output is no frame: {said}");
            }
            ("nan", EnvError::NonFinite { what, env, .. }) => assert_eq!((*what, *env), ("an observation", 0)),
            ("inf", EnvError::NonFinite { what, env, .. }) => assert_eq!((*what, *env), ("a reward", 0)),
            _ => panic!("{how}: {error}"),
        }
        assert!(!lives(process), "{how}");
    }
}

#[test]
fn silence_ends_at_its_deadline() {
    let Some(python) = python() else { return };
    for how in ["hang", "close"] {
        let step_max = Duration::from_secs(5);
        let mut env = Bridge::start(&BridgeConfig { step_max, ..failing(python, how) }).expect("gymnasium starts");
        let process = env.process_id().expect("a process");
        let error = fail(&mut env);
        match (how, &error) {
            ("hang", EnvError::Silent { said, deadline, .. }) => {
                assert!(said.contains("thinking") && *deadline == step_max, "{said}");
            }
            ("close", EnvError::Ended { .. }) => {}
            _ => panic!("{how}: {error}"),
        }
        assert!(!lives(process), "{how}");
    }
}

#[test]
fn what_cannot_be_made_is_an_error_at_the_start() {
    let Some(python) = python() else { return };
    let said = |config: &BridgeConfig| Bridge::start(config).expect_err("it cannot be made").to_string();
    assert!(said(&failing(python, "at start")).ends_with("ValueError: no such world"));
    assert!(said(&config(python, "Nothing-v0", 1)).contains("Nothing"));
    assert!(said(&config(Path::new("/nowhere/python"), "Taxi-v4", 1)).contains("/nowhere/python"));
    assert!(said(&config(Path::new("/bin/cat"), "Taxi-v4", 1)).contains("ended"), "no Python");
    assert!(said(&config(python, "Taxi-v4", 0)).contains("envs"));
    assert!(said(&BridgeConfig { start_max: Duration::ZERO, ..config(python, "Taxi-v4", 1) }).contains("no answer"));
}

#[test]
fn process_ends_with_its_bridge() {
    let Some(python) = python() else { return };
    let bridge = Bridge::start(&config(python, "Taxi-v4", 1)).expect("gymnasium starts");
    let process = bridge.process_id().expect("a process");
    assert!(lives(process));
    drop(bridge);
    assert!(!lives(process));
}

#[test]
fn killed_process_is_an_error_and_another_one_plays_the_same_envs() {
    let Some(python) = python() else { return };
    let begin = || {
        let mut env = Bridge::start(&config(python, "Taxi-v4", 2)).expect("gymnasium starts");
        let mut buffer = StepBuffer::new(&env);
        env.reset(&[8, 9], &mut buffer.observations).expect("a reset");
        env.step(Actions::Discrete(&[0, 1]), buffer.step()).expect("a step");
        (env, buffer)
    };
    let (mut env, mut buffer) = begin();
    let seen = buffer.clone();
    let process = env.process_id().expect("a process").to_string();
    assert!(Command::new("kill").args(["-9", &process]).status().expect("kill runs").success());
    let error = env.step(Actions::Discrete(&[2, 3]), buffer.step()).expect_err("it was killed");
    assert!(matches!(&error, EnvError::Ended { status, .. } if status.contains('9')), "{error}");
    assert!(error.is_fatal() && seen == begin().1, "{error}");
}

#[test]
fn saved_env_goes_on_in_another_process_with_the_same_bits() {
    let Some(python) = python() else { return };
    for name in ["Taxi-v4", "CartPole-v1", "Pendulum-v1"] {
        let begin = |count| Bridge::start(&config(python, name, count)).expect("gymnasium starts");
        let (mut env, mut other) = (begin(2), begin(1));
        let (mut buffer, mut there) = (StepBuffer::new(&env), StepBuffer::new(&other));
        env.reset(&[8, 9], &mut buffer.observations).expect("a reset");
        let (mut rng, len) = (Pcg64::new(1), env.spec().observation_len());
        for round in 0..4 {
            let mut step = |env: &mut Bridge, buffer: &mut StepBuffer, also: Option<(&mut Bridge, &mut StepBuffer)>| {
                let choices = [rng.below(2) as u32, rng.below(2) as u32];
                let forces = choices.map(|choice| choice as f32);
                let box_space = matches!(env.spec().action, Space::Box { .. });
                let both = if box_space { Actions::Box(&forces) } else { Actions::Discrete(&choices) };
                env.step(both, buffer.step()).expect("a step");
                let Some((other, there)) = also else { return };
                let one = if box_space { Actions::Box(&forces[1..]) } else { Actions::Discrete(&choices[1..]) };
                other.step(one, there.step()).expect("a step");
            };
            // Also where an episode has just ended, and where many pieces are played.
            (0..[1, 30, 299, 70][round]).for_each(|_| step(&mut env, &mut buffer, None));
            let saved = env.save(1).expect("a saved env");
            other.restore(0, &saved, &mut there.observations).expect("a restored env");
            assert_eq!(there.observations, buffer.observations[len..], "{name}: the observation is there again");
            assert_eq!(other.save(0).expect("a saved env"), saved);
            for _ in 0..50 {
                step(&mut env, &mut buffer, Some((&mut other, &mut there)));
                assert_eq!(there.observations, buffer.observations[len..], "{name}");
                assert_eq!(
                    (there.rewards[0], there.terminated[0]),
                    (buffer.rewards[1], buffer.terminated[1]),
                    "{name}"
                );
            }
            for damaged in [&saved[..16], &[saved.as_slice(), &[1]].concat(), &[&saved[..16], &[2]].concat()] {
                let error = other.restore(0, damaged, &mut there.observations).expect_err("damaged bytes");
                assert!(matches!(error, EnvError::State { .. }), "{error}");
            }
        }
    }
}

/// Not a test by itself: the next one runs it in a process of its own, and kills that.
#[test]
fn an_owner_that_is_killed() {
    if std::env::var_os(OWNER).is_none() {
        return;
    }
    let mut env = Bridge::start(&failing(python().expect("tried before"), "hang")).expect("gymnasium starts");
    println!("python {}", env.process_id().expect("a process"));
    fail(&mut env);
}

#[test]
fn process_does_not_outlive_a_killed_owner_in_the_middle_of_a_step() {
    let Some(_) = python() else { return };
    let mut owner = Command::new(std::env::current_exe().expect("this test"))
        .args(["--exact", "bridge::an_owner_that_is_killed", "--nocapture"])
        .env(OWNER, "1")
        .stdout(Stdio::piped())
        .spawn()
        .expect("the test runs again");
    let lines = BufReader::new(owner.stdout.take().expect("piped")).lines().map_while(Result::ok);
    let process: u32 = lines
        .filter_map(|line| line.rsplit_once("python ").and_then(|(_, id)| id.trim().parse().ok()))
        .next()
        .expect("the owner says which process it has");
    assert!(lives(process));
    owner.kill().expect("the owner is killed");
    owner.wait().expect("the owner is waited for");
    let begun = Instant::now();
    while lives(process) {
        assert!(begun.elapsed() < PATIENCE, "process {process} lives on");
        std::thread::yield_now();
    }
}

/// Whether there is such a process that has not ended.
fn lives(process: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{process}/stat"));
    stat.is_ok_and(|stat| stat.rsplit_once(") ").is_some_and(|(_, state)| !state.starts_with(['Z', 'X'])))
}
