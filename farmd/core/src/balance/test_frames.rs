//! Frames and plans that the tests of the decision, the filter and the parser share.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use etherparse::{PacketBuilder, PacketBuilderStep, TcpHeader};

use farm_core::balance::assign::BucketMap;
use farm_core::balance::hash::Seed;
use farm_core::balance::plan::{BucketState, GroupPlan, Plan, RulePlan, VipPlan};
use farm_core::config::{Affinity, L2Mode, PlaneChoice, Protocol, XdpChoice};
use farm_core::id::{BUCKETS, MacAddr, NodeId};

pub const CLIENT_MAC: MacAddr = MacAddr([2, 0, 0, 0, 0, 0x99]);
pub const OWN_MAC: MacAddr = MacAddr([2, 0, 0, 0, 0, 0]);
pub const VIRTUAL_MAC: MacAddr = MacAddr([0x5a, 0xfe, 198, 18, 0, 20]);
pub const SEED: Seed = Seed {
    s0: 0x0123_4567,
    s1: 0x89ab_cdef,
};

pub fn id(i: usize) -> NodeId {
    NodeId::new(i).unwrap()
}

/// Ethernet address of node `i`.
pub fn mac(i: u8) -> MacAddr {
    MacAddr([2, 0, 0, 0, 0, i])
}

pub fn vip() -> IpAddr {
    IpAddr::from([198, 18, 0, 20])
}

pub fn vip6() -> IpAddr {
    "2001:db8::20".parse().unwrap()
}

pub fn client(i: u32) -> IpAddr {
    IpAddr::V4((0xc612_1000 + i).into())
}

pub fn client6(i: u32) -> IpAddr {
    IpAddr::V6((0x2001_0db8_0001_0000_0000_0000_0000_0000_u128 + u128::from(i)).into())
}

/// TCP flags of interest.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Flags {
    Syn,
    SynAck,
    Ack,
    Rst,
}

/// Where a frame comes from and goes to.
#[derive(Clone, Copy, Debug)]
pub struct Way {
    pub from_mac: MacAddr,
    pub to_mac: MacAddr,
    pub client: IpAddr,
    pub vip: IpAddr,
}

impl Way {
    pub fn new(client: IpAddr, vip: IpAddr, to_mac: MacAddr) -> Self {
        Self {
            from_mac: CLIENT_MAC,
            to_mac,
            client,
            vip,
        }
    }

    fn ip(&self) -> PacketBuilderStep<etherparse::IpHeaders> {
        let link = PacketBuilder::ethernet2(self.from_mac.0, self.to_mac.0);
        match (self.client, self.vip) {
            (IpAddr::V4(client), IpAddr::V4(vip)) => link.ipv4(client.octets(), vip.octets(), 64),
            (IpAddr::V6(client), IpAddr::V6(vip)) => link.ipv6(client.octets(), vip.octets(), 64),
            _ => panic!("addresses of one family are expected"),
        }
    }

    pub fn tcp(&self, port: u16, vip_port: u16, flags: Flags) -> Vec<u8> {
        let mut header = TcpHeader::new(port, vip_port, 1000, 2000);
        header.syn = matches!(flags, Flags::Syn | Flags::SynAck);
        header.ack = matches!(flags, Flags::SynAck | Flags::Ack);
        header.rst = flags == Flags::Rst;
        let mut frame = Vec::new();
        self.ip().tcp_header(header).write(&mut frame, b"hello").unwrap();
        frame
    }

    pub fn udp(&self, port: u16, vip_port: u16, payload: &[u8]) -> Vec<u8> {
        let mut frame = Vec::new();
        self.ip().udp(port, vip_port).write(&mut frame, payload).unwrap();
        frame
    }

    pub fn echo(&self) -> Vec<u8> {
        let mut frame = Vec::new();
        match self.client {
            IpAddr::V4(_) => self.ip().icmpv4_echo_request(1, 2).write(&mut frame, b"ping").unwrap(),
            IpAddr::V6(_) => self.ip().icmpv6_echo_request(1, 2).write(&mut frame, b"ping").unwrap(),
        }
        frame
    }

    /// "Packet too big" or "fragmentation needed" about `quoted`, a frame that the VIP has sent.
    pub fn too_big(&self, quoted: &[u8]) -> Vec<u8> {
        let mut frame = Vec::new();
        match self.client {
            IpAddr::V4(_) => self
                .ip()
                .icmpv4_raw(3, 4, [0; 4])
                .write(&mut frame, &quoted[14..])
                .unwrap(),
            IpAddr::V6(_) => self
                .ip()
                .icmpv6_raw(2, 0, [0; 4])
                .write(&mut frame, &quoted[14..])
                .unwrap(),
        }
        frame
    }

