//! Who answers for a VIP's Ethernet address, and who tells clients that it has moved: by ARP, or by neighbour discovery for an IPv6 VIP.
//!
//! A request to all is answered by the requester's entry node only (in `vmac_invisible` too, so that one request gets one reply); a
//! request sent to this host alone is a neighbour's probe and is always answered, with the address of the entry node as it is now. When the map makes this
//! node the entry node of a requester it knows, it tells that requester at once. A host that is about to take an IPv6 VIP for itself is told by one node
//! that it is taken. The kernel answers nothing: an nf_tables rule drops what asks for the VIPs after this socket has got its copy. Never uses the virtual
//! MAC as a source.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use farm_core::balance::plan::{Plan, VipPlan};
use farm_core::config::L2Mode;
use farm_core::id::MacAddr;
use farm_core::requesters::Requesters;
use farm_core::wire::arp::Arp;
use farm_core::wire::heartbeat::Requester;
use farm_sys::clock::BootInstant;
use tracing::{debug, warn};

use super::neighbour::{Counts, Heard, announcement};
use super::{Count, Counters, Interface, Lease};

/// Packets taken before the rings have their turn again.
const BUDGET: usize = 64;
/// How many requesters are asked at a time whether they are there.
const ASKED: usize = 32;
/// Time between a periodic broadcast, which draws every client to one node, and the replies that send those known back to theirs.
const SETTLE: Duration = Duration::from_millis(100);

/// Periodic announcements of one VIP.
#[derive(Debug)]
struct Periodic {
    broadcast_at: Instant,
    until: Instant,
    settle_at: Option<Instant>,
}

/// See the module doc.
#[derive(Debug)]
pub struct Responder {
    requesters: Requesters,
    counters: Arc<Counters>,
    periodic: BTreeMap<IpAddr, Periodic>,
    conflict_logged: Option<Instant>,
    /// How many have had their turn to be asked whether they are there.
    asked: usize,
}

impl Responder {
    /// A responder that knows nobody yet.
    pub fn new(counters: Arc<Counters>) -> Self {
        Self {
            requesters: Requesters::default(),
            counters,
            periodic: BTreeMap::new(),
            conflict_logged: None,
            asked: 0,
        }
    }

    /// Learns of a requester that another node has heard.
    pub fn learn(&mut self, requester: Requester) {
        self.requesters.learn_told(requester);
    }

    /// When [`Self::handle_timeout`] has something to do.
    pub fn next_at(&self) -> Option<Instant> {
        self.periodic
            .values()
            .flat_map(|p| [Some(p.broadcast_at), p.settle_at])
            .flatten()
            .min()
    }

    /// Asks some of the requesters for their own addresses, others at each call: their answers show that something comes in here. Only hosts with IPv4
    /// addresses are asked.
    pub fn ask_around(&mut self, plan: &Plan, interfaces: &mut [Interface]) {
        let known: Vec<Requester> = self.requesters.iter().filter(|r| r.addr.is_ipv4()).collect();
        let lot = known.iter().cycle().skip(self.asked).take(ASKED.min(known.len()));
        let lot: Vec<Requester> = lot.copied().collect();
        self.asked = (self.asked + lot.len()) % known.len().max(1);
        for requester in lot {
            let (IpAddr::V4(addr), Some(vip)) = (requester.addr, plan.vip(requester.vip)) else {
                continue;
            };
            let Some(interface) = interfaces.iter_mut().find(|i| i.index == vip.interface) else {
                continue;
            };
            let probe = Arp::probe(addr, vip.own_mac, requester.mac);
            self.send(interface, &probe.emit(), Count::ArpAsked, Count::ArpFailed);
        }
    }

