use farm_core::balance::assign::BucketMap;
use farm_core::balance::hash::Seed;
use farm_core::balance::plan::{BucketState, GroupPlan, RulePlan};
use farm_core::config::{Affinity, PlaneChoice, Protocol, XdpChoice};
use farm_core::id::BUCKETS;
use farm_sys::clock::BootInstant;

use super::*;

const VIP: [u8; 4] = [198, 18, 0, 20];
const VIRTUAL: MacAddr = MacAddr([0x5a, 0xfe, 198, 18, 0, 20]);
const CLIENT_MAC: MacAddr = MacAddr([2, 0, 0, 0, 0, 0x99]);
const SYN: u8 = 0x02;
const ACK: u8 = 0x10;

const TIMING_PULSE: Duration = Duration::from_millis(50);
const TIMING_DETECTION: Duration = Duration::from_millis(250);

fn id(i: usize) -> NodeId {
    NodeId::new(i).unwrap()
}

fn mac(i: u8) -> MacAddr {
    MacAddr([2, 0, 0, 0, 0, i])
}

/// A recorder whose loop began `ago` before now, so that a take-over can be told in the past tense.
fn recorder(ago: Duration) -> Recorder {
    let timing = Timing {
        start: BootInstant::now().saturating_sub(ago),
        pulse: TIMING_PULSE,
        detection: TIMING_DETECTION,
    };
    Recorder::new(timing, Arc::default())
}

/// Node 0's plan: every bucket is `owner`'s.
fn plan(mode: L2Mode, owner: usize) -> Plan {
    let state = if owner == 0 {
        BucketState::Own
    } else {
        BucketState::Foreign
    };
    let byte = u8::try_from(owner).unwrap();
    Plan {
        version: 1,
        this: id(0),
        seed: Seed::default(),
        vips: vec![VipPlan {
            addr: VIP.into(),
            interface: 1,
            own_mac: mac(0),
            mode,
            entry_group: 0,
            rules: [RulePlan {
                protocol: Protocol::Tcp,
                first_port: 80,
                last_port: 80,
                affinity: Affinity::ClientPort,
                group: 0,
            }]
            .into(),
            peers: BTreeMap::from([(id(1), mac(1)), (id(2), mac(2))]),
            choice: PlaneChoice::Auto,
            xdp: XdpChoice::Auto,
            arp_reroute: None,
        }],
        groups: vec![GroupPlan {
            states: Box::new([state; BUCKETS]),
            owners: BucketMap::from_bytes(Box::new([byte; BUCKETS])).unwrap(),
            ..GroupPlan::closed("web/g".into())
        }],
        gone: BTreeMap::new(),
    }
}

/// `plan` after node 1 fell silent, last heard at `heard`: it is no peer any more.
fn without_1(mut plan: Plan, heard: Duration) -> Plan {
    plan.gone.insert(id(1), heard);
    plan.vips[0].peers.remove(&id(1));
    plan
}

/// A TCP segment to port 80 of the VIP behind its `virtio_net_hdr`.
fn segment(from: MacAddr, to: MacAddr, port: u16, flags: u8) -> Vec<u8> {
    let mut frame = vec![0; VNET];
    frame.extend(to.0);
    frame.extend(from.0);
    frame.extend([8, 0]);
    frame.extend([0x45, 0, 0, 40, 0, 1, 0, 0, 64, 6, 0, 0, 198, 18, 0, 100]);
    frame.extend(VIP);
    frame.extend(port.to_be_bytes());
    frame.extend([0, 80, 0, 0, 0, 7, 0, 0, 0, 0, 0x50, flags, 0x20, 0, 0, 0, 0, 0]);
    frame
}

fn port_of(frame: &[u8]) -> u16 {
    u16::from_be_bytes([frame[VNET + 34], frame[VNET + 35]])
}

impl Recorder {
    /// Records a segment that came in at `at` of the loop's time.
    fn note(&mut self, plan: &Plan, at: Duration, mut bytes: Vec<u8>) {
        self.learn_peers(plan);
        let at = self.timing.start + at;
        self.record(plan, at, &mut bytes);
    }

    fn due(&mut self, plan: &Plan) -> Vec<Due> {
        self.take_due(plan, &mut |_| false)
    }

    fn count(&self, count: Count) -> u64 {
        self.counters.read()[&format!("dataplane_{}", count.name())]
    }
}

const fn ms(n: u64) -> Duration {
    Duration::from_millis(n)
}

const INVISIBLE: L2Mode = L2Mode::Invisible(VIRTUAL);

