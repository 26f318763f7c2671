//! A model's weights as one safetensors file for other programs. Owns what the file says of itself; verification and layouts are done by then.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::Path;

use stoke_jobs::NamedTensor;
use stoke_protocol::ids::Digest;

use super::error::CheckpointError;
use super::manifest::Manifest;
use super::shard::{Parts, notes};

/// The file.
#[derive(Clone, Copy, Debug)]
pub struct Exported {
    pub bytes: u64,
    pub blake3: Digest,
}

/// Writes a new file, durably; one that is there already is left alone. The same checkpoint gives the same bytes.
pub fn export(manifest: &Manifest, tensors: &[NamedTensor], out: &Path) -> Result<Exported, CheckpointError> {
    let failed = |source| CheckpointError::File { verb: "write", object: out.display().to_string(), source };
    let mut notes = notes();
    let metrics = serde_json::to_string(&manifest.metrics).expect("numbers by name are JSON");
    notes.extend(
        [
            ("cluster", manifest.cluster.to_string()),
            ("job", manifest.job.to_string()),
            ("name", manifest.name.clone()),
            ("trainer", manifest.trainer.clone()),
            ("generation", manifest.generation.0.to_string()),
            ("step", manifest.step.0.to_string()),
            ("weights_blake3", manifest.weights_blake3.to_string()),
            ("metrics", metrics),
            ("spec", manifest.spec.clone()),
        ]
        .map(|(key, value)| (key.to_owned(), value)),
    );
    let tensors: Vec<&NamedTensor> = tensors.iter().collect();
    let parts = Parts::new(&tensors, &notes).map_err(|problem| failed(io::Error::other(problem)))?;
    let mut file = File::create_new(out).map_err(failed)?;
    write(&mut file, parts).map_err(|error| {
        // The error that is returned says more than one of the clean-up would.
        let _ = fs::remove_file(out);
        failed(error)
    })
}

fn write(file: &mut File, parts: Parts<'_>) -> io::Result<Exported> {
    let (mut hasher, mut bytes) = (blake3::Hasher::new(), 0);
    for part in parts {
        hasher.update(&part);
        bytes += part.len() as u64;
        file.write_all(&part)?;
    }
    file.sync_all()?;
    Ok(Exported { bytes, blake3: Digest(*hasher.finalize().as_bytes()) })
}
