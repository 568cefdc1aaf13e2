//! What a plan asks of a service interface's own sockets: the filter that says which frames are captured, and the addresses that the interface listens to.
//!
//! Owns nothing, and judges nothing. The data plane's thread calls it for each new plan and each new interface.

use std::io;
use std::net::IpAddr;

use farm_core::balance::filter;
use farm_core::balance::plan::Plan;
use farm_core::config::L2Mode;
use farm_core::id::MacAddr;
use farm_sys::packet_socket::PacketRing;
use tracing::{debug, warn};

use crate::dataplane::judge::Judge;
use crate::dataplane::raw::RING_SLOTS;
use crate::dataplane::{Count, Interface, kernel_program, neighbour};

fn set_program(interface: &Interface, program: &[filter::Insn]) -> io::Result<()> {
    interface.ring.set_filter(&kernel_program(program))
}

/// The kernel may refuse a long program (`optmem_max`); a coarser one passes more, never less.
pub(super) fn set_filter(judge: &Judge, interface: &mut Interface) {
    let (plan, kernel, counters) = (&judge.plan, judge.kernel.as_ref(), &judge.counters);
    if let Some(syns) = &mut interface.syns
        && let Err(error) = syns.set_plan(plan)
    {
        counters.add(Count::FilterFailed, 1);
        debug!(%error, interface = interface.name, "the filter of the recorded connection requests could not be set");
    }
    let mut vips = plan.vips.iter().filter(|vip| vip.interface == interface.index);
    let fine = if vips.all(|vip| kernel.is_some_and(|kernel| kernel.takes(vip.addr))) {
        filter::closed()
    } else {
        widen(plan, interface);
        // Who listens wants to see what is others', too.
        let detail = match judge.trace {
            None => filter::Detail::Buckets,
            Some(_) => filter::Detail::Vips,
        };
        filter::build(plan, interface.index, detail)
    };
    let coarse = || filter::build(plan, interface.index, filter::Detail::Vips);
    let Err(error) = set_program(interface, &fine).or_else(|_| {
        counters.add(Count::FilterCoarse, 1);
        set_program(interface, &coarse())
    }) else {
        return;
    };
    counters.add(Count::FilterFailed, 1);
    warn!(%error, interface = interface.name, "the socket filter could not be set; passing everything to the daemon instead");
    if let Err(error) = set_program(interface, &filter::open()) {
        warn!(%error, interface = interface.name, "not even that: new clients of this node may not be answered; raise net.core.optmem_max");
    }
}

/// Gives the interface's ring the room that captured frames need, if it has not: with the program in the kernel it has next to none. Nothing is captured
/// meanwhile, for tens of milliseconds.
pub(super) fn widen(plan: &Plan, interface: &mut Interface) {
    if interface.ring.slots() >= RING_SLOTS as usize {
        return;
    }
    match PacketRing::open(interface.index, RING_SLOTS, &kernel_program(&filter::closed())) {
        // What is received is what one of the two sockets wants, so the old one goes last. It had no room for what it was to capture, if anything.
        Ok(ring) => {
            let _old = std::mem::replace(&mut interface.ring, ring);
            // Addresses come and go: none that is not wanted now is taken to be joined later.
            interface.joined.retain(|mac| mac[0] & 1 != 0);
            join_groups(plan, interface);
        }
        Err(error) => {
            let slots = interface.ring.slots();
            if !std::mem::replace(&mut interface.is_narrow, true) {
                warn!(%error, interface = interface.name, slots, "no memory for the ring of captured frames: some may be lost");
            }
        }
    }
}

fn virtual_macs(plan: &Plan, interface: u32) -> impl Iterator<Item = MacAddr> {
    let vips = plan.vips.iter().filter(move |vip| vip.interface == interface);
    vips.filter_map(|vip| match vip.mode {
        L2Mode::Invisible(mac) => Some(mac),
        _ => None,
    })
}

fn receive(ring: &PacketRing, interface: &str, mac: MacAddr) {
    let Err(error) = ring.add_unicast_mac(mac.0) else {
        return;
    };
    warn!(%error, interface, %mac, "the interface does not take the virtual MAC; trying promiscuous mode");
    if let Err(error) = ring.set_promiscuous(true) {
        warn!(%error, interface, "promiscuous mode was refused too: frames for the virtual address will not come in");
    }
}

/// Lets the interface receive the virtual MACs of its VIPs, and what asks for the Ethernet address of IPv6 ones.
pub(super) fn join_groups(plan: &Plan, interface: &mut Interface) {
    let index = interface.index;
    for vip in plan.vips.iter().filter(|v| v.interface == index) {
        if let IpAddr::V6(addr) = vip.addr {
            neighbour::hear_solicitations(interface, addr);
        }
    }
    for mac in virtual_macs(plan, index) {
        if interface.joined.insert(mac.0) {
            receive(&interface.ring, &interface.name, mac);
        }
    }
}
