//! What becomes of frames for buckets that change hands.

use super::tests::{directed, directed_way, invisible, judge, nodes, way};
use super::*;
use crate::balance::assign::BucketMap;
use crate::balance::test_frames::*;
use crate::id::BUCKETS;

/// What becomes of what starts something in a bucket that changes hands, by who has it by the map known here.
#[test]
fn what_starts_something_is_kept_or_sent_on_while_its_bucket_is_on_the_move() {
    use BucketState::{Draining, Foreign, Own};
    use Verdict::{Accept, Drop, Hold};
    let way = directed_way();
    let (syn, ack) = (way.tcp(4000, 80, Flags::Syn), way.tcp(4000, 80, Flags::Ack));
    let udp = way.udp(4000, 53, b"?");
    let from = |member: u8, frame: &[u8]| {
        let mut frame = frame.to_vec();
        frame[6..12].copy_from_slice(&mac(member).0);
        frame
    };
    let expect = |what: &str, state, leaving, owner, frame: &[u8], verdict, forward: &[usize]| {
        let mut plan = directed(state, Some(owner));
        if leaving {
            plan.groups[0].leaving = (0..BUCKETS).collect();
        }
        let decision = judge(&plan, frame);
        assert_eq!(
            (decision.verdict, decision.forward),
            (verdict, nodes(forward)),
            "{what}"
        );
    };
    expect("the loser before the commit", Draining, true, 0, &syn, Hold, &[]);
    expect("without connections", Foreign, true, 0, &syn, Hold, &[]);
    expect("a datagram", Foreign, true, 0, &udp, Hold, &[]);
    expect("of a connection", Foreign, true, 0, &ack, Drop, &[]);
    expect("by an entry node", Foreign, true, 0, &from(2, &syn), Hold, &[]);
    expect("the loser after it", Draining, true, 1, &syn, Drop, &[1]);
    expect("by an entry node behind", Draining, true, 1, &from(2, &syn), Drop, &[1]);
    expect("kept for who has sent it", Draining, true, 1, &from(1, &syn), Hold, &[]);
    expect(
        "the winner leaves all to the loser",
        Foreign,
        false,
        1,
        &syn,
        Drop,
        &[1],
    );
    expect(
        "but what that hands to it",
        Foreign,
        false,
        1,
        &from(1, &syn),
        Hold,
        &[],
    );
    expect("a datagram too", Foreign, false, 1, &from(1, &udp), Hold, &[]);
    expect(
        "a connection's is not kept",
        Foreign,
        false,
        1,
        &from(1, &ack),
        Drop,
        &[],
    );
    expect("open", Own, false, 0, &syn, Accept, &[]);
}

/// Who hands on has not heard that this node has stepped out: another node answers, and this one must not do so later.
#[test]
fn what_is_handed_on_to_a_node_that_is_shut_is_not_kept() {
    let mut syn = directed_way().tcp(4000, 80, Flags::Syn);
    syn[6..12].copy_from_slice(&mac(1).0);
    let mut plan = directed(BucketState::Foreign, Some(0));
    assert_eq!(judge(&plan, &syn).verdict, Verdict::Hold);
    plan.groups[0].shut = true;
    assert_eq!(judge(&plan, &syn).verdict, Verdict::Drop);
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
