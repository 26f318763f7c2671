//! Gymnasium's classic control, number for number (gymnasium 1.4.0, `envs/classic_control/`; limits of steps from `envs/__init__.py`).
//! Owns envs, limits and new beginnings; each file beside this one owns the dynamics of one environment, in gymnasium's order of operations.
//!
//! Envs lie in blocks of [`WIDTH`], each component of the state in an array of its own, so that the dynamics of a block are vector code: generic over
//! them, because that needs them inlined (150 to 240 million steps of CartPole a second on one core: `tests/benches/rl_env.rs`).

mod acrobot;
mod cart_pole;
mod mountain_car;
mod mountain_car_continuous;
mod pendulum;

use super::env::{Actions, EnvError, EnvSpec, Step, VecEnv, check_actions, check_len, check_step};
use super::pcg64::{self, Pcg64};
use super::space::Space;
use crate::lm::kernels::Isa;

/// Envs of a block.
const WIDTH: usize = 32;
/// Numbers of an env's state at most.
const COMPONENTS: usize = 4;
/// Of a number of any state, with room: a pendulum turns by less than 90 in an episode. Far beyond it sines are wrong and angles take for ever to wrap.
const STATE_MAX: f64 = 1_000.0;
/// The state of `WIDTH` envs, component by component; environments with fewer components leave the others at 0.
type Block = [[f64; WIDTH]; COMPONENTS];

/// The physics of one environment: stateless, over a block of envs. Envs that nobody owns hold zeros and are stepped too.
trait Dynamics: Send + 'static {
    const NAME: &'static str;
    const STEPS_MAX: u32;

    fn observation() -> Space;
    fn action() -> Space;

    /// The first state of an episode.
    fn draw(rng: &mut Pcg64) -> [f64; COMPONENTS];

    /// One step. An action is a choice as a number, or one number beyond or within the bounds of the box.
    fn step(block: &mut Block, actions: &[f32; WIDTH], rewards: &mut [f32; WIDTH], terminated: &mut [bool; WIDTH]);

    /// Writes an observation a row, env after env; there may be fewer rows than envs.
    fn observe(block: &Block, observations: &mut [f32]);
}

pub(super) fn make(name: &str, envs: usize) -> Option<Box<dyn VecEnv>> {
    match name {
        cart_pole::CartPole::NAME => Some(Box::new(Classic::<cart_pole::CartPole>::new(envs))),
        acrobot::Acrobot::NAME => Some(Box::new(Classic::<acrobot::Acrobot>::new(envs))),
        mountain_car::MountainCar::NAME => Some(Box::new(Classic::<mountain_car::MountainCar>::new(envs))),
        mountain_car_continuous::MountainCarContinuous::NAME => {
            Some(Box::new(Classic::<mountain_car_continuous::MountainCarContinuous>::new(envs)))
        }
        pendulum::Pendulum::NAME => Some(Box::new(Classic::<pendulum::Pendulum>::new(envs))),
        _ => None,
    }
}

/// Vectors are [envs]: apart, so that counting steps and finding ends is vector code too.
struct Classic<D: Dynamics> {
    spec: EnvSpec,
    isa: Isa,
    blocks: Vec<Block>,
    rngs: Vec<Pcg64>,
    /// Of the episode.
    steps: Vec<u32>,
    /// The last step ended the episode: the next one begins another.
    ended: Vec<bool>,
    /// Reset or restored.
    seeded: Vec<bool>,
    dynamics: std::marker::PhantomData<D>,
}

impl<D: Dynamics> Classic<D> {
    fn new(envs: usize) -> Self {
        let spec = EnvSpec {
            name: D::NAME.to_owned(),
            observation: D::observation(),
            action: D::action(),
            steps_max: Some(D::STEPS_MAX),
            cells: None,
        };
        Self {
            spec,
            isa: Isa::best(),
            blocks: vec![[[0.0; WIDTH]; COMPONENTS]; envs.div_ceil(WIDTH)],
            rngs: vec![Pcg64::new(0); envs],
            steps: vec![0; envs],
            ended: vec![false; envs],
            seeded: vec![false; envs],
            dynamics: std::marker::PhantomData,
        }
    }

    fn begin(&mut self, env: usize) {
        let state = D::draw(&mut self.rngs[env]);
        self.put(env, state);
        self.steps[env] = 0;
    }

    fn put(&mut self, env: usize, state: [f64; COMPONENTS]) {
        let block = &mut self.blocks[env / WIDTH];
        block.iter_mut().zip(state).for_each(|(component, value)| component[env % WIDTH] = value);
    }

