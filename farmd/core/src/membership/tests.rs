use super::*;
use crate::config::cluster;
use crate::id::Incarnation;

mod steps;

/// Stands for the newest heartbeat of node 0.
const NEWEST: Ack = Ack::of(0xff_ffff);

impl Membership {
    /// Takes a heartbeat that acknowledges, in place of [`NEWEST`], one that this node sends now.
    fn hear(&mut self, now: Duration, lan: usize, heartbeat: &Heartbeat) -> Result<(), Refusal> {
        let seq = now.as_micros() as u64;
        self.note_sent(now, seq);
        let mut heartbeat = heartbeat.clone();
        for (_, ack) in heartbeat.hears.iter_mut().filter(|(_, ack)| *ack == NEWEST) {
            *ack = Ack::of(seq);
        }
        self.handle_heartbeat(now, lan, &heartbeat).map(drop)
    }
}

/// The node runs and speaks every pulse.
fn speak(m: &mut Membership, from: u64, until: u64) {
    for t in (from..=until).step_by(50) {
        m.handle_timeout(ms(t));
        m.note_sent(ms(t), t * 1000);
    }
}

fn id(i: usize) -> NodeId {
    NodeId::new(i).unwrap()
}

fn ms(n: u64) -> Duration {
    Duration::from_millis(n)
}

fn set(nodes: &[usize]) -> NodeSet {
    nodes.iter().map(|i| id(*i)).collect()
}

/// Three nodes on the first of `lans` lans; the third one is on no other.
fn config(lans: usize) -> ClusterConfig {
    let lan = |l: usize| {
        let nodes =
            (0..if l == 0 { 3 } else { 2 }).map(|n| format!("<node name=\"s{n}\" addr=\"198.18.{l}.{}\"/>", n + 1));
        format!("<lan name=\"l{l}\">{}</lan>", nodes.collect::<String>())
    };
    let text = format!(
        "<cluster><lans>{}</lans></cluster>",
        (0..lans).map(lan).collect::<String>()
    );
    cluster::parse("cluster.xml", &text).unwrap().0
}

/// Node 0, started at 0.
fn membership(config: &ClusterConfig) -> Membership {
    Membership::new(config, id(0), Duration::ZERO)
}

/// A heartbeat of a settled node that hears node 0 and all the others.
fn heartbeat(config: &ClusterConfig, sender: usize, incarnation: u64, seq: u64) -> Heartbeat {
    let hears = (0..3)
        .filter(|n| *n != sender)
        .map(|n| (id(n), if n == 0 { NEWEST } else { Ack::of(7) }));
    Heartbeat {
        sender: id(sender),
        lan: 0,
        fenced: false,
        leaving: false,
        returning: false,
        joining: false,
        incarnation: Incarnation(incarnation),
        seq,
        cluster_digest: config.digest,
        hears: hears.collect(),
        beat: seq as u16,
        excludes: NodeSet::EMPTY,
        echo: None,
        hearsay: Vec::new(),
        relayed: Vec::new(),
        modules: Vec::new(),
        requesters: Vec::new(),
    }
}

fn events(membership: &mut Membership) -> Vec<Event> {
    std::iter::from_fn(|| membership.poll_event()).collect()
}

/// Both peers heard until `until`, a heartbeat each 50 ms with numbers from 1.
fn hear_all(membership: &mut Membership, config: &ClusterConfig, until: Duration) {
    let mut seq = 0;
    let mut now = Duration::ZERO;
    while now <= until {
        seq += 1;
        for peer in [1, 2] {
            membership.hear(now, 0, &heartbeat(config, peer, 7, seq)).unwrap();
        }
        membership.handle_timeout(now);
        now += ms(50);
    }
}

