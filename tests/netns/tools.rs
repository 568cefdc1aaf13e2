//! The command line's tools on a real farm: snapshot, log, status and its exit codes, checks of configuration.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Read;
use std::path::Path;
use std::time::Duration;

use farm_core::api::{API_VERSION, exit};
use farm_lab::process::run_limited;
use farm_lab::{Lab, LabConfig, MODULE, ModuleText, Node};

use crate::common::{changed, configured, farm_of, mentions, on_all, program, start};

/// A key that is easy to find again.
const KEY: &str = "c0ffee00c0ffee01c0ffee02c0ffee03c0ffee04c0ffee05c0ffee06c0ffee07";
/// The value of a variable that is called a secret.
const PASSWORD: &str = "tiger-4711";

fn farm(nodes: usize) -> Lab {
    let config = LabConfig {
        key: Some(KEY.to_owned()),
        ..farm_of(nodes)
    };
    configured(config, |_, module| {
        let secret = format!("><var name=\"DB_PASSWORD\" value=\"{PASSWORD}\"/></user>\n  </service>");
        let userconfig = changed(&module.userconfig, "/>\n  </service>", &secret);
        ModuleText { userconfig, ..module }
    })
}

/// Makes a snapshot on `node` and reads it.
fn snapshot(lab: &Lab, node: &Node, name: &str) -> BTreeMap<String, Vec<u8>> {
    let path = lab.base().join(name);
    let made = node.farm_ok(&["snapshot", &path.display().to_string()]);
    mentions(&made.expect("a snapshot"), &["wrote"]);
    let mut zip = zip::ZipArchive::new(File::open(&path).expect("the file")).expect("it is a zip");
    let mut entries = BTreeMap::new();
    for index in 0..zip.len() {
        let mut entry = zip.by_index(index).expect("an entry");
        let mut content = Vec::new();
        entry.read_to_end(&mut content).expect("its content");
        entries.insert(entry.name().expect("a name").into_owned(), content);
    }
    entries
}

fn has(entries: &BTreeMap<String, Vec<u8>>, parts: &[&str]) {
    for part in parts {
        let found = entries.get(&format!("snapshot/{part}"));
        let names: Vec<&String> = entries.keys().collect();
        assert!(
            found.is_some_and(|content| !content.is_empty()),
            "{part} is not in {names:?}"
        );
    }
}

fn holds_no_secret(entries: &BTreeMap<String, Vec<u8>>) {
    let key: Vec<u8> = (0..KEY.len())
        .step_by(2)
        .map(|at| u8::from_str_radix(&KEY[at..at + 2], 16).expect("hexadecimal"))
        .collect();
    for (name, content) in entries {
        let text = String::from_utf8_lossy(content).to_lowercase();
        assert!(!text.contains(KEY), "the key is in {name}");
        assert!(
            !content.windows(key.len()).any(|part| part == key),
            "the key is in {name}"
        );
        assert!(!text.contains(PASSWORD), "the password is in {name}");
        assert!(!name.ends_with(".key"), "{name}");
    }
}

