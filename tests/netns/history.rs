//! What a node remembers of the farm: who went, who said so, what moved, how long it took.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use farm_core::api::history::{Departure, DepartureCause, Happening, HistoryEntry, MapCause, Move};
use farm_lab::{Lab, LabConfig, MODULE, Node, wait_until};

use crate::common::{history, log_of, mentions, module_of, own_row};

const LIMIT: Duration = Duration::from_secs(10);

/// Waits until an entry of `node` above number `after` is what `find` looks for.
fn await_entry<T>(node: &Node, after: u64, what: &str, find: impl Fn(&Happening) -> Option<T>) -> T {
    let new = || {
        history(node)
            .into_iter()
            .filter(|entry| entry.seq > after)
            .collect::<Vec<_>>()
    };
    wait_until(LIMIT, what, || new().iter().find_map(|entry| find(&entry.what)))
        .unwrap_or_else(|e| panic!("{e}: {:#?}", new()))
}

fn newest(node: &Node) -> u64 {
    history(node).last().map_or(0, |entry| entry.seq)
}

fn moved_from(moves: &[Move], node: &str) -> u32 {
    let from = moves.iter().filter(|m| m.from.as_deref() == Some(node));
    from.map(|m| m.buckets).sum()
}

/// How many buckets of the lab's only group were `out`'s.
fn owned_by(out: &Departure) -> u32 {
    match &out.owned[..] {
        [owned] if owned.module == MODULE => owned.buckets,
        _ => panic!("{out:?}"),
    }
}

#[test]
fn a_dead_node_is_named_with_observers_reason_duration_and_moves_and_it_outlasts_a_restart() {
    let lab = Lab::serve(LabConfig::default()).expect("the farm comes up");
    let [survivor, other, victim] = [&lab.nodes[0], &lab.nodes[1], &lab.nodes[2]];
    let before = newest(survivor);
    let begun = Instant::now();
    victim.power_off().expect("power goes");

    let down = await_entry(survivor, before, "the dead node's entry", |what| match what {
        Happening::NodeDown(out) if out.node == victim.name() => Some(out.clone()),
        _ => None,
    });
    assert_eq!(down.cause, DepartureCause::Silent);
    assert_eq!(down.observers, [survivor.name(), other.name()], "{down:?}");
    assert!(down.talk_with_it.is_empty(), "{down:?}");
    let silent = down.silent_ms.expect("it was heard before");
    let most = || u64::try_from(begun.elapsed().as_millis()).expect("a time") + 200;
    assert!((200..=most()).contains(&silent), "{silent} ms");
    let owned = owned_by(&down);
    assert!((1365..=1366).contains(&owned), "{down:?}");

    let (after, stood, out) = await_entry(survivor, before, "the new view", |what| match what {
        Happening::ViewChanged {
            after, stood_ms, out, ..
        } if !out.is_empty() => Some((after.clone(), *stood_ms, out.clone())),
        _ => None,
    });
    assert_eq!(after, [survivor.name(), other.name()]);
    assert_eq!((out[0].node.as_str(), owned_by(&out[0])), (victim.name(), owned));
    assert!(stood.is_some_and(|ms| ms >= 200), "{stood:?}");

    let (causes, moved, unserved, follows) = await_entry(survivor, before, "the new map", |what| match what {
        Happening::MapChanged {
            causes,
            moved,
            unserved_ms,
            follows,
            ..
        } => Some((causes.clone(), moved.clone(), *unserved_ms, follows.clone())),
        _ => None,
    });
    let views = history(survivor).into_iter().filter(|entry| entry.seq > before);
    let views = views.filter(|entry| matches!(&entry.what, Happening::ViewChanged { out, .. } if !out.is_empty()));
    assert_eq!(follows, views.map(|entry| entry.seq).collect::<Vec<_>>());
    let [
        MapCause::NodeOut {
            node,
            why,
            observers,
            silent_ms,
        },
    ] = &causes[..]
    else {
        panic!("{causes:?}")
    };
    assert_eq!((node.as_str(), *why), (victim.name(), DepartureCause::Silent));
    assert_eq!(*observers, [survivor.name(), other.name()], "{causes:?}");
    assert!(silent_ms.is_some_and(|ms| (200..=most()).contains(&ms)), "{causes:?}");
    assert_eq!(
        moved.iter().map(|m| m.buckets).sum::<u32>(),
        moved_from(&moved, victim.name())
    );
    assert_eq!(moved_from(&moved, victim.name()), owned, "{moved:?}");
    assert!(unserved.is_some_and(|ms| (200..=most()).contains(&ms)), "{unserved:?}");

    let text = survivor.farm_ok(&["history"]).expect("a history for people");
    let seen_by = format!("seen by {} {}", survivor.name(), other.name());
    let owns = format!("owns {owned} buckets of {MODULE}/");
    let not_heard = format!("{} not heard for", victim.name());
    for words in [not_heard, seen_by, owns] {
        assert!(text.contains(&words), "{words}: {text}");
    }

    let remembered = history(survivor);
    assert_eq!(survivor.stop_farmd().expect("farmd ends"), Some(0));
    let told = survivor.farm(&["history"]).expect("the files are read without farmd");
    assert!(
        told.ok() && told.stdout.contains("farmd ends in order, asked by SIGTERM"),
        "{told:?}"
    );
    survivor.start_farmd().expect("farmd starts");
    survivor.wait_farmd(LIMIT).expect("farmd answers");
    let again = history(survivor);
    assert_eq!(again[..remembered.len()], remembered[..], "nothing is forgotten");
    let started = again.iter().rev().find_map(|entry| match entry.what {
        Happening::Started {
            last_ended_in_order, ..
        } => Some(last_ended_in_order),
        _ => None,
    });
    assert_eq!(started, Some(Some(true)));
    let numbers: Vec<u64> = again.iter().map(|entry| entry.seq).collect();
    assert!(numbers.windows(2).all(|pair| pair[0] < pair[1]), "{numbers:?}");
}

