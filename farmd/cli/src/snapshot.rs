//! `farm snapshot`: one zip with everything that support needs to understand a node, and no secrets.
//!
//! Reads files, `/proc`, the journal and, if farmd answers, farmd; changes nothing but the zip. What is asked of a dead daemon is replaced
//! by a note. Entries are in the order of their names, and the amount is limited, so that two snapshots can be compared
//! and sent.

mod bundle;
mod daemonlog;
mod mask;
mod system;

use std::collections::BTreeSet;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use farm_core::api::{API_VERSION, exit};
use farm_core::id::ModuleName;
use serde_json::{Value, json};
use zip::write::SimpleFileOptions;

use crate::args::SnapshotArgs;
use crate::client::{Client, ClientError};
use crate::failure::Failure;
use crate::folders::Context;
use crate::module::installed;
use crate::module::pack::{PackError, write_zip};
use crate::snapshot::bundle::{Bundle, read_end};
use crate::snapshot::mask::Secrets;
use crate::terminal::{show, show_json};

/// Files of script output taken per module, newest first.
const USERLOGS: usize = 20;
/// The variables a copy was accepted with, beside its folders.
const ENVIRONMENT: &str = "environment.json";

/// Runs `farm snapshot`.
pub fn run(context: &Context, args: &SnapshotArgs) -> Result<u8, Failure> {
    let progress = |text: &str| {
        if context.json {
            Ok(())
        } else {
            show(&format!("  {text}\n"))
        }
    };
    may_write(&args.out, args.replace)?;
    let mut bundle = Bundle::new(secrets(context)?);
    progress("configuration and modules")?;
    files(context, &mut bundle)?;
    progress("the daemon's answers")?;
    let node = daemon(context, &mut bundle)?;
    let answered = node.is_some();
    if !answered {
        progress("farmd does not answer; its part is left out")?;
    }
    daemonlog::collect(&mut bundle);
    progress("the system")?;
    system::collect(&mut bundle);
    bundle.add_text("about.txt", &about(context, node.as_deref()));
    let (entries, notes) = bundle.finish();
    write_zip(&args.out, args.replace, 0o600, |zip| {
        for (name, content) in &entries {
            let options = SimpleFileOptions::default().unix_permissions(0o644);
            let unwritten = |text: String| PackError::Zip {
                path: args.out.clone(),
                text,
            };
            zip.start_file(format!("snapshot/{name}"), options)
                .map_err(|e| unwritten(e.to_string()))?;
            zip.write_all(content).map_err(|e| unwritten(e.to_string()))?;
        }
        Ok(())
    })?;
    if context.json {
        let out = args.out.display().to_string();
        show_json(&json!({ "file": out, "entries": entries.len(), "daemon": answered, "notes": notes }))?;
    } else {
        show(&format!(
            "wrote {}, {} entries; keys and the values of secret variables are left out\n",
            args.out.display(),
            entries.len()
        ))?;
    }
    Ok(exit::OK)
}

/// Every module that is installed or was ever configured here.
fn modules(context: &Context) -> Result<BTreeSet<ModuleName>, Failure> {
    let mut names = installed(&context.modules())?;
    let kept = fs::read_dir(context.var.join("modules"))
        .into_iter()
        .flatten()
        .flatten();
    names.extend(kept.filter_map(|entry| entry.file_name().to_str()?.parse().ok()));
    Ok(names)
}

/// What must not be in the zip: the key, and what the modules' files call a secret.
fn secrets(context: &Context) -> Result<Secrets, Failure> {
    let mut secrets = Secrets::default();
    secrets.add(text_of(&context.etc.join("cluster.key")).trim());
    for name in modules(context)? {
        let mut copies = vec![context.editable(&name)];
        copies.extend(copies_of(context, &name).into_iter().map(|(_, folder)| folder));
        for copy in copies {
            let conf = copy.join("conf");
            for file in names(&conf) {
                secrets.add_declared(&text_of(&conf.join(file)));
            }
            // One that cannot be understood is left out of the zip, so it needs no masking.
            let _ = secrets.add_environment(&text_of(&copy.join(ENVIRONMENT)));
        }
    }
    Ok(secrets)
}

/// The accepted copies of a module, oldest first, with their names.
fn copies_of(context: &Context, module: &ModuleName) -> Vec<(String, PathBuf)> {
    let kept = context.kept(module);
    let copies = names(&kept).into_iter().filter(|name| name.starts_with("config_"));
    copies.map(|name| (name.clone(), kept.join(name))).collect()
}

/// The text of a plain file, as much of it as a snapshot takes; empty if there is none.
fn text_of(path: &Path) -> String {
    let content = read_end(path).ok().flatten().map(|(content, _)| content);
    String::from_utf8_lossy(&content.unwrap_or_default()).into_owned()
}