#[test]
fn a_snapshot_holds_what_support_needs_and_no_secret() {
    let lab = farm(2);
    start(&lab, MODULE);
    let node = &lab.nodes[0];
    let parts = [
        "about.txt",
        "etc/cluster.xml",
        "etc/modules/web/conf/userconfig.xml",
        "etc/modules/web/bin/start_both",
        "var/modules/web/active.txt",
        "var/modules/web/module.log",
        "var/host-state.json",
    ];
    let running = snapshot(&lab, node, "running.zip");
    has(&running, &parts);
    has(
        &running,
        &[
            "daemon/cluster.json",
            "daemon/map.json",
            "daemon/metrics.json",
            "daemon/plan.json",
            "daemon/status.json",
        ],
    );
    let outputs = running.keys().filter(|name| name.ends_with(".ulog")).count();
    assert!(outputs >= 1, "the output of scripts: {:?}", running.keys());
    assert!(
        running.keys().any(|name| name.contains("system/")),
        "{:?}",
        running.keys()
    );
    holds_no_secret(&running);
    let again = node.farm(&["snapshot", &lab.base().join("running.zip").display().to_string()]);
    assert_ne!(
        again.expect("farm runs").code,
        Some(0),
        "a file is not overwritten unasked"
    );

    node.signal_farmd("KILL").expect("farmd is killed");
    node.wait_farmd_end(Duration::from_secs(5)).expect("farmd is gone");
    let dead = snapshot(&lab, node, "dead.zip");
    has(&dead, &parts);
    assert!(!dead.contains_key("snapshot/daemon/status.json"));
    let note: Vec<_> = dead.iter().filter(|(name, _)| name.contains("/daemon/")).collect();
    assert_eq!(note.len(), 1, "one note instead of the daemon's answers");
    mentions(&String::from_utf8_lossy(note[0].1), &["not running", "does not answer"]);
    holds_no_secret(&dead);
}

#[test]
fn the_log_is_shown_and_followed() {
    let lab = farm(1);
    let node = &lab.nodes[0];
    node.farm_ok(&["start", MODULE]).expect("the module starts");
    let log = node.farm_ok(&["log", MODULE]).expect("a log");
    for text in ["Action start called by", "Local state UP Ready", "Script start_both"] {
        mentions(&log, &[text]);
    }
    for line in log.lines() {
        let fields: Vec<&str> = line.splitn(4, '|').map(str::trim).collect();
        assert!(
            fields.len() == 4 && fields[0].len() > 18 && "CEUSI".contains(fields[2]),
            "{line}"
        );
    }
    let last = node.farm_ok(&["log", MODULE, "-n", "1"]).expect("a log");
    assert_eq!(last.lines().count(), 1);
    let json = node.farm_ok(&["--json", "log", MODULE]).expect("a log");
    let lines: Vec<BTreeMap<String, String>> = serde_json::from_str(&json).expect("an array of lines");
    assert_eq!(lines.len(), log.lines().count());

    let follow = |seconds: &str| {
        let mut command = node.command(Path::new("timeout")).expect("the node has power");
        command.arg(seconds).arg(program("farm")).args(["log", MODULE, "-f"]);
        run_limited(command, Duration::from_secs(10)).expect("timeout runs")
    };
    let followed = std::thread::scope(|scope| {
        let followed = scope.spawn(|| follow("2.5"));
        std::thread::sleep(Duration::from_millis(1000));
        node.farm_ok(&["-m", MODULE, "printi", "a line of just now"])
            .expect("a line");
        followed.join().expect("it is followed")
    });
    assert_eq!(followed.code, Some(124), "it follows until it is ended: {followed:?}");
    let seen = followed
        .stdout
        .lines()
        .filter(|line| line.ends_with("a line of just now"))
        .count();
    assert_eq!(seen, 1, "{}", followed.stdout);
    mentions(&followed.stdout, &["Local state UP Ready"]);

    // Without a daemon too.
    node.stop_farmd().expect("farmd ends");
    mentions(&node.farm_ok(&["log", MODULE]).expect("a log"), &["a line of just now"]);
}

