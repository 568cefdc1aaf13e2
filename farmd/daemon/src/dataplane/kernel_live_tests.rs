//! What really comes in where the program is attached, instead of in a dry run.

use std::io;

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

/// Ethernet addresses of the service by two plans.
const MACS: [MacAddr; 2] = [VIRTUAL_MAC, MacAddr([0x5a, 0xfe, 198, 18, 0, 21])];

/// Two plans for one address on `interface` with other Ethernet addresses, groups of the port, and states. By a part of each a frame would be dropped for a reason
/// that neither has: TCP by the program at tc, UDP at XDP.
fn unlike(interface: u32) -> [Plan; 2] {
    let foreign = group(BucketState::Foreign, Some(1));
    let draining = group(BucketState::Draining, Some(1));
    let nobodys = group(BucketState::Foreign, None);
    [(0, vec![foreign, draining.clone()]), (1, vec![draining, nobodys])].map(|(of_port, groups)| {
        let rules = [
            rule(Protocol::Tcp, 80, 80, Affinity::ClientIp, of_port),
            rule(Protocol::Tcp, 443, 443, Affinity::ClientIp, 1 - of_port),
            rule(Protocol::Udp, 53, 53, Affinity::ClientIp, of_port),
            rule(Protocol::Udp, 54, 54, Affinity::ClientIp, 1 - of_port),
        ];
        let vip = VipPlan {
            interface,
            ..vip_plan(vip(), L2Mode::Invisible(MACS[of_port]), rules)
        };
        plan(vip, groups)
    })
}

/// Calls `send` again and again while the plans take turns as quickly as they can.
fn take_turns(kernel: &mut Kernel, plans: &[Plan; 2], mut send: impl FnMut()) {
    const INSTALLS: usize = 3000;
    std::thread::scope(|scope| {
        let installer = scope.spawn(|| {
            for i in 1..=INSTALLS {
                // Each slot gets the other one in each round, so that all of it is written.
                let other = (i + i / SLOTS as usize) % 2;
                kernel.install(&plans[other], &[]);
            }
        });
        while !installer.is_finished() {
            send();
        }
    });
}

/// The counters, when all that was sent has been judged; panics unless every frame was judged by one plan, for one of these reasons.
fn judged_whole(bench: &mut Bench, whole: &[usize]) -> [u64; COUNTS] {
    let mut counts = bench.counts();
    loop {
        std::thread::sleep(Duration::from_millis(50));
        let before = std::mem::replace(&mut counts, bench.counts());
        if before == counts {
            break;
        }
    }
    let changed = Count::PlanChanged as usize;
    assert!(whole.iter().all(|reason| counts[*reason] > 0), "{counts:?}");
    let others = (0..COUNTS).filter(|i| !whole.contains(i) && *i != changed);
    // Dropped for that all the same, after they were counted.
    let mixed: u64 = others.map(|i| counts[i]).sum();
    assert!(mixed <= counts[changed], "{counts:?}");
    counts
}

/// As quickly as plans take turns, each frame is judged by one of them alone.
#[test]
fn no_frame_is_judged_by_two_plans() {
    let plans = unlike(INTERFACE);
    for (to, by_its_own) in MACS.into_iter().zip([Reason::Foreign, Reason::NoOwner]) {
        let Some(mut bench) = Bench::new(&plans[0]) else { return };
        bench.kernel.install(&plans[0], &[]);
        assert!(bench.kernel.takes(vip()));
        let frame = plain(&Way::new(client(1), vip(), to).tcp(4000, 80, Flags::Ack));
        let wire = PacketRing::open(INTERFACE, 64, &kernel_program(&filter::closed())).unwrap();
        take_turns(&mut bench.kernel, &plans, || wire.send(&frame).unwrap());
        judged_whole(&mut bench, &[by_its_own as usize, Reason::OtherMac as usize]);
    }
}

/// The queue of an interface is full, errno(3).
const ENOBUFS: i32 = 105;

/// A pair of interfaces, the near one with both programs.
pub(super) struct Wire {
    pub(super) near: u32,
    pub(super) far: u32,
    /// At the far end.
    ring: PacketRing,
}

impl Wire {
    pub(super) fn new(bench: &mut Bench) -> Self {
        let mac = OWN_MAC.0.map(|byte| format!("{byte:02x}")).join(":");
        for line in [
            &format!("link add near address {mac} type veth peer name far")[..],
            "link set near up",
            "link set far up",
        ] {
            let status = std::process::Command::new("ip").args(line.split(' ')).status();
            assert!(status.unwrap().success(), "ip {line}");
        }
        let [near, far] = ["near", "far"].map(|name| farm_sys::interface::index(name).unwrap());
        bench.kernel.attach(near, "near").unwrap();
        bench.kernel.attach_early(near, "near", true).unwrap();
        // A veth takes what its peer's driver sends only if it has a program itself; this one lets everything by.
        bench.kernel.attach_early(far, "far", false).unwrap();
        let ring = PacketRing::open(far, 4096, &kernel_program(&filter::open())).unwrap();
        Self { near, far, ring }
    }

