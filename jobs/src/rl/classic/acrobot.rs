//! Acrobot-v1 (gymnasium 1.4.0, `classic_control/acrobot.py`: the book's dynamics, Sutton and Barto 2018, by one step of fourth-order
//! Runge-Kutta), in f64.
//!
//! Two free links are chaos: within an episode the last bit of a sine grows as large as the state. To be gymnasium's course for as long as one looks,
//! sines and cosines are the C library's, as numpy's are, and not those of `trig`. So an env of this environment keeps its bits on machines
//! with the same C library and kind of processor; the other environments keep theirs everywhere.

use std::f64::consts::{FRAC_PI_2, PI};

use super::{Block, COMPONENTS, Dynamics, WIDTH};
use crate::rl::pcg64::Pcg64;
use crate::rl::space::Space;

/// State: two angles (rad), two angular velocities (rad/s). Observation: cosine and sine of each angle, the velocities. Action: torque -1, 0 or
/// 1 Nm at the joint between the links.
pub(super) struct Acrobot;

const SECONDS: f64 = 0.2;
const VELOCITY_1_MAX: f64 = 4.0 * PI;
const VELOCITY_2_MAX: f64 = 9.0 * PI;

impl Dynamics for Acrobot {
    const NAME: &'static str = "Acrobot-v1";
    const STEPS_MAX: u32 = 500;

    fn observation() -> Space {
        Space::symmetric(&[1.0, 1.0, 1.0, 1.0, VELOCITY_1_MAX as f32, VELOCITY_2_MAX as f32])
    }

    fn action() -> Space {
        Space::Discrete { n: 3 }
    }

    fn draw(rng: &mut Pcg64) -> [f64; COMPONENTS] {
        std::array::from_fn(|_| f64::from(rng.uniform(-0.1, 0.1) as f32))
    }

    #[inline(always)]
    fn step(block: &mut Block, actions: &[f32; WIDTH], rewards: &mut [f32; WIDTH], terminated: &mut [bool; WIDTH]) {
        let [mut a, mut b, mut a_dot, mut b_dot] = *block;
        for i in 0..WIDTH {
            [a[i], b[i], a_dot[i], b_dot[i]] = integrate([a[i], b[i], a_dot[i], b_dot[i]], f64::from(actions[i]) - 1.0);
        }
        for i in 0..WIDTH {
            a[i] = wrap(a[i]);
            b[i] = wrap(b[i]);
            a_dot[i] = a_dot[i].clamp(-VELOCITY_1_MAX, VELOCITY_1_MAX);
            b_dot[i] = b_dot[i].clamp(-VELOCITY_2_MAX, VELOCITY_2_MAX);
        }
        for i in 0..WIDTH {
            let end = -a[i].cos() - (b[i] + a[i]).cos() > 1.0;
            terminated[i] = end;
            rewards[i] = if end { 0.0 } else { -1.0 };
        }
        *block = [a, b, a_dot, b_dot];
    }

    #[inline(always)]
    fn observe(block: &Block, observations: &mut [f32]) {
        let [a, b, a_dot, b_dot] = block;
        let mut circles = [[0.0; WIDTH]; 4];
        let [a_sin, a_cos, b_sin, b_cos] = &mut circles;
        for i in 0..WIDTH {
            (a_sin[i], a_cos[i]) = a[i].sin_cos();
            (b_sin[i], b_cos[i]) = b[i].sin_cos();
        }
        for (i, row) in observations.as_chunks_mut::<6>().0.iter_mut().enumerate().take(WIDTH) {
            *row = [a_cos[i], a_sin[i], b_cos[i], b_sin[i], a_dot[i], b_dot[i]].map(|value| value as f32);
        }
    }
}

#[inline(always)]
fn integrate(y: [f64; 4], torque: f64) -> [f64; 4] {
    const HALF: f64 = SECONDS / 2.0;
    let moved = |k: &[f64; 4], seconds: f64| -> [f64; 4] { std::array::from_fn(|i| y[i] + seconds * k[i]) };
    let k1 = derivative(y, torque);
    let k2 = derivative(moved(&k1, HALF), torque);
    let k3 = derivative(moved(&k2, HALF), torque);
    let k4 = derivative(moved(&k3, SECONDS), torque);
    std::array::from_fn(|i| y[i] + SECONDS / 6.0 * (k1[i] + 2.0 * k2[i] + 2.0 * k3[i] + k4[i]))
}

/// `_dsdt`: links of 1 m and 1 kg, their centres at 0.5 m, moments of inertia 1, gravity 9.8.
#[inline(always)]
fn derivative([a, b, a_dot, b_dot]: [f64; 4], torque: f64) -> [f64; 4] {
    let (b_sin, b_cos) = b.sin_cos();
    let d1 = 0.25 + (1.25 + b_cos) + 1.0 + 1.0;
    let d2 = (0.25 + 0.5 * b_cos) + 1.0;
    let phi2 = 4.9 * (a + b - FRAC_PI_2).cos();
    let phi1 = -0.5 * square(b_dot) * b_sin - b_dot * a_dot * b_sin + 1.5 * 9.8 * (a - FRAC_PI_2).cos() + phi2;
    let b_acc = (torque + d2 / d1 * phi1 - 0.5 * square(a_dot) * b_sin - phi2) / (0.25 + 1.0 - square(d2) / d1);
    let a_acc = -(d2 * b_acc + phi1) / d1;
    [a_dot, b_dot, a_acc, b_acc]
}

/// As numpy squares a number with `**`: by the C library's power, which rounds one square in a thousand to the other side. It is within 0.54 units in
/// the last place of the truth (glibc, `sysdeps/ieee754/dbl-64/e_pow.c`), so where the product is within 0.45, both are the same, and a
/// product costs nothing.
#[inline(always)]
fn square(x: f64) -> f64 {
    let product = x * x;
    let rest = x.mul_add(x, -product);
    let unit = f64::from_bits(product.to_bits() & f64::INFINITY.to_bits()) * f64::EPSILON;
    // The exponent is hidden from the compiler, which would multiply.
    if rest.abs() < 0.45 * unit { product } else { x.powf(std::hint::black_box(2.0)) }
}

/// Between -pi and pi. A step turns a link a few times at most.
#[inline(always)]
fn wrap(mut angle: f64) -> f64 {
    while angle > PI {
        angle -= 2.0 * PI;
    }
    while angle < -PI {
        angle += 2.0 * PI;
    }
    angle
}