#[test]
fn whoever_is_left_alone_tells_what_the_dead_node_owned_although_it_has_it_at_once() {
    let lab = Lab::serve(LabConfig {
        nodes: 2,
        ..LabConfig::default()
    })
    .expect("the farm comes up");
    let [survivor, victim] = [&lab.nodes[0], &lab.nodes[1]];
    let before = newest(survivor);
    victim.power_off().expect("power goes");
    // Nobody has to be asked: in one turn of farmd the node is down, the view is another one, and so is the map.
    let down = await_entry(survivor, before, "the dead node's entry", |what| match what {
        Happening::NodeDown(out) if out.node == victim.name() => Some(out.clone()),
        _ => None,
    });
    assert_eq!(owned_by(&down), 2048);
    let moved = await_entry(survivor, before, "the new map", |what| match what {
        Happening::MapChanged { moved, .. } => Some(moved.clone()),
        _ => None,
    });
    assert_eq!(moved_from(&moved, victim.name()), 2048, "{moved:?}");
}

#[test]
fn a_planned_stop_shows_as_such_with_who_asked() {
    let lab = Lab::serve(LabConfig::default()).expect("the farm comes up");
    let [seen_from, _, stopped] = [&lab.nodes[0], &lab.nodes[1], &lab.nodes[2]];
    let before = [newest(seen_from), newest(stopped)];
    stopped.farm_ok(&["stop", MODULE]).expect("the module stops");
    let (causes, moved, unserved) = await_entry(seen_from, before[0], "the new map", |what| match what {
        Happening::MapChanged {
            causes,
            moved,
            unserved_ms,
            ..
        } => Some((causes.clone(), moved.clone(), *unserved_ms)),
        _ => None,
    });
    assert!(
        matches!(&causes[..], [MapCause::Weight { node, to: 0, why, .. }]
            if node == stopped.name() && why.starts_with("stop called by ")),
        "{causes:?}"
    );
    assert!((1365..=1366).contains(&moved_from(&moved, stopped.name())), "{moved:?}");
    assert_eq!(unserved, None, "it handed its share over");
    let quiet = history(seen_from).into_iter().filter(|entry| entry.seq > before[0]);
    let alarms: Vec<HistoryEntry> = quiet
        .filter(|entry| matches!(entry.what, Happening::NodeDown(_) | Happening::ViewChanged { .. }))
        .collect();
    assert!(alarms.is_empty(), "nobody went down: {alarms:?}");
    await_entry(stopped, before[1], "the command", |what| match what {
        Happening::Asked { what, .. } if what == "stop" => Some(()),
        _ => None,
    });
}