#[test]
fn the_exit_code_of_status_tells_how_the_farm_is() {
    let lab = farm(2);
    let [first, second] = &lab.nodes[..] else {
        panic!("two nodes")
    };
    let codes = |expected: u8| {
        for args in [vec!["status"], vec!["status", MODULE], vec!["--json", "status"]] {
            let shown = first.farm(&args).expect("farm runs");
            assert_eq!(
                shown.code,
                Some(i32::from(expected)),
                "{args:?}: {}{}",
                shown.stdout,
                shown.stderr
            );
        }
    };
    codes(exit::STOPPED);
    start(&lab, MODULE);
    codes(exit::OK);
    let status = first.status().expect("it is JSON");
    assert_eq!((status.version, status.node.as_str()), (API_VERSION, "node1"));
    assert_eq!(status.modules[0].vips, ["198.18.0.20"]);
    assert_eq!(status.modules[0].nodes.len(), 2);
    assert_eq!(status.cluster.view, ["node1", "node2"]);
    let text = first.farm_ok(&["status"]).expect("all is well");
    for word in ["node1", "node2", "UP", "Ready", "2048/4096"] {
        mentions(&text, &[word]);
    }

    second.farm_ok(&["stop", MODULE]).expect("it stops");
    codes(exit::DEGRADED);
    mentions(&first.farm(&["status"]).expect("farm runs").stdout, &["4096/4096"]);
    on_all(&lab, &["stop", MODULE]);
    codes(exit::STOPPED);
    assert_eq!(
        first.farm(&["status", "shop"]).expect("farm runs").code,
        Some(i32::from(exit::NOT_FOUND))
    );
    first.stop_farmd().expect("farmd ends");
    codes(exit::NO_DAEMON);
}

#[test]
fn a_wrong_configuration_is_told_by_its_place_and_changes_nothing() {
    let lab = farm(1);
    let node = &lab.nodes[0];
    let file = node.dirs().etc.join("modules").join(MODULE).join("conf/userconfig.xml");
    let active = node
        .dirs()
        .var
        .join("modules")
        .join(MODULE)
        .join("active/conf/userconfig.xml");
    let right = fs::read_to_string(&file).expect("it is installed");
    let accepted = fs::read_to_string(&active).expect("it is configured");
    // Two mistakes, so that both are told at once.
    let wrong = changed(&right, "filter=\"on_addr\"", "filter=\"on_adr\"");
    let wrong = changed(&wrong, "interval=\"1s\"", "interval=\"soon\"");
    fs::write(&file, &wrong).expect("it can be edited");
    let place = |text: &str| {
        let (index, line) = wrong
            .lines()
            .enumerate()
            .find(|(_, line)| line.contains(text))
            .expect("it is there");
        let element = line.find('<').expect("an element") + 1;
        (index + 1, element, line.find(text).expect("it is there") + 1)
    };
    let shown = file.display().to_string();
    let checked = node.farm(&["confcheck", &shown]).expect("farm runs");
    assert_eq!(checked.code, Some(i32::from(exit::DATA)), "{checked:?}");
    let said = format!("{}{}", checked.stdout, checked.stderr);
    for (text, expected) in [("on_adr", "on_addr"), ("soon", "1s")] {
        let (line, element, value) = place(text);
        // The column is that of the element, of the attribute or of its value.
        let at = said.lines().find_map(|said| {
            let rest = said.split(&format!("{shown}:{line}:")).nth(1)?;
            rest.split(|c: char| !c.is_ascii_digit()).next()?.parse::<usize>().ok()
        });
        let at = at.unwrap_or_else(|| panic!("{shown}:{line}:COLUMN is not in\n{said}"));
        assert!((element..=value).contains(&at), "column {at} of line {line}\n{said}");
        mentions(&said, &[expected]);
    }

    let refused = node.farm(&["config", MODULE]).expect("farm runs");
    assert_eq!(refused.code, Some(i32::from(exit::DATA)), "{refused:?}");
    assert_eq!(fs::read_to_string(&active).expect("the active copy is there"), accepted);
    node.farm_ok(&["start", MODULE]).expect("the active copy still starts");

    // A running module keeps what it runs with, whatever is edited.
    fs::write(&file, changed(&right, "on_addr", "on_port")).expect("it can be edited");
    let refused = node.farm(&["config", MODULE]).expect("farm runs");
    assert_eq!(refused.code, Some(i32::from(exit::REFUSED)), "{refused:?}");
    assert_eq!(fs::read_to_string(&active).expect("the active copy is there"), accepted);
    node.farm_ok(&["stop", MODULE]).expect("it stops");
    node.farm_ok(&["config", MODULE]).expect("the new file is right");
    mentions(
        &fs::read_to_string(&active).expect("the active copy is there"),
        &["on_port"],
    );
}
