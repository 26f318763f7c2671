//! CartPole-v1 (gymnasium 1.4.0, `classic_control/cartpole.py`; Barto, Sutton and Anderson, 1983): explicit Euler, in f64.

use super::{Block, COMPONENTS, Dynamics, WIDTH};
use crate::rl::pcg64::Pcg64;
use crate::rl::space::Space;
use crate::rl::trig::sin_cos;

/// State and observation: position (m), velocity (m/s), angle (rad), angular velocity (rad/s). Action: 0 pushes left, 1 right.
pub(super) struct CartPole;

const GRAVITY: f64 = 9.8;
const MASS_POLE: f64 = 0.1;
const MASS: f64 = 0.1 + 1.0;
/// Half of the pole's.
const LENGTH: f64 = 0.5;
const MASS_LENGTH: f64 = MASS_POLE * LENGTH;
const FORCE: f64 = 10.0;
const SECONDS: f64 = 0.02;
const X_MAX: f64 = 2.4;
const THETA_MAX: f64 = 12.0 * 2.0 * std::f64::consts::PI / 360.0;

impl Dynamics for CartPole {
    const NAME: &'static str = "CartPole-v1";
    const STEPS_MAX: u32 = 500;

    fn observation() -> Space {
        let infinite = f32::INFINITY;
        Space::symmetric(&[(X_MAX * 2.0) as f32, infinite, (THETA_MAX * 2.0) as f32, infinite])
    }

    fn action() -> Space {
        Space::Discrete { n: 2 }
    }

    fn draw(rng: &mut Pcg64) -> [f64; COMPONENTS] {
        std::array::from_fn(|_| rng.uniform(-0.05, 0.05))
    }

    #[inline(always)]
    fn step(block: &mut Block, actions: &[f32; WIDTH], rewards: &mut [f32; WIDTH], terminated: &mut [bool; WIDTH]) {
        let [mut x, mut x_dot, mut theta, mut theta_dot] = *block;
        for i in 0..WIDTH {
            let force = if actions[i] == 1.0 { FORCE } else { -FORCE };
            let (sin, cos) = sin_cos(theta[i]);
            let temp = (force + MASS_LENGTH * (theta_dot[i] * theta_dot[i]) * sin) / MASS;
            let theta_acc = (GRAVITY * sin - cos * temp) / (LENGTH * (4.0 / 3.0 - MASS_POLE * (cos * cos) / MASS));
            let x_acc = temp - MASS_LENGTH * theta_acc * cos / MASS;
            x[i] += SECONDS * x_dot[i];
            x_dot[i] += SECONDS * x_acc;
            theta[i] += SECONDS * theta_dot[i];
            theta_dot[i] += SECONDS * theta_acc;
        }
        for i in 0..WIDTH {
            terminated[i] = (x[i] < -X_MAX) | (x[i] > X_MAX) | (theta[i] < -THETA_MAX) | (theta[i] > THETA_MAX);
        }
        *rewards = [1.0; WIDTH];
        *block = [x, x_dot, theta, theta_dot];
    }

    #[inline(always)]
    fn observe(block: &Block, observations: &mut [f32]) {
        for (env, row) in observations.as_chunks_mut::<4>().0.iter_mut().enumerate().take(WIDTH) {
            *row = [0, 1, 2, 3].map(|component: usize| block[component][env] as f32);
        }
    }
}