    /// A frame the other way: from the VIP to the client.
    pub fn back(&self) -> Self {
        Self {
            from_mac: self.to_mac,
            to_mac: self.from_mac,
            client: self.vip,
            vip: self.client,
        }
    }
}

/// Makes an IPv4 frame a fragment at `offset` (in units of 8 bytes); `length` bytes of IP payload from there are kept.
pub fn fragment(frame: &[u8], identification: u16, offset: u16, more: bool, length: usize) -> Vec<u8> {
    let header = 14 + usize::from(frame[14] & 0xf) * 4;
    let mut fragment = frame[..header].to_vec();
    let from = header + usize::from(offset) * 8;
    fragment.extend_from_slice(&frame[from..frame.len().min(from + length)]);
    let total = (fragment.len() - 14) as u16;
    fragment[16..18].copy_from_slice(&total.to_be_bytes());
    fragment[18..20].copy_from_slice(&identification.to_be_bytes());
    fragment[20..22].copy_from_slice(&(offset | u16::from(more) << 13).to_be_bytes());
    fragment
}

/// An IPv6 frame with extension headers of these numbers before the transport header; a fragment header has `offset` and `more`.
pub fn with_extensions(frame: &[u8], extensions: &[u8], offset: u16, more: bool) -> Vec<u8> {
    let mut longer = frame[..54].to_vec();
    let last = frame[20];
    longer[20] = extensions.first().copied().unwrap_or(last);
    for (i, extension) in extensions.iter().enumerate() {
        let next = extensions.get(i + 1).copied().unwrap_or(last);
        match extension {
            44 => {
                longer.extend_from_slice(&[next, 0]);
                longer.extend_from_slice(&(offset << 3 | u16::from(more)).to_be_bytes());
                longer.extend_from_slice(&0xdead_beef_u32.to_be_bytes());
            }
            _ => longer.extend_from_slice(&[next, 0, 1, 4, 0, 0, 0, 0]),
        }
    }
    longer.extend_from_slice(&frame[54..]);
    let length = (longer.len() - 54) as u16;
    longer[18..20].copy_from_slice(&length.to_be_bytes());
    longer
}

pub fn rule(protocol: Protocol, first_port: u16, last_port: u16, affinity: Affinity, group: usize) -> RulePlan {
    RulePlan {
        protocol,
        first_port,
        last_port,
        affinity,
        group,
    }
}

/// All buckets are `state` here; `owner` owns them.
pub fn group(state: BucketState, owner: Option<usize>) -> GroupPlan {
    let byte = owner.map_or(0xff, |i| id(i).as_u8());
    GroupPlan {
        states: Box::new([state; BUCKETS]),
        owners: BucketMap::from_bytes(Box::new([byte; BUCKETS])).unwrap(),
        ..GroupPlan::closed("web/default".to_owned())
    }
}

pub fn vip_plan(addr: IpAddr, mode: L2Mode, rules: impl Into<Arc<[RulePlan]>>) -> VipPlan {
    VipPlan {
        addr,
        interface: 3,
        own_mac: OWN_MAC,
        mode,
        entry_group: 0,
        rules: rules.into(),
        peers: BTreeMap::from([(id(1), mac(1)), (id(2), mac(2))]),
        choice: PlaneChoice::Auto,
        xdp: XdpChoice::Auto,
        arp_reroute: None,
    }
}

/// A plan of node 0 with one VIP.
pub fn plan(vip: VipPlan, groups: Vec<GroupPlan>) -> Plan {
    Plan {
        version: 1,
        this: id(0),
        seed: SEED,
        vips: vec![vip],
        groups,
        gone: BTreeMap::new(),
    }
}

/// `words` words of IP options (no operation) put into an IPv4 frame.
pub fn with_options(frame: &[u8], words: usize) -> Vec<u8> {
    let mut longer = frame[..34].to_vec();
    longer.extend(std::iter::repeat_n(1, words * 4));
    longer.extend_from_slice(&frame[34..]);
    longer[14] = 0x40 | (5 + words as u8);
    let total = (longer.len() - 14) as u16;
    longer[16..18].copy_from_slice(&total.to_be_bytes());
    longer
}

/// A frame with VLAN tags, each EtherType and tag control information.
pub fn tagged(frame: &[u8], tags: &[u32]) -> Vec<u8> {
    let mut longer = frame[..12].to_vec();
    longer.extend(tags.iter().flat_map(|tag| tag.to_be_bytes()));
    longer.extend_from_slice(&frame[12..]);
    longer
}
