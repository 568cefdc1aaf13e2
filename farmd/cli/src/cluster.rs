//! `farm cluster`: the key, the state and the configuration of the cluster.

use std::fs::OpenOptions;
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use farm_core::api::exit;
use serde_json::json;

use crate::args::{ClusterVerb, ConfcheckArgs};
use crate::client::Client;
use crate::confcheck;
use crate::failure::Failure;
use crate::folders::{Context, beside};
use crate::status::view;
use crate::terminal::{Style, show, show_json};

/// Bytes of the key; HMAC-SHA-256 gains nothing from more.
const KEY_BYTES: usize = 32;

/// Runs `farm cluster …`.
pub fn run(context: &Context, verb: &ClusterVerb) -> Result<u8, Failure> {
    match verb {
        ClusterVerb::Genkey { force } => genkey(context, *force),
        ClusterVerb::State => state(context),
        ClusterVerb::Confcheck { file } => {
            let file = file.clone().unwrap_or_else(|| context.etc.join("cluster.xml"));
            confcheck::run(
                context,
                &ConfcheckArgs {
                    files: vec![file],
                    cluster: None,
                },
            )
        }
    }
}

fn state(context: &Context) -> Result<u8, Failure> {
    let status = Client::new(context)?.cluster()?;
    if context.json {
        show_json(&status)?;
    } else {
        show(&view::cluster(&status, Style::of_stdout()))?;
    }
    Ok(exit::OK)
}

fn genkey(context: &Context, force: bool) -> Result<u8, Failure> {
    let path = context.etc.join("cluster.key");
    std::fs::create_dir_all(&context.etc).map_err(|e| Failure::file("made", &context.etc, &e))?;
    let random = Path::new("/dev/urandom");
    let key = new_key(random).map_err(|e| Failure::file("read", random, &e))?;
    if let Err(error) = write_key(&path, &key, force) {
        if error.kind() == io::ErrorKind::AlreadyExists {
            let text = format!(
                "{} exists and is kept; --force replaces it, and then every node needs the new one",
                path.display()
            );
            return Err(Failure::new(exit::REFUSED, text));
        }
        return Err(Failure::file("written", &path, &error));
    }
    if context.json {
        show_json(&json!({ "key": path.display().to_string() }))?;
        return Ok(exit::OK);
    }
    let path = path.display();
    show(&format!(
        "made {path} (mode 0600)\n\
         every node needs the same file; copy it over a safe way, for example to s2:\n  \
         scp -p {path} root@s2:{path}\n\
         and restart farmd on nodes that run: systemctl restart farmd\n"
    ))?;
    Ok(exit::OK)
}

/// A fresh key as hexadecimal digits.
fn new_key(random: &Path) -> io::Result<String> {
    let mut bytes = [0_u8; KEY_BYTES];
    std::fs::File::open(random)?.read_exact(&mut bytes)?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

/// Writes the key whole or not at all, readable by its owner only from the first moment.
///
/// # Errors
/// `AlreadyExists` if `path` exists and is not to be replaced, else what the system says.
fn write_key(path: &Path, key: &str, replace: bool) -> io::Result<()> {
    let fresh = beside(path, "new");
    let written = (|| {
        let mut file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&fresh)?;
        file.write_all(key.as_bytes())?;
        file.write_all(b"\n")?;
        file.sync_all()?;
        // A hard link, unlike a rename, fails if the name is taken.
        if replace {
            std::fs::rename(&fresh, path)
        } else {
            std::fs::hard_link(&fresh, path)
        }
    })();
    match std::fs::remove_file(&fresh) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => written.and(Err(e)),
        _ => written,
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::folders::test::{Folder, context};

    #[test]
    fn a_key_is_made_once_and_replaced_only_by_force() {
        let folder = Folder::new("genkey");
        let context = context(&folder);
        let path = context.etc.join("cluster.key");
        assert_eq!(genkey(&context, false).unwrap(), exit::OK);
        let first = std::fs::read_to_string(&path).unwrap();
        assert_eq!(first.trim_end().len(), 2 * KEY_BYTES);
        assert!(first.trim_end().chars().all(|c| c.is_ascii_hexdigit()));
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);

        let refused = genkey(&context, false).unwrap_err();
        assert_eq!(refused.code, exit::REFUSED);
        assert!(!refused.text.contains(first.trim_end()));
        assert_eq!(std::fs::read_to_string(&path).unwrap(), first);

        genkey(&context, true).unwrap();
        let second = std::fs::read_to_string(&path).unwrap();
        assert_ne!(second, first);
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(
            std::fs::read_dir(&context.etc).unwrap().count(),
            1,
            "nothing is left beside the key"
        );
    }
}