/// How many buckets `node` says that it has given up since entry `after`, and who has how many by the newest map it tells of.
fn given_up(node: &Node, after: u64) -> (u32, BTreeMap<String, u32>) {
    let (mut buckets, mut owners) = (0, BTreeMap::new());
    for entry in history(node).into_iter().filter(|entry| entry.seq > after) {
        match entry.what {
            Happening::MapChanged { moved, counts, .. } => {
                buckets += moved_from(&moved, node.name());
                owners = counts;
            }
            Happening::MapLearned { gave_up, counts, .. } => {
                buckets += gave_up;
                owners = counts;
            }
            Happening::Closed { buckets: closed, .. } => buckets += closed,
            _ => {}
        }
    }
    (buckets, owners)
}

/// Cuts the third node off until each side serves all, mends `first`, its way in or out, and the other one once that is `noticed`. Fails unless each node then
/// tells what it gives up and who has it; returns what the third one tells.
fn meet_again(lab: &Lab, first: &str, noticed: impl Fn() -> bool) -> Vec<Happening> {
    let (alone, apart) = (&lab.nodes[2], [2048, 2048, 4096]);
    alone.cut(true).expect("cut");
    alone.cut(false).expect("cut");
    for (node, share) in lab.nodes.iter().zip(apart) {
        wait_until(LIMIT, "each side to serve all", || {
            (given_up(node, 0).1.get(node.name()) == Some(&share)).then_some(())
        })
        .unwrap_or_else(|e| panic!("{e}: {:#?}", history(node)));
    }
    let seen = |node: &Node| (newest(node), log_of(node, MODULE).lines().count());
    let before: Vec<(u64, usize)> = lab.nodes.iter().map(seen).collect();
    lab.switch
        .nft(&format!("delete table bridge cut_{}_{first}\n", alone.port()))
        .expect("one way is mended");
    wait_until(LIMIT, "that to be noticed", || noticed().then_some(())).unwrap_or_else(|e| panic!("{e}: {first}"));
    alone.heal().expect("healed");
    lab.wait_ready(MODULE, &lab.nodes.iter().collect::<Vec<_>>(), Duration::from_secs(20))
        .expect("all serve");
    let rows = module_of(alone, MODULE).nodes.into_iter();
    let together: BTreeMap<String, u32> = rows.map(|row| (row.node, row.shares[0].buckets)).collect();
    for ((node, share), (seq, lines)) in lab.nodes.iter().zip(apart).zip(&before) {
        // All that it had, or what it has no more: one that steps out or learns a newer map gets its part anew.
        let right = || {
            let (buckets, owners) = given_up(node, *seq);
            (share - together[node.name()]..=share).contains(&buckets) && owners == together
        };
        wait_until(LIMIT, "a node to tell what it gave up", || right().then_some(()))
            .unwrap_or_else(|e| panic!("{e}, {share} before, now {together:?}: {:#?}", history(node)));
        let log = log_of(node, MODULE);
        let new: Vec<&str> = log.lines().skip(*lines).collect();
        mentions(&new.join("\n"), &["buckets released", "everything closed"]);
    }
    let told = history(alone).into_iter().filter(|entry| entry.seq > before[2].0);
    told.map(|entry| entry.what).collect()
}