#[test]
fn a_replay_is_refused_in_any_order() {
    let config = config(1);
    let mut m = membership(&config);
    for seq in [1, 2, 5] {
        assert_eq!(m.hear(ms(seq), 0, &heartbeat(&config, 1, 7, seq)), Ok(()));
    }
    for seq in [5, 4, 1, 0] {
        assert_eq!(
            m.hear(ms(10), 0, &heartbeat(&config, 1, 7, seq)),
            Err(Refusal::Replay),
            "number {seq}"
        );
    }
    assert_eq!(
        m.peer(id(1)).unwrap().heard_at(),
        Some(ms(5)),
        "what is refused proves nothing"
    );
    assert_eq!(m.hear(ms(11), 0, &heartbeat(&config, 1, 7, 6)), Ok(()));
}

#[test]
fn an_old_incarnation_is_refused_and_a_new_one_starts_to_count_anew() {
    let config = config(1);
    let mut m = membership(&config);
    m.hear(ms(1), 0, &heartbeat(&config, 1, 7, 100)).unwrap();
    assert_eq!(m.hear(ms(2), 0, &heartbeat(&config, 1, 6, 101)), Err(Refusal::Replay));
    events(&mut m);
    m.hear(ms(3), 0, &heartbeat(&config, 1, 8, 1)).unwrap();
    assert!(events(&mut m).contains(&Event::PeerAlive {
        peer: id(1),
        restarted: true
    }));
    assert_eq!(m.peer(id(1)).unwrap().incarnation(), Incarnation(8));
    assert_eq!(m.hear(ms(4), 0, &heartbeat(&config, 1, 7, 102)), Err(Refusal::Replay));
    assert_eq!(m.hears(ms(4)), [(id(1), Ack::of(1))]);
}

#[test]
fn a_first_start_is_no_restart() {
    let config = config(1);
    let mut m = membership(&config);
    m.hear(ms(1), 0, &heartbeat(&config, 1, 7, 1)).unwrap();
    assert!(events(&mut m).contains(&Event::PeerAlive {
        peer: id(1),
        restarted: false
    }));
}

#[test]
fn strangers_and_impostors_are_refused() {
    let config = config(2);
    let mut m = membership(&config);
    assert_eq!(m.hear(ms(1), 0, &heartbeat(&config, 0, 7, 1)), Err(Refusal::OwnName));
    let stranger = Heartbeat {
        sender: id(9),
        ..heartbeat(&config, 1, 7, 1)
    };
    assert_eq!(m.hear(ms(1), 0, &stranger), Err(Refusal::UnknownSender));
    assert_eq!(
        m.hear(ms(1), 1, &heartbeat(&config, 2, 7, 1)),
        Err(Refusal::UnknownSender),
        "not on that lan"
    );
    assert_eq!(
        m.hear(ms(1), 7, &heartbeat(&config, 1, 7, 1)),
        Err(Refusal::UnknownSender),
        "no such lan"
    );
    assert_eq!(m.hear(ms(1), 0, &heartbeat(&config, 2, 7, 1)), Ok(()));
}

#[test]
fn a_peer_that_hears_another_incarnation_of_this_node_does_not_hear_it() {
    let config = config(1);
    let mut m = membership(&config);
    let stale = Heartbeat {
        hears: vec![(id(0), Ack::of(41))],
        ..heartbeat(&config, 1, 7, 1)
    };
    m.hear(ms(1), 0, &stale).unwrap();
    assert!(!m.peer(id(1)).unwrap().hears_us());
    assert_eq!(m.peer_state(ms(1), id(1)), Some(PeerState::Suspect));
    assert!(events(&mut m).is_empty());
}

#[test]
fn a_goodbye_is_believed_at_once() {
    let config = config(1);
    let mut m = membership(&config);
    hear_all(&mut m, &config, ms(500));
    assert_eq!(m.view(), set(&[0, 1, 2]));
    events(&mut m);
    let goodbye = Heartbeat {
        leaving: true,
        ..heartbeat(&config, 2, 7, 100)
    };
    m.hear(ms(501), 0, &goodbye).unwrap();
    assert_eq!(m.view(), set(&[0, 1]));
    let down = events(&mut m).into_iter().find_map(|event| match event {
        Event::PeerDown { peer, why, testimony } if peer == id(2) => Some((why, testimony.cause)),
        _ => None,
    });
    assert_eq!(down, Some(("it has left".to_owned(), Cause::Left)));
    assert_eq!(m.peer_state(ms(501), id(2)), Some(PeerState::Down));
    assert!(m.gone(ms(5000)).contains_key(&id(1)));
    assert!(!m.gone(ms(5000)).contains_key(&id(2)), "who left in order is not gone");
}

