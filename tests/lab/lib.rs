//! A farm in a box: a switch, nodes, clients and a router as network namespaces of one machine.
//!
//! ```text
//!   client 198.18.0.100 ─┐            ┌─ node1 198.18.0.11 ─ farmd, nginx
//!     (many addresses)   ├─ sw (br0) ─┼─ node2 198.18.0.12
//!   far 198.19.0.x ─ router .254 ─────┘─ node3 198.18.0.13      VIP 198.18.0.20
//! ```
//!
//! Owns all of it (RAII): dropping the [`Lab`], or killing the process that made it with any signal, leaves no namespace, link or process
//! behind. Drives farmd and the command line from outside only, as processes; measures traffic as a client sees it and as it
//! is on the wire. It never touches the interfaces, sysctls or firewall of the host. Used by `farm-lab` and by the tests.
#![allow(clippy::missing_errors_doc)]

pub mod bench;
pub mod chaos;
pub mod client;
pub mod config;
pub mod control;
pub mod crowd;
mod folders;
pub mod hold;
pub mod http;
pub mod module;
pub mod node;
pub mod outcome;
pub mod pinger;
pub mod probe;
pub mod process;
pub mod random;
pub mod requester;
pub mod responder;
pub mod space;
pub mod stall;
pub mod udp;
pub mod wire;
pub mod yardstick;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use farm_core::api::{ModuleState, NodeModuleStatus, Quality};
use farm_core::id::BUCKETS;

pub use client::Client;
pub use config::{Group, LabConfig, Mode, VIP, VIP2, VIP6, Vip};
pub use folders::{binaries, clean_up};
pub use module::ModuleText;
pub use node::Node;
pub use process::wait_until;
pub use space::Space;

pub(crate) use folders::lab_program;
use folders::{FolderGuard, working_folder};

use config::{
    FAR_ROUTER, ROUTER, client_addrs, far_addrs, far_ipv6_of, ipv6_of, more_client_addrs, node_addr, node_name,
};
use module::nginx_scripts;
use node::NODE_LINK;
use space::connect;

/// Name of the module that [`Lab::serve`] installs.
pub const MODULE: &str = "web";

/// The switch port of the LAN client.
pub const CLIENT_PORT: &str = "pc";
/// The switch port of the router.
pub const ROUTER_PORT: &str = "pr";
/// The switch itself, in its namespace.
pub const BRIDGE: &str = "br0";
/// The switch of the second lan, in the same namespace; its ports are `q1`, `q2`…
pub const SECOND_BRIDGE: &str = "br1";
/// The nodes' link on the second lan.
const SECOND_LINK: &str = "eth1";

/// The whole rig.
#[derive(Debug)]
pub struct Lab {
    /// Farm nodes, in the order of `cluster.xml`.
    pub nodes: Vec<Node>,
    /// The client on the LAN.
    pub client: Client,
    /// The client behind the router, if the lab has one.
    pub far: Option<Client>,
    /// The switch's namespace.
    pub switch: Arc<Space>,
    /// The router's namespace, kept alive here.
    pub router: Option<Space>,
    config: LabConfig,
    base: PathBuf,
    since: Instant,
}

impl Lab {
    /// Builds the rig with `cluster.xml` and the key on every node. No farmd runs yet.
    pub fn new(config: LabConfig) -> Result<Self> {
        let lab = Self::build(config, binaries()?)?;
        lab.write_cluster()?;
        Ok(lab)
    }

    /// Removes the interface of the node at `index` on the second lan, with its cable, and makes a new one of the same name and address.
    ///
    /// # Errors
    /// What ip(8) says.
    pub fn renew_second_link(&self, index: usize) -> Result<()> {
        let space = self.nodes[index].space();
        space.ip(&[format!("link delete {SECOND_LINK}")])?;
        plug_second(&self.config, &self.switch, index, space)
    }

    /// Builds the rig only: namespaces, links, addresses and folders, without anything of the farm.
    pub fn bare(config: LabConfig) -> Result<Self> {
        Self::build(config, PathBuf::new())
    }

