mod classic;
mod env;
mod pcg64;
mod space;
mod trig;

pub use env::{Actions, EnvError, EnvSpec, NATIVE, Step, StepBuffer, VecEnv, make};
pub use pcg64::Pcg64;
pub use space::Space;
