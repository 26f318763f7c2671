//! Where log lines go: to stderr, always, so that stdout stays for answers. Owns the levels that are shown unless `RUST_LOG` says otherwise.

use std::io::IsTerminal;

use tracing_subscriber::EnvFilter;

/// A service tells what it does; a command only what goes wrong beside its own errors.
const SERVICE_LEVELS: &str = "info,quinn=warn,quinn_proto=warn,quinn_udp=error,rustls=warn";
const COMMAND_LEVELS: &str = "warn,quinn=error,quinn_proto=error,quinn_udp=error,rustls=error";

pub fn start(service: bool, json: bool) {
    let levels = if service { SERVICE_LEVELS } else { COMMAND_LEVELS };
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(levels));
    let colours = std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none();
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(colours);
    // A line that cannot be written would be told to the same stderr, with a panic.
    let builder = builder.log_internal_errors(false);
    // A second subscriber can only be a test's: keep that one.
    let _ = if service && json { builder.json().try_init() } else { builder.try_init() };
}