#[test]
fn silence_is_judged_after_the_detection_time_and_not_before() {
    let config = config(1);
    let mut m = membership(&config);
    hear_all(&mut m, &config, ms(500));
    events(&mut m);
    m.hear(ms(520), 0, &heartbeat(&config, 1, 7, 100)).unwrap();
    assert_eq!(m.poll_timeout(), Some(ms(750)), "250 ms after node 2 was last heard");
    assert_eq!(
        m.endangered_at(ms(520)),
        Some(ms(575)),
        "a pulse and a half after node 2 was last heard"
    );
    assert_eq!(m.endangered(ms(575)), set(&[2]));
    assert_eq!(
        m.peer_state(ms(626), id(2)),
        Some(PeerState::Suspect),
        "more than half of it is over"
    );
    speak(&mut m, 570, 740);
    m.handle_timeout(ms(749));
    assert_eq!(m.view(), set(&[0, 1, 2]));
    assert!(m.gone(ms(749)).is_empty());
    m.handle_timeout(ms(750));
    assert_eq!(
        m.view(),
        set(&[0, 1, 2]),
        "node 1 still hears it: one observer evicts nobody"
    );
    let without = Heartbeat {
        hears: vec![(id(0), NEWEST)],
        ..heartbeat(&config, 1, 7, 101)
    };
    m.hear(ms(760), 0, &without).unwrap();
    assert_eq!(m.view(), set(&[0, 1]));
    assert_eq!(
        m.gone(ms(750)),
        BTreeMap::from([(id(2), ms(500))]),
        "when it was last heard"
    );
    let testimony = |observers: &[usize], talk_with_it: &[usize], silent: u64| Testimony {
        node: id(2),
        cause: Cause::Silent,
        observers: set(observers),
        talk_with_it: set(talk_with_it),
        silent: Some(ms(silent)),
        lans: vec![(0, Some(ms(silent)))],
    };
    assert_eq!(
        events(&mut m),
        [
            Event::PeerDown {
                peer: id(2),
                why: "no heartbeat for 250 ms".to_owned(),
                testimony: testimony(&[0], &[1], 250),
            },
            Event::ViewChanged {
                old: set(&[0, 1, 2]),
                new: set(&[0, 1]),
                out: vec![testimony(&[0, 1], &[], 260)],
            }
        ]
    );
}

#[test]
fn of_a_node_that_steps_out_those_testify_that_do_not_hear_it() {
    let config = config(1);
    let mut m = membership(&config);
    hear_all(&mut m, &config, ms(500));
    events(&mut m);
    for peer in [1, 2] {
        let mut deaf = heartbeat(&config, peer, 7, 100);
        deaf.hears.retain(|(node, _)| *node != id(0));
        m.handle_heartbeat(ms(510), 0, &deaf).unwrap();
    }
    let out = events(&mut m).into_iter().find_map(|event| match event {
        Event::ViewChanged { new, out, .. } if new.is_empty() => Some(out),
        _ => None,
    });
    let out = out.expect("it steps out");
    assert_eq!(out.len(), 1);
    assert_eq!((out[0].node, out[0].cause), (id(0), Cause::LeftOut));
    assert!(out[0].observers.contains(id(1)), "{out:?}");
}

#[test]
fn joining_lasts_a_detection_time_and_a_pulse_and_again_after_a_pause() {
    let config = config(1);
    let mut m = membership(&config);
    assert_eq!(m.poll_timeout(), Some(ms(300)));
    m.handle_timeout(ms(299));
    assert!(m.joining());
    m.handle_timeout(ms(300));
    assert!(!m.joining());
    assert_eq!(events(&mut m), [Event::Joined]);
    m.hear(ms(990), 0, &heartbeat(&config, 1, 7, 1)).unwrap();
    m.handle_pause(ms(1000));
    assert!(m.joining());
    assert_eq!(
        m.heard(ms(1000)),
        NodeSet::EMPTY,
        "what was heard before the pause is void"
    );
    assert_eq!(
        m.hear(ms(1001), 0, &heartbeat(&config, 1, 7, 1)),
        Err(Refusal::Replay),
        "but still known"
    );
    m.handle_timeout(ms(1300));
    assert!(!m.joining());
}

