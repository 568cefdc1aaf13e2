//! The content of a snapshot while it is collected: masked, limited, and in the order of names.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom};
use std::path::Path;

use crate::snapshot::mask::Secrets;

/// Most that is taken of one file; of a longer one the end, where the newest of a log is.
const MAX_FILE: u64 = 4 * 1024 * 1024;
/// Most that is taken in all, before compression.
const MAX_TOTAL: usize = 64 * 1024 * 1024;
/// Most files taken from one folder, its subfolders included.
const MAX_FILES: usize = 2_000;

/// Entries by name.
pub struct Bundle {
    secrets: Secrets,
    entries: BTreeMap<String, Vec<u8>>,
    notes: Vec<String>,
    total: usize,
}

impl Bundle {
    /// An empty bundle from which `secrets` are kept out.
    pub fn new(secrets: Secrets) -> Self {
        Self {
            secrets,
            entries: BTreeMap::new(),
            notes: Vec::new(),
            total: 0,
        }
    }

    /// Adds the file `path`, or a note why it is not there.
    pub fn add_file(&mut self, name: &str, path: &Path) {
        match read_end(path) {
            Ok(Some((content, cut))) => {
                if cut > 0 {
                    self.note(name, &format!("the first {cut} bytes are left out"));
                }
                self.add(name, &content);
            }
            Ok(None) => self.note(name, "is no plain file"),
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) => self.note(name, &format!("cannot be read: {e}")),
        }
    }

    /// Adds every plain file below `folder`, except keys. Links are not followed.
    pub fn add_folder(&mut self, name: &str, folder: &Path) {
        let mut left = MAX_FILES;
        self.add_below(name, folder, &mut left);
    }

    fn add_below(&mut self, name: &str, folder: &Path, left: &mut usize) {
        let entries = match fs::read_dir(folder).and_then(Iterator::collect::<io::Result<Vec<_>>>) {
            Ok(entries) => entries,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return,
            Err(e) => return self.note(name, &format!("cannot be read: {e}")),
        };
        let mut paths: Vec<_> = entries.iter().map(fs::DirEntry::path).collect();
        paths.sort();
        for path in paths {
            let Some(last) = path.file_name().map(|last| last.to_string_lossy().into_owned()) else {
                continue;
            };
            let name = format!("{name}/{last}");
            if *left == 0 {
                return self.note(
                    &name,
                    &format!("and what follows is left out: more than {MAX_FILES} files"),
                );
            }
            *left -= 1;
            if path.symlink_metadata().is_ok_and(|data| data.is_dir()) {
                self.add_below(&name, &path, left);
            } else if path
                .extension()
                .is_some_and(|ending| ending == "key" || ending == "pem")
            {
                self.note(&name, "is a key and left out");
            } else {
                self.add_file(&name, &path);
            }
        }
    }

    /// Adds a text made here.
    pub fn add_text(&mut self, name: &str, text: &str) {
        self.add(name, text.as_bytes());
    }

    /// Adds a line to the notes.
    pub fn note(&mut self, name: &str, text: &str) {
        self.notes.push(format!("{name}: {text}"));
    }

    fn add(&mut self, name: &str, content: &[u8]) {
        if self.total + content.len() > MAX_TOTAL {
            return self.note(
                name,
                &format!("is left out: the snapshot would grow over {} MiB", MAX_TOTAL >> 20),
            );
        }
        let content = self.secrets.mask(content);
        self.total += content.len();
        self.entries.insert(name.to_owned(), content);
    }

    /// The entries, with the notes as one of them, and the notes.
    pub fn finish(mut self) -> (BTreeMap<String, Vec<u8>>, Vec<String>) {
        let mut text = String::from("What is not here as it is on the node:\n");
        text.push_str(
            "keys; values of <var> and <macro> whose names contain PASS, SECRET, TOKEN or KEY (shown as ***)\n",
        );
        for note in &self.notes {
            text.push_str(note);
            text.push('\n');
        }
        self.entries
            .insert("notes.txt".to_owned(), self.secrets.mask(text.as_bytes()));
        (self.entries, self.notes)
    }
}

/// The last [`MAX_FILE`] bytes of `path` and how many come before; `None` if it is no plain file.
pub fn read_end(path: &Path) -> io::Result<Option<(Vec<u8>, u64)>> {
    if !fs::symlink_metadata(path)?.is_file() {
        return Ok(None);
    }
    let mut file = File::open(path)?;
    let cut = file.metadata()?.len().saturating_sub(MAX_FILE);
    if cut > 0 {
        file.seek(SeekFrom::Start(cut))?;
    }
    let mut content = Vec::new();
    // Files of /proc tell no length, and a log may grow meanwhile.
    file.take(MAX_FILE).read_to_end(&mut content)?;
    Ok(Some((content, cut)))
}
