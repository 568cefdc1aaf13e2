//! Module folders: what is installed, what is active, and what was started.
//!
//! Owns `VAR/modules/AM` but for its logs. Reads `ETC/modules/AM`, which belongs to the administrator, and never writes
//! there. The owner loop calls it for `config` and `deconfig` and at the daemon's start.
//!
//! ```text
//! ETC/modules/AM/conf/userconfig.xml          edited; inert until `apply`
//! ETC/modules/AM/bin/start_both …
//! VAR/modules/AM/config_2026_11_21T053100/    one accepted copy, never changed afterwards
//!                  conf/userconfig.xml  conf/safeconf.xml (macros expanded)  bin/…  environment.json
//! VAR/modules/AM/active -> config_…           the copy in force; swapped by one rename
//! VAR/modules/AM/started                      there while the module is meant to run (boot="auto")
//! ```
//! A copy is complete before it becomes active, so a crash at any moment leaves the old one or the new one.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use crate::admission::{Other, admit};
use farm_core::api::exit;
use farm_core::config::diag::Diagnostic;
use farm_core::config::{self, ClusterConfig, ModuleConfig};
use farm_core::id::ModuleName;
use farm_core::module::script::Script;

use crate::script::judge_owner;

/// Accepted copies kept beside the active one.
pub const KEPT_COPIES: usize = 3;

/// Most files in a module, and most bytes in all: more is a mistake, such as a log folder under `bin`.
const MAX_FILES: usize = 2000;
const MAX_BYTES: u64 = 256 << 20;

/// Largest `userconfig.xml` that is read at all.
const MAX_CONFIG: u64 = 4 << 20;

/// Why a module's configuration was not made active. Nothing has changed then.
#[derive(Debug)]
pub enum ApplyError {
    /// There is no `ETC/modules/AM/conf/userconfig.xml`.
    NotInstalled {
        /// What was looked for.
        path: PathBuf,
    },
    /// The file is wrong.
    Config {
        /// Each mistake with its place.
        diagnostics: Vec<Diagnostic>,
        /// The same, drawn with the source lines, for a person.
        rendered: String,
    },
    /// A file under `bin` or `conf` cannot be taken.
    File {
        /// Which.
        path: PathBuf,
        /// Why, as the end of a sentence.
        why: String,
    },
    /// Reading or writing failed.
    Io {
        /// Which file or folder.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

impl ApplyError {
    /// The exit code of the command that asked.
    pub fn code(&self) -> u8 {
        match self {
            Self::NotInstalled { .. } => exit::NOT_FOUND,
            Self::Config { .. } | Self::File { .. } => exit::DATA,
            Self::Io { .. } => exit::IO,
        }
    }
}

impl fmt::Display for ApplyError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotInstalled { path } => write!(f, "the module is not installed: {} does not exist", path.display()),
            Self::Config { rendered, .. } => f.write_str(rendered),
            Self::File { path, why } => write!(f, "{}: {why}", path.display()),
            Self::Io { path, source } => write!(f, "{}: {source}", path.display()),
        }
    }
}

impl std::error::Error for ApplyError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Io { source, .. } => Some(source),
            Self::NotInstalled { .. } | Self::Config { .. } | Self::File { .. } => None,
        }
    }
}

/// One module on this node.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ModuleEntry {
    /// Its name.
    pub name: ModuleName,
    /// It is under `ETC/modules`.
    pub installed: bool,
    /// It has an active copy.
    pub configured: bool,
}

/// The folder of `module` under `VAR`.
pub fn module_dir(var: &Path, module: &ModuleName) -> PathBuf {
    var.join("modules").join(module.as_str())
}

/// The link to its active copy.
pub fn active_dir(var: &Path, module: &ModuleName) -> PathBuf {
    module_dir(var, module).join("active")
}