fn files(context: &Context, bundle: &mut Bundle) -> Result<(), Failure> {
    bundle.add_file("etc/cluster.xml", &context.etc.join("cluster.xml"));
    for name in modules(context)? {
        for part in ["conf", "bin"] {
            bundle.add_folder(
                &format!("etc/modules/{name}/{part}"),
                &context.editable(&name).join(part),
            );
        }
        kept_files(context, &name, bundle);
    }
    for (place, folder) in [("var", &context.var), ("run", &context.run)] {
        for name in names(folder) {
            let log = name.starts_with("audit.log") || name.starts_with("history.jsonl");
            if log || name.ends_with(".json") || name.ends_with(".pid") {
                bundle.add_file(&format!("{place}/{name}"), &folder.join(&name));
            }
        }
    }
    Ok(())
}

/// What the daemon keeps of a module: the accepted copies and which one is in force, the log, the newest script output.
fn kept_files(context: &Context, module: &ModuleName, bundle: &mut Bundle) {
    let (place, kept) = (format!("var/modules/{module}"), context.kept(module));
    if let Ok(target) = fs::read_link(context.active(module)) {
        bundle.add_text(&format!("{place}/active.txt"), &format!("{}\n", target.display()));
    }
    for (copy, folder) in copies_of(context, module) {
        for part in ["conf", "bin"] {
            bundle.add_folder(&format!("{place}/{copy}/{part}"), &folder.join(part));
        }
        let name = format!("{place}/{copy}/{ENVIRONMENT}");
        match Secrets::default().add_environment(&text_of(&folder.join(ENVIRONMENT))) {
            Ok(masked) => bundle.add_text(&name, &masked),
            Err(e) => bundle.note(&name, &format!("is left out, its secrets cannot be told: {e}")),
        }
    }
    let mut logs = names(&kept);
    // Names of script output begin with the time: the last ones are the newest.
    let outputs: Vec<String> = logs.iter().filter(|name| name.ends_with(".ulog")).cloned().collect();
    let old: BTreeSet<&String> = outputs.iter().rev().skip(USERLOGS).collect();
    logs.retain(|log| log.starts_with("module.log") || (log.ends_with(".ulog") && !old.contains(log)));
    for log in logs {
        bundle.add_file(&format!("{place}/{log}"), &kept.join(&log));
    }
}

/// Names in `folder`, sorted; none if it cannot be read.
fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let mut names: Vec<String> = entries
        .filter_map(|entry| entry.file_name().into_string().ok())
        .collect();
    names.sort();
    names
}

/// Says before anything is collected that the file cannot be made.
fn may_write(out: &Path, replace: bool) -> Result<(), Failure> {
    let shown = out.display();
    if out.is_dir() {
        let text = format!("{shown} is a folder; the name of a file is expected, such as {shown}/farm.zip");
        return Err(Failure::usage(text));
    }
    if !replace && out.symlink_metadata().is_ok() {
        return Err(PackError::Exists { path: out.to_owned() }.into());
    }
    match out
        .parent()
        .filter(|folder| !folder.as_os_str().is_empty() && !folder.is_dir())
    {
        Some(folder) => Err(Failure::new(
            exit::NOT_FOUND,
            format!("there is no folder {} for {shown}", folder.display()),
        )),
        None => Ok(()),
    }
}

/// What the daemon says of itself. Returns the name of its node if it said anything.
fn daemon(context: &Context, bundle: &mut Bundle) -> Result<Option<String>, Failure> {
    let client = Client::new(context)?;
    let mut answered = None;
    for question in ["cluster", "map", "metrics", "plan", "status"] {
        match client.get::<Value>(&format!("/v1/{question}")) {
            Ok(answer) => {
                let node = answer["node"].as_str().map(str::to_owned);
                answered = answered.or(node).or_else(|| Some("?".to_owned()));
                let text = serde_json::to_string_pretty(&answer).unwrap_or_default();
                bundle.add_text(&format!("daemon/{question}.json"), &text);
            }
            Err(error) => {
                bundle.add_text(&format!("daemon/{question}.txt"), &format!("{error}\n"));
                // One that is dead or hangs is not asked, and waited for, once more.
                if !matches!(error, ClientError::Refused { .. }) {
                    return Ok(answered);
                }
            }
        }
    }
    Ok(answered)
}

fn about(context: &Context, node: Option<&str>) -> String {
    let now = chrono::Local::now();
    let hostname = fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    format!(
        "farm {}\ninterface version {API_VERSION}\nnode {}\nhost {}\ntime {}\nseconds since 1970 {}\netc {}\nvar {}\nrun {}\n",
        env!("CARGO_PKG_VERSION"),
        node.unwrap_or("unknown: farmd does not answer"),
        hostname.trim_end(),
        now.format("%Y-%m-%d %H:%M:%S %:z"),
        now.timestamp(),
        context.etc.display(),
        context.var.display(),
        context.run.display(),
    )
}

#[cfg(test)]
mod tests;