    fn build(config: LabConfig, bin: PathBuf) -> Result<Self> {
        if !(1..=60).contains(&config.nodes) || !(1..=4000).contains(&config.client_addrs) {
            bail!(
                "a lab has 1 to 60 nodes and 1 to 4000 client addresses, not {} and {}",
                config.nodes,
                config.client_addrs
            );
        }
        stall::watch();
        let base = working_folder()?;
        // From here on `base` goes away with the value, whatever fails below.
        let guard = FolderGuard(Some(base.clone()));

        let switch = Arc::new(Space::create("sw")?);
        // Without IPv6 the switch itself is silent: all frames on the wire are the nodes' and the clients'.
        switch.sysctl("net.ipv6.conf.all.disable_ipv6", "1")?;
        for bridge in std::iter::once(BRIDGE).chain(config.second_lan.then_some(SECOND_BRIDGE)) {
            switch.ip(&[
                format!("link add {bridge} type bridge mcast_snooping 0 stp_state 0"),
                format!("link set {bridge} up"),
            ])?;
        }

        let mut nodes = Vec::new();
        for index in 0..config.nodes {
            let (name, addr, port) = (node_name(index), node_addr(index), format!("p{}", index + 1));
            let space = Space::create(&name)?;
            if config.has_ipv6() {
                without_probes(&space)?;
            }
            plug(&switch, BRIDGE, &port, &space, NODE_LINK)?;
            if config.has_ipv6() {
                space.ip(&[
                    format!("address add {}/64 dev {NODE_LINK}", ipv6_of(addr)),
                    format!("route add default via {} dev {NODE_LINK}", ipv6_of(ROUTER)),
                ])?;
            }
            space.ip(&[
                format!("address add {addr}/16 dev {NODE_LINK}"),
                format!("route add default via {ROUTER} dev {NODE_LINK}"),
            ])?;
            if config.second_lan {
                plug_second(&config, &switch, index, &space)?;
            }
            nodes.push(Node::create(
                name,
                addr,
                port,
                space,
                Arc::clone(&switch),
                &base,
                (bin.clone(), config.attach),
            )?);
        }

        let client = client_space(
            "client",
            &switch,
            CLIENT_PORT,
            &client_addrs(config.client_addrs),
            config.has_ipv6(),
        )?;
        let (router, far) = if config.routed {
            let (router, far) = (Space::create("router")?, Space::create("far")?);
            if config.has_ipv6() {
                without_probes(&router)?;
                without_probes(&far)?;
                router.sysctl("net.ipv6.conf.all.forwarding", "1")?;
            }
            plug(&switch, BRIDGE, ROUTER_PORT, &router, "eth0")?;
            router.sysctl("net.ipv4.ip_forward", "1")?;
            connect(&router, "eth1", &far, "eth0")?;
            router.ip(&[
                format!("address add {ROUTER}/16 dev eth0"),
                format!("address add {FAR_ROUTER}/24 dev eth1"),
            ])?;
            let addrs = far_addrs(config.client_addrs);
            far.ip(&addrs
                .iter()
                .map(|addr| format!("address add {addr}/24 dev eth0"))
                .collect::<Vec<_>>())?;
            far.ip(&[format!("route add default via {FAR_ROUTER}")])?;
            let addrs6: Vec<_> = addrs.iter().map(|addr| far_ipv6_of(*addr)).collect();
            if config.has_ipv6() {
                let at_router = far_ipv6_of(FAR_ROUTER);
                router.ip(&[
                    format!("address add {}/64 dev eth0", ipv6_of(ROUTER)),
                    format!("address add {at_router}/64 dev eth1"),
                ])?;
                far.ip(&addrs6
                    .iter()
                    .map(|addr| format!("address add {addr}/64 dev eth0"))
                    .collect::<Vec<_>>())?;
                far.ip(&[format!("route add default via {at_router} dev eth0")])?;
            }
            (Some(router), Some(Client::new(far, addrs).with_ipv6(addrs6)))
        } else {
            (None, None)
        };

        std::mem::forget(guard);
        Ok(Self {
            nodes,
            client,
            far,
            switch,
            router,
            config,
            base,
            since: Instant::now(),
        })
    }

    /// Builds the rig, starts farmd everywhere, installs the generated module (nginx behind the VIP) and starts it; returns when
    /// every node is UP Ready with its share.
    pub fn serve(config: LabConfig) -> Result<Self> {
        let lab = Self::new(config)?;
        lab.start_daemons()?;
        for node in &lab.nodes {
            node.install_text(MODULE, &lab.module_text(node, Some("1s")), &lab.config.listen())?;
        }
        lab.start_module(MODULE)?;
        Ok(lab)
    }

