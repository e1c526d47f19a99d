//! `packinfer info`: what there is to run on.

use std::io::{Write, stdout};

use packinfer::{DeviceInfo, KernelFamily, devices, driver_version};

use crate::backend::processor_and_threads;
use crate::memory;
use crate::table;
use crate::units::gigabytes;

/// Prints the devices.
pub fn run() -> anyhow::Result<()> {
    let mut stdout = stdout().lock();
    let memory = memory::available().map_or(String::new(), |bytes| format!(", {} GB available", gigabytes(bytes)));
    writeln!(stdout, "CPU:    {}{memory}", processor_and_threads())?;
    if let Ok(version) = driver_version() {
        writeln!(stdout, "driver: CUDA {}.{}", version / 1000, version % 1000 / 10)?;
    }
    // This says it where there is no driver.
    match devices() {
        Ok(devices) => writeln!(stdout, "{}", table_of(&devices))?,
        Err(error) => writeln!(stdout, "GPU:    {error}")?,
    }
    Ok(())
}

fn table_of(devices: &[DeviceInfo]) -> comfy_table::Table {
    let mut table = table::new(&["GPU", "capability", "SMs", "memory, GB", "L2, MB", "kernels"]);
    for device in devices {
        let (major, minor) = device.compute_capability;
        table.add_row([
            format!("{}: {}", device.ordinal, device.name),
            format!("{major}.{minor}"),
            device.multiprocessors.to_string(),
            gigabytes(device.memory_bytes),
            (device.l2_bytes / 1_000_000).to_string(),
            kernels(device),
        ]);
    }
    table
}

/// The kernels that a device can run.
fn kernels(device: &DeviceInfo) -> String {
    let families: Vec<_> = device.kernel_families().iter().map(KernelFamily::to_string).collect();
    if families.is_empty() { "none: too old".into() } else { families.join(", ") }
}
