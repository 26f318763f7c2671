//! What a lane's envs did in some steps under one policy: plain flat vectors, and their bytes on the wire. Owns no environment.
//!
//! Envs begin again in gymnasium's next-step mode, so the observation after a step is always the next row: also that of a truncated episode, whose
//! value stands in the next row too. The step after an end is no transition.

use super::actor::Choices;
use super::error::RlError;
use super::policy::Policy;
use super::space::Space;

/// Bits of a flag.
pub const TRANSITION: u8 = 1;
pub const TERMINATED: u8 = 2;
pub const TRUNCATED: u8 = 4;
/// Either end.
pub const ENDED: u8 = TERMINATED | TRUNCATED;

/// Steps of all envs of a lane together. More would make learners wait for one message.
const ROWS_MAX: usize = 1 << 20;
/// Of the numbers of all observations.
const NUMBERS_MAX: usize = 1 << 26;
const MAGIC: [u8; 4] = *b"STj1";
const HEADER: usize = 4 + 4 + 8 + 8 + 4 * 4;

/// An episode that ended, with the environment's own rewards.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Episode {
    /// Of the lane.
    pub env: u32,
    /// Of the trajectory: the step that ended it.
    pub step: u32,
    pub length: u32,
    pub sum: f64,
}

/// Rows are step after step, in each env after env.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Trajectory {
    pub lane: u32,
    /// Steps that each env had done before.
    pub begun: u64,
    /// Version of the policy that chose all actions.
    pub version: u64,
    pub steps: usize,
    pub envs: usize,
    /// [steps + 1, envs, numbers]; the last are those after the last step.
    pub observations: Vec<f32>,
    /// [steps, envs]
    pub actions: Choices,
    /// [steps, envs]
    pub log_probs: Vec<f32>,
    /// [steps + 1, envs]
    pub values: Vec<f32>,
    /// [steps, envs], as the learner is to see them.
    pub rewards: Vec<f32>,
    /// [steps, envs]: [`TRANSITION`], [`TERMINATED`], [`TRUNCATED`].
    pub flags: Vec<u8>,
    pub episodes: Vec<Episode>,
}

impl Trajectory {
    pub fn rows(&self) -> usize {
        self.steps * self.envs
    }

    /// Rows that are transitions, in order.
    pub fn transitions(&self) -> Vec<u32> {
        let rows = self.flags.iter().enumerate().filter(|(_, flags)| *flags & TRANSITION != 0);
        rows.map(|(row, _)| row as u32).collect()
    }

    pub fn encode(&self) -> Vec<u8> {
        let floats = [&self.observations, &self.actions.continuous, &self.log_probs, &self.values, &self.rewards];
        let numbers: usize = floats.iter().map(|floats| floats.len()).sum();
        let discrete = self.actions.discrete.len();
        let mut bytes = Vec::with_capacity(HEADER + 4 * (numbers + discrete) + self.rows() + 20 * self.episodes.len());
        bytes.extend(MAGIC);
        bytes.extend(self.lane.to_le_bytes());
        bytes.extend(self.begun.to_le_bytes());
        bytes.extend(self.version.to_le_bytes());
        let numbers = self.observations.len() / ((self.steps + 1) * self.envs).max(1);
        let sizes = [self.steps, self.envs, numbers, self.episodes.len()];
        bytes.extend(sizes.iter().flat_map(|&size| (size as u32).to_le_bytes()));
        floats.iter().for_each(|floats| bytes.extend(floats.iter().flat_map(|value| value.to_le_bytes())));
        bytes.extend(self.actions.discrete.iter().flat_map(|action| action.to_le_bytes()));
        bytes.extend(&self.flags);
        for episode in &self.episodes {
            let words = [episode.env, episode.step, episode.length];
            bytes.extend(words.iter().flat_map(|word| word.to_le_bytes()));
            bytes.extend(episode.sum.to_le_bytes());
        }
        bytes
    }

    /// Reads what [`Self::encode`] wrote, for this policy. Everything is checked: whoever gets it may use every number.
    pub fn decode(bytes: &[u8], policy: &Policy) -> Result<Self, RlError> {
        read(bytes, policy).map_err(|problem| RlError::Bytes { what: "a trajectory", problem: problem.to_owned() })
    }
}

