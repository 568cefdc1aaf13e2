//! What farmd changes on the host, and how it is undone.
//!
//! Owns the TAP, the VIPs' addresses on it, the nf_tables table and the sysctls of each service interface. Every change that outlives the process is written to
//! `VAR/host-state.json` *before* it is made; [`clean_up`] undoes what is written there with no memory of the last run. Teardown goes on past failures and
//! reports them all. What others do to it meanwhile is noticed by `watch`.
//!
//! | change | undone by |
//! | --- | --- |
//! | TAP device `farm0` with the VIPs as /32 or /128; IPv6 is on there only while it carries an IPv6 VIP | going away with the process, unless that leaves it to its successor (`reload`) |
//! | nf_tables table `netdev farm_IF`: ARP and neighbour solicitations for the VIPs never reach the host's own stack, and frames only if the program below has accepted them | removing the table |
//! | chain `resets` in it, while a node is missing: resets of the stack go to `farm0` | removing the chain, or the table |
//! | `net.ipv4.conf.IF.arp_announce = 2`: the kernel never asks with a VIP as sender | writing the old value, if it is still ours |
//! | `net.ipv4.conf.IF.arp_ignore = 1`, if it was 0: the kernel never answers for a VIP, even without the table | writing 0, if it is still ours |
//! | eBPF program at ingress of each service interface (the data plane's; a tcx link, or a filter at clsact) | a link by going away with the process, a filter by its handle |
//! | ring, socket for ARP and neighbour discovery, membership of the virtual MAC and of the groups that ask for an IPv6 VIP | going away with the process |

pub mod changes;
mod resets;
mod state;
#[cfg(test)]
mod tests;
mod watch;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use farm_core::config::{L2Mode, PlaneChoice, VipConfig};
use farm_core::id::{MacAddr, ModuleName};
use farm_sys::interface::{self, Interface};
use farm_sys::neighbour_socket::NeighbourSocket;
use farm_sys::netlink::Netlink;
use farm_sys::packet_socket::PacketRing;
use farm_sys::tap::{Tap, TapHandle};
use farm_sys::{nft, sysctl};
use tokio::time::{Instant, sleep};
use tracing::{info, warn};

use crate::dataplane::raw::{IDLE_RING_SLOTS, RING_SLOTS};
use crate::dataplane::replay::SynRing;
use crate::dataplane::{self, DataPlane, LocalDevice};
use crate::effect::blocking;
use state::HostState;
pub(crate) use state::boot_id;

/// Name of the device that carries the VIPs.
pub const DEVICE: &str = "farm0";
/// The longest packet that a TAP takes (65 535 without the Ethernet header).
const DEVICE_MTU: u32 = 65_521;
/// First part of the names of our nf_tables tables.
const TABLE_PREFIX: &str = "farm_";
/// How long the data plane may take to let go of the TAP; the kernel takes a second on a busy machine.
const DEVICE_GONE_LIMIT: Duration = Duration::from_secs(10);
/// How often that is looked for.
const DEVICE_GONE_POLL: Duration = Duration::from_millis(2);
/// The data plane waits for two sockets of each interface at once, and for two more, and can wait for 64.
const MAX_INTERFACES: usize = 30;
/// What keeps the device of VIPs from sending anything by itself while IPv6 is on there: it makes no addresses, probes for none and asks no router.
const SILENT_IPV6: [(&str, &str); 5] = [
    ("addr_gen_mode", "1"),
    ("autoconf", "0"),
    ("accept_ra", "0"),
    ("router_solicitations", "0"),
    ("dad_transmits", "0"),
];
/// Sysctls of a service interface and what farmd makes of them. IPv6 needs none: there the kernel neither answers on one interface for an address of another
/// nor asks with it.
const ARP_SYSCTLS: [(&str, &str); 2] = [("arp_announce", "2"), ("arp_ignore", "1")];

/// Where a VIP is on this host.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct HostVip {
    /// The address.
    pub addr: IpAddr,
    /// Kernel index of its service interface.
    pub interface: u32,
    /// That interface's own Ethernet address.
    pub own_mac: MacAddr,
}

/// Who has the device of virtual addresses in this network namespace.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum DeviceOwner {
    /// It is not there.
    Absent,
    /// Another farmd, which runs, or another program.
    InUse,
    /// A farmd that has left it to its successor.
    Left,
}

