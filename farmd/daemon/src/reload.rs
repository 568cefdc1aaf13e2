//! What a farmd that is restarted in place leaves to its successor: `VAR/reload.json`.
//!
//! Owns the file. It is written when nothing is open here any more and read, and removed, by the next start; in another process it is void.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::Path;

use farm_core::id::ModuleName;
use serde::{Deserialize, Serialize};

use crate::host::boot_id;

const FILE: &str = "reload.json";

/// See the module doc.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Legacy {
    /// The boot in which it was written; unknown where `/proc` does not tell.
    boot: Option<String>,
    /// The process that has written it, and that becomes its successor; any other start finds the applications ended.
    pid: u32,
    /// Modules that are UP, and their resources.
    pub modules: BTreeMap<ModuleName, BTreeMap<String, String>>,
    /// Why the others are in STOP.
    #[serde(default)]
    pub rested: BTreeMap<ModuleName, String>,
}

impl Legacy {
    /// Of these modules, now.
    pub fn new(modules: BTreeMap<ModuleName, BTreeMap<String, String>>, rested: BTreeMap<ModuleName, String>) -> Self {
        let boot = boot_id();
        let pid = std::process::id();
        Self {
            boot,
            pid,
            modules,
            rested,
        }
    }

    /// Writes it.
    ///
    /// # Errors
    /// Which file, and what the kernel says.
    pub fn store(&self, var: &Path) -> Result<(), String> {
        let path = var.join(FILE);
        let new = path.with_extension("json.new");
        let bytes = serde_json::to_vec_pretty(self).map_err(|e| e.to_string())?;
        let written = fs::write(&new, bytes).and_then(|()| fs::rename(&new, &path));
        written.map_err(|e| format!("{}: {e}", path.display()))
    }

    /// Reads and removes it; `None` if there is none for this process.
    ///
    /// # Errors
    /// Which file, and what is wrong with it; it is removed all the same.
    pub fn take(var: &Path) -> Result<Option<Self>, String> {
        let path = var.join(FILE);
        let fail = |e: &dyn std::fmt::Display| format!("{}: {e}", path.display());
        let bytes = match fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(fail(&error)),
        };
        fs::remove_file(&path).map_err(|e| fail(&e))?;
        let legacy: Self = serde_json::from_slice(&bytes).map_err(|e| fail(&e))?;
        let successor = legacy.boot == boot_id() && legacy.pid == std::process::id();
        Ok(successor.then_some(legacy))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scratch::Scratch;

    #[test]
    fn what_is_left_is_read_once() {
        let var = Scratch::new("reload");
        assert_eq!(Legacy::take(var.path()), Ok(None));
        let resources = [("custom.disk".to_owned(), "up".to_owned())].into();
        let rested = [("mail".parse().unwrap(), "stopped by root".to_owned())].into();
        let legacy = Legacy::new([("web".parse().unwrap(), resources)].into(), rested);
        legacy.store(var.path()).unwrap();
        assert_eq!(Legacy::take(var.path()), Ok(Some(legacy)));
        assert_eq!(Legacy::take(var.path()), Ok(None));
    }

    #[test]
    fn what_another_boot_or_process_has_left_is_void_and_rubbish_is_named() {
        let var = Scratch::new("reload");
        let legacy = Legacy::new(BTreeMap::new(), BTreeMap::new());
        let (boot, pid) = (Some("another".into()), std::process::id() + 1);
        for void in [Legacy { boot, ..legacy.clone() }, Legacy { pid, ..legacy }] {
            void.store(var.path()).unwrap();
            assert_eq!(Legacy::take(var.path()), Ok(None));
        }
        fs::write(var.path().join(FILE), "{").unwrap();
        assert!(Legacy::take(var.path()).unwrap_err().contains(FILE));
        assert_eq!(Legacy::take(var.path()), Ok(None), "it stops no second start");
    }
}
