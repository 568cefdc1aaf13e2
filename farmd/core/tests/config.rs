//! The configuration cases of `tests/config`: every file of `valid/` is accepted, every file of `invalid/` refused, and
//! what is said about each is word for word what the `.expect` beside it says.
//!
//! Files called `cluster…` are cluster files; the others are module files, read against `tests/config/cluster.xml` and
//! the environment of [`environment`]. With `FARM_BLESS=1` the `.expect` files are written instead of compared; read
//! the difference before it is committed.

#![allow(clippy::unwrap_used, reason = "a test; what goes wrong ends it")]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use farm_core::config::diag::{Diagnostic, Diagnostics};
use farm_core::config::{ClusterConfig, cluster, module};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

fn environment() -> BTreeMap<String, String> {
    let pairs = [
        ("FARM_SAMPLE", "from the environment"),
        ("FARM_SAMPLE_TEXT", "not an address"),
        ("FARM_BOTH", "environment"),
    ];
    pairs.map(|(name, value)| (name.to_owned(), value.to_owned())).into()
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn reference_cluster() -> ClusterConfig {
    let text = read(&root().join("tests/config/cluster.xml"));
    let (config, warnings) = cluster::parse("cluster.xml", &text).unwrap();
    assert_eq!(warnings, [], "the reference cluster has warnings");
    config
}

/// Whether the file is accepted, and what is said about it.
fn judge(name: &str, text: &str, cluster: &ClusterConfig) -> (bool, Vec<Diagnostic>) {
    let outcome = if name.starts_with("cluster") {
        cluster::parse(name, text).map(|(_, warnings)| warnings)
    } else {
        module::parse(name, text, &environment(), Some(cluster)).map(|(_, warnings)| warnings)
    };
    match outcome {
        Ok(warnings) => {
            assert!(
                warnings.iter().all(|d| !d.is_error()),
                "{name}: an error beside a configuration"
            );
            (true, warnings)
        }
        Err(found) => {
            assert!(
                found.iter().any(Diagnostic::is_error),
                "{name}: refused without an error"
            );
            (false, found)
        }
    }
}

/// Runs all cases of one folder and returns their number.
fn run(folder: &str, accepted: bool) -> usize {
    let cluster = reference_cluster();
    let bless = std::env::var_os("FARM_BLESS").is_some_and(|value| value == "1");
    let folder = root().join("tests/config").join(folder);
    let entries = fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path());
    let mut cases: Vec<PathBuf> = entries
        .filter(|path| path.extension().is_some_and(|e| e == "xml"))
        .collect();
    cases.sort();
    let mut wrong = Vec::new();
    for path in &cases {
        let name = path.file_name().unwrap().to_str().unwrap();
        let text = read(path);
        let (ok, found) = judge(name, &text, &cluster);
        if ok != accepted {
            wrong.push(format!("{name}: {}", if ok { "accepted" } else { "refused" }));
        }
        let said = Diagnostics(found).render(&text);
        let golden = path.with_extension("expect");
        if bless {
            if said.is_empty() {
                let _ = fs::remove_file(&golden);
            } else {
                fs::write(&golden, &said).unwrap();
            }
        }
        let expected = fs::read_to_string(&golden).unwrap_or_default();
        if said != expected {
            wrong.push(format!("{name}: expected\n{expected}\n--- but it said\n{said}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n\n"));
    cases.len()
}

#[test]
fn every_valid_case_is_accepted_with_the_expected_warnings() {
    assert!(run("valid", true) >= 10);
}

#[test]
fn every_invalid_case_is_refused_with_the_expected_words() {
    assert!(run("invalid", false) >= 40);
}

#[test]
fn the_shipped_samples_are_accepted_without_a_warning() {
    let conf = root().join("conf");
    let (cluster, warnings) = cluster::parse("cluster.xml", &read(&conf.join("cluster.xml"))).unwrap();
    assert_eq!(warnings, []);
    let text = read(&conf.join("userconfig.xml"));
    let parsed = module::parse("userconfig.xml", &text, &BTreeMap::new(), Some(&cluster));
    let (config, warnings) = parsed.unwrap_or_else(|found| panic!("{}", Diagnostics(found).render(&text)));
    assert_eq!(warnings, []);
    assert!(config.vip.is_some() && config.user.is_some() && !config.tcp_checkers.is_empty());
}

#[test]
fn the_schema_for_editors_has_every_word_the_cases_use() {
    let schema = read(&root().join("conf/userconfig.xsd"));
    let folder = root().join("tests/config/valid");
    let cases = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let modules = cases.filter(|path| {
        path.file_name()
            .is_some_and(|name| name.to_string_lossy().starts_with("module"))
    });
    let files = modules.filter(|path| path.extension().is_some_and(|e| e == "xml"));
    let mut absent = Vec::new();
    for path in files.chain([root().join("conf/userconfig.xml")]) {
        for word in words(&read(&path)) {
            if !schema.contains(&format!("name=\"{word}\"")) {
                absent.push(format!("{word} of {}", path.display()));
            }
        }
    }
    assert!(absent.is_empty(), "{absent:?}");
}

/// Names of elements and attributes in `text`, outside comments, declarations and CDATA.
fn words(text: &str) -> Vec<String> {
    let mut found = Vec::new();
    let mut rest = text;
    while let Some(at) = rest.find('<') {
        rest = &rest[at..];
        let close = if rest.starts_with("<!--") { "-->" } else { ">" };
        let (tag, after) = rest.split_once(close).unwrap();
        rest = after;
        if tag.starts_with("<!") || tag.starts_with("<?") || tag.starts_with("</") {
            continue;
        }
        let name: String = tag[1..]
            .chars()
            .take_while(|c| c.is_alphanumeric() || *c == '_')
            .collect();
        found.push(name);
        // Outside of quotes, what comes before `=` is an attribute.
        let outside: String = tag.split('"').step_by(2).collect::<Vec<_>>().join(" ");
        found.extend(
            outside
                .split_whitespace()
                .filter_map(|word| Some(word.strip_suffix('=')?.to_owned())),
        );
    }
    found
}