/// See [`DeviceOwner`].
pub fn device_owner() -> DeviceOwner {
    if interface::index(DEVICE).is_err() {
        return DeviceOwner::Absent;
    }
    // Only one process at a time gets such a device; to let go of one that was left changes nothing.
    match Tap::create(DEVICE) {
        Ok(_) => DeviceOwner::Left,
        Err(_) => DeviceOwner::InUse,
    }
}

/// Removes a device that was [`DeviceOwner::Left`].
///
/// # Errors
/// What the kernel says.
pub fn remove_left_device() -> io::Result<()> {
    Tap::create(DEVICE)?.handle()?.set_persistent(false)
}

/// Undoes what an earlier run has left in this network namespace. Returns what was done and what failed.
pub fn clean_up(var: &Path) -> (Vec<String>, Vec<String>) {
    let (mut state, mut problems) = match HostState::load(var) {
        Ok(state) => (state, Vec::new()),
        Err(error) => (HostState::default(), vec![error]),
    };
    let mut done = Vec::new();
    // They are known by themselves; a frame that one drops now is let by to the table, which goes next.
    match farm_sys::bpf::remove_left_filters() {
        Ok(interfaces) => done.extend(interfaces.iter().map(|name| format!("eBPF filter on {name} removed"))),
        Err(error) => problems.push(error.to_string()),
    }
    // Tables are found even if the list was lost.
    match nft::tables(TABLE_PREFIX) {
        Ok(tables) => state.tables.extend(tables),
        Err(error) => problems.push(format!("nf_tables cannot be listed: {error}")),
    }
    state.tables.sort();
    state.tables.dedup();
    let (undone, more) = state.undo();
    done.extend(undone);
    problems.extend(more);
    if let Err(error) = state.store(var) {
        problems.push(error);
    }
    (done, problems)
}

/// VIPs of one module on one service interface.
#[derive(Clone, Debug)]
struct Placed {
    module: ModuleName,
    interface: Interface,
    mac: MacAddr,
    addrs: Vec<IpAddr>,
    mode: L2Mode,
    /// `<interface check>`: the module leaves the farm while the interface is down.
    check: bool,
    /// Nobody named the interface: it was the one with this address' subnet.
    found_by: Option<IpAddr>,
}

/// The device that carries the VIPs.
struct Device {
    index: u32,
    handle: TapHandle,
}

/// See the module doc.
pub struct Host {
    var: PathBuf,
    netlink: Netlink,
    plane: Arc<dyn DataPlane>,
    state: HostState,
    placed: Vec<Placed>,
    device: Option<Device>,
    /// What was last said of each module's interfaces.
    links: BTreeMap<ModuleName, Option<String>>,
    /// When the tables were last looked at.
    tables_seen: Option<Instant>,
    /// When one was last made again.
    tables_mended: Option<Instant>,
    /// Resets go to the device.
    diverts_resets: bool,
    /// Why they cannot, where they cannot, by interface name.
    divert_problems: BTreeMap<String, (io::ErrorKind, String)>,
    /// Tables that are gone and cannot be made again, by interface name.
    table_problems: BTreeMap<String, String>,
}

impl Host {
    /// Nothing is set up yet; what [`clean_up`] could not undo is still noted.
    pub async fn new(var: PathBuf, plane: Arc<dyn DataPlane>) -> Result<Self, String> {
        let netlink = Netlink::open().await.map_err(|e| e.to_string())?;
        let state = HostState::load(&var).unwrap_or_else(|error| {
            warn!("{error}; what it notes is not undone");
            HostState::default()
        });
        Ok(Self {
            var,
            netlink,
            plane,
            state,
            placed: Vec::new(),
            device: None,
            links: BTreeMap::new(),
            tables_seen: None,
            tables_mended: None,
            // What the farmd before has diverted stays so until this one knows whom it hears.
            diverts_resets: true,
            divert_problems: BTreeMap::new(),
            table_problems: BTreeMap::new(),
        })
    }

