//! The note of what outlives the process, in `VAR/host-state.json`.
//!
//! Owns the file and the undoing of what it lists; `host` decides what is noted and when. A boot undoes all of it by itself, so notes of another boot
//! are dropped: a table or value of the same name is somebody else's then.

use std::fs;
use std::io;
use std::path::Path;

use farm_sys::{nft, sysctl};
use serde::{Deserialize, Serialize};

/// File in VAR that says what must be undone.
pub(super) const FILE: &str = "host-state.json";
/// Another value after each boot.
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// Changes that outlive the process.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub(super) struct HostState {
    /// The boot in which they were made; unknown in files of older versions.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) boot: Option<String>,
    /// nf_tables tables of family netdev.
    pub(super) tables: Vec<String>,
    /// Sysctls: name, value before, value written.
    pub(super) sysctls: Vec<(String, String, String)>,
}

impl HostState {
    /// What is noted; nothing if it was noted in another boot.
    pub(super) fn load(var: &Path) -> Result<Self, String> {
        let path = var.join(FILE);
        let state: Self = match fs::read(&path) {
            Ok(bytes) => serde_json::from_slice(&bytes).map_err(|e| format!("{}: {e}", path.display()))?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Self::default()),
            Err(error) => return Err(format!("{}: {error}", path.display())),
        };
        let stale = matches!((&state.boot, boot_id()), (Some(noted), Some(now)) if *noted != now);
        Ok(if stale { Self::default() } else { state })
    }

    /// Writes the note, or removes it if there is nothing to undo.
    pub(super) fn store(&self, var: &Path) -> Result<(), String> {
        let path = var.join(FILE);
        let result = if self.tables.is_empty() && self.sysctls.is_empty() {
            fs::remove_file(&path).or_else(|e| {
                if e.kind() == io::ErrorKind::NotFound {
                    Ok(())
                } else {
                    Err(e)
                }
            })
        } else {
            let new = path.with_extension("json.new");
            let noted = Self {
                boot: boot_id(),
                ..self.clone()
            };
            let bytes = serde_json::to_vec_pretty(&noted).map_err(|e| e.to_string())?;
            fs::write(&new, bytes).and_then(|()| fs::rename(&new, &path))
        };
        result.map_err(|e| format!("{}: {e}", path.display()))
    }

    /// Undoes everything; what could not be undone stays on the list.
    pub(super) fn undo(&mut self) -> (Vec<String>, Vec<String>) {
        let (mut done, mut problems) = (Vec::new(), Vec::new());
        self.tables.retain(|table| match nft::remove(table) {
            Ok(existed) => {
                if existed {
                    done.push(format!("nf_tables table netdev {table} removed"));
                }
                false
            }
            Err(error) => {
                problems.push(format!("nf_tables table netdev {table}: {error}"));
                true
            }
        });
        self.sysctls.retain(|(name, before, ours)| match sysctl::read(name) {
            // Somebody has changed it since: theirs counts.
            Ok(now) if now != *ours => false,
            Ok(_) => match sysctl::write(name, before) {
                Ok(()) => {
                    done.push(format!("{name} = {before}"));
                    false
                }
                Err(error) => {
                    problems.push(error.to_string());
                    true
                }
            },
            Err(error) if error.is_absent() => false,
            Err(error) => {
                problems.push(error.to_string());
                true
            }
        });
        (done, problems)
    }
}

/// `None` where `/proc` does not tell: then notes count as of this boot.
pub fn boot_id() -> Option<String> {
    fs::read_to_string(BOOT_ID).ok().map(|id| id.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scratch::Scratch;

    fn noted(boot: Option<&str>) -> HostState {
        HostState {
            boot: boot.map(str::to_owned),
            tables: vec!["farm_eth0".to_owned()],
            sysctls: vec![(
                "net/ipv4/conf/eth0/arp_ignore".to_owned(),
                "0".to_owned(),
                "1".to_owned(),
            )],
        }
    }

    #[test]
    fn a_note_of_this_boot_is_read_back_and_an_empty_one_leaves_no_file() {
        let var = Scratch::new("state");
        noted(None).store(var.path()).unwrap();
        assert_eq!(HostState::load(var.path()).unwrap(), noted(boot_id().as_deref()));
        HostState::default().store(var.path()).unwrap();
        assert!(!var.path().join(FILE).exists());
        assert_eq!(HostState::load(var.path()).unwrap(), HostState::default());
    }

    #[test]
    fn a_note_of_another_boot_is_dropped_and_one_without_a_boot_is_not() {
        let var = Scratch::new("state");
        let write = |text: &str| fs::write(var.path().join(FILE), text).unwrap();
        let rest = r#""tables": ["farm_eth0"], "sysctls": [["net/ipv4/conf/eth0/arp_ignore", "0", "1"]]"#;
        write(&format!(r#"{{"boot": "another", {rest}}}"#));
        assert_eq!(HostState::load(var.path()).unwrap(), HostState::default());
        write(&format!("{{{rest}}}"));
        assert_eq!(HostState::load(var.path()).unwrap(), noted(None));
        write("{");
        assert!(HostState::load(var.path()).unwrap_err().contains(FILE));
    }
}
