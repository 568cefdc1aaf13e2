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
        owned: vec![share("web", 1365)],
    }
}

fn share(module: &str, buckets: u32) -> Owned {
    Owned {
        module: module.to_owned(),
        group: "http".to_owned(),
        buckets,
    }
}

fn is_out(node: &str, observers: &[&str]) -> MapCause {
    MapCause::NodeOut {
        node: node.to_owned(),
        why: DepartureCause::Silent,
        observers: names(observers),
        silent_ms: Some(251),
    }
}

fn smaller_view(out: Vec<Departure>) -> HistoryEntry {
    let what = Happening::ViewChanged {
        before: names(&["s1", "s2", "s3"]),
        after: names(&["s1", "s2"]),
        stood_ms: Some(7_500_000),
        out,
    };
    entry(None, what)
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
        causes: vec![is_out("s3", &["s1", "s2"])],
        moved: vec![moved("s3", "s1", 683), moved("s3", "s2", 682)],
        counts: BTreeMap::from([("s1".to_owned(), 2048), ("s2".to_owned(), 2048)]),
        took_us: 12_345,
        unserved_ms: Some(269),
        follows: vec![6],
    };
    entry(Some("web"), what)
}

fn learned_map(causes: Vec<MapCause>, moved: Vec<Move>) -> HistoryEntry {
    let what = Happening::MapLearned {
        group: "http".to_owned(),
        map: 18,
        proposer: Some("s1".to_owned()),
        causes,
        moved,
        counts: BTreeMap::from([("s1".to_owned(), 2048), ("s2".to_owned(), 2048)]),
        gave_up: 1365,
        after_ms: Some(2_300),
        unserved_ms: None,
        follows: Vec::new(),
    };
    entry(Some("web"), what)
}

