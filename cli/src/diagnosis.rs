//! The checks of `stoke doctor`: each looks at one thing and gives a finding with a mend. Changes nothing on the machine.

use std::fs;
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::path::Path;
use std::time::{Duration, SystemTime};

use rustix::fs::Access;
use stoke_protocol::identity::{CLOCK_TOLERANCE, Credentials};
use stoke_protocol::message::client::{Reply, Request};
use stoke_protocol::transport::{SOCKET_BUFFER_BYTES, socket_buffers};

use crate::client::{Client, Repeat};
use crate::command::DEFAULT_PORT;
use crate::failure::Exit;
use crate::local::folder::Folder;
use crate::{output, place};

/// QUIC needs 1,200 bytes of payload: with the headers of IPv6 and UDP that is 1,248.
const MTU_MIN: u32 = 1_280;
/// Below this a rank's default ask of 1 GiB cannot be met.
const MEMORY_LOW_BYTES: u64 = 1 << 30;
const DISK_LOW_BYTES: u64 = 1 << 30;
const DISK_MIN_BYTES: u64 = 64 << 20;
/// Sockets, logs and checkpoints of a busy node.
const OPEN_FILES_LOW: u64 = 1_024;
/// 2025-01-01: an earlier clock was never set, and refuses every certificate.
const CLOCK_MIN_SECONDS: u64 = 1_735_689_600;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Status {
    Ok,
    Warn,
    Fail,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Finding {
    pub check: &'static str,
    pub status: Status,
    pub detail: String,
    pub mend: Option<String>,
}

impl Finding {
    fn ok(check: &'static str, detail: impl Into<String>) -> Self {
        Self { check, status: Status::Ok, detail: detail.into(), mend: None }
    }

    fn bad(check: &'static str, status: Status, detail: impl Into<String>, mend: &str) -> Self {
        Self { check, status, detail: detail.into(), mend: Some(mend.to_owned()) }
    }
}

/// Everything that needs no coordinator.
pub fn machine(cluster_dir: &Path) -> Vec<Finding> {
    let mut findings = vec![udp_buffers(), loopback()];
    findings.extend(mtus(Path::new("/sys/class/net")));
    findings.extend([port(DEFAULT_PORT), clock(), processors(), memory(), disk(cluster_dir), open_files(), gpus()]);
    findings
}

/// The certificate in the folder, and the coordinator that it belongs to.
pub async fn cluster(dir: &Path) -> Vec<Finding> {
    let credentials_dir = match place::credentials_dir(dir) {
        Ok(found) => found,
        Err(failure) if failure.exit == Exit::NotFound => {
            return vec![Finding::ok("coordinator", format!("no cluster in {}: nothing to reach", dir.display()))];
        }
        Err(failure) => {
            return vec![Finding::bad("certificate", Status::Fail, failure.message(), &failure.help_text())];
        }
    };
    let mut findings = vec![certificate(&credentials_dir)];
    if let Err(stopped) = Folder::new(dir).must_not_be_stopped() {
        findings.push(Finding::bad("coordinator", Status::Warn, stopped.message(), &stopped.help_text()));
        return findings;
    }
    let reached = match Client::open(&credentials_dir).await {
        Ok(mut client) => client.ask(&Request::Cluster, Repeat::Safe).await,
        Err(failure) => Err(failure),
    };
    if let Ok(Reply::Cluster(view)) = &reached {
        findings.push(clock_against(view.now_ms, output::now_ms()));
    }
    findings.push(match reached {
        Ok(Reply::Cluster(view)) => {
            Finding::ok("coordinator", format!("answers: stoke {}, you are {}", view.version, view.you))
        }
        Ok(_) => Finding::bad(
            "coordinator",
            Status::Fail,
            "gave an answer of another kind",
            "run the same stoke release on both sides",
        ),
        Err(failure) if failure.exit == Exit::Unavailable => {
            let mend = "start the coordinator, or let UDP through to its port (it may be another host's firewall)";
            Finding::bad("coordinator", Status::Fail, failure.message(), mend)
        }
        Err(failure) => Finding::bad("coordinator", Status::Fail, failure.message(), &failure.help_text()),
    });
    findings
}

fn udp_buffers() -> Finding {
    let check = "udp-buffers";
    let buffers = match socket_buffers() {
        Ok(buffers) => buffers,
        Err(error) => {
            return Finding::bad(
                check,
                Status::Fail,
                format!("no UDP socket: {error}"),
                "allow this user to open UDP sockets",
            );
        }
    };
    let wanted = SOCKET_BUFFER_BYTES;
    let got = buffers.receive_bytes.min(buffers.send_bytes);
    let detail = format!(
        "receive {}, send {}, wanted {}",
        output::bytes(buffers.receive_bytes as u64),
        output::bytes(buffers.send_bytes as u64),
        output::bytes(wanted as u64)
    );
    if got >= wanted {
        return Finding::ok(check, detail);
    }
    let mend = format!(
        "sudo sysctl -w net.core.rmem_max={wanted} net.core.wmem_max={wanted} (and in /etc/sysctl.d to keep it): \
         smaller buffers lose packets at high speed"
    );
    Finding::bad(check, Status::Warn, detail, &mend)
}

fn loopback() -> Finding {
    let echo = || -> std::io::Result<()> {
        let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
        socket.set_read_timeout(Some(Duration::from_secs(1)))?;
        socket.send_to(b"stoke", socket.local_addr()?)?;
        let mut bytes = [0; 8];
        socket.recv_from(&mut bytes).map(drop)
    };
    match echo() {
        Ok(()) => Finding::ok("udp-loopback", "packets arrive"),
        Err(error) => Finding::bad(
            "udp-loopback",
            Status::Fail,
            format!("packets do not arrive: {error}"),
            "bring up the loopback (ip link set lo up) and let the firewall pass UDP on it",
        ),
    }
}

/// One finding for each interface that is up.
fn mtus(net: &Path) -> Vec<Finding> {
    let Ok(interfaces) = fs::read_dir(net) else { return Vec::new() };
    let mut findings = Vec::new();
    for interface in interfaces.flatten() {
        let (name, path) = (interface.file_name().to_string_lossy().into_owned(), interface.path());
        let read = |file: &str| fs::read_to_string(path.join(file)).unwrap_or_default().trim().to_owned();
        let Ok(mtu) = read("mtu").parse::<u32>() else { continue };
        if read("operstate") == "down" {
            continue;
        }
        let detail = format!("{name} {mtu}");
        findings.push(if mtu < MTU_MIN {
            let mend = format!("ip link set {name} mtu 1500, or more where the network carries it");
            Finding::bad("mtu", Status::Fail, format!("{detail}: QUIC needs {MTU_MIN}"), &mend)
        } else {
            Finding::ok("mtu", detail)
        });
    }
    findings.sort_by(|left, right| left.detail.cmp(&right.detail));
    findings
}

fn port(port: u16) -> Finding {
    let address = SocketAddr::from((Ipv4Addr::UNSPECIFIED, port));
    match UdpSocket::bind(address) {
        Ok(_) => Finding::ok("port", format!("UDP {port} is free for a coordinator")),
        Err(error) => Finding::bad(
            "port",
            Status::Warn,
            format!("UDP {port}: {error}"),
            "fine if a coordinator runs here; else find who has it with `ss -ulpn`, or listen elsewhere with --listen",
        ),
    }
}

fn clock() -> Finding {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
    let moment = output::moment(now * 1000);
    if now >= CLOCK_MIN_SECONDS {
        return Finding::ok("clock", moment);
    }
    let mend =
        "set the clock and keep it with NTP (timedatectl set-ntp true): certificates are refused outside their time";
    Finding::bad("clock", Status::Fail, moment, mend)
}

/// Certificates allow for some difference (`CLOCK_TOLERANCE`); a clock that is half way there will not stop.
fn clock_against(theirs_ms: u64, ours_ms: u64) -> Finding {
    let check = "clock-difference";
    let difference = Duration::from_millis(theirs_ms.abs_diff(ours_ms));
    let detail = format!("{} from the coordinator's", output::duration_ms(theirs_ms.abs_diff(ours_ms)));
    let mend = "keep both clocks with NTP (timedatectl set-ntp true): certificates are refused outside their time";
    if difference >= CLOCK_TOLERANCE {
        return Finding::bad(check, Status::Fail, detail, mend);
    }
    if difference >= CLOCK_TOLERANCE / 2 {
        return Finding::bad(check, Status::Warn, detail, mend);
    }
    Finding::ok(check, detail)
}

fn certificate(dir: &Path) -> Finding {
    let check = "certificate";
    let mend =
        "log in again: `stoke login --join TOKEN --coordinator HOST:PORT`; if it is fresh, check this machine's clock";
    match Credentials::load(dir) {
        Ok(credentials) => {
            let (identity, left) = (credentials.identity(), credentials.expires_at().duration_since(SystemTime::now()));
            match left {
                Ok(left) => {
                    let left = output::duration_ms(u64::try_from(left.as_millis()).unwrap_or(u64::MAX));
                    Finding::ok(check, format!("{}, {left} left", identity.subject))
                }
                Err(_) => Finding::bad(check, Status::Fail, format!("{} has expired", identity.subject), mend),
            }
        }
        Err(error) => Finding::bad(check, Status::Fail, error.to_string(), mend),
    }
}

fn processors() -> Finding {
    let count = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    Finding::ok("processors", format!("{count} for ranks"))
}

fn memory() -> Finding {
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let kib = |key: &str| -> Option<u64> {
        let line = text.lines().find(|line| line.starts_with(key))?;
        line.split_whitespace().nth(1)?.parse().ok()
    };
    let (Some(total), Some(available)) = (kib("MemTotal:"), kib("MemAvailable:")) else {
        return Finding::bad("memory", Status::Warn, "/proc/meminfo does not tell", "mount /proc");
    };
    let (total, available) = (total << 10, available << 10);
    let detail = format!("{} available of {}", output::bytes(available), output::bytes(total));
    if available >= MEMORY_LOW_BYTES {
        return Finding::ok("memory", detail);
    }
    Finding::bad("memory", Status::Warn, detail, "free memory, or ask for less with [resources] memory in the spec")
}

/// Of the file system that holds the cluster's folder, or would.
fn disk(cluster_dir: &Path) -> Finding {
    let Some(existing) = cluster_dir.ancestors().find(|dir| dir.exists()) else {
        return Finding::bad(
            "disk",
            Status::Warn,
            format!("{} has no parent", cluster_dir.display()),
            "name a folder with --cluster",
        );
    };
    if let Err(error) = rustix::fs::access(existing, Access::WRITE_OK | Access::EXEC_OK) {
        let detail = format!("{} cannot be written: {error}", existing.display());
        let mend = format!("let this user write there, or name a folder with --cluster or {}", place::CLUSTER_ENV);
        return Finding::bad("disk", Status::Fail, detail, &mend);
    }
    let stat = match rustix::fs::statvfs(existing) {
        Ok(stat) => stat,
        Err(error) => {
            return Finding::bad("disk", Status::Warn, format!("{}: {error}", existing.display()), "check the disk");
        }
    };
    let free = stat.f_bavail.saturating_mul(stat.f_frsize);
    let detail = format!("{} free at {}", output::bytes(free), existing.display());
    let mend = "free space: a full disk stops submissions and checkpoints";
    match free {
        0..DISK_MIN_BYTES => Finding::bad("disk", Status::Fail, detail, mend),
        DISK_MIN_BYTES..DISK_LOW_BYTES => Finding::bad("disk", Status::Warn, detail, mend),
        _ => Finding::ok("disk", detail),
    }
}

fn open_files() -> Finding {
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
    match limit {
        Some(limit) if limit < OPEN_FILES_LOW => Finding::bad(
            "open-files",
            Status::Warn,
            format!("limit {limit}"),
            "ulimit -n 65536, or LimitNOFILE= in the unit",
        ),
        Some(limit) => Finding::ok("open-files", format!("limit {limit}")),
        None => Finding::ok("open-files", "no limit"),
    }
}

fn gpus() -> Finding {
    let models: Vec<String> = fs::read_dir("/proc/driver/nvidia/gpus")
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|gpu| fs::read_to_string(gpu.path().join("information")).ok())
        .filter_map(|text| Some(text.lines().find_map(|line| line.strip_prefix("Model:"))?.trim().to_owned()))
        .collect();
    if !models.is_empty() {
        return Finding::ok("gpu", models.join(", "));
    }
    let card = fs::read_dir("/sys/bus/pci/devices").into_iter().flatten().flatten().any(|device| {
        let read = |file: &str| fs::read_to_string(device.path().join(file)).unwrap_or_default();
        // A display or 3D controller of NVIDIA's.
        read("vendor").trim() == "0x10de" && read("class").trim().starts_with("0x03")
    });
    if card {
        let mend = "install NVIDIA's driver and load it (modprobe nvidia)";
        return Finding::bad("gpu", Status::Warn, "an NVIDIA card without a driver", mend);
    }
    Finding::ok("gpu", "none: ranks compute on the processors")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_mtus_and_downed_interfaces_are_told_apart() {
        let net = tempfile::tempdir().unwrap();
        for (name, mtu, state) in [("good0", "1500", "up"), ("off0", "100", "down"), ("small0", "576", "up")] {
            let dir = net.path().join(name);
            fs::create_dir(&dir).unwrap();
            fs::write(dir.join("mtu"), format!("{mtu}\n")).unwrap();
            fs::write(dir.join("operstate"), format!("{state}\n")).unwrap();
        }
        let findings = mtus(net.path());
        let seen: Vec<_> = findings.iter().map(|finding| (finding.detail.as_str(), finding.status)).collect();
        assert_eq!(seen, [("good0 1500", Status::Ok), ("small0 576: QUIC needs 1280", Status::Fail)]);
        assert!(findings[1].mend.as_deref().unwrap().contains("small0"));
    }

    #[test]
    fn clocks_may_differ_by_less_than_certificates_allow() {
        let status = |seconds: u64| clock_against(1_000_000 + seconds * 1000, 1_000_000).status;
        assert_eq!(
            [status(0), status(100), status(200), status(400)],
            [Status::Ok, Status::Ok, Status::Warn, Status::Fail]
        );
    }

    #[test]
    fn a_port_in_use_is_a_warning_that_names_it() {
        let held = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).unwrap();
        let number = held.local_addr().unwrap().port();
        let finding = port(number);
        assert_eq!(finding.status, Status::Warn);
        assert!(finding.detail.contains(&number.to_string()));
    }
}
