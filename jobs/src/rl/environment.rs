//! The environment that a spec asks for, native or behind the bridge. Owns the choice and its options; knows no learning.

use std::path::PathBuf;
use std::time::Duration;

use serde_json::{Map, Value};

use super::bridge::{Bridge, BridgeConfig};
use super::env::{EnvError, NATIVE, VecEnv, make};
use super::scan_budget::{self, ScanBudget, WorldConfig};

/// How long Python may take to import and make environments: a cold disk, and as many processes beside it as a machine has ranks.
const START_MAX: Duration = Duration::from_secs(120);
/// How long one step of all envs of a lane may take.
const STEP_MAX: Duration = Duration::from_secs(30);

/// What a spec says of its environment.
#[derive(Debug, Clone, PartialEq)]
pub struct EnvConfig {
    /// One of [`NATIVE`], or one of gymnasium's.
    pub name: String,
    /// Of `scan-budget` a [`WorldConfig`]; of gymnasium's more arguments of `gymnasium.make`.
    pub options: Map<String, Value>,
    /// An interpreter that has gymnasium. None: `python3` on the search path.
    pub python: Option<PathBuf>,
    /// Folders where Python looks for modules first.
    pub folders: Vec<PathBuf>,
}

/// Whether Python does not know what was asked for, or it is nothing that can be learned from.
fn is_not_there(said: &str) -> bool {
    let last = said.lines().last().unwrap_or_default();
    let kinds = [
        "ModuleNotFoundError",
        "ImportError",
        "gymnasium.error.",
        "TypeError: observations of ",
        "TypeError: actions of ",
    ];
    kinds.iter().any(|kind| last.starts_with(kind))
}

impl EnvConfig {
    pub fn is_native(&self) -> bool {
        NATIVE.contains(&self.name.as_str())
    }

    /// Of `scan-budget`: its options. None: it is another environment.
    pub fn world(&self) -> Result<Option<WorldConfig>, EnvError> {
        if self.name != scan_budget::NAME {
            return Ok(None);
        }
        let options =
            |error: serde_json::Error| EnvError::Options { name: self.name.clone(), problem: error.to_string() };
        serde_json::from_value(Value::Object(self.options.clone())).map(Some).map_err(options)
    }

    /// Makes so many envs; of gymnasium's, in a process of their own.
    pub fn make(&self, num_envs: usize) -> Result<Box<dyn VecEnv>, EnvError> {
        let options = |problem: String| EnvError::Options { name: self.name.clone(), problem };
        if let Some(world) = self.world()? {
            return Ok(Box::new(ScanBudget::new(world, num_envs)?));
        }
        if self.is_native() {
            if let Some(key) = self.options.keys().next() {
                return Err(options(format!("there is no {key}: a native environment has no options")));
            }
            return make(&self.name, num_envs);
        }
        let bridge = BridgeConfig {
            python: self.python.clone().unwrap_or_else(|| PathBuf::from("python3")),
            name: self.name.clone(),
            options: self.options.clone(),
            folders: self.folders.clone(),
            num_envs,
            start_max: START_MAX,
            step_max: STEP_MAX,
        };
        let python = &bridge.python;
        match Bridge::start(&bridge) {
            // Another try would find the same.
            Err(EnvError::Raised { said, .. })
                if is_not_there(&said) && !said.contains("No module named 'gymnasium'") =>
            {
                let last = said.lines().last().unwrap_or_default();
                Err(options(format!("{last} (help: mend [rl] environment, or [rl] folders, where its module is)")))
            }
            // Which is what a native name that is mistyped comes to.
            Err(EnvError::Raised { said, .. }) if said.contains("No module named 'gymnasium'") => {
                Err(options(format!(
                    "it is none of {}, and {} has no gymnasium for others: mend the name, or write [rl] python with an interpreter that has it",
                    NATIVE.join(", "),
                    python.display()
                )))
            }
            started => Ok(Box::new(started?)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(name: &str, options: &str) -> EnvConfig {
        let options = serde_json::from_str(options).expect("options");
        EnvConfig { name: name.to_owned(), options, python: None, folders: Vec::new() }
    }

    #[test]
    fn options_are_the_environments_or_are_refused() {
        let env = config("scan-budget", r#"{"groups": 4, "systems": 2, "ports": 8}"#).make(2).expect("a small world");
        assert_eq!(env.spec().action.len(), 32);
        for (name, options) in [("scan-budget", r#"{"hostz": 4}"#), ("CartPole-v1", r#"{"hostz": 4}"#)] {
            let Err(error) = config(name, options).make(1) else { panic!("{name} has no such option") };
            assert!(matches!(&error, EnvError::Options { .. }) && error.to_string().contains("hostz"), "{error}");
        }
    }
}
