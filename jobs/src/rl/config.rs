//! The `[rl]` section of a spec: what is learned where and how. Owns keys, defaults (CleanRL's, by algorithm and kind of action; of IMPALA, which it does not
//! have, what held on CartPole with a policy four updates behind: docs/rl.md) and their checks; makes no environment.

use std::path::PathBuf;

use serde::Deserialize;
use serde_json::{Map, Value};

use super::environment::EnvConfig;
use super::error::RlError;
use super::policy::PolicyKind;
use super::returns::Truncation;
use super::{EnvError, EnvSpec, Space};
use crate::JobError;
use crate::config::Spec;

const SECTION: &str = "rl";

#[derive(Debug, Deserialize)]
struct Document {
    rl: Section,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Algorithm {
    Ppo,
    Impala,
    Dqn,
}

/// As it is written. None: the default, which is known once the environment is.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
struct Section {
    algorithm: Algorithm,
    environment: String,
    /// Of the environment; of gymnasium's, more arguments of `gymnasium.make`.
    #[serde(default)]
    options: Map<String, Value>,
    /// An interpreter that has gymnasium, for environments that are not native.
    python: Option<PathBuf>,
    /// Where it looks for modules first.
    #[serde(default)]
    folders: Vec<PathBuf>,
    /// Of each lane.
    envs: Option<usize>,
    steps: Option<usize>,
    total_steps: Option<u64>,
    hidden: Option<Vec<usize>>,
    lr: Option<f64>,
    anneal: Option<bool>,
    gamma: Option<f64>,
    normalise: Option<bool>,
    max_grad_norm: Option<f64>,
    gae_lambda: Option<f64>,
    epochs: Option<usize>,
    minibatches: Option<usize>,
    clip: Option<f64>,
    clip_values: Option<bool>,
    normalise_advantages: Option<bool>,
    ent_coef: Option<f64>,
    vf_coef: Option<f64>,
    staleness: Option<u32>,
    rho: Option<f64>,
    c: Option<f64>,
    replay: Option<usize>,
    batch: Option<usize>,
    learning_starts: Option<u64>,
    train_every: Option<u64>,
    target_every: Option<u64>,
    double: Option<bool>,
    huber: Option<bool>,
    epsilon: Option<[f64; 2]>,
    exploration: Option<f64>,
}

/// Learning rate and clipping, of all algorithms.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rate {
    pub lr: f64,
    /// Rounds after which it is 0, falling in a line. None: it stays.
    pub anneal_rounds: Option<u64>,
}

impl Rate {
    pub fn at(&self, round: u64) -> f64 {
        self.anneal_rounds.map_or(self.lr, |rounds| self.lr * (1.0 - round as f64 / rounds.max(1) as f64).max(0.0))
    }
}

#[derive(Debug, Clone, PartialEq)]
pub struct PpoConfig {
    pub rate: Rate,
    pub max_grad_norm: Option<f64>,
    pub gamma: f64,
    pub gae_lambda: f64,
    pub epochs: usize,
    pub minibatches: usize,
    pub clip: f64,
    pub clip_values: bool,
    pub normalise_advantages: bool,
    pub ent_coef: f64,
    pub vf_coef: f64,
}

#[derive(Debug, Clone, PartialEq)]
pub struct ImpalaConfig {
    pub rate: Rate,
    pub max_grad_norm: Option<f64>,
    pub gamma: f64,
    pub ent_coef: f64,
    pub vf_coef: f64,
    pub truncation: Truncation,
    /// Over all advantages of an update.
    pub normalise_advantages: bool,
    /// Updates that the policy of a trajectory may be behind the learner's.
    pub staleness: u32,
}

#[derive(Debug, Clone, PartialEq)]
pub struct DqnConfig {
    pub rate: Rate,
    pub max_grad_norm: Option<f64>,
    pub gamma: f64,
    /// Lanes of the job.
    pub lanes: u32,
    /// Env steps of a round, over all lanes.
    pub round_steps: u64,
    /// Transitions that a lane keeps.
    pub replay: usize,
    /// Samples of an update, over all lanes.
    pub batch: usize,
    /// Env steps before the first update, over all lanes as all steps below.
    pub learning_starts: u64,
    pub train_every: u64,
    pub target_every: u64,
    pub double: bool,
    pub huber: bool,
    pub epsilon: [f64; 2],
    /// Env steps of one env over which epsilon falls.
    pub exploration_steps: u64,
}

