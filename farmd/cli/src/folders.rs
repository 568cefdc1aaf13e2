//! Where things are: the three folders, the control socket, and which module is meant.
//!
//! Only names; nothing here opens a file. Every verb gets a [`Context`] from `main`.

use std::path::{Path, PathBuf};

use farm_core::id::ModuleName;

use crate::failure::Failure;

/// What the global options and the environment say.
#[derive(Clone, Debug)]
pub struct Context {
    /// Where configuration, key and modules are edited.
    pub etc: PathBuf,
    /// Where active copies, logs and state are.
    pub var: PathBuf,
    /// Where the control socket is.
    pub run: PathBuf,
    /// `--json`.
    pub json: bool,
    /// `-m`, before the environment.
    pub module: Option<String>,
    /// `FARM_MODULE`, else `SAFEMODULE`.
    pub module_of_environment: Option<String>,
    /// The node that is to do it, if one was named.
    pub node: Option<String>,
    /// A module's script runs this program (`SAFEUSERBIN` is set).
    pub in_script: bool,
}

impl Context {
    /// The control socket.
    pub fn socket(&self) -> PathBuf {
        self.run.join("farmd.sock")
    }

    /// The same for another node.
    pub fn on(&self, node: &str) -> Self {
        Self {
            node: Some(node.to_owned()),
            ..self.clone()
        }
    }

    /// Folder of all editable modules.
    pub fn modules(&self) -> PathBuf {
        self.etc.join("modules")
    }

    /// Editable folder of `module`.
    pub fn editable(&self, module: &ModuleName) -> PathBuf {
        self.modules().join(module.as_str())
    }

    /// Folder of what the daemon keeps of `module`: copies, log and script output.
    pub fn kept(&self, module: &ModuleName) -> PathBuf {
        self.var.join("modules").join(module.as_str())
    }

    /// The copy of `module` that is in force; there only while the module is configured.
    pub fn active(&self, module: &ModuleName) -> PathBuf {
        self.kept(module).join("active")
    }

    /// The module that is meant: `argument`, else `-m`, else the environment.
    ///
    /// # Errors
    /// A usage failure if there is none, if argument and `-m` differ, or if the name cannot be one.
    pub fn module(&self, argument: Option<&str>) -> Result<ModuleName, Failure> {
        self.module_if_any(argument)?
            .ok_or_else(|| Failure::usage("which module? name it as an argument, with -m AM, or in FARM_MODULE"))
    }

    /// As [`Self::module`], and `None` if no module is named anywhere.
    pub fn module_if_any(&self, argument: Option<&str>) -> Result<Option<ModuleName>, Failure> {
        if let (Some(a), Some(b)) = (argument, self.module.as_deref())
            && a != b
        {
            return Err(Failure::usage(format!(
                "two modules are named: `{a}` and, with -m, `{b}`"
            )));
        }
        let name = argument
            .or(self.module.as_deref())
            .or(self.module_of_environment.as_deref());
        name.map(module_name).transpose()
    }
}

/// `text` as a module name.
pub fn module_name(text: &str) -> Result<ModuleName, Failure> {
    text.parse().map_err(|e| Failure::usage(format!("{e}")))
}

/// The temporary name beside `path` under which it is made before it is renamed into place.
pub fn beside(path: &Path, purpose: &str) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    path.with_file_name(format!(".{name}.{purpose}-{}", std::process::id()))
}

/// What the tests of several verbs need.
#[cfg(test)]
pub mod test {
    use super::*;

    /// A folder of its own that goes away with it.
    pub struct Folder(pub PathBuf);

    impl Folder {
        /// An empty folder for `test`.
        pub fn new(test: &str) -> Self {
            let path = std::env::temp_dir().join(format!("farm-cli-{}-{test}", std::process::id()));
            let _ = std::fs::remove_dir_all(&path);
            std::fs::create_dir_all(&path).unwrap();
            Self(path)
        }
    }

    impl Drop for Folder {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }

    /// A context with its three folders in `folder`, without a daemon.
    pub fn context(folder: &Folder) -> Context {
        Context {
            etc: folder.0.join("etc"),
            var: folder.0.join("var"),
            run: folder.0.join("run"),
            json: false,
            module: None,
            module_of_environment: None,
            node: None,
            in_script: false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn context(module: Option<&str>, environment: Option<&str>) -> Context {
        Context {
            module: module.map(str::to_owned),
            module_of_environment: environment.map(str::to_owned),
            ..test::context(&test::Folder("/nowhere".into()))
        }
    }

    #[test]
    fn the_argument_wins_over_the_environment_and_must_agree_with_m() {
        let name = |c: Context, a| c.module(a).map(String::from).map_err(|f| f.text);
        assert_eq!(name(context(None, Some("env")), Some("arg")), Ok("arg".into()));
        assert_eq!(name(context(Some("m"), Some("env")), None), Ok("m".into()));
        assert_eq!(name(context(Some("m"), None), Some("m")), Ok("m".into()));
        assert_eq!(name(context(None, Some("env")), None), Ok("env".into()));
        assert!(
            name(context(Some("m"), None), Some("arg"))
                .unwrap_err()
                .contains("two modules")
        );
        assert!(name(context(None, None), None).unwrap_err().contains("which module?"));
        assert!(
            name(context(None, None), Some("../x"))
                .unwrap_err()
                .contains("no module name")
        );
    }
}