#[test]
fn what_came_after_the_node_was_last_heard_goes_to_the_stack_once_and_in_order() {
    let mut recorder = recorder(ms(1300));
    let before = plan(INVISIBLE, 1);
    for (port, at) in [(4003, 1150), (4001, 1000), (4002, 1001), (4000, 800)] {
        recorder.note(&before, ms(at), segment(CLIENT_MAC, VIRTUAL, port, SYN));
    }
    let seen = without_1(before, ms(1000));
    assert_eq!(recorder.due(&seen), [], "its buckets are still nobody else's");
    let opened = without_1(plan(INVISIBLE, 0), ms(1000));
    let due = recorder.due(&opened);
    let ports: Vec<u16> = due.iter().map(|d| port_of(&d.frame)).collect();
    // 4000 came in long before node 1 was last heard: node 1 has had it.
    assert_eq!(ports, [4001, 4002, 4003]);
    assert!(due.iter().all(|d| d.to == To::Stack { opens: None }));
    assert_eq!(recorder.due(&opened), [], "each at most once");
    assert_eq!(
        (
            recorder.count(Count::ReplayRecorded),
            recorder.count(Count::ReplayAccepted),
            recorder.count(Count::ReplayExpired)
        ),
        (4, 3, 1)
    );
}

#[test]
fn what_a_live_node_was_to_answer_is_never_replayed() {
    let mut recorder = recorder(ms(1300));
    recorder.note(&plan(INVISIBLE, 2), ms(1100), segment(CLIENT_MAC, VIRTUAL, 4000, SYN));
    // Node 2 hands its buckets over while node 1 is gone.
    assert_eq!(recorder.due(&without_1(plan(INVISIBLE, 0), ms(1000))), []);
    // And a plan without anybody gone, as after a stop.
    assert_eq!(recorder.due(&plan(INVISIBLE, 0)), []);
}

#[test]
fn a_request_of_which_every_node_has_a_copy_is_left_to_the_new_owner() {
    let mut recorder = recorder(ms(1300));
    recorder.note(&plan(INVISIBLE, 1), ms(1100), segment(CLIENT_MAC, VIRTUAL, 4000, SYN));
    assert_eq!(recorder.due(&without_1(plan(INVISIBLE, 2), ms(1000))), []);
    let handed_on = without_1(plan(INVISIBLE, 0), ms(1000));
    assert_eq!(recorder.due(&handed_on), [], "node 2 has answered it meanwhile");
}

#[test]
fn only_whole_connection_requests_of_clients_to_the_vip_are_kept() {
    let mut recorder = recorder(ms(1300));
    let invisible = plan(INVISIBLE, 1);
    let mut fragment = segment(CLIENT_MAC, VIRTUAL, 4000, SYN);
    fragment[VNET + 20] = 0x20;
    let mut other_port = segment(CLIENT_MAC, VIRTUAL, 4000, SYN);
    other_port[VNET + 37] = 81;
    for (what, frame) in [
        ("an ACK", segment(CLIENT_MAC, VIRTUAL, 4000, ACK)),
        ("a SYN-ACK", segment(CLIENT_MAC, VIRTUAL, 4000, SYN | ACK)),
        ("from a member", segment(mac(2), VIRTUAL, 4000, SYN)),
        ("to another address", segment(CLIENT_MAC, mac(1), 4000, SYN)),
        ("a fragment", fragment),
        ("without a rule", other_port),
        (
            "cut short",
            segment(CLIENT_MAC, VIRTUAL, 4000, SYN)[..VNET + 40].to_vec(),
        ),
        ("nothing", Vec::new()),
    ] {
        recorder.note(&invisible, ms(1100), frame);
        assert!(recorder.records.is_empty(), "{what}");
    }
    recorder.note(&plan(INVISIBLE, 0), ms(1100), segment(CLIENT_MAC, VIRTUAL, 4000, SYN));
    assert!(recorder.records.is_empty(), "this node answers by itself");
    recorder.note(&invisible, ms(1100), segment(CLIENT_MAC, VIRTUAL, 4000, SYN));
    assert_eq!(recorder.records.len(), 1);
}

#[test]
fn an_entry_node_sends_on_to_the_new_owner_what_it_had_sent_to_the_dead_one() {
    let mut recorder = recorder(ms(1300));
    recorder.note(
        &plan(L2Mode::Directed, 1),
        ms(1100),
        segment(CLIENT_MAC, mac(0), 4000, SYN),
    );
    recorder.note(
        &plan(L2Mode::Directed, 1),
        ms(1110),
        segment(CLIENT_MAC, mac(0), 4001, SYN),
    );
    let opened = without_1(plan(L2Mode::Directed, 2), ms(1000));
    let due = recorder.due(&opened);
    assert_eq!(due.iter().map(|d| d.to).collect::<Vec<_>>(), [To::Member(id(2)); 2]);
    assert_eq!(recorder.due(&opened), [], "each at most once");
    assert_eq!(recorder.count(Count::ReplaySentOn), 2);
}