#[derive(Debug, Clone, PartialEq)]
pub enum AlgorithmConfig {
    Ppo(PpoConfig),
    Impala(ImpalaConfig),
    Dqn(DqnConfig),
}

/// A section that was read and checked.
#[derive(Debug, Clone, PartialEq)]
pub struct RlConfig {
    section: Section,
}

/// All that is decided once environment and lanes are known.
#[derive(Debug, Clone, PartialEq)]
pub struct RlPlan {
    pub algorithm: AlgorithmConfig,
    pub lanes: u32,
    /// Envs of a lane.
    pub envs: usize,
    /// Steps of each env in a round.
    pub steps: usize,
    pub rounds: u64,
    pub hidden: Vec<usize>,
    pub gamma: f64,
    pub normalise: bool,
}

impl RlPlan {
    /// Rounds that the weights which play are old: each is an update.
    pub fn behind(&self) -> usize {
        match &self.algorithm {
            AlgorithmConfig::Impala(impala) => impala.staleness as usize,
            AlgorithmConfig::Ppo(_) | AlgorithmConfig::Dqn(_) => 0,
        }
    }

    /// Why a checkpoint of a job with the other plan cannot be continued under this one: its rounds or its policy are others.
    pub(super) fn continues(&self, other: &Self) -> Result<(), String> {
        let parts = |plan: &Self| match &plan.algorithm {
            AlgorithmConfig::Ppo(ppo) => (ppo.epochs, ppo.minibatches),
            AlgorithmConfig::Impala(_) | AlgorithmConfig::Dqn(_) => (1, 1),
        };
        let updates = |plan: &Self| match &plan.algorithm {
            AlgorithmConfig::Dqn(dqn) => dqn.train_every,
            AlgorithmConfig::Ppo(_) | AlgorithmConfig::Impala(_) => 0,
        };
        same("envs", other.envs, self.envs)?;
        same("steps", other.steps, self.steps)?;
        same("hidden", format!("{:?}", other.hidden), format!("{:?}", self.hidden))?;
        same("normalise", other.normalise, self.normalise)?;
        same("epochs", parts(other).0, parts(self).0)?;
        same("minibatches", parts(other).1, parts(self).1)?;
        same("staleness", other.behind(), self.behind())?;
        same("train_every", updates(other), updates(self))
    }
}

/// Of a key that a checkpoint is bound to.
fn same<T: PartialEq + std::fmt::Display>(key: &str, theirs: T, ours: T) -> Result<(), String> {
    if theirs == ours {
        return Ok(());
    }
    Err(format!(
        "it was trained with [rl] {key} = {theirs}, the spec says {ours}: write {key} = {theirs}, or start without it"
    ))
}

impl RlConfig {
    pub fn parse(config_toml: &str) -> Result<Self, JobError> {
        let spec = Spec::new(config_toml);
        let document: Document = toml::from_str(config_toml).map_err(|error| spec.syntax(&error))?;
        document.rl.check(&spec)?;
        Ok(Self { section: document.rl })
    }

    pub fn algorithm(&self) -> Algorithm {
        self.section.algorithm
    }

    /// Whether a checkpoint of a job with the other section has a policy for this one's environment.
    pub(super) fn continues(&self, other: &Self) -> Result<(), String> {
        let options = |config: &Self| Value::Object(config.section.options.clone());
        let algorithm = |config: &Self| format!("{:?}", config.algorithm()).to_lowercase();
        same("algorithm", algorithm(other), algorithm(self))?;
        same("environment", &other.section.environment, &self.section.environment)?;
        same("options", options(other), options(self))
    }

    pub fn environment(&self) -> EnvConfig {
        EnvConfig {
            name: self.section.environment.clone(),
            options: self.section.options.clone(),
            python: self.section.python.clone(),
            folders: self.section.folders.clone(),
        }
    }

    /// What does not suit the environment.
    pub(super) fn mistake(config_toml: &str, key: &str, error: impl Into<RlError>) -> JobError {
        let problem = match error.into() {
            RlError::Env(EnvError::Options { name, problem }) => format!("{name}: {problem}"),
            other => other.to_string(),
        };
        Spec::new(config_toml).mistake(SECTION, key, &problem, "docs/rl.md has what goes with which environment")
    }

    /// Envs of a lane.
    pub fn envs(&self) -> usize {
        self.section.envs.unwrap_or(if self.section.algorithm == Algorithm::Impala { 2 } else { 1 })
    }

