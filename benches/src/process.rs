//! What the kernel knows: of a process group, processor time and resident memory; of a device, bytes written; of files, what
//! is in the page cache.

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use rustix::fs::{Advice, fadvise, major, minor};

/// Bytes of what the kernel calls a sector, whatever the device.
const SECTOR: u64 = 512;

/// User and system time since a process began, in seconds; `None` when it is gone or the system has no `/proc`.
pub(crate) fn cpu_seconds(pid: u32) -> Option<f64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    Some(seconds(Stat::parse(&stat)?.cpu_ticks))
}

/// User and system time of all living processes of a group, in seconds; `None` when there is none.
pub(crate) fn group_cpu_seconds(group: u32) -> Option<f64> {
    let ticks: Vec<_> = members(group)?.into_iter().map(|(_, stat)| stat.cpu_ticks).collect();
    (!ticks.is_empty()).then(|| seconds(ticks.iter().sum()))
}

/// Resident memory of all processes of a group, in bytes; what they share counts once for each.
pub(crate) fn group_resident_bytes(group: u32) -> Option<u64> {
    let resident = members(group)?.into_iter().filter_map(|(pid, _)| {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
        field(&status, "VmRSS:").map(|kibibytes| kibibytes << 10)
    });
    let resident: Vec<_> = resident.collect();
    (!resident.is_empty()).then(|| resident.iter().sum())
}

fn members(group: u32) -> Option<Vec<(u32, Stat)>> {
    let processes = fs::read_dir("/proc").ok()?.flatten();
    let member = |entry: fs::DirEntry| {
        let pid = entry.file_name().to_str()?.parse().ok()?;
        let stat = Stat::parse(&fs::read_to_string(entry.path().join("stat")).ok()?)?;
        (stat.group == group).then_some((pid, stat))
    };
    Some(processes.filter_map(member).collect())
}

fn seconds(ticks: u64) -> f64 {
    ticks as f64 / rustix::param::clock_ticks_per_second() as f64
}

/// Bytes written so far to the device that a file or folder is on. The same figure of a process (`write_bytes`) is of no
/// use: where the page cache has large folios it counts a whole one for every small write.
pub(crate) fn device_bytes(path: &Path) -> Option<u64> {
    let device = fs::metadata(path).ok()?.dev();
    let stat = fs::read_to_string(format!("/sys/dev/block/{}:{}/stat", major(device), minor(device))).ok()?;
    let sectors: u64 = stat.split_ascii_whitespace().nth(6)?.parse().ok()?;
    Some(sectors * SECTOR)
}

/// Writes a folder's files to the device and takes them out of the page cache. What a process has mapped stays.
pub(crate) fn drop_from_cache(folder: &Path) -> std::io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let kind = entry.file_type()?;
        if kind.is_dir() {
            drop_from_cache(&entry.path())?;
        } else if kind.is_file() {
            let file = File::open(entry.path())?;
            file.sync_data()?;
            fadvise(&file, 0, None, Advice::DontNeed)?;
        }
    }
    Ok(())
}

/// What is used of `/proc/PID/stat`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stat {
    group: u32,
    /// User and system time.
    cpu_ticks: u64,
}

impl Stat {
    /// The name before the numbers is in parentheses and may itself contain spaces and parentheses.
    fn parse(text: &str) -> Option<Self> {
        let mut fields = text.rsplit_once(')')?.1.split_ascii_whitespace().skip(2);
        let group = fields.next()?.parse().ok()?;
        let mut times = fields.skip(8);
        let mut next = || times.next()?.parse::<u64>().ok();
        Some(Self { group, cpu_ticks: next()? + next()? })
    }
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
        let stat = "42 (a) b (c) S 1 41 42 0 -1 4194560 1 0 0 0 250 50 0 0 20 0 1 0 100 0 0";
        assert_eq!(Stat::parse(stat), Some(Stat { group: 41, cpu_ticks: 300 }));
        assert_eq!(Stat::parse("42 (a"), None);
        assert_eq!(field("Name:\tx\nVmRSS:\t  2048 kB\n", "VmRSS:"), Some(2048));
        assert_eq!(field("VmRSS:\n", "VmRSS:"), None);
    }

    #[test]
    fn this_process_and_its_group_have_used_something() {
        let group = rustix::process::getpgrp().as_raw_nonzero().get().cast_unsigned();
        assert!(group_resident_bytes(group).unwrap() > 1 << 16);
        assert!(group_cpu_seconds(group).unwrap() >= cpu_seconds(std::process::id()).unwrap());
        assert!(cpu_seconds(u32::MAX).is_none() && group_cpu_seconds(u32::MAX).is_none());
        assert!(device_bytes(Path::new("/no/such/place")).is_none());
    }

    #[test]
    fn a_folder_is_dropped_with_its_folders() {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("inner")).unwrap();
        fs::write(folder.path().join("inner/file"), [7; 5000]).unwrap();
        drop_from_cache(folder.path()).unwrap();
        assert_eq!(fs::read(folder.path().join("inner/file")).unwrap().len(), 5000);
    }
}
