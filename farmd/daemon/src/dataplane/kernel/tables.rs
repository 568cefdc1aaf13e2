//! A plan as the kernel program's tables have it: places of the addresses, pages of port rules, buckets.
//!
//! Pure: it works out what is to lie in the tables, and what they have no room for; [`super::Kernel`] writes it. What the configuration decides is a
//! [`Layout`], worked out once for as long as it is the same; a change of buckets costs the tables of the buckets only.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use farm_core::balance::plan::{BucketState, GroupPlan, Plan, RulePlan, VipPlan};
use farm_core::config::{Affinity, L2Mode, Protocol};
use farm_core::id::BUCKETS;
use farm_core::wire::heartbeat::BucketSet;
use farm_sys::bpf::{HOLDER_SETS, Holders, MAX_GROUPS, MAX_PAGES, MAX_VIPS, Page, Peers, Vip, bucket, rule};

/// Ports of a page.
const PAGE: usize = 256;
const EMPTY: Page = [rule::NONE; PAGE];

/// Why the frames of an address cannot be judged in the kernel: its tables are of a fixed size.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum NoRoom {
    /// As many addresses as there are places.
    Addresses,
    /// A rule, or the entry node, goes by a group past the last that has a table.
    Groups,
    /// The rules of the addresses before it, and its own, differ in too many ranges of 256 ports.
    Pages,
}

impl fmt::Display for NoRoom {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Addresses => write!(f, "the kernel's tables have room for {MAX_VIPS} virtual addresses"),
            Self::Groups => write!(f, "the kernel's tables have room for the first {MAX_GROUPS} groups"),
            Self::Pages => write!(
                f,
                "the kernel's tables have room for {} different sets of rules, each of {PAGE} ports",
                MAX_PAGES - 1
            ),
        }
    }
}

/// Which page has the rules of each 256 ports.
#[derive(PartialEq, Eq, Debug)]
pub struct Directories {
    /// For TCP.
    pub tcp: Page,
    /// For UDP.
    pub udp: Page,
}

/// An address in the tables.
#[derive(Debug)]
pub struct Place {
    /// Where: below [`MAX_VIPS`].
    pub number: u32,
    /// Kernel index of its service interface.
    pub interface: u32,
    /// The address.
    pub addr: IpAddr,
    /// Its rules.
    pub directories: Arc<Directories>,
    /// Position in the plan's addresses.
    pub position: usize,
}

/// What the tables hold of a plan as long as only buckets, owners and peers change.
#[derive(Debug, Default)]
pub struct Layout {
    /// The addresses.
    pub places: Vec<Place>,
    /// All pages; the first is the empty one.
    pub pages: Vec<Page>,
    /// Groups that their rules, or their entry nodes, go by.
    pub groups: BTreeSet<usize>,
    /// Addresses for which there is no room.
    pub refused: BTreeMap<IpAddr, NoRoom>,
    /// What it was worked out from.
    from: Vec<Service>,
}

/// What an address brings into a layout; `None` in the place of one that is not to be judged in the kernel.
type Service = Option<(u32, IpAddr, usize, Arc<[RulePlan]>)>;

fn service(vip: &VipPlan, wanted: bool) -> Service {
    wanted.then(|| (vip.interface, vip.addr, vip.entry_group, Arc::clone(&vip.rules)))
}

impl Layout {
    /// True if this is the layout of `plan`, of whose addresses those are to be in it that `wanted` says.
    pub fn fits(&self, plan: &Plan, wanted: &dyn Fn(&VipPlan) -> bool) -> bool {
        let same = |(vip, known): (&VipPlan, &Service)| match known {
            Some((interface, addr, group, rules)) => {
                wanted(vip)
                    && (vip.interface, vip.addr, vip.entry_group) == (*interface, *addr, *group)
                    && vip.has_rules(rules)
            }
            None => !wanted(vip),
        };
        self.from.len() == plan.vips.len() && plan.vips.iter().zip(&self.from).all(same)
    }

    /// The layout of `plan`. An address in `numbers` keeps the place it has.
    pub fn new(plan: &Plan, wanted: &dyn Fn(&VipPlan) -> bool, numbers: &BTreeMap<(u32, IpAddr), u32>) -> Self {
        let mut layout = Self {
            from: plan.vips.iter().map(|vip| service(vip, wanted(vip))).collect(),
            ..Self::default()
        };
        let mut taken: BTreeSet<u32> = numbers.values().copied().collect();
        let mut book = Book::default();
        for (position, vip) in plan.vips.iter().enumerate().filter(|(_, vip)| wanted(vip)) {
            let known = numbers.get(&(vip.interface, vip.addr)).copied();
            let number = known.or_else(|| (0..MAX_VIPS).find(|number| !taken.contains(number)));
            let groups: BTreeSet<usize> = vip.rules.iter().map(|r| r.group).chain([vip.entry_group]).collect();
            let placed = match number {
                None => Err(NoRoom::Addresses),
                Some(_) if groups.iter().any(|group| *group >= MAX_GROUPS as usize) => Err(NoRoom::Groups),
                Some(number) => book.directories(&vip.rules).map(|directories| (number, directories)),
            };
            match placed {
                Ok((number, directories)) => {
                    taken.insert(number);
                    layout.groups.extend(groups);
                    layout.places.push(Place {
                        number,
                        interface: vip.interface,
                        addr: vip.addr,
                        directories,
                        position,
                    });
                }
                Err(why) => {
                    layout.refused.insert(vip.addr, why);
                }
            }
        }
        layout.pages = book.pages;
        layout
    }
}

