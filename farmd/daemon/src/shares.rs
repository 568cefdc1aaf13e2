//! What administrators have set for this node's shares: drained groups and weights.
//!
//! Owns `VAR/shares.json`, which outlasts restarts and new configurations: `{module: {group: setting}}`, without
//! anything that is as configured. Decides nothing: the owner loop has the one copy in force ([`crate::node`]), and
//! the executor writes it.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Write as _};
use std::path::Path;

use farm_core::api::ShareSetting;
use farm_core::id::ModuleName;

/// File in VAR.
const FILE: &str = "shares.json";

/// Settings by module and group; a missing one is the default.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Shares(BTreeMap<ModuleName, BTreeMap<String, ShareSetting>>);

impl Shares {
    /// What is set for one group.
    pub fn get(&self, module: &ModuleName, group: &str) -> ShareSetting {
        let groups = self.0.get(module);
        groups.and_then(|groups| groups.get(group)).cloned().unwrap_or_default()
    }

    /// Sets it.
    pub fn set(&mut self, module: &ModuleName, group: &str, setting: ShareSetting) {
        let groups = self.0.entry(module.clone()).or_default();
        if setting.is_default() {
            groups.remove(group);
        } else {
            groups.insert(group.to_owned(), setting);
        }
        self.0.retain(|_, groups| !groups.is_empty());
    }

    /// Reads what was kept under `var`; nothing is set if nothing was kept.
    ///
    /// # Errors
    /// A sentence with the file's name.
    pub fn load(var: &Path) -> Result<Self, String> {
        let path = var.join(FILE);
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Self::default()),
            Err(error) => return Err(format!("{}: {error}", path.display())),
        };
        serde_json::from_str(&text)
            .map(Self)
            .map_err(|error| format!("{}: {error}", path.display()))
    }

    /// Keeps it under `var`: whole or not at all, and on the disk when it returns.
    ///
    /// # Errors
    /// What the system says, with the file's name.
    pub fn save(&self, var: &Path) -> io::Result<()> {
        let path = var.join(FILE);
        let named = |error: io::Error| io::Error::new(error.kind(), format!("{}: {error}", path.display()));
        let text = serde_json::to_string_pretty(&self.0).map_err(|error| named(error.into()))?;
        let write = || {
            let new = path.with_extension("new");
            let mut file = File::create(&new)?;
            file.write_all(text.as_bytes())?;
            file.write_all(b"\n")?;
            file.sync_all()?;
            fs::rename(&new, &path)?;
            File::open(var)?.sync_all()
        };
        write().map_err(named)
    }
}

#[cfg(test)]
mod tests {
    use farm_core::api::Drained;

    use super::*;
    use crate::scratch::Scratch;

    fn web() -> ModuleName {
        "web".parse().unwrap()
    }

    fn drained() -> ShareSetting {
        ShareSetting {
            weight: Some(3),
            weight_by: Some("root".into()),
            drained: Some(Drained {
                by: "root on s1".into(),
                since: 1_795_000_000,
                until: None,
            }),
        }
    }

    #[test]
    fn what_is_set_is_read_back_and_what_is_unset_leaves_no_trace() {
        let scratch = Scratch::new("shares");
        let mut shares = Shares::load(scratch.path()).unwrap();
        assert_eq!(shares, Shares::default());
        shares.set(&web(), "web", drained());
        shares.save(scratch.path()).unwrap();
        let read = Shares::load(scratch.path()).unwrap();
        assert_eq!(
            (read.get(&web(), "web"), read.get(&web(), "api")),
            (drained(), ShareSetting::default())
        );
        shares.set(&web(), "web", ShareSetting::default());
        assert_eq!(shares, Shares::default());
        shares.save(scratch.path()).unwrap();
        assert_eq!(Shares::load(scratch.path()).unwrap(), Shares::default());
    }

    #[test]
    fn a_write_that_is_cut_short_leaves_the_old_settings() {
        let scratch = Scratch::new("shares");
        let mut shares = Shares::default();
        shares.set(&web(), "web", drained());
        shares.save(scratch.path()).unwrap();
        // What a crash between creating and renaming leaves.
        fs::write(scratch.path().join("shares.new"), "{\"web\":").unwrap();
        assert_eq!(Shares::load(scratch.path()).unwrap(), shares);
        shares.set(&web(), "web", ShareSetting::default());
        shares.save(scratch.path()).unwrap();
        assert_eq!(Shares::load(scratch.path()).unwrap(), Shares::default());
    }

    #[test]
    fn a_file_that_is_wrong_is_named_with_its_place() {
        let scratch = Scratch::new("shares");
        for wrong in ["{", "{\"web\":{\"web\":{\"weihgt\":3}}}", "{\"../x\":{}}"] {
            fs::write(scratch.path().join(FILE), wrong).unwrap();
            let error = Shares::load(scratch.path()).unwrap_err();
            assert!(error.contains(FILE) && error.contains("line 1"), "{wrong}: {error}");
        }
    }

    #[test]
    fn draining_wins_over_a_weight_and_a_weight_over_the_configuration() {
        assert_eq!(drained().effective(5), 0);
        assert_eq!(
            ShareSetting {
                drained: None,
                ..drained()
            }
            .effective(5),
            3
        );
        assert_eq!(ShareSetting::default().effective(5), 5);
    }
}
