//! One ARP or neighbour-discovery message as the responder sees it: the two families differ in their bytes and in nothing that it decides.
//!
//! Called by [`super::arp`]; what the bytes mean is in the core (`wire/arp.rs`, `wire/nd.rs`). Nothing here decides who answers.

use std::net::{IpAddr, Ipv6Addr};

use farm_core::id::MacAddr;
use farm_core::wire::arp::{Arp, Operation};
use farm_core::wire::heartbeat::Requester;
use farm_core::wire::nd::{Message, Nd, multicast_mac, solicited_node};
use tracing::warn;

use super::{Count, Interface};

/// What was heard.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Heard {
    /// IPv4.
    Arp(Arp),
    /// IPv6.
    Nd(Nd),
}

impl Heard {
    /// Reads a frame; `None` if it is neither.
    pub fn parse(frame: &[u8]) -> Option<Self> {
        let arp = Arp::parse(frame).map(Self::Arp);
        arp.or_else(|| Nd::parse(frame).map(Self::Nd))
    }

    /// The address that the sender says is its own, or is about to take.
    pub fn claimed(&self) -> IpAddr {
        match self {
            Self::Arp(arp) => arp.sender.into(),
            Self::Nd(nd) => match nd.message {
                Message::Solicitation if !nd.is_probe() => nd.source.into(),
                Message::Solicitation | Message::Advertisement { .. } => nd.target.into(),
            },
        }
    }

    /// The address whose Ethernet address is asked for; `None` if nothing is asked.
    pub fn asked(&self) -> Option<IpAddr> {
        match self {
            Self::Arp(arp) => {
                (arp.operation == Operation::Request && arp.sender != arp.target).then(|| arp.target.into())
            }
            Self::Nd(nd) => (nd.message == Message::Solicitation && nd.source != nd.target).then(|| nd.target.into()),
        }
    }

    /// Who asks; the unspecified address if the asker has none yet.
    pub fn asker(&self) -> (IpAddr, MacAddr) {
        match self {
            Self::Arp(arp) => (arp.sender.into(), arp.sender_mac),
            Self::Nd(nd) => (nd.source.into(), nd.link_layer.unwrap_or(nd.source_mac)),
        }
    }

    /// Ethernet source of the frame.
    pub fn source_mac(&self) -> MacAddr {
        match self {
            Self::Arp(arp) => arp.source,
            Self::Nd(nd) => nd.source_mac,
        }
    }

    /// Ethernet destination of the frame.
    pub fn destination_mac(&self) -> MacAddr {
        match self {
            Self::Arp(arp) => arp.destination,
            Self::Nd(nd) => nd.destination_mac,
        }
    }

    /// The answer: what is asked for is at `mac`, said by a host whose own Ethernet address is `own`.
    pub fn answer(&self, own: MacAddr, mac: MacAddr) -> Vec<u8> {
        match self {
            Self::Arp(arp) => arp.reply_to(own, mac).emit().to_vec(),
            Self::Nd(nd) => nd.answer(own, mac).emit(),
        }
    }
}

/// Unsolicited news that `vip` is at `mac`, to one requester or, with `None`, to everybody.
pub fn announcement(vip: IpAddr, own: MacAddr, mac: MacAddr, to: Option<&Requester>) -> Option<Vec<u8>> {
    match (vip, to.map(|to| (to.addr, to.mac))) {
        (IpAddr::V4(vip), None) => Some(Arp::announce(vip, own, mac, MacAddr::BROADCAST).emit().to_vec()),
        (IpAddr::V4(vip), Some((_, to))) => Some(Arp::announce(vip, own, mac, to).emit().to_vec()),
        (IpAddr::V6(vip), None) => Some(Nd::announce(vip, own, mac, None).emit()),
        (IpAddr::V6(vip), Some((IpAddr::V6(addr), to))) => Some(Nd::announce(vip, own, mac, Some((addr, to))).emit()),
        (IpAddr::V6(_), Some((IpAddr::V4(_), _))) => None,
    }
}

/// Lets `interface` hear what asks for `vip`; once for each VIP.
pub fn hear_solicitations(interface: &mut Interface, vip: Ipv6Addr) {
    let group = solicited_node(vip);
    if !interface.joined.insert(multicast_mac(group).0) {
        return;
    }
    match interface.neighbours.hear_group(group) {
        Ok(true) => {}
        Ok(false) => {
            warn!(interface = interface.name, %vip, %group, "switches cannot be told that questions for the virtual address are heard here: those that deal out groups (MLD snooping) may keep them back");
        }
        Err(error) => {
            warn!(%error, interface = interface.name, %vip, "questions for the virtual address are not heard: clients cannot find it by this node");
        }
    }
}

