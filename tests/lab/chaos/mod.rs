//! Measurements of a farm that is being broken on purpose: seeded, bounded, judged by clients and by the wire.
//!
//! Owns the rig that the matrices share and what they report ([`Outcome`]). Each matrix is a function of its own options: `farm-lab chaos` runs
//! them long and prints, the namespace tests run them short and judge. A matrix never fails because a time was missed: it says so; a
//! broken promise is a *violation*.

pub mod connect;
pub mod continuity;
pub mod failover;
pub mod freeze;
pub mod partition;
pub mod planned;
pub mod soak;
pub mod traffic;
pub mod vrrp;

use std::net::{Ipv4Addr, SocketAddrV4};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use farm_core::api::{FarmStatus, ModuleState, Quality};
use farm_core::id::BUCKETS;

pub use crate::outcome::{Outcome, Progress, Series, Table, cell_ms, quantile};

use crate::config::{Group, LabConfig, Mode, VIP, VIP2, Vip};
use crate::module::{ModuleText, write_file};
use crate::outcome::Plane;
use crate::pinger::NodeNumber;
use crate::process::{run_limited, wait_until};
use crate::responder::{TCP_PORT, UDP_PORT};
use crate::{Client, Lab, Node, add_client, lab_program};

/// The module that the rig serves.
pub const MODULE: &str = "chaos";

/// Both modes side by side: every crash is measured by two addresses at once.
pub const MODES: [(&str, Ipv4Addr); 2] = [("directed", VIP), ("invisible", VIP2)];

/// How often heartbeats go, and after how many a node is dead.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Profile {
    /// Its name on the command line.
    pub name: &'static str,
    /// Milliseconds between two heartbeats.
    pub pulse_ms: u64,
    /// Missing heartbeats until a node is dead.
    pub count: u64,
    /// Milliseconds from a crash to the first answer by another node that 99 of 100 crashes are to stay within.
    pub goal_ms: f64,
}

/// The known profiles.
pub const PROFILES: [Profile; 2] = [
    Profile {
        name: "default",
        pulse_ms: 50,
        count: 5,
        goal_ms: 350.0,
    },
    Profile {
        name: "fast",
        pulse_ms: 20,
        count: 5,
        goal_ms: 150.0,
    },
];

impl Profile {
    /// The profile called `name`.
    ///
    /// # Errors
    /// There is none; the message names those there are.
    pub fn named(name: &str) -> Result<Self> {
        let found = PROFILES.into_iter().find(|profile| profile.name == name);
        found.with_context(|| format!("there is no profile `{name}`: default or fast is expected"))
    }

    /// Time until a silent node is dead.
    pub const fn detection(self) -> Duration {
        Duration::from_millis(self.pulse_ms * self.count)
    }

    /// Attributes of `<lans>`.
    pub fn lans(self) -> String {
        format!("pulse=\"{}ms\" slost_count=\"{}\"", self.pulse_ms, self.count)
    }
}

/// What a matrix works on: nodes that serve both modes, and clients with a neighbour table each.
#[derive(Debug)]
pub struct Rig {
    /// Further clients; the first one is the lab's own.
    clients: Vec<Client>,
    /// The nodes.
    pub lab: Lab,
}

/// What a rig is made of.
#[derive(Clone, Debug)]
pub struct RigConfig {
    /// Number of nodes.
    pub nodes: usize,
    /// How heartbeats go.
    pub profile: Profile,
    /// Filter of the rules: `on_addr` or `on_port`.
    pub filter: &'static str,
    /// Number of clients.
    pub clients: usize,
    /// Addresses of each.
    pub addrs: usize,
    /// Attributes of `<lan>`.
    pub lan: &'static str,
    /// Its addresses are IPv6.
    pub lan_ipv6: bool,
    /// `dataplane` of `<vip>`; as [`LabConfig`] has it if there is none.
    pub plane: Option<&'static str>,
}

impl RigConfig {
    /// `nodes` nodes, four clients with two addresses each, buckets by address and port.
    pub const fn new(nodes: usize, profile: Profile) -> Self {
        Self {
            nodes,
            profile,
            filter: "on_port",
            clients: 4,
            addrs: 2,
            lan: "",
            lan_ipv6: false,
            plane: None,
        }
    }
}

/// More nodes than this do not start at once: what all tell each other then is more than the processors of one small machine read.
const CROWD: usize = 16;

/// How long one of many may take.
const CROWD_LIMIT: Duration = Duration::from_secs(30);

impl Rig {
    /// Builds and starts it; returns when every node has its share.
    ///
    /// # Errors
    /// Anything that keeps the farm from serving.
    pub fn serve(config: &RigConfig) -> Result<Self> {
        let rig = Self::build(config)?;
        if config.nodes > CROWD {
            rig.serve_one_by_one()?;
            return Ok(rig);
        }
        rig.lab.start_daemons()?;
        for node in &rig.lab.nodes {
            rig.install(node)?;
        }
        rig.lab.start_module(MODULE)?;
        Ok(rig)
    }