    /// Makes the host carry the VIPs of a module. All or nothing: what was done before a failure is undone.
    pub async fn set_up(&mut self, module: &ModuleName, config: &VipConfig) -> Result<Vec<HostVip>, String> {
        if config.plane == PlaneChoice::Bpf {
            // What another module has just attached, or a stop has just detached, counts.
            _ = self.plane.caught_up().await;
        }
        let placed = self.place(module, config)?;
        match self.try_set_up(&placed, config.plane).await {
            Ok(()) => Ok(placed
                .iter()
                .flat_map(|p| {
                    p.addrs.iter().map(|addr| HostVip {
                        addr: *addr,
                        interface: p.interface.index,
                        own_mac: p.mac,
                    })
                })
                .collect()),
            Err(error) => {
                let problems = self.tear_down(module).await;
                let more = problems.into_iter().map(|p| format!("; then {p}")).collect::<String>();
                Err(format!("{error}{more}"))
            }
        }
    }

    /// Undoes [`Self::set_up`]; also what was set up in part.
    pub async fn tear_down(&mut self, module: &ModuleName) -> Vec<String> {
        let mut problems = Vec::new();
        let gone: Vec<Placed> = self.placed.iter().filter(|p| p.module == *module).cloned().collect();
        self.placed.retain(|p| p.module != *module);
        // What is said of its interfaces begins anew with the next set-up.
        self.links.remove(module);
        if let Some(device) = self.device.as_ref().map(|device| device.index) {
            for addr in gone.iter().flat_map(|p| &p.addrs) {
                if let Err(error) = self.netlink.addr_del(device, *addr, prefix_of(*addr)).await {
                    problems.push(error.to_string());
                }
            }
            let has_ipv6 = |p: &Placed| p.addrs.iter().any(IpAddr::is_ipv6);
            if gone.iter().any(has_ipv6) && !self.placed.iter().any(has_ipv6) {
                problems.extend(set_ipv6(false).err());
            }
        }
        let mut names: Vec<Interface> = gone.into_iter().map(|p| p.interface).collect();
        names.sort_by_key(|i| i.index);
        names.dedup_by_key(|i| i.index);
        for interface in names {
            problems.extend(self.refresh_interface(&interface).err());
        }
        if self.placed.is_empty() {
            // The device goes away with its last descriptor, which the data plane holds.
            self.plane.set_tap(None);
            if let Some(Device { index, handle }) = self.device.take() {
                drop(handle);
                problems.extend(device_gone(index).await.err());
            }
        }
        problems
    }

    /// Lets the VIPs outlive this process, for the one that takes its place.
    ///
    /// # Errors
    /// A sentence for the administrator.
    pub fn leave_to_successor(&self) -> Result<(), String> {
        let keep = |device: &Device| device.handle.set_persistent(true);
        self.device
            .as_ref()
            .map_or(Ok(()), keep)
            .map_err(|e| format!("{DEVICE} cannot be kept: {e}"))
    }

    /// Finds the interface of each VIP and refuses what cannot work, before anything is touched.
    fn place(&self, module: &ModuleName, config: &VipConfig) -> Result<Vec<Placed>, String> {
        let standing = self.plane.standing();
        may_serve(config.plane, standing.problem.as_ref())?;
        let all = interface::interfaces();
        let mut placed = Vec::new();
        for wanted in &config.interfaces {
            let addrs = || wanted.virtual_interfaces.iter().flat_map(|v| &v.addrs).map(|a| a.addr);
            let found = match &wanted.name {
                Some(name) => all
                    .iter()
                    .find(|i| i.name == *name)
                    .ok_or_else(|| format!("there is no interface {name}, as <interface name=\"{name}\"> wants"))?,
                None => {
                    let first = addrs().next().ok_or("an interface without a virtual address")?;
                    all.iter()
                        .filter(|i| i.name != DEVICE)
                        .find(|i| i.has_subnet_of(first))
                        .ok_or_else(|| {
                            format!(
                                "no interface has an address in the subnet of {first}; name one: <interface name=\"…\">"
                            )
                        })?
                }
            };
            may_serve(config.plane, standing.captured.get(&found.name))?;
            if !found.up {
                return Err(format!("interface {} is down", found.name));
            }
            let mac = found
                .mac
                .ok_or_else(|| format!("interface {} has no Ethernet address", found.name))?;
            if let Some(addr) = addrs()
                .find(IpAddr::is_ipv6)
                .filter(|_| !found.addrs.iter().any(|(own, _)| own.is_ipv6()))
            {
                return Err(format!(
                    "interface {} has no IPv6 address, so that {addr} cannot be served there: switch IPv6 on (sysctl net.ipv6.conf.{}.disable_ipv6)",
                    found.name, found.name
                ));
            }
            for addr in addrs() {
                if let Some(owner) = all
                    .iter()
                    .find(|i| i.name != DEVICE && i.addrs.iter().any(|(a, _)| *a == addr))
                {
                    return Err(format!(
                        "{addr} is an ordinary address of {} already; a virtual address must not be",
                        owner.name
                    ));
                }
                if self.placed.iter().any(|p| p.addrs.contains(&addr)) {
                    return Err(format!("{addr} is in use by another module here"));
                }
            }
            for virtual_interface in &wanted.virtual_interfaces {
                placed.push(Placed {
                    module: module.clone(),
                    interface: found.clone(),
                    mac: MacAddr(mac),
                    addrs: virtual_interface.addrs.iter().map(|a| a.addr).collect(),
                    mode: virtual_interface.mode,
                    check: wanted.check,
                    found_by: if wanted.name.is_none() { addrs().next() } else { None },
                });
            }
        }
        let names: BTreeSet<&str> = self
            .placed
            .iter()
            .chain(&placed)
            .map(|p| p.interface.name.as_str())
            .collect();
        if names.len() > MAX_INTERFACES {
            return Err(format!(
                "with module {module} there would be {} service interfaces on this host, at most {MAX_INTERFACES} can be served; put its virtual addresses on \
                 fewer interfaces, or stop another module first",
                names.len()
            ));
        }
        Ok(placed)
    }