#[test]
fn a_crash_is_told_by_who_saw_it_what_moved_and_how_long_it_took() {
    let down = entry(None, Happening::NodeDown(dead("s3")));
    assert_eq!(
        down.summary(),
        "s3 not heard for 251 ms by s1 s2; owns 1365 buckets of web/http"
    );
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
        "s3 not heard for 251 ms by s1; still heard by s2; owns 1365 buckets of web/http"
    );
    let view = smaller_view(vec![dead("s3")]);
    assert_eq!(
        view.summary(),
        "s1 s2 s3 -> s1 s2 after 2 h 5 min: s3 out (silent for 251 ms, seen by s1 s2; owns 1365 buckets of web/http)"
    );
    assert_eq!(view.details()[0], "before: s1 s2 s3, for 2 h 5 min");
    assert_eq!(
        crash_map().summary(),
        "web/http: s3 -> s1 683, s2 682; s3 out (silent for 251 ms, seen by s1 s2); at most 269 ms unserved"
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
fn a_map_agreed_without_this_node_is_told_with_its_proposer_why_what_moved_and_since_when_it_was_behind() {
    let moves = vec![moved("s3", "s1", 683), moved("s3", "s2", 682)];
    let behind = learned_map(vec![is_out("s4", &["s1", "s2"])], moves);
    assert_eq!(
        behind.summary(),
        "web/http: the others agreed on s3 -> s1 683, s2 682; s4 out (silent for 251 ms, seen by s1 s2); this node yields 1365"
    );
    assert_eq!(
        behind.details(),
        [
            "map 18, proposed by s1, agreed without this node; it had the one before for 2.3 s",
            "now s1 2048, s2 2048"
        ]
    );
    let back = learned_map(vec![MapCause::Returned], Vec::new());
    assert_eq!(
        back.summary(),
        "web/http: the others agreed on s1 2048, s2 2048; this node is back; this node yields 1365"
    );
    assert_eq!(
        back.details(),
        ["map 18, proposed by s1, agreed without this node; it was without one for 2.3 s"]
    );
    let crowd = learned_map(
        ["s7", "s8", "s9"].map(|node| is_out(node, &["s1"])).to_vec(),
        Vec::new(),
    );
    let each = "s8 out: silent for 251 ms, seen by s1".to_owned();
    assert!(crowd.details().contains(&each), "{:?}", crowd.details());
}

#[test]
fn each_reason_to_be_out_tells_who_says_so_and_an_idle_node_owns_nothing() {
    let view_of = |cause: DepartureCause| {
        let out = Departure {
            cause,
            owned: Vec::new(),
            ..dead("s3")
        };
        let summary = smaller_view(vec![out]).summary();
        summary.split_once(": ").map(|(_, out)| out.to_owned())
    };
    for (cause, expected) in [
        (DepartureCause::Silent, "s3 out (silent for 251 ms, seen by s1 s2)"),
        (DepartureCause::Deaf, "s3 out (does not hear s1 s2)"),
        (DepartureCause::LeftOut, "s3 out (no link both ways with s1 s2)"),
        (DepartureCause::CutOff, "s3 out (nothing at all comes in there)"),
        (DepartureCause::Left, "s3 out (left in order)"),
    ] {
        assert_eq!(view_of(cause).as_deref(), Some(expected));
    }
    let alone = entry(
        None,
        Happening::ViewChanged {
            before: names(&["s1", "s2", "s3"]),
            after: Vec::new(),
            stood_ms: None,
            out: vec![dead("s1")],
        },
    );
    assert_eq!(
        alone.summary(),
        "s1 s2 s3 -> none: this node is out; it had 1365 buckets of web/http"
    );
}

#[test]
fn what_makes_a_line_long_is_counted_there_and_named_in_the_details() {
    let busy = Departure {
        owned: vec![share("a", 10), share("b", 20), share("c", 300), share("d", 4000)],
        ..dead("s3")
    };
    let busy = entry(None, Happening::NodeDown(busy));
    assert_eq!(
        busy.summary(),
        "s3 not heard for 251 ms by s1 s2; owns 10 buckets of a/http, 20 of b/http, 4300 of other groups"
    );
    let all = "of s3: 10 buckets of a/http, 20 of b/http, 300 of c/http, 4000 of d/http".to_owned();
    assert!(busy.details().contains(&all), "{:?}", busy.details());

    let map = |new: Vec<MapCause>| {
        let mut entry = crash_map();
        if let Happening::MapChanged { causes, .. } = &mut entry.what {
            *causes = new;
        }
        (entry.summary(), entry.details())
    };
    let (summary, details) = map(vec![is_out("s9", &["s1", "s2", "s3", "s4", "s5"])]);
    assert!(
        summary.contains("; s9 out (silent for 251 ms, seen by 5 nodes); "),
        "{summary}"
    );
    let all = "s9 out: silent for 251 ms, seen by s1 s2 s3 s4 s5".to_owned();
    assert!(details.contains(&all), "{details:?}");

    let (summary, details) = map(["s7", "s8", "s9"].map(|node| is_out(node, &["s1"])).to_vec());
    assert!(
        summary.contains("; s7 out (silent), s8 out (silent), s9 out (silent); "),
        "{summary}"
    );
    let each = "s8 out: silent for 251 ms, seen by s1".to_owned();
    assert!(details.contains(&each), "{details:?}");
    let view = smaller_view(["s7", "s8", "s9"].map(dead).to_vec());
    assert!(
        view.summary()
            .ends_with(": s7 out (silent), s8 out (silent), s9 out (silent)"),
        "{}",
        view.summary()
    );
    let each = "s8 not heard for 251 ms by s1 s2; owns 1365 buckets of web/http".to_owned();
    assert!(view.details().contains(&each), "{:?}", view.details());
}

#[test]
fn times_are_told_in_the_units_that_fit() {
    let told = [480, 2_300, 310_000, 7_500_000, 2_692_800_000].map(seconds);
    assert_eq!(told, ["480 ms", "2.3 s", "5 min 10 s", "2 h 5 min", "31 d 4 h"]);
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
        learned_map(vec![is_out("s3", &["s1"])], vec![moved("s3", "s1", 1365)]),
        entry(None, Happening::NodeDown(dead("s3"))),
        smaller_view(vec![dead("s3")]),
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
fn what_an_older_farmd_has_written_is_read_and_nothing_is_made_up_for_it() {
    let head = r#""seq":1,"time":"2026-11-21 03:12:07.412345","unix_us":5"#;
    let out = r#""node":"s3","cause":"silent","observers":["s1","s2"],"talk_with_it":[],"silent_ms":251"#;
    let down = format!(r#"{{{head},"event":"node_down",{out}}}"#);
    let view =
        format!(r#"{{{head},"event":"view_changed","before":["s1","s2","s3"],"after":["s1","s2"],"out":[{{{out}}}]}}"#);
    let map = format!(
        r#"{{{head},"module":"web","event":"map_changed","group":"http","map":17,"proposer":"s1","view":["s1","s2"],"causes":[{{"cause":"node_out","node":"s3","why":"silent"}}],"moved":[{{"from":"s3","to":"s1","buckets":1365}}],"counts":{{"s1":4096}},"took_us":12345,"unserved_ms":269}}"#
    );
    let learned = format!(
        r#"{{{head},"module":"web","event":"map_learned","group":"http","map":18,"counts":{{"s1":4096}},"gave_up":5}}"#
    );
    for (line, summary) in [
        (learned, "web/http: the others agreed on s1 4096; this node yields 5"),
        (down, "s3 not heard for 251 ms by s1 s2"),
        (view, "s1 s2 s3 -> s1 s2: s3 out (silent for 251 ms, seen by s1 s2)"),
        (map, "web/http: s3 -> s1 1365; s3 out (silent); at most 269 ms unserved"),
    ] {
        let entry: HistoryEntry = serde_json::from_str(&line).unwrap();
        assert_eq!(entry.summary(), summary);
        let before: serde_json::Value = serde_json::from_str(&line).unwrap();
        assert_eq!(serde_json::to_value(&entry).unwrap(), before);
    }
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
