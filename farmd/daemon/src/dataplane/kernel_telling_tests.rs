//! The twin that tells of frames against the ordinary program: the same verdicts, bytes and counters, and the truth about them.

use farm_sys::bpf::trace::{Event, Outcome};

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
    sent_on: bool,
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
            sent_on: event.sent_on,
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
        events.read(3, |event| told.push(event.into()));
        self.kernel.tell(None).unwrap();
        // A copy that goes on leaves by the loopback interface, and so comes in again, after the frame itself.
        told.reverse();
        let copies = told.last().map_or(0, |first| usize::from(first.sent_on));
        assert!(told.len() <= 1 + copies, "one frame, one event: {told:?}");
        Told {
            run,
            counted,
            event: told.pop(),
        }
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
    for (addr, mode) in [
        (vip(), INVISIBLE),
        (vip(), L2Mode::Directed),
        (vip6(), L2Mode::Directed),
    ] {
        let service = if mode == L2Mode::Directed { OWN_MAC } else { VIRTUAL_MAC };
        for (state, owner) in STATES
            .into_iter()
            .flat_map(|s| [Some(0), Some(1), Some(9), None].map(|o| (s, o)))
        {
            let groups = vec![group(state, owner), group(BucketState::Foreign, Some(2))];
            let plan = plan_of(addr, mode, Affinity::ClientPort, groups);
            bench.kernel.install(&plan, &[]);
            for (to, from) in [(service, CLIENT_MAC), (OWN_MAC, mac(1))] {
                for frame in frames_for(addr, to, from) {
                    let (run, counted) = bench.run(&frame);
                    let told = bench.tell(&frame);
                    let context = || format!("{:?} {run:?} {counted:?} {frame:02x?}", told.event);
                    assert_eq!(
                        (told.run.code, &told.run.frame),
                        (run.code, &run.frame),
                        "{}",
                        context()
                    );
                    assert_eq!(told.counted, counted, "{}", context());
                    let Some(event) = &told.event else {
                        assert_eq!(run.code, UNSPEC, "{}", context());
                        continue;
                    };
                    let outcome = match run.code {
                        SHOT => Outcome::Dropped,
                        REDIRECT if counted.contains(&(Count::Punted as usize)) => Outcome::LeftToFarmd,
                        REDIRECT if counted.contains(&(Count::BytesAccepted as usize)) => Outcome::Accepted,
                        REDIRECT => Outcome::SentOn,
                        other => panic!("{other}: {}", context()),
                    };
                    assert_eq!(event.outcome, outcome, "{}", context());
                    assert!(counted.contains(&event.why), "{}", context());
                    let went_on = counted.contains(&(Count::Forwarded as usize));
                    assert_eq!(event.sent_on, went_on, "{}", context());
                    let expected = &frame[..frame.len().min(SNAP as usize)];
                    assert_eq!(
                        (event.length as usize, &event.bytes[..]),
                        (frame.len(), expected),
                        "{}",
                        context()
                    );
                    assert_eq!(event.ifindex, INTERFACE);
                    let mut fragments = FragmentTable::default();
                    let packet = Packet::parse(&frame);
                    let decision = packet.map(|p| decide(&plan, &p, &mut fragments, Duration::ZERO, &mut |_| false));
                    if let (Some(place), Some(decision)) = (event.place, &decision) {
                        let expected = decision
                            .place
                            .map(|(group, bucket)| (group as u16, bucket.index() as u16));
                        assert_eq!(Some(place), expected, "{}", context());
                        assert_eq!(event.owner, decision.owner.map(|owner| owner.as_u8()), "{}", context());
                    }
                    let placed = matches!(outcome, Outcome::Accepted | Outcome::SentOn);
                    assert!(event.place.is_some() || !placed, "{}", context());
                    *outcomes.entry(format!("{outcome:?}")).or_default() += 1;
                }
            }
        }
    }
    assert_eq!(outcomes.len(), 4, "each of them: {outcomes:?}");
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
    let Bench { kernel, ns } = &mut bench;
    ns.run(|| kernel.filter().dry_run(&frame, RUNS).unwrap());
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