    fn check_env(&self, env: usize) -> Result<(), EnvError> {
        let envs = self.num_envs();
        if env < envs { Ok(()) } else { Err(EnvError::Contract { what: "env", got: env, expected: envs }) }
    }

    fn observe(&self, observations: &mut [f32]) {
        let len = self.spec.observation_len();
        self.isa.run(
            #[inline(always)]
            || {
                let rows = observations.chunks_mut(WIDTH * len);
                self.blocks.iter().zip(rows).for_each(|(block, rows)| D::observe(block, rows));
            },
        );
    }

    /// The physics of all envs, also of those that will begin again: what it did to them is overwritten.
    fn advance(&mut self, actions: Actions<'_>, step: &mut Step<'_>) {
        let (isa, blocks) = (self.isa, &mut self.blocks);
        isa.run(
            #[inline(always)]
            || {
                for (index, block) in blocks.iter_mut().enumerate() {
                    let first = index * WIDTH;
                    let here = first..step.rewards.len().min(first + WIDTH);
                    let mut chosen = [0.0; WIDTH];
                    match actions {
                        Actions::Discrete(actions) => {
                            let pairs = chosen.iter_mut().zip(&actions[here.clone()]);
                            pairs.for_each(|(chosen, &action)| *chosen = action as f32);
                        }
                        Actions::Box(actions) => chosen[..here.len()].copy_from_slice(&actions[here.clone()]),
                    }
                    let (mut rewards, mut terminated) = ([0.0; WIDTH], [false; WIDTH]);
                    D::step(block, &chosen, &mut rewards, &mut terminated);
                    // Envs that nobody owns begin no episodes: they would step out of the numbers in the end.
                    block.iter_mut().for_each(|component| component[here.len()..].fill(0.0));
                    step.rewards[here.clone()].copy_from_slice(&rewards[..here.len()]);
                    step.terminated[here.clone()].copy_from_slice(&terminated[..here.len()]);
                }
            },
        );
    }
}

impl<D: Dynamics> VecEnv for Classic<D> {
    fn spec(&self) -> &EnvSpec {
        &self.spec
    }

    fn num_envs(&self) -> usize {
        self.rngs.len()
    }

    fn reset(&mut self, seeds: &[u64], observations: &mut [f32]) -> Result<(), EnvError> {
        check_len("seeds", seeds.len(), self.rngs.len())?;
        check_len("observations of a reset", observations.len(), seeds.len() * self.spec.observation_len())?;
        for (env, &seed) in seeds.iter().enumerate() {
            self.rngs[env] = Pcg64::new(seed);
            self.begin(env);
        }
        self.ended.fill(false);
        self.seeded.fill(true);
        self.observe(observations);
        Ok(())
    }

    fn step(&mut self, actions: Actions<'_>, mut step: Step<'_>) -> Result<(), EnvError> {
        check_step(&self.spec, self.num_envs(), &step)?;
        check_actions(&self.spec, self.num_envs(), actions)?;
        if self.seeded.contains(&false) {
            return Err(EnvError::NotReset { name: self.spec.name.clone() });
        }
        self.advance(actions, &mut step);
        for (truncated, steps) in step.truncated.iter_mut().zip(&mut self.steps) {
            *steps += 1;
            *truncated = *steps >= D::STEPS_MAX;
        }
        for env in 0..self.num_envs() {
            if self.ended[env] {
                (step.rewards[env], step.terminated[env], step.truncated[env]) = (0.0, false, false);
                self.begin(env);
            }
        }
        let ends = step.terminated.iter().zip(step.truncated.iter());
        self.ended.iter_mut().zip(ends).for_each(|(ended, (&end, &cut))| *ended = end | cut);
        self.observe(step.observations);
        Ok(())
    }

    fn save(&mut self, env: usize) -> Result<Vec<u8>, EnvError> {
        self.check_env(env)?;
        if !self.seeded[env] {
            return Err(EnvError::NotReset { name: self.spec.name.clone() });
        }
        let mut bytes = self.rngs[env].to_bytes().to_vec();
        bytes.extend(self.steps[env].to_le_bytes());
        bytes.push(u8::from(self.ended[env]));
        let block = &self.blocks[env / WIDTH];
        block.iter().for_each(|component| bytes.extend(component[env % WIDTH].to_le_bytes()));
        bytes.extend(D::NAME.as_bytes());
        Ok(bytes)
    }

