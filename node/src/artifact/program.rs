//! A program of the user's own, as a file: whether it can be a rank here, before it runs. Owns the mark that such programs carry, and the words for those
//! that are none. Looks at the file's bytes only: a program of another machine can be looked at too.

use std::fs;
use std::io;
use std::path::Path;

use stoke_protocol::codec::PROTOCOL_VERSION;
use stoke_protocol::ids::Digest;
use stoke_protocol::spec::{ARTIFACT_BYTES_MAX, Artifact};

use super::Packed;

/// What stands in the mark before the version of the ranks' protocol, and behind it.
const BEFORE: &[u8] = b"stoke rank program, protocol <";
const BEHIND: u8 = b'>';

/// Stands in every program whose `main` is [`crate::rank::main`].
pub(crate) static MARK: [u8; 40] = mark();

/// As ELF files name processors; those that Rust can be built for on Linux, and people have.
const MACHINES: [(u16, &str); 6] = [
    (0x3e, "x86_64"),
    (0xb7, "aarch64"),
    (0xf3, "riscv64"),
    (0x15, "powerpc64"),
    (0x16, "s390x"),
    (0x102, "loongarch64"),
];

/// Why a file cannot run as a rank. Each says what to do.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Unfit {
    #[error("it is no program for Linux: name what `cargo build --release` has made, like \"target/release/NAME\"")]
    NoProgram,
    #[error("it has {0} bytes, the limit is {ARTIFACT_BYTES_MAX}: strip it (`[profile.release] strip = true`)")]
    TooLarge(u64),
    #[error(
        "it is no rank program: its main is to be `stoke_node::rank::main(TRAINERS)` (docs/own-trainer.md); what runs any command is a job with [exec]"
    )]
    NoRank,
    #[error(
        "it speaks version {0} of the ranks' protocol, and this stoke version {PROTOCOL_VERSION}: build it with the crate stoke-node of this stoke's release"
    )]
    Version(u32),
    #[error(
        "it is built for {theirs}, and this machine is {ours}: build it for {ours}, or choose nodes by [resources.labels]"
    )]
    Machine { theirs: String, ours: &'static str },
}

/// Whether a file can run as a rank on this machine.
pub fn inspect(path: &Path) -> io::Result<Result<(), Unfit>> {
    let metadata = fs::metadata(path)?;
    if !metadata.is_file() {
        return Err(io::Error::other("it is no regular file"));
    }
    let bytes = metadata.len();
    if bytes > ARTIFACT_BYTES_MAX {
        return Ok(Err(Unfit::TooLarge(bytes)));
    }
    Ok(inspect_bytes(&fs::read(path)?))
}

/// A program as it is sent.
pub fn read(path: &Path) -> io::Result<Packed> {
    let bytes = fs::read(path)?;
    Ok(Packed { what: "program", artifact: Artifact(Digest(*blake3::hash(&bytes).as_bytes())), bytes })
}

/// What is wrong with the program itself comes before what is wrong with it here.
pub fn inspect_bytes(program: &[u8]) -> Result<(), Unfit> {
    // Sixty-four bits; of a machine, by the order of its own bytes.
    let (Some(b"\x7fELF\x02"), Some(order), Some(machine)) = (program.get(..5), program.get(5), program.get(18..20))
    else {
        return Err(Unfit::NoProgram);
    };
    let version = version_of(program).ok_or(Unfit::NoRank)?;
    if version != u32::from(PROTOCOL_VERSION) {
        return Err(Unfit::Version(version));
    }
    let machine = [machine[0], machine[1]];
    let machine = if *order == 1 { u16::from_le_bytes(machine) } else { u16::from_be_bytes(machine) };
    let name = MACHINES.iter().find(|(number, _)| *number == machine).map(|(_, name)| *name);
    match name == Some(std::env::consts::ARCH) {
        true => Ok(()),
        false => {
            let theirs = name.map_or_else(|| format!("machine {machine} of ELF's list"), str::to_owned);
            Err(Unfit::Machine { theirs, ours: std::env::consts::ARCH })
        }
    }
}

/// The number of the first mark. What looks for it is in these programs too, without a number.
fn version_of(program: &[u8]) -> Option<u32> {
    let starts = program.windows(BEFORE.len()).enumerate().filter(|(_, window)| *window == BEFORE);
    let mut numbers = starts.filter_map(|(at, _)| {
        let rest = &program[at + BEFORE.len()..];
        let digits = &rest[..rest.iter().take(4).position(|byte| *byte == BEHIND)?];
        std::str::from_utf8(digits).ok()?.parse().ok()
    });
    numbers.next()
}

const fn mark() -> [u8; 40] {
    let mut mark = [b' '; 40];
    let mut at = 0;
    while at < BEFORE.len() {
        mark[at] = BEFORE[at];
        at += 1;
    }
    let digits = [PROTOCOL_VERSION / 100, PROTOCOL_VERSION / 10 % 10, PROTOCOL_VERSION % 10];
    let mut digit = 0;
    while digit < 3 {
        mark[at] = b'0' + digits[digit];
        at += 1;
        digit += 1;
    }
    mark[at] = BEHIND;
    mark
}

#[cfg(test)]
mod tests {
    use super::*;

    fn elf(machine: u16, rest: &[u8]) -> Vec<u8> {
        let mut program = b"\x7fELF\x02\x01".to_vec();
        program.resize(18, 0);
        program.extend(machine.to_le_bytes());
        program.extend(rest);
        program
    }

    #[test]
    fn what_cannot_be_a_rank_here_is_told_apart() {
        let (own, other) = match std::env::consts::ARCH {
            "aarch64" => (0xb7, 0x3e),
            _ => (0x3e, 0xb7),
        };
        let marked = [b"stoke rank program, protocol <%d", &MARK[..], b"more"].concat();
        assert_eq!(inspect_bytes(&elf(own, &marked)), Ok(()));
        assert!(matches!(inspect_bytes(&elf(other, &marked)), Err(Unfit::Machine { .. })));
        assert_eq!(inspect_bytes(&elf(own, b"hello")), Err(Unfit::NoRank));
        assert_eq!(inspect_bytes(&elf(own, b"stoke rank program, protocol <250>")), Err(Unfit::Version(250)));
        assert_eq!(inspect_bytes(b"#!/bin/sh\nexit 0\n"), Err(Unfit::NoProgram));
        assert_eq!(inspect_bytes(b""), Err(Unfit::NoProgram));
    }
}