/// The counters of one family.
#[derive(Clone, Copy, Debug)]
pub struct Counts {
    /// Questions answered.
    pub answered: Count,
    /// Questions left to another node.
    pub left: Count,
    /// News sent.
    pub announced: Count,
    /// Claims of another host.
    pub conflict: Count,
    /// What could not be sent.
    pub failed: Count,
}

impl Counts {
    /// Those of `vip`'s family.
    pub const fn of(vip: IpAddr) -> Self {
        match vip {
            IpAddr::V4(_) => Self {
                answered: Count::ArpAnswered,
                left: Count::ArpLeft,
                announced: Count::ArpAnnounced,
                conflict: Count::ArpConflict,
                failed: Count::ArpFailed,
            },
            IpAddr::V6(_) => Self {
                answered: Count::NdAnswered,
                left: Count::NdLeft,
                announced: Count::NdAnnounced,
                conflict: Count::NdConflict,
                failed: Count::NdFailed,
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    const CLIENT: MacAddr = MacAddr([2, 0, 0, 0, 0, 9]);
    const OWN: MacAddr = MacAddr([2, 0, 0, 0, 0, 1]);

    fn arp(operation: Operation, sender: Ipv4Addr) -> Heard {
        Heard::Arp(Arp {
            destination: MacAddr::BROADCAST,
            source: CLIENT,
            operation,
            sender_mac: CLIENT,
            sender,
            target_mac: MacAddr::default(),
            target: Ipv4Addr::new(198, 18, 0, 20),
        })
    }

    fn nd(message: Message, source: Ipv6Addr) -> Heard {
        Heard::Nd(Nd {
            destination_mac: OWN,
            source_mac: CLIENT,
            source,
            destination: VIP6,
            message,
            target: VIP6,
            link_layer: None,
        })
    }

    const VIP6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 0x20);
    const CLIENT6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 0x100);
    const TOLD: Message = Message::Advertisement {
        solicited: false,
        overrides: true,
    };

    #[test]
    fn a_question_asks_and_claims_only_the_askers_own_address() {
        let (vip, client) = (Ipv4Addr::new(198, 18, 0, 20), Ipv4Addr::new(198, 18, 0, 100));
        let question = arp(Operation::Request, client);
        assert_eq!(
            (question.asked(), question.claimed()),
            (Some(vip.into()), client.into())
        );
        assert_eq!(question.asker(), (client.into(), CLIENT));
        let question = nd(Message::Solicitation, CLIENT6);
        assert_eq!(
            (question.asked(), question.claimed()),
            (Some(VIP6.into()), CLIENT6.into())
        );
        assert_eq!(question.asker(), (CLIENT6.into(), CLIENT));
    }

    #[test]
    fn a_probe_asks_for_the_address_that_it_claims() {
        let probe = nd(Message::Solicitation, Ipv6Addr::UNSPECIFIED);
        assert_eq!((probe.asked(), probe.claimed()), (Some(VIP6.into()), VIP6.into()));
        assert!(probe.asker().0.is_unspecified());
    }

    #[test]
    fn news_ask_nothing_and_claim() {
        let vip = Ipv4Addr::new(198, 18, 0, 20);
        for news in [arp(Operation::Reply, vip), arp(Operation::Request, vip)] {
            assert_eq!((news.asked(), news.claimed()), (None, vip.into()));
        }
        for news in [nd(TOLD, CLIENT6), nd(TOLD, VIP6)] {
            assert_eq!((news.asked(), news.claimed()), (None, VIP6.into()));
        }
    }

    #[test]
    fn announcements_are_of_the_vips_family_and_to_whom_they_are_for() {
        let requester = |addr: IpAddr| Requester {
            vip: VIP6.into(),
            addr,
            mac: CLIENT,
        };
        let told = requester(CLIENT6.into());
        let to_one = announcement(VIP6.into(), OWN, OWN, Some(&told)).unwrap();
        let to_all = announcement(VIP6.into(), OWN, OWN, None).unwrap();
        assert_eq!(
            (&to_one[..6], &to_all[..6]),
            (&CLIENT.0[..], &[0x33, 0x33, 0, 0, 0, 1][..])
        );
        assert!(matches!(Heard::parse(&to_one), Some(Heard::Nd(nd)) if nd.destination == CLIENT6));
        let other = requester(IpAddr::from([198, 18, 0, 100]));
        assert_eq!(announcement(VIP6.into(), OWN, OWN, Some(&other)), None);
        let arp = announcement(IpAddr::from([198, 18, 0, 20]), OWN, OWN, Some(&other)).unwrap();
        assert!(matches!(Heard::parse(&arp), Some(Heard::Arp(arp)) if arp.destination == CLIENT));
    }
}
