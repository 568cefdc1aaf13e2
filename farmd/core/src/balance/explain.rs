//! Where a connection that somebody asks about belongs, and what a frame of it would get here.
//!
//! Owns no rule of its own: the place comes from the plan's own look-ups, and the verdict from [`decide`] on packets that are made for the
//! question. `farm why` asks; the packet path never does.

use std::net::IpAddr;
use std::time::Duration;

use crate::balance::decide::{Decision, decide};
use crate::balance::flow::{TCP, UDP};
use crate::balance::fragment::FragmentTable;
use crate::balance::plan::{Plan, RulePlan, VipPlan};
use crate::config::{Affinity, Protocol};
use crate::id::{Bucket, MacAddr};
use crate::wire::packet::{L4, Packet};

/// A connection, or a client of whom no port is named.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Inquiry {
    /// Transport protocol.
    pub protocol: Protocol,
    /// The client.
    pub client: IpAddr,
    /// Its port; `None` for any.
    pub client_port: Option<u16>,
    /// The virtual address.
    pub vip: IpAddr,
    /// The service's port.
    pub vip_port: u16,
}

/// The rule that fits, and what its affinity makes of the client.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Place {
    /// The most specific rule.
    pub rule: RulePlan,
    /// The bucket in the map of [`RulePlan::group`].
    pub bucket: Bucket,
}

/// Why there is no one bucket.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Placeless {
    /// The address is no VIP of this plan.
    NoVip,
    /// No rule of the VIP covers protocol and port.
    NoRule,
    /// The rule deals by the client's port, and none was named.
    NeedsPort(RulePlan),
    /// The rule deals by each packet's IP identification.
    PerPacket(RulePlan),
}

/// What frames of the connection get, coming from outside to the address that the VIP has here.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Judgement {
    /// What starts something: a SYN, or a datagram.
    pub opening: Decision,
    /// A TCP segment of a connection that is there already; `None` for UDP.
    pub belonging: Option<Decision>,
}

impl Inquiry {
    /// Rule and bucket by `plan`.
    ///
    /// # Errors
    /// Why there is no one bucket.
    pub fn place(&self, plan: &Plan) -> Result<Place, Placeless> {
        let vip = plan.vip(self.vip).ok_or(Placeless::NoVip)?;
        let rule = *vip.rule(self.protocol, self.vip_port).ok_or(Placeless::NoRule)?;
        match rule.affinity {
            Affinity::IpId => return Err(Placeless::PerPacket(rule)),
            Affinity::ClientPort if self.client_port.is_none() => return Err(Placeless::NeedsPort(rule)),
            Affinity::ClientPort | Affinity::ClientIp | Affinity::ClientNet => {}
        }
        let port = self.client_port.unwrap_or(0);
        let bucket = plan.bucket(rule.affinity, &self.packet(vip.service_mac(), true), self.client, port);
        Ok(Place { rule, bucket })
    }

    /// The verdicts by `plan`, on a host that has the connection or not.
    pub fn judge(&self, plan: &Plan, has_connection: bool) -> Judgement {
        let mac = plan.vip(self.vip).map(VipPlan::service_mac).unwrap_or_default();
        let verdict = |syn: bool| {
            let packet = self.packet(mac, syn);
            let mut fragments = FragmentTable::default();
            decide(plan, &packet, &mut fragments, Duration::ZERO, &mut |_| has_connection)
        };
        Judgement {
            opening: verdict(true),
            belonging: (self.protocol == Protocol::Tcp).then(|| verdict(false)),
        }
    }

