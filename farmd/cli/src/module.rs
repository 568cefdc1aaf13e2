//! `farm module`: what is installed under `ETC/modules`, as folders and as `.safe` files.
//!
//! Owns the editable copies only; the active copy under `VAR/modules` is the daemon's. Every change is made beside the
//! module and renamed into place, so that an interrupted command leaves either the old module or the new one.

pub mod pack;
mod tree;

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use farm_core::api::{CommandRequest, FarmStatus, ModuleState, Reply, exit};
use farm_core::id::ModuleName;
use serde_json::{Value, json};

use crate::args::{InstallArgs, ModuleArgs, ModuleVerb, PackageArgs};
use crate::client::{Client, ClientError};
use crate::confcheck;
use crate::failure::Failure;
use crate::folders::{Context, beside, module_name};
use crate::module::tree::Tree;
use crate::status::here;
use crate::terminal::{Cell, Paint, Style, Table, show, show_json};

/// Where a module's configuration is in its folder.
pub const USERCONFIG: &str = "conf/userconfig.xml";

/// Runs `farm module …`.
pub fn run(context: &Context, verb: &ModuleVerb) -> Result<u8, Failure> {
    match verb {
        ModuleVerb::List => list(context),
        ModuleVerb::Install(args) => install(context, args),
        ModuleVerb::Uninstall(args) => uninstall(context, args),
        ModuleVerb::Package(args) => package(context, args),
    }
}

fn list(context: &Context) -> Result<u8, Failure> {
    let status = match Client::new(context)?.status() {
        Ok(status) => Some(status),
        Err(ClientError::NotRunning { .. }) => None,
        Err(error) => return Err(error.into()),
    };
    let mut table = Table::new(["MODULE", "INSTALLED", "CONFIGURED", "STATE"]);
    let mut rows: Vec<Value> = Vec::new();
    for name in installed(&context.modules())?.union(&configured(context)?) {
        let (edited, active) = (
            context.editable(name).join(USERCONFIG),
            context.active(name).join(USERCONFIG),
        );
        let (installed, configured) = (edited.is_file(), active.is_file());
        let changed = installed && configured && fs::read(&edited).ok() != fs::read(&active).ok();
        let state = status
            .as_ref()
            .and_then(|status| here(status, name))
            .and_then(|node| node.state);
        let (word, paint) = match (configured, changed) {
            (true, true) => ("edited since", Paint::Moving),
            (true, false) => ("yes", Paint::Plain),
            (false, _) => ("no", Paint::Dim),
        };
        table.row([
            name.as_str().into(),
            if installed { "yes" } else { "no" }.into(),
            Cell::new(word, paint),
            state.map_or_else(|| "-".to_owned(), |state| state.to_string()).into(),
        ]);
        rows.push(json!({
            "module": name.as_str(), "installed": installed, "configured": configured, "edited": changed, "state": state,
        }));
    }
    if context.json {
        show_json(&rows)?;
    } else if rows.is_empty() {
        show(&format!("no module is installed in {}\n", context.modules().display()))?;
    } else {
        show(&table.render(Style::of_stdout(), ""))?;
    }
    Ok(exit::OK)
}

/// Names of the modules that have an active copy.
fn configured(context: &Context) -> Result<BTreeSet<ModuleName>, Failure> {
    let kept = context.var.join("modules");
    modules_in(&kept, &Path::new("active").join(USERCONFIG))
}

/// Names of the folders in `folder` that hold a module's configuration.
pub fn installed(folder: &Path) -> Result<BTreeSet<ModuleName>, Failure> {
    modules_in(folder, Path::new(USERCONFIG))
}

