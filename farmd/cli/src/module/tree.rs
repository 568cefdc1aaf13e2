//! The files of a module that is being installed, from a source that is not trusted.
//!
//! Owns the rules: only plain files and folders, only below the module's own folder, within limits of number and size, with
//! modes of our choice. A [`Tree`] never writes outside its folder: every name is checked before it is used, and no link is ever made.

use std::collections::BTreeSet;
use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use farm_core::api::exit;
use zip::ZipArchive;

use crate::failure::Failure;
use crate::module::USERCONFIG;
use crate::module::pack::sorted_entries;

/// Most files and folders in a module.
const MAX_ENTRIES: usize = 2_000;
/// Largest file, unpacked.
const MAX_FILE: u64 = 32 * 1024 * 1024;
/// Largest module, unpacked.
const MAX_TOTAL: u64 = 128 * 1024 * 1024;
/// Longest path below the module's folder, in bytes.
const MAX_PATH: usize = 512;
/// Deepest path below the module's folder.
const MAX_DEPTH: usize = 16;

/// Why a source is no module that may be installed.
#[derive(Debug)]
pub enum TreeError {
    /// Something could not be read or written.
    Io {
        done: &'static str,
        path: PathBuf,
        source: io::Error,
    },
    /// The file is no zip, or a damaged one.
    Zip { path: PathBuf, text: String },
    /// A name that could lead elsewhere or cannot be a file.
    Name { name: String, why: &'static str },
    /// A link, device, socket or pipe.
    NotPlain { name: String, what: &'static str },
    /// A name that stands there twice.
    Twice { name: String },
    /// More than [`MAX_ENTRIES`].
    TooMany,
    /// A file or the whole is too large.
    TooLarge { name: String, limit: u64 },
    /// There is no `conf/userconfig.xml`.
    NoConfig { path: PathBuf },
}

impl fmt::Display for TreeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Io { done, path, source } => write!(f, "{} cannot be {done}: {source}", path.display()),
            Self::Zip { path, text } => write!(f, "{} is no usable zip file: {text}", path.display()),
            Self::Name { name, why } => write!(f, "the name `{}` {why}", name.escape_debug()),
            Self::NotPlain { name, what } => {
                write!(
                    f,
                    "`{}` is {what}; only plain files and folders are taken",
                    name.escape_debug()
                )
            }
            Self::Twice { name } => write!(f, "`{}` is there twice", name.escape_debug()),
            Self::TooMany => write!(f, "it holds more than {MAX_ENTRIES} files and folders"),
            Self::TooLarge { name, limit } => {
                write!(
                    f,
                    "with `{}` it grows over the limit of {} MiB",
                    name.escape_debug(),
                    limit / (1024 * 1024)
                )
            }
            Self::NoConfig { path } => write!(f, "{} is no module: it has no {USERCONFIG}", path.display()),
        }
    }
}

impl std::error::Error for TreeError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Io { source, .. } => Some(source),
            _ => None,
        }
    }
}

impl From<TreeError> for Failure {
    fn from(error: TreeError) -> Self {
        match &error {
            TreeError::Io { done, path, source } => Self::file(done, path, source),
            _ => Self::new(exit::DATA, error.to_string()),
        }
    }
}

/// A folder that is being filled.
pub struct Tree {
    root: PathBuf,
    /// Every file and folder there, so that none is made twice.
    names: BTreeSet<String>,
    files: usize,
    bytes: u64,
}

impl Tree {
    /// Makes the folder `root`, which must not exist.
    pub fn create(root: &Path) -> Result<Self, TreeError> {
        make_folder(root)?;
        Ok(Self {
            root: root.to_owned(),
            names: BTreeSet::new(),
            files: 0,
            bytes: 0,
        })
    }

