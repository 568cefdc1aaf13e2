//! How a command ends when it does not do what was asked: one text, one exit code.
//!
//! Every verb returns [`Failure`]; `main` prints it once, as one line on standard error, and with `--json` also as an
//! object on standard output. The code is always one of [`farm_core::api::exit`].

use std::io;
use std::path::Path;

use farm_core::api::exit;
use serde_json::{Map, Value};

/// Why a command did not do what was asked.
#[derive(Debug)]
pub struct Failure {
    /// Exit code, of [`farm_core::api::exit`].
    pub code: u8,
    /// What failed on what, for a person; empty if the command has already shown it.
    pub text: String,
    /// Further fields of the JSON object.
    pub fields: Map<String, Value>,
    /// The reader of standard output went away: nobody is left to tell.
    pub silent: bool,
}

impl Failure {
    /// A failure that ends with `code` and shows `text`.
    pub fn new(code: u8, text: impl Into<String>) -> Self {
        Self {
            code,
            text: text.into(),
            fields: Map::new(),
            silent: false,
        }
    }

    /// Wrong words on the command line.
    pub fn usage(text: impl Into<String>) -> Self {
        Self::new(exit::USAGE, text)
    }

    /// A file or folder could not be `done` (read, written, …).
    pub fn file(done: &str, path: &Path, error: &io::Error) -> Self {
        let code = match error.kind() {
            io::ErrorKind::PermissionDenied => exit::DENIED,
            _ => exit::IO,
        };
        Self::new(code, format!("{} cannot be {done}: {error}", path.display()))
    }

    /// Adds a field to the JSON object.
    pub fn with(mut self, name: &str, value: impl Into<Value>) -> Self {
        self.fields.insert(name.to_owned(), value.into());
        self
    }

    /// The object that `--json` shows.
    pub fn to_json(&self) -> Value {
        let mut object = self.fields.clone();
        object.insert("error".to_owned(), self.text.clone().into());
        object.insert("code".to_owned(), self.code.into());
        Value::Object(object)
    }
}

/// Writing to standard output failed.
impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        if error.kind() == io::ErrorKind::BrokenPipe {
            Self {
                silent: true,
                ..Self::new(exit::OK, "")
            }
        } else {
            Self::new(exit::IO, format!("standard output cannot be written: {error}"))
        }
    }
}
