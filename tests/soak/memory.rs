//! The process's memory, where the system tells.

/// Resident memory at its highest, in kB.
pub(crate) fn peak_kb() -> Option<u64> {
    status("VmHWM:")
}

/// Resident memory now, in kB.
pub(crate) fn resident_kb() -> Option<u64> {
    status("VmRSS:")
}

fn status(name: &str) -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix(name))?;
    line.split_whitespace().next()?.parse().ok()
}
