//! Neighbour discovery for a virtual address: the programs never answer it, hand it to nobody, and keep it from the stack where it is sent to the address itself;
//! the responder's packet socket hears it all the same, since XDP passes it up and the program at tc comes after such sockets.

use farm_sys::neighbour_socket::NeighbourSocket;

use super::battery::discovery;
use super::early::PASS;
use super::live::Wire;
use super::*;

#[test]
fn a_question_for_an_address_is_passed_up_at_xdp_and_never_accepted_at_tc() {
    let own = vec![group(BucketState::Own, Some(0)), group(BucketState::Foreign, Some(2))];
    let first = plan_of(vip6(), INVISIBLE, Affinity::ClientIp, own);
    let Some(mut bench) = Bench::new(&first) else { return };
    for mode in [INVISIBLE, L2Mode::Directed] {
        for (state, owner) in STATES
            .into_iter()
            .flat_map(|s| [Some(0), Some(1), None].map(|o| (s, o)))
        {
            let groups = vec![group(state, owner), group(BucketState::Foreign, Some(2))];
            let plan = plan_of(vip6(), mode, Affinity::ClientIp, groups);
            bench.kernel.install(&plan, &[]);
            let service = plan.vips[0].service_mac();
            // As a client asks, as a member, and to whoever else has had the address.
            for (to, from) in [(service, CLIENT_MAC), (OWN_MAC, mac(1)), (mac(7), CLIENT_MAC)] {
                let way = Way {
                    from_mac: from,
                    ..Way::new(client6(1), vip6(), to)
                };
                for frame in discovery(&way) {
                    for sends in [true, false] {
                        let (run, counted) = bench.run_early(&frame, sends);
                        assert!(
                            run.code == PASS && run.frame == frame && counted.is_empty(),
                            "at XDP: {run:?} {counted:?} {}",
                            hex(&frame)
                        );
                    }
                    assert!(!bench.compare(&plan, &frame, true));
                    let (run, counted) = bench.run(&frame);
                    // The nf_tables rules and the addresses say what the stack makes of what goes to a group.
                    let is_to_group = frame[38] == 0xff;
                    let reason = if to == mac(7) { Reason::OtherMac } else { Reason::NoRule };
                    let expected = if is_to_group {
                        (UNSPEC, vec![])
                    } else {
                        (SHOT, vec![reason as usize])
                    };
                    assert_eq!((run.code, counted), expected, "{}", hex(&frame));
                    assert_eq!(run.frame, frame);
                }
            }
        }
    }
}

/// Were it not for the program, the stack would answer a question that is sent to the address itself: here it has that address, where the frames come in.
#[test]
fn the_responder_hears_what_the_program_keeps_from_the_stack() {
    let own = |interface| {
        let groups = vec![group(BucketState::Own, Some(0)), group(BucketState::Foreign, Some(2))];
        let mut plan = plan_of(vip6(), L2Mode::Directed, Affinity::ClientIp, groups);
        plan.vips[0].interface = interface;
        plan
    };
    let Some(mut bench) = Bench::new(&own(INTERFACE)) else {
        return;
    };
    let wire = Wire::new(&mut bench);
    let line = format!("addr add {}/64 dev near nodad", vip6());
    let status = std::process::Command::new("ip").args(line.split(' ')).status();
    assert!(status.unwrap().success(), "ip {line}");
    let mut responder = NeighbourSocket::open(wire.near).unwrap();
    let mut client = NeighbourSocket::open(wire.far).unwrap();
    let plan = own(wire.near);
    let nothing = Plan {
        vips: Vec::new(),
        ..plan.clone()
    };
    let question = |i| discovery(&Way::new(client6(i), vip6(), OWN_MAC)).swap_remove(0);
    let mut answered = BTreeSet::new();
    // The stack takes a while until the address is its own.
    bench.kernel.install(&nothing, &[]);
    assert!(is_answered(&wire, &mut client, &question(1), client6(1), &mut answered));
    bench.kernel.install(&plan, &[]);
    wire.send(&question(2));
    assert!(wait_for(&mut responder, 500, |heard| heard == question(2)));
    // An answer to the second one would come before this one's.
    bench.kernel.install(&nothing, &[]);
    assert!(is_answered(&wire, &mut client, &question(3), client6(3), &mut answered));
    assert_eq!(answered, BTreeSet::from([client6(1), client6(3)]));
    let counts = bench.counts();
    let expected = (0..COUNTS).map(|i| u64::from(i == Reason::NoRule as usize));
    assert!(counts.into_iter().eq(expected), "{counts:?}");
}

/// Asks until somebody has answered `asker`, and notes who was answered.
fn is_answered(
    wire: &Wire,
    client: &mut NeighbourSocket,
    question: &[u8],
    asker: IpAddr,
    answered: &mut BTreeSet<IpAddr>,
) -> bool {
    (0..50).any(|_| {
        wire.send(question);
        wait_for(client, 10, |heard| {
            let to: [u8; 16] = heard[38..54].try_into().unwrap();
            let is_answer = heard[54] == 136;
            if is_answer {
                answered.insert(IpAddr::from(to));
            }
            is_answer && asker == IpAddr::from(to)
        })
    })
}

/// Whether a frame that `is_it` comes within so many hundredths of a second.
fn wait_for(socket: &mut NeighbourSocket, hundredths: usize, mut is_it: impl FnMut(&[u8]) -> bool) -> bool {
    for _ in 0..hundredths {
        while let Some(frame) = socket.recv().unwrap() {
            if frame[12..14] == [0x86, 0xdd] && is_it(frame) {
                return true;
            }
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    false
}
