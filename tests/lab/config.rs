//! What a lab is made of, as values and as the files that the nodes read.
//!
//! Owns the lab's address plan and the text of `cluster.xml`, of the test module's `userconfig.xml` and of its scripts. Never
//! writes a file or touches a namespace: [`crate::Lab`] and [`crate::Node`] do.

use std::fmt::Write as _;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use farm_core::id::MacAddr;

/// How frames for the VIP reach the nodes; the words of `userconfig.xml`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mode {
    /// `vmac_directed`.
    Directed,
    /// `vmac_invisible`.
    Invisible,
}

impl Mode {
    /// The value of the `type` attribute.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Directed => "vmac_directed",
            Self::Invisible => "vmac_invisible",
        }
    }
}

/// A virtual address and its mode.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Vip {
    /// The address, on the lab's LAN.
    pub addr: IpAddr,
    /// How frames reach the nodes.
    pub mode: Mode,
}

impl Vip {
    /// This address in this mode.
    pub fn new(addr: impl Into<IpAddr>, mode: Mode) -> Self {
        Self {
            addr: addr.into(),
            mode,
        }
    }

    /// The virtual MAC of `vmac_invisible`: 5a:fe and the address, of an IPv6 one its last four bytes.
    pub const fn vmac(self) -> MacAddr {
        let bits = match self.addr {
            IpAddr::V4(v4) => v4.to_bits(),
            IpAddr::V6(v6) => v6.to_bits() as u32,
        };
        let [a, b, c, d] = bits.to_be_bytes();
        MacAddr([0x5a, 0xfe, a, b, c, d])
    }
}

/// `<group>`: ports and filter that share one bucket map.
#[derive(Clone, Debug)]
pub struct Group {
    /// Its name.
    pub name: String,
    /// `(proto, port, filter)`; the port is a number, a range or `*`.
    pub rules: Vec<(&'static str, String, &'static str)>,
    /// `(node, power)`; empty means all nodes, equal.
    pub powers: Vec<(String, u16)>,
}

impl Group {
    /// A group with one TCP rule for all VIPs.
    pub fn tcp(name: &str, port: u16, filter: &'static str) -> Self {
        Self {
            name: name.to_owned(),
            rules: vec![("tcp", port.to_string(), filter)],
            powers: Vec::new(),
        }
    }
}

/// What to build. `LabConfig::default()` is the usual farm: three nodes, one client, one directed VIP, port 80 by client address.
#[derive(Clone, Debug)]
pub struct LabConfig {
    /// Number of farm nodes, 1 to 60.
    pub nodes: usize,
    /// Addresses of the LAN client, 1 to 4000; the first is 198.18.0.100, the others 198.18.16.1 and up.
    pub client_addrs: usize,
    /// A router and a client behind it on 198.19.0.0/24.
    pub routed: bool,
    /// Virtual addresses.
    pub vips: Vec<Vip>,
    /// Groups and their rules.
    pub groups: Vec<Group>,
    /// The cluster key as 64 hexadecimal digits, where a test wants the same one at each run; otherwise `farm cluster genkey` makes one.
    pub key: Option<String>,
    /// Attributes of `<user>` besides the lab's own time limits, e.g. `starttimeout="2s"`.
    pub user: String,
    /// Attributes of `<lans>`, e.g. `pulse="20ms"`; empty for the defaults.
    pub lans: String,
    /// Attributes of every `<lan>` besides its name, e.g. `cast="broadcast"`; empty for the defaults.
    pub lan: &'static str,
    /// The nodes' addresses on the lans are IPv6.
    pub lan_ipv6: bool,
    /// A second lan, [`SECOND_LAN`], with a switch of its own, on the nodes' second link.
    pub second_lan: bool,
    /// `partition` of `<farm>`; empty for the default.
    pub partition: &'static str,
    /// `<witness>` of `<farm>`.
    pub witness: Option<Ipv4Addr>,
    /// `dataplane` of `<vip>`, or `xdp` for `bpf` with `xdp="on"`; by default what the variable `FARM_PLANE` says, or `auto`.
    pub plane: &'static str,
    /// A node may have to judge frames in user space although `auto` leaves it the choice; else that is an error where `FARM_NEED_BPF` is set.
    pub falls_back: bool,
    /// How farmd attaches its program, its variable `FARM_ATTACH`: `tcx` or `clsact`; by default what the caller's own says, or what the kernel has.
    pub attach: &'static str,
}

impl Default for LabConfig {
    fn default() -> Self {
        Self {
            nodes: 3,
            client_addrs: 256,
            routed: false,
            vips: vec![Vip::new(VIP, Mode::Directed)],
            groups: vec![Group::tcp("web", 80, "on_addr")],
            key: None,
            user: String::new(),
            lans: String::new(),
            lan: "",
            lan_ipv6: false,
            second_lan: false,
            partition: "",
            witness: None,
            plane: plane_by_environment(),
            falls_back: false,
            attach: "",
        }
    }
}