    /// Each node starts when those before it serve.
    fn serve_one_by_one(&self) -> Result<()> {
        for node in &self.lab.nodes {
            node.start_farmd()?;
            node.wait_farmd(CROWD_LIMIT)?;
            self.install(node)?;
            node.farm_ok(&["config", MODULE])?;
            node.farm_ok(&["start", MODULE])?;
        }
        let all: Vec<&Node> = self.lab.nodes.iter().collect();
        self.lab.wait_ready(MODULE, &all, CROWD_LIMIT)
    }

    fn build(config: &RigConfig) -> Result<Self> {
        let vips = MODES.map(|(name, addr)| Vip {
            addr: addr.into(),
            mode: if name == "directed" {
                Mode::Directed
            } else {
                Mode::Invisible
            },
        });
        let lab = Lab::new(LabConfig {
            nodes: config.nodes,
            client_addrs: config.addrs,
            vips: vips.to_vec(),
            groups: vec![Group {
                name: "all".into(),
                rules: vec![
                    ("udp", UDP_PORT.to_string(), config.filter),
                    ("tcp", TCP_PORT.to_string(), config.filter),
                ],
                powers: Vec::new(),
            }],
            lans: config.profile.lans(),
            lan: config.lan,
            lan_ipv6: config.lan_ipv6,
            plane: config.plane.unwrap_or(LabConfig::default().plane),
            ..LabConfig::default()
        })?;
        let more = 1..config.clients.max(1);
        let clients = more
            .map(|index| add_client(&lab, index, config.addrs))
            .collect::<Result<_>>()?;
        Ok(Self { clients, lab })
    }

    fn install(&self, node: &Node) -> Result<()> {
        let folder = node.dirs().base.join("responder");
        let module = ModuleText {
            userconfig: self.lab.config().userconfig_xml(None),
            scripts: scripts(&lab_program()?, node.name(), &folder),
        };
        module.write(&node.dirs().etc.join("modules").join(MODULE))?;
        write_file(&folder.join("README"), "Working folder of the responder.\n", 0o644)
    }

    /// All clients.
    pub fn clients(&self) -> Vec<&Client> {
        std::iter::once(&self.lab.client).chain(&self.clients).collect()
    }

    /// Where the UDP probes go, one address for each of [`MODES`].
    pub fn udp() -> [SocketAddrV4; 2] {
        MODES.map(|(_, vip)| SocketAddrV4::new(vip, UDP_PORT))
    }

    /// Where TCP connections go, one address for each of [`MODES`].
    pub fn tcp() -> [SocketAddrV4; 2] {
        MODES.map(|(_, vip)| SocketAddrV4::new(vip, TCP_PORT))
    }

    /// The node with this number.
    ///
    /// # Errors
    /// There is none.
    pub fn node(&self, number: NodeNumber) -> Result<&Node> {
        let found = usize::from(number).checked_sub(1).and_then(|i| self.lab.nodes.get(i));
        found.with_context(|| format!("there is no node {number}"))
    }

    /// Waits until exactly `nodes` serve, with all buckets owned, as each of them sees it.
    ///
    /// # Errors
    /// They do not within `limit`; the message says what was seen last.
    pub fn wait_serving(&self, nodes: &[&Node], limit: Duration) -> Result<()> {
        let mut last = anyhow::anyhow!("nothing");
        let names: Vec<&str> = nodes.iter().map(|node| node.name()).collect();
        let result = wait_until(limit, &format!("{} to serve", names.join(", ")), || {
            let seen = nodes.iter().try_for_each(|node| serving(node, &names));
            seen.map_err(|error| last = error).ok()
        });
        result.with_context(|| format!("last seen: {last:#}\n{}", self.lab.logs()))
    }

    /// Brings nodes back after a crash, all at once: power, farmd, module; returns when the whole farm serves.
    ///
    /// # Errors
    /// One does not come back.
    pub fn bring_back(&self, nodes: &[&Node]) -> Result<()> {
        std::thread::scope(|scope| {
            let starts: Vec<_> = nodes
                .iter()
                .map(|node| scope.spawn(|| node.power_on().and_then(|()| self.start_again(node))))
                .collect();
            starts.into_iter().try_for_each(|start| match start.join() {
                Ok(result) => result,
                Err(panic) => std::panic::resume_unwind(panic),
            })
        })?;
        self.wait_all()
    }

    /// Starts farmd and the module on a node that has power; returns when the module is up there.
    ///
    /// # Errors
    /// It does not come up.
    pub fn start_again(&self, node: &Node) -> Result<()> {
        node.start_farmd()?;
        wait_until(Duration::from_secs(10), "farmd to answer", || {
            node.ask::<FarmStatus>("/v1/status").ok().map(drop)
        })
        .with_context(|| self.lab.logs())?;
        node.farm_ok(&["start", MODULE])
            .with_context(|| self.lab.logs())
            .map(drop)
    }