    /// What the lab was built from.
    pub fn config(&self) -> &LabConfig {
        &self.config
    }

    /// The folder that holds all of the lab's files while it lives.
    pub fn base(&self) -> &Path {
        &self.base
    }

    /// The generated module for `node`.
    pub fn module_text(&self, node: &Node, checker: Option<&str>) -> ModuleText {
        ModuleText {
            userconfig: self.config.userconfig_xml(checker),
            scripts: nginx_scripts(&node.nginx_dir()),
        }
    }

    /// Writes `cluster.xml` on every node, and one key made by the first node's command line.
    fn write_cluster(&self) -> Result<()> {
        let xml = self.config.cluster_xml();
        for node in &self.nodes {
            module::write_file(&node.dirs().etc.join("cluster.xml"), &xml, 0o644)?;
        }
        if let Some(key) = &self.config.key {
            return self.nodes.iter().try_for_each(|node| {
                module::write_file(&node.dirs().etc.join("cluster.key"), &format!("{key}\n"), 0o600)
            });
        }
        let first = &self.nodes[0];
        first.farm_ok(&["cluster", "genkey"])?;
        let key = first.dirs().etc.join("cluster.key");
        for node in &self.nodes[1..] {
            let copy = node.dirs().etc.join("cluster.key");
            fs::copy(&key, &copy).with_context(|| format!("cannot copy {} to {}", key.display(), copy.display()))?;
        }
        Ok(())
    }

    /// Starts farmd on every node and waits until all answer.
    pub fn start_daemons(&self) -> Result<()> {
        for node in &self.nodes {
            node.start_farmd()?;
        }
        for node in &self.nodes {
            node.wait_farmd(Duration::from_secs(10)).with_context(|| self.logs())?;
        }
        Ok(())
    }

    /// Makes the installed folder of `module` active on every node, starts it everywhere, and waits for UP Ready.
    pub fn start_module(&self, module: &str) -> Result<()> {
        for node in &self.nodes {
            node.farm_ok(&["config", module])?;
        }
        // All at once, as three administrators would: each start takes as long as its scripts do.
        std::thread::scope(|scope| {
            let starts: Vec<_> = self
                .nodes
                .iter()
                .map(|node| scope.spawn(move || node.farm_ok(&["start", module])))
                .collect();
            starts.into_iter().try_for_each(|start| match start.join() {
                Ok(result) => result.map(|_| ()),
                Err(_) => bail!("a start panicked"),
            })
        })
        .with_context(|| self.logs())?;
        let all: Vec<&Node> = self.nodes.iter().collect();
        self.wait_ready(module, &all, Duration::from_secs(20))
    }

    /// Waits until every one of `nodes` sees exactly these nodes UP Ready, with shares that differ by at most
    /// one bucket (or as their powers say) and no bucket unowned.
    pub fn wait_ready(&self, module: &str, nodes: &[&Node], limit: Duration) -> Result<()> {
        let mut last = String::new();
        let names: Vec<&str> = nodes.iter().map(|node| node.name()).collect();
        let what = format!("{module} to be UP Ready on {}", names.join(", "));
        let equal = self.config.groups.iter().all(|group| group.powers.is_empty());
        wait_until(limit, &what, || {
            for node in nodes {
                match ready_shares(node, module, &names, equal) {
                    Ok(()) => {}
                    Err(error) => {
                        last = format!("{error:#}");
                        return None;
                    }
                }
            }
            Some(())
        })
        .with_context(|| format!("last seen: {last}\n{}", self.logs()))?;
        let means_kernel = self.config.plane == "auto" && !self.config.falls_back;
        if means_kernel && std::env::var_os("FARM_NEED_BPF").is_some() {
            nodes.iter().try_for_each(|node| judges_in_kernel(node, module))?;
        }
        Ok(())
    }

    /// The switch carries nothing any more between these pairs of its ports, in neither direction; what was cut so before is mended first.
    pub fn cut_between(&self, pairs: &[(String, String)]) -> Result<()> {
        let mut rules = String::new();
        for (a, b) in pairs {
            for (from, to) in [(a, b), (b, a)] {
                let _ = write!(rules, "iifname \"{from}\" oifname \"{to}\" drop; ");
            }
        }
        // One transaction; adding first makes deleting a table that is not there no error.
        self.switch.nft(&format!(
            "add table bridge between\ndelete table bridge between\n\
             table bridge between {{ chain c {{ type filter hook forward priority -300; {rules} }}; }}\n"
        ))
    }

