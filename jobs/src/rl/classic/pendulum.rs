//! Pendulum-v1 (gymnasium 1.4.0, `classic_control/pendulum.py`), in f64; the torque is an f32, and so is what numpy makes of it alone.

use std::f64::consts::PI;

use super::{Block, COMPONENTS, Dynamics, WIDTH};
use crate::rl::pcg64::Pcg64;
use crate::rl::space::Space;
use crate::rl::trig::sin_cos;

/// State: angle from upright (rad, not wrapped), angular velocity (rad/s). Observation: cosine, sine, velocity. Action: torque from -2 to 2 Nm.
/// Reward: minus (angle^2 + 0.1 velocity^2 + 0.001 torque^2), of the state before the step.
pub(super) struct Pendulum;

const SPEED_MAX: f64 = 8.0;
const TORQUE_MAX: f32 = 2.0;
const SECONDS: f64 = 0.05;

impl Dynamics for Pendulum {
    const NAME: &'static str = "Pendulum-v1";
    const STEPS_MAX: u32 = 200;

    fn observation() -> Space {
        Space::symmetric(&[1.0, 1.0, SPEED_MAX as f32])
    }

    fn action() -> Space {
        Space::symmetric(&[TORQUE_MAX])
    }

    fn draw(rng: &mut Pcg64) -> [f64; COMPONENTS] {
        [rng.uniform(-PI, PI), rng.uniform(-1.0, 1.0), 0.0, 0.0]
    }

    #[inline(always)]
    fn step(block: &mut Block, actions: &[f32; WIDTH], rewards: &mut [f32; WIDTH], terminated: &mut [bool; WIDTH]) {
        let [mut theta, mut theta_dot, ..] = *block;
        let mut angles = theta;
        // In a loop of its own: the remainder is exact on every machine, but no vector code.
        angles.iter_mut().for_each(|angle| *angle = (*angle + PI).rem_euclid(2.0 * PI) - PI);
        for i in 0..WIDTH {
            let torque = actions[i].clamp(-TORQUE_MAX, TORQUE_MAX);
            let effort = f64::from(0.001 * (torque * torque));
            rewards[i] = -(angles[i] * angles[i] + 0.1 * (theta_dot[i] * theta_dot[i]) + effort) as f32;
            let (sin, _) = sin_cos(theta[i]);
            let faster = theta_dot[i] + (15.0 * sin + f64::from(3.0 * torque)) * SECONDS;
            theta_dot[i] = faster.clamp(-SPEED_MAX, SPEED_MAX);
            theta[i] += theta_dot[i] * SECONDS;
        }
        *terminated = [false; WIDTH];
        [block[0], block[1]] = [theta, theta_dot];
    }

    #[inline(always)]
    fn observe(block: &Block, observations: &mut [f32]) {
        let (mut sines, mut cosines) = ([0.0; WIDTH], [0.0; WIDTH]);
        for i in 0..WIDTH {
            (sines[i], cosines[i]) = sin_cos(block[0][i]);
        }
        for (i, row) in observations.as_chunks_mut::<3>().0.iter_mut().enumerate().take(WIDTH) {
            *row = [cosines[i] as f32, sines[i] as f32, block[1][i] as f32];
        }
    }
}