    /// Reads and answers what has come in; returns requesters not known before.
    pub fn handle_heard(&mut self, plan: &Plan, lease: &Lease, interface: &mut Interface) -> Vec<Requester> {
        let mut learned = Vec::new();
        for _ in 0..BUDGET {
            let heard = match interface.neighbours.recv() {
                Ok(Some(frame)) => Heard::parse(frame),
                Ok(None) => return learned,
                Err(error) => {
                    debug!(%error, interface = interface.name, "reading ARP and ND failed");
                    return learned;
                }
            };
            let Some(heard) = heard else { continue };
            self.notice_conflict(plan, interface, &heard);
            let vip = heard.asked().and_then(|addr| plan.vip(addr));
            let Some(vip) = vip.filter(|v| v.interface == interface.index) else {
                continue;
            };
            let (addr, mac) = heard.asker();
            let requester = Requester {
                vip: vip.addr,
                addr,
                mac,
            };
            if !addr.is_unspecified() && !mac.is_group() && self.requesters.learn(requester) {
                learned.push(requester);
            }
            let counts = Counts::of(vip.addr);
            match answer(plan, vip, &heard).filter(|_| lease.holds(BootInstant::now())) {
                Some(mac) => self.send(
                    interface,
                    &heard.answer(vip.own_mac, mac),
                    counts.answered,
                    counts.failed,
                ),
                None => self.counters.add(counts.left, 1),
            }
        }
        learned
    }

    /// Tells the requesters whose entry node has changed, as far as this node was it, or is it and has their bucket open.
    pub fn handle_plan(&mut self, old: &Plan, new: &Plan, interfaces: &mut [Interface]) {
        let now = Instant::now();
        for vip in &new.vips {
            let Some(interface) = interfaces.iter_mut().find(|i| i.index == vip.interface) else {
                continue;
            };
            let before = old.vip(vip.addr);
            let groups = (
                before.and_then(|b| old.groups.get(b.entry_group)),
                new.groups.get(vip.entry_group),
            );
            let owners_changed = groups.0.map(|g| &g.owners) != groups.1.map(|g| &g.owners);
            if !owners_changed && groups.0.map(|g| &g.states) == groups.1.map(|g| &g.states) {
                continue;
            }
            if let Some(reroute) = vip.arp_reroute.filter(|_| owners_changed) {
                let periodic = Periodic {
                    broadcast_at: now + reroute.interval,
                    until: now + reroute.elapse,
                    settle_at: None,
                };
                self.periodic.insert(vip.addr, periodic);
            }
            let news: Vec<(Requester, MacAddr)> = self
                .requesters
                .iter()
                .filter(|r| r.vip == vip.addr)
                .filter_map(|r| {
                    let entry = new.entry_node(vip, r.addr).filter(|_| is_news(old, new, vip, r.addr))?;
                    Some((r, mac_of(new, vip, entry)?))
                })
                .collect();
            for (to, mac) in news {
                self.announce(interface, vip, mac, Some(&to));
            }
        }
        self.periodic.retain(|addr, _| new.vip(*addr).is_some());
    }

    /// Sends periodic announcements that are due.
    pub fn handle_timeout(&mut self, now: Instant, plan: &Plan, interfaces: &mut [Interface]) {
        for vip in &plan.vips {
            let Some(reroute) = vip.arp_reroute else { continue };
            let Some(interface) = interfaces.iter_mut().find(|i| i.index == vip.interface) else {
                continue;
            };
            let Some(periodic) = self.periodic.get_mut(&vip.addr) else {
                continue;
            };
            let settle = periodic.settle_at.take_if(|at| *at <= now).is_some();
            let broadcast = periodic.broadcast_at <= now;
            if broadcast {
                periodic.broadcast_at = now + reroute.interval;
                periodic.settle_at = (vip.mode == L2Mode::Directed).then_some(now + SETTLE);
            }
            let over = periodic.until <= now;
            // One node speaks for all: the owner of the first bucket.
            let speaker = plan.groups.get(vip.entry_group).and_then(|g| g.owners.owner_at(0));
            if broadcast && speaker == Some(plan.this) {
                self.announce(interface, vip, vip.service_mac(), None);
            }
            if settle {
                let mine: Vec<Requester> = self
                    .requesters
                    .iter()
                    .filter(|r| r.vip == vip.addr && plan.entry_node(vip, r.addr) == Some(plan.this))
                    .collect();
                for to in mine {
                    self.announce(interface, vip, vip.own_mac, Some(&to));
                }
            }
            if over {
                self.periodic.remove(&vip.addr);
            }
        }
    }

