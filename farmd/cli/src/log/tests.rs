use std::io::Write;

use super::*;
use crate::folders::test::Folder;

const LINE: &str = "2026-11-21 05:31:00.123456 | farmd | E | Local state UP Ready";

#[test]
fn a_line_is_shown_as_it_stands_or_as_json() {
    assert_eq!(module_line(LINE, Style::PLAIN, false, false).as_deref(), Some(LINE));
    let json: Value = serde_json::from_str(&module_line(LINE, Style::PLAIN, false, true).unwrap()).unwrap();
    assert_eq!(json["origin"], "farmd");
    assert_eq!(json["level"], "E");
    assert_eq!(json["text"], "Local state UP Ready");
    let coloured = module_line(LINE, Style::RICH, false, false).unwrap();
    assert_eq!(coloured, format!("\x1b[1m{LINE}\x1b[0m"));
}

#[test]
fn debug_lines_need_verbose_and_strange_lines_are_still_shown() {
    let debug = LINE.replace("| E |", "| D |");
    assert_eq!(module_line(&debug, Style::PLAIN, false, false), None);
    assert_eq!(module_line(&debug, Style::PLAIN, true, false), Some(debug));
    assert_eq!(
        module_line("torn \x1b[2J line", Style::PLAIN, false, false).as_deref(),
        Some("torn \\u{1b}[2J line")
    );
    assert_eq!(module_line("", Style::PLAIN, false, false), None);
}

#[test]
fn the_last_lines_are_found_across_pieces_and_the_rest_is_followed() {
    let folder = Folder::new("log-tail");
    let path = folder.0.join("module.log");
    let text: String = (0..5_000).map(|n| format!("{n:0100}\n")).collect();
    std::fs::write(&path, &text).unwrap();

    let mut tail = Tail::open(&path).unwrap();
    let last = tail.last_lines(2_000, &|_| true).unwrap();
    assert!(last.lines().count() >= 2_000 && last.len() < text.len());
    assert!(text.ends_with(&last));
    assert_eq!(tail.added().unwrap(), "");

    let mut file = std::fs::OpenOptions::new().append(true).open(&path).unwrap();
    file.write_all(b"first\nsec").unwrap();
    assert_eq!(tail.added().unwrap(), "first\n");
    file.write_all(b"ond\n").unwrap();
    assert_eq!(tail.added().unwrap(), "second\n");
}

#[test]
fn a_cut_or_replaced_file_is_followed_from_its_beginning() {
    let folder = Folder::new("log-rotate");
    let path = folder.0.join("module.log");
    let mut tail = Tail::missing(&path);
    assert_eq!(tail.added().unwrap(), "");
    std::fs::write(&path, "one\n").unwrap();
    assert_eq!(tail.added().unwrap(), "one\n");

    let mut old = std::fs::OpenOptions::new().append(true).open(&path).unwrap();
    old.write_all(b"last of the old\n").unwrap();
    std::fs::rename(&path, folder.0.join("module.log.1")).unwrap();
    assert_eq!(tail.added().unwrap(), "last of the old\n");
    std::fs::write(&path, "new\n").unwrap();
    assert_eq!(tail.added().unwrap().trim_start(), "new\n");

    std::fs::write(&path, "x\n").unwrap();
    assert_eq!(tail.added().unwrap(), "x\n");
}

#[test]
fn script_outputs_are_known_by_their_names() {
    assert_eq!(
        script_of("userlog_2026_11_21T053100_start_both.ulog"),
        Some("start_both")
    );
    assert_eq!(
        script_of("userlog_2026_11_21T053100_start_both_2.ulog"),
        Some("start_both")
    );
    assert_eq!(script_of("userlog.ulog"), None);
    assert_eq!(script_of("module.log"), None);
    let folder = Folder::new("log-scripts");
    for name in [
        "userlog_2026_11_21T053100_prestart.ulog",
        "userlog_2026_11_21T053101_start_both.ulog",
        "module.log",
    ] {
        std::fs::write(folder.0.join(name), name).unwrap();
    }
    let outputs = script_outputs(&folder.0).unwrap();
    assert_eq!(
        outputs.iter().map(|o| o.script.as_str()).collect::<Vec<_>>(),
        ["prestart", "start_both"]
    );
}
