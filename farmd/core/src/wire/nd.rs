//! Neighbour discovery for IPv6 over Ethernet (RFC 4861): what a responder reads and writes.
//!
//! [`Nd::parse`] takes only what section 7.1 lets a host take: sent on this link (hop limit 255), with the right checksum and whole options. The
//! messages themselves are read and built by etherparse. What is answered, and by whom, the data plane decides.

use std::net::Ipv6Addr;

use etherparse::icmpv6::{Icmpv6PayloadSlice, NdpOptionSlice, NdpOptionsIterator, NeighborAdvertisementHeader};
use etherparse::{Icmpv6Slice, Icmpv6Type, LinkSlice, NetSlice, PacketBuilder, SlicedPacket, TransportSlice};

use crate::id::MacAddr;

/// All nodes of a link.
pub const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);

/// Of every message, so that one which a router has passed on is known by a lower one.
const HOP_LIMIT: u8 = 255;
/// Numbers of the options that hold an Ethernet address, and their length in units of 8 bytes.
const SOURCE_LINK_LAYER: u8 = 1;
const TARGET_LINK_LAYER: u8 = 2;
const LINK_LAYER_UNITS: u8 = 1;

/// Question or answer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Message {
    /// Who has the target address; from `::` by a host that is about to take it.
    Solicitation,
    /// The target address is here.
    Advertisement {
        /// In answer to the receiver's own question.
        solicited: bool,
        /// Replaces another address that the receiver remembers.
        overrides: bool,
    },
}

/// One neighbour solicitation or advertisement in its frame.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Nd {
    /// Where the frame goes.
    pub destination_mac: MacAddr,
    /// Where the frame comes from; never the virtual MAC.
    pub source_mac: MacAddr,
    /// IPv6 source.
    pub source: Ipv6Addr,
    /// IPv6 destination.
    pub destination: Ipv6Addr,
    /// Question or answer.
    pub message: Message,
    /// The address asked for, or told of.
    pub target: Ipv6Addr,
    /// The asker's Ethernet address in a solicitation, the target's in an advertisement.
    pub link_layer: Option<MacAddr>,
}

impl Nd {
    /// Reads a frame; `None` if it is no solicitation or advertisement that a host may heed.
    pub fn parse(frame: &[u8]) -> Option<Self> {
        let packet = SlicedPacket::from_ethernet(frame).ok()?;
        let (Some(LinkSlice::Ethernet2(ethernet)), []) = (&packet.link, packet.link_exts.as_slice()) else {
            return None;
        };
        let (Some(NetSlice::Ipv6(ip)), Some(TransportSlice::Icmpv6(icmp))) = (&packet.net, &packet.transport) else {
            return None;
        };
        let ip = ip.header();
        let (source, destination) = (ip.source_addr(), ip.destination_addr());
        let whole = ip.hop_limit() == HOP_LIMIT && icmp.is_checksum_valid(source.octets(), destination.octets());
        if !whole {
            return None;
        }
        let (message, target, link_layer) = body(icmp)?;
        let is_right = match message {
            Message::Solicitation if source.is_unspecified() => {
                destination == solicited_node(target) && link_layer.is_none()
            }
            Message::Solicitation => !source.is_multicast(),
            Message::Advertisement { solicited, .. } => !(solicited && destination.is_multicast()),
        };
        if !is_right || target.is_multicast() {
            return None;
        }
        Some(Self {
            destination_mac: MacAddr(ethernet.destination()),
            source_mac: MacAddr(ethernet.source()),
            source,
            destination,
            message,
            target,
            link_layer,
        })
    }

    /// The frame.
    pub fn emit(&self) -> Vec<u8> {
        let (message, option) = match self.message {
            Message::Solicitation => (Icmpv6Type::NeighborSolicitation, SOURCE_LINK_LAYER),
            Message::Advertisement { solicited, overrides } => {
                let flags = NeighborAdvertisementHeader {
                    router: false,
                    solicited,
                    r#override: overrides,
                };
                (Icmpv6Type::NeighborAdvertisement(flags), TARGET_LINK_LAYER)
            }
        };
        let mut payload = self.target.octets().to_vec();
        if let Some(MacAddr(mac)) = self.link_layer {
            payload.extend([option, LINK_LAYER_UNITS]);
            payload.extend(mac);
        }
        let builder = PacketBuilder::ethernet2(self.source_mac.0, self.destination_mac.0)
            .ipv6(self.source.octets(), self.destination.octets(), HOP_LIMIT)
            .icmpv6(message);
        let mut frame = Vec::with_capacity(builder.size(payload.len()));
        // Writing 24 bytes of payload to a vector cannot fail.
        let _ = builder.write(&mut frame, &payload);
        frame
    }