    fn announce(&self, interface: &mut Interface, vip: &VipPlan, mac: MacAddr, to: Option<&Requester>) {
        let counts = Counts::of(vip.addr);
        match announcement(vip.addr, vip.own_mac, mac, to) {
            Some(frame) => self.send(interface, &frame, counts.announced, counts.failed),
            None => self.counters.add(counts.failed, 1),
        }
    }

    fn send(&self, interface: &mut Interface, frame: &[u8], count: Count, failed: Count) {
        match interface.neighbours.send(frame) {
            Ok(()) => self.counters.add(count, 1),
            Err(error) => {
                self.counters.add(failed, 1);
                debug!(%error, interface = interface.name, "sending ARP or ND failed");
            }
        }
    }

    /// Somebody who is no member says the VIP is his, or is about to take it: two hosts have one address.
    fn notice_conflict(&mut self, plan: &Plan, interface: &Interface, heard: &Heard) {
        let Some(vip) = plan.vip(heard.claimed()).filter(|v| v.interface == interface.index) else {
            return;
        };
        let source = heard.source_mac();
        let known = source == vip.own_mac || vip.peers.values().any(|mac| *mac == source);
        if known {
            return;
        }
        self.counters.add(Counts::of(vip.addr).conflict, 1);
        if self
            .conflict_logged
            .is_none_or(|at| at.elapsed() > Duration::from_secs(60))
        {
            self.conflict_logged = Some(Instant::now());
            warn!(vip = %vip.addr, interface = interface.name, claimed_by = %source, "another host claims the virtual address");
        }
    }
}

/// True if this node tells `requester` who its entry node is by `new`: it was that itself by `old`, or has become it. Who has closed the bucket has not: a node that
/// did not run for a while would call clients back from those that have taken over.
fn is_news(old: &Plan, new: &Plan, vip: &VipPlan, requester: IpAddr) -> bool {
    let before = old.vip(vip.addr);
    if new.entry_node(vip, requester) == Some(new.this) {
        new.is_entry(vip, requester) && !before.is_some_and(|b| old.is_entry(b, requester))
    } else {
        before.and_then(|b| old.entry_node(b, requester)) == Some(new.this)
    }
}

/// The Ethernet address to answer with, if this node is to answer.
fn answer(plan: &Plan, vip: &VipPlan, heard: &Heard) -> Option<MacAddr> {
    let entry = plan.entry_node(vip, heard.asker().0)?;
    let here = entry == plan.this;
    match vip.mode {
        L2Mode::Invisible(mac) => here.then_some(mac),
        L2Mode::Directed if here => Some(vip.own_mac),
        L2Mode::Directed if heard.destination_mac() == vip.own_mac => vip.peers.get(&entry).copied(),
        L2Mode::Directed => None,
    }
}