#[test]
fn a_node_that_is_joining_steps_out_for_nobody() {
    let config = config(1);
    let mut m = membership(&config);
    let deaf = |seq| Heartbeat {
        hears: vec![(id(2), Ack::of(7))],
        ..heartbeat(&config, 1, 7, seq)
    };
    m.hear(ms(10), 0, &deaf(1)).unwrap();
    assert_eq!(m.fenced(), None);
    let mut seq = 1;
    for t in (60..=310).step_by(50) {
        seq += 1;
        m.hear(ms(t), 0, &deaf(seq)).unwrap();
    }
    let why = m.fenced().expect("joined, and a peer it hears does not hear it");
    assert_eq!(why, "1 of the nodes it hears do not hear it");
    assert_eq!(m.view(), NodeSet::EMPTY);
    m.hear(ms(320), 0, &heartbeat(&config, 1, 7, 50)).unwrap();
    assert_eq!(m.fenced(), None);
    assert!(m.view().contains(id(1)));
}

#[test]
fn a_node_that_hears_nobody_steps_out_while_it_is_told_that_others_hear_it() {
    let config = config(1);
    let mut m = membership(&config);
    m.hear(ms(10), 0, &heartbeat(&config, 1, 7, 1)).unwrap();
    speak(&mut m, 60, 460);
    assert!(!m.joining() && m.view() == set(&[0]), "alone");
    m.handle_told_deaf(ms(500));
    assert!(m.fenced().is_some_and(|why| why.contains("hears none of them")));
    assert_eq!(m.view(), NodeSet::EMPTY);
    // It believes it for a while, and comes back by itself if nobody says so any more.
    m.handle_timeout(ms(3400));
    assert!(m.fenced().is_some());
    assert_eq!(m.poll_timeout(), Some(ms(3500)));
    m.handle_timeout(ms(3500));
    assert_eq!(m.fenced(), None);
    assert!(m.view().contains(id(0)));
    // Who hears somebody knows better.
    m.handle_told_deaf(ms(3600));
    assert!(m.fenced().is_some());
    m.hear(ms(3700), 0, &heartbeat(&config, 1, 7, 2)).unwrap();
    assert_eq!(m.fenced(), None);
    m.handle_told_deaf(ms(3800));
    assert_eq!(m.fenced(), None);
}

#[test]
fn who_hears_nobody_is_told_by_a_view_of_several() {
    let config = config(1);
    let mut m = membership(&config);
    let mut seq = 0;
    // Node 2 hears nobody after the first 300 ms.
    let mut run = |m: &mut Membership, from: u64, until: u64, with_1: bool| {
        for t in (from..=until).step_by(50) {
            seq += 1;
            let mut beat = heartbeat(&config, 2, 7, seq);
            if t > 300 {
                beat.hears.clear();
            }
            m.hear(ms(t), 0, &beat).unwrap();
            if with_1 {
                m.hear(ms(t), 0, &heartbeat(&config, 1, 7, seq)).unwrap();
            }
        }
    };
    run(&mut m, 10, 290, true);
    assert_eq!((m.view(), m.deaf(ms(290))), (set(&[0, 1, 2]), NodeSet::EMPTY));
    run(&mut m, 310, 1000, true);
    assert_eq!((m.view(), m.deaf(ms(1000))), (set(&[0, 1]), set(&[2])));
    // Of two one is enough to step out: the one that is not heard.
    run(&mut m, 1050, 2000, false);
    assert_eq!((m.view(), m.deaf(ms(2000))), (NodeSet::EMPTY, NodeSet::EMPTY));
    assert!(m.fenced().is_some());
}