    async fn try_set_up(&mut self, placed: &[Placed], choice: PlaneChoice) -> Result<(), String> {
        let device = match &self.device {
            Some(device) => device.index,
            None => self.create_device().await?,
        };
        for one in placed {
            // Sockets belong to the index: an interface that was made anew gets new ones, even while another module still has the old ones.
            let attached = self.placed.iter().any(|p| p.interface.index == one.interface.index);
            self.placed.push(one.clone());
            if !attached {
                // A ring that captures nothing needs no room; one that is to capture gets it now, as it takes tens of milliseconds (the kernel waits until no processor uses the socket).
                let captures = choice == PlaneChoice::Raw || self.plane.standing().problem.is_some();
                let slots = if captures { RING_SLOTS } else { IDLE_RING_SLOTS };
                self.open_interface(&one.interface, slots)?;
            }
            if choice == PlaneChoice::Bpf {
                _ = self.plane.caught_up().await;
                may_serve(choice, self.plane.standing().captured.get(&one.interface.name))?;
            }
            if one.addrs.iter().any(IpAddr::is_ipv4) {
                self.quiet_arp(&one.interface.name)?;
            }
            // The drop must stand before the address does, or the host's own stack answers for a moment.
            self.refresh_interface(&one.interface)?;
            if let Some(addr) = one.addrs.iter().find(|addr| addr.is_ipv6()) {
                set_ipv6(true).map_err(|error| format!("{DEVICE} cannot carry {addr}: {error}"))?;
            }
            forget_half_open(device, &one.addrs).await;
            for addr in &one.addrs {
                self.netlink
                    .addr_add_passive(device, *addr, prefix_of(*addr))
                    .await
                    .map_err(|e| e.to_string())?;
            }
            info!(module = %one.module, interface = one.interface.name, vips = ?one.addrs, mode = ?one.mode, "virtual addresses set");
        }
        Ok(())
    }

