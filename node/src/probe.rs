//! What this machine has and how busy it is: measured with sysinfo, bounded by cgroups and by the operator. Owns the figures; decides
//! nothing. `stoke doctor` prints them.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use stoke_protocol::list::List;
use stoke_protocol::message::node::{Capacity, Gpu, GpuUse, Heat};
use sysinfo::{Components, Gpus, System};

use crate::config::Config;

/// Display adapters report little or no memory of their own; what computes has more.
const GPU_BYTES_MIN: u64 = 1 << 30;
/// Sensors and accelerators are asked so often: a driver may take its time.
const HEAT_EVERY: Duration = Duration::from_secs(2);

/// Capacity to offer under this configuration.
pub fn capacity(config: &Config) -> Capacity {
    let mut capacity = machine(&config.dir);
    if let Some(cpus) = config.cpus {
        capacity.cpus = cpus;
    }
    if let Some(memory) = config.memory {
        capacity.memory_bytes = memory.0;
    }
    // The operator's word replaces ours.
    let mut labels: BTreeMap<String, String> = capacity.labels.0.into_iter().collect();
    labels.extend(config.labels.clone());
    capacity.labels = labels.into_iter().collect();
    capacity
}

/// What the machine has for this process: processors by affinity and quota, memory by cgroup, free space below `dir`.
pub fn machine(dir: &Path) -> Capacity {
    Capacity {
        cpus: std::thread::available_parallelism().map_or(1, |cpus| u32::try_from(cpus.get()).unwrap_or(u32::MAX)),
        memory_bytes: memory_bytes(),
        disk_bytes: free_bytes(dir),
        gpus: gpus(),
        labels: vec![
            ("host".to_owned(), System::host_name().unwrap_or_default()),
            ("os".to_owned(), std::env::consts::OS.to_owned()),
        ]
        .into(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
    }
}

/// The machine's, or the control group's where that is less.
fn memory_bytes() -> u64 {
    let Ok(mut system) = System::new() else { return 0 };
    system.refresh_memory();
    let limit = system.cgroup_limits().map_or(u64::MAX, |limits| limits.total_memory);
    system.total_memory().min(limit)
}

/// Memory that processes here can still have, by the machine and by the control group.
pub fn free_memory_bytes() -> u64 {
    let Ok(mut system) = System::new() else { return 0 };
    system.refresh_memory();
    let limit = system.cgroup_limits().map_or(u64::MAX, |limits| limits.free_memory);
    system.available_memory().min(limit)
}

fn gpus() -> List<Gpu> {
    let Ok(found) = Gpus::new_with_refreshed_list() else { return List::default() };
    let describe = |gpu: &sysinfo::Gpu| {
        let name = gpu.model().or(gpu.vendor()).unwrap_or_default().to_owned();
        Gpu { name, memory_bytes: gpu.total_memory().unwrap_or(0) }
    };
    (&found).into_iter().filter(|gpu| computes(gpu)).map(describe).collect()
}

fn computes(gpu: &sysinfo::Gpu) -> bool {
    let is_nvidia = gpu.vendor().is_some_and(|vendor| vendor.to_ascii_lowercase().contains("nvidia"));
    is_nvidia || gpu.total_memory().unwrap_or(0) >= GPU_BYTES_MIN
}

/// Free for unprivileged users in the file system of the nearest folder that exists.
fn free_bytes(dir: &Path) -> u64 {
    let existing = dir.ancestors().find(|dir| dir.exists()).unwrap_or(Path::new("/"));
    rustix::fs::statvfs(existing).map_or(0, |fs| fs.f_bavail.saturating_mul(fs.f_frsize))
}

/// How busy the machine is; a heartbeat carries it.
pub struct Usage {
    system: Option<System>,
    heat: Arc<Mutex<Heat>>,
    /// Dropping it ends the thread that measures.
    _measured: SyncSender<()>,
}

impl Usage {
    pub fn new() -> Self {
        let heat = Arc::new(Mutex::new(Heat::default()));
        let (measured, end) = sync_channel(0);
        let measure = heat.clone();
        // Without it heartbeats tell no temperatures.
        let _started =
            thread::Builder::new().name("stoke-heat".into()).spawn(move || measure_heat(&measure, &end)).is_ok();
        Self { system: System::new().ok(), heat, _measured: measured }
    }

    /// Share of all processors since the last call (0 to 1), and bytes of memory in use; zeros where the system does not tell.
    pub fn read(&mut self) -> (f32, u64) {
        let Some(system) = &mut self.system else { return (0.0, 0) };
        system.refresh_cpu_usage();
        system.refresh_memory();
        ((system.global_cpu_usage() / 100.0).clamp(0.0, 1.0), system.used_memory())
    }

    /// As it was measured last.
    pub fn heat(&self) -> Heat {
        *self.heat.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// On a thread of its own: a driver that hangs must hold up no heartbeat.
fn measure_heat(heat: &Mutex<Heat>, end: &Receiver<()>) {
    let (mut gpus, mut sensors) = (Gpus::new().ok(), Components::new_with_refreshed_list().ok());
    loop {
        let mut now = Heat::default();
        if let Some(sensors) = &mut sensors {
            sensors.refresh(false);
            let temperatures = sensors.iter().filter_map(sysinfo::Component::temperature);
            now.temperature_c = temperatures.filter(|degrees| degrees.is_finite()).reduce(f32::max);
        }
        if let Some(gpus) = &mut gpus {
            gpus.refresh(true);
            for (gpu, place) in gpus.into_iter().filter(|gpu| computes(gpu)).zip(&mut now.gpus) {
                let busy = (gpu.usage().unwrap_or(0.0) / 100.0).clamp(0.0, 1.0);
                *place = Some(GpuUse { busy, memory_used_bytes: gpu.used_memory().unwrap_or(0) });
            }
        }
        *heat.lock().unwrap_or_else(PoisonError::into_inner) = now;
        if end.recv_timeout(HEAT_EVERY) != Err(RecvTimeoutError::Timeout) {
            return;
        }
    }
}

impl Default for Usage {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_machine_has_something_to_offer_and_the_operator_has_the_last_word() {
        let dir = std::env::temp_dir();
        let machine = machine(&dir);
        assert!(machine.cpus > 0 && machine.memory_bytes > 0 && machine.disk_bytes > 0);
        let mut config = Config::new(dir, vec![]);
        config.cpus = Some(machine.cpus + 1);
        config.labels.insert("host".into(), "mine".into());
        let offered = capacity(&config);
        assert_eq!(offered.cpus, machine.cpus + 1);
        assert_eq!(
            offered.labels.iter().filter(|(key, _)| key == "host").collect::<Vec<_>>(),
            [&("host".to_owned(), "mine".to_owned())]
        );
    }
}
