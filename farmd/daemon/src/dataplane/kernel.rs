//! The decision in the kernel: puts each plan into the tables of the program at tc ingress.
//!
//! Owns the program and knows what lies in its tables. What it accepts goes up the stack where it came in, or through the TAP where reverse
//! path filtering is strict ([`Kernel::choose_way`]), and what it leaves to the daemon comes out of the TAP; nothing else differs from the raw
//! data plane: the nf_tables rules, the addresses and the responder are the same, and a service interface or a virtual address that the
//! program cannot take is simply captured instead. The data plane's thread calls it; it never judges a frame.

pub mod tables;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use farm_core::balance::plan::{Plan, VipPlan};
use farm_core::balance::{flow, fragment};
use farm_core::config::PlaneChoice;
use farm_core::id::{BUCKETS, MacAddr, NodeId, NodeSet};
use farm_core::wire::heartbeat::BucketSet;
use farm_core::wire::packet::{L4, Packet};
use farm_sys::bpf::trace::Events;
use farm_sys::bpf::{Attachment, BpfError, Control, Filter, KernelLease, NEAR, Predecessor, SLOTS, slot_of};
use farm_sys::clock::BootInstant;
use farm_sys::sysctl;
use tracing::{info, warn};

use tables::{Directories, Layout, NoRoom};

/// See the module doc.
#[derive(Debug)]
pub struct Kernel {
    filter: Filter,
    control: Control,
    /// Number of the plan that was written last.
    epoch: u64,
    /// Service interfaces that have the program.
    attached: BTreeMap<u32, String>,
    /// Places of the virtual addresses in the tables.
    numbers: BTreeMap<(u32, IpAddr), u32>,
    /// The program of the farmd before, which judges what this one lets by.
    before: Option<Predecessor>,
    /// Addresses that it judges, each on an interface.
    covered: BTreeSet<(u32, IpAddr)>,
    /// What the configuration decides of the tables.
    layout: Arc<Layout>,
    /// What lies in each slot.
    slots: Vec<Slot>,
    /// What is not known in guarded buckets is put to the daemon, which asks the peers.
    asks: bool,
    /// The buckets of one group while they are written.
    scratch: Box<[u16; BUCKETS]>,
}

/// What lies in the tables of one slot.
#[derive(Debug, Default)]
struct Slot {
    layout: Arc<Layout>,
    /// The first addresses, with their places, and whether these are all.
    near: (Vec<(u32, IpAddr, u32)>, bool),
    /// By the address's place.
    peers: BTreeMap<u32, BTreeMap<NodeId, MacAddr>>,
    /// By group.
    buckets: BTreeMap<usize, Box<[u16; BUCKETS]>>,
    /// As above; of groups in whose buckets others have connections, or had.
    holders: BTreeMap<usize, BTreeMap<usize, NodeSet>>,
}

impl Kernel {
    /// Takes the program as it was loaded.
    pub fn new(filter: Filter, plan: &Plan) -> Self {
        Self {
            filter,
            epoch: 0,
            control: Control {
                seed: (plan.seed.s0, plan.seed.s1),
                // Until it is known.
                tracked: true,
                ..Control::default()
            },
            attached: BTreeMap::new(),
            numbers: BTreeMap::new(),
            before: None,
            covered: BTreeSet::new(),
            layout: Arc::default(),
            slots: (0..SLOTS).map(|_| Slot::default()).collect(),
            asks: false,
            scratch: Box::new([0; BUCKETS]),
        }
    }

    /// Goes on where the farmd before has left its program: that one judges until [`Self::succeed`].
    pub fn follow(&mut self, before: Predecessor) {
        self.before = Some(before).filter(|before| before.interfaces().next().is_some());
    }

    /// True while the program of the farmd before is there.
    pub fn follows(&self) -> bool {
        self.before.is_some()
    }

    /// The program of the farmd before judges the frames of these addresses, where it is.
    pub fn cover(&mut self, plan: &Plan) {
        let Some(before) = &self.before else { return };
        let there: BTreeSet<u32> = before.interfaces().collect();
        let vips = plan
            .vips
            .iter()
            .filter(|vip| vip.choice != PlaneChoice::Raw && there.contains(&vip.interface));
        self.covered = vips.map(|vip| (vip.interface, vip.addr)).collect();
    }

    /// Takes the program of the farmd before off: this one has its plan.
    pub fn succeed(&mut self) {
        self.covered.clear();
        if self.before.take().is_some() {
            info!("frames are judged by this farmd's program; that of the one before is off");
        }
    }

