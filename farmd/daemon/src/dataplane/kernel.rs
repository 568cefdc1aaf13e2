//! The decision in the kernel: puts each plan into the tables of the program at tc ingress.
//!
//! Owns the program and knows what lies in its tables. What it accepts reaches the stack through the TAP and what it leaves to the daemon comes
//! out of the TAP, so that nothing else differs from the raw data plane: the nf_tables rule, the addresses and the responder are the same, and a
//! service interface or a virtual address that the program cannot take is simply captured instead. The data plane's thread calls it; it never
//! judges a frame.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use farm_core::balance::plan::{BucketState, GroupPlan, Plan, RulePlan, VipPlan};
use farm_core::config::{Affinity, L2Mode, PlaneChoice, Protocol};
use farm_core::id::{BUCKETS, MacAddr};
use farm_core::wire::heartbeat::BucketSet;
use farm_sys::bpf::trace::Events;
use farm_sys::bpf::{
    Attachment, BpfError, Control, Filter, KernelLease, MAX_GROUPS, MAX_PAGES, MAX_VIPS, Page, Peers, SLOTS, Vip,
    bucket, rule, slot_of,
};
use tracing::{info, warn};

/// See the module doc.
#[derive(Debug)]
pub struct Kernel {
    filter: Filter,
    control: Control,
    /// Number of the plan that was written last.
    epoch: u64,
    /// Service interfaces that have the program.
    attached: BTreeSet<u32>,
    /// Places of the virtual addresses in the tables.
    numbers: BTreeMap<(u32, IpAddr), u32>,
    /// Pages of rules that lie in each slot: rules hardly ever change.
    pages: Vec<Vec<Page>>,
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
            attached: BTreeSet::new(),
            numbers: BTreeMap::new(),
            pages: vec![Vec::new(); SLOTS as usize],
        }
    }

    /// The program's lease.
    pub fn lease(&self) -> KernelLease {
        self.filter.lease()
    }

    /// True if frames for `addr` are judged in the kernel, and so none of what is captured of them counts.
    pub fn takes(&self, addr: IpAddr) -> bool {
        self.numbers.keys().any(|(_, taken)| *taken == addr)
    }

    /// True if some are.
    pub fn is_at_work(&self) -> bool {
        !self.numbers.is_empty()
    }

    /// Addresses that are judged in the kernel.
    pub fn taken(&self) -> BTreeSet<IpAddr> {
        self.numbers.keys().map(|(_, addr)| *addr).collect()
    }

    /// Puts the program in the way of an interface; where that fails, frames are captured.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn attach(&mut self, index: u32, name: &str) -> Result<(), BpfError> {
        self.filter.attach(index, name)?;
        let attachment = self.filter.attachment();
        info!(interface = name, %attachment, "frames are judged in the kernel (eBPF at tc ingress)");
        self.attached.insert(index);
        Ok(())
    }

    /// How the program is attached.
    pub fn attachment(&self) -> Attachment {
        self.filter.attachment()
    }

    /// True if an interface has the program, or had it when that was last looked at.
    pub fn is_attached(&self, index: u32) -> bool {
        self.attached.contains(&index)
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

    /// Takes the program off an interface.
    pub fn detach(&mut self, index: u32) {
        self.filter.detach(index);
        self.attached.remove(&index);
        let left: Vec<(u32, IpAddr)> = self.numbers.keys().filter(|(i, _)| *i == index).copied().collect();
        for (interface, addr) in left {
            self.forget(interface, addr);
        }
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

    /// What is accepted reaches the stack through this device; `None` if there is none.
    pub fn set_tap(&mut self, device: Option<(u32, MacAddr)>) {
        let (tap, mac) = device.unwrap_or_default();
        self.control.tap = tap;
        self.control.tap_mac = mac.0;
        self.filter.set_control(&self.control);
        if tap == 0 {
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

    fn forget(&mut self, interface: u32, addr: IpAddr) {
        if let Err(error) = self.filter.set_vip_number(interface, addr, None) {
            warn!(%error, %addr, "the kernel program");
        }
        self.numbers.remove(&(interface, addr));
    }

    /// Judges by `plan` from now on, with `young` buckets of each group treated as such. Where the tables have no room for an address, or
    /// the kernel refuses it, its frames are captured.
    pub fn install(&mut self, plan: &Plan, young: &[BucketSet]) {
        self.epoch += 1;
        let numbers = match self.write(plan, young, self.epoch) {
            Ok(numbers) => {
                self.filter.set_epoch(self.epoch);
                numbers
            }
            Err(error) => {
                warn!(%error, "the kernel program cannot have the plan; frames are captured and judged in user space");
                // What is half written is never looked at.
                self.filter.set_epoch(0);
                BTreeMap::new()
            }
        };
        // Only now: the slot in force says what becomes of their frames.
        for (interface, addr) in self.numbers.keys().copied().collect::<Vec<_>>() {
            if !numbers.contains_key(&(interface, addr)) {
                self.forget(interface, addr);
            }
        }
        for ((interface, addr), number) in numbers {
            if !self.numbers.contains_key(&(interface, addr)) {
                self.note(interface, addr, number);
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

    /// Writes plan number `epoch`; the addresses it has, with their places. An address keeps its place as long as it is there.
    fn write(
        &mut self,
        plan: &Plan,
        young: &[BucketSet],
        epoch: u64,
    ) -> Result<BTreeMap<(u32, IpAddr), u32>, BpfError> {
        let slot = slot_of(epoch);
        let before = self
            .pages
            .get_mut(slot as usize)
            .map(std::mem::take)
            .unwrap_or_default();
        let mut pages: Vec<Page> = vec![[rule::NONE; 256]];
        let mut numbers = BTreeMap::new();
        let mut groups: BTreeSet<usize> = BTreeSet::new();
        for vip in &plan.vips {
            if vip.choice == PlaneChoice::Raw || !self.attached.contains(&vip.interface) || self.control.tap == 0 {
                continue;
            }
            let concerned = || vip.rules.iter().map(|r| r.group).chain([vip.entry_group]);
            let key = (vip.interface, vip.addr);
            let free = || {
                let used: BTreeSet<u32> = self.numbers.values().chain(numbers.values()).copied().collect();
                (0..MAX_VIPS).find(|n| !used.contains(n))
            };
            let Some(number) = self.numbers.get(&key).copied().or_else(free) else {
                continue;
            };
            if concerned().any(|group| group >= MAX_GROUPS as usize) {
                continue;
            }
            let Some((tcp, udp)) = directories(vip, &mut pages) else {
                continue;
            };
            numbers.insert(key, number);
            self.filter.set_directories(slot, number, &tcp, &udp)?;
            let peers = Peers(vip.peers.iter().map(|(node, mac)| (node.as_u8(), mac.0)).collect());
            self.filter.set_vip(epoch, number, &kernel_vip(plan, vip), &peers)?;
            groups.extend(concerned());
        }
        for (number, page) in (0..).zip(&pages) {
            if before.get(number as usize) != Some(page) {
                self.filter.set_page(slot, number, page)?;
            }
        }
        if let Some(known) = self.pages.get_mut(slot as usize) {
            *known = pages;
        }
        let none = BucketSet::default();
        for group in groups {
            if let Some(of) = plan.groups.get(group) {
                let table = buckets(of, young.get(group).unwrap_or(&none));
                self.filter.set_buckets(slot, group as u32, &table)?;
            }
        }
        Ok(numbers)
    }

    /// The program, for tests that run it on single frames.
    #[cfg(test)]
    pub fn filter(&mut self) -> &mut Filter {
        &mut self.filter
    }
}

fn kernel_vip(plan: &Plan, vip: &VipPlan) -> Vip {
    Vip {
        service_mac: vip.service_mac().0,
        own_mac: vip.own_mac.0,
        directed: vip.mode == L2Mode::Directed,
        entry_group: vip.entry_group as u16,
        this: plan.this.as_u8(),
    }
}

/// The table of one group.
fn buckets(group: &GroupPlan, young: &BucketSet) -> Box<[u16; BUCKETS]> {
    let mut table = Box::new([bucket::FOREIGN; BUCKETS]);
    for (i, entry) in table.iter_mut().enumerate() {
        let mut bits = match group.states[i] {
            BucketState::Own => bucket::OWN,
            BucketState::Guarded => bucket::GUARDED,
            BucketState::Draining => bucket::DRAINING,
            BucketState::Foreign => bucket::FOREIGN,
        };
        if group.leaving.contains(i) && matches!(group.states[i], BucketState::Draining | BucketState::Foreign) {
            bits |= bucket::LEAVING;
        }
        if young.contains(i) {
            bits |= bucket::YOUNG;
        }
        let owner = group.owners.owner_at(i).map(|node| node.as_u8());
        *entry = bucket::owned_by(bits, owner);
    }
    for held in group.holders.keys() {
        if let Some(entry) = table.get_mut(*held) {
            *entry |= bucket::HELD;
        }
    }
    table
}

/// For TCP and UDP, the pages that hold the rule of each port, added to `pages` where they are not there yet; `None` if there is no room.
fn directories(vip: &VipPlan, pages: &mut Vec<Page>) -> Option<(Page, Page)> {
    let known = pages.len();
    let mut of = |protocol| -> Option<Page> {
        let mut directory = [0; 256];
        for (high, entry) in (0u16..).zip(&mut directory) {
            let page = page_of(&vip.rules, protocol, high << 8);
            let number = match pages.iter().position(|known| *known == page) {
                Some(number) => number,
                None if pages.len() < MAX_PAGES as usize => {
                    pages.push(page);
                    pages.len() - 1
                }
                None => return None,
            };
            *entry = number as u16;
        }
        Some(directory)
    };
    let both = of(Protocol::Tcp).and_then(|tcp| Some((tcp, of(Protocol::Udp)?)));
    if both.is_none() {
        pages.truncate(known);
    }
    both
}

/// The rules of 256 ports from `first` on; rules come the most specific first.
fn page_of(rules: &[RulePlan], protocol: Protocol, first: u16) -> Page {
    let mut page = [rule::NONE; 256];
    for of in rules.iter().rev().filter(|r| r.protocol == protocol) {
        let from = of.first_port.max(first);
        let to = of.last_port.min(first | 0xff);
        let key = match of.affinity {
            Affinity::ClientIp => rule::Key::Addr,
            Affinity::ClientPort => rule::Key::Port,
            Affinity::ClientNet => rule::Key::Net,
            Affinity::IpId => rule::Key::IpId,
        };
        if from <= to {
            page[usize::from(from & 0xff)..=usize::from(to & 0xff)].fill(rule::to(of.group as u16, key));
        }
    }
    page
}

#[cfg(test)]
#[path = "kernel_tests.rs"]
mod tests;