    /// The pairs of ports of the first lan to cut when nodes on different sides (`side[node]`) are to hear nothing of each other.
    pub fn split_by(side: &[usize]) -> Vec<(String, String)> {
        let port = |index: usize| format!("p{}", index + 1);
        let pairs = (0..side.len()).flat_map(|a| (0..a).map(move |b| (b, a)));
        pairs
            .filter(|(a, b)| side[*a] != side[*b])
            .map(|(a, b)| (port(a), port(b)))
            .collect()
    }

    /// The nodes other than the one at `index`.
    pub fn others(&self, index: usize) -> Vec<&Node> {
        self.nodes
            .iter()
            .enumerate()
            .filter(|(i, _)| *i != index)
            .map(|(_, node)| node)
            .collect()
    }

    /// Share of the buckets of group `group` that each node has, 0 to 1, as the first node with a daemon sees it.
    pub fn shares(&self, module: &str, group: &str) -> Result<BTreeMap<String, f64>> {
        let node = self
            .nodes
            .iter()
            .find(|node| node.farmd_pid().is_some())
            .context("no daemon runs")?;
        let status = node.status()?;
        let seen = status
            .modules
            .iter()
            .find(|m| m.name == module)
            .context("the module is not known")?;
        let share = |row: &NodeModuleStatus| {
            let share = row.shares.iter().find(|share| share.group == group)?;
            Some((row.node.clone(), f64::from(share.buckets) / f64::from(share.of)))
        };
        Ok(seen.nodes.iter().filter_map(share).collect())
    }

    /// Brings the node at `index` back after a power cut: power, farmd, module; returns when the whole farm is ready.
    pub fn rejoin(&self, index: usize, module: &str) -> Result<()> {
        let node = &self.nodes[index];
        node.power_on()?;
        node.start_farmd()?;
        node.wait_farmd(Duration::from_secs(10)).with_context(|| self.logs())?;
        node.farm_ok(&["start", module]).with_context(|| self.logs())?;
        self.wait_ready(module, &self.nodes.iter().collect::<Vec<_>>(), Duration::from_secs(30))
    }

    /// The end of every node's farmd output, for a failure report.
    pub fn logs(&self) -> String {
        self.nodes
            .iter()
            .map(|node| format!("--- {} ---\n{}", node.name(), node.log_tail(40)))
            .collect()
    }

    /// True if the switch has learned `mac` behind some port: from then on it no longer floods frames for it.
    pub fn switch_knows(&self, mac: &str) -> Result<bool> {
        let shown = process::run(self.switch.command("bridge").args(["fdb", "show", "br", BRIDGE]))?;
        Ok(shown
            .lines()
            .any(|line| line.starts_with(mac) && !line.contains("permanent")))
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", self.logs());
            if let Some(longest) = stall::longest_since(self.since) {
                // scripts/test looks for this.
                eprintln!("the machine stood still for {} ms in this test", longest.as_millis());
            }
        }
        // All at once: the kernel needs a second or two to take down what one of them leaves.
        std::thread::scope(|scope| {
            for node in &self.nodes {
                // What fails here is done again by the node's own end.
                scope.spawn(|| drop(node.power_off()));
            }
        });
        self.nodes.clear();
        drop(FolderGuard(Some(std::mem::take(&mut self.base))));
    }
}

/// An error where the node judges the module's frames in user space.
fn judges_in_kernel(node: &Node, module: &str) -> Result<()> {
    let status = node.status()?;
    let of = status.modules.iter().find(|m| m.name == module);
    match of.filter(|m| !m.dataplane.is_empty() && m.dataplane != "bpf") {
        Some(m) => bail!("{}: {} ({})", node.name(), m.dataplane, m.dataplane_why),
        None => Ok(()),
    }
}