#[test]
fn a_node_of_another_cluster_is_not_heard() {
    let config = config(1);
    let mut m = membership(&config);
    hear_all(&mut m, &config, ms(500));
    let other = Heartbeat {
        cluster_digest: config.digest ^ 1,
        ..heartbeat(&config, 2, 7, 100)
    };
    m.hear(ms(510), 0, &other).unwrap();
    assert_eq!(m.view(), set(&[0, 1]));
    assert_eq!(m.heard(ms(510)), set(&[1]));
    assert_eq!(m.peer(id(2)).unwrap().why(ms(510), ms(250)), "its cluster.xml differs");
    m.hear(ms(520), 0, &heartbeat(&config, 2, 7, 101)).unwrap();
    assert_eq!(m.view(), set(&[0, 1, 2]));
}

#[test]
fn the_same_heartbeat_counts_once_on_each_lan_and_a_slower_lan_undoes_nothing() {
    let config = config(2);
    let mut m = membership(&config);
    m.hear(ms(1), 0, &heartbeat(&config, 1, 7, 1)).unwrap();
    assert_eq!(
        m.hear(ms(2), 1, &heartbeat(&config, 1, 7, 1)),
        Ok(()),
        "its copy on the other lan"
    );
    assert_eq!(m.hear(ms(3), 1, &heartbeat(&config, 1, 7, 1)), Err(Refusal::Replay));
    let fenced = Heartbeat {
        fenced: true,
        ..heartbeat(&config, 1, 7, 3)
    };
    m.hear(ms(4), 0, &fenced).unwrap();
    m.hear(ms(5), 1, &heartbeat(&config, 1, 7, 2)).unwrap();
    assert!(m.peer(id(1)).unwrap().fenced(), "number 2 is older news than number 3");
}

#[test]
fn of_two_lans_losing_one_loses_no_node() {
    let config = config(2);
    for lost in 0..2 {
        let mut m = membership(&config);
        for seq in 1..=40 {
            let now = ms(seq * 50);
            for lan in (0..2).filter(|lan| *lan != lost || seq < 20) {
                m.hear(now, lan, &heartbeat(&config, 1, 7, seq)).unwrap();
            }
            m.handle_timeout(now);
            assert!(seq < 2 || m.view().contains(id(1)), "lan {lost} at {now:?}");
        }
    }
}

#[test]
fn of_two_cluster_files_that_of_the_more_nodes_counts_and_the_other_node_steps_out() {
    // (settled with our file besides us, settled with another one) -> fenced
    for (own_id, same, other, fenced) in [
        (1, &[][..], &[0][..], true),
        (0, &[], &[1], false),
        (2, &[0], &[1], false),
        (0, &[], &[1, 2], true),
    ] {
        let config = config(1);
        let mut m = Membership::new(&config, id(own_id), ms(0));
        m.handle_timeout(ms(400));
        assert!(!m.joining());
        for (peers, digest) in [(same, config.digest), (other, config.digest ^ 1)] {
            for peer in peers {
                let hears = vec![(id(own_id), NEWEST)];
                let heartbeat = Heartbeat {
                    hears,
                    cluster_digest: digest,
                    ..heartbeat(&config, *peer, 5, 1)
                };
                m.hear(ms(401), 0, &heartbeat).unwrap();
            }
        }
        assert_eq!(
            m.fenced().is_some(),
            fenced,
            "{own_id} {same:?} {other:?}: {:?}",
            m.fenced()
        );
        if fenced {
            assert!(m.fenced().unwrap().contains("cluster.xml differs"));
            m.handle_timeout(ms(401 + 300));
            assert_eq!(m.fenced(), None, "what is no longer heard no longer counts");
        }
    }
}

