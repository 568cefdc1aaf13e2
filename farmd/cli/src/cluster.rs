//! `farm cluster`: the key, the state and the configuration of the cluster.

use std::fs::OpenOptions;
use std::io::{self, Read, Write};
use std::net::{IpAddr, UdpSocket};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use farm_core::api::exit;
use farm_core::config;
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
    let shown = path.display();
    let others = others(&context.etc.join("cluster.xml"), is_here);
    let mut text = format!("made {shown} (mode 0600)\nevery node needs the same file; copy it over a safe way:\n");
    for (name, addr) in &others {
        let host = match addr {
            IpAddr::V4(addr) => addr.to_string(),
            IpAddr::V6(addr) => format!("[{addr}]"),
        };
        text.push_str(&format!("  scp -p {shown} root@{host}:{shown}    # {name}\n"));
    }
    if others.is_empty() {
        text.push_str(&format!(
            "  scp -p {shown} root@NODE:{shown}    # for each other node of cluster.xml\n"
        ));
    }
    text.push_str("and on each node that runs: farm reload    # until all have it, nodes of both keys may serve\n");
    show(&text)?;
    Ok(exit::OK)
}

/// The nodes of `cluster.xml` that are not this host, with their addresses on the first lan. None if the file is missing or
/// wrong: the key does not need it.
fn others(path: &Path, is_here: impl Fn(IpAddr) -> bool) -> Vec<(String, IpAddr)> {
    let Ok(text) = std::fs::read_to_string(path) else {
        return Vec::new();
    };
    let Ok((cluster, _)) = config::cluster::parse(&path.to_string_lossy(), &text) else {
        return Vec::new();
    };
    let nodes = cluster.lans.first().map_or(&[][..], |lan| &lan.nodes).iter();
    nodes
        .filter(|(_, addr)| !is_here(*addr))
        .map(|(node, addr)| (cluster.name(*node).to_owned(), *addr))
        .collect()
}

/// True if `addr` is an address of this host: no other can be bound.
fn is_here(addr: IpAddr) -> bool {
    UdpSocket::bind((addr, 0)).is_ok()
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
    fn the_other_nodes_are_those_whose_addresses_are_not_of_this_host() {
        let folder = Folder::new("genkey-others");
        let path = folder.0.join("cluster.xml");
        let is_s1 = |addr: IpAddr| addr.to_string() == "198.18.77.1";
        assert_eq!(others(&path, is_s1), [], "without the file nobody can be named");
        let node = |name: &str, addr: &str| format!("<node name=\"{name}\" addr=\"{addr}\"/>");
        let nodes = [
            node("s1", "198.18.77.1"),
            node("s2", "198.18.77.2"),
            node("s3", "198.18.77.3"),
        ];
        std::fs::write(
            &path,
            format!(
                "<cluster><lans><lan name=\"default\">{}</lan></lans></cluster>",
                nodes.concat()
            ),
        )
        .unwrap();
        let expected = [("s2", "198.18.77.2"), ("s3", "198.18.77.3")];
        let expected: Vec<(String, IpAddr)> = expected
            .iter()
            .map(|(n, a)| ((*n).to_owned(), a.parse().unwrap()))
            .collect();
        assert_eq!(others(&path, is_s1), expected);
        std::fs::write(&path, "<cluster>").unwrap();
        assert_eq!(others(&path, is_s1), []);
        assert!(is_here("127.0.0.1".parse().unwrap()) && !is_here("198.18.77.2".parse().unwrap()));
    }

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