#[test]
fn a_merge_tells_what_each_side_yields() {
    let lab = Lab::serve(LabConfig::default()).expect("the farm comes up");
    let alone = &lab.nodes[2];
    // Heard before it hears, it goes on serving until it knows the others: both sides know that they meet.
    let hears_it = |node: &Node| {
        let peers = node.status().expect("the node answers").cluster.nodes;
        let peer = peers.iter().find(|peer| peer.name == alone.name());
        peer.and_then(|peer| peer.heard_ms).is_some_and(|ms| ms < 200)
    };
    let stepped_out = |told: &[Happening]| {
        let closed = |what: &Happening| matches!(what, Happening::Closed { buckets: 4096, why, .. } if why.starts_with("stepped out"));
        told.iter().any(closed)
    };
    // Unless the command that says that it is heard comes in before the first heartbeat does: then it steps out too.
    let merged = (0..5).find_map(|_| {
        let told = meet_again(&lab, "out", || lab.nodes[..2].iter().all(hears_it));
        (!stepped_out(&told)).then_some(told)
    });
    let told = merged.expect("heartbeats come first in one of five meetings");
    let yields = told.iter().find_map(|what| {
        let Happening::MapChanged { causes, counts, .. } = what else {
            return None;
        };
        let merge = causes.iter().find_map(|cause| match cause {
            MapCause::Merge { yields } => Some(yields),
            _ => None,
        });
        Some((merge?.get(alone.name())?, counts.get(alone.name())?))
    });
    assert_eq!(yields.map(|(yields, keeps)| yields + keeps), Some(4096), "{told:#?}");
    mentions(&log_of(alone, MODULE), &[": both sides served: "]);
    mentions(&log_of(alone, MODULE), &["node3 yields "]);

    // Where it hears before it is heard it steps out.
    let told = meet_again(&lab, "in", || own_row(alone, MODULE).why.contains("stepped out"));
    assert!(stepped_out(&told), "{told:#?}");
}

/// Waits until the first two nodes have told, after these entries, that the third one is down and out of the view, by both of them and with this cause.
fn others_tell(lab: &Lab, marks: [u64; 2], cause: DepartureCause) {
    let [first, second, gone] = [0, 1, 2].map(|index| lab.nodes[index].name());
    let others = [first, second].map(str::to_owned);
    let mut observers = BTreeSet::new();
    for (node, after) in lab.nodes.iter().zip(marks) {
        let down = await_entry(node, after, "that it is down", |what| match what {
            Happening::NodeDown(out) if out.node == gone => Some(out.clone()),
            _ => None,
        });
        let (view, out) = await_entry(node, after, "the view without it", |what| match what {
            Happening::ViewChanged { after, out, .. } if !out.is_empty() => Some((after.clone(), out.clone())),
            _ => None,
        });
        assert_eq!(view, others, "{} sees", node.name());
        assert_eq!(down.cause, cause, "{}", node.name());
        // An entry waits for the other one's word for a while, and where the machine is busy not for long enough.
        let named = !down.observers.is_empty() && down.observers.iter().all(|name| others.contains(name));
        assert!(named, "{} of {down:?}", node.name());
        observers.extend(down.observers);
        let [out] = &out[..] else { panic!("{out:?}") };
        let named = !out.observers.is_empty() && out.observers.iter().all(|name| others.contains(name));
        assert!(out.node == gone && named, "{} of {out:?}", node.name());
        // Where the other one is the first to notice, this one still hears it.
        let whole = (out.cause, &out.observers[..]) == (cause, &others[..]);
        assert!(
            whole || out.cause == DepartureCause::LeftOut,
            "{} of {out:?}",
            node.name()
        );
    }
    assert!(observers.iter().eq(&others), "all told: {observers:?}");
}

