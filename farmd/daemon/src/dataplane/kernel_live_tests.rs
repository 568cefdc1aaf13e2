//! What really comes in where the program is attached, instead of in a dry run.

use farm_sys::sysctl;

use super::*;

/// `frame` as a packet socket sends it: with an empty header in front.
fn plain(frame: &[u8]) -> Vec<u8> {
    [&[0; VNET_HEADER][..], frame].concat()
}

/// Tags as they really come in: the kernel takes them off before the program runs.
#[test]
fn frames_of_another_vlan_are_let_by() {
    let plan = plan_of(
        vip(),
        INVISIBLE,
        Affinity::ClientIp,
        vec![group(BucketState::Foreign, Some(1))],
    );
    let Some(mut bench) = Bench::new(&plan) else { return };
    bench.kernel.install(&plan, &[]);
    let ring = PacketRing::open(INTERFACE, 64, &kernel_program(&filter::closed())).unwrap();
    let frame = Way::new(client(1), vip(), VIRTUAL_MAC).tcp(4000, 80, Flags::Syn);
    for (tags, judged) in [
        (&[][..], 1),
        (&[0x8100_0005], 0),
        (&[0x8100_6000], 1),
        (&[0x8100_0000, 0x8100_0000], 1),
        (&[0x8100_0000, 0x8100_0007], 0),
    ] {
        let before = bench.counts()[Reason::Foreign as usize];
        ring.send(&plain(&tagged(&frame, tags))).unwrap();
        // What is behind it on the way has arrived after it.
        ring.send(&plain(&frame)).unwrap();
        for _ in 0..500 {
            if bench.counts()[Reason::Foreign as usize] > before + judged {
                break;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        assert_eq!(
            bench.counts()[Reason::Foreign as usize],
            before + judged + 1,
            "{tags:x?}"
        );
    }
}

/// The sequence number with which the kernel answers a connection request that comes in by `way` to port 80.
fn answer_to(way: &Way, request: &[u8]) -> u32 {
    let mut wire = PacketRing::open(INTERFACE, 64, &kernel_program(&filter::open())).unwrap();
    wire.send(&plain(request)).unwrap();
    for _ in 0..500 {
        let mut answer = None;
        wire.recv(64, |bytes| {
            let packet = Packet::parse(&bytes[VNET_HEADER..]);
            // Both may have the same address.
            if let Some(packet) = packet.filter(|packet| packet.source == way.vip)
                && let L4::Tcp {
                    source: 80, sequence, ..
                } = packet.l4
            {
                answer = Some(sequence);
            }
        })
        .unwrap();
        if let Some(sequence) = answer {
            return sequence;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    panic!("no answer: {way:?}");
}

/// Of a request that the kernel answers with a cookie it keeps nothing: that the connection is this host's, only the cookie says.
#[test]
fn who_brings_a_cookie_back_is_known() {
    for (addr, client) in [("127.0.0.20", "127.0.0.99"), ("::1", "::1")] {
        let (addr, client): (IpAddr, IpAddr) = (addr.parse().unwrap(), client.parse().unwrap());
        let groups = vec![
            group(BucketState::Guarded, Some(0)),
            group(BucketState::Foreign, Some(2)),
        ];
        let plan = plan_of(addr, INVISIBLE, Affinity::ClientIp, groups);
        let Some(mut bench) = Bench::new(&plan) else { return };
        sysctl::write("net/ipv4/tcp_syncookies", "2").unwrap();
        // The request comes in by itself, and from and to addresses that otherwise never come in so.
        for key in ["route_localnet", "accept_local"] {
            sysctl::write(&sysctl::interface("ipv4", "lo", key), "1").unwrap();
        }
        let _listener = TcpListener::bind((addr, 80)).unwrap();
        // The Ethernet address of the loopback interface.
        let way = Way::new(client, addr, MacAddr([0; 6]));
        let request = way.tcp(4000, 80, Flags::Syn);
        let L4::Tcp { sequence, .. } = Packet::parse(&request).unwrap().l4 else {
            panic!("a request is TCP");
        };
        let cookie = answer_to(&way, &request);
        // Not before: it drops what comes to another Ethernet address.
        bench.kernel.install(&plan, &[]);
        let mut ack = Way::new(client, addr, VIRTUAL_MAC).tcp(4000, 80, Flags::Ack);
        let tcp = if addr.is_ipv4() { 34 } else { 54 };
        ack[tcp + 4..tcp + 8].copy_from_slice(&(sequence + 1).to_be_bytes());
        let right = cookie.wrapping_add(1);
        // The highest bits of a cookie say in which minute it was made: this one would be two hours off.
        for (number, is_known) in [(right, true), (right ^ (1 << 31), false), (right, true)] {
            ack[tcp + 8..tcp + 12].copy_from_slice(&number.to_be_bytes());
            let is_left = bench.compare(&plan, &ack, is_known);
            assert!(!is_left, "{addr}, known: {is_known}");
        }
    }
}

/// Two plans for one address with other Ethernet addresses, groups of the port, and states: each frame is judged by one of them alone, as quickly as they
/// take turns. By a part of each it would be dropped for a reason that neither has.
#[test]
fn no_frame_is_judged_by_two_plans() {
    const INSTALLS: usize = 300;
    let macs = [VIRTUAL_MAC, MacAddr([0x5a, 0xfe, 198, 18, 0, 21])];
    let foreign = group(BucketState::Foreign, Some(1));
    let draining = group(BucketState::Draining, Some(1));
    let nobodys = group(BucketState::Foreign, None);
    let plans = [(0, vec![foreign, draining.clone()]), (1, vec![draining, nobodys])].map(|(of_port, groups)| {
        let rules = [
            rule(Protocol::Tcp, 80, 80, Affinity::ClientIp, of_port),
            rule(Protocol::Tcp, 443, 443, Affinity::ClientIp, 1 - of_port),
        ];
        let vip = VipPlan {
            interface: INTERFACE,
            ..vip_plan(vip(), L2Mode::Invisible(macs[of_port]), rules)
        };
        plan(vip, groups)
    });
    for (to, by_its_own) in macs.into_iter().zip([Reason::Foreign, Reason::NoOwner]) {
        let Some(mut bench) = Bench::new(&plans[0]) else { return };
        bench.kernel.install(&plans[0], &[]);
        assert!(bench.kernel.takes(vip()));
        let frame = plain(&Way::new(client(1), vip(), to).tcp(4000, 80, Flags::Ack));
        let wire = PacketRing::open(INTERFACE, 64, &kernel_program(&filter::closed())).unwrap();
        let kernel = &mut bench.kernel;
        std::thread::scope(|scope| {
            let installer = scope.spawn(|| {
                for i in 1..=INSTALLS {
                    // Each slot gets the other one in each round, so that all of it is written.
                    let other = (i + i / SLOTS as usize) % 2;
                    kernel.install(&plans[other], &[]);
                }
            });
            while !installer.is_finished() {
                wire.send(&frame).unwrap();
            }
        });
        let mut counts = bench.counts();
        loop {
            std::thread::sleep(Duration::from_millis(50));
            let before = std::mem::replace(&mut counts, bench.counts());
            if before == counts {
                break;
            }
        }
        let whole = [by_its_own as usize, Reason::OtherMac as usize];
        let changed = Count::PlanChanged as usize;
        assert!(whole.iter().all(|reason| counts[*reason] > 0), "{counts:?}");
        let others = (0..COUNTS).filter(|i| !whole.contains(i) && *i != changed);
        // Dropped for that all the same, after they were counted.
        let mixed: u64 = others.map(|i| counts[i]).sum();
        assert!(mixed <= counts[changed], "{counts:?}");
    }
}
