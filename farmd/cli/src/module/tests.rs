use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;

use zip::write::SimpleFileOptions;
use zip::{ZipArchive, ZipWriter};

use super::*;
use crate::folders::test::{Folder, context};

const CONFIG: &[u8] = b"<safe><service mode=\"farm\"><farm><lan name=\"default\"/></farm></service></safe>\n";

/// One entry of a zip made for a test: name, content, permissions.
type Entry<'a> = (&'a str, &'a [u8], u32);

fn zip(path: &Path, entries: &[Entry<'_>]) {
    let mut zip = ZipWriter::new(File::create(path).unwrap());
    for (name, content, mode) in entries {
        let options = SimpleFileOptions::default().unix_permissions(*mode);
        if let Some(folder) = name.strip_suffix('/') {
            zip.add_directory(folder, options).unwrap();
        } else {
            zip.start_file(*name, options).unwrap();
            zip.write_all(content).unwrap();
        }
    }
    zip.finish().unwrap();
}

/// Replaces `from` by `to`, of the same length, in a finished zip: some evil the writer itself refuses to make.
fn patch(path: &Path, from: &[u8], to: &[u8]) {
    assert_eq!(from.len(), to.len());
    let mut bytes = fs::read(path).unwrap();
    let places: Vec<usize> = (0..=bytes.len() - from.len())
        .filter(|at| bytes[*at..].starts_with(from))
        .collect();
    assert!(
        places.len() >= 2,
        "a name stands in the local header and in the directory"
    );
    for at in places {
        bytes[at..at + to.len()].copy_from_slice(to);
    }
    fs::write(path, bytes).unwrap();
}

fn args(path: &Path) -> InstallArgs {
    InstallArgs {
        path: path.to_owned(),
        name: None,
        replace: false,
    }
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o7777
}

/// Everything below `folder`, so that a test sees what an attack would have left.
fn everything(folder: &Path) -> Vec<String> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        found.push(path.display().to_string());
        if path.is_dir() && !path.is_symlink() {
            found.extend(everything(&path));
        }
    }
    found.sort();
    found
}

#[test]
fn a_safe_file_becomes_a_module_with_modes_of_our_choice() {
    let folder = Folder::new("install");
    let context = context(&folder);
    let safe = folder.0.join("web.safe");
    zip(
        &safe,
        &[
            ("conf/", b"", 0o777),
            ("conf/userconfig.xml", CONFIG, 0o666),
            ("bin/start_both", b"#!/bin/sh\n", 0o600),
            ("tools/run", b"x", 0o6755),
        ],
    );
    assert_eq!(install(&context, &args(&safe)).unwrap(), exit::OK);
    let web = context.modules().join("web");
    assert_eq!(fs::read(web.join(USERCONFIG)).unwrap(), CONFIG);
    assert_eq!(mode(&web.join(USERCONFIG)), 0o644);
    assert_eq!(
        mode(&web.join("bin/start_both")),
        0o755,
        "scripts may always be executed"
    );
    assert_eq!(mode(&web.join("tools/run")), 0o755, "set-uid is not taken over");
    assert_eq!(mode(&web.join("conf")), 0o755);
    assert_eq!(
        everything(&context.modules()).len(),
        7,
        "nothing is left beside the module"
    );
}

#[test]
fn a_folder_around_everything_is_left_out() {
    let folder = Folder::new("outer");
    let context = context(&folder);
    let safe = folder.0.join("x.safe");
    zip(
        &safe,
        &[
            ("web-1.0/conf/userconfig.xml", CONFIG, 0o644),
            ("web-1.0/bin/prestart", b"", 0o755),
        ],
    );
    install(
        &context,
        &InstallArgs {
            name: Some("web".into()),
            ..args(&safe)
        },
    )
    .unwrap();
    assert!(context.modules().join("web/bin/prestart").is_file());
}