    pub fn policy(&self) -> PolicyKind {
        match self.section.algorithm {
            Algorithm::Ppo | Algorithm::Impala => PolicyKind::ActorCritic,
            Algorithm::Dqn => PolicyKind::Q,
        }
    }

    /// Fills in the defaults. `config_toml` is what was parsed, for errors that point into it.
    pub fn plan(&self, config_toml: &str, env: &EnvSpec, lanes: u32) -> Result<RlPlan, JobError> {
        let spec = Spec::new(config_toml);
        let section = &self.section;
        let continuous = matches!(env.action, Space::Box { .. });
        let steps = section.steps.unwrap_or(match section.algorithm {
            Algorithm::Ppo => {
                if continuous {
                    2048
                } else {
                    128
                }
            }
            Algorithm::Impala => 32,
            Algorithm::Dqn => 10,
        });
        let total = section.total_steps.unwrap_or(if continuous { 1_000_000 } else { 500_000 });
        let round_steps = u64::from(lanes) * self.envs() as u64 * steps as u64;
        let rounds = total / round_steps;
        if rounds == 0 {
            let problem =
                format!("total_steps is below one round: {lanes} lanes of {} envs, {steps} steps", self.envs());
            return Err(spec.mistake(SECTION, "total_steps", &problem, "raise it, or lower steps or envs"));
        }
        let parts = match section.algorithm {
            Algorithm::Ppo => section.minibatches.unwrap_or(if continuous { 32 } else { 4 }),
            Algorithm::Impala | Algorithm::Dqn => 1,
        };
        // Every second step may be the beginning of an episode, which is no transition.
        if parts * 2 > self.envs() * steps {
            let (lane, key) = (self.envs() * steps, if parts > 1 { "minibatches" } else { "steps" });
            let problem =
                format!("{key}: a lane has {lane} steps in a round, too few for two in each of {parts} parts");
            return Err(spec.mistake(SECTION, key, &problem, "raise steps or envs, or lower minibatches"));
        }
        let gamma = section.gamma.unwrap_or(0.99);
        let algorithm = match section.algorithm {
            Algorithm::Ppo => AlgorithmConfig::Ppo(section.ppo(continuous, rounds)),
            Algorithm::Impala => AlgorithmConfig::Impala(section.impala(rounds)),
            Algorithm::Dqn => AlgorithmConfig::Dqn(section.dqn((lanes, self.envs() as u64), round_steps, total)),
        };
        let hidden = section.hidden.clone().unwrap_or(match section.algorithm {
            Algorithm::Dqn => vec![120, 84],
            Algorithm::Ppo | Algorithm::Impala => vec![64, 64],
        });
        let normalise = section.normalise.unwrap_or(section.algorithm == Algorithm::Ppo && continuous);
        Ok(RlPlan { algorithm, lanes, envs: self.envs(), steps, rounds, hidden, gamma, normalise })
    }
}

impl Section {
    fn rate(&self, lr: f64, anneal: bool, rounds: u64) -> Rate {
        let anneal = self.anneal.unwrap_or(anneal);
        Rate { lr: self.lr.unwrap_or(lr), anneal_rounds: anneal.then_some(rounds) }
    }

    fn ppo(&self, continuous: bool, rounds: u64) -> PpoConfig {
        PpoConfig {
            rate: self.rate(if continuous { 3e-4 } else { 2.5e-4 }, true, rounds),
            max_grad_norm: Some(self.max_grad_norm.unwrap_or(0.5)),
            gamma: self.gamma.unwrap_or(0.99),
            gae_lambda: self.gae_lambda.unwrap_or(0.95),
            epochs: self.epochs.unwrap_or(if continuous { 10 } else { 4 }),
            minibatches: self.minibatches.unwrap_or(if continuous { 32 } else { 4 }),
            clip: self.clip.unwrap_or(0.2),
            clip_values: self.clip_values.unwrap_or(true),
            normalise_advantages: self.normalise_advantages.unwrap_or(true),
            ent_coef: self.ent_coef.unwrap_or(if continuous { 0.0 } else { 0.01 }),
            vf_coef: self.vf_coef.unwrap_or(0.5),
        }
    }

    fn impala(&self, rounds: u64) -> ImpalaConfig {
        let rho = self.rho.unwrap_or(1.0) as f32;
        ImpalaConfig {
            rate: self.rate(1e-3, true, rounds),
            max_grad_norm: Some(self.max_grad_norm.unwrap_or(0.5)),
            gamma: self.gamma.unwrap_or(0.99),
            ent_coef: self.ent_coef.unwrap_or(0.005),
            vf_coef: self.vf_coef.unwrap_or(1.0),
            truncation: Truncation { rho, c: self.c.unwrap_or(1.0) as f32, policy_rho: rho },
            normalise_advantages: self.normalise_advantages.unwrap_or(false),
            staleness: self.staleness.unwrap_or(4),
        }
    }