    /// Leaves the program where it is to the farmd that takes this process's place.
    ///
    /// # Errors
    /// What the kernel says; it is off then.
    pub fn leave(&mut self) -> Result<(), BpfError> {
        // An nf_tables rule that an older farmd puts in the place of ours lets nothing by; the TAP stays, and does not meet it.
        self.set_passes_up(false);
        self.filter.leave()
    }

    /// The program's lease.
    pub fn lease(&self) -> KernelLease {
        self.filter.lease()
    }

    /// True if frames for `addr` are judged in the kernel, and so none of what is captured of them counts.
    pub fn takes(&self, addr: IpAddr) -> bool {
        self.covered
            .iter()
            .chain(self.numbers.keys())
            .any(|(_, taken)| *taken == addr)
    }

    /// True if some are.
    pub fn is_at_work(&self) -> bool {
        !self.covered.is_empty() || !self.numbers.is_empty()
    }

    /// Addresses that are judged in the kernel.
    pub fn taken(&self) -> BTreeSet<IpAddr> {
        let all = self.covered.iter().chain(self.numbers.keys());
        all.map(|(_, addr)| *addr).collect()
    }

    /// Addresses for whose frames the tables have no room, and why.
    pub fn refused(&self) -> &BTreeMap<IpAddr, NoRoom> {
        &self.layout.refused
    }

    /// What the first fragment of `packet`'s datagram carried, if the program has seen it not too long ago.
    pub fn first_fragment(&self, packet: &Packet) -> Option<L4> {
        let first = self.filter.first_fragment(fragment::key(packet))?;
        let age = BootInstant::from_nanos(first.seen).elapsed();
        let (source, destination) = (first.source_port, first.destination_port);
        (age <= fragment::LIFETIME).then_some(match first.protocol {
            flow::TCP => L4::Tcp {
                source,
                destination,
                syn: first.opens,
                // Nobody asks for that of a later one.
                sequence: 0,
            },
            flow::UDP => L4::Udp { source, destination },
            _ => L4::Echo,
        })
    }

