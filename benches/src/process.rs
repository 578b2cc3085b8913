//! What the kernel knows: of a process, processor time and resident memory; of a device, bytes written.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use rustix::fs::{major, minor};

/// Bytes of what the kernel calls a sector, whatever the device.
const SECTOR: u64 = 512;

/// User and system time since a process began, in seconds; `None` when it is gone or the system has no `/proc`.
pub(crate) fn cpu_seconds(pid: u32) -> Option<f64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    Some(cpu_ticks(&stat)? as f64 / rustix::param::clock_ticks_per_second() as f64)
}

/// Bytes written so far to the device that a file or folder is on. The same figure of a process (`write_bytes`) is of no
/// use: where the page cache has large folios it counts a whole one for every small write.
pub(crate) fn device_bytes(path: &Path) -> Option<u64> {
    let device = fs::metadata(path).ok()?.dev();
    let stat = fs::read_to_string(format!("/sys/dev/block/{}:{}/stat", major(device), minor(device))).ok()?;
    let sectors: u64 = stat.split_ascii_whitespace().nth(6)?.parse().ok()?;
    Some(sectors * SECTOR)
}

/// Resident memory in bytes.
pub(crate) fn resident_bytes(pid: u32) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    field(&status, "VmRSS:").map(|kibibytes| kibibytes << 10)
}

/// User and system time. The name before them is in parentheses and may itself contain spaces and parentheses.
fn cpu_ticks(stat: &str) -> Option<u64> {
    let mut fields = stat.rsplit_once(')')?.1.split_ascii_whitespace().skip(11);
    let mut next = || fields.next()?.parse::<u64>().ok();
    Some(next()? + next()?)
}

/// The number after a name at the start of a line.
fn field(text: &str, name: &str) -> Option<u64> {
    let rest = text.lines().find_map(|line| line.strip_prefix(name))?;
    rest.split_ascii_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_found_behind_a_difficult_name() {
        let stat = "42 (a) b (c) S 1 42 42 0 -1 4194560 1 0 0 0 250 50 0 0 20 0 1 0 100 0 0";
        assert_eq!(cpu_ticks(stat), Some(300));
        assert_eq!(cpu_ticks("42 (a"), None);
        assert_eq!(field("Name:\tx\nVmRSS:\t  2048 kB\n", "VmRSS:"), Some(2048));
        assert_eq!(field("VmRSS:\n", "VmRSS:"), None);
    }

    #[test]
    fn this_process_has_used_something() {
        assert!(resident_bytes(std::process::id()).unwrap() > 1 << 16);
        assert!(cpu_seconds(std::process::id()).is_some());
        assert!(cpu_seconds(u32::MAX).is_none());
        assert!(device_bytes(Path::new("/no/such/place")).is_none());
    }
}
