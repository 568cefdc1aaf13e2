//! Where the programs are that a lab runs, and the folders it works in.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, Result, bail};

/// Where `farmd` and `farm` are: `FARM_BIN`, or beside this executable or in the folder above it.
pub fn binaries() -> Result<PathBuf> {
    let mut tried = Vec::new();
    if let Some(path) = std::env::var_os("FARM_BIN") {
        tried.push(PathBuf::from(path));
    } else {
        let exe = std::env::current_exe().context("cannot find this executable")?;
        tried.extend(exe.ancestors().skip(1).take(2).map(Path::to_path_buf));
    }
    let found = tried
        .iter()
        .find(|dir| dir.join("farmd").is_file() && dir.join("farm").is_file());
    found.cloned().with_context(|| {
        let shown: Vec<String> = tried.iter().map(|dir| dir.display().to_string()).collect();
        format!(
            "no farmd and farm in {}: build them (cargo build --release) or set FARM_BIN",
            shown.join(" or ")
        )
    })
}

/// The program whose hidden commands run in the lab's namespaces.
pub fn lab_program() -> Result<PathBuf> {
    let program = binaries()?.join("farm-lab");
    if !program.is_file() {
        bail!("{} is missing: cargo build --release --bins", program.display());
    }
    Ok(program)
}

/// Removes the folders of this process's labs; for a process that ends without dropping them.
pub fn clean_up() {
    remove_folders(|pid| pid == std::process::id());
}

/// Removes the folders of labs whose process number `ended` accepts.
fn remove_folders(ended: impl Fn(u32) -> bool) {
    let Ok(entries) = fs::read_dir(std::env::temp_dir()) else {
        return;
    };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let owner = name
            .to_str()
            .and_then(|n| n.strip_prefix("farm-lab."))
            .and_then(|n| n.split('.').next());
        if owner.and_then(|pid| pid.parse().ok()).is_some_and(&ended) {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

/// Removes a folder when dropped.
pub struct FolderGuard(pub Option<PathBuf>);

impl Drop for FolderGuard {
    fn drop(&mut self) {
        if let Some(base) = self.0.take() {
            let _ = fs::remove_dir_all(base);
        }
    }
}

/// A new folder `farm-lab.PID.N`, short because socket paths are limited to 107 bytes. Folders of labs that were killed go away here.
pub fn working_folder() -> Result<PathBuf> {
    static NEXT: AtomicU32 = AtomicU32::new(1);
    remove_folders(|pid| !Path::new("/proc").join(pid.to_string()).exists());
    let parent = std::env::temp_dir();
    let base = parent.join(format!(
        "farm-lab.{}.{}",
        std::process::id(),
        NEXT.fetch_add(1, Ordering::Relaxed)
    ));
    fs::create_dir_all(&base).with_context(|| format!("cannot make {}", base.display()))?;
    Ok(base)
}
