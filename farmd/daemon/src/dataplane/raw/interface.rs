//! What a plan asks of a service interface's own sockets: the filter that says which frames are captured, and the addresses that the interface listens to.
//!
//! Owns nothing, and judges nothing. The data plane's thread calls it for each new plan and each new interface.

use std::io;
use std::net::IpAddr;

use farm_core::balance::filter;
use farm_core::balance::plan::Plan;
use farm_core::config::L2Mode;
use tracing::{debug, warn};

use crate::dataplane::judge::Judge;
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

/// Lets the interface receive the virtual MACs of its VIPs, and what asks for the Ethernet address of IPv6 ones.
pub(super) fn join_groups(plan: &Plan, interface: &mut Interface) {
    let index = interface.index;
    for vip in plan.vips.iter().filter(|v| v.interface == index) {
        if let IpAddr::V6(addr) = vip.addr {
            neighbour::hear_solicitations(interface, addr);
        }
        let L2Mode::Invisible(mac) = vip.mode else { continue };
        if interface.joined.insert(mac.0)
            && let Err(error) = interface.ring.add_unicast_mac(mac.0)
        {
            warn!(%error, interface = interface.name, %mac, "the interface does not take the virtual MAC; trying promiscuous mode");
            if let Err(error) = interface.ring.set_promiscuous(true) {
                warn!(%error, interface = interface.name, "promiscuous mode was refused too: frames for the virtual address will not come in");
            }
        }
    }
}