/// Names of the folders in `folder` that have the file `mark` and the name of a module.
fn modules_in(folder: &Path, mark: &Path) -> Result<BTreeSet<ModuleName>, Failure> {
    let read = |e: io::Error| Failure::file("read", folder, &e);
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(BTreeSet::new()),
        Err(e) => return Err(read(e)),
    };
    let mut names = BTreeSet::new();
    for entry in entries {
        let entry = entry.map_err(read)?;
        let name = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse::<ModuleName>().ok());
        names.extend(name.filter(|_| entry.path().join(mark).is_file()));
    }
    Ok(names)
}

fn install(context: &Context, args: &InstallArgs) -> Result<u8, Failure> {
    let name = match args.name.as_deref().or(context.module.as_deref()) {
        Some(name) => module_name(name)?,
        None => name_of(&args.path)?,
    };
    let target = context.editable(&name);
    let taken = target.symlink_metadata().is_ok();
    if taken && !args.replace {
        let text = format!(
            "{name} is installed in {} and is kept; --replace replaces it",
            target.display()
        );
        return Err(Failure::new(exit::REFUSED, text));
    }
    let modules = context.modules();
    fs::create_dir_all(&modules).map_err(|e| Failure::file("made", &modules, &e))?;
    let fresh = beside(&target, "install");
    let files = fill(&fresh, &args.path)
        .and_then(|files| swap_in(&fresh, &target).map(|()| files))
        .inspect_err(|_| {
            let _ = fs::remove_dir_all(&fresh);
        })?;

    let userconfig = target.join(USERCONFIG);
    let errors = confcheck::errors_in(&userconfig);
    if context.json {
        let folder = target.display().to_string();
        show_json(&json!({ "module": name.as_str(), "folder": folder, "files": files, "errors": errors }))?;
        return Ok(exit::OK);
    }
    show(&format!("installed {name}, {files} files, in {}\n", target.display()))?;
    if errors > 0 {
        show(&format!(
            "its configuration has {errors} errors; see: farm confcheck {}\n",
            userconfig.display()
        ))?;
    }
    show(&format!(
        "next: edit {}, then: farm config {name}\n",
        userconfig.display()
    ))?;
    Ok(exit::OK)
}

/// The module's name as `path` tells it: the folder's, or the file's without its ending.
fn name_of(path: &Path) -> Result<ModuleName, Failure> {
    let whole = path.canonicalize().map_err(|e| not_there(path, &e))?;
    let name = if whole.is_dir() {
        whole.file_name()
    } else {
        whole.file_stem()
    };
    module_name(&name.unwrap_or_default().to_string_lossy())
        .map_err(|failure| Failure::usage(format!("{}; give a name with --name AM", failure.text)))
}

fn not_there(path: &Path, error: &io::Error) -> Failure {
    match error.kind() {
        io::ErrorKind::NotFound => Failure::new(exit::NOT_FOUND, format!("there is no {}", path.display())),
        _ => Failure::file("read", path, error),
    }
}

/// Makes the folder `fresh` from a `.safe` file or a folder. Returns the number of files.
fn fill(fresh: &Path, source: &Path) -> Result<usize, Failure> {
    let _ = fs::remove_dir_all(fresh);
    let kind = fs::metadata(source).map_err(|e| not_there(source, &e))?;
    let mut tree = Tree::create(fresh)?;
    if kind.is_dir() {
        tree.copy(source)?;
    } else {
        tree.unpack(source)?;
    }
    Ok(tree.finish(source)?)
}

/// Puts `fresh` in the place of `target`, which is put back if that fails.
fn swap_in(fresh: &Path, target: &Path) -> Result<(), Failure> {
    let written = |e: io::Error| Failure::file("written", target, &e);
    let old = beside(target, "old");
    let had = match fs::rename(target, &old) {
        Ok(()) => true,
        Err(e) if e.kind() == io::ErrorKind::NotFound => false,
        Err(e) => return Err(written(e)),
    };
    if let Err(error) = fs::rename(fresh, target) {
        if had {
            let _ = fs::rename(&old, target);
        }
        return Err(written(error));
    }
    if had {
        // The new module is in place; an old one that cannot be removed is in nobody's way.
        let _ = fs::remove_dir_all(&old);
    }
    Ok(())
}

