use std::net::{IpAddr, Ipv4Addr};
use std::thread;
use std::time::Instant;

use farm_sys::bpf::{BUCKETS, Count, Filter, Peers, Vip, bucket, rule, slot_of};
use farm_sys::interface;
use farm_sys::nic;
use farm_sys::packet_socket::VNET_HEADER;

use crate::lab::{self, ADDR_B, LIMIT, Lab, MAC_A, MAC_B};

const VIP: Ipv4Addr = Ipv4Addr::new(198, 18, 0, 100);
const MAC_MEMBER: [u8; 6] = [2, 0, 0, 0, 0, 3];
const IPV4: u16 = 0x0800;
const PORT: u16 = 53;
const EPOCH: u64 = 1;

/// The program in the calling thread's namespace; `None`, and a line, where it is not built in.
fn load() -> Option<Filter> {
    match Filter::load() {
        Ok(filter) => Some(filter),
        Err(error) if error.is_missing() && std::env::var_os("FARM_NEED_BPF").is_none() => {
            println!("skipped: {error}");
            None
        }
        Err(error) => panic!("{error}"),
    }
}

/// A plan for [`VIP`] on `a0`, all of it `owner`'s; frames go on to node 1.
fn put_in_force(filter: &mut Filter, owner: Option<u8>) {
    let slot = slot_of(EPOCH);
    let vip = Vip {
        service_mac: MAC_A,
        own_mac: MAC_A,
        directed: true,
        entry_group: 0,
        this: 0,
        portless: [rule::NONE; 2],
    };
    let mut rules = [rule::NONE; 256];
    rules[usize::from(PORT)] = rule::to(0, rule::Key::Addr);
    let mut low_ports = [0; 256];
    low_ports[0] = 1;
    filter.set_peers(slot, 0, &Peers(vec![(1, MAC_MEMBER)])).unwrap();
    filter.set_vip(EPOCH, 0, &vip).unwrap();
    filter.set_page(slot, 0, &[rule::NONE; 256]).unwrap();
    filter.set_page(slot, 1, &rules).unwrap();
    filter.set_directories(slot, 0, &[0; 256], &low_ports).unwrap();
    filter
        .set_buckets(
            slot,
            0,
            &[bucket::owned_by(bucket::FOREIGN, owner.unwrap_or(0xff)); BUCKETS],
        )
        .unwrap();
    filter.lease().renew(u64::MAX);
    filter.set_epoch(EPOCH);
    let index = interface::index("a0").unwrap();
    filter.set_vip_number(index, IpAddr::V4(VIP), Some(0)).unwrap();
}

fn question() -> Vec<u8> {
    let packet = lab::udp_packet((ADDR_B, 4000), (VIP, PORT), b"whose?", true);
    lab::frame(MAC_A, MAC_B, IPV4, &packet)
}

/// Waits until a counter of the program is `expected`.
fn wait_for(filter: &Filter, count: Count, expected: u64) {
    let begin = Instant::now();
    while filter.counters().read().unwrap()[count as usize] != expected {
        assert!(begin.elapsed() < LIMIT, "{count:?} is not {expected}");
        thread::yield_now();
    }
}

#[test]
fn a_driver_that_has_no_native_xdp_says_so() {
    if !lab::privileged() {
        return;
    }
    let lab = Lab::new();
    lab.a.run(|| {
        let Some(mut filter) = load() else { return };
        let lo = interface::index("lo").unwrap();
        let refused = filter.attach_xdp(lo, "lo", false).unwrap_err().to_string();
        assert!(
            refused.contains("of lo") && refused.contains("no native XDP"),
            "{refused}"
        );
    });
}

#[test]
fn a_veth_is_told_from_a_card_and_takes_one_program_at_a_time() {
    if !lab::privileged() {
        return;
    }
    let lab = Lab::new();
    lab.a.run(|| {
        let index = interface::index("a0").unwrap();
        let nic = nic::look(index).unwrap();
        assert_eq!((nic.kind.as_deref(), nic.on_bus), (Some("veth"), None));
        let (Some(mut first), Some(mut second)) = (load(), load()) else {
            return;
        };
        assert!(!lab::link_line("a0").contains("xdp"));
        first.attach_xdp(index, "a0", false).unwrap();
        first.attach_xdp(index, "a0", true).unwrap();
        assert!(lab::link_line("a0").contains("xdp"), "native mode");
        assert!(!lab::link_line("a0").contains("xdpgeneric"));
        let refused = second.attach_xdp(index, "a0", false).unwrap_err().to_string();
        assert!(refused.contains("another program is there"), "{refused}");
        first.detach_xdp(index);
        second.attach_xdp(index, "a0", false).unwrap();
        drop(second);
        assert!(!lab::link_line("a0").contains("xdp"));
    });
}

#[test]
fn what_goes_on_to_a_member_leaves_from_the_driver_once() {
    if !lab::privileged() {
        return;
    }
    let lab = Lab::new();
    let Some(mut filter) = lab.a.run(|| {
        let mut filter = load()?;
        put_in_force(&mut filter, Some(1));
        filter.attach_xdp(interface::index("a0").unwrap(), "a0", true).unwrap();
        Some(filter)
    }) else {
        return;
    };
    // A veth hands on what its peer's driver sends only if it has a program itself; this one lets everything by.
    let passing = lab.b.run(|| {
        let mut filter = load().unwrap();
        filter.attach_xdp(interface::index("b0").unwrap(), "b0", false).unwrap();
        filter
    });
    let mut at_a = lab.ring_a(&lab::ethernet_type(IPV4));
    let mut at_b = lab.b.run(|| {
        farm_sys::packet_socket::PacketRing::open(interface::index("b0").unwrap(), 256, &lab::ethernet_type(IPV4))
            .unwrap()
    });
    lab.sender_b().send(&question()).unwrap();
    let mut expected = question();
    expected[VNET_HEADER..VNET_HEADER + 6].copy_from_slice(&MAC_MEMBER);
    expected[VNET_HEADER + 6..VNET_HEADER + 12].copy_from_slice(&MAC_A);
    assert_eq!(lab::collect(&mut at_b, 1), [expected]);
    assert!(lab::stays_silent(&mut at_b) && lab::stays_silent(&mut at_a));
    wait_for(&filter, Count::Forwarded, 1);
    // The program that does not send leaves it to tc, which is not there.
    lab.a
        .run(|| filter.attach_xdp(interface::index("a0").unwrap(), "a0", false).unwrap());
    lab.sender_b().send(&question()).unwrap();
    assert_eq!(lab::collect(&mut at_a, 1), [question()]);
    assert!(lab::stays_silent(&mut at_b));
    wait_for(&filter, Count::Forwarded, 1);
    drop(passing);
}

#[test]
fn what_is_nobodys_ends_in_the_driver() {
    if !lab::privileged() {
        return;
    }
    let lab = Lab::new();
    let Some(filter) = lab.a.run(|| {
        let mut filter = load()?;
        put_in_force(&mut filter, None);
        filter.attach_xdp(interface::index("a0").unwrap(), "a0", true).unwrap();
        Some(filter)
    }) else {
        return;
    };
    let mut at_a = lab.ring_a(&lab::ethernet_type(IPV4));
    let sender = lab.sender_b();
    for _ in 0..10 {
        sender.send(&question()).unwrap();
    }
    // Of the core's reasons, that there is no owner is number 12.
    let begin = Instant::now();
    while filter.counters().read().unwrap()[12] != 10 {
        assert!(begin.elapsed() < LIMIT);
        thread::yield_now();
    }
    assert!(lab::stays_silent(&mut at_a));
}
