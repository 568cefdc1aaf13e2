//! Frames in a text file with what becomes of each by one plan, written down once and read by people: `kernel/fixtures.txt`. The core, the program at tc and at XDP, and the
//! socket filter must all do what stands there, so that an error that they share is seen. `FARM_WRITE_FIXTURES=1` writes the file anew, for whoever looks at the difference.

use farm_sys::packet_socket::dry_run;

use super::*;

const FILE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/src/dataplane/kernel/fixtures.txt");
const HEAD: &str = "\
# Frames to a virtual address, one in a line: what becomes of it, why, and its bytes in hexadecimal (text2pcap reads them after `sed 's/.* //; s/../& /g; s/^/0 /'`).
# The plan: vmac_directed; this node is 0; group 0 is its own, group 1 is node 2's, which has the Ethernet address 02:00:00:00:00:02.
# TCP 80 and UDP 53 and TCP 8000 to 8999 are of group 0, TCP 443 and 200 to 1023 of group 1. Fragments follow each other: a later one goes where its first one went.
# accept: to the stack; send: to node 2; drop; pass: not for a virtual address, the host's own.
";

/// The plan of [`HEAD`].
fn plan_for(addr: IpAddr) -> Plan {
    let other = group(BucketState::Foreign, Some(2));
    let plan = plan_of(
        addr,
        L2Mode::Directed,
        Affinity::ClientIp,
        vec![group(BucketState::Own, Some(0)), other],
    );
    assert!(plan.vips[0].peers.contains_key(&id(2)));
    plan
}

/// In words of the file, what the core decides.
fn word(decision: Option<&Decision>) -> (&'static str, &'static str) {
    let Some(decision) = decision else { return ("pass", "-") };
    let sent: Vec<usize> = decision.forward.iter().map(NodeId::index).collect();
    let what = match (decision.verdict, &sent[..]) {
        (Verdict::Accept, []) => "accept",
        (Verdict::Drop, []) => "drop",
        (Verdict::Drop, [2]) => "send",
        (Verdict::Pass, []) => "pass",
        other => panic!("not by this plan: {other:?}"),
    };
    (what, decision.reason.name())
}

fn bytes(hex: &str) -> Vec<u8> {
    let digits = hex.as_bytes().chunks(2);
    let byte = |pair: &[u8]| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap();
    digits.map(byte).collect()
}

fn written_anew() -> String {
    let mut text = HEAD.to_owned();
    for addr in [vip(), vip6()] {
        let (plan, mut fragments) = (plan_for(addr), FragmentTable::default());
        for frame in frames_for(addr, OWN_MAC, CLIENT_MAC, 1) {
            let decision = Packet::parse(&frame)
                .map(|packet| decide(&plan, &packet, &mut fragments, Duration::ZERO, &mut |_| false));
            let (what, why) = word(decision.as_ref());
            let _ = writeln!(text, "{what} {why} {}", hex(&frame));
        }
    }
    text
}

#[test]
fn what_becomes_of_each_frame_is_what_stands_in_the_file() {
    let anew = written_anew();
    if std::env::var_os("FARM_WRITE_FIXTURES").is_some() {
        std::fs::write(FILE, &anew).unwrap();
    }
    let file = std::fs::read_to_string(FILE).unwrap();
    for (i, (stands, found)) in file.lines().zip(anew.lines()).enumerate() {
        assert_eq!(found, stands, "line {}", i + 1);
    }
    assert_eq!(file.lines().count(), anew.lines().count());
    assert!(file.lines().count() - HEAD.lines().count() >= 200);
}

/// What becomes of each frame, why, the frame, and the line for a failure report.
fn lines(file: &str) -> Vec<(&str, &str, Vec<u8>, String)> {
    let lines = file.lines().enumerate().filter(|(_, line)| !line.starts_with('#'));
    lines
        .map(|(i, line)| {
            let [what, why, frame] = line.split(' ').collect::<Vec<_>>()[..] else {
                panic!("line {}", i + 1)
            };
            (what, why, bytes(frame), format!("line {}: {line}", i + 1))
        })
        .collect()
}

fn is_v6(frame: &[u8]) -> bool {
    frame[12..14] == [0x86, 0xdd]
}

/// In user space a frame is judged by the core if the socket filter lets it through.
#[test]
fn the_socket_filter_lets_through_what_is_accepted_or_sent_on_there() {
    let file = std::fs::read_to_string(FILE).unwrap();
    for detail in [filter::Detail::Buckets, filter::Detail::Vips] {
        let [v4, v6] = [vip(), vip6()].map(|addr| {
            let plan = plan_for(addr);
            kernel_program(&filter::build(&plan, plan.vips[0].interface, detail))
        });
        let (mut through, mut kept_out) = (0, 0);
        for (what, _, frame, context) in lines(&file) {
            // As the kernel shows it to a packet socket: without its outer tag.
            let shown = match frame[12..14] {
                [0x81, 0] | [0x88, 0xa8] => [&frame[..12], &frame[16..]].concat(),
                _ => frame,
            };
            let taken = dry_run(if is_v6(&without_tags(&shown)) { &v6 } else { &v4 }, &shown).unwrap();
            match what {
                "accept" | "send" => {
                    assert_eq!(taken, shown.len(), "{context}");
                    through += 1;
                }
                _ if taken == 0 => kept_out += 1,
                _ => {}
            }
        }
        assert!(through > 100, "{through} had to get through");
        // Frames for other addresses, at least.
        assert!(kept_out > 0, "{kept_out} were kept out");
    }
}

#[test]
fn the_program_does_what_stands_in_the_file() {
    let file = std::fs::read_to_string(FILE).unwrap();
    let Some(mut bench) = Bench::new(&plan_for(vip())) else {
        return;
    };
    let mut seen = BTreeMap::new();
    let mut installed = vip();
    bench.kernel.install(&plan_for(installed), &[]);
    for (what, why, frame, line) in lines(&file) {
        // IPv6 comes second; what else the type of a frame is, it may be damaged.
        if installed == vip() && is_v6(&frame) {
            installed = vip6();
            bench.kernel.install(&plan_for(installed), &[]);
        }
        let (run, counted) = bench.run(&frame);
        let expected = match what {
            "accept" => bench.accepted(),
            "send" => REDIRECT,
            "drop" => SHOT,
            "pass" => UNSPEC,
            other => panic!("{line}: {other}"),
        };
        let bare = without_tags(&frame);
        let context = || format!("{line}\n{run:?} counted {counted:?}");
        // What cannot even be read ends here, where the core leaves it to the nf_tables rule.
        let ends_here = what == "pass" && why == "-" && run.code == SHOT && counted == [Reason::Malformed as usize];
        assert!(run.code == expected || ends_here, "{}", context());
        if run.code != UNSPEC && !ends_here {
            let reason = Reason::ALL.iter().position(|reason| reason.name() == why).unwrap();
            assert!(counted.contains(&reason), "{}", context());
        }
        if what == "send" {
            assert_eq!(run.frame[..12], [mac(2).0, OWN_MAC.0].concat(), "{}", context());
        }
        let as_it_came = run.code == UNSPEC && run.frame == frame;
        assert!(as_it_came || run.frame[12..] == bare[12..], "{}", context());
        for sends in [false, true] {
            bench.compare_early(&plan_for(installed), &frame, false, sends);
        }
        *seen.entry(what.to_owned()).or_insert(0) += 1;
    }
    assert!(
        ["accept", "send", "drop"].iter().all(|what| seen[*what] > 20),
        "{seen:?}"
    );
}