/// Checks `ETC/modules/AM`, also against the `others` of this node, and makes a copy of it the active one. Warnings come as one line each.
///
/// # Errors
/// Everything that is wrong with it; then the active copy is what it was before.
pub fn apply(
    etc: &Path,
    var: &Path,
    module: &ModuleName,
    cluster: Option<&ClusterConfig>,
    others: &[Other],
) -> Result<(ModuleConfig, Vec<String>), ApplyError> {
    let source = etc.join("modules").join(module.as_str());
    let config_path = source.join("conf/userconfig.xml");
    let text = read_config(&config_path)?;
    let env = used_environment(&text, std::env::vars_os());
    let (config, warnings) = parse(&config_path, &text, &env, cluster)?;
    admit(&config, others).map_err(|why| ApplyError::File {
        path: config_path.clone(),
        why,
    })?;
    if config.user.is_some() {
        check_scripts(&source.join("bin"))?;
    }
    let expanded = config::module::expand(&config_path.to_string_lossy(), &text, &env)
        .map_err(|diagnostics| refused(diagnostics, &text))?;

    let dir = module_dir(var, module);
    let copy = new_copy(&dir)?;
    let filled = fill_copy(&source, &copy, &text, &expanded, &env).and_then(|()| activate(&dir, &copy));
    if let Err(e) = filled {
        // What could not be completed is of no use; that it cannot be removed either adds nothing.
        let _ = fs::remove_dir_all(&copy);
        return Err(e);
    }
    prune_copies(&dir, &copy);
    Ok((config, warnings.iter().map(ToString::to_string).collect()))
}

/// The configuration in force, or `None` without one. Variables of the environment have the values they had at `apply`.
///
/// # Errors
/// If the active copy cannot be read, or no longer fits the cluster.
pub fn load_active(
    var: &Path,
    module: &ModuleName,
    cluster: Option<&ClusterConfig>,
) -> Result<Option<ModuleConfig>, ApplyError> {
    let active = active_dir(var, module);
    match fs::symlink_metadata(&active) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(failed(&active)(e)),
        Ok(_) => {}
    }
    let config_path = active.join("conf/userconfig.xml");
    let text = read_config(&config_path)?;
    let env_path = active.join("environment.json");
    let env = fs::read_to_string(&env_path).map_err(failed(&env_path))?;
    let env = serde_json::from_str(&env).map_err(|e| ApplyError::File {
        path: env_path,
        why: format!("the variables of the configuration cannot be read: {e}"),
    })?;
    parse(&config_path, &text, &env, cluster).map(|(config, _)| Some(config))
}

/// Takes the configuration out of force; copies and logs stay. False if there was none.
///
/// # Errors
/// What the system says.
pub fn deconfig(var: &Path, module: &ModuleName) -> io::Result<bool> {
    set_started(var, module, false)?;
    remove_if_there(&active_dir(var, module))
}

/// All modules that are installed or configured, by name. Other folders are not looked at.
///
/// # Errors
/// If a folder that exists cannot be read.
pub fn list(etc: &Path, var: &Path) -> io::Result<Vec<ModuleEntry>> {
    let mut modules: BTreeMap<ModuleName, (bool, bool)> = BTreeMap::new();
    for name in names_in(&etc.join("modules"))? {
        if etc
            .join("modules")
            .join(name.as_str())
            .join("conf/userconfig.xml")
            .is_file()
        {
            modules.entry(name).or_default().0 = true;
        }
    }
    for name in names_in(&var.join("modules"))? {
        if active_dir(var, &name).exists() {
            modules.entry(name).or_default().1 = true;
        }
    }
    let entry = |(name, (installed, configured))| ModuleEntry {
        name,
        installed,
        configured,
    };
    Ok(modules.into_iter().map(entry).collect())
}

/// Remembers whether the module is meant to run, for `boot="auto"` at the daemon's next start.
///
/// # Errors
/// What the system says.
pub fn set_started(var: &Path, module: &ModuleName, started: bool) -> io::Result<()> {
    let marker = started_marker(var, module);
    if started {
        fs::create_dir_all(module_dir(var, module))?;
        fs::write(marker, "")
    } else {
        remove_if_there(&marker).map(drop)
    }
}

/// Whether the module was meant to run when this was last told.
pub fn was_started(var: &Path, module: &ModuleName) -> bool {
    started_marker(var, module).exists()
}

fn started_marker(var: &Path, module: &ModuleName) -> PathBuf {
    module_dir(var, module).join("started")
}

