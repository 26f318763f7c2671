//! MountainCar-v0 (gymnasium 1.4.0, `classic_control/mountain_car.py`; Moore, 1990), in f64.

use super::{Block, COMPONENTS, Dynamics, WIDTH};
use crate::rl::pcg64::Pcg64;
use crate::rl::space::Space;
use crate::rl::trig::cos;

/// State and observation: position, velocity (a step). Action: 0 pushes left, 1 not at all, 2 right.
pub(super) struct MountainCar;

const LEFT: f64 = -1.2;
const RIGHT: f64 = 0.6;
const SPEED_MAX: f64 = 0.07;
const GOAL: f64 = 0.5;
const FORCE: f64 = 0.001;
const GRAVITY: f64 = 0.0025;

impl Dynamics for MountainCar {
    const NAME: &'static str = "MountainCar-v0";
    const STEPS_MAX: u32 = 200;

    fn observation() -> Space {
        Space::Box { low: vec![LEFT as f32, -SPEED_MAX as f32], high: vec![RIGHT as f32, SPEED_MAX as f32] }
    }

    fn action() -> Space {
        Space::Discrete { n: 3 }
    }

    fn draw(rng: &mut Pcg64) -> [f64; COMPONENTS] {
        [rng.uniform(-0.6, -0.4), 0.0, 0.0, 0.0]
    }

    #[inline(always)]
    fn step(block: &mut Block, actions: &[f32; WIDTH], rewards: &mut [f32; WIDTH], terminated: &mut [bool; WIDTH]) {
        let [mut position, mut velocity, ..] = *block;
        for i in 0..WIDTH {
            let pull = (f64::from(actions[i]) - 1.0) * FORCE + cos(3.0 * position[i]) * -GRAVITY;
            let speed = (velocity[i] + pull).clamp(-SPEED_MAX, SPEED_MAX);
            position[i] = (position[i] + speed).clamp(LEFT, RIGHT);
            velocity[i] = if (position[i] == LEFT) & (speed < 0.0) { 0.0 } else { speed };
        }
        for i in 0..WIDTH {
            terminated[i] = (position[i] >= GOAL) & (velocity[i] >= 0.0);
        }
        *rewards = [-1.0; WIDTH];
        [block[0], block[1]] = [position, velocity];
    }

    #[inline(always)]
    fn observe(block: &Block, observations: &mut [f32]) {
        for (env, row) in observations.as_chunks_mut::<2>().0.iter_mut().enumerate().take(WIDTH) {
            *row = [block[0][env] as f32, block[1][env] as f32];
        }
    }
}
