//! The user that a command runs as. Owns the look-up, by the machine's own programs, which know whatever directory of users it has, and the change of
//! identity between fork and exec.

use std::fs;
use std::io;
use std::os::unix::fs::lchown;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

use rustix::process::{Gid, Uid, geteuid};
use rustix::thread::{set_no_new_privs, set_thread_gid, set_thread_groups, set_thread_uid};

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct User {
    pub name: String,
    pub home: String,
    uid: u32,
    gid: u32,
    groups: Vec<u32>,
}

impl User {
    /// By name or number. The text says what is wrong, and what to do.
    pub fn find(name: &str) -> Result<Self, String> {
        let entry = ask("getent", &["passwd", name])?;
        let unknown = || format!("user = {name:?}: this node has no such user (`getent passwd {name}`)");
        let mut user = Self::parse(&entry).ok_or_else(unknown)?;
        if geteuid().as_raw() != 0 && geteuid().as_raw() != user.uid {
            return Err(format!(
                "user = {name:?} needs an agent that runs as root: start it as root, or leave user out"
            ));
        }
        let groups = ask("id", &["-G", &user.name])?;
        user.groups = groups.split_whitespace().filter_map(|group| group.parse().ok()).collect();
        Ok(user)
    }

    /// `name:password:uid:gid:about:home:shell`.
    fn parse(entry: &str) -> Option<Self> {
        let fields: Vec<&str> = entry.lines().next()?.split(':').collect();
        let [name, _, uid, gid, _, home, ..] = fields[..] else { return None };
        let (uid, gid) = (uid.parse().ok()?, gid.parse().ok()?);
        Some(Self { name: name.to_owned(), home: home.to_owned(), uid, gid, groups: Vec::new() })
    }

    /// The command and all that comes of it have no more rights than this user, and get none back.
    pub fn run(&self, command: &mut Command) {
        if geteuid().as_raw() == self.uid {
            return;
        }
        let groups: Vec<Gid> = self.groups.iter().map(|group| Gid::from_raw(*group)).collect();
        let (uid, gid) = (Uid::from_raw(self.uid), Gid::from_raw(self.gid));
        // SAFETY: between fork and exec only async-signal-safe calls are allowed; these are plain system calls, and allocate nothing.
        unsafe {
            command.pre_exec(move || {
                set_thread_groups(&groups)?;
                set_thread_gid(gid)?;
                set_thread_uid(uid)?;
                Ok(set_no_new_privs(true)?)
            });
        }
    }

    /// Gives a folder and what is in it to the user.
    pub fn own(&self, folder: &Path) -> io::Result<()> {
        lchown(folder, Some(self.uid), Some(self.gid))?;
        for entry in fs::read_dir(folder)? {
            let path = entry?.path();
            match fs::symlink_metadata(&path)?.is_dir() {
                true => self.own(&path)?,
                false => lchown(&path, Some(self.uid), Some(self.gid))?,
            }
        }
        Ok(())
    }
}

/// What a program of the machine prints; nothing where it has found nothing.
fn ask(program: &str, arguments: &[&str]) -> Result<String, String> {
    let asked = Command::new(program).args(arguments).stdin(Stdio::null()).stderr(Stdio::null()).output();
    let answer = asked.map_err(|error| format!("run {program} to look up a user: {error}"))?;
    Ok(String::from_utf8_lossy(&answer.stdout).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn users_are_read_from_their_entries() {
        let user = User::parse("nobody:x:65534:65533:a:/nonexistent:/usr/sbin/nologin\n").unwrap();
        assert_eq!((user.uid, user.gid, user.home.as_str()), (65_534, 65_533, "/nonexistent"));
        assert_eq!(User::parse(""), None);
        assert_eq!(User::parse("a:b:c"), None);
        let unknown = User::find("no-such-user-here").unwrap_err();
        assert!(unknown.contains("has no such user"), "{unknown}");
    }
}