    fn dqn(&self, (lanes, envs): (u32, u64), round_steps: u64, total: u64) -> DqnConfig {
        let share = self.exploration.unwrap_or(0.5) * total as f64 / (u64::from(lanes) * envs) as f64;
        DqnConfig {
            rate: self.rate(2.5e-4, false, total / round_steps),
            max_grad_norm: self.max_grad_norm,
            gamma: self.gamma.unwrap_or(0.99),
            lanes,
            round_steps,
            replay: self.replay.unwrap_or(10_000).div_ceil(lanes as usize),
            batch: self.batch.unwrap_or(128),
            learning_starts: self.learning_starts.unwrap_or(10_000),
            train_every: self.train_every.unwrap_or(10),
            target_every: self.target_every.unwrap_or(500),
            double: self.double.unwrap_or(true),
            huber: self.huber.unwrap_or(false),
            epsilon: self.epsilon.unwrap_or([1.0, 0.05]),
            exploration_steps: share as u64,
        }
    }

    fn check(&self, spec: &Spec<'_>) -> Result<(), JobError> {
        self.check_keys(spec)?;
        self.check_ranges(spec)
    }

    /// Keys of other algorithms.
    fn check_keys(&self, spec: &Spec<'_>) -> Result<(), JobError> {
        let (ppo, impala, dqn) = (Algorithm::Ppo, Algorithm::Impala, Algorithm::Dqn);
        let whose: [(&str, bool, &[Algorithm]); 21] = [
            ("normalise", self.normalise.is_some(), &[ppo, impala]),
            ("gae_lambda", self.gae_lambda.is_some(), &[ppo]),
            ("epochs", self.epochs.is_some(), &[ppo]),
            ("minibatches", self.minibatches.is_some(), &[ppo]),
            ("clip", self.clip.is_some(), &[ppo]),
            ("clip_values", self.clip_values.is_some(), &[ppo]),
            ("normalise_advantages", self.normalise_advantages.is_some(), &[ppo, impala]),
            ("ent_coef", self.ent_coef.is_some(), &[ppo, impala]),
            ("vf_coef", self.vf_coef.is_some(), &[ppo, impala]),
            ("staleness", self.staleness.is_some(), &[impala]),
            ("rho", self.rho.is_some(), &[impala]),
            ("c", self.c.is_some(), &[impala]),
            ("replay", self.replay.is_some(), &[dqn]),
            ("batch", self.batch.is_some(), &[dqn]),
            ("learning_starts", self.learning_starts.is_some(), &[dqn]),
            ("train_every", self.train_every.is_some(), &[dqn]),
            ("target_every", self.target_every.is_some(), &[dqn]),
            ("double", self.double.is_some(), &[dqn]),
            ("huber", self.huber.is_some(), &[dqn]),
            ("epsilon", self.epsilon.is_some(), &[dqn]),
            ("exploration", self.exploration.is_some(), &[dqn]),
        ];
        if let Some((key, _, _)) = whose.iter().find(|(_, given, whose)| *given && !whose.contains(&self.algorithm)) {
            let problem = format!("{key} is no key of this algorithm");
            return Err(spec.mistake(SECTION, key, &problem, "remove it, or change algorithm"));
        }
        Ok(())
    }