#[test]
fn an_installed_module_is_kept_unless_it_is_to_be_replaced() {
    let folder = Folder::new("replace");
    let context = context(&folder);
    let safe = folder.0.join("web.safe");
    zip(&safe, &[("conf/userconfig.xml", CONFIG, 0o644), ("old", b"", 0o644)]);
    install(&context, &args(&safe)).unwrap();
    zip(&safe, &[("conf/userconfig.xml", CONFIG, 0o644), ("new", b"", 0o644)]);

    assert_eq!(install(&context, &args(&safe)).unwrap_err().code, exit::REFUSED);
    assert!(context.modules().join("web/old").is_file());

    install(
        &context,
        &InstallArgs {
            replace: true,
            ..args(&safe)
        },
    )
    .unwrap();
    assert!(context.modules().join("web/new").is_file() && !context.modules().join("web/old").exists());

    fs::write(&safe, "no zip").unwrap();
    assert_eq!(
        install(
            &context,
            &InstallArgs {
                replace: true,
                ..args(&safe)
            }
        )
        .unwrap_err()
        .code,
        exit::DATA
    );
    assert!(
        context.modules().join("web/new").is_file(),
        "a failed replacement keeps the module"
    );
    assert_eq!(fs::read_dir(context.modules()).unwrap().count(), 1);
}

#[test]
fn evil_zips_leave_nothing_behind() {
    let folder = Folder::new("evil");
    let context = context(&folder);
    let safe = folder.0.join("evil.safe");
    let good: Entry<'_> = ("conf/userconfig.xml", CONFIG, 0o644);
    fs::create_dir_all(context.modules()).unwrap();
    let refused = |expected: &str| {
        let failure = install(&context, &args(&safe)).unwrap_err();
        assert_eq!(failure.code, exit::DATA, "{}", failure.text);
        assert!(
            failure.text.contains(expected),
            "`{expected}` is expected in: {}",
            failure.text
        );
        assert_eq!(
            everything(&folder.0.join("etc")),
            [context.modules().display().to_string()],
            "{expected}"
        );
        assert_eq!(fs::read_dir(&folder.0).unwrap().count(), 2, "{expected}");
    };

    for (evil, expected) in [
        ("../../../escaped", "leads out"),
        ("/tmp_escaped_abs", "is absolute"),
        ("a\\..\\escaped", "backslash"),
    ] {
        let harmless = "z".repeat(evil.len());
        zip(&safe, &[good, (&harmless, b"evil", 0o644)]);
        patch(&safe, harmless.as_bytes(), evil.as_bytes());
        refused(expected);
    }

    let mut writer = ZipWriter::new(File::create(&safe).unwrap());
    writer
        .add_symlink("link", "/etc", SimpleFileOptions::default())
        .unwrap();
    writer.start_file("link/passwd", SimpleFileOptions::default()).unwrap();
    writer
        .start_file("conf/userconfig.xml", SimpleFileOptions::default())
        .unwrap();
    writer.finish().unwrap();
    refused("symbolic link");

    zip(
        &safe,
        &[good, ("bin/startaaaa", b"1", 0o755), ("bin/startbbbb", b"2", 0o755)],
    );
    patch(&safe, b"bin/startbbbb", b"bin/startaaaa");
    refused("twice");

    zip(
        &safe,
        &[good, ("bin", b"a file", 0o644), ("bin/start_both", b"", 0o755)],
    );
    refused("twice");

    zip(&safe, &[("bin/start_both", b"", 0o755)]);
    refused("no conf/userconfig.xml");

    let names: Vec<String> = (0..2_001).map(|n| format!("f{n}")).collect();
    let many: Vec<Entry<'_>> = names.iter().map(|name| (name.as_str(), &b""[..], 0o644)).collect();
    zip(&safe, &many);
    refused("more than 2000");

    let zeros = vec![0_u8; 33 * 1024 * 1024];
    zip(&safe, &[good, ("bomb", &zeros, 0o644)]);
    assert!(fs::metadata(&safe).unwrap().len() < 1024 * 1024);
    refused("32 MiB");
}

#[test]
fn a_folder_with_a_link_is_refused() {
    let folder = Folder::new("folder-link");
    let context = context(&folder);
    let source = folder.0.join("web");
    fs::create_dir_all(source.join("conf")).unwrap();
    fs::write(source.join(USERCONFIG), CONFIG).unwrap();
    install(&context, &args(&source)).unwrap();
    std::os::unix::fs::symlink("/etc/shadow", source.join("conf/secret")).unwrap();
    let failure = install(
        &context,
        &InstallArgs {
            replace: true,
            ..args(&source)
        },
    )
    .unwrap_err();
    assert_eq!(failure.code, exit::DATA);
    assert!(
        failure.text.contains("`conf/secret` is a symbolic link"),
        "{}",
        failure.text
    );
}

