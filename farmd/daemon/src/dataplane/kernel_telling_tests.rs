//! The twin that tells of frames against the ordinary program: the same verdicts, bytes and counters, and the truth about them.

use farm_sys::bpf::trace::{Event, Outcome};
use farm_sys::clock::BootInstant;

use super::*;

/// Shorter than some of the frames.
const SNAP: u32 = 74;

/// What the twin did and told.
struct Told {
    run: DryRun,
    counted: Vec<usize>,
    event: Option<Happened>,
}

/// An event with bytes of its own.
#[derive(Debug)]
struct Happened {
    ifindex: u32,
    length: u32,
    outcome: Outcome,
    why: usize,
    place: Option<(u16, u16)>,
    owner: Option<u8>,
    sent_to: NodeSet,
    bytes: Vec<u8>,
}

impl From<Event<'_>> for Happened {
    fn from(event: Event<'_>) -> Self {
        Self {
            ifindex: event.ifindex,
            length: event.length,
            outcome: event.outcome,
            why: event.why,
            place: event.place,
            owner: event.owner,
            sent_to: NodeSet::from_bits(event.sent_to),
            bytes: event.bytes.to_vec(),
        }
    }
}

impl Bench {
    fn tell(&mut self, frame: &[u8]) -> Told {
        self.kernel.tell(Some(SNAP)).unwrap();
        let mut events = self.kernel.events().unwrap();
        let (run, counted) = self.run(frame);
        let mut told: Vec<Happened> = Vec::new();
        events.read(64, |event| told.push(event.into()));
        self.kernel.tell(None).unwrap();
        // A copy that goes on leaves by the loopback interface, and so comes in again, after the frame itself.
        told.reverse();
        let copies = told.last().map_or(0, |first| first.sent_to.len());
        assert!(told.len() <= 1 + copies, "one frame, one event: {told:?}");
        Told {
            run,
            counted,
            event: told.pop(),
        }
    }
}

impl Bench {
    /// Panics unless the twin does with `frame` what the ordinary program does, and tells what the core decides by `plan`, which is installed. Returns what became
    /// of it, and to how many members it went.
    fn compare_told(&mut self, plan: &Plan, frame: &[u8]) -> Option<(Outcome, usize)> {
        let packet = Packet::parse(frame);
        let fragments = &mut self.fragments;
        let decision = packet
            .as_ref()
            .map(|packet| decide(plan, packet, fragments, Duration::ZERO, &mut |_| false));
        let (run, counted) = self.run(frame);
        let told = self.tell(frame);
        let context = || format!("{:?} {run:?} {counted:?} {decision:?} {frame:02x?}", told.event);
        assert_eq!(
            (told.run.code, &told.run.frame),
            (run.code, &run.frame),
            "{}",
            context()
        );
        assert_eq!(told.counted, counted, "{}", context());
        let Some(event) = &told.event else {
            assert_eq!(run.code, UNSPEC, "{}", context());
            return None;
        };
        let went_on = counted.contains(&(Count::Forwarded as usize));
        let outcome = match run.code {
            SHOT if went_on => Outcome::SentOn,
            SHOT => Outcome::Dropped,
            REDIRECT if counted.contains(&(Count::Punted as usize)) => Outcome::LeftToFarmd,
            OK | REDIRECT if counted.contains(&(Count::BytesAccepted as usize)) => Outcome::Accepted,
            REDIRECT => Outcome::SentOn,
            other => panic!("{other}: {}", context()),
        };
        assert_eq!(event.outcome, outcome, "{}", context());
        assert!(counted.contains(&event.why), "{}", context());
        let bare = without_tags(frame);
        let expected = &bare[..bare.len().min(SNAP as usize)];
        assert_eq!(
            (event.length as usize, &event.bytes[..]),
            (bare.len(), expected),
            "{}",
            context()
        );
        assert_eq!(event.ifindex, INTERFACE);
        let placed = matches!(outcome, Outcome::Accepted | Outcome::SentOn);
        assert!(event.place.is_some() || !placed, "{}", context());
        if let Some((packet, decision)) = packet.as_ref().zip(decision.as_ref())
            && let Some(place) = event.place
        {
            let expected = decision
                .place
                .map(|(group, bucket)| (group as u16, bucket.index() as u16));
            assert_eq!(Some(place), expected, "{}", context());
            assert_eq!(event.owner, decision.owner.map(|owner| owner.as_u8()), "{}", context());
            if outcome != Outcome::LeftToFarmd {
                let peers = &plan.vip(packet.destination).unwrap().peers;
                let known: NodeSet = decision.forward.iter().filter(|to| peers.contains_key(to)).collect();
                assert_eq!(event.sent_to, known, "{}", context());
                let lost = outcome == Outcome::Dropped && !decision.forward.is_empty();
                let reason = Reason::ALL.iter().position(|r| *r == decision.reason).unwrap();
                let why = if lost { Count::ForwardUnknown as usize } else { reason };
                assert_eq!(event.why, why, "{}", context());
            }
        }
        Some((outcome, event.sent_to.len()))
    }
}