/// Pages of rules, each of them once.
struct Book {
    pages: Vec<Page>,
    numbers: BTreeMap<Page, u16>,
    /// Addresses often share their rules.
    known: Vec<(Arc<[RulePlan]>, Arc<Directories>)>,
}

impl Default for Book {
    fn default() -> Self {
        Self {
            pages: vec![EMPTY],
            numbers: BTreeMap::from([(EMPTY, 0)]),
            known: Vec::new(),
        }
    }
}

impl Book {
    fn directories(&mut self, rules: &Arc<[RulePlan]>) -> Result<Arc<Directories>, NoRoom> {
        if let Some((_, known)) = self.known.iter().find(|(of, _)| Arc::ptr_eq(of, rules)) {
            return Ok(Arc::clone(known));
        }
        let before = self.pages.len();
        let both = self
            .directory(rules, Protocol::Tcp)
            .and_then(|tcp| Some((tcp, self.directory(rules, Protocol::Udp)?)));
        let Some((tcp, udp)) = both else {
            for page in self.pages.drain(before..) {
                self.numbers.remove(&page);
            }
            return Err(NoRoom::Pages);
        };
        let directories = Arc::new(Directories { tcp, udp });
        self.known.push((Arc::clone(rules), Arc::clone(&directories)));
        Ok(directories)
    }

    fn directory(&mut self, rules: &[RulePlan], protocol: Protocol) -> Option<Page> {
        let mut directory = [0; PAGE];
        let ports = by_port(rules, protocol);
        for (entry, page) in directory.iter_mut().zip(ports.as_chunks::<PAGE>().0) {
            *entry = match self.numbers.get(page) {
                Some(number) => *number,
                None if self.pages.len() < MAX_PAGES as usize => {
                    let number = self.pages.len() as u16;
                    self.pages.push(*page);
                    self.numbers.insert(*page, number);
                    number
                }
                None => return None,
            };
        }
        Some(directory)
    }
}

/// The rule of each port; rules come the most specific first.
fn by_port(rules: &[RulePlan], protocol: Protocol) -> Vec<u16> {
    let mut ports = vec![rule::NONE; PAGE * PAGE];
    for of in rules.iter().rev().filter(|r| r.protocol == protocol) {
        if let Some(range) = ports.get_mut(usize::from(of.first_port)..=usize::from(of.last_port)) {
            range.fill(number_of(of));
        }
    }
    ports
}

fn number_of(of: &RulePlan) -> u16 {
    let key = match of.affinity {
        Affinity::ClientIp => rule::Key::Addr,
        Affinity::ClientPort => rule::Key::Port,
        Affinity::ClientNet => rule::Key::Net,
        Affinity::IpId => rule::Key::IpId,
    };
    rule::to(of.group as u16, key)
}

/// What the program knows of an address beside its rules.
pub fn vip(plan: &Plan, vip: &VipPlan) -> Vip {
    Vip {
        service_mac: vip.service_mac().0,
        own_mac: vip.own_mac.0,
        directed: vip.mode == L2Mode::Directed,
        entry_group: vip.entry_group as u16,
        this: plan.this.as_u8(),
        portless: [Protocol::Tcp, Protocol::Udp]
            .map(|protocol| vip.portless_rule(protocol).map_or(rule::NONE, number_of)),
    }
}

/// The other members on its interface.
pub fn peers(vip: &VipPlan) -> Peers {
    Peers(vip.peers.iter().map(|(node, mac)| (node.as_u8(), mac.0)).collect())
}

/// Fills the table of one group, of whose buckets some are `young`; if it `asks`, what is not known in guarded ones is for the daemon.
pub fn buckets(group: &GroupPlan, young: Option<&BucketSet>, asks: bool, table: &mut [u16; BUCKETS]) {
    let guarded = if asks {
        bucket::GUARDED | bucket::ASKS
    } else {
        bucket::GUARDED
    };
    let owners = group.owners.as_bytes().iter();
    for (entry, (state, owner)) in table.iter_mut().zip(group.states.iter().zip(owners)) {
        let bits = match state {
            BucketState::Own => bucket::OWN,
            BucketState::Guarded => guarded,
            BucketState::Draining => bucket::DRAINING,
            BucketState::Foreign => bucket::FOREIGN,
        };
        *entry = bucket::owned_by(bits, *owner);
    }
    for leaving in group.leaving.iter() {
        if matches!(group.states[leaving], BucketState::Draining | BucketState::Foreign) {
            table[leaving] |= bucket::LEAVING;
        }
    }
    for young in young.into_iter().flat_map(BucketSet::iter) {
        table[young] |= bucket::YOUNG;
    }
    for held in group.holders.keys() {
        if let Some(entry) = table.get_mut(*held) {
            *entry |= bucket::HELD;
        }
    }
}

/// Who else has connections in the buckets of one group. Sets past the last that has a place are left out, and the daemon asked for those.
pub fn holders(group: &GroupPlan) -> Holders {
    let mut holders = Holders::default();
    let mut known: BTreeMap<u64, u8> = BTreeMap::new();
    for (bucket, set) in &group.holders {
        let number = match known.get(&set.bits()) {
            Some(number) => *number,
            None if holders.sets.len() < HOLDER_SETS && !set.is_empty() => {
                let number = holders.sets.len() as u8;
                holders.sets.push(set.bits());
                known.insert(set.bits(), number);
                number
            }
            None => 0,
        };
        if let Some(entry) = holders.numbers.get_mut(*bucket) {
            *entry = number;
        }
    }
    holders
}

#[cfg(test)]
#[path = "tables_tests.rs"]
mod tests;
