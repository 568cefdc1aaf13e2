//! Reads and writes kernel parameters by name.
//!
//! Owns nothing. Network parameters are those of the calling thread's network namespace. What to set and what to restore is
//! the caller's business.

use std::fmt;
use std::fs;
use std::io;
use std::path::PathBuf;

/// Why a kernel parameter could not be read or written.
#[derive(Debug)]
pub enum SysctlError {
    /// The name is no parameter name: empty, with an empty part or with `..`.
    Name {
        /// What was asked for.
        name: String,
    },
    /// The kernel has no such parameter, or refused.
    Access {
        /// What was asked for.
        name: String,
        /// What the kernel said; `NotFound` for an unknown parameter or interface.
        source: io::Error,
    },
}

impl SysctlError {
    /// Whether the kernel has no parameter of this name.
    pub fn is_absent(&self) -> bool {
        matches!(self, Self::Access { source, .. } if source.kind() == io::ErrorKind::NotFound)
    }
}

impl fmt::Display for SysctlError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Name { name } => write!(
                f,
                "{name:?} is no kernel parameter, expected a name such as net.ipv4.ip_forward"
            ),
            Self::Access { name, source } => write!(f, "kernel parameter {name}: {source}"),
        }
    }
}

impl std::error::Error for SysctlError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Name { .. } => None,
            Self::Access { source, .. } => Some(source),
        }
    }
}

/// The value of a parameter, without the line's end.
///
/// Names are written as for sysctl(8): whichever of `.` and `/` comes first in the name separates its parts. Where `/` does, a
/// dot is a dot; where `.` does, a dot inside of a part is written `/`. So `net/ipv4/conf/eth0.100/forwarding` and
/// `net.ipv4.conf.eth0/100.forwarding` are the same; [`interface`] makes such names.
pub fn read(name: &str) -> Result<String, SysctlError> {
    let path = path(name)?;
    let access = |source| SysctlError::Access {
        name: name.to_owned(),
        source,
    };
    Ok(fs::read_to_string(path).map_err(access)?.trim_end().to_owned())
}

/// Sets a parameter. The name is written as for [`read`].
pub fn write(name: &str, value: &str) -> Result<(), SysctlError> {
    let path = path(name)?;
    let access = |source| SysctlError::Access {
        name: name.to_owned(),
        source,
    };
    // Not `fs::write`: a parameter is never to be created.
    let mut file = fs::OpenOptions::new().write(true).open(path).map_err(access)?;
    io::Write::write_all(&mut file, value.as_bytes()).map_err(access)
}

/// The name of a per-interface parameter, `family` being `ipv4` or `ipv6`: right for interface names with dots too.
pub fn interface(family: &str, interface: &str, key: &str) -> String {
    format!("net/{family}/conf/{interface}/{key}")
}

fn path(name: &str) -> Result<PathBuf, SysctlError> {
    let dotted = name.find(['.', '/']).is_some_and(|at| name.as_bytes()[at] == b'.');
    let swap = |c| match c {
        '.' => '/',
        '/' => '.',
        c => c,
    };
    let relative: String = if dotted {
        name.chars().map(swap).collect()
    } else {
        name.to_owned()
    };
    let bad = |part: &str| part.is_empty() || part == "." || part == ".." || part.contains('\0');
    if relative.split('/').any(bad) {
        return Err(SysctlError::Name { name: name.to_owned() });
    }
    Ok(PathBuf::from("/proc/sys").join(relative))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dots_in_an_interface_name_survive_in_both_spellings() {
        let expected = PathBuf::from("/proc/sys/net/ipv4/conf/eth0.100/arp_announce");
        assert_eq!(path("net/ipv4/conf/eth0.100/arp_announce").unwrap(), expected);
        assert_eq!(path("net.ipv4.conf.eth0/100.arp_announce").unwrap(), expected);
        assert_eq!(path(&interface("ipv4", "eth0.100", "arp_announce")).unwrap(), expected);
    }

    #[test]
    fn names_that_lead_elsewhere_are_refused() {
        for name in ["", "..", "/etc/passwd", "net/../../../etc/passwd", "net..ipv4", "net/"] {
            assert!(matches!(read(name), Err(SysctlError::Name { .. })), "{name:?}");
        }
    }

    #[test]
    fn an_unknown_parameter_is_told_from_a_forbidden_one() {
        assert!(read("net.ipv4.conf.no-such-iface.forwarding").unwrap_err().is_absent());
        assert!(write("net.ipv4.no_such_parameter", "1").unwrap_err().is_absent());
        assert!(!read("kernel.ostype").unwrap().ends_with('\n'));
    }
}