    /// Puts the program in the way of an interface; where that fails, frames are captured.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn attach(&mut self, index: u32, name: &str) -> Result<(), BpfError> {
        self.filter
            .attach(index, name)
            .inspect_err(|_| self.end_before(index))?;
        let attachment = self.filter.attachment();
        info!(interface = name, %attachment, "frames are judged in the kernel (eBPF at tc ingress)");
        self.attached.insert(index, name.to_owned());
        self.choose_way();
        if let Some(before) = &mut self.before
            && let Err(error) = self.filter.take_over_xdp(before, index)
        {
            warn!(%error, interface = name, "XDP begins anew there");
        }
        Ok(())
    }

    /// Puts the program at XDP ahead of the one that an interface has; if it `sends`, it sends on to members too.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn attach_early(&mut self, index: u32, name: &str, sends: bool) -> Result<(), BpfError> {
        self.filter.attach_xdp(index, name, sends)
    }

    /// Takes the program at XDP off an interface.
    pub fn detach_early(&mut self, index: u32) {
        self.filter.detach_xdp(index);
    }

    /// How the program is attached.
    pub fn attachment(&self) -> Attachment {
        self.filter.attachment()
    }

    /// True if an interface has the program, or had it when that was last looked at.
    pub fn is_attached(&self, index: u32) -> bool {
        self.attached.contains_key(&index)
    }

    /// True if an interface that has the program still has it.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn is_in_place(&self, index: u32) -> Result<bool, BpfError> {
        self.filter.is_in_place(index)
    }

    /// Puts the program back on an interface that somebody else has taken it off; what it judges there stays as it was.
    ///
    /// # Errors
    /// What the kernel says; the interface has no program then.
    pub fn put_back(&mut self, index: u32, name: &str) -> Result<(), BpfError> {
        self.filter.detach(index);
        self.filter.attach(index, name).inspect_err(|_| self.detach(index))
    }

    /// Takes the programs off an interface.
    pub fn detach(&mut self, index: u32) {
        self.end_before(index);
        self.filter.detach_xdp(index);
        self.filter.detach(index);
        self.attached.remove(&index);
        self.choose_way();
        let left: Vec<(u32, IpAddr)> = self.numbers.keys().filter(|(i, _)| *i == index).copied().collect();
        for (interface, addr) in left {
            self.forget(interface, addr);
        }
    }

    /// Whether what is accepted goes up the stack where it came in. While the reverse path filter of a service interface is strict all of it goes
    /// through the TAP: there it would drop clients whose route leads elsewhere, and that of the TAP is loose.
    pub fn choose_way(&mut self) {
        let passes_up = !self.attached.values().any(|name| is_strict(name));
        if self.control.passes_up == passes_up {
            return;
        }
        let way = if passes_up {
            "where they came in"
        } else {
            "through the TAP (rp_filter is strict)"
        };
        info!(way, "accepted frames go up the stack");
        self.set_passes_up(passes_up);
    }

    fn set_passes_up(&mut self, passes_up: bool) {
        self.control.passes_up = passes_up;
        self.filter.set_control(&self.control);
    }

    /// Has the program tell of each frame, with `snap` bytes of it, or with `None` no longer; true if that is a change.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn tell(&mut self, snap: Option<u32>) -> Result<bool, BpfError> {
        self.filter.tell(snap)
    }

    /// What it tells.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn events(&self) -> Result<Events, BpfError> {
        self.filter.events()
    }

    /// Nothing on this interface is for the program of the farmd before any more.
    fn end_before(&mut self, index: u32) {
        if let Some(before) = &mut self.before {
            before.end(index);
        }
        self.covered.retain(|(interface, _)| *interface != index);
    }

    /// What is left to the daemon comes out of this device, and what is accepted reaches the stack through it where it does not go up where it
    /// came in; `None` if there is none.
    pub fn set_tap(&mut self, device: Option<(u32, MacAddr)>) {
        let (tap, mac) = device.unwrap_or_default();
        self.control.tap = tap;
        self.control.tap_mac = mac.0;
        self.filter.set_control(&self.control);
        if tap == 0 {
            // Or frames would be judged by the plan in force all the same.
            self.filter.set_epoch(0);
            for (interface, addr) in self.numbers.keys().copied().collect::<Vec<_>>() {
                self.forget(interface, addr);
            }
        }
    }

    /// Whether connections may end in containers, which only the daemon knows of.
    pub fn set_tracked(&mut self, tracked: bool) {
        if self.control.tracked != tracked {
            self.control.tracked = tracked;
            self.filter.set_control(&self.control);
        }
    }

    /// From the next plan on: whether segments in guarded buckets that are not known here may be nobody's, which the daemon finds out.
    pub fn set_asks(&mut self, asks: bool) {
        self.asks = asks;
    }

    fn forget(&mut self, interface: u32, addr: IpAddr) {
        match self.filter.set_vip_number(interface, addr, None) {
            Ok(()) => {
                self.numbers.remove(&(interface, addr));
            }
            // Its place stays its own, and the next plan tries again.
            Err(error) => warn!(%error, %addr, "the kernel program"),
        }
    }

    /// Judges by `plan` from now on, with `young` buckets of each group treated as such. Where the tables have no room for an address, or
    /// the kernel refuses it, its frames are captured.
    pub fn install(&mut self, plan: &Plan, young: &[BucketSet]) {
        self.epoch += 1;
        let in_force = Arc::clone(&self.layout);
        let mut layout = self.layout(plan);
        self.note_new(&layout, &in_force);
        match self.write(plan, young, self.epoch, &layout) {
            Ok(()) => self.filter.set_epoch(self.epoch),
            Err(error) => {
                warn!(%error, "the kernel program cannot have the plan; frames are captured and judged in user space");
                // What is half written is never looked at.
                self.filter.set_epoch(0);
                layout = Arc::default();
            }
        }
        // Only now: until then the slot in force says what becomes of their frames.
        let gone = |key: &&(u32, IpAddr)| !layout.places.iter().any(|place| **key == (place.interface, place.addr));
        for (interface, addr) in self.numbers.keys().filter(gone).copied().collect::<Vec<_>>() {
            self.forget(interface, addr);
        }
        self.note_new(&layout, &layout);
    }

    /// Notes the places of new addresses. An address keeps its place as long as it is there, and a place that is still another's is not given away: by the plan
    /// in force it has that one's frames judged. By any plan that does not have it, a new one is let by.
    fn note_new(&mut self, layout: &Layout, in_force: &Layout) {
        for place in &layout.places {
            let key = |place: &tables::Place| (place.interface, place.addr);
            let is_anothers = |other: &tables::Place| other.number == place.number && key(other) != key(place);
            let is_free = !self.numbers.values().any(|number| *number == place.number)
                && !in_force.places.iter().any(is_anothers);
            if is_free && !self.numbers.contains_key(&(place.interface, place.addr)) {
                self.note(place.interface, place.addr, place.number);
            }
        }
    }

    fn note(&mut self, interface: u32, addr: IpAddr, number: u32) {
        match self.filter.set_vip_number(interface, addr, Some(number)) {
            Ok(()) => {
                self.numbers.insert((interface, addr), number);
            }
            Err(error) => warn!(%error, %addr, "frames are captured and judged in user space"),
        }
    }

    /// What the configuration decides of the tables; worked out anew only if that has changed.
    fn layout(&mut self, plan: &Plan) -> Arc<Layout> {
        let wanted = |vip: &VipPlan| {
            vip.choice != PlaneChoice::Raw && self.attached.contains_key(&vip.interface) && self.control.tap != 0
        };
        if !self.layout.fits(plan, &wanted) {
            let layout = Layout::new(plan, &wanted, &self.numbers);
            for (addr, why) in &layout.refused {
                if self.layout.refused.get(addr) != Some(why) {
                    warn!(%addr, "frames are captured and judged in user space: {why}");
                }
            }
            self.layout = Arc::new(layout);
        }
        Arc::clone(&self.layout)
    }

    /// Writes plan number `epoch` into its slot, of which the program reads nothing now: only what differs from the plan that lies there.
    fn write(&mut self, plan: &Plan, young: &[BucketSet], epoch: u64, layout: &Arc<Layout>) -> Result<(), BpfError> {
        let number = slot_of(epoch);
        // Not known unless all of it has been written.
        let mut slot = self
            .slots
            .get_mut(number as usize)
            .map(std::mem::take)
            .unwrap_or_default();
        if !Arc::ptr_eq(&slot.layout, layout) {
            self.write_layout(number, &slot.layout, layout)?;
            slot.layout = Arc::clone(layout);
        }
        let noted = layout.places.iter().filter_map(|place| {
            let number = self.numbers.get(&(place.interface, place.addr))?;
            Some((place.interface, place.addr, *number))
        });
        let near: Vec<(u32, IpAddr, u32)> = noted.take(NEAR).collect();
        let is_whole = near.len() == layout.places.len();
        if slot.near != (near.clone(), is_whole) {
            self.filter.set_near(number, &near, is_whole)?;
            slot.near = (near, is_whole);
        }
        for place in &layout.places {
            let Some(vip) = plan.vips.get(place.position) else {
                continue;
            };
            // Has the number of its plan in it.
            self.filter.set_vip(epoch, place.number, &tables::vip(plan, vip))?;
            let known = slot.peers.get(&place.number);
            if known != Some(&vip.peers) {
                self.filter.set_peers(number, place.number, &tables::peers(vip))?;
                slot.peers.insert(place.number, vip.peers.clone());
            }
        }
        for group in &layout.groups {
            let Some(of) = plan.groups.get(*group) else {
                continue;
            };
            tables::buckets(of, young.get(*group), self.asks, &mut self.scratch);
            let known = slot.buckets.get(group);
            if known.is_none_or(|known| **known != *self.scratch) {
                self.filter.set_buckets(number, *group as u32, &self.scratch)?;
                match slot.buckets.get_mut(group) {
                    Some(known) => known.copy_from_slice(&self.scratch[..]),
                    None => {
                        slot.buckets.insert(*group, self.scratch.clone());
                    }
                }
            }
        }
        for group in &layout.groups {
            let Some(of) = plan.groups.get(*group) else {
                continue;
            };
            let known = slot.holders.get(group);
            if known.map_or(!of.holders.is_empty(), |known| *known != of.holders) {
                self.filter.set_holders(number, *group as u32, &tables::holders(of))?;
                slot.holders.insert(*group, of.holders.clone());
            }
        }
        if let Some(known) = self.slots.get_mut(number as usize) {
            *known = slot;
        }
        Ok(())
    }

    /// Writes what of `layout` differs from `before`, which lies in the slot.
    fn write_layout(&mut self, slot: u32, before: &Layout, layout: &Layout) -> Result<(), BpfError> {
        for place in &layout.places {
            let mut known = before.places.iter().filter(|known| known.number == place.number);
            if known.all(|known| known.directories != place.directories) {
                let Directories { tcp, udp } = &*place.directories;
                self.filter.set_directories(slot, place.number, tcp, udp)?;
            }
        }
        for (number, page) in (0..).zip(&layout.pages) {
            if before.pages.get(number as usize) != Some(page) {
                self.filter.set_page(slot, number, page)?;
            }
        }
        Ok(())
    }

    /// The program, for tests and measurements that run it on single frames.
    pub fn filter(&mut self) -> &mut Filter {
        &mut self.filter
    }
}

/// True if the kernel drops what comes in there from a client to whom it would answer on another interface (RFC 3704, section 2.2). IPv6 has
/// no such parameter.
fn is_strict(interface: &str) -> bool {
    let value = |scope: &str| {
        let value = sysctl::read(&sysctl::interface("ipv4", scope, "rp_filter"));
        value.ok().and_then(|value| value.parse::<u32>().ok()).unwrap_or(0)
    };
    // The kernel goes by the higher one.
    value("all").max(value(interface)) == 1
}

#[cfg(test)]
#[path = "kernel_tests.rs"]
mod tests;
