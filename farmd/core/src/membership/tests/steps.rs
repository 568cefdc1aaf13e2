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
