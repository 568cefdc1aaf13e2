//! What becomes of frames for buckets that change hands.

use super::tests::{directed, directed_way, invisible, judge, nodes, way};
use super::*;
use crate::balance::assign::BucketMap;
use crate::balance::test_frames::*;
use crate::id::BUCKETS;

/// What becomes of what starts something in a bucket that changes hands, by whose it is by the known map and by the proposed one.
#[test]
fn what_starts_something_is_kept_or_sent_on_while_its_bucket_is_on_the_move() {
    let whole = |owner: usize| BucketMap::from_bytes(Box::new([id(owner).as_u8(); BUCKETS])).unwrap();
    let way = directed_way();
    let (syn, ack, udp) = (
        way.tcp(4000, 80, Flags::Syn),
        way.tcp(4000, 80, Flags::Ack),
        way.udp(4000, 53, b"?"),
    );
    let from = |member: u8, frame: &[u8]| {
        let mut frame = frame.to_vec();
        frame[6..12].copy_from_slice(&mac(member).0);
        frame
    };
    let to = |nodes_: &[usize]| nodes(nodes_);
    use Verdict::{Accept, Drop, Hold};
    for (what, state, leaving, owner, next, frame, verdict, forward) in [
        (
            "the loser before the commit",
            BucketState::Draining,
            true,
            0,
            Some(1),
            &syn,
            Hold,
            to(&[]),
        ),
        (
            "without connections",
            BucketState::Foreign,
            true,
            0,
            Some(1),
            &syn,
            Hold,
            to(&[]),
        ),
        (
            "a datagram",
            BucketState::Foreign,
            true,
            0,
            Some(1),
            &udp,
            Hold,
            to(&[]),
        ),
        (
            "of a connection",
            BucketState::Foreign,
            true,
            0,
            Some(1),
            &ack,
            Drop,
            to(&[]),
        ),
        (
            "sent on by an entry node",
            BucketState::Foreign,
            true,
            0,
            Some(1),
            &from(2, &syn),
            Hold,
            to(&[]),
        ),
        (
            "the loser after it",
            BucketState::Draining,
            true,
            1,
            None,
            &syn,
            Drop,
            to(&[1]),
        ),
        (
            "sent by an entry node that is behind",
            BucketState::Draining,
            true,
            1,
            None,
            &from(2, &syn),
            Drop,
            to(&[1]),
        ),
        (
            "kept for who has sent it",
            BucketState::Draining,
            true,
            1,
            None,
            &from(1, &syn),
            Hold,
            to(&[]),
        ),
        (
            "the new owner works",
            BucketState::Foreign,
            false,
            1,
            None,
            &from(2, &syn),
            Drop,
            to(&[]),
        ),
        (
            "the winner leaves all to the loser",
            BucketState::Foreign,
            false,
            1,
            Some(0),
            &syn,
            Drop,
            to(&[1]),
        ),
        (
            "but what that hands to it",
            BucketState::Foreign,
            false,
            1,
            Some(0),
            &from(1, &syn),
            Hold,
            to(&[]),
        ),
        (
            "a datagram too",
            BucketState::Foreign,
            false,
            1,
            Some(0),
            &from(1, &udp),
            Hold,
            to(&[]),
        ),
        (
            "it knows no newer map than its own",
            BucketState::Foreign,
            false,
            0,
            None,
            &from(1, &syn),
            Hold,
            to(&[]),
        ),
        (
            "a connection's is not kept",
            BucketState::Foreign,
            false,
            1,
            Some(0),
            &from(1, &ack),
            Drop,
            to(&[]),
        ),
        (
            "a move between others",
            BucketState::Foreign,
            false,
            1,
            Some(2),
            &syn,
            Drop,
            to(&[1]),
        ),
        ("open", BucketState::Own, false, 0, Some(0), &syn, Accept, to(&[])),
    ] {
        let mut plan = directed(state, Some(owner));
        plan.groups[0].next = next.map(whole);
        if leaving {
            plan.groups[0].leaving = (0..BUCKETS).collect();
        }
        let decision = judge(&plan, frame);
        assert_eq!((decision.verdict, decision.forward), (verdict, forward), "{what}");
    }
}

/// Every node sees the frame; the loser alone sends it on, to the winner's own address.
#[test]
fn with_a_virtual_mac_only_the_loser_sends_on() {
    let syn = way().tcp(4000, 80, Flags::Syn);
    let mut plan = invisible(BucketState::Foreign);
    plan.groups[0].owners = BucketMap::from_bytes(Box::new([id(1).as_u8(); BUCKETS])).unwrap();
    assert_eq!(judge(&plan, &syn).forward, NodeSet::EMPTY);
    plan.groups[0].leaving = (0..BUCKETS).collect();
    let decision = judge(&plan, &syn);
    assert_eq!((decision.reason, decision.forward), (Reason::HandedOver, nodes(&[1])));
}
