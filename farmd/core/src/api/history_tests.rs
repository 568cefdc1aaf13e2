use super::*;

fn names(names: &[&str]) -> Vec<String> {
    names.iter().map(|n| (*n).to_owned()).collect()
}

fn entry(module: Option<&str>, what: Happening) -> HistoryEntry {
    HistoryEntry {
        seq: 7,
        time: "2026-11-21 03:12:07.412345".to_owned(),
        unix_us: 1_795_000_000_000_000,
        module: module.map(str::to_owned),
        what,
    }
}

fn dead(node: &str) -> Departure {
    Departure {
        node: node.to_owned(),
        cause: DepartureCause::Silent,
        observers: names(&["s1", "s2"]),
        talk_with_it: Vec::new(),
        silent_ms: Some(251),
        silent_ms_by_lan: BTreeMap::from([("default".to_owned(), 251), ("backup".to_owned(), 252)]),
    }
}

fn moved(from: &str, to: &str, buckets: u32) -> Move {
    Move {
        from: Some(from.to_owned()),
        to: Some(to.to_owned()),
        buckets,
    }
}

fn crash_map() -> HistoryEntry {
    let what = Happening::MapChanged {
        group: "http".to_owned(),
        map: 17,
        proposer: "s1".to_owned(),
        view: names(&["s1", "s2"]),
        causes: vec![MapCause::NodeOut {
            node: "s3".to_owned(),
            why: DepartureCause::Silent,
        }],
        moved: vec![moved("s3", "s1", 683), moved("s3", "s2", 682)],
        counts: BTreeMap::from([("s1".to_owned(), 2048), ("s2".to_owned(), 2048)]),
        took_us: 12_345,
        unserved_ms: Some(269),
    };
    entry(Some("web"), what)
}

#[test]
fn a_crash_is_told_by_who_saw_it_what_moved_and_how_long_it_took() {
    let down = entry(None, Happening::NodeDown(dead("s3")));
    assert_eq!(down.summary(), "s3 not heard for 251 ms by s1 s2");
    assert_eq!(
        down.details(),
        [
            "no link both ways with s3: s1 s2; still one: none",
            "last heard: backup 252 ms, default 251 ms ago"
        ]
    );
    let half = Departure {
        observers: names(&["s1"]),
        talk_with_it: names(&["s2"]),
        ..dead("s3")
    };
    assert_eq!(
        entry(None, Happening::NodeDown(half)).summary(),
        "s3 not heard for 251 ms by s1; still heard by s2"
    );
    let view = entry(
        None,
        Happening::ViewChanged {
            before: names(&["s1", "s2", "s3"]),
            after: names(&["s1", "s2"]),
            out: vec![dead("s3")],
        },
    );
    assert_eq!(view.summary(), "s1 s2 s3 -> s1 s2: s3 out (silent)");
    assert_eq!(
        crash_map().summary(),
        "web/http: s3 -> s1 683, s2 682; s3 out (silent); at most 269 ms unserved"
    );
    assert_eq!(
        crash_map().details(),
        [
            "map 17, proposed by s1 to s1 s2, committed after 12 ms",
            "now s1 2048, s2 2048"
        ]
    );
}

#[test]
fn a_planned_change_names_who_wanted_it_and_a_merge_who_yields() {
    let change = |cause: MapCause| {
        let mut entry = crash_map();
        if let Happening::MapChanged {
            causes,
            unserved_ms,
            took_us,
            ..
        } = &mut entry.what
        {
            (*causes, *unserved_ms, *took_us) = (vec![cause], None, 4_250);
        }
        entry.summary()
    };
    let leaves = MapCause::Weight {
        node: "s3".to_owned(),
        from: 1,
        to: 0,
        why: "stop called by root: the other nodes are taking over".to_owned(),
    };
    assert_eq!(
        change(leaves),
        "web/http: s3 -> s1 683, s2 682; s3 leaves (stop called by root); took 4.2 ms"
    );
    let merge = MapCause::Merge {
        yields: BTreeMap::from([("s3".to_owned(), 2731)]),
    };
    assert!(change(merge).contains("both sides served: s3 yields 2731"));
}

#[test]
fn an_entry_is_one_json_object_that_reads_back_and_knows_a_newer_kind_when_it_sees_one() {
    for entry in [
        crash_map(),
        entry(None, Happening::NodeDown(dead("s3"))),
        entry(Some("web"), Happening::Readmitted),
    ] {
        let line = serde_json::to_string(&entry).unwrap();
        assert!(!line.contains('\n'));
        assert_eq!(serde_json::from_str::<HistoryEntry>(&line).unwrap(), entry, "{line}");
    }
    let newer = r#"{"seq":1,"time":"2026-11-21 03:12:07.412345","unix_us":5,"event":"eclipse","of":"moon"}"#;
    assert_eq!(
        serde_json::from_str::<HistoryEntry>(newer).unwrap().what,
        Happening::Unknown
    );
}

#[test]
fn a_restart_in_place_is_told_as_one_at_both_of_its_ends() {
    let stopped = |reload| {
        let by = "root on s1".to_owned();
        entry(None, Happening::Stopped { by, reload }).summary()
    };
    assert_eq!(
        stopped(true),
        "farmd ends in order, to be restarted in place (reload by root on s1)"
    );
    assert_eq!(stopped(false), "farmd ends in order, asked by root on s1");
    let started = |reloaded_by: Option<&str>| {
        let what = Happening::Started {
            version: "1.0".to_owned(),
            incarnation: 5,
            last_ended_in_order: Some(true),
            reloaded_by: reloaded_by.map(str::to_owned),
        };
        entry(None, what).summary()
    };
    assert_eq!(started(Some("root")), "farmd 1.0 restarted in place (reload by root)");
    assert_eq!(started(None), "farmd 1.0 started");
    // Entries that an older farmd has written.
    let old: Happening = serde_json::from_str(r#"{"event":"stopped","by":"root"}"#).unwrap();
    let by = "root".to_owned();
    assert_eq!(old, Happening::Stopped { by, reload: false });
}