    /// A whole packet of the connection, in a frame from outside to `destination_mac`.
    fn packet(&self, destination_mac: MacAddr, syn: bool) -> Packet {
        let (source, destination) = (self.client_port.unwrap_or(0), self.vip_port);
        let (protocol, l4) = match self.protocol {
            Protocol::Tcp => (
                TCP,
                L4::Tcp {
                    source,
                    destination,
                    syn,
                    sequence: 0,
                },
            ),
            Protocol::Udp => (UDP, L4::Udp { source, destination }),
        };
        Packet {
            // No member has this one: `VipPlan::peers` leaves it out.
            source_mac: MacAddr::default(),
            destination_mac,
            source: self.client,
            destination: self.vip,
            protocol,
            identification: 0,
            more_fragments: false,
            l4,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::balance::decide::{Reason, Verdict};
    use crate::balance::plan::BucketState;
    use crate::balance::test_frames::{self as frames, Flags, Way, client, group, id, rule, vip, vip_plan};
    use crate::config::L2Mode;
    use crate::id::NodeSet;

    const STATES: [BucketState; 4] = [
        BucketState::Own,
        BucketState::Guarded,
        BucketState::Draining,
        BucketState::Foreign,
    ];

    fn plan(state: BucketState, owner: Option<usize>) -> Plan {
        let rules = vec![
            rule(Protocol::Tcp, 80, 80, Affinity::ClientIp, 0),
            rule(Protocol::Tcp, 443, 443, Affinity::ClientPort, 0),
            rule(Protocol::Udp, 53, 53, Affinity::IpId, 0),
            rule(Protocol::Udp, 5000, 5010, Affinity::ClientNet, 0),
        ];
        frames::plan(vip_plan(vip(), L2Mode::Directed, rules), vec![group(state, owner)])
    }

    fn inquiry(protocol: Protocol, port: Option<u16>, vip_port: u16) -> Inquiry {
        Inquiry {
            protocol,
            client: client(7),
            client_port: port,
            vip: vip(),
            vip_port,
        }
    }

    #[test]
    fn a_verdict_is_the_one_that_the_frame_itself_gets() {
        for (state, owner) in STATES.into_iter().zip([Some(0), Some(0), Some(1), None]) {
            let mut plan = plan(state, owner);
            for holders in [None, Some(2)] {
                let set: NodeSet = holders.map(id).into_iter().collect();
                plan.groups[0].holders = (0..4096).filter(|_| holders.is_some()).map(|i| (i, set)).collect();
                for has in [true, false] {
                    let judged = inquiry(Protocol::Tcp, Some(4000), 80).judge(&plan, has);
                    let way = Way::new(client(7), vip(), frames::OWN_MAC);
                    for (flags, told) in [(Flags::Syn, judged.opening), (Flags::Ack, judged.belonging.unwrap())] {
                        let packet = Packet::parse(&way.tcp(4000, 80, flags)).unwrap();
                        let mut table = FragmentTable::default();
                        let got = decide(&plan, &packet, &mut table, Duration::ZERO, &mut |_| has);
                        assert_eq!(told, got, "{state:?}, {flags:?}, connection here: {has}");
                    }
                    let judged = inquiry(Protocol::Udp, Some(4000), 5005).judge(&plan, has);
                    let packet = Packet::parse(&way.udp(4000, 5005, b"?")).unwrap();
                    let mut table = FragmentTable::default();
                    let got = decide(&plan, &packet, &mut table, Duration::ZERO, &mut |_| has);
                    assert_eq!((judged.opening, judged.belonging), (got, None));
                }
            }
        }
    }

    #[test]
    fn a_place_is_the_rules_and_a_port_is_needed_only_where_it_counts() {
        let plan = plan(BucketState::Own, Some(0));
        let place = |protocol, port, vip_port| inquiry(protocol, port, vip_port).place(&plan);
        let by_addr = place(Protocol::Tcp, None, 80).unwrap();
        assert_eq!(
            by_addr.bucket,
            crate::balance::hash::bucket_of_addr(plan.seed, client(7))
        );
        assert_eq!(place(Protocol::Tcp, Some(9), 80), Ok(by_addr));
        let by_port = place(Protocol::Tcp, Some(9), 443).unwrap();
        let expected = crate::balance::hash::bucket_of_port(plan.seed, client(7), 9);
        assert_eq!((by_port.bucket, by_port.rule.first_port), (expected, 443));
        assert!(matches!(place(Protocol::Tcp, None, 443), Err(Placeless::NeedsPort(r)) if r.first_port == 443));
        assert!(matches!(
            place(Protocol::Udp, Some(9), 53),
            Err(Placeless::PerPacket(_))
        ));
        assert_eq!(place(Protocol::Udp, Some(9), 80), Err(Placeless::NoRule));
        let elsewhere = Inquiry {
            vip: client(1),
            ..inquiry(Protocol::Tcp, Some(9), 80)
        };
        assert_eq!(elsewhere.place(&plan), Err(Placeless::NoVip));
        let passed = elsewhere.judge(&plan, true).opening;
        assert_eq!((passed.verdict, passed.reason), (Verdict::Pass, Reason::NotVip));
    }

    #[test]
    fn what_no_rule_covers_is_judged_as_such() {
        let judged = inquiry(Protocol::Tcp, Some(9), 81).judge(&plan(BucketState::Own, Some(0)), true);
        let opening = judged.opening;
        assert_eq!((opening.verdict, opening.reason), (Verdict::Drop, Reason::NoRule));
    }
}