#[test]
fn what_a_peer_acknowledges_ends_before_it_may_take_over() {
    let config = config(1);
    let mut m = membership(&config);
    hear_all(&mut m, &config, ms(500));
    events(&mut m);
    // The others are heard, and have heard nothing of this node since what it sent at 500 ms.
    let ack = Ack::of(500_000);
    for (seq, t) in [(100, 550), (101, 600), (102, 650)] {
        for peer in [1, 2] {
            let stale = Heartbeat {
                hears: vec![(id(0), ack), (id(3 - peer), Ack::of(7))],
                ..heartbeat(&config, peer, 7, seq)
            };
            m.hear(ms(t), 0, &stale).unwrap();
        }
        assert_eq!(m.endangered(ms(t)), if t < 575 { NodeSet::EMPTY } else { set(&[1, 2]) });
    }
    assert_eq!(m.poll_timeout(), Some(ms(700)), "a pulse before 750 ms");
    m.handle_timeout(ms(699));
    assert_eq!(m.fenced(), None);
    m.handle_timeout(ms(700));
    assert_eq!(m.fenced(), Some("2 of the nodes it hears do not hear it"));
}

#[test]
fn silence_of_all_is_no_sign_of_being_unheard() {
    let config = config(1);
    let mut m = membership(&config);
    hear_all(&mut m, &config, ms(500));
    speak(&mut m, 550, 740);
    assert_eq!(m.fenced(), None);
    assert_eq!(m.view(), set(&[0, 1, 2]));
    m.handle_timeout(ms(750));
    assert_eq!((m.fenced(), m.view()), (None, set(&[0])));
}

#[test]
fn who_was_not_run_for_a_while_speaks_before_it_judges() {
    let config = config(1);
    let mut m = membership(&config);
    hear_all(&mut m, &config, ms(500));
    speak(&mut m, 550, 650);
    m.handle_timeout(ms(760));
    assert_eq!(m.view(), set(&[0, 1, 2]), "the others may take this node for dead");
    m.note_sent(ms(760), 760_000);
    m.handle_timeout(ms(809));
    assert_eq!(m.view(), set(&[0, 1, 2]));
    m.handle_timeout(ms(810));
    assert_eq!(
        m.view(),
        set(&[0]),
        "a pulse later they have been told that they are not heard"
    );
}

#[test]
fn a_joining_node_that_has_heard_this_one_and_no_longer_does_counts_like_any_other() {
    let config = config(1);
    let joining = |seq: u64, hears: Vec<(NodeId, Ack)>| Heartbeat {
        joining: true,
        hears,
        ..heartbeat(&config, 1, 7, seq)
    };
    let deaf = || (id(2), Ack::of(7));
    let run = |named: bool| {
        let mut m = membership(&config);
        m.hear(ms(400), 0, &heartbeat(&config, 2, 7, 1)).unwrap();
        if named {
            m.hear(ms(400), 0, &joining(1, vec![(id(0), NEWEST), deaf()])).unwrap();
        }
        for (i, t) in (0..).zip((420..1000).step_by(20)) {
            m.hear(ms(t), 0, &joining(2 + i, vec![deaf()])).unwrap();
            m.hear(ms(t), 0, &heartbeat(&config, 2, 7, 2 + i)).unwrap();
        }
        m.view()
    };
    assert_eq!(run(false), set(&[0, 2]), "it may not have come so far");
    assert_eq!(run(true), set(&[0, 1, 2]), "a pair of three, with a hub");
}

#[test]
fn an_echo_tells_the_round_trip() {
    let config = config(1);
    let mut m = membership(&config);
    m.note_sent(ms(10), 5);
    let echo = Echo {
        node: id(0),
        ack: Ack::of(5),
        kept_us: 1500,
    };
    let answer = Heartbeat {
        echo: Some(echo),
        ..heartbeat(&config, 1, 7, 1)
    };
    m.hear(ms(13), 0, &answer).unwrap();
    let rtt = m.peer(id(1)).unwrap().link(0).unwrap().rtt().unwrap();
    assert_eq!(rtt.last, Duration::from_micros(1500));
    let mine = m.echo(ms(20), 0, 0).unwrap();
    assert_eq!((mine.node, mine.ack, mine.kept_us), (id(1), Ack::of(1), 7000));
    assert_eq!(m.echo(ms(400), 0, 0), None, "what is not heard is not answered");
}