fn failed(path: &Path) -> impl FnOnce(io::Error) -> ApplyError + use<'_> {
    move |source| ApplyError::Io {
        path: path.to_owned(),
        source,
    }
}

fn refused(diagnostics: Vec<Diagnostic>, text: &str) -> ApplyError {
    let drawn: Vec<String> = diagnostics.iter().map(|d| d.render(text)).collect();
    ApplyError::Config {
        rendered: drawn.join("\n\n"),
        diagnostics,
    }
}

fn read_config(path: &Path) -> Result<String, ApplyError> {
    let meta = match fs::metadata(path) {
        Ok(meta) => meta,
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            return Err(ApplyError::NotInstalled { path: path.to_owned() });
        }
        Err(e) => return Err(failed(path)(e)),
    };
    if meta.len() > MAX_CONFIG {
        return Err(ApplyError::File {
            path: path.to_owned(),
            why: format!("it has {} bytes, at most {MAX_CONFIG} are expected", meta.len()),
        });
    }
    let bytes = fs::read(path).map_err(failed(path))?;
    String::from_utf8(bytes).map_err(|e| ApplyError::File {
        path: path.to_owned(),
        why: format!("UTF-8 is expected, byte {} is none", e.utf8_error().valid_up_to() + 1),
    })
}

fn parse(
    path: &Path,
    text: &str,
    env: &BTreeMap<String, String>,
    cluster: Option<&ClusterConfig>,
) -> Result<(ModuleConfig, Vec<Diagnostic>), ApplyError> {
    config::module::parse(&path.to_string_lossy(), text, env, cluster).map_err(|found| refused(found, text))
}

/// The variables whose `%NAME%` stands in `text`: those and no others are stored, since others may be secrets.
fn used_environment(
    text: &str,
    vars: impl IntoIterator<Item = (std::ffi::OsString, std::ffi::OsString)>,
) -> BTreeMap<String, String> {
    vars.into_iter()
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
        .filter(|(name, _)| text.contains(&format!("%{name}%")))
        .collect()
}

fn check_scripts(bin: &Path) -> Result<(), ApplyError> {
    for script in Script::ALL {
        let path = bin.join(script.file_name());
        let why = match fs::symlink_metadata(&path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound && !script.is_required() => continue,
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                "the script is missing; a module with <user> needs start_both and stop_both".to_owned()
            }
            Err(e) => return Err(failed(&path)(e)),
            Ok(meta) if !meta.is_file() => "a regular file is expected".to_owned(),
            Ok(meta) if meta.mode() & 0o111 == 0 => "it is not executable (chmod +x makes it so)".to_owned(),
            Ok(_) => continue,
        };
        return Err(ApplyError::File { path, why });
    }
    Ok(())
}

/// Makes the folder of a new copy, named by the time.
fn new_copy(dir: &Path) -> Result<PathBuf, ApplyError> {
    fs::create_dir_all(dir).map_err(failed(dir))?;
    let stem = format!("config_{}", chrono::Local::now().format("%Y_%m_%dT%H%M%S"));
    let mut number = 1;
    loop {
        let name = if number == 1 {
            stem.clone()
        } else {
            format!("{stem}_{number:03}")
        };
        let path = dir.join(name);
        match fs::create_dir(&path) {
            Ok(()) => return Ok(path),
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists && number < 999 => number += 1,
            Err(e) => return Err(failed(&path)(e)),
        }
    }
}

fn fill_copy(
    source: &Path,
    copy: &Path,
    text: &str,
    expanded: &str,
    env: &BTreeMap<String, String>,
) -> Result<(), ApplyError> {
    let mut budget = Budget {
        files: MAX_FILES,
        bytes: MAX_BYTES,
    };
    for folder in ["conf", "bin"] {
        let from = source.join(folder);
        if from.exists() {
            copy_folder(&from, &copy.join(folder), &mut budget)?;
        }
    }
    let write = |name: &str, content: &str| {
        let path = copy.join(name);
        fs::write(&path, content).map_err(failed(&path))
    };
    // The very text that was checked, in case the file has changed since.
    write("conf/userconfig.xml", text)?;
    write("conf/safeconf.xml", expanded)?;
    let env = serde_json::to_string_pretty(env).map_err(|e| failed(copy)(io::Error::other(e)))?;
    write("environment.json", &env)
}

