//! Ways through the tables of [`step`] that the other tests do not go.

use super::*;

/// Hears a settled `peer` that has another `cluster.xml`.
fn hear_other_file(m: &mut Membership, config: &ClusterConfig, now: Duration, peer: usize) {
    let other = Heartbeat {
        cluster_digest: config.digest ^ 1,
        ..heartbeat(config, peer, 5, 1)
    };
    m.hear(now, 0, &other).unwrap();
}

/// What was told of peers.
fn told_of_peers(m: &mut Membership) -> Vec<Event> {
    let of_peers = |event: &Event| matches!(event, Event::PeerAlive { .. } | Event::PeerDown { .. });
    events(m).into_iter().filter(of_peers).collect()
}

#[test]
fn a_joining_node_with_another_file_is_out_and_its_joining_goes_on() {
    let config = config(1);
    let mut m = Membership::new(&config, id(1), ms(0));
    hear_other_file(&mut m, &config, ms(10), 0);
    assert_eq!((m.phase(), m.view()), (Phase::JoiningOut, NodeSet::EMPTY));
    m.handle_timeout(ms(259));
    assert_eq!(m.phase(), Phase::JoiningOut);
    m.handle_timeout(ms(260));
    assert_eq!((m.phase(), m.view()), (Phase::Joining, set(&[1])), "not heard any more");
    hear_other_file(&mut m, &config, ms(270), 2);
    assert_eq!(m.phase(), Phase::JoiningOut);
    m.handle_timeout(ms(300));
    assert_eq!(m.phase(), Phase::Member, "of two files that of the lowest node counts");
    let changes = events(&mut m).into_iter().filter_map(|event| match event {
        Event::Fenced(why) => Some(why.is_some()),
        Event::Joined => None,
        event => Some(matches!(event, Event::ViewChanged { new, .. } if new.is_empty())),
    });
    // The view, and that it is out or back.
    let changes: Vec<bool> = changes.collect();
    assert_eq!(changes, [true, true, false, false, true, true, false, false]);
}

#[test]
fn a_pause_does_not_bring_a_node_back_but_what_it_forgets_does() {
    let config = config(1);
    let mut m = membership(&config);
    m.handle_timeout(ms(400));
    for peer in [1, 2] {
        hear_other_file(&mut m, &config, ms(401), peer);
    }
    assert_eq!(m.phase(), Phase::Out);
    events(&mut m);
    m.handle_pause(ms(402));
    assert_eq!((m.phase(), m.view()), (Phase::Joining, set(&[0])));
    assert_eq!(events(&mut m).last(), Some(&Event::Fenced(None)));
    m.handle_told_deaf(ms(403));
    assert_eq!(m.phase(), Phase::JoiningOut);
    m.handle_pause(ms(404));
    assert_eq!(m.phase(), Phase::JoiningOut, "it is deaf still");
    m.handle_timeout(ms(704));
    assert_eq!(m.phase(), Phase::Out);
}

/// A node that has heard both peers until 400 ms, and speaks on until `until`.
fn left_alone(config: &ClusterConfig, until: u64) -> Membership {
    let mut m = membership(config);
    hear_all(&mut m, config, ms(400));
    speak(&mut m, 450, until);
    events(&mut m);
    m
}

#[test]
fn a_node_to_which_nothing_comes_in_steps_out_when_it_would_be_alone_and_comes_back_with_the_first_heartbeat() {
    let config = config(1);
    let mut m = left_alone(&config, 450);
    assert_eq!((m.view(), m.silent_since()), (set(&[0, 1, 2]), Some(ms(400))));
    for t in [500, 550, 600] {
        speak(&mut m, t, t);
        m.handle_nothing_in(ms(t));
        assert_eq!(m.phase(), Phase::Member, "it may hear somebody yet");
    }
    m.handle_nothing_in(ms(650));
    assert_eq!((m.phase(), m.view()), (Phase::Out, NodeSet::EMPTY));
    assert!(m.fenced().is_some_and(|why| why.starts_with("nothing at all comes in")));
    // As long as it is told so, and two pulses.
    speak(&mut m, 650, 700);
    m.handle_nothing_in(ms(700));
    m.handle_something_in(ms(740));
    let mut back = m.clone();
    assert_eq!(
        (m.phase(), m.poll_timeout()),
        (Phase::Out, Some(ms(800))),
        "the others may be heard next"
    );
    m.handle_timeout(ms(800));
    assert_eq!(
        (m.phase(), m.view(), m.waits()),
        (Phase::Member, set(&[0]), true),
        "nobody was"
    );
    m.handle_timeout(ms(900));
    assert!(!m.waits());
    for peer in [1, 2] {
        back.hear(ms(750), 0, &heartbeat(&config, peer, 7, 1000)).unwrap();
    }
    assert_eq!(
        (back.phase(), back.view(), back.waits()),
        (Phase::Member, set(&[0, 1, 2]), false)
    );
}