/// The same tests run with each data plane.
fn plane_by_environment() -> &'static str {
    let wanted = std::env::var("FARM_PLANE").unwrap_or_default();
    ["raw", "bpf", "xdp"]
        .into_iter()
        .find(|plane| *plane == wanted)
        .unwrap_or("auto")
}

impl LabConfig {
    /// The usual farm with its VIP in `mode`.
    pub fn with_mode(mode: Mode) -> Self {
        Self {
            vips: vec![Vip::new(VIP, mode)],
            ..Self::default()
        }
    }

    /// Nodes and clients have IPv6 addresses too: [`ipv6_of`] their IPv4 ones.
    pub fn has_ipv6(&self) -> bool {
        self.lan_ipv6 || self.vips.iter().any(|vip| vip.addr.is_ipv6())
    }

    /// Address of the node at `index` on the second lan: 198.19.1.11 and up, or 2001:db8:1::11 and up.
    pub fn second_addr(&self, index: usize) -> IpAddr {
        let addr = second_addr(index);
        match self.lan_ipv6 {
            true => Ipv6Addr::new(0x2001, 0xdb8, 1, 0, 0, 0, 0, addr.octets()[3].into()).into(),
            false => addr.into(),
        }
    }

    /// Where the nodes' nginx is to listen.
    pub fn listen(&self) -> Vec<String> {
        let ipv6 = self.has_ipv6().then(|| "[::]:80".to_owned());
        std::iter::once("80".to_owned()).chain(ipv6).collect()
    }

    /// `cluster.xml` for all nodes.
    pub fn cluster_xml(&self) -> String {
        let mut text = String::from("<?xml version=\"1.0\"?>\n<cluster>\n");
        let _ = writeln!(text, "  <lans {}>", self.lans);
        let mut lan = |name: &str, addr: &dyn Fn(usize) -> String| {
            let _ = writeln!(text, "    <lan name=\"{name}\" {}>", self.lan);
            for index in 0..self.nodes {
                let (name, addr) = (node_name(index), addr(index));
                let _ = writeln!(text, "      <node name=\"{name}\" addr=\"{addr}\"/>");
            }
            text.push_str("    </lan>\n");
        };
        lan(FIRST_LAN, &|index| match self.lan_ipv6 {
            true => format!("[{}]", ipv6_of(node_addr(index))),
            false => node_addr(index).to_string(),
        });
        if self.second_lan {
            lan(SECOND_LAN, &|index| match self.second_addr(index) {
                IpAddr::V6(addr) => format!("[{addr}]"),
                IpAddr::V4(addr) => addr.to_string(),
            });
        }
        text.push_str("  </lans>\n</cluster>\n");
        text
    }

    /// `userconfig.xml` of the test module, with a TCP checker on this node's own nginx if `checker` holds its interval.
    pub fn userconfig_xml(&self, checker: Option<&str>) -> String {
        let mut text =
            String::from("<!DOCTYPE safe>\n<safe>\n  <service mode=\"farm\" maxloop=\"3\" loop_interval=\"24h\">\n");
        text.push_str("    <farm");
        if !self.partition.is_empty() {
            let _ = write!(text, " partition=\"{}\"", self.partition);
        }
        let _ = writeln!(text, ">\n      <lan name=\"{FIRST_LAN}\"/>");
        if let Some(addr) = self.witness {
            let _ = writeln!(text, "      <witness addr=\"{addr}\"/>");
        }
        text.push_str("    </farm>\n");
        match self.plane {
            "auto" => text.push_str("    <vip>\n"),
            "xdp" => text.push_str("    <vip dataplane=\"bpf\" xdp=\"on\">\n"),
            plane => {
                let _ = writeln!(text, "    <vip dataplane=\"{plane}\">");
            }
        }
        text.push_str("      <interface_list>\n        <interface>\n");
        for vip in &self.vips {
            let _ = writeln!(text, "          <virtual_interface type=\"{}\">", vip.mode.as_str());
            let _ = writeln!(
                text,
                "            <virtual_addr addr=\"{}\" where=\"alias\"/>",
                vip.addr
            );
            text.push_str("          </virtual_interface>\n");
        }
        text.push_str("        </interface>\n      </interface_list>\n      <loadbalancing_list>\n");
        for group in &self.groups {
            let _ = writeln!(text, "        <group name=\"{}\">", group.name);
            if !group.powers.is_empty() {
                text.push_str("          <cluster>\n");
                for (node, power) in &group.powers {
                    let _ = writeln!(text, "            <host name=\"{node}\" power=\"{power}\"/>");
                }
                text.push_str("          </cluster>\n");
            }
            for (proto, port, filter) in &group.rules {
                let _ = writeln!(
                    text,
                    "          <rule proto=\"{proto}\" port=\"{port}\" filter=\"{filter}\"/>"
                );
            }
            text.push_str("        </group>\n");
        }
        text.push_str("      </loadbalancing_list>\n    </vip>\n");
        if let Some(interval) = checker {
            text.push_str("    <check>\n      <tcp ident=\"web\" when=\"both\" action=\"restart\">\n");
            let _ = writeln!(
                text,
                "        <to addr=\"127.0.0.1\" port=\"80\" interval=\"{interval}\" timeout=\"1s\"/>"
            );
            text.push_str("      </tcp>\n    </check>\n");
        }
        let _ = writeln!(
            text,
            "    <user nicestoptimeout=\"20s\" forcestoptimeout=\"10s\" {}/>\n  </service>",
            self.user
        );
        text.push_str("</safe>\n");
        text
    }
}

