//! Unpacks an artifact into a fresh folder. The bytes have their hash, and whoever made them may be anybody: nothing is written outside the folder, and no
//! link leads out of it.

use std::collections::HashSet;
use std::fs::{DirBuilder, File};
use std::io::{self, BufReader, Read};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, symlink};
use std::path::{Component, Path, PathBuf};

use flate2::read::GzDecoder;
use stoke_protocol::spec::ARTIFACT_BYTES_MAX;
use tar::{Archive, EntryType};

use super::leads_inside;
use super::pack::{FILES_MAX, LEVELS_MAX};

/// What tar adds to each file: a header, and what fills its last block.
const OVERHEAD_MAX: u64 = 4 * 512;

/// `folder` is there and empty.
pub fn unpack(artifact: &Path, folder: &Path) -> io::Result<()> {
    let named = |error: io::Error| io::Error::new(error.kind(), format!("unpack {}: {error}", artifact.display()));
    let file = File::open(artifact).map_err(named)?;
    unpack_from(BufReader::new(file), folder).map_err(named)
}

fn unpack_from(packed: impl Read, folder: &Path) -> io::Result<()> {
    // More than can have been packed: a bomb.
    let bytes_max = ARTIFACT_BYTES_MAX + OVERHEAD_MAX * FILES_MAX as u64;
    let mut archive = Archive::new(GzDecoder::new(packed).take(bytes_max));
    let mut folders = HashSet::from([PathBuf::new()]);
    for (count, entry) in archive.entries()?.enumerate() {
        let mut entry = entry?;
        let name = entry.path()?.into_owned();
        let refuse = |why: &str| Err(io::Error::other(format!("{}: {why}", name.display())));
        if count >= FILES_MAX {
            return refuse("too many files");
        }
        if name.as_os_str().is_empty() || !name.components().all(|part| matches!(part, Component::Normal(_))) {
            return refuse("a name that leads out of the folder");
        }
        if name.components().count() > LEVELS_MAX {
            return refuse("too deep");
        }
        // The folder was empty: whatever else is there is no folder, or a link.
        if !folders.contains(name.parent().unwrap_or(Path::new(""))) {
            return refuse("its folder is not a folder of the artifact");
        }
        let path = folder.join(&name);
        match entry.header().entry_type() {
            EntryType::Directory => {
                DirBuilder::new().mode(0o755).create(&path)?;
                folders.insert(name);
            }
            EntryType::Regular => {
                let mode = if entry.header().mode()? & 0o111 == 0 { 0o644 } else { 0o755 };
                let mut file = File::options().write(true).create_new(true).mode(mode).open(&path)?;
                io::copy(&mut entry, &mut file)?;
            }
            EntryType::Symlink => {
                let target: PathBuf = entry.link_name()?.map(|target| target.into_owned()).unwrap_or_default();
                if !leads_inside(&name, &target) {
                    return refuse("a link that leads out of the folder");
                }
                symlink(target, &path)?;
            }
            _ => return refuse("neither a file, a folder nor a link"),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    use flate2::Compression;
    use flate2::write::GzEncoder;
    use tar::{Builder, Header};

    use super::super::pack;
    use super::*;

    #[test]
    fn a_folder_comes_out_as_it_went_in_and_packs_to_the_same_bytes_again() {
        let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let write = |name: &str, text: &str| fs::write(from.path().join(name), text).unwrap();
        fs::create_dir_all(from.path().join("a/b")).unwrap();
        fs::create_dir_all(from.path().join(".git/objects")).unwrap();
        let long = format!("a/b/{}", "n".repeat(200));
        for (name, text) in [("train.py", "print(1)"), ("a/b/data.big", "much"), (&long, ""), (".git/HEAD", "x")] {
            write(name, text);
        }
        write(".stokeignore", "*.big\n");
        write("run.sh", "true");
        fs::set_permissions(from.path().join("run.sh"), fs::Permissions::from_mode(0o750)).unwrap();
        symlink("../train.py", from.path().join("a/link")).unwrap();
        let packed = pack(from.path()).unwrap();
        unpack_from(&packed.bytes[..], to.path()).unwrap();
        let there = |name: &str| to.path().join(name).exists();
        assert!(there("train.py") && there(&long) && !there("a/b/data.big") && !there(".git"));
        assert_eq!(fs::read_to_string(to.path().join("a/link")).unwrap(), "print(1)");
        assert_eq!(fs::metadata(to.path().join("run.sh")).unwrap().permissions().mode() & 0o777, 0o755);
        assert_eq!(pack(to.path()).unwrap().artifact, packed.artifact, "times and owners are not in it");
        symlink("/etc", from.path().join("etc")).unwrap();
        assert!(pack(from.path()).unwrap_err().to_string().contains("a link out of the folder"));
    }

    #[test]
    fn a_folder_that_is_too_deep_is_refused_on_both_ways() {
        let from = tempfile::tempdir().unwrap();
        let deep = |levels: usize| vec!["d"; levels].join("/");
        fs::create_dir_all(from.path().join(deep(LEVELS_MAX))).unwrap();
        let packed = pack(from.path()).unwrap();
        unpack_from(&packed.bytes[..], tempfile::tempdir().unwrap().path()).unwrap();
        fs::create_dir(from.path().join(deep(LEVELS_MAX + 1))).unwrap();
        let refused = pack(from.path()).unwrap_err().to_string();
        assert!(refused.contains(&deep(LEVELS_MAX + 1)) && refused.contains("deeper than 128 folders"), "{refused}");
        // As a packer without the bound does it.
        let mut tar = Builder::new(GzEncoder::new(Vec::new(), Compression::fast()));
        for levels in 1..=LEVELS_MAX + 1 {
            let mut header = Header::new_gnu();
            header.set_entry_type(EntryType::Directory);
            header.set_size(0);
            tar.append_data(&mut header, deep(levels), io::empty()).unwrap();
        }
        let bytes = tar.into_inner().unwrap().finish().unwrap();
        let refused = unpack_from(&bytes[..], tempfile::tempdir().unwrap().path()).unwrap_err().to_string();
        assert!(refused.contains("too deep"), "{refused}");
    }

    #[test]
    fn what_leads_out_of_the_folder_is_refused() {
        type Entry<'a> = (EntryType, &'a str, &'a str);
        let unpacked = |entries: &[Entry<'_>]| -> Result<(), String> {
            let mut tar = Builder::new(GzEncoder::new(Vec::new(), Compression::fast()));
            for (kind, name, target) in entries {
                let mut header = Header::new_gnu();
                header.set_entry_type(*kind);
                header.set_size(0);
                header.set_mode(0o777);
                // As a hostile packer does it: the library's own setters refuse some of these.
                header.as_gnu_mut().unwrap().name[..name.len()].copy_from_slice(name.as_bytes());
                header.as_gnu_mut().unwrap().linkname[..target.len()].copy_from_slice(target.as_bytes());
                header.set_cksum();
                tar.append(&header, io::empty()).unwrap();
            }
            let bytes = tar.into_inner().unwrap().finish().unwrap();
            let (outside, inside) = (tempfile::tempdir().unwrap(), "inside");
            fs::create_dir(outside.path().join(inside)).unwrap();
            let done = unpack_from(&bytes[..], &outside.path().join(inside)).map_err(|error| error.to_string());
            assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 1, "something was written outside: {entries:?}");
            done
        };
        use EntryType::{Block, Directory, Link, Regular, Symlink};
        unpacked(&[(Directory, "a", ""), (Symlink, "a/b", "../c"), (Regular, "c", "")]).unwrap();
        for (entries, why) in [
            (&[(Regular, "/tmp/x", "")][..], "leads out"),
            (&[(Regular, "../x", "")], "leads out"),
            (&[(Regular, "a/../../x", "")], "leads out"),
            (&[(Symlink, "a", "/etc")], "link that leads out"),
            (&[(Symlink, "a", "..")], "link that leads out"),
            (&[(Directory, "d", ""), (Symlink, "d/l", ".."), (Symlink, "a", "d/l/..")], "link that leads out"),
            (&[(Directory, "d", ""), (Symlink, "l", "d"), (Regular, "l/x", "")], "not a folder"),
            (&[(Regular, "a", ""), (Link, "b", "a")], "neither a file"),
            (&[(Block, "a", "")], "neither a file"),
            (&[(Regular, "a/b", "")], "not a folder"),
            (&[(Regular, "a", ""), (Regular, "a", "")], "exists"),
        ] {
            let refused = unpacked(entries).expect_err("refused");
            assert!(refused.contains(why), "{entries:?}: {refused}");
        }
    }
}
