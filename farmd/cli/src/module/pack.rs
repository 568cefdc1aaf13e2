//! A module's folder as a `.safe` file: a plain zip that is the same for the same files.

use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use farm_core::api::exit;
use zip::ZipWriter;
use zip::write::SimpleFileOptions;

use crate::failure::Failure;
use crate::folders::beside;

/// Why a folder could not be packed.
#[derive(Debug)]
pub enum PackError {
    /// Something could not be read or written.
    Io {
        done: &'static str,
        path: PathBuf,
        source: io::Error,
    },
    /// The zip could not be made.
    Zip { path: PathBuf, text: String },
    /// A link, device, socket or pipe, or a name that is not UTF-8.
    NotPlain { path: PathBuf },
    /// The file exists and is not to be replaced.
    Exists { path: PathBuf },
}

impl fmt::Display for PackError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Io { done, path, source } => write!(f, "{} cannot be {done}: {source}", path.display()),
            Self::Zip { path, text } => write!(f, "{} cannot be written: {text}", path.display()),
            Self::NotPlain { path } => {
                write!(
                    f,
                    "{} is no plain file or folder with a UTF-8 name; a module holds only those",
                    path.display()
                )
            }
            Self::Exists { path } => write!(f, "{} exists and is kept; --replace replaces it", path.display()),
        }
    }
}

impl std::error::Error for PackError {}

impl From<PackError> for Failure {
    fn from(error: PackError) -> Self {
        match &error {
            PackError::Io { done, path, source } => Self::file(done, path, source),
            PackError::Zip { .. } => Self::new(exit::IO, error.to_string()),
            PackError::NotPlain { .. } => Self::new(exit::DATA, error.to_string()),
            PackError::Exists { .. } => Self::new(exit::REFUSED, error.to_string()),
        }
    }
}

/// Writes the files below `folder` into the zip `out`, which appears whole or not at all. Returns their number.
pub fn pack(folder: &Path, out: &Path, replace: bool) -> Result<usize, PackError> {
    let mut files = Vec::new();
    collect(folder, "", &mut files)?;
    write_zip(out, replace, 0o644, |zip| {
        for (name, path) in &files {
            let unread = |source| PackError::Io {
                done: "read",
                path: path.clone(),
                source,
            };
            let mut file = File::open(path).map_err(unread)?;
            let executable = file.metadata().map_err(unread)?.permissions().mode() & 0o111 != 0;
            let options = SimpleFileOptions::default().unix_permissions(if executable { 0o755 } else { 0o644 });
            zip.start_file(name, options).map_err(|e| PackError::Zip {
                path: out.to_owned(),
                text: e.to_string(),
            })?;
            io::copy(&mut file, zip).map_err(unread)?;
        }
        Ok(files.len())
    })
}

/// Makes the zip file `out` with `mode` by way of `fill`; it appears whole or not at all.
pub fn write_zip<T>(
    out: &Path,
    replace: bool,
    mode: u32,
    fill: impl FnOnce(&mut ZipWriter<File>) -> Result<T, PackError>,
) -> Result<T, PackError> {
    if !replace && out.symlink_metadata().is_ok() {
        return Err(PackError::Exists { path: out.to_owned() });
    }
    let unwritten = |source| PackError::Io {
        done: "written",
        path: out.to_owned(),
        source,
    };
    let fresh = beside(out, "new");
    let file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(mode)
        .open(&fresh)
        .map_err(unwritten)?;
    let mut zip = ZipWriter::new(file);
    let result = fill(&mut zip).and_then(|made| {
        zip.finish().map_err(|e| PackError::Zip {
            path: out.to_owned(),
            text: e.to_string(),
        })?;
        fs::rename(&fresh, out).map_err(unwritten)?;
        Ok(made)
    });
    result.inspect_err(|_| {
        let _ = fs::remove_file(&fresh);
    })
}

/// What is in `folder`, by name.
pub fn sorted_entries(folder: &Path) -> io::Result<Vec<fs::DirEntry>> {
    let mut entries = fs::read_dir(folder)?.collect::<io::Result<Vec<_>>>()?;
    entries.sort_by_key(fs::DirEntry::file_name);
    Ok(entries)
}

/// Adds the files below `folder` as (name in the zip, path), in order of their names.
fn collect(folder: &Path, inner: &str, files: &mut Vec<(String, PathBuf)>) -> Result<(), PackError> {
    let unread = |source| PackError::Io {
        done: "read",
        path: folder.to_owned(),
        source,
    };
    for entry in sorted_entries(folder).map_err(unread)? {
        let not_plain = || PackError::NotPlain { path: entry.path() };
        let name = entry.file_name().into_string().map_err(|_| not_plain())?;
        let inner = if inner.is_empty() {
            name
        } else {
            format!("{inner}/{name}")
        };
        let kind = entry.file_type().map_err(unread)?;
        if kind.is_dir() {
            collect(&entry.path(), &inner, files)?;
        } else if kind.is_file() {
            files.push((inner, entry.path()));
        } else {
            return Err(not_plain());
        }
    }
    Ok(())
}