    /// Has `frame` come in at the near end, once there is room for it.
    pub(super) fn send(&self, frame: &[u8]) {
        while let Err(error) = self.ring.send(&plain(frame)) {
            let full = error.kind() == io::ErrorKind::WouldBlock || error.raw_os_error() == Some(ENOBUFS);
            assert!(full, "{error}");
            std::thread::yield_now();
        }
    }

    /// Ethernet addresses, to and from, of what has come out at the far end for the service.
    fn sent_on(&mut self, into: &mut BTreeSet<(MacAddr, MacAddr)>) {
        let take = |bytes: &mut [u8]| {
            let packet = Packet::parse(&bytes[VNET_HEADER..]);
            into.extend(
                packet
                    .filter(|packet| packet.destination == vip() && packet.source_mac != CLIENT_MAC)
                    .map(|packet| (packet.destination_mac, packet.source_mac)),
            );
        };
        self.ring.recv(64, take).unwrap();
    }
}

/// The same at XDP: what ends there never gets as far as a packet socket.
#[test]
fn no_frame_is_dropped_by_two_plans_at_xdp() {
    for (i, by_its_own) in [Reason::Foreign, Reason::NoOwner].into_iter().enumerate() {
        let Some(mut bench) = Bench::new(&unlike(INTERFACE)[0]) else {
            return;
        };
        let wire = Wire::new(&mut bench);
        let plans = unlike(wire.near);
        bench.kernel.install(&plans[0], &[]);
        assert!(bench.kernel.takes(vip()));
        let mut past = PacketRing::open(wire.near, 4096, &kernel_program(&filter::open())).unwrap();
        let frame = Way::new(client(1), vip(), MACS[i]).udp(4000, 53, b"?");
        let not_ours = Way::new(client(1), client(2), MACS[i]).udp(4000, 53, b"?");
        wire.send(&not_ours);
        take_turns(&mut bench.kernel, &plans, || wire.send(&frame));
        judged_whole(&mut bench, &[by_its_own as usize, Reason::OtherMac as usize]);
        let (mut passed, mut heard) = (0, false);
        past.recv(4096, |bytes| {
            passed += usize::from(bytes[VNET_HEADER..] == frame);
            heard |= bytes[VNET_HEADER..] == not_ours;
        })
        .unwrap();
        assert!(heard, "what is let by comes here");
        // All but what a plan was taken away from under the program.
        assert!(passed < 10, "{passed}");
    }
}

/// What goes on from the driver has both addresses by one plan: of the owner whom that names, as that knows it, and of this host.
#[test]
fn no_frame_is_sent_on_by_two_plans_at_xdp() {
    let plans_on = |interface| {
        [0, 1].map(|i| {
            let rules = [rule(Protocol::Udp, 53, 53, Affinity::ClientIp, 0)];
            let vip = VipPlan {
                interface,
                own_mac: MACS[i],
                peers: [1, 2].map(|node| (id(node), peer_mac(i, node))).into(),
                ..vip_plan(vip(), L2Mode::Directed, rules)
            };
            plan(vip, vec![group(BucketState::Foreign, Some(1 + i))])
        })
    };
    for i in [0, 1] {
        let Some(mut bench) = Bench::new(&plans_on(INTERFACE)[0]) else {
            return;
        };
        let mut wire = Wire::new(&mut bench);
        let plans = plans_on(wire.near);
        bench.kernel.install(&plans[0], &[]);
        let frame = Way::new(client(1), vip(), MACS[i]).udp(4000, 53, b"?");
        let mut seen = BTreeSet::new();
        take_turns(&mut bench.kernel, &plans, || {
            wire.send(&frame);
            wire.sent_on(&mut seen);
        });
        let whole = [
            Reason::Foreign as usize,
            Reason::OtherMac as usize,
            Count::Forwarded as usize,
        ];
        judged_whole(&mut bench, &whole);
        assert_eq!(seen, BTreeSet::from([(peer_mac(i, 1 + i), MACS[i])]));
    }
}

/// Of node `node` as plan `i` knows it.
fn peer_mac(i: usize, node: usize) -> MacAddr {
    MacAddr([2, 0, 0, 0, 1 + i as u8, node as u8])
}
