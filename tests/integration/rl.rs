//! Reinforcement learning: the same bits on any number of ranks, through kills and a resume; environments of gymnasium's whose processes die; and what is told of
//! a policy afterwards.

use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::sync::OnceLock;

use rustix::process::Signal;
use serde_json::Value;

use crate::harness::{
    Background, Run, checkpoint_at, cluster_of, poll, processes_naming, python_with, run, signal, step_of, stoke, text,
};

const STEPS: u64 = 300_000;
/// So many and no more: on a machine that is so slow that a gang is not up again by then, the job goes on afterwards.
const KILLS: &str = "kill-rank at 600ms, kill-rank at 1200ms, kill-rank at 1800ms, kill-rank at 3s, kill-rank at 4s";

fn cart_pole(nodes: u32) -> Run {
    Run::new("ppo-cartpole.toml", nodes).set("rl.total_steps", STEPS)
}

/// What each of these runs must end with.
fn undisturbed() -> &'static Value {
    static DONE: OnceLock<Value> = OnceLock::new();
    DONE.get_or_init(|| cart_pole(1).finish().0)
}

#[track_caller]
fn same(summary: &Value) {
    for key in ["weights_blake3", "loss", "samples", "ledger", "step", "metrics"] {
        assert_eq!(summary[key], undisturbed()[key], "{key} differs:\n{summary:#}");
    }
}

#[test]
fn cart_pole_is_solved_and_the_weights_are_the_same_on_one_two_and_three_nodes() {
    let metrics = &undisturbed()["metrics"];
    assert!(metrics["episode_return_last_100"].as_f64() > Some(475.0), "{metrics:#}");
    assert!(metrics["eval_return_mean"].as_f64() > Some(475.0), "{metrics:#}");
    assert!(metrics["env_steps"].as_f64() > Some(290_000.0) && metrics["environment_failures"] == 0.0, "{metrics:#}");
    same(&cart_pole(2).finish().0);
    same(&cart_pole(3).finish().0);
}

#[test]
fn ranks_that_are_killed_change_no_bit_of_what_is_learned() {
    let (running, _scratch) = cart_pole(3).set("restart.attempts", 20).with(&["--chaos", KILLS, "--seed", "3"]).start();
    let summary = running.wait().expect(0).says(&["chaos: kill-rank: the rank of node-"]).json();
    same(&summary);
    let chaos = &summary["chaos"];
    assert!(chaos["recoveries"].as_u64() > Some(0) && chaos["samples_lost"] == 0, "{chaos:#}");
}

/// What observations are normalised by is a part of what was learned, also for a learner whose lanes others have played.
#[test]
fn a_policy_is_worth_the_same_whoever_played_its_lanes() {
    let pendulum = |nodes| {
        let run = Run::new("ppo-cartpole.toml", nodes).set("rl.environment", "Pendulum-v1");
        run.set("rl.total_steps", 40_000).set("rl.steps", 256).set("resources.ranks", 1)
    };
    let (alone, _scratch) = pendulum(1).finish();
    let (helped, _scratch) = pendulum(3).set("resources.rollouts", 2).finish();
    for key in ["weights_blake3", "metrics"] {
        assert_eq!(helped[key], alone[key], "{key}");
    }
}

/// Long episodes of many numbers, which reads standard input and hangs once.
const STUBBORN: &str = "
import os, sys, time
import gymnasium, numpy

