//! Machines of their own for benches: network namespaces, each with an address, on a bridge in one more. Needs root and iproute2. Owns the namespaces, which end
//! with it; the processes in them are their starter's.

use std::net::Ipv4Addr;
use std::path::Path;
use std::process::{Command, Stdio};

/// So many, numbered from 0.
pub struct Namespaces(u32);

impl Namespaces {
    /// Or what this machine does not let us do.
    pub fn build(count: u32) -> Result<Self, String> {
        let made = Self(count);
        let bridge = made.name(count);
        ip(&["netns", "add", &bridge])?;
        ip(&["-n", &bridge, "link", "add", "name", "bridge0", "type", "bridge"])?;
        ip(&["-n", &bridge, "link", "set", "bridge0", "up"])?;
        for index in 0..count {
            let (name, port, address) = (made.name(index), format!("rank{index}"), Self::address(index));
            ip(&["netns", "add", &name])?;
            let pair = ["type", "veth", "peer", "name", "eth0", "netns", &name];
            ip(&[&["-n", &bridge, "link", "add", "name", &port][..], &pair].concat())?;
            ip(&["-n", &bridge, "link", "set", &port, "master", "bridge0", "up"])?;
            ip(&["-n", &name, "addr", "add", &format!("{address}/24"), "dev", "eth0"])?;
            for link in ["lo", "eth0"] {
                ip(&["-n", &name, "link", "set", link, "up"])?;
            }
        }
        Ok(made)
    }

    pub fn address(index: u32) -> Ipv4Addr {
        Ipv4Addr::new(10, 78, 0, 11 + index as u8)
    }

    /// A program there. `ip` becomes it: the process id is its own.
    pub fn command(&self, index: u32, program: &Path) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.name(index)]).arg(program);
        command
    }

    /// What each sends is held to this rate from now on.
    pub fn limit(&self, mbit_per_second: u32) -> Result<(), String> {
        let rate = format!("{mbit_per_second}mbit");
        (0..self.0).try_for_each(|index| {
            let shaped = ["tc", "qdisc", "replace", "dev", "eth0", "root", "tbf", "rate", &rate];
            let queue = ["burst", "128kb", "latency", "100ms"];
            ip(&[&["netns", "exec", &self.name(index)][..], &shaped, &queue].concat())
        })
    }

    /// Of the bridge, after the last.
    fn name(&self, index: u32) -> String {
        format!("stoke-bench-{}-{index}", std::process::id())
    }
}

impl Drop for Namespaces {
    fn drop(&mut self) {
        for index in 0..=self.0 {
            let _ = ip(&["netns", "del", &self.name(index)]);
        }
    }
}

fn ip(arguments: &[&str]) -> Result<(), String> {
    let line = format!("ip {}", arguments.join(" "));
    let output = Command::new("ip").args(arguments).stdin(Stdio::null()).output();
    let output = output.map_err(|error| format!("{line}: {error} (package iproute2)"))?;
    let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    if output.status.success() { Ok(()) } else { Err(format!("{line}: {said}")) }
}