    /// The host that sends this is about to take the target address and asks if somebody has it (duplicate address detection, RFC 4862).
    pub fn is_probe(&self) -> bool {
        self.message == Message::Solicitation && self.source.is_unspecified()
    }

    /// The answer to a solicitation: the target is at `mac`, said by a host whose own Ethernet address is `own`.
    ///
    /// A probe is answered to all nodes, as there is no address to answer to. That answer overrides nothing, so that nobody's entry moves; the host
    /// that has asked gives the address up all the same.
    pub fn answer(&self, own: MacAddr, mac: MacAddr) -> Self {
        let probe = self.is_probe();
        let (destination, destination_mac) = if probe {
            (ALL_NODES, multicast_mac(ALL_NODES))
        } else {
            (self.source, self.link_layer.unwrap_or(self.source_mac))
        };
        let message = Message::Advertisement {
            solicited: !probe,
            overrides: !probe,
        };
        Self {
            destination_mac,
            source_mac: own,
            source: self.target,
            destination,
            message,
            target: self.target,
            link_layer: Some(mac),
        }
    }

    /// Unsolicited news that `vip` is at `mac`, to one neighbour or, with `None`, to all nodes.
    pub fn announce(vip: Ipv6Addr, own: MacAddr, mac: MacAddr, to: Option<(Ipv6Addr, MacAddr)>) -> Self {
        let (destination, destination_mac) = to.unwrap_or((ALL_NODES, multicast_mac(ALL_NODES)));
        Self {
            destination_mac,
            source_mac: own,
            source: vip,
            destination,
            message: Message::Advertisement {
                solicited: false,
                overrides: true,
            },
            target: vip,
            link_layer: Some(mac),
        }
    }
}

/// Message, target and Ethernet address; `None` if it is another message, or an option is not whole.
fn body(icmp: &Icmpv6Slice<'_>) -> Option<(Message, Ipv6Addr, Option<MacAddr>)> {
    let (message, target, options) = match (icmp.icmp_type(), icmp.payload_slice().ok()?) {
        (Icmpv6Type::NeighborSolicitation, Icmpv6PayloadSlice::NeighborSolicitation(slice)) => {
            (Message::Solicitation, slice.target_address(), slice.options())
        }
        (Icmpv6Type::NeighborAdvertisement(flags), Icmpv6PayloadSlice::NeighborAdvertisement(slice)) => {
            let message = Message::Advertisement {
                solicited: flags.solicited,
                overrides: flags.r#override,
            };
            (message, slice.target_address(), slice.options())
        }
        _ => return None,
    };
    let mut link_layer = None;
    for option in NdpOptionsIterator::from_slice(options) {
        let found = match (message, option.ok()?) {
            (Message::Solicitation, NdpOptionSlice::SourceLinkLayerAddress(option)) => option.link_layer_address(),
            (Message::Advertisement { .. }, NdpOptionSlice::TargetLinkLayerAddress(option)) => {
                option.link_layer_address()
            }
            _ => continue,
        };
        link_layer = found.first_chunk().map(|bytes| MacAddr(*bytes));
    }
    Some((message, target, link_layer))
}

/// The group that hears solicitations for `addr`: ff02::1:ff00:0 and its last three bytes (RFC 4291, 2.7.1).
pub fn solicited_node(addr: Ipv6Addr) -> Ipv6Addr {
    const PREFIX: u128 = 0xff02_0000_0000_0000_0000_0001_ff00_0000;
    Ipv6Addr::from_bits(PREFIX | addr.to_bits() & 0x00ff_ffff)
}

/// The Ethernet address of an IPv6 group: 33:33 and its last four bytes (RFC 2464).
pub fn multicast_mac(group: Ipv6Addr) -> MacAddr {
    let [.., a, b, c, d] = group.octets();
    MacAddr([0x33, 0x33, a, b, c, d])
}

#[cfg(test)]
#[path = "nd_tests.rs"]
mod tests;
