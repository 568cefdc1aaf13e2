use std::fs::File;
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;

use zip::ZipArchive;

use super::*;
use crate::folders::test::{Folder, context};

const SECRET: &str = "correct-horse";
const KEY: &str = "00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff";

fn write(path: PathBuf, content: &str) {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, content).unwrap();
}

/// A node that was used, without a daemon.
fn node(test: &str) -> (Folder, Context) {
    let folder = Folder::new(test);
    let context = context(&folder);
    write(context.etc.join("cluster.xml"), "<cluster/>");
    write(context.etc.join("cluster.key"), KEY);
    let config = format!("<safe><macro name=\"DB_PASS\" value=\"{SECRET}\"/></safe>");
    write(context.etc.join("modules/web/conf/userconfig.xml"), &config);
    write(context.etc.join("modules/web/conf/tls.key"), "private");
    write(context.etc.join("modules/web/bin/start_both"), "#!/bin/sh\n");
    let copy = context.var.join("modules/web/config_2026_11_21T053100");
    write(copy.join("conf/userconfig.xml"), &config);
    write(
        copy.join("conf/safeconf.xml"),
        "<safe><var name=\"API_KEY\" value=\"expanded-value\"/></safe>",
    );
    write(
        copy.join("environment.json"),
        r#"{"FROM_ENV":"expanded-value","GIT_TOKEN":"abc","HOME":"/root"}"#,
    );
    std::os::unix::fs::symlink("config_2026_11_21T053100", context.var.join("modules/web/active")).unwrap();
    write(
        context.var.join("modules/web/module.log"),
        &format!("started with {SECRET} and {KEY}\n"),
    );
    for n in 0..USERLOGS + 5 {
        write(
            context
                .var
                .join(format!("modules/web/userlog_2026_11_21T05{n:04}_start_both.ulog")),
            "output\n",
        );
    }
    write(context.var.join("audit.log"), "start web\n");
    write(context.var.join("history.jsonl"), "{}\n");
    write(context.var.join("host-state.json"), "{}");
    std::os::unix::fs::symlink("/etc/passwd", context.etc.join("modules/web/conf/link")).unwrap();
    (folder, context)
}

fn contents(path: &Path) -> Vec<(String, Vec<u8>)> {
    let mut archive = ZipArchive::new(File::open(path).unwrap()).unwrap();
    (0..archive.len())
        .map(|index| {
            let mut entry = archive.by_index(index).unwrap();
            let mut content = Vec::new();
            entry.read_to_end(&mut content).unwrap();
            (entry.name().unwrap().into_owned(), content)
        })
        .collect()
}

#[test]
fn a_snapshot_of_a_dead_node_has_everything_but_secrets() {
    let (folder, context) = node("snapshot");
    let args = SnapshotArgs {
        out: folder.0.join("out.zip"),
        replace: false,
    };
    assert_eq!(run(&context, &args).unwrap(), exit::OK);
    assert_eq!(fs::metadata(&args.out).unwrap().permissions().mode() & 0o777, 0o600);

    let entries = contents(&args.out);
    let names: Vec<&str> = entries.iter().map(|(name, _)| name.as_str()).collect();
    let mut sorted = names.clone();
    sorted.sort_unstable();
    assert_eq!(names, sorted);
    for name in [
        "snapshot/about.txt",
        "snapshot/daemon/cluster.txt",
        "snapshot/etc/cluster.xml",
        "snapshot/etc/modules/web/bin/start_both",
        "snapshot/etc/modules/web/conf/userconfig.xml",
        "snapshot/system/net/dev",
        "snapshot/system/os-release",
        "snapshot/system/sysctl.txt",
        "snapshot/system/version",
        "snapshot/var/audit.log",
        "snapshot/var/history.jsonl",
        "snapshot/var/host-state.json",
        "snapshot/var/modules/web/active.txt",
        "snapshot/var/modules/web/config_2026_11_21T053100/conf/userconfig.xml",
        "snapshot/var/modules/web/config_2026_11_21T053100/environment.json",
        "snapshot/var/modules/web/module.log",
    ] {
        assert!(names.contains(&name), "{name} is missing in {names:?}");
    }
    assert!(
        !names
            .iter()
            .any(|name| name.ends_with(".key") || name.ends_with("/link")),
        "{names:?}"
    );
    assert_eq!(names.iter().filter(|name| name.ends_with(".ulog")).count(), USERLOGS);
    assert!(!names.iter().any(|name| name.contains("T050004_")) && names.iter().any(|name| name.contains("T050005_")));

    for (name, content) in &entries {
        let text = String::from_utf8_lossy(content);
        assert!(
            !text.contains(SECRET)
                && !text.contains(KEY)
                && !text.contains("private")
                && !text.contains("expanded-value"),
            "{name} tells a secret"
        );
    }
    let (_, environment) = entries
        .iter()
        .find(|(name, _)| name.ends_with("environment.json"))
        .unwrap();
    let environment: Value = serde_json::from_slice(environment).unwrap();
    assert_eq!(
        environment,
        json!({ "FROM_ENV": "***", "GIT_TOKEN": "***", "HOME": "/root" })
    );
    let (_, log) = entries.iter().find(|(name, _)| name.ends_with("module.log")).unwrap();
    assert_eq!(log, b"started with *** and ***\n");
    let (_, notes) = entries.iter().find(|(name, _)| name.ends_with("notes.txt")).unwrap();
    assert!(String::from_utf8_lossy(notes).contains("conf/link: is no plain file"));
}

#[test]
fn a_snapshot_is_not_overwritten_unless_it_is_to_be_replaced() {
    let (folder, context) = node("snapshot-again");
    let args = SnapshotArgs {
        out: folder.0.join("out.zip"),
        replace: false,
    };
    write(args.out.clone(), "precious");
    assert_eq!(run(&context, &args).unwrap_err().code, exit::REFUSED);
    assert_eq!(fs::read_to_string(&args.out).unwrap(), "precious");
    let elsewhere = |out: PathBuf| {
        let args = SnapshotArgs { out, replace: true };
        run(&context, &args).unwrap_err()
    };
    let of_folder = elsewhere(folder.0.clone());
    assert_eq!(of_folder.code, exit::USAGE);
    assert!(of_folder.text.contains("is a folder"), "{}", of_folder.text);
    assert_eq!(elsewhere(folder.0.join("missing/out.zip")).code, exit::NOT_FOUND);
    assert_eq!(
        run(&context, &SnapshotArgs { replace: true, ..args }).unwrap(),
        exit::OK
    );
    let entries = contents(&folder.0.join("out.zip"));
    let (_, about) = entries.iter().find(|(name, _)| name.ends_with("about.txt")).unwrap();
    let about = String::from_utf8_lossy(about);
    assert!(about.contains("node unknown") && about.contains("\ntime 20"), "{about}");
}

#[test]
fn a_long_log_is_cut_at_its_beginning() {
    let (folder, context) = node("snapshot-long");
    let mut log = "old\n".repeat(2 * 1024 * 1024);
    log.push_str("newest\n");
    write(context.var.join("modules/web/module.log"), &log);
    let args = SnapshotArgs {
        out: folder.0.join("out.zip"),
        replace: false,
    };
    run(&context, &args).unwrap();
    let entries = contents(&args.out);
    let (_, kept) = entries.iter().find(|(name, _)| name.ends_with("module.log")).unwrap();
    assert_eq!(kept.len(), 4 * 1024 * 1024);
    assert!(kept.ends_with(b"newest\n"));
}
