//! Artifacts that users send, and jobs that name them. Owns the way from a request to the folder of artifacts, off the network's threads; who may send is
//! decided where everything of that kind is (`state/authorise.rs`).

use std::collections::BTreeSet;

use stoke_protocol::identity::Subject;
use stoke_protocol::message::client::{Refusal, RefusalCode, Reply, Request};
use stoke_protocol::spec::{Artifact, JobSpec, Program};

use super::conversation::going_down;
use crate::artifacts::Artifacts;
use crate::state::authorise::{Verb, authorise};

/// What can be answered without the cluster: a part of an artifact, and a job whose artifact is not here. Gives any other request back.
pub(super) async fn take(artifacts: &Artifacts, caller: &Subject, request: Request) -> Result<Request, Box<Reply>> {
    let refused = |refusal| Err(Box::new(Reply::Refused(refusal)));
    let store = artifacts.clone();
    let verb = Verb::of(&request);
    match request {
        Request::ArtifactPart { artifact, bytes, offset, part } => {
            if let Err(refusal) = authorise(caller, verb) {
                return refused(refusal);
            }
            Err(Box::new(answer(move || store.take(artifact, bytes, (offset, &part.0))).await))
        }
        Request::Submit { key, spec } => {
            let parsed = JobSpec::parse(&spec).ok();
            let (exec, program) = parsed.map_or((None, None), |spec| (spec.exec, spec.program));
            if let Some(Program::File(path)) = &program {
                return refused(Refusal {
                    code: RefusalCode::Invalid,
                    message: format!("program = {path:?}: the coordinator does not have it"),
                    mend: "let `stoke submit` send it, or name one that was sent before, like \"blake3:...\"".into(),
                });
            }
            if exec.as_ref().is_some_and(|exec| exec.folder.is_some()) {
                return refused(Refusal {
                    code: RefusalCode::Invalid,
                    message: "folder: the coordinator does not have it".into(),
                    mend: "let `stoke submit` pack and send it, or name one that was sent before with `artifact`"
                        .into(),
                });
            }
            let is_program = program.is_some();
            let artifact = program.as_ref().and_then(Program::sent).or(exec.and_then(|exec| exec.artifact));
            let Some(artifact) = artifact else { return Ok(Request::Submit { key, spec }) };
            match tokio::task::spawn_blocking(move || store.holds(artifact)).await {
                Ok(true) => Ok(Request::Submit { key, spec }),
                Ok(false) => refused(Refusal {
                    code: RefusalCode::NotFound,
                    message: format!("the coordinator does not have the artifact {artifact}"),
                    mend: match is_program {
                        true => "submit the spec with the file as its `program`, which is sent".into(),
                        false => "submit the spec with `folder`, which is packed and sent".into(),
                    },
                }),
                Err(_) => refused(going_down()),
            }
        }
        other => Ok(other),
    }
}

/// How much of an artifact is here, if it may be stored.
pub(super) async fn offer(artifacts: &Artifacts, artifact: Artifact, bytes: u64, needed: BTreeSet<Artifact>) -> Reply {
    let store = artifacts.clone();
    answer(move || store.offer(artifact, bytes, &needed)).await
}

async fn answer(work: impl FnOnce() -> Result<u64, Refusal> + Send + 'static) -> Reply {
    match tokio::task::spawn_blocking(work).await {
        Ok(Ok(received)) => Reply::Artifact { received },
        Ok(Err(refusal)) => Reply::Refused(refusal),
        Err(_) => Reply::Refused(going_down()),
    }
}
