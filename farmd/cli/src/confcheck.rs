//! `farm confcheck`: the same check that the daemon makes, without the daemon.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use farm_core::api::exit;
use farm_core::config::diag::{Diagnostic, Diagnostics};
use farm_core::config::{ClusterConfig, cluster, module};
use serde_json::{Value, json};

use crate::args::ConfcheckArgs;
use crate::failure::Failure;
use crate::folders::Context;
use crate::module::USERCONFIG;
use crate::terminal::{Paint, Style, show, show_json};

/// Nothing longer is read into memory; the parser's own limit is far below and gives the better message.
const MAX_READ: u64 = 16 * 1024 * 1024;

/// One file and what was found in it.
struct Checked {
    file: PathBuf,
    kind: &'static str,
    text: String,
    found: Diagnostics,
}

/// Runs `farm confcheck`. Files that are right are named, so that silence never stands for "not looked at".
pub fn run(context: &Context, args: &ConfcheckArgs) -> Result<u8, Failure> {
    let environment = environment();
    let mut checked = Vec::new();
    let mut cluster = None;
    if let Some(path) = &args.cluster {
        let text = read(path)?;
        let (config, found) = match cluster::parse(&path.display().to_string(), &text) {
            Ok((config, warnings)) => (Some(config), warnings),
            Err(found) => (None, found),
        };
        cluster = config;
        checked.push(Checked {
            file: path.clone(),
            kind: "cluster",
            text,
            found: found.into(),
        });
    }
    for path in &args.files {
        let path = if path.is_dir() {
            path.join(USERCONFIG)
        } else {
            path.clone()
        };
        if args.cluster.as_ref() != Some(&path) {
            checked.push(check(path, &environment, cluster.as_ref())?);
        }
    }
    let errors: usize = checked.iter().map(|checked| checked.found.errors()).sum();
    if context.json {
        show_json(&checked.iter().map(to_json).collect::<Vec<_>>())?;
    } else {
        let style = Style::of_stdout();
        show(
            &checked
                .iter()
                .map(|checked| to_text(checked, style))
                .collect::<Vec<_>>()
                .join("\n"),
        )?;
    }
    Ok(if errors == 0 { exit::OK } else { exit::DATA })
}

/// Number of errors in a `userconfig.xml`; an unreadable file counts as one.
pub fn errors_in(path: &Path) -> usize {
    check(path.to_owned(), &environment(), None).map_or(1, |checked| checked.found.errors())
}

fn check(
    file: PathBuf,
    environment: &BTreeMap<String, String>,
    cluster: Option<&ClusterConfig>,
) -> Result<Checked, Failure> {
    let text = read(&file)?;
    let name = file.display().to_string();
    let (kind, found) = if root_name(&text) == Some("cluster") {
        (
            "cluster",
            cluster::parse(&name, &text).map_or_else(|found| found, |(_, warnings)| warnings),
        )
    } else {
        let result = module::parse(&name, &text, environment, cluster);
        ("module", result.map_or_else(|found| found, |(_, warnings)| warnings))
    };
    Ok(Checked {
        file,
        kind,
        text,
        found: found.into(),
    })
}

/// Environment variables for `%NAME%`; those that are not text cannot be named.
fn environment() -> BTreeMap<String, String> {
    std::env::vars_os()
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
        .collect()
}

fn read(path: &Path) -> Result<String, Failure> {
    let unread = |e: std::io::Error| match e.kind() {
        std::io::ErrorKind::NotFound => Failure::new(exit::NOT_FOUND, format!("there is no {}", path.display())),
        _ => Failure::file("read", path, &e),
    };
    let mut bytes = Vec::new();
    File::open(path)
        .and_then(|file| file.take(MAX_READ + 1).read_to_end(&mut bytes))
        .map_err(unread)?;
    if bytes.len() as u64 > MAX_READ {
        let limit = MAX_READ / (1024 * 1024);
        return Err(Failure::new(
            exit::DATA,
            format!(
                "{} is larger than {limit} MiB, so it is no configuration",
                path.display()
            ),
        ));
    }
    String::from_utf8(bytes).map_err(|e| {
        let at = e.utf8_error().valid_up_to();
        Failure::new(exit::DATA, format!("{} is not UTF-8 at byte {at}", path.display()))
    })
}

/// Name of the first element, past declaration, comments and document type; `None` if there is none.
fn root_name(text: &str) -> Option<&str> {
    let mut rest = text.trim_start_matches('\u{feff}');
    loop {
        rest = rest.trim_start().strip_prefix('<')?;
        let end = match rest {
            _ if rest.starts_with("!--") => "-->",
            _ if rest.starts_with('?') => "?>",
            _ if rest.starts_with('!') => ">",
            _ => {
                let length = rest
                    .find(|c: char| c.is_whitespace() || matches!(c, '/' | '>'))
                    .unwrap_or(rest.len());
                return Some(&rest[..length]);
            }
        };
        rest = &rest[rest.find(end)? + end.len()..];
    }
}