fn uninstall(context: &Context, args: &ModuleArgs) -> Result<u8, Failure> {
    let name = context.module(args.module.as_deref())?;
    let folder = context.editable(&name);
    if !folder.is_dir() {
        return Err(Failure::new(
            exit::NOT_FOUND,
            format!("{name} is not installed: no {}", folder.display()),
        ));
    }
    let client = Client::new(context)?;
    let configured = context.active(&name).join(USERCONFIG).is_file();
    match client.status() {
        Ok(status) => {
            refuse_unless_stopped(&status, &name)?;
            if configured {
                deconfigure(&client, &name)?;
            }
        }
        Err(ClientError::NotRunning { .. }) if !configured => {}
        Err(ClientError::NotRunning { .. }) => {
            let text =
                format!("{name} is configured and farmd is not running, which would start it again; start farmd first");
            return Err(Failure::new(exit::REFUSED, text));
        }
        Err(error) => return Err(error.into()),
    }
    let backup = back_up(context, &name, &folder)?;
    // Renamed first: a folder half removed would be taken for a module.
    let gone = beside(&folder, "gone");
    let removed = fs::rename(&folder, &gone).and_then(|()| fs::remove_dir_all(&gone));
    removed.map_err(|e| Failure::file("removed", &folder, &e))?;
    if context.json {
        show_json(&json!({ "module": name.as_str(), "backup": backup.display().to_string() }))?;
    } else {
        show(&format!("uninstalled {name}; a copy is kept in {}\n", backup.display()))?;
    }
    Ok(exit::OK)
}

fn refuse_unless_stopped(status: &FarmStatus, name: &ModuleName) -> Result<(), Failure> {
    match here(status, name).and_then(|node| node.state.zip(node.quality)) {
        None | Some((ModuleState::Stop, _)) => Ok(()),
        Some((state, quality)) => Err(Failure::new(
            exit::REFUSED,
            format!("{name} is {state} {quality}; stop it first: farm stop {name}"),
        )),
    }
}

fn deconfigure(client: &Client, name: &ModuleName) -> Result<(), Failure> {
    let request = CommandRequest {
        wait: true,
        ..CommandRequest::default()
    };
    match client.command(name, "deconfig", &request, |_| {})? {
        Reply::Failed { error, .. } => Err(Failure::new(
            exit::REFUSED,
            format!("{name} cannot be deconfigured: {error}"),
        )),
        Reply::Done { .. } | Reply::Progress { .. } => Ok(()),
    }
}

/// Keeps a copy of `folder` under `VAR/backup`, named by the second it was made in.
fn back_up(context: &Context, name: &ModuleName, folder: &Path) -> Result<PathBuf, Failure> {
    let backups = context.var.join("backup");
    fs::create_dir_all(&backups).map_err(|e| Failure::file("made", &backups, &e))?;
    let seconds = SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or_default()
        .as_secs();
    let backup = backups.join(format!("{name}-{seconds}.safe"));
    pack::pack(folder, &backup, true)?;
    Ok(backup)
}

fn package(context: &Context, args: &PackageArgs) -> Result<u8, Failure> {
    let name = context.module(Some(&args.module))?;
    let folder = context.editable(&name);
    if !folder.join(USERCONFIG).is_file() {
        return Err(Failure::new(
            exit::NOT_FOUND,
            format!("{name} is not installed: no {}", folder.join(USERCONFIG).display()),
        ));
    }
    let files = pack::pack(&folder, &args.out, args.replace)?;
    if context.json {
        show_json(&json!({ "module": name.as_str(), "file": args.out.display().to_string(), "files": files }))?;
    } else {
        show(&format!("packed {name}, {files} files, into {}\n", args.out.display()))?;
    }
    Ok(exit::OK)
}

#[cfg(test)]
mod tests;