/// The Ethernet address under which clients reach `node` for this VIP.
fn mac_of(plan: &Plan, vip: &VipPlan, node: farm_core::id::NodeId) -> Option<MacAddr> {
    match vip.mode {
        // The virtual MAC never moves.
        L2Mode::Invisible(_) => None,
        L2Mode::Directed if node == plan.this => Some(vip.own_mac),
        L2Mode::Directed => vip.peers.get(&node).copied(),
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv6Addr;

    use farm_core::balance::assign::BucketMap;
    use farm_core::balance::plan::{BucketState, GroupPlan};
    use farm_core::id::{BUCKETS, NodeId};
    use farm_core::wire::nd::{Message, Nd, multicast_mac, solicited_node};

    use super::*;

    const OWN: MacAddr = MacAddr([2, 0, 0, 0, 0, 0]);
    const PEER: MacAddr = MacAddr([2, 0, 0, 0, 0, 1]);
    const CLIENT: MacAddr = MacAddr([2, 0, 0, 0, 0, 9]);
    const VIRTUAL: MacAddr = MacAddr([0x5a, 0xfe, 0, 0, 0, 0x20]);
    const VIP: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 0x20);

    fn id(i: usize) -> NodeId {
        NodeId::new(i).unwrap()
    }

    /// Node 0's plan with one VIP, all of whose buckets are those of the node `owner`.
    fn plan(mode: L2Mode, owner: usize) -> Plan {
        let owners = BucketMap::from_bytes(Box::new([id(owner).as_u8(); BUCKETS])).unwrap();
        let vip = VipPlan {
            addr: VIP.into(),
            interface: 3,
            own_mac: OWN,
            mode,
            entry_group: 0,
            rules: [].into(),
            peers: BTreeMap::from([(id(1), PEER)]),
            choice: farm_core::config::PlaneChoice::default(),
            xdp: farm_core::config::XdpChoice::default(),
            arp_reroute: None,
        };
        Plan {
            version: 1,
            this: id(0),
            seed: farm_core::balance::hash::Seed::default(),
            vips: vec![vip],
            groups: vec![GroupPlan {
                owners,
                ..GroupPlan::closed("web/g".to_owned())
            }],
            gone: BTreeMap::new(),
        }
    }

    fn question(destination_mac: MacAddr, source: Ipv6Addr) -> Heard {
        Heard::Nd(Nd {
            destination_mac,
            source_mac: CLIENT,
            source,
            destination: solicited_node(VIP),
            message: Message::Solicitation,
            target: VIP,
            link_layer: None,
        })
    }

    #[test]
    fn who_is_told_of_an_entry_node_that_has_changed() {
        let client = IpAddr::from([198, 18, 0, 100]);
        let open = |owner: usize, is_open: bool| {
            let mut plan = plan(L2Mode::Directed, owner);
            if is_open {
                plan.groups[0].states.fill(BucketState::Guarded);
            }
            plan
        };
        let news = |old: &Plan, new: &Plan| is_news(old, new, &new.vips[0], client);
        let (own, closed, theirs) = (open(0, true), open(0, false), open(1, false));
        let nothing = Plan {
            vips: Vec::new(),
            ..own.clone()
        };
        assert!(news(&nothing, &own) && news(&theirs, &own) && news(&own, &theirs));
        // A node that goes on after a pause: it closes, and hears later who has taken over, or that nobody has.
        assert!(!news(&own, &closed) && news(&closed, &theirs) && news(&closed, &own));
        // Such a node, alone for a moment, has a plan in which nobody owns anything.
        assert!(!news(&nothing, &closed) && !news(&own, &own) && !news(&theirs, &theirs) && !news(&nothing, &theirs));
    }

    #[test]
    fn a_solicitation_is_answered_by_the_entry_node_and_a_neighbours_probe_by_who_gets_it() {
        let client = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 0x100);
        let group = multicast_mac(solicited_node(VIP));
        let invisible = L2Mode::Invisible(VIRTUAL);
        for (mode, owner, destination, expected) in [
            (L2Mode::Directed, 0, group, Some(OWN)),
            (L2Mode::Directed, 1, group, None),
            (L2Mode::Directed, 0, OWN, Some(OWN)),
            (L2Mode::Directed, 1, OWN, Some(PEER)),
            (invisible, 0, group, Some(VIRTUAL)),
            (invisible, 1, group, None),
            (invisible, 1, VIRTUAL, None),
        ] {
            let plan = plan(mode, owner);
            // Also what asks for the address to take it has one node that answers.
            for source in [client, Ipv6Addr::UNSPECIFIED] {
                let answered = answer(&plan, &plan.vips[0], &question(destination, source));
                assert_eq!(
                    answered, expected,
                    "{mode:?}, node {owner} is the entry, to {destination}"
                );
            }
        }
    }
}
