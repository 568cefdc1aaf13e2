//! Tells which capabilities the process lacks, so that the daemon can say so before anything fails halfway.
//!
//! Owns nothing and never raises or drops a capability.

use std::io;

/// What the farm cannot work without, with the numbers of `linux/capability.h`.
const NEEDED: [(&str, u32); 2] = [("CAP_NET_ADMIN", 12), ("CAP_NET_RAW", 13)];

/// `_LINUX_CAPABILITY_VERSION_3`: two words of each set.
const VERSION_3: u32 = 0x2008_0522;

#[repr(C)]
struct Header {
    version: u32,
    pid: libc::c_int,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Sets {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

/// Which of CAP_NET_ADMIN and CAP_NET_RAW the calling thread does not have in effect. Empty means that all is well.
///
/// Inside a user namespace the capabilities count for that namespace's own networks only.
pub fn missing() -> Vec<&'static str> {
    // A kernel that does not answer grants nothing we could name.
    let effective = effective().unwrap_or(0);
    NEEDED
        .iter()
        .filter(|(_, number)| effective & (1 << number) == 0)
        .map(|&(name, _)| name)
        .collect()
}

fn effective() -> io::Result<u64> {
    let mut header = Header {
        version: VERSION_3,
        pid: 0,
    };
    let mut sets = [Sets::default(); 2];
    // SAFETY: version 3 reads one header and writes two sets, which is what the pointers lead to.
    let result = unsafe { libc::syscall(libc::SYS_capget, &raw mut header, sets.as_mut_ptr()) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(u64::from(sets[0].effective) | u64::from(sets[1].effective) << 32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_agrees_with_what_proc_tells() {
        let status = std::fs::read_to_string("/proc/thread-self/status").unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("CapEff:")).unwrap();
        assert_eq!(effective().unwrap(), u64::from_str_radix(line.trim(), 16).unwrap());
    }
}