struct Budget {
    files: usize,
    bytes: u64,
}

impl Budget {
    fn take(&mut self, path: &Path, bytes: u64) -> Result<(), ApplyError> {
        match (self.files.checked_sub(1), self.bytes.checked_sub(bytes)) {
            (Some(files), Some(bytes)) => {
                *self = Self { files, bytes };
                Ok(())
            }
            (None, _) | (_, None) => Err(ApplyError::File {
                path: path.to_owned(),
                why: format!(
                    "the module is too large, at most {MAX_FILES} files and {} MB are expected",
                    MAX_BYTES >> 20
                ),
            }),
        }
    }
}

/// Copies regular files and folders; links and other things are refused, since what they lead to is not checked.
fn copy_folder(from: &Path, to: &Path, budget: &mut Budget) -> Result<(), ApplyError> {
    fs::create_dir(to).map_err(failed(to))?;
    let mut entries: Vec<PathBuf> = fs::read_dir(from)
        .and_then(|entries| entries.map(|entry| entry.map(|e| e.path())).collect())
        .map_err(failed(from))?;
    entries.sort();
    for path in entries {
        let meta = fs::symlink_metadata(&path).map_err(failed(&path))?;
        budget.take(&path, if meta.is_file() { meta.len() } else { 0 })?;
        let target = to.join(path.file_name().unwrap_or_default());
        let refuse = |why: String| ApplyError::File {
            path: path.clone(),
            why,
        };
        if meta.is_dir() {
            copy_folder(&path, &target, budget)?;
        } else if meta.is_file() {
            // The copy belongs to the daemon's user: whoever could write the source would be trusted from then on.
            judge_owner(&meta).map_err(refuse)?;
            fs::copy(&path, &target).map_err(failed(&path))?;
            let mode = Permissions::from_mode(meta.mode() & 0o755 | 0o600);
            fs::set_permissions(&target, mode).map_err(failed(&target))?;
        } else {
            return Err(refuse(
                "a regular file or a folder is expected, links are not followed".to_owned(),
            ));
        }
    }
    Ok(())
}

/// Points `active` to `copy`, in one step.
fn activate(dir: &Path, copy: &Path) -> Result<(), ApplyError> {
    let (next, active) = (dir.join("active.new"), dir.join("active"));
    remove_if_there(&next).map_err(failed(&next))?;
    symlink(copy.file_name().unwrap_or_default(), &next).map_err(failed(&next))?;
    fs::rename(&next, &active).map_err(failed(&active))
}

/// Removes the oldest copies; a copy that cannot be removed now is tried again the next time.
fn prune_copies(dir: &Path, active: &Path) {
    let Ok(entries) = fs::read_dir(dir) else { return };
    let mut copies: Vec<(Option<SystemTime>, PathBuf)> = entries
        .filter_map(Result::ok)
        .filter(|entry| entry.file_name().to_string_lossy().starts_with("config_"))
        .map(|entry| (entry.metadata().and_then(|meta| meta.modified()).ok(), entry.path()))
        .filter(|(_, path)| path != active)
        .collect();
    copies.sort();
    for (_, path) in copies.iter().take(copies.len().saturating_sub(KEPT_COPIES)) {
        if let Err(error) = fs::remove_dir_all(path) {
            tracing::warn!(path = %path.display(), %error, "old configuration not removed");
        }
    }
}

fn names_in(dir: &Path) -> io::Result<Vec<ModuleName>> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(e),
    };
    let mut names = Vec::new();
    for entry in entries {
        let name = entry?.file_name();
        names.extend(name.to_str().and_then(|name| name.parse().ok()));
    }
    Ok(names)
}

fn remove_if_there(path: &Path) -> io::Result<bool> {
    match fs::remove_file(path) {
        Ok(()) => Ok(true),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(e) => Err(e),
    }
}

#[cfg(test)]
mod tests;