    /// The TAP: no ARP, no multicast, no IPv6 before it carries an IPv6 VIP, so that it never sends a frame of its own.
    async fn create_device(&mut self) -> Result<u32, String> {
        // Addresses of one that is taken over would go with its IPv6.
        let is_new = interface::index(DEVICE).is_err();
        let tap = Tap::create(DEVICE).map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => {
                "there is no /dev/net/tun, which carries the virtual address: load the tun module (modprobe tun), or give the container the device".to_owned()
            }
            io::ErrorKind::PermissionDenied => {
                format!("{DEVICE} cannot be made ({error}): farmd needs CAP_NET_ADMIN, and /dev/net/tun must be readable and writable for it")
            }
            io::ErrorKind::ResourceBusy => {
                format!("{DEVICE} is still there: either the one of before is going away (start the module again in some seconds), or another program of this network namespace has made it (`ip -d link show {DEVICE}`)")
            }
            _ => format!("{DEVICE} cannot be made: {error}"),
        })?;
        let index = tap.ifindex();
        let handle = tap.handle().map_err(|e| format!("{DEVICE}: {e}"))?;
        // One that a farmd before this one has left goes away with this process again.
        handle.set_persistent(false).map_err(|e| format!("{DEVICE}: {e}"))?;
        let fail = |e: farm_sys::netlink::NetlinkError| e.to_string();
        self.netlink.set_arp(index, false).await.map_err(fail)?;
        self.netlink.set_multicast(index, false).await.map_err(fail)?;
        // These die with the device and need no undoing. 2 is loose: the clients' addresses are not reachable through the TAP.
        sysctl::write(&sysctl::interface("ipv4", DEVICE, "rp_filter"), "2").map_err(|e| e.to_string())?;
        if is_new {
            set_ipv6(false)?;
        }
        // Frames of any length come in here, whatever the service interface takes.
        self.netlink.set_mtu(index, DEVICE_MTU).await.map_err(fail)?;
        // What the program in the kernel leaves to farmd waits there, as what the raw data plane captures waits in its ring: as long here as there, some 30 ms
        // at 70 000 frames a second. 500 frames, the default, are full in 7 ms, which the thread may have to wait for a processor.
        self.netlink.set_queue_length(index, RING_SLOTS).await.map_err(fail)?;
        self.netlink.link_up(index).await.map_err(fail)?;
        let mac = interface::interfaces()
            .into_iter()
            .find(|i| i.index == index)
            .and_then(|i| i.mac);
        let mac = MacAddr(mac.ok_or_else(|| format!("{DEVICE} has no Ethernet address"))?);
        self.plane.set_tap(Some(LocalDevice { tap, mac }));
        self.device = Some(Device { index, handle });
        Ok(index)
    }

    fn open_interface(&mut self, interface: &Interface, slots: u32) -> Result<(), String> {
        let fail = |what: &str, e: io::Error| {
            if e.kind() == io::ErrorKind::PermissionDenied {
                format!("{what} on {}: farmd lacks CAP_NET_RAW", interface.name)
            } else {
                format!("{what} on {}: {e}", interface.name)
            }
        };
        let closed = dataplane::kernel_program(&farm_core::balance::filter::closed());
        let ring = PacketRing::open(interface.index, slots, &closed);
        // The data plane asks for room again, and tells if there is none.
        let ring = ring.or_else(|_| PacketRing::open(interface.index, IDLE_RING_SLOTS, &closed));
        let ring = ring.map_err(|e| fail("packet ring", e))?;
        let syns = SynRing::open(interface.index)
            .inspect_err(|e| warn!(error = %e, interface = interface.name, "connection requests cannot be recorded: clients that connect during a crash wait for their own retransmission"))
            .ok();
        let neighbours = NeighbourSocket::open(interface.index).map_err(|e| fail("socket for ARP and ND", e))?;
        self.plane.attach(dataplane::Interface {
            index: interface.index,
            name: interface.name.clone(),
            ring,
            syns,
            neighbours,
            joined: std::collections::BTreeSet::new(),
            is_narrow: false,
        });
        Ok(())
    }

    /// The kernel teaches no client this host's address, neither by asking with a VIP as sender nor by answering for one.
    fn quiet_arp(&mut self, interface: &str) -> Result<(), String> {
        for (key, ours) in ARP_SYSCTLS {
            let name = sysctl::interface("ipv4", interface, key);
            let before = sysctl::read(&name).map_err(|e| e.to_string())?;
            // Each value of arp_ignore but 0 keeps the kernel from answering for an address of another device.
            if before == ours || (key == "arp_ignore" && before != "0") {
                continue;
            }
            // Noted before, but not ours now: the interface was made anew, or somebody has changed it.
            self.state.sysctls.retain(|(noted, ..)| *noted != name);
            self.state.sysctls.push((name.clone(), before, ours.to_owned()));
            self.state.store(&self.var)?;
            sysctl::write(&name, ours).map_err(|e| e.to_string())?;
        }
        Ok(())
    }

    /// VIPs placed on the interface of this name, of all modules.
    fn vips_on(&self, interface: &str) -> Vec<IpAddr> {
        let there = self.placed.iter().filter(|p| p.interface.name == interface);
        there.flat_map(|p| p.addrs.clone()).collect()
    }

    /// Brings the table of an interface in line with the VIPs placed there; without any, everything on it is undone.
    fn refresh_interface(&mut self, interface: &Interface) -> Result<(), String> {
        if self.placed.iter().all(|p| p.interface.index != interface.index) {
            self.plane.detach(interface.index);
        }
        let table = table_of(&interface.name);
        let vips = self.vips_on(&interface.name);
        if vips.is_empty() {
            let names = ARP_SYSCTLS.map(|(key, _)| sysctl::interface("ipv4", &interface.name, key));
            let (of_this, others): (Vec<_>, Vec<_>) = std::mem::take(&mut self.state.sysctls)
                .into_iter()
                .partition(|(n, ..)| names.contains(n));
            let mut part = HostState {
                tables: vec![table.clone()],
                sysctls: of_this,
                ..HostState::default()
            };
            let (_, problems) = part.undo();
            self.state.sysctls = others;
            self.state.sysctls.extend(part.sysctls);
            self.state.tables.retain(|t| *t != table || part.tables.contains(t));
            self.state.store(&self.var)?;
            return if problems.is_empty() {
                Ok(())
            } else {
                Err(problems.join("; "))
            };
        }
        if !self.state.tables.contains(&table) {
            self.state.tables.push(table.clone());
            self.state.store(&self.var)?;
        }
        nft::install(&table, &interface.name, &vips, true).map_err(|error| {
            format!("nf_tables table netdev {table} (the kernel must leave the VIP's frames to farmd): {error}")
        })?;
        self.divert_on(&interface.name);
        Ok(())
    }
}

