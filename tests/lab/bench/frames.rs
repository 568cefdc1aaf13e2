//! Frames and plans of the measurements that need no farm: one virtual address on one host, with one group for each state of a bucket.

use std::collections::BTreeMap;
use std::net::IpAddr;

use anyhow::{Context, Result, bail};
use etherparse::{IpHeaders, PacketBuilder, PacketBuilderStep, TcpHeader};
use farm_core::balance::assign::BucketMap;
use farm_core::balance::hash::Seed;
use farm_core::balance::plan::{BucketState, GroupPlan, Plan, RulePlan, VipPlan};
use farm_core::config::{Affinity, L2Mode, PlaneChoice, Protocol, XdpChoice};
use farm_core::id::{BUCKETS, MacAddr, NodeId};

/// The address that all servers share: of a group, so that a host that gets it by flooding takes it to its stack whatever filters there.
pub const SERVICE_MAC: MacAddr = MacAddr([0x01, 0x00, 0x5e, 0x12, 0x00, 0x14]);
/// This host's own address.
pub const OWN_MAC: MacAddr = MacAddr([2, 0, 0, 0, 0, 1]);
/// Another member's.
pub const PEER_MAC: MacAddr = MacAddr([2, 0, 0, 0, 0, 2]);
/// The client's.
pub const CLIENT_MAC: MacAddr = MacAddr([2, 0, 0, 0, 0, 0x99]);

/// This node and the other member.
pub const THIS: NodeId = node(0);
/// See [`THIS`].
pub const PEER: NodeId = node(1);

const fn node(index: usize) -> NodeId {
    match NodeId::new(index) {
        Some(node) => node,
        None => panic!("a farm has more nodes"),
    }
}

/// The segments that are measured.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Segment {
    /// Begins a connection.
    Syn,
    /// Belongs to one.
    Ack,
}

/// From whom to whom.
#[derive(Clone, Copy, Debug)]
pub struct Way {
    /// The client.
    pub from: (IpAddr, u16),
    /// The virtual address.
    pub to: (IpAddr, u16),
}

impl Way {
    fn ip(&self) -> Result<PacketBuilderStep<IpHeaders>> {
        let link = PacketBuilder::ethernet2(CLIENT_MAC.0, SERVICE_MAC.0);
        Ok(match (self.from.0, self.to.0) {
            (IpAddr::V4(from), IpAddr::V4(to)) => link.ipv4(from.octets(), to.octets(), 64),
            (IpAddr::V6(from), IpAddr::V6(to)) => link.ipv6(from.octets(), to.octets(), 64),
            _ => bail!("{} and {} are of two families", self.from.0, self.to.0),
        })
    }

    /// A TCP segment without data.
    ///
    /// # Errors
    /// Addresses of two families.
    pub fn tcp(&self, segment: Segment) -> Result<Vec<u8>> {
        let mut header = TcpHeader::new(self.from.1, self.to.1, 1000, 64_000);
        header.syn = segment == Segment::Syn;
        header.ack = segment == Segment::Ack;
        let mut frame = Vec::new();
        self.ip()?.tcp_header(header).write(&mut frame, &[])?;
        Ok(frame)
    }

    /// A datagram as long as the TCP segment.
    ///
    /// # Errors
    /// As [`Self::tcp`].
    pub fn udp(&self) -> Result<Vec<u8>> {
        let mut frame = Vec::new();
        self.ip()?.udp(self.from.1, self.to.1).write(&mut frame, &[0; 12])?;
        Ok(frame)
    }

    /// An echo request.
    ///
    /// # Errors
    /// As [`Self::tcp`].
    pub fn echo(&self) -> Result<Vec<u8>> {
        let mut frame = Vec::new();
        match self.from.0 {
            IpAddr::V4(_) => self.ip()?.icmpv4_echo_request(1, 2).write(&mut frame, &[0; 12])?,
            IpAddr::V6(_) => self.ip()?.icmpv6_echo_request(1, 2).write(&mut frame, &[0; 12])?,
        }
        Ok(frame)
    }
}

/// The rule for one port.
pub fn rule(protocol: Protocol, port: u16, group: usize) -> RulePlan {
    RulePlan {
        protocol,
        first_port: port,
        last_port: port,
        affinity: Affinity::ClientPort,
        group,
    }
}

/// A group whose buckets all are in `state` here; who owns them follows from it.
///
/// # Errors
/// None that a caller could cause.
pub fn group(state: BucketState) -> Result<GroupPlan> {
    let owner = match state {
        BucketState::Own | BucketState::Guarded => THIS,
        BucketState::Draining | BucketState::Foreign => PEER,
    };
    let owners = BucketMap::from_bytes(Box::new([owner.as_u8(); BUCKETS])).context("nodes own buckets")?;
    Ok(GroupPlan {
        states: Box::new([state; BUCKETS]),
        owners,
        ..GroupPlan::closed("bench/group".to_owned())
    })
}

/// A plan for these virtual addresses on one interface, under [`SERVICE_MAC`], with the same rules for each.
pub fn plan(interface: u32, vips: &[IpAddr], rules: &[RulePlan], groups: Vec<GroupPlan>) -> Plan {
    let vip = |addr: &IpAddr| VipPlan {
        addr: *addr,
        interface,
        own_mac: OWN_MAC,
        mode: L2Mode::Invisible(SERVICE_MAC),
        entry_group: 0,
        rules: rules.into(),
        peers: BTreeMap::from([(PEER, PEER_MAC)]),
        choice: PlaneChoice::Bpf,
        xdp: XdpChoice::Off,
        arp_reroute: None,
    };
    Plan {
        version: 1,
        this: THIS,
        seed: Seed {
            s0: 0x0123_4567,
            s1: 0x89ab_cdef,
        },
        vips: vips.iter().map(vip).collect(),
        groups,
        gone: BTreeMap::new(),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use farm_core::balance::decide::{Reason, decide};
    use farm_core::balance::fragment::FragmentTable;
    use farm_core::wire::packet::Packet;

    use super::*;

    #[test]
    fn the_core_judges_the_frames_as_their_group_says() {
        let vip = IpAddr::from([198, 18, 0, 20]);
        let states = [
            (BucketState::Own, Reason::Own),
            (BucketState::Guarded, Reason::GuardedKnown),
            (BucketState::Draining, Reason::DrainingKnown),
            (BucketState::Foreign, Reason::Foreign),
        ];
        let groups = states.iter().map(|(state, _)| group(*state).unwrap()).collect();
        let rules: Vec<RulePlan> = (0..4).map(|i| rule(Protocol::Tcp, 80 + i, i.into())).collect();
        let plan = plan(1, &[vip], &rules, groups);
        for (port, (_, reason)) in (80..).zip(states) {
            let way = Way {
                from: ([198, 18, 1, 1].into(), 4000),
                to: (vip, port),
            };
            let packet = Packet::parse(&way.tcp(Segment::Ack).unwrap()).unwrap();
            let mut fragments = FragmentTable::default();
            let decision = decide(&plan, &packet, &mut fragments, Duration::ZERO, &mut |_| true);
            assert_eq!(decision.reason, reason);
        }
    }
}
