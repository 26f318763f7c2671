//! MountainCarContinuous-v0 (gymnasium 1.4.0, `classic_control/continuous_mountain_car.py`). Gymnasium keeps its state in f32 from the first
//! step on, and numpy 2 computes f32 with Python's numbers in f32; only the first step of an episode, and a force that was cut to a bound,
//! are in f64. So it is here.

use super::{Block, COMPONENTS, Dynamics, WIDTH};
use crate::rl::pcg64::Pcg64;
use crate::rl::space::Space;
use crate::rl::trig::cos;

/// State: position, velocity (a step), and whether a step was done (0 or 1). Observation: the first two. Action: force from -1 to 1.
pub(super) struct MountainCarContinuous;

const LEFT: f64 = -1.2;
const RIGHT: f64 = 0.6;
const SPEED_MAX: f64 = 0.07;
const GOAL: f64 = 0.45;
const POWER: f64 = 0.0015;
const GRAVITY: f64 = 0.0025;

impl Dynamics for MountainCarContinuous {
    const NAME: &'static str = "MountainCarContinuous-v0";
    const STEPS_MAX: u32 = 999;

    fn observation() -> Space {
        Space::Box { low: vec![LEFT as f32, -SPEED_MAX as f32], high: vec![RIGHT as f32, SPEED_MAX as f32] }
    }

    fn action() -> Space {
        Space::symmetric(&[1.0])
    }

    fn draw(rng: &mut Pcg64) -> [f64; COMPONENTS] {
        [rng.uniform(-0.6, -0.4), 0.0, 0.0, 0.0]
    }

    #[inline(always)]
    fn step(block: &mut Block, actions: &[f32; WIDTH], rewards: &mut [f32; WIDTH], terminated: &mut [bool; WIDTH]) {
        let [mut position, mut velocity, mut stepped, _] = *block;
        for i in 0..WIDTH {
            let (action, later) = (actions[i], stepped[i] == 1.0);
            let (at, speed) = (position[i], velocity[i]);
            // 3 times an f32 is an f32; a cosine is always of an f64.
            let slope = GRAVITY * cos(if later { f64::from(3.0 * at as f32) } else { 3.0 * at });
            let inside = POWER as f32 * action - slope as f32;
            let pull = if action < -1.0 {
                -POWER - slope
            } else if action > 1.0 {
                POWER - slope
            } else {
                f64::from(inside)
            };
            let moved = |from: f64, by: f64| if later { f64::from(from as f32 + by as f32) } else { from + by };
            let bound = |value: f64, low: f64, high: f64| {
                let (low, high) = if later { (f64::from(low as f32), f64::from(high as f32)) } else { (low, high) };
                value.clamp(low, high)
            };
            let speed = bound(moved(speed, pull), -SPEED_MAX, SPEED_MAX);
            let at = bound(moved(at, speed), LEFT, RIGHT);
            let stopped = (at <= LEFT) & (speed < 0.0);
            // What gymnasium keeps of it.
            position[i] = f64::from(at as f32);
            velocity[i] = if stopped { 0.0 } else { f64::from(speed as f32) };
            stepped[i] = 1.0;
        }
        for i in 0..WIDTH {
            let end = (position[i] >= f64::from(GOAL as f32)) & (velocity[i] >= 0.0);
            terminated[i] = end;
            let action = f64::from(actions[i]);
            rewards[i] = (if end { 100.0 } else { 0.0 } - action * action * 0.1) as f32;
        }
        *block = [position, velocity, stepped, [0.0; WIDTH]];
    }

    #[inline(always)]
    fn observe(block: &Block, observations: &mut [f32]) {
        for (env, row) in observations.as_chunks_mut::<2>().0.iter_mut().enumerate().take(WIDTH) {
            *row = [block[0][env] as f32, block[1][env] as f32];
        }
    }
}