    fn restore(&mut self, env: usize, state: &[u8], observation: &mut [f32]) -> Result<(), EnvError> {
        check_len("observation of a restored env", observation.len(), self.spec.observation_len())?;
        self.check_env(env)?;
        let saved = read::<D>(state).map_err(|problem| {
            let name = self.spec.name.clone();
            EnvError::State { name, problem: problem.to_owned() }
        })?;
        (self.rngs[env], self.steps[env], self.ended[env]) = (saved.rng, saved.steps, saved.ended);
        self.seeded[env] = true;
        self.put(env, saved.state);
        let mut alone = [[0.0; WIDTH]; COMPONENTS];
        alone.iter_mut().zip(saved.state).for_each(|(component, value)| component[0] = value);
        D::observe(&alone, observation);
        Ok(())
    }
}

/// An env, saved.
struct Saved {
    rng: Pcg64,
    steps: u32,
    ended: bool,
    state: [f64; COMPONENTS],
}

/// The inverse of `save`.
fn read<D: Dynamics>(bytes: &[u8]) -> Result<Saved, &'static str> {
    const HEAD: usize = pcg64::BYTES + 5;
    let (head, tail) = bytes.split_at_checked(HEAD).ok_or("too few bytes")?;
    let (numbers, name) = tail.split_at_checked(8 * COMPONENTS).ok_or("too few bytes")?;
    if name != D::NAME.as_bytes() {
        return Err("it was saved by another environment");
    }
    let (rng, head) = head.split_at(pcg64::BYTES);
    let rng = Pcg64::from_bytes(rng).ok_or("no generator has this state")?;
    let steps = u32::from_le_bytes([head[0], head[1], head[2], head[3]]);
    let ended = match head[4] {
        0 => false,
        1 => true,
        _ => return Err("its episode neither runs nor has ended"),
    };
    let mut state = [0.0; COMPONENTS];
    for (value, bytes) in state.iter_mut().zip(numbers.as_chunks::<8>().0) {
        *value = f64::from_le_bytes(*bytes);
    }
    if steps > D::STEPS_MAX || !state.iter().all(|value| value.abs() <= STATE_MAX) {
        return Err("a number of its state is out of range");
    }
    Ok(Saved { rng, steps, ended, state })
}

#[cfg(test)]
mod tests {
    use super::acrobot::Acrobot;
    use super::cart_pole::CartPole;
    use super::mountain_car::MountainCar;
    use super::mountain_car_continuous::MountainCarContinuous;
    use super::pendulum::Pendulum;
    use super::{Actions, Classic, Dynamics, Isa, Pcg64, Space, VecEnv};
    use crate::rl::{EnvError, StepBuffer};

    /// All that 40 envs do in 600 steps.
    fn course<D: Dynamics>(isa: Isa) -> Vec<StepBuffer> {
        let mut env = Classic::<D>::new(40);
        env.isa = isa;
        let mut buffer = StepBuffer::new(&env);
        env.reset(&std::array::from_fn::<u64, 40, _>(|env| env as u64), &mut buffer.observations).expect("a reset");
        let mut rng = Pcg64::new(1);
        let mut seen = vec![buffer.clone()];
        for _ in 0..600 {
            let choices: [u32; 40] = std::array::from_fn(|_| rng.below(2) as u32);
            let values = choices.map(|choice| choice as f32 * 5.0 - 2.5);
            let discrete = matches!(env.spec.action, Space::Discrete { .. });
            let actions = if discrete { Actions::Discrete(&choices) } else { Actions::Box(&values) };
            env.step(actions, buffer.step()).expect("a step");
            seen.push(buffer.clone());
        }
        seen
    }

    #[test]
    fn steps_have_the_same_bits_on_every_instruction_set() {
        let courses: [fn(Isa) -> Vec<StepBuffer>; 5] = [
            course::<CartPole>,
            course::<Acrobot>,
            course::<MountainCar>,
            course::<MountainCarContinuous>,
            course::<Pendulum>,
        ];
        for course in courses {
            let plain = course(*Isa::available().last().expect("the plain one"));
            for isa in Isa::available() {
                assert!(course(isa) == plain, "{isa:?}");
            }
        }
    }

    #[test]
    fn state_that_no_env_has_is_refused() {
        let mut env = Classic::<Acrobot>::new(1);
        let mut seen = [0.0; 6];
        env.reset(&[1], &mut seen).expect("a reset");
        let saved = env.save(0).expect("a saved env");
        for number in [1e300f64, f64::NAN, f64::NEG_INFINITY] {
            let mut damaged = saved.clone();
            let at = saved.len() - Acrobot::NAME.len() - 8;
            damaged[at..at + 8].copy_from_slice(&number.to_le_bytes());
            assert!(matches!(env.restore(0, &damaged, &mut seen), Err(EnvError::State { .. })), "{number}");
        }
    }
}
