//! A model's weights as one safetensors file for other programs, or as a folder with what else they need. Owns what the file says of itself; verification and
//! layouts are done by then.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, RenameFlags, renameat_with};
use stoke_jobs::NamedTensor;
use stoke_protocol::ids::Digest;

use super::error::CheckpointError;
use super::manifest::Manifest;
use super::shard::{Parts, notes};

/// Of a Hugging Face folder.
const WEIGHTS: &str = "model.safetensors";

/// The file.
#[derive(Clone, Copy, Debug)]
pub struct Exported {
    pub bytes: u64,
    pub blake3: Digest,
}

/// Writes a new file, durably; one that is there already is left alone. The same checkpoint gives the same bytes.
pub fn export(manifest: &Manifest, tensors: &[NamedTensor], out: &Path) -> Result<Exported, CheckpointError> {
    let failed = |source| CheckpointError::File { verb: "write", object: out.display().to_string(), source };
    whole(out, |unfinished| weights(manifest, tensors, unfinished)).map_err(failed)
}

/// The weights in a new folder, with these files beside them (names and bytes).
pub fn export_folder(
    manifest: &Manifest,
    tensors: &[NamedTensor],
    files: &[(PathBuf, Vec<u8>)],
    out: &Path,
) -> Result<Exported, CheckpointError> {
    let failed = |source| CheckpointError::File { verb: "write", object: out.display().to_string(), source };
    let make = |unfinished: &Path| {
        fs::create_dir(unfinished)?;
        for (name, bytes) in files {
            let mut file = File::create_new(unfinished.join(name))?;
            file.write_all(bytes)?;
            file.sync_all()?;
        }
        let exported = weights(manifest, tensors, &unfinished.join(WEIGHTS))?;
        File::open(unfinished)?.sync_all()?;
        Ok(exported)
    };
    whole(out, make).map_err(failed)
}

fn weights(manifest: &Manifest, tensors: &[NamedTensor], file: &Path) -> io::Result<Exported> {
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
    let parts = Parts::new(&tensors, &notes).map_err(io::Error::other)?;
    write(&mut File::create_new(file)?, parts)
}

/// Makes a file or a folder under another name beside `out`, which then becomes it: whoever is killed leaves nothing that looks whole. One that is there already is
/// left alone.
fn whole<T>(out: &Path, make: impl FnOnce(&Path) -> io::Result<T>) -> io::Result<T> {
    if out.symlink_metadata().is_ok() {
        return Err(io::ErrorKind::AlreadyExists.into());
    }
    let name = out.file_name().ok_or(io::ErrorKind::InvalidInput)?.to_string_lossy();
    let unfinished = out.with_file_name(format!(".{name}.{}-unfinished", std::process::id()));
    let made = make(&unfinished).and_then(|made| {
        renameat_with(CWD, &unfinished, CWD, out, RenameFlags::NOREPLACE)?;
        Ok(made)
    });
    made.inspect_err(|_| {
        // The error that is returned says more than one of the clean-up would.
        let _ = fs::remove_file(&unfinished).or_else(|_| fs::remove_dir_all(&unfinished));
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
