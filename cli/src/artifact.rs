//! What a job takes along, a folder or a program: packed when the job is submitted, and sent to the coordinator if that does not have it. Owns the way from
//! `folder` and the `program` that is a file, in the spec that people write, to hashes in the one that is submitted.

use std::path::Path;

use stoke_node::artifact::{Packed, pack, read_program};
use stoke_protocol::message::client::{Reply, Request};
use stoke_protocol::spec::{ARTIFACT_PART_BYTES, JobSpec, Program};

use crate::client::{Client, Repeat, unexpected};
use crate::failure::{Exit, Failure, OrFail};
use crate::output;

/// Packs what the spec names, and names it by its hash from then on. None where the spec has neither.
pub fn take(spec: &mut JobSpec) -> Result<Option<Packed>, Failure> {
    if let Some(Program::File(file)) = &spec.program {
        let packed = read_program(Path::new(file)).or_fail(Exit::Usage, format!("read the program {file}"))?;
        spec.program = Some(Program::Sent(packed.artifact));
        return Ok(Some(packed));
    }
    let Some(exec) = &mut spec.exec else { return Ok(None) };
    let Some(folder) = exec.folder.take() else { return Ok(None) };
    let packed = pack(Path::new(&folder)).map_err(|error| {
        Failure::from_error(Exit::Usage, error)
            .context(format!("pack the folder {folder}"))
            .help("[exec] folder is relative to the spec; files that .stokeignore names stay where they are")
    })?;
    exec.artifact = Some(packed.artifact);
    Ok(Some(packed))
}

/// Sends what the coordinator does not have of it. The same again goes on where the last try has ended.
pub async fn send(client: &mut Client, packed: &Packed) -> Result<(), Failure> {
    let (artifact, bytes) = (packed.artifact, packed.bytes.len() as u64);
    let mut received = receive(client, &Request::Artifact { artifact, bytes }).await?;
    if received == bytes {
        return Ok(());
    }
    output::say(format_args!("sending the {}: {} KiB", packed.what, bytes.div_ceil(1024)));
    while received < bytes {
        let from = usize::try_from(received).unwrap_or(usize::MAX).min(packed.bytes.len());
        let part = packed.bytes[from..].chunks(ARTIFACT_PART_BYTES).next().unwrap_or_default();
        let request = Request::ArtifactPart { artifact, bytes, offset: received, part: part.to_vec().into() };
        received = receive(client, &request).await?;
    }
    Ok(())
}

async fn receive(client: &mut Client, request: &Request) -> Result<u64, Failure> {
    match client.ask(request, Repeat::Safe).await? {
        Reply::Artifact { received } => Ok(received),
        _ => Err(unexpected()),
    }
}
