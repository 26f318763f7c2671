//! The environment that a spec names: a native one, or any of gymnasium's. Owns nothing.

use std::time::Duration;

use serde_json::Value;

use super::bridge::{Bridge, BridgeConfig};
use super::config::RlConfig;
use super::env::{EnvError, EnvSpec, NATIVE, VecEnv, make};
use super::scan_budget::{ScanBudget, WorldConfig};

/// Python, where the spec names none.
const PYTHON: &str = "python3";
/// To import gymnasium and make environments; others may compute on the machine.
const START_MAX: Duration = Duration::from_secs(60);
const STEP_MAX: Duration = Duration::from_secs(30);

pub(crate) fn make_env(config: &RlConfig, envs: usize) -> Result<Box<dyn VecEnv>, EnvError> {
    let (name, options) = (config.environment(), config.options());
    let wrong = |problem: String| EnvError::Options { name: name.to_owned(), problem };
    if name == "scan-budget" {
        let world = serde_json::from_value::<WorldConfig>(Value::Object(options.clone()));
        return Ok(Box::new(ScanBudget::new(world.map_err(|error| wrong(error.to_string()))?, envs)?));
    }
    if NATIVE.contains(&name) {
        return match options.keys().next() {
            Some(key) => Err(wrong(format!("{key:?}: this environment has none"))),
            None => make(name, envs),
        };
    }
    let python = config.python().cloned().unwrap_or_else(|| PYTHON.into());
    let (name, options, folders) = (name.to_owned(), options.clone(), Vec::new());
    let config =
        BridgeConfig { python, name, options, folders, num_envs: envs, start_max: START_MAX, step_max: STEP_MAX };
    Ok(Box::new(Bridge::start(&config)?))
}

impl EnvSpec {
    /// Whether it is computed here.
    pub(crate) fn is_native(&self) -> bool {
        NATIVE.contains(&self.name.as_str())
    }
}