/// Why `node` does not see exactly `names` serving with fair shares.
fn ready_shares(node: &Node, module: &str, names: &[&str], equal: bool) -> Result<()> {
    let status = node.status()?;
    let seen = status
        .modules
        .iter()
        .find(|m| m.name == module)
        .context("the module is not known")?;
    let mut total = 0;
    for row in &seen.nodes {
        let serves = row.state == Some(ModuleState::Up) && row.quality == Some(Quality::Ready);
        let buckets: u32 = row.shares.iter().map(|share| share.buckets).sum();
        if names.contains(&row.node.as_str()) {
            if !serves {
                bail!(
                    "{} sees {} as {:?} {:?} {}",
                    node.name(),
                    row.node,
                    row.state,
                    row.quality,
                    row.why
                );
            }
            total += buckets as usize;
            let of: u32 = row.shares.iter().map(|share| share.of).sum();
            let fair = of / names.len() as u32;
            if equal && buckets.abs_diff(fair) > row.shares.len() as u32 {
                bail!("{} sees {} with {buckets} of {of} buckets", node.name(), row.node);
            }
        } else if buckets > 0 && row.why.is_empty() {
            // A node that does not hear the others serves on its own; then the row says so.
            bail!("{} still sees {} with {buckets} buckets", node.name(), row.node);
        }
    }
    let groups = seen.nodes.iter().map(|row| row.shares.len()).max().unwrap_or(0);
    if total != groups * BUCKETS || groups == 0 {
        bail!("{} sees {total} of {} buckets owned", node.name(), groups * BUCKETS);
    }
    Ok(())
}

/// IPv6 addresses of links that are made from here on work at once.
fn without_probes(space: &Space) -> Result<()> {
    space.sysctl("net.ipv6.conf.default.accept_dad", "0")
}

/// A client's namespace on the LAN with its addresses.
fn client_space(name: &str, switch: &Space, port: &str, addrs: &[std::net::Ipv4Addr], ipv6: bool) -> Result<Client> {
    let space = Space::create(name)?;
    if ipv6 {
        without_probes(&space)?;
    }
    plug(switch, BRIDGE, port, &space, "eth0")?;
    let mut lines: Vec<String> = addrs
        .iter()
        .map(|addr| format!("address add {addr}/16 dev eth0"))
        .collect();
    let addrs6: Vec<_> = addrs.iter().filter(|_| ipv6).map(|addr| ipv6_of(*addr)).collect();
    lines.extend(addrs6.iter().map(|addr| format!("address add {addr}/64 dev eth0")));
    lines.push(format!("route add 198.19.0.0/16 via {ROUTER}"));
    space.ip(&lines)?;
    // Many addresses mean many neighbours for the nodes, and for the client one entry per node: keep the defaults.
    Ok(Client::new(space, addrs.to_vec()).with_ipv6(addrs6))
}

/// Adds a client on the lab's LAN, number `index` (1 to 15), with `count` addresses (at most 2000), the first one 198.18.(128 + 8 x index).1.
///
/// Each client has its own neighbour table, so each enters the farm by a node of its own.
pub fn add_client(lab: &Lab, index: usize, count: usize) -> Result<Client> {
    client_space(
        &format!("client{index}"),
        &lab.switch,
        &client_port(index),
        &more_client_addrs(index, count),
        lab.config.has_ipv6(),
    )
}

/// The switch port of the client that [`add_client`] adds.
pub fn client_port(index: usize) -> String {
    format!("c{index}")
}

/// Adds a host on the lab's LAN (a load balancer for comparison, an intruder…): its namespace with `addr` on `eth0`.
pub fn add_host(lab: &Lab, name: &str, port: &str, addr: std::net::Ipv4Addr) -> Result<Space> {
    let space = Space::create(name)?;
    plug(&lab.switch, BRIDGE, port, &space, "eth0")?;
    space.ip(&[
        format!("address add {addr}/16 dev eth0"),
        format!("route add default via {ROUTER}"),
    ])?;
    Ok(space)
}

/// The second link of the node at `index`, with its address.
fn plug_second(config: &LabConfig, switch: &Space, index: usize, space: &Space) -> Result<()> {
    plug(switch, SECOND_BRIDGE, &format!("q{}", index + 1), space, SECOND_LINK)?;
    let addr = config.second_addr(index);
    let length = if addr.is_ipv6() { 64 } else { 24 };
    space.ip(&[format!("address add {addr}/{length} dev {SECOND_LINK}")])
}

/// Joins `link` of `space` to a bridge of the switch by a port called `port`.
fn plug(switch: &Space, bridge: &str, port: &str, space: &Space, link: &str) -> Result<()> {
    connect(switch, port, space, link)?;
    switch.ip(&[format!("link set {port} master {bridge}")])
}