/// Nothing of it comes out, and everything comes in: it hears from the others that they do not hear it.
#[test]
fn a_node_that_is_not_heard_tells_who_does_not_hear_it_and_so_do_these() {
    let lab = Lab::serve(LabConfig::default()).expect("the farm comes up");
    let [first, second, mute] = [&lab.nodes[0], &lab.nodes[1], &lab.nodes[2]];
    let (before, marks) = (newest(mute), [newest(first), newest(second)]);
    mute.cut(true).expect("cut");
    lab.wait_ready(MODULE, &lab.others(2), LIMIT)
        .expect("the others have all");
    others_tell(&lab, marks, DepartureCause::Silent);
    let (why, observers) = await_entry(mute, before, "that it has stepped out", |what| match what {
        Happening::Fenced { why, observers } => Some((why.clone(), observers.clone())),
        _ => None,
    });
    // One of the others may have been the first to notice.
    let others = [first.name(), second.name()].map(str::to_owned);
    assert!(
        !observers.is_empty() && observers.iter().all(|name| others.contains(name)),
        "{observers:?}"
    );
    mentions(&why, &["of the nodes it hears do not hear it"]);
    let out = await_entry(mute, before, "its view", |what| match what {
        Happening::ViewChanged { after, out, .. } if after.is_empty() => Some(out.clone()),
        _ => None,
    });
    let [own] = &out[..] else { panic!("{out:?}") };
    assert_eq!(
        (own.node.as_str(), own.cause),
        (mute.name(), DepartureCause::LeftOut),
        "{own:?}"
    );
    // Completed by what the others say in the pulses after it.
    assert_eq!(
        (&own.observers[..], &own.talk_with_it[..]),
        (&others[..], &[][..]),
        "{own:?}"
    );
    let text = mute.farm_ok(&["history", "-v"]).expect("a history for people");
    let text = text.split_whitespace().collect::<Vec<_>>().join(" ");
    let not_heard = format!("not heard by: {}", observers.join(" "));
    for words in [format!("this node has stepped out: {why}"), not_heard] {
        assert!(text.contains(&words), "{words}: {text}");
    }
    mute.heal().expect("healed");
    await_entry(mute, before, "that it is back", |what| match what {
        Happening::Unfenced { after_ms: Some(_) } => Some(()),
        _ => None,
    });
}

#[test]
fn a_node_that_did_not_run_tells_for_how_long_and_that_it_is_back() {
    let lab = Lab::serve(LabConfig::default()).expect("the farm comes up");
    let frozen = &lab.nodes[2];
    let (before, marks) = (newest(frozen), [newest(&lab.nodes[0]), newest(&lab.nodes[1])]);
    frozen.signal_farmd("STOP").expect("a signal");
    lab.wait_ready(MODULE, &lab.others(2), LIMIT)
        .expect("the others have all");
    frozen.signal_farmd("CONT").expect("a signal");
    others_tell(&lab, marks, DepartureCause::Silent);
    let for_ms = await_entry(frozen, before, "the pause", |what| match what {
        Happening::Paused { for_ms } => Some(*for_ms),
        _ => None,
    });
    assert!(for_ms >= 200, "{for_ms}");
    let (proposer, causes, counts, after) = await_entry(frozen, before, "the others' map", |what| match what {
        Happening::MapLearned {
            proposer,
            causes,
            counts,
            after_ms,
            ..
        } => Some((proposer.clone(), causes.clone(), counts.clone(), *after_ms)),
        _ => None,
    });
    assert_eq!(
        proposer.as_deref(),
        Some(lab.nodes[0].name()),
        "the lowest of those that serve"
    );
    assert_eq!(causes, [MapCause::Returned]);
    let others: Vec<&str> = lab.others(2).iter().map(|node| node.name()).collect();
    assert_eq!(counts.keys().map(String::as_str).collect::<Vec<_>>(), others);
    assert!(after.is_some(), "it has closed everything");
    let (causes, counts) = await_entry(frozen, before, "its next map", |what| match what {
        Happening::MapChanged { causes, counts, .. } => Some((causes.clone(), counts.clone())),
        _ => None,
    });
    assert!(causes.contains(&MapCause::Returned), "{causes:?}");
    assert!(
        !causes.iter().any(|cause| matches!(cause, MapCause::Merge { .. })),
        "it had closed: {causes:?}"
    );
    assert_eq!(counts.values().sum::<u32>(), 4096);
}
