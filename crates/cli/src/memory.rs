//! Whether something fits into this machine's memory.

use std::fs;

use anyhow::bail;

use crate::units::gigabytes;

/// Checks that `needed` bytes are available; `what` begins the sentence that says they are not.
pub fn check(what: &str, needed: u64) -> anyhow::Result<()> {
    match available() {
        Some(available) if needed > available => {
            bail!("{what} {} GB of memory, but only {} GB are available", gigabytes(needed), gigabytes(available))
        }
        _ => Ok(()),
    }
}

/// Bytes that programs can still take without swapping, where the system says.
pub fn available() -> Option<u64> {
    parse_available(&fs::read_to_string("/proc/meminfo").ok()?)
}

fn parse_available(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kibibytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kibibytes.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn available_memory_is_found() {
        let meminfo = "MemTotal:       24576 kB\nMemFree:  1 kB\nMemAvailable:   16384 kB\nBuffers: 2 kB\n";
        assert_eq!(parse_available(meminfo), Some(16384 * 1024));
        assert_eq!(parse_available("MemTotal: 24576 kB\n"), None);
    }

    #[test]
    fn what_does_not_fit_is_refused_with_numbers() {
        if available().is_some() {
            let error = check("x: Q, K, V and O take", 1 << 60).expect_err("an exabyte fits nowhere").to_string();
            assert!(error.starts_with("x: Q, K, V and O take 1152921504.6 GB of memory, but only "), "{error}");
        }
        assert!(check("nothing takes", 0).is_ok());
    }
}