    /// Fills it from the zip file `path`. A single folder around everything is left out.
    pub fn unpack(&mut self, path: &Path) -> Result<(), TreeError> {
        let file = File::open(path).map_err(|source| TreeError::Io {
            done: "read",
            path: path.to_owned(),
            source,
        })?;
        let unusable = |e: zip::result::ZipError| TreeError::Zip {
            path: path.to_owned(),
            text: e.to_string(),
        };
        let mut archive = ZipArchive::new(io::BufReader::new(file)).map_err(unusable)?;
        if archive.len() > MAX_ENTRIES {
            return Err(TreeError::TooMany);
        }
        if archive.has_duplicate_names() {
            return Err(TreeError::Zip {
                path: path.to_owned(),
                text: "a name is there twice".to_owned(),
            });
        }
        let mut names = Vec::with_capacity(archive.len());
        for index in 0..archive.len() {
            let entry = archive.by_index(index).map_err(unusable)?;
            names.push(entry.name().map_err(unusable)?.into_owned());
        }
        let outer = outer_folder(&names);
        for (index, name) in names.iter().enumerate() {
            let mut entry = archive.by_index(index).map_err(unusable)?;
            let inner = safe_path(name)?;
            let inner = outer
                .as_deref()
                .map_or(Some(inner.as_str()), |outer| below(outer, &inner))
                .unwrap_or_default();
            let mode = entry.unix_mode().unwrap_or(0);
            let kind = match mode & 0o170_000 {
                0 => {
                    if entry.is_dir() {
                        0o040_000
                    } else {
                        0o100_000
                    }
                }
                kind => kind,
            };
            match kind {
                _ if inner.is_empty() => {}
                0o040_000 => self.folder(inner)?,
                0o100_000 if !entry.is_dir() => self.file(inner, mode & 0o111 != 0, &mut entry)?,
                0o120_000 => {
                    return Err(TreeError::NotPlain {
                        name: name.clone(),
                        what: "a symbolic link",
                    });
                }
                _ => {
                    return Err(TreeError::NotPlain {
                        name: name.clone(),
                        what: "neither a file nor a folder",
                    });
                }
            }
        }
        Ok(())
    }

    /// Fills it with a copy of the folder `path`.
    pub fn copy(&mut self, path: &Path) -> Result<(), TreeError> {
        self.copy_below(path, "")
    }

    fn copy_below(&mut self, folder: &Path, inner: &str) -> Result<(), TreeError> {
        let unread = |source| TreeError::Io {
            done: "read",
            path: folder.to_owned(),
            source,
        };
        for entry in sorted_entries(folder).map_err(unread)? {
            let name = entry.file_name();
            let name = name.to_str().ok_or_else(|| TreeError::Name {
                name: name.to_string_lossy().into_owned(),
                why: "is not UTF-8",
            })?;
            let inner = safe_path(&if inner.is_empty() {
                name.to_owned()
            } else {
                format!("{inner}/{name}")
            })?;
            let kind = entry.file_type().map_err(unread)?;
            if kind.is_dir() {
                self.folder(&inner)?;
                self.copy_below(&entry.path(), &inner)?;
            } else if kind.is_file() {
                let unread = |source| TreeError::Io {
                    done: "read",
                    path: entry.path(),
                    source,
                };
                let mut file = File::open(entry.path()).map_err(unread)?;
                let data = file.metadata().map_err(unread)?;
                self.file(&inner, data.permissions().mode() & 0o111 != 0, &mut file)?;
            } else {
                let what = if kind.is_symlink() {
                    "a symbolic link"
                } else {
                    "neither a file nor a folder"
                };
                return Err(TreeError::NotPlain { name: inner, what });
            }
        }
        Ok(())
    }

    /// The number of files, once the tree has what makes it a module.
    pub fn finish(self, source: &Path) -> Result<usize, TreeError> {
        if self.root.join(USERCONFIG).is_file() {
            Ok(self.files)
        } else {
            Err(TreeError::NoConfig {
                path: source.to_owned(),
            })
        }
    }

    /// Makes the folder `inner` and those above it.
    fn folder(&mut self, inner: &str) -> Result<(), TreeError> {
        let ends = inner.match_indices('/').map(|(at, _)| at).chain([inner.len()]);
        for part in ends.map(|end| &inner[..end]) {
            let path = self.root.join(part);
            if self.names.contains(part) {
                if !path.is_dir() {
                    return Err(TreeError::Twice { name: part.to_owned() });
                }
                continue;
            }
            self.count(part)?;
            make_folder(&path)?;
        }
        Ok(())
    }

    /// Writes the file `inner`. It may be executed if its source may be, or if it is in `bin`.
    fn file(&mut self, inner: &str, executable: bool, source: &mut dyn Read) -> Result<(), TreeError> {
        if let Some((above, _)) = inner.rsplit_once('/') {
            self.folder(above)?;
        }
        self.count(inner)?;
        let path = self.root.join(inner);
        let unwritten = |source| TreeError::Io {
            done: "unpacked",
            path: path.clone(),
            source,
        };
        let mut file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&path)
            .map_err(unwritten)?;
        let room = (MAX_TOTAL - self.bytes).min(MAX_FILE);
        // One byte more than there is room for tells a file that is too long, whatever length the source claims.
        let written = io::copy(&mut source.take(room + 1), &mut file).map_err(unwritten)?;
        if written > room {
            let limit = if room == MAX_FILE { MAX_FILE } else { MAX_TOTAL };
            return Err(TreeError::TooLarge {
                name: inner.to_owned(),
                limit,
            });
        }
        let mode = if executable || inner.starts_with("bin/") {
            0o755
        } else {
            0o644
        };
        file.set_permissions(fs::Permissions::from_mode(mode))
            .map_err(unwritten)?;
        self.bytes += written;
        self.files += 1;
        Ok(())
    }

    fn count(&mut self, name: &str) -> Result<(), TreeError> {
        if !self.names.insert(name.to_owned()) {
            return Err(TreeError::Twice { name: name.to_owned() });
        }
        if self.names.len() > MAX_ENTRIES {
            Err(TreeError::TooMany)
        } else {
            Ok(())
        }
    }
}