/// Refuses a module that wants its frames to be judged in the kernel where `problem` is in the way.
fn may_serve(choice: PlaneChoice, problem: Option<&String>) -> Result<(), String> {
    match problem {
        Some(problem) if choice == PlaneChoice::Bpf => Err(format!(
            "<vip dataplane=\"bpf\"> cannot be had here: {problem}; `auto` serves in user space"
        )),
        _ => Ok(()),
    }
}

/// Name of our nf_tables table for an interface.
fn table_of(interface: &str) -> String {
    format!("{TABLE_PREFIX}{interface}")
}

/// What a farmd that was killed has left half open with the addresses that the device does not have yet: others may have answered since.
async fn forget_half_open(device: u32, addrs: &[IpAddr]) {
    let interfaces = interface::interfaces();
    let there = interfaces.iter().find(|i| i.index == device);
    let is_there = |addr: &IpAddr| there.is_some_and(|i| i.addrs.iter().any(|(a, _)| a == addr));
    let anew: Vec<IpAddr> = addrs.iter().filter(|addr| !is_there(addr)).copied().collect();
    if anew.is_empty() {
        return;
    }
    match blocking(move || crate::reset::forget_half_open(&anew, |_, _| true)).await {
        Ok(0) => {}
        Ok(count) => info!(count, "handshakes of an earlier run are forgotten"),
        Err(error) => {
            warn!(%error, "handshakes of an earlier run cannot be forgotten: clients that another node has answered may be reset")
        }
    }
}

/// Waits until the data plane's thread has let go of the TAP: a start that follows at once makes it anew.
async fn device_gone(index: u32) -> Result<(), String> {
    let deadline = Instant::now() + DEVICE_GONE_LIMIT;
    while interface::index(DEVICE).is_ok_and(|now| now == index) {
        if Instant::now() >= deadline {
            return Err(format!("{DEVICE} is still there after {DEVICE_GONE_LIMIT:?}"));
        }
        sleep(DEVICE_GONE_POLL).await;
    }
    Ok(())
}

/// Switches IPv6 on or off on the device of VIPs; where it is on, the device sends nothing by itself all the same.
fn set_ipv6(on: bool) -> Result<(), String> {
    let write = |key, value| sysctl::write(&sysctl::interface("ipv6", DEVICE, key), value);
    if !on {
        return match write("disable_ipv6", "1") {
            Ok(()) => Ok(()),
            // A kernel without IPv6.
            Err(error) if error.is_absent() => Ok(()),
            Err(error) => Err(error.to_string()),
        };
    }
    SILENT_IPV6
        .into_iter()
        .chain([("disable_ipv6", "0")])
        .try_for_each(|(key, value)| write(key, value))
        .map_err(|error| {
            if error.is_absent() {
                "this kernel has no IPv6".to_owned()
            } else {
                error.to_string()
            }
        })
}

/// Host routes only: the VIP is never on-link by itself.
fn prefix_of(addr: IpAddr) -> u8 {
    match addr {
        IpAddr::V4(_) => 32,
        IpAddr::V6(_) => 128,
    }
}