#[test]
fn a_node_that_was_not_run_has_missed_nothing() {
    let config = config(1);
    let mut m = left_alone(&config, 400);
    m.handle_pause(ms(900));
    assert_eq!((m.phase(), m.silent_since()), (Phase::Joining, Some(ms(900))));
}

#[test]
fn what_comes_in_before_the_others_are_given_up_makes_a_node_alone_at_once() {
    let config = config(1);
    let mut m = left_alone(&config, 600);
    m.handle_nothing_in(ms(600));
    m.handle_something_in(ms(645));
    m.handle_timeout(ms(650));
    assert_eq!((m.phase(), m.view()), (Phase::Member, set(&[0])));
}

#[test]
fn nothing_is_missed_where_nobody_was_heard_or_all_have_left() {
    let config = config(1);
    assert_eq!(membership(&config).silent_since(), None);
    let mut m = left_alone(&config, 400);
    for peer in [1, 2] {
        let goodbye = Heartbeat {
            leaving: true,
            ..heartbeat(&config, peer, 7, 1000)
        };
        m.hear(ms(420), 0, &goodbye).unwrap();
    }
    assert_eq!(m.silent_since(), None);
}

#[test]
fn a_node_that_comes_back_among_others_that_may_have_been_cut_off_too_takes_nothing_for_two_pulses() {
    let config = config(1);
    let mut m = left_alone(&config, 600);
    m.handle_nothing_in(ms(640));
    m.handle_timeout(ms(650));
    assert_eq!(m.phase(), Phase::Out);
    let cut_off = Heartbeat {
        fenced: true,
        hears: Vec::new(),
        ..heartbeat(&config, 1, 7, 1000)
    };
    m.hear(ms(680), 0, &cut_off).unwrap();
    assert_eq!((m.phase(), m.view(), m.waits()), (Phase::Member, set(&[0]), true));
    m.handle_timeout(ms(780));
    assert!(!m.waits());
}

#[test]
fn a_node_that_does_not_hear_this_one_is_told_before_it_can_take_over() {
    let config = config(1);
    let mut m = left_alone(&config, 400);
    // Node 2 speaks on, and what it acknowledges stays what it was; node 1 hears and is heard.
    let last = Ack::of(400_000);
    for (seq, t) in (1001_u64..).zip((460..=660).step_by(50)) {
        let stale = Heartbeat {
            hears: vec![(id(0), last), (id(1), Ack::of(7))],
            ..heartbeat(&config, 2, 7, seq)
        };
        m.hear(ms(t), 0, &stale).unwrap();
        m.hear(ms(t), 0, &heartbeat(&config, 1, 7, seq)).unwrap();
        // The detection time after that heartbeat was sent node 2 can take over.
        assert_eq!(m.deaf(ms(t)).contains(id(2)), t >= 400 + 200, "{t} ms");
    }
}

#[test]
fn of_a_peer_that_has_restarted_nothing_is_told_until_it_hears_this_node() {
    let config = config(1);
    let mut m = membership(&config);
    hear_all(&mut m, &config, ms(500));
    events(&mut m);
    let deaf = Heartbeat {
        hears: vec![(id(2), Ack::of(7))],
        ..heartbeat(&config, 1, 8, 1)
    };
    m.hear(ms(510), 0, &deaf).unwrap();
    assert_eq!(m.peer_state(ms(510), id(1)), Some(PeerState::Suspect));
    assert!(told_of_peers(&mut m).is_empty());
    m.hear(ms(520), 0, &heartbeat(&config, 1, 8, 2)).unwrap();
    let alive = Event::PeerAlive {
        peer: id(1),
        restarted: true,
    };
    assert_eq!(told_of_peers(&mut m), [alive]);
}