class Stubborn(gymnasium.Env):
    observation_space = gymnasium.spaces.Box(-1.0, 1.0, (2,), numpy.float32)
    action_space = gymnasium.spaces.Box(-1.0, 1.0, (8,), numpy.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        assert sys.stdin.read() == ''
        self.steps = 0
        return numpy.zeros(2, numpy.float32), {}

    def step(self, action):
        self.steps += 1
        mark = os.environ['STOKE_TEST_MARK']
        if self.steps == 700 and not os.path.exists(mark):
            open(mark, 'w').close()
            time.sleep(600)
        observation = numpy.array([self.steps / 1000, action[0] / 10], numpy.float32)
        return observation, float(action.clip(-1, 1).mean()), False, False, {}

gymnasium.register('Stubborn-v0', Stubborn, max_episode_steps=1000)
";

/// An environment that hangs is a failure that is counted, and costs neither a rank nor a bit; actions of a thousand steps are kept; requests are not what it reads.
#[test]
fn an_environment_that_hangs_is_made_anew_and_counted_and_its_rank_goes_on() {
    let Some(python) = python() else { return };
    let folder = tempfile::tempdir().expect("a temporary folder");
    std::fs::write(folder.path().join("stubborn.py"), STUBBORN).expect("written");
    let mark = folder.path().join("mark");
    let learn = || {
        let run = Run::new("ppo-cartpole.toml", 1).set("rl.environment", "stubborn:Stubborn-v0").set("rl.steps", 500);
        let run = run.set("rl.folders", format!("[{:?}]", folder.path())).set("rl.python", python.display());
        let run = run.set("train.lanes", 1).set("rl.total_steps", 2_000).set("rl.minibatches", 4).set("rl.epochs", 1);
        run.env("STOKE_TEST_MARK", mark.to_str().expect("UTF-8")).finish().0
    };
    let hung = learn();
    assert!(mark.exists(), "it has hung");
    let calm = learn();
    let failures = |told: &Value| told["metrics"]["environment_failures"].as_f64();
    assert_eq!((failures(&hung), failures(&calm)), (Some(1.0), Some(0.0)), "{hung:#}");
    assert_eq!((&hung["recoveries"], &hung["weights_blake3"]), (&0.into(), &calm["weights_blake3"]), "{hung:#}");
}

/// Nothing that is a function of its seed; breaks down once, in the second round.
const MOODY: &str = "
import os, random, gymnasium, numpy

class Moody(gymnasium.Env):
    observation_space = gymnasium.spaces.Box(0, 1, (2,), numpy.float32)
    action_space = gymnasium.spaces.Discrete(2)

    def seen(self):
        return numpy.array([random.random(), random.random()], numpy.float32)

    def reset(self, seed=None, options=None):
        self.steps = 0
        return self.seen(), {}

    def step(self, action):
        self.steps += 1
        if self.steps == 700 and not os.path.exists(os.environ['STOKE_TEST_MARK']):
            open(os.environ['STOKE_TEST_MARK'], 'x').close()
            raise RuntimeError('out of sorts')
        return self.seen(), float(action), False, False, {}

gymnasium.register('Moody-v0', Moody, max_episode_steps=1000)
";

/// It is learned from all the same, and whoever looks is told that the weights are nothing to count on.
#[test]
fn an_environment_that_does_not_depend_on_its_seed_alone_is_told_of() {
    let Some(python) = python() else { return };
    let folder = tempfile::tempdir().expect("a temporary folder");
    std::fs::write(folder.path().join("moody.py"), MOODY).expect("written");
    let run = Run::new("ppo-cartpole.toml", 1).set("rl.environment", "moody:Moody-v0").set("rl.steps", 500);
    let run = run.set("rl.folders", format!("[{:?}]", folder.path())).set("rl.python", python.display());
    let run = run.set("train.lanes", 1).set("rl.total_steps", 2_000).set("rl.epochs", 1);
    let (told, _scratch) = run.env("STOKE_TEST_MARK", folder.path().join("mark").to_str().expect("UTF-8")).finish();
    let metric = |name: &str| told["metrics"][name].as_f64();
    assert_eq!((metric("environment_failures"), metric("environment_strays")), (Some(1.0), Some(1.0)), "{told:#}");
}

/// Ranks that only play: the bits are the same with and without them, and while they die.
#[test]
fn lanes_are_played_elsewhere_and_whoever_plays_may_die() {
    let (calm, _scratch) = cart_pole(3).set("resources.ranks", 1).set("resources.rollouts", 2).finish();
    same(&calm);
    let run = cart_pole(4).set("resources.ranks", 2).set("resources.rollouts", 2);
    let run = run.set("restart.attempts", 20).set("checkpoint.every", 300);
    let (running, scratch) = run.with(&["--chaos", KILLS, "--seed", "5"]).start();
    let cluster = cluster_of(&scratch);
    let elsewhere = poll("a lane that was played elsewhere", || {
        let jobs = Background::start(stoke(["--json", "jobs", "--cluster", cluster.to_str()?])).wait();
        let jobs: Value = serde_json::from_str(&jobs.stdout).ok()?;
        jobs["jobs"][0]["progress"]["rl"]["played_elsewhere"].as_u64().filter(|played| *played > 0)
    });
    assert!(elsewhere > 0);
    same(&running.wait().expect(0).json());
}

/// Weights of two megabytes go from the learner to two players and from them to two others, any of which may die.
#[test]
fn big_weights_are_passed_on_from_player_to_player_and_whoever_passes_them_on_may_die() {
    let big = |nodes| {
        let run = Run::new("ppo-cartpole.toml", nodes).set("rl.hidden", "[512, 512]").set("train.lanes", 8);
        run.set("rl.total_steps", 30_720).set("rl.minibatches", 1).set("restart.attempts", 20)
    };
    let (alone, _scratch) = big(1).finish();
    let helped = big(5).set("resources.ranks", 1).set("resources.rollouts", 4);
    let kills = "kill-rank at 2s, kill-rank at 3s, kill-rank at 4s";
    let (running, scratch) = helped.with(&["--chaos", kills, "--seed", "7"]).start();
    let cluster = cluster_of(&scratch);
    let told = poll("weights that all four had", || {
        let jobs = Background::start(stoke(["--json", "jobs", "--cluster", cluster.to_str()?])).wait();
        let jobs: Value = serde_json::from_str(&jobs.stdout).ok()?;
        let rl = jobs["jobs"][0]["progress"]["rl"].clone();
        rl["broadcast_seconds"].as_f64().map(|_| rl)
    });
    assert!(told["weights_sent"].as_u64() >= Some(1 << 21), "{told:#}");
    let struck = running.wait().expect(0).json();
    for key in ["weights_blake3", "samples", "ledger", "metrics"] {
        assert_eq!(struck[key], alone[key], "{key} differs:\n{struck:#}\n{alone:#}");
    }
}

/// As many updates behind as the spec says, on one rank as on several that die, with others that play ahead.
#[test]
fn impala_is_behind_by_its_staleness_and_learns_the_same_through_kills() {
    let impala = |nodes| {
        let run = Run::new("ppo-cartpole.toml", nodes).set("rl.algorithm", "impala").set("rl.envs", 2);
        run.set("rl.staleness", 4).set("checkpoint.every", 1_000).set("restart.attempts", 20)
    };
    let (calm, scratch) = impala(1).finish();
    assert!(calm["metrics"]["episode_return_last_100"].as_f64() > Some(475.0), "{calm:#}");
    let last = checkpoint_at(&scratch, calm["step"].as_u64().expect("steps"));
    let points = run(["plot", last.to_str().expect("UTF-8"), "--json"]).expect(0).json()["points"].clone();
    let lags: Vec<Option<f64>> = points.as_array().expect("points").iter().map(|point| point["lag"].as_f64()).collect();
    assert_eq!(lags[..5], [0.0, 1.0, 2.0, 3.0, 4.0].map(Some));
    assert!(lags[5..].iter().all(|lag| *lag == Some(4.0)), "never more, never less");
    let others = impala(4).set("resources.ranks", 2).set("resources.rollouts", 2);
    let (running, _scratch) = others.with(&["--chaos", KILLS, "--seed", "2"]).start();
    let struck = running.wait().expect(0).json();
    for key in ["weights_blake3", "samples", "ledger", "metrics"] {
        assert_eq!(struck[key], calm[key], "{key} differs:\n{struck:#}\n{calm:#}");
    }
}

#[test]
fn a_run_that_is_resumed_in_the_middle_of_a_round_ends_as_one_that_was_not_interrupted() {
    // 17 steps a round: 2,500 are 147 of them and one.
    let long = || cart_pole(2).set("checkpoint.every", 2_500).set("checkpoint.keep", 9);
    let (whole, scratch) = long().finish();
    same(&whole);
    let halfway = checkpoint_at(&scratch, 5_000);
    let resume = ["--resume", halfway.to_str().expect("UTF-8")];
    let (resumed, _scratch) = long().with(&resume).finish();
    same(&resumed);
    // Of another policy, or with rounds of another length.
    let others = [
        ("rl.environment", "Acrobot-v1", "[rl] environment = CartPole-v1, the spec says Acrobot-v1"),
        ("rl.hidden", "[32]", "[rl] hidden = [64, 64], the spec says [32]"),
        ("rl.epochs", "2", "[rl] epochs = 4, the spec says 2"),
    ];
    for (key, value, words) in others {
        let (running, _scratch) = cart_pole(1).set(key, value).with(&resume).start();
        running.wait().expect(1).says(&[words]);
    }
}

#[test]
fn a_policy_is_evaluated_and_its_learning_is_drawn() {
    let (summary, scratch) = cart_pole(1).finish();
    let last = checkpoint_at(&scratch, summary["step"].as_u64().expect("steps"));
    let last = last.to_str().expect("UTF-8");
    let eval = ["eval", last, "--seeds", "3", "--episodes", "4", "--json"];
    let told = run(eval).expect(0).json();
    assert_eq!((&told["environment"], &told["episodes"]), (&"CartPole-v1".into(), &12.into()), "{told:#}");
    assert!(told["return_mean"].as_f64() > Some(475.0) && told["return_std"].as_f64().is_some(), "{told:#}");
    assert_eq!(told["seeds"].as_array().map(Vec::len), Some(3));
    assert_eq!(run(eval).expect(0).json(), told, "the same seeds, the same episodes");
    let shown = run(["eval", last, "--seeds", "1", "--greedy"]).expect(0).stdout;
    assert!(shown.contains("CartPole-v1 by ppo-cartpole") && shown.contains("the most probable actions"), "{shown}");

    let picture = scratch.path().join("curve.svg");
    let picture = picture.to_str().expect("UTF-8");
    run(["plot", last, "--out", picture]).expect(0);
    let svg = std::fs::read_to_string(picture).expect("a picture");
    assert!(svg.starts_with("<svg") && svg.contains("episode_return") && svg.contains("explained_variance"));
    let points = run(["plot", last, "--json"]).expect(0).json()["points"].as_array().expect("points").clone();
    assert!(points.len() > 500, "{}", points.len());
    let returns = |at: usize| points[at]["episode_return"].as_f64();
    assert!(returns(0) < Some(60.0) && points[20]["approx_kl"].as_f64().is_some(), "{:?}", points[0]);
    run(["plot", last, "--columns", "reward"]).expect(2).says(&["no column \"reward\"", "episode_return"]);
    run(["predict", "--checkpoint", last]).expect(1).says(&["learns a policy", "stoke eval"]);
}

/// The users' own problem, with its spec as it is but for the steps: a short training is well above guessing, and the others are as the docs have them.
#[test]
fn a_policy_that_scans_is_compared_with_baselines_and_oracles_in_the_same_worlds() {
    let (summary, scratch) = Run::new("scan-budget.toml", 2).set("rl.total_steps", 65_536).finish();
    let last = checkpoint_at(&scratch, summary["step"].as_u64().expect("steps"));
    let eval = ["eval", last.to_str().expect("UTF-8"), "--seeds", "2", "--episodes", "4"];
    let told = run([&eval[..], &["--json"]].concat()).expect(0).json();
    let found = |name: &str| told["services_per_probe"][name].as_f64().unwrap_or_else(|| panic!("{name}: {told:#}"));
    let names = ["random", "frequency", "bayesian", "told_rates", "told_services"];
    assert!(names.is_sorted_by(|a, b| found(a) < found(b)), "{told:#}");
    assert!(found("policy") > 1.5 * found("random") && found("policy") < found("told_services"), "{told:#}");
    assert!((found("times_best_baseline") - found("policy") / found("bayesian")).abs() < 1e-9, "{told:#}");
    assert!((found("policy") - told["return_mean"].as_f64().expect("a return") / 256.0).abs() < 1e-9, "{told:#}");
    assert_eq!(told["services_per_probe"]["seeds"].as_array().map(Vec::len), Some(2));
    let shown = run(eval).expect(0).stdout;
    assert!(shown.contains("times the best baseline") && shown.contains("told rates"), "{shown}");
}

#[test]
fn what_is_wrong_with_a_section_rl_is_said_with_its_line_and_mend() {
    let spec = crate::harness::spec("ppo-cartpole.toml");
    let refused = |set: &str, words: &[&str]| {
        run(["run", spec.to_str().expect("UTF-8"), "--set", set]).expect(2).says(words);
    };
    refused("rl.algorithm=a3c", &["a3c", "ppo"]);
    refused("rl.gamma=1.5", &["gamma is out of range"]);
    refused("rl.replay=100", &["replay is no key of this algorithm"]);
    refused("train.steps=100", &["[rl] total_steps"]);
    refused("train.batch=64", &["batch: leave it out"]);
    refused("train.clip_norm=1.0", &["[rl] max_grad_norm"]);
    refused("schedule.lr=0.1", &["[schedule] means nothing to a job with [rl]"]);
    refused("trainer=digits", &["has no section [rl]"]);
    refused("rl.total_steps=100", &["total_steps is below one round", "raise it"]);
    run(["run", spec.to_str().expect("UTF-8"), "--set", "rl.environment=Pendulum-v1", "--set", "rl.algorithm=dqn"])
        .expect(2)
        .says(&["DQN needs"]);
    refused("rl.options={wind = 1}", &["rl.options", "there is no wind"]);
    // A name that is mistyped, and an interpreter without packages, whatever this machine has.
    let folder = tempfile::tempdir().expect("a temporary folder");
    let (python, out) = (folder.path().join("python"), folder.path().join("out"));
    std::fs::write(&python, "#!/bin/sh\nexec python3 -I -S \"$@\"\n").expect("written");
    std::fs::set_permissions(&python, std::fs::Permissions::from_mode(0o755)).expect("may be run");
    let sets = ["--set", "rl.environment=CartPol-v1", "--set", &format!("rl.python={}", python.display())];
    let started = ["run", spec.to_str().expect("UTF-8"), "--out", out.to_str().expect("UTF-8")];
    let words = ["none of CartPole-v1, Acrobot-v1", "has no gymnasium", "[rl] python"];
    run([&started[..], &sets].concat()).expect(1).says(&words);
}

/// A Python that has gymnasium: the one of the bridge's own tests.
fn python() -> Option<PathBuf> {
    python_with("gymnasium-1.4.0-numpy-2.4.6", &["gymnasium==1.4.0", "numpy==2.4.6"], "gymnasium, numpy")
}

/// Whether a process is an interpreter, and no command that was given the path of one.
fn is_python(pid: u32) -> bool {
    std::fs::read_link(format!("/proc/{pid}/exe")).is_ok_and(|exe| exe.to_string_lossy().contains("python"))
}

/// Not a native one: its process dies in the middle, twice, and what is learned is the same.
#[test]
fn an_environment_of_gymnasiums_is_learned_and_its_deaths_are_survived_and_counted() {
    let Some(python) = python() else { return };
    let blackjack = || {
        let run = Run::new("ppo-cartpole.toml", 2).set("rl.environment", "Blackjack-v1").set("rl.total_steps", 60_000);
        run.set("train.lanes", 2).set("rl.envs", 4).set("rl.python", python.display())
    };
    let (calm, _scratch) = blackjack().finish();
    assert!(calm["metrics"]["eval_return_mean"].as_f64() > Some(-0.6), "{calm:#}");
    assert!(calm["metrics"]["episode_return_last_100"].as_f64() > Some(-0.35), "random play has -0.4: {calm:#}");
    let (running, scratch) = blackjack().start();
    poll("the first rounds", || step_of(&cluster_of(&scratch)).filter(|step| *step > 50));
    let mut struck = Vec::new();
    for _ in 0..2 {
        let victim = poll("a process of the environment", || {
            let started = processes_naming("Blackjack-v1").into_iter().map(|(pid, _)| pid);
            started.filter(|pid| !struck.contains(pid)).find(|pid| is_python(*pid))
        });
        signal(victim, Signal::KILL);
        struck.push(victim);
    }
    let told = running.wait().expect(0).json();
    assert!(told["metrics"]["environment_failures"].as_f64() >= Some(1.0), "{told:#}");
    assert_eq!(text(&told["weights_blake3"]), text(&calm["weights_blake3"]));
}