#[test]
fn a_package_holds_the_module_and_can_be_installed_again() {
    let folder = Folder::new("package");
    let context = context(&folder);
    let safe = folder.0.join("web.safe");
    zip(
        &safe,
        &[
            ("conf/userconfig.xml", CONFIG, 0o644),
            ("bin/start_both", b"#!/bin/sh\n", 0o755),
        ],
    );
    install(&context, &args(&safe)).unwrap();

    let out = folder.0.join("out.safe");
    let wanted = PackageArgs {
        module: "web".into(),
        out: out.clone(),
        replace: false,
    };
    package(&context, &wanted).unwrap();
    assert_eq!(package(&context, &wanted).unwrap_err().code, exit::REFUSED);

    let mut archive = ZipArchive::new(File::open(&out).unwrap()).unwrap();
    let names: Vec<String> = archive.file_names().map(|name| name.unwrap().into_owned()).collect();
    assert_eq!(names, ["bin/start_both", "conf/userconfig.xml"]);
    let mut script = String::new();
    archive
        .by_name("bin/start_both")
        .unwrap()
        .read_to_string(&mut script)
        .unwrap();
    assert_eq!(script, "#!/bin/sh\n");
    install(
        &context,
        &InstallArgs {
            name: Some("again".into()),
            ..args(&out)
        },
    )
    .unwrap();
    assert_eq!(mode(&context.modules().join("again/bin/start_both")), 0o755);

    let missing = PackageArgs {
        module: "none".into(),
        out,
        replace: true,
    };
    assert_eq!(package(&context, &missing).unwrap_err().code, exit::NOT_FOUND);
}

#[test]
fn an_uninstalled_module_leaves_a_copy_and_a_configured_one_stays_without_a_daemon() {
    let folder = Folder::new("uninstall");
    let context = context(&folder);
    let safe = folder.0.join("web.safe");
    zip(&safe, &[("conf/userconfig.xml", CONFIG, 0o644)]);
    install(&context, &args(&safe)).unwrap();
    let web = ModuleArgs {
        module: Some("web".into()),
    };

    let active = context.active(&"web".parse().unwrap()).join(USERCONFIG);
    fs::create_dir_all(active.parent().unwrap()).unwrap();
    fs::write(&active, CONFIG).unwrap();
    assert_eq!(uninstall(&context, &web).unwrap_err().code, exit::REFUSED);
    assert!(context.modules().join("web").is_dir());

    fs::remove_file(&active).unwrap();
    assert_eq!(uninstall(&context, &web).unwrap(), exit::OK);
    assert!(!context.modules().join("web").exists());
    let backups: Vec<_> = fs::read_dir(context.var.join("backup"))
        .unwrap()
        .map(|e| e.unwrap().path())
        .collect();
    assert_eq!(backups.len(), 1);
    install(
        &context,
        &InstallArgs {
            name: Some("web".into()),
            ..args(&backups[0])
        },
    )
    .unwrap();
    assert_eq!(
        uninstall(
            &context,
            &ModuleArgs {
                module: Some("none".into())
            }
        )
        .unwrap_err()
        .code,
        exit::NOT_FOUND
    );
}

#[test]
fn installed_modules_are_folders_with_a_configuration() {
    let folder = Folder::new("installed");
    let context = context(&folder);
    assert!(installed(&context.modules()).unwrap().is_empty());
    for name in ["web", "db", ".web.install-1"] {
        fs::create_dir_all(context.modules().join(name).join("conf")).unwrap();
        fs::write(context.modules().join(name).join(USERCONFIG), CONFIG).unwrap();
    }
    fs::create_dir_all(context.modules().join("empty")).unwrap();
    let names: Vec<String> = installed(&context.modules())
        .unwrap()
        .into_iter()
        .map(String::from)
        .collect();
    assert_eq!(names, ["db", "web"]);
}