fn make_folder(path: &Path) -> Result<(), TreeError> {
    let made = fs::create_dir(path).and_then(|()| fs::set_permissions(path, fs::Permissions::from_mode(0o755)));
    made.map_err(|source| TreeError::Io {
        done: "made",
        path: path.to_owned(),
        source,
    })
}

/// The single folder that all `names` are in, if the module's configuration is in it and not at the top.
fn outer_folder(names: &[String]) -> Option<String> {
    let plain = |name: &String| safe_path(name).unwrap_or_default();
    if names.iter().any(|name| plain(name) == USERCONFIG) {
        return None;
    }
    let config = names
        .iter()
        .map(plain)
        .find(|name| name.split_once('/').is_some_and(|(_, rest)| rest == USERCONFIG))?;
    let (outer, _) = config.split_once('/')?;
    names
        .iter()
        .map(plain)
        .all(|name| below(outer, &name).is_some())
        .then(|| outer.to_owned())
}

/// The part of `path` below the folder `outer`; empty for the folder itself.
fn below<'a>(outer: &str, path: &'a str) -> Option<&'a str> {
    let rest = path.strip_prefix(outer)?;
    if rest.is_empty() {
        Some(rest)
    } else {
        rest.strip_prefix('/')
    }
}

/// `name` as a relative path of plain parts.
///
/// # Errors
/// If it is absolute, climbs, is too long or too deep, or holds what no file name should.
fn safe_path(name: &str) -> Result<String, TreeError> {
    let refused = |why| {
        Err(TreeError::Name {
            name: name.to_owned(),
            why,
        })
    };
    if name.len() > MAX_PATH {
        return refused("is too long");
    }
    if name.starts_with('/') {
        return refused("is absolute");
    }
    if name.contains('\\') {
        return refused("has a backslash, `/` is expected between folders");
    }
    if name.chars().any(char::is_control) {
        return refused("has control characters");
    }
    let mut parts = Vec::new();
    let trimmed = name.strip_suffix('/').unwrap_or(name);
    for part in trimmed.split('/') {
        match part {
            "" => return refused("has an empty part"),
            ".." => return refused("leads out of the module with `..`"),
            "." => {}
            part if part.len() > 255 => return refused("has a part that is too long"),
            part => parts.push(part),
        }
    }
    if parts.len() > MAX_DEPTH {
        return refused("is too deep");
    }
    Ok(parts.join("/"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_that_stay_inside_are_taken() {
        assert_eq!(safe_path("conf/userconfig.xml").unwrap(), "conf/userconfig.xml");
        assert_eq!(safe_path("./bin/").unwrap(), "bin");
        assert_eq!(safe_path("a..b/..c").unwrap(), "a..b/..c");
        for name in [
            "/etc/passwd",
            "../x",
            "a/../../x",
            "a/..",
            "..",
            "",
            "/",
            "a//b",
            "a\\b",
            "..\\x",
            "a\nb",
            "a\0b",
        ] {
            assert!(safe_path(name).is_err(), "{name:?}");
        }
        assert!(safe_path(&"a/".repeat(MAX_DEPTH + 1)).is_err());
        assert!(safe_path(&"a".repeat(256)).is_err());
        assert!(safe_path(&"a".repeat(MAX_PATH + 1)).is_err());
    }

    #[test]
    fn a_single_folder_around_everything_is_seen() {
        let outer = |names: &[&str]| outer_folder(&names.iter().map(|n| (*n).to_owned()).collect::<Vec<_>>());
        assert_eq!(outer(&["web/", "web/conf/userconfig.xml"]), Some("web".into()));
        assert_eq!(outer(&["conf/userconfig.xml", "bin/start_both"]), None);
        assert_eq!(outer(&["web/conf/userconfig.xml", "other/x"]), None);
        assert_eq!(outer(&["web/conf/userconfig.xml", "webx"]), None);
    }
}