    /// Waits until all nodes serve.
    ///
    /// # Errors
    /// They do not within half a minute.
    pub fn wait_all(&self) -> Result<()> {
        self.wait_serving(&self.lab.nodes.iter().collect::<Vec<_>>(), Duration::from_secs(30))
    }

    /// Ends what connections the servers have left, and remember in TIME_WAIT, while no client has any. So many come one after the other from few addresses that
    /// a new client may have the same address and port, with another server; if that dies, the old server's TCP acknowledges its segments instead of resetting them.
    ///
    /// # Errors
    /// ss(8) does not run.
    pub fn forget_clients(&self) -> Result<()> {
        for node in &self.lab.nodes {
            for state in ["connected", "time-wait"] {
                let mut command = node.space().command("ss");
                command.args(["-K", "-t", "-n", "state", state, "sport", "=", ":80"]);
                let ended = run_limited(command, Duration::from_secs(20))?;
                anyhow::ensure!(ended.ok(), "ss -K on {}: {ended:?}", node.name());
            }
        }
        Ok(())
    }

    /// Notes which data plane serves, as each node says; one that is dead says nothing.
    pub fn note_plane(&self, outcome: &mut Outcome) {
        for status in self.lab.nodes.iter().filter_map(|node| node.status().ok()) {
            let own = status.modules.into_iter().find(|module| module.name == MODULE);
            if let Some(module) = own.filter(|module| !module.dataplane.is_empty()) {
                outcome.served_by(Plane {
                    asked: self.lab.config().plane.to_owned(),
                    used: module.dataplane,
                    why: module.dataplane_why,
                });
            }
        }
    }

    /// True if `farm` knows the verb: the rig may be older or newer than what it drives.
    pub fn knows(&self, verb: &str) -> bool {
        let node = self.lab.nodes.first();
        node.and_then(|node| node.farm(&[verb, "--help"]).ok())
            .is_some_and(|told| told.ok())
    }
}

/// Why `node` does not see exactly `names` serving with every bucket owned once.
fn serving(node: &Node, names: &[&str]) -> Result<()> {
    let status: FarmStatus = node.ask("/v1/status")?;
    let module = status.modules.iter().find(|module| module.name == MODULE);
    let mut owned = 0;
    for row in &module.context("the module is not known")?.nodes {
        let ready = (row.state, row.quality) == (Some(ModuleState::Up), Some(Quality::Ready));
        let buckets: u32 = row.shares.iter().map(|share| share.buckets).sum();
        if names.contains(&row.node.as_str()) {
            if !ready || buckets == 0 {
                bail!(
                    "{} sees {} as {:?} with {buckets} buckets {}",
                    node.name(),
                    row.node,
                    row.state,
                    row.why
                );
            }
            owned += buckets as usize;
        }
    }
    if owned != BUCKETS {
        bail!("{} sees {owned} buckets owned", node.name());
    }
    Ok(())
}

/// Scripts that start and stop the responder.
fn scripts(program: &std::path::Path, name: &str, folder: &std::path::Path) -> Vec<(String, String)> {
    let vips: String = MODES.iter().map(|(_, vip)| format!(" --vip {vip}")).collect();
    let (program, folder) = (program.display(), folder.display());
    // The pipe's first line says that it listens; an early end of it, that it never will.
    let start = format!(
        "#!/bin/sh\ncd '{folder}' || exit 1\nrm -f ready && mkfifo ready || exit 1\n\
         '{program}' responder --name {name}{vips} >ready 2>error.log </dev/null &\necho $! >pid\n\
         read -r _ <ready && exit 0\ncat error.log >&2\nexit 1\n"
    );
    // One with thousands of connections takes a while to end, and its ports are taken until then.
    let stop = format!(
        "#!/bin/sh\ncd '{folder}' || exit 1\n[ -s pid ] || exit 0\npid=$(cat pid)\nkill -KILL \"$pid\" 2>/dev/null\n\
         tries=0\nwhile kill -0 \"$pid\" 2>/dev/null && ! grep -q '^State:.Z' \"/proc/$pid/status\" 2>/dev/null; do\n    tries=$((tries + 1))\n    \
         [ $tries -le 200 ] || {{ echo \"process $pid does not end\" >&2; exit 1; }}\n    sleep 0.05\ndone\nrm -f pid\nexit 0\n"
    );
    let early = stop.clone();
    vec![
        ("prestart".into(), early),
        ("start_both".into(), start),
        ("stop_both".into(), stop),
    ]
}

/// Sleeps in small steps, so that a wish to end is heard.
fn pause(length: Duration, say: Progress<'_>) -> Result<()> {
    let end = Instant::now() + length;
    while let Some(left) = end
        .checked_duration_since(Instant::now())
        .filter(|left| !left.is_zero())
    {
        std::thread::sleep(left.min(Duration::from_millis(200)));
        say("")?;
    }
    Ok(())
}

/// Milliseconds as a number.
fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}