    fn check_ranges(&self, spec: &Spec<'_>) -> Result<(), JobError> {
        let whole = |value: Option<u64>, max: u64| value.is_none_or(|value| (1..=max).contains(&value));
        let size = |value: Option<usize>, max: u64| whole(value.map(|value| value as u64), max);
        let positive = |value: Option<f64>| value.is_none_or(|value| value > 0.0 && value.is_finite());
        let unit = |value: Option<f64>| value.is_none_or(|value| (0.0..=1.0).contains(&value));
        let from_0 = |value: Option<f64>| value.is_none_or(|value| value >= 0.0 && value.is_finite());
        let hidden = self.hidden.as_ref().is_none_or(|hidden| {
            (1..=8).contains(&hidden.len()) && hidden.iter().all(|&size| (1..=4096).contains(&size))
        });
        let epsilon = self.epsilon.is_none_or(|epsilon| epsilon.iter().all(|&value| unit(Some(value))));
        let ranges = [
            ("envs", size(self.envs, 4096), "a number from 1 to 4096"),
            ("steps", size(self.steps, 65_536), "a number from 1 to 65536"),
            ("total_steps", whole(self.total_steps, 1 << 50), "a number from 1"),
            ("hidden", hidden, "one to eight sizes from 1 to 4096, such as [64, 64]"),
            ("lr", self.lr.is_none_or(|lr| lr > 0.0 && lr <= 1.0), "a rate above 0 and at most 1, such as 2.5e-4"),
            ("gamma", unit(self.gamma), "a number from 0 to 1"),
            ("gae_lambda", unit(self.gae_lambda), "a number from 0 to 1"),
            ("max_grad_norm", positive(self.max_grad_norm), "a number above 0"),
            ("epochs", size(self.epochs, 1_000), "a number from 1 to 1000"),
            ("minibatches", size(self.minibatches, 4096), "a number from 1 to 4096"),
            ("clip", positive(self.clip), "a number above 0, such as 0.2"),
            ("ent_coef", from_0(self.ent_coef), "a number from 0"),
            ("vf_coef", from_0(self.vf_coef), "a number from 0"),
            ("rho", positive(self.rho), "a number above 0"),
            ("c", positive(self.c), "a number above 0"),
            ("replay", size(self.replay, 1 << 26), "a number of transitions from 1"),
            ("batch", size(self.batch, 1 << 20), "a number from 1"),
            ("train_every", whole(self.train_every, 1 << 40), "a number from 1"),
            ("target_every", whole(self.target_every, 1 << 40), "a number from 1"),
            ("epsilon", epsilon, "two numbers from 0 to 1"),
            ("exploration", unit(self.exploration), "a share from 0 to 1"),
        ];
        if let Some((key, _, mend)) = ranges.iter().find(|(_, good, _)| !good) {
            return Err(spec.mistake(SECTION, key, &format!("{key} is out of range"), &format!("write {mend}")));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(text: &str) -> String {
        RlConfig::parse(&format!("[rl]\nalgorithm = 'ppo'\nenvironment = 'CartPole-v1'\n{text}"))
            .expect_err("the spec is wrong")
            .to_string()
    }

    #[test]
    fn mistakes_name_key_line_and_mend() {
        assert_eq!(error("gamma = 1.5"), "line 4: [rl] gamma is out of range (write a number from 0 to 1)");
        assert_eq!(
            error("replay = 5"),
            "line 4: [rl] replay is no key of this algorithm (remove it, or change algorithm)"
        );
        assert!(error("gama = 1").starts_with("line 4: unknown field `gama` (write one of "), "{}", error("gama = 1"));
        assert_eq!(error("steps = 'x'"), "line 4: invalid type: string \"x\" (write a whole number)");
        let said = RlConfig::parse("[rl]\nalgorithm = 'a3c'\nenvironment = 'x'").expect_err("no such one").to_string();
        assert_eq!(said, "line 2: unknown variant `a3c` (write one of `ppo`, `impala`, `dqn`)");
        assert!(RlConfig::parse("[x]").expect_err("nothing").to_string().contains("rl"));
    }

    #[test]
    fn defaults_are_cleanrls() {
        let text = "[rl]\nalgorithm = 'ppo'\nenvironment = 'CartPole-v1'\n";
        let config = RlConfig::parse(text).expect("a good spec");
        let plan = |name| config.plan(text, crate::rl::make(name, 1).expect("native").spec(), 4).expect("a plan");
        let (discrete, continuous) = (plan("CartPole-v1"), plan("Pendulum-v1"));
        assert_eq!((discrete.steps, discrete.rounds, discrete.normalise), (128, 976, false));
        assert_eq!((continuous.steps, continuous.rounds, continuous.normalise), (2048, 122, true));
        let AlgorithmConfig::Ppo(ppo) = discrete.algorithm else { panic!("PPO was asked for") };
        assert_eq!((ppo.rate.at(0), ppo.rate.at(488), ppo.epochs, ppo.minibatches), (2.5e-4, 1.25e-4, 4, 4));
        let text = format!("{text}minibatches = 65\n");
        let config = RlConfig::parse(&text).expect("a good spec");
        let error =
            config.plan(&text, crate::rl::make("CartPole-v1", 1).expect("native").spec(), 4).expect_err("too many");
        assert!(error.to_string().starts_with("line 4: [rl] minibatches"), "{error}");
    }
}