#[test]
fn what_was_sent_to_a_dead_entry_node_and_flooded_is_answered_by_the_owner_alone() {
    for (owner, answered) in [(0, true), (2, false)] {
        let mut recorder = recorder(ms(1300));
        let before = plan(L2Mode::Directed, owner);
        recorder.note(&before, ms(1100), segment(CLIENT_MAC, mac(1), 4000, SYN));
        // Node 1 is no peer any more when this one comes in, and still known.
        let after = without_1(before, ms(1000));
        recorder.note(&after, ms(1260), segment(CLIENT_MAC, mac(1), 4001, SYN));
        let due = recorder.due(&after);
        let expected: &[u16] = if answered { &[4000, 4001] } else { &[] };
        assert_eq!(due.iter().map(|d| port_of(&d.frame)).collect::<Vec<_>>(), expected);
        assert!(
            due.iter().all(|d| d.frame[VNET..VNET + 6] == mac(0).0),
            "to this node now"
        );
    }
}

#[test]
fn clients_of_a_dead_entry_node_hear_of_another_one_before_they_are_answered() {
    let mut recorder = recorder(ms(1300));
    let before = plan(L2Mode::Directed, 0);
    recorder.note(&before, ms(1100), segment(CLIENT_MAC, mac(1), 4000, SYN));
    let mut seen = without_1(before.clone(), ms(1000));
    // Some other client's bucket, and with it its entry, is still the dead node's.
    let mut owners = [0; BUCKETS];
    let bucket = decide_bucket(&before, 4000);
    owners[(bucket + 1) % BUCKETS] = 1;
    seen.groups[0].owners = BucketMap::from_bytes(Box::new(owners)).unwrap();
    assert_eq!(recorder.due(&seen), []);
    assert_eq!(recorder.due(&without_1(before, ms(1000))).len(), 1);
}

fn decide_bucket(plan: &Plan, port: u16) -> usize {
    farm_core::balance::hash::bucket_of_port(plan.seed, [198, 18, 0, 100].into(), port).index()
}

#[test]
fn a_node_that_left_in_order_is_forgotten() {
    let mut recorder = recorder(ms(1300));
    recorder.note(
        &plan(L2Mode::Directed, 0),
        ms(1000),
        segment(CLIENT_MAC, mac(1), 4000, SYN),
    );
    assert_eq!(recorder.records.len(), 1);
    let mut left = plan(L2Mode::Directed, 0);
    left.vips[0].peers.remove(&id(1));
    recorder.note(&left, ms(1100), segment(CLIENT_MAC, mac(1), 4001, SYN));
    assert_eq!(recorder.records.len(), 1, "its address is nobody's");
    assert_eq!(recorder.due(&left), []);
}

#[test]
fn known_flows_are_left_alone_and_of_repeated_requests_the_newest_counts() {
    let mut recorder = recorder(ms(1300));
    let before = plan(INVISIBLE, 1);
    for (port, at) in [(4000, 1010), (4001, 1020), (4000, 1030), (4002, 1040)] {
        recorder.note(&before, ms(at), segment(CLIENT_MAC, VIRTUAL, port, SYN));
    }
    let opened = without_1(plan(INVISIBLE, 0), ms(1000));
    let due = recorder.take_due(&opened, &mut |flow| flow.client_port == 4002);
    let ports: Vec<u16> = due.iter().map(|d| port_of(&d.frame)).collect();
    assert_eq!(ports, [4001, 4000]);
    assert!(recorder.records.is_empty());
}

#[test]
fn a_request_whose_bucket_nobody_has_opened_yet_waits_for_it() {
    let mut recorder = recorder(ms(1300));
    let before = plan(INVISIBLE, 1);
    recorder.note(&before, ms(1100), segment(CLIENT_MAC, VIRTUAL, 4000, SYN));
    let opened = without_1(plan(INVISIBLE, 0), ms(1000));
    assert_eq!(recorder.due(&without_1(before, ms(1000))), []);
    assert_eq!(recorder.due(&opened).len(), 1);
}

#[test]
fn records_expire_and_their_number_is_bounded() {
    let mut recorder = recorder(ms(5000));
    let before = plan(INVISIBLE, 1);
    recorder.note(&before, ms(1000), segment(CLIENT_MAC, VIRTUAL, 4000, SYN));
    recorder.note(&before, ms(1001), segment(CLIENT_MAC, VIRTUAL, 4001, SYN));
    let keep = recorder.keep();
    let start = recorder.timing.start;
    recorder.expire(start + ms(1000) + keep);
    assert_eq!(recorder.records.len(), 2);
    recorder.expire(start + ms(1001) + keep);
    assert_eq!(recorder.records.len(), 1);
    recorder.forget();
    assert_eq!((recorder.records.len(), recorder.count(Count::ReplayExpired)), (0, 2));
    for i in 0..CAPACITY + 3 {
        let port = (i % 60_000) as u16;
        recorder.note(&before, ms(4000), segment(CLIENT_MAC, VIRTUAL, port, SYN));
    }
    assert_eq!(recorder.records.len(), CAPACITY);
    assert_eq!(port_of(&recorder.records[0].frame), 3, "the oldest goes first");
    assert_eq!(recorder.count(Count::ReplayOverflow), 3);
}