fn to_text(checked: &Checked, style: Style) -> String {
    let (errors, warnings) = (checked.found.errors(), checked.found.warnings());
    let mut text = checked.found.render(&checked.text);
    let (paint, verdict) = match (errors, warnings) {
        (0, 0) => (Paint::Good, "right".to_owned()),
        (0, n) => (Paint::Good, format!("right, with {n} {}", plural(n, "warning"))),
        (n, 0) => (Paint::Bad, format!("{n} {}", plural(n, "error"))),
        (n, m) => (
            Paint::Bad,
            format!("{n} {}, {m} {}", plural(n, "error"), plural(m, "warning")),
        ),
    };
    let kind = checked.kind;
    text.push_str(&format!(
        "{}: {kind} configuration: {}\n",
        checked.file.display(),
        style.paint(paint, &verdict)
    ));
    text
}

fn plural(count: usize, word: &str) -> String {
    if count == 1 {
        word.to_owned()
    } else {
        format!("{word}s")
    }
}

fn to_json(checked: &Checked) -> Value {
    let found: Vec<&Diagnostic> = checked.found.0.iter().collect();
    json!({
        "file": checked.file.display().to_string(),
        "kind": checked.kind,
        "errors": checked.found.errors(),
        "warnings": checked.found.warnings(),
        "found": found,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::folders::test::{Folder, context};

    const CLUSTER: &str = r#"<?xml version="1.0"?>
<!-- two nodes -->
<cluster><lans><lan name="default"><node name="s1" addr="198.18.0.11"/><node name="s2" addr="198.18.0.12"/></lan></lans></cluster>
"#;
    const MODULE: &str = r#"<!DOCTYPE safe>
<safe><service mode="farm"><farm><lan name="LAN"/></farm></service></safe>
"#;

    #[test]
    fn the_root_tells_which_kind_a_file_is() {
        assert_eq!(root_name(CLUSTER), Some("cluster"));
        assert_eq!(root_name(MODULE), Some("safe"));
        assert_eq!(root_name("\u{feff}<cluster/>"), Some("cluster"));
        assert_eq!(root_name("<!-- <cluster> --><safe>"), Some("safe"));
        for text in ["", "cluster", "<!-- open", "<?xml"] {
            assert_eq!(root_name(text), None, "{text}");
        }
    }

    #[test]
    fn names_are_checked_against_the_cluster_and_errors_exit_with_65() {
        let folder = Folder::new("confcheck");
        let context = context(&folder);
        let write = |name: &str, text: &str| {
            let path = folder.0.join(name);
            std::fs::write(&path, text).unwrap();
            path
        };
        let cluster = write("cluster.xml", CLUSTER);
        let good = write("good.xml", &MODULE.replace("LAN", "default"));
        let bad = write("bad.xml", &MODULE.replace("LAN", "defualt"));
        let run = |files: &[&PathBuf], cluster: Option<&PathBuf>| {
            let args = ConfcheckArgs {
                files: files.iter().map(|f| (*f).clone()).collect(),
                cluster: cluster.cloned(),
            };
            run(&context, &args)
        };
        assert_eq!(run(&[&cluster, &good], None).unwrap(), exit::OK);
        assert_eq!(
            run(&[&bad], None).unwrap(),
            exit::OK,
            "without a cluster a name is taken as it is"
        );
        assert_eq!(run(&[&good], Some(&cluster)).unwrap(), exit::OK);
        assert_eq!(run(&[&good, &bad], Some(&cluster)).unwrap(), exit::DATA);
        assert_eq!(
            run(&[&folder.0.join("none.xml")], None).unwrap_err().code,
            exit::NOT_FOUND
        );
    }

    #[test]
    fn a_finding_is_drawn_with_its_line_and_listed_as_json() {
        let folder = Folder::new("confcheck-text");
        let path = folder.0.join("userconfig.xml");
        std::fs::write(&path, "<safe>\n  <service mode=\"frm\"/>\n</safe>\n").unwrap();
        let checked = check(path.clone(), &BTreeMap::new(), None).unwrap();
        let text = to_text(&checked, Style::PLAIN);
        assert!(text.contains(&format!("{}:2:", path.display())), "{text}");
        assert!(
            text.contains("^^^") && text.contains("module configuration: "),
            "{text}"
        );
        let json = to_json(&checked);
        assert_eq!(json["found"][0]["line"], 2);
        assert_eq!(json["found"][0]["severity"], "error");
        assert!(json["errors"].as_u64().unwrap() >= 1);
        assert_eq!(errors_in(&path), checked.found.errors());
    }

    #[test]
    fn bytes_that_are_no_text_are_a_data_error() {
        let folder = Folder::new("confcheck-bytes");
        let path = folder.0.join("x.xml");
        std::fs::write(&path, b"<safe>\xff</safe>").unwrap();
        let failure = read(&path).unwrap_err();
        assert_eq!(failure.code, exit::DATA);
        assert!(failure.text.ends_with("is not UTF-8 at byte 6"), "{}", failure.text);
    }
}
