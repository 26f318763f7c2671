//! What a service tells the supervisor that started it, by systemd's protocol (sd_notify(3)): that it is ready, that it lives, that it stops. Does
//! nothing where nobody asked for it. What is not heard is not told again: the supervisor has its own deadlines.

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::Duration;

use tokio::time::MissedTickBehavior;

/// Where the supervisor listens: a path, or a name that begins with `@`.
const SOCKET: &str = "NOTIFY_SOCKET";
/// After how many microseconds without a sign of life the supervisor acts, and of which process it waits for them.
const WATCHDOG_US: &str = "WATCHDOG_USEC";
const WATCHDOG_PID: &str = "WATCHDOG_PID";
/// Signs of life in one patience of the supervisor: one may come late.
const BEATS_A_PATIENCE: u32 = 3;

/// The way to the supervisor of this process.
pub struct Service {
    supervisor: Option<UnixDatagram>,
    patience: Option<Duration>,
}

impl Service {
    /// As the environment says. A socket that cannot be reached is logged, and the service runs without: the supervisor's deadline ends it.
    pub fn from_environment() -> Self {
        let address = std::env::var_os(SOCKET).filter(|address| !address.is_empty());
        let supervisor = address.and_then(|address| match connect(&address) {
            Ok(socket) => Some(socket),
            Err(error) => {
                tracing::error!(%error, address = %address.display(), "the supervisor of this service cannot be told that it is ready");
                None
            }
        });
        let variable = |name| std::env::var_os(name);
        Self { supervisor, patience: patience(variable(WATCHDOG_US), variable(WATCHDOG_PID), std::process::id()) }
    }

    /// Tells when `ready` has come, and from then on that the service lives, as often as `beats` answers. For as long as it is polled; a service whose
    /// loop does not answer is silent, and the supervisor ends it.
    pub async fn attend(&self, ready: impl Future<Output = ()>, beats: impl AsyncFn() -> bool) {
        ready.await;
        self.tell("READY=1");
        let Some(patience) = self.patience.filter(|_| self.supervisor.is_some()) else {
            return std::future::pending().await;
        };
        let mut ticks = tokio::time::interval(patience / BEATS_A_PATIENCE);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            if !beats().await {
                // Its loop has ended; whoever waits for the end says why.
                return std::future::pending().await;
            }
            self.tell("WATCHDOG=1");
        }
    }

    /// The end was asked for, and is under way.
    pub fn stopping(&self) {
        self.tell("STOPPING=1");
    }

    fn tell(&self, what: &str) {
        if let Some(supervisor) = &self.supervisor
            && let Err(error) = supervisor.send(what.as_bytes())
        {
            tracing::warn!(%error, what, "the supervisor of this service does not listen");
        }
    }
}

fn connect(address: &OsStr) -> io::Result<UnixDatagram> {
    let address = match address.as_bytes().strip_prefix(b"@") {
        Some(name) => SocketAddr::from_abstract_name(name)?,
        None => SocketAddr::from_pathname(address)?,
    };
    let socket = UnixDatagram::unbound()?;
    socket.connect_addr(&address)?;
    // A supervisor that does not read must not hold a service up.
    socket.set_nonblocking(true)?;
    Ok(socket)
}

/// None where nobody waits for signs of life of the process `own`.
fn patience(microseconds: Option<OsString>, pid: Option<OsString>, own: u32) -> Option<Duration> {
    let number = |text: OsString| text.to_str().and_then(|text| text.parse::<u64>().ok());
    let wanted = pid.is_none_or(|pid| number(pid) == Some(own.into()));
    let patience = microseconds.and_then(number).filter(|microseconds| *microseconds > 0).filter(|_| wanted);
    patience.map(Duration::from_micros)
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    fn pair(patience_ms: u64) -> (Service, UnixDatagram) {
        let (ours, theirs) = UnixDatagram::pair().unwrap();
        theirs.set_nonblocking(true).unwrap();
        (Service { supervisor: Some(ours), patience: Some(Duration::from_millis(patience_ms)) }, theirs)
    }

    fn heard(supervisor: &UnixDatagram) -> Vec<String> {
        let mut buffer = [0; 64];
        let mut next =
            || supervisor.recv(&mut buffer).ok().map(|bytes| String::from_utf8_lossy(&buffer[..bytes]).into_owned());
        std::iter::from_fn(&mut next).collect()
    }

    #[tokio::test(start_paused = true)]
    async fn a_loop_that_is_stuck_is_silent() {
        let (service, supervisor) = pair(300);
        let answers = Cell::new(3);
        let beats = async || match answers.replace(answers.get() - 1) {
            1.. => true,
            _ => std::future::pending().await,
        };
        let attended = service.attend(async {}, beats);
        assert!(tokio::time::timeout(Duration::from_secs(60), attended).await.is_err());
        assert_eq!(heard(&supervisor), ["READY=1", "WATCHDOG=1", "WATCHDOG=1", "WATCHDOG=1"]);
        service.stopping();
        assert_eq!(heard(&supervisor), ["STOPPING=1"]);
    }

    #[tokio::test(start_paused = true)]
    async fn nothing_is_said_before_the_service_is_ready() {
        let (service, supervisor) = pair(300);
        let attended = service.attend(std::future::pending(), async || true);
        assert!(tokio::time::timeout(Duration::from_secs(60), attended).await.is_err());
        assert!(heard(&supervisor).is_empty());
    }

    #[test]
    fn signs_of_life_are_for_the_process_that_is_watched() {
        let text = |text: &str| Some(OsString::from(text));
        assert_eq!(patience(text("2000000"), text("7"), 7), Some(Duration::from_secs(2)));
        assert_eq!(patience(text("2000000"), None, 7), Some(Duration::from_secs(2)));
        for (microseconds, pid) in
            [(text("2000000"), text("8")), (text("0"), None), (text("soon"), None), (None, text("7"))]
        {
            assert_eq!(patience(microseconds, pid, 7), None);
        }
    }

    #[test]
    fn a_supervisor_is_found_by_path_and_by_abstract_name() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("notify");
        let name = format!("stoke-test-{}", std::process::id());
        let listeners = [
            UnixDatagram::bind(&path).unwrap(),
            UnixDatagram::bind_addr(&SocketAddr::from_abstract_name(&name).unwrap()).unwrap(),
        ];
        for (listener, address) in listeners.iter().zip([path.into_os_string(), format!("@{name}").into()]) {
            let service = Service { supervisor: Some(connect(&address).unwrap()), patience: None };
            service.stopping();
            listener.set_nonblocking(true).unwrap();
            assert_eq!(heard(listener), ["STOPPING=1"]);
        }
    }
}
