//! Damage on purpose: a bit of this rank's parameters flips as if its memory or its arithmetic were faulty (F35). Owns how a local cluster's
//! `stoke chaos` asks for it, and the flip. Only where the environment names a folder of a local cluster (as for partitions) is anything looked
//! for; elsewhere nobody can ask.

use std::path::{Path, PathBuf};
use std::{fs, io, process};

use stoke_jobs::{JobError, NamedTensor, Train};
use stoke_protocol::transport::WEATHER_VARIABLE;

/// In a mantissa: the number stays near what it was, so that no other check sees it.
const BIT: u32 = 1 << 20;

/// Asks the rank of a process for a flip; `draw` says where. It is done between two of its next steps.
pub fn ask(weather: &Path, pid: u32, draw: u64) -> io::Result<()> {
    fs::write(request(weather, pid), draw.to_string())
}

/// What this process was asked for since the last time.
pub fn asked() -> Option<u64> {
    let path = request(&PathBuf::from(std::env::var_os(WEATHER_VARIABLE)?), process::id());
    let draw = fs::read_to_string(&path).ok()?.trim().parse().ok()?;
    fs::remove_file(path).ok()?;
    Some(draw)
}

/// Flips a bit of a parameter.
pub fn flip(train: &mut dyn Train, draw: u64) -> Result<(), JobError> {
    let mut tensors = train.save()?;
    let mut parameters: Vec<&mut NamedTensor> =
        tensors.iter_mut().filter(|tensor| tensor.name.starts_with("model.") && !tensor.values.is_empty()).collect();
    let count = parameters.len() as u64;
    let Some(tensor) = draw.checked_rem(count).and_then(|index| parameters.get_mut(index as usize)) else {
        return Ok(());
    };
    let index = (draw / count % tensor.values.len() as u64) as usize;
    let value = &mut tensor.values[index];
    *value = f32::from_bits(value.to_bits() ^ BIT);
    tracing::warn!(name = tensor.name, index, "a bit was flipped on purpose");
    train.restore(tensors)
}

fn request(weather: &Path, pid: u32) -> PathBuf {
    weather.with_file_name(format!("flip-{pid}"))
}