fn read(bytes: &[u8], policy: &Policy) -> Result<Trajectory, &'static str> {
    let mut reader = Reader(bytes);
    if reader.take::<4>()? != MAGIC {
        return Err("it begins with other bytes");
    }
    let lane = reader.word()?;
    let (begun, version) = (reader.long()?, reader.long()?);
    let [steps, envs, numbers, episodes] =
        [reader.word()?, reader.word()?, reader.word()?, reader.word()?].map(|size| size as usize);
    let rows = steps.checked_mul(envs).filter(|rows| (1..=ROWS_MAX).contains(rows)).ok_or("too few or many steps")?;
    let after = rows + envs;
    if numbers != policy.observation_len() || after.saturating_mul(numbers) > NUMBERS_MAX {
        return Err("its observations are of another size");
    }
    let (discrete, continuous) = match policy.action() {
        Space::Discrete { .. } => (rows, 0),
        Space::Box { low, .. } => (0, rows * low.len()),
    };
    if episodes > rows {
        return Err("more episodes end than there are steps");
    }
    if reader.0.len() != 4 * (after * numbers + continuous + rows + after + rows + discrete) + rows + 20 * episodes {
        return Err("it is shorter or longer than it says");
    }
    let observations = reader.floats(after * numbers)?;
    let continuous = reader.floats(continuous)?;
    let (log_probs, values, rewards) = (reader.floats(rows)?, reader.floats(after)?, reader.floats(rows)?);
    let discrete = (0..discrete).map(|_| reader.word()).collect::<Result<Vec<u32>, _>>()?;
    if let Space::Discrete { n } = policy.action()
        && discrete.iter().any(|action| action >= n)
    {
        return Err("an action is none of this environment");
    }
    let flags = reader.bytes(rows)?.to_vec();
    if flags.iter().any(|&flag| flag > 7 || (flag & ENDED != 0 && flag & TRANSITION == 0)) {
        return Err("an episode ends in a step that is none");
    }
    let mut ended = Vec::with_capacity(episodes);
    for _ in 0..episodes {
        let [env, step, length] = [reader.word()?, reader.word()?, reader.word()?];
        let sum = f64::from_le_bytes(reader.take::<8>()?);
        if env as usize >= envs || step as usize >= steps || !sum.is_finite() {
            return Err("an episode is out of range");
        }
        ended.push(Episode { env, step, length, sum });
    }
    let actions = Choices { discrete, continuous };
    Ok(Trajectory {
        lane,
        begun,
        version,
        steps,
        envs,
        observations,
        actions,
        log_probs,
        values,
        rewards,
        flags,
        episodes: ended,
    })
}

/// Little-endian numbers, one after the other.
pub(crate) struct Reader<'a>(pub &'a [u8]);

impl<'a> Reader<'a> {
    pub fn bytes(&mut self, len: usize) -> Result<&'a [u8], &'static str> {
        let (head, rest) = self.0.split_at_checked(len).ok_or("too few bytes")?;
        self.0 = rest;
        Ok(head)
    }

    pub fn take<const N: usize>(&mut self) -> Result<[u8; N], &'static str> {
        Ok(self.bytes(N)?.try_into().expect("so many bytes"))
    }

    pub fn word(&mut self) -> Result<u32, &'static str> {
        Ok(u32::from_le_bytes(self.take()?))
    }

    pub fn long(&mut self) -> Result<u64, &'static str> {
        Ok(u64::from_le_bytes(self.take()?))
    }

    /// Finite ones.
    pub fn floats(&mut self, count: usize) -> Result<Vec<f32>, &'static str> {
        let bytes = self.bytes(count.checked_mul(4).ok_or("too many numbers")?)?;
        let floats: Vec<f32> = bytes.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
        if floats.iter().all(|value| value.is_finite()) { Ok(floats) } else { Err("a number is not finite") }
    }

    /// Finite.
    pub fn double(&mut self) -> Result<f64, &'static str> {
        let value = f64::from_le_bytes(self.take()?);
        if value.is_finite() { Ok(value) } else { Err("a number is not finite") }
    }
}