#[test]
fn the_twin_does_the_same_and_tells_what_that_was() {
    let first = plan_of(
        vip(),
        INVISIBLE,
        Affinity::ClientIp,
        vec![group(BucketState::Own, Some(0))],
    );
    let Some(mut bench) = Bench::new(&first) else { return };
    let mut outcomes = std::collections::BTreeMap::<String, usize>::new();
    for (addr, mode, held) in [
        (vip(), INVISIBLE, false),
        (vip(), L2Mode::Directed, false),
        (vip(), L2Mode::Directed, true),
        (vip6(), L2Mode::Directed, true),
    ] {
        let service = if mode == L2Mode::Directed { OWN_MAC } else { VIRTUAL_MAC };
        for (state, owner) in STATES
            .into_iter()
            .flat_map(|s| [Some(0), Some(1), Some(9), None].map(|o| (s, o)))
        {
            let mut one = group(state, owner);
            if held {
                // Some of them are not known.
                let sets: [&[usize]; 4] = [&[1, 2], &[0, 2, 9], &[9], &[0]];
                let holders = (0..BUCKETS).map(|i| (i, sets[i % 4].iter().map(|n| id(*n)).collect()));
                one.holders = holders.collect();
            }
            let plan = plan_of(
                addr,
                mode,
                Affinity::ClientPort,
                vec![one, group(BucketState::Foreign, Some(2))],
            );
            bench.kernel.install(&plan, &[]);
            for (to, from) in [(service, CLIENT_MAC), (OWN_MAC, mac(1))] {
                bench.identification += 20;
                for frame in frames_for(addr, to, from, bench.identification) {
                    if let Some((outcome, copies)) = bench.compare_told(&plan, &frame) {
                        *outcomes.entry(format!("{outcome:?} to {copies}")).or_default() += 1;
                    }
                }
            }
        }
    }
    for seen in [
        "Accepted to 0",
        "Accepted to 1",
        "Dropped to 0",
        "LeftToFarmd to 0",
        "SentOn to 1",
        "SentOn to 2",
    ] {
        assert!(outcomes.contains_key(seen), "{seen}: {outcomes:?}");
    }
}

#[test]
fn past_the_lease_it_went_nowhere() {
    let plan = plan_of(
        vip(),
        L2Mode::Directed,
        Affinity::ClientIp,
        vec![
            group(BucketState::Foreign, Some(1)),
            group(BucketState::Foreign, Some(2)),
        ],
    );
    let Some(mut bench) = Bench::new(&plan) else { return };
    bench.kernel.install(&plan, &[]);
    let frame = Way::new(client(1), vip(), OWN_MAC).tcp(4000, 80, Flags::Ack);
    let told = bench.tell(&frame).event.unwrap();
    assert_eq!(
        (told.outcome, told.sent_to),
        (Outcome::SentOn, [id(1)].into_iter().collect())
    );
    bench.kernel.lease().renew(BootInstant::now().as_nanos());
    let told = bench.tell(&frame).event.unwrap();
    assert_eq!((told.outcome, told.why), (Outcome::Dropped, Count::LeaseEnded as usize));
    assert!(told.sent_to.is_empty(), "{told:?}");
    let (run, counted) = bench.run(&frame);
    assert_eq!((run.code, counted), (SHOT, vec![Count::LeaseEnded as usize]));
}

#[test]
fn what_there_is_no_room_for_is_counted() {
    let plan = plan_of(
        vip(),
        INVISIBLE,
        Affinity::ClientIp,
        vec![group(BucketState::Own, Some(0))],
    );
    let Some(mut bench) = Bench::new(&plan) else { return };
    bench.kernel.install(&plan, &[]);
    bench.kernel.tell(Some(2048)).unwrap();
    let mut events = bench.kernel.events().unwrap();
    let frame = Way::new(client(1), vip(), VIRTUAL_MAC).udp(4000, 53, &[7; 1400]);
    const RUNS: u32 = 2000;
    bench.kernel.filter().dry_run(&frame, RUNS).unwrap();
    let mut whole = 0;
    // Each dry run gets the frame as the one before has addressed it.
    let read = events.read(RUNS as usize, |event| {
        whole += usize::from(event.bytes[6..] == frame[6..])
    });
    assert_eq!(read, whole, "none is cut");
    let untold = events.untold();
    assert!(read > 100 && untold > 100, "{read} told, {untold} not");
    assert_eq!(read as u64 + untold, u64::from(RUNS));
    assert_eq!(events.untold(), 0, "counted once");
}