/// The lan that the clients are on too.
pub const FIRST_LAN: &str = "default";
/// The lan that only nodes are on, where a lab has one.
pub const SECOND_LAN: &str = "back";

/// The first virtual address of a lab.
pub const VIP: Ipv4Addr = Ipv4Addr::new(198, 18, 0, 20);
/// The second one, where a test wants two.
pub const VIP2: Ipv4Addr = Ipv4Addr::new(198, 18, 0, 21);
/// An IPv6 virtual address, where a test wants one.
pub const VIP6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 0x20);
/// The router on the LAN, and on the far side.
pub const ROUTER: Ipv4Addr = Ipv4Addr::new(198, 18, 0, 254);
/// The router's address on the far side.
pub const FAR_ROUTER: Ipv4Addr = Ipv4Addr::new(198, 19, 0, 254);

/// The IPv6 address of who has `addr`, on the same LAN: 2001:db8:: and its four bytes.
pub const fn ipv6_of(addr: Ipv4Addr) -> Ipv6Addr {
    Ipv6Addr::from_bits(0x2001_0db8 << 96 | addr.to_bits() as u128)
}

/// The IPv6 address of who has `addr` behind the router: 2001:db8:1:: and its four bytes.
pub const fn far_ipv6_of(addr: Ipv4Addr) -> Ipv6Addr {
    Ipv6Addr::from_bits(ipv6_of(addr).to_bits() | 1 << 80)
}

/// Name of the node at `index`: `node1`…
pub fn node_name(index: usize) -> String {
    format!("node{}", index + 1)
}

/// Address of the node at `index`: 198.18.0.101 would collide with clients, so nodes past 60 are refused by [`crate::Lab`].
pub fn node_addr(index: usize) -> Ipv4Addr {
    // 198.18.0.11 to .19, then .30 and up: .20 to .29 are for virtual addresses.
    let last = if index < 9 { 11 + index } else { 21 + index };
    Ipv4Addr::new(198, 18, 0, last as u8)
}

/// Address of the node at `index` on a second lan with IPv4.
fn second_addr(index: usize) -> Ipv4Addr {
    Ipv4Addr::new(198, 19, 1, (11 + index) as u8)
}

/// Addresses of the LAN client.
pub fn client_addrs(count: usize) -> Vec<Ipv4Addr> {
    let more = (0..count.saturating_sub(1)).map(|i| Ipv4Addr::new(198, 18, (16 + i / 250) as u8, (1 + i % 250) as u8));
    std::iter::once(Ipv4Addr::new(198, 18, 0, 100)).chain(more).collect()
}

/// Addresses of the further LAN client `index`, 1 to 15, at most 2000 of them.
pub fn more_client_addrs(index: usize, count: usize) -> Vec<Ipv4Addr> {
    (0..count.min(2000))
        .map(|i| Ipv4Addr::new(198, 18, (128 + 8 * index + i / 250) as u8, (1 + i % 250) as u8))
        .collect()
}

/// Addresses of the client behind the router.
pub fn far_addrs(count: usize) -> Vec<Ipv4Addr> {
    (0..count.min(200))
        .map(|i| Ipv4Addr::new(198, 19, 0, (1 + i) as u8))
        .collect()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn no_address_of_the_plan_is_given_twice() {
        let mut all: Vec<Ipv4Addr> = (0..60).map(node_addr).collect();
        all.extend((0..60).map(second_addr));
        all.extend(client_addrs(4000));
        all.extend(far_addrs(200));
        all.extend((1..16).flat_map(|index| more_client_addrs(index, 2000)));
        all.extend([VIP, VIP2, ROUTER, FAR_ROUTER]);
        assert_eq!(all.iter().collect::<BTreeSet<_>>().len(), all.len());
    }

    #[test]
    fn the_generated_module_holds_every_vip_group_and_power() {
        let config = LabConfig {
            vips: vec![Vip::new(VIP, Mode::Directed), Vip::new(VIP2, Mode::Invisible)],
            groups: vec![Group {
                powers: vec![("node1".into(), 3)],
                ..Group::tcp("web", 80, "on_port")
            }],
            ..LabConfig::default()
        };
        let xml = config.userconfig_xml(Some("1s"));
        for part in [
            "198.18.0.20",
            "198.18.0.21",
            "vmac_invisible",
            "power=\"3\"",
            "on_port",
            "interval=\"1s\"",
        ] {
            assert!(xml.contains(part), "{part} is missing in\n{xml}");
        }
    }
}
