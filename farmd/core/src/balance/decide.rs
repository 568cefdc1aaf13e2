//! The verdict on one frame, the same for every data plane: `farmd/docs/ARCHITECTURE.md`, "Buckets and verdicts".

use crate::balance::flow::{FlowKey, TCP, UDP};
use crate::balance::fragment::FragmentTable;
use crate::balance::plan::{BucketState, Plan, VipPlan};
use crate::config::{Affinity, L2Mode, Protocol};
use crate::id::{Bucket, NodeId, NodeSet};
use crate::wire::packet::{L4, Packet};
use std::time::Duration;

/// What happens to a frame on this host.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Verdict {
    /// To the local stack.
    Accept,
    /// Nowhere.
    Drop,
    /// Nowhere yet: it starts something in a bucket that this node has just closed for another, or a member has handed it to this node,
    /// where the bucket is closed yet. Judged again with the next plan; if the bucket then is another's, it is sent on to [`Decision::owner`].
    Hold,
    /// Not for a VIP: the host's own traffic, not touched.
    Pass,
}

/// Why; one counter each.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Reason {
    /// Destination is no VIP.
    NotVip,
    /// Not sent to the Ethernet address of the VIP.
    OtherMac,
    /// No port rule fits, or a protocol that is not balanced.
    NoRule,
    /// Lengths lie.
    Malformed,
    /// A later fragment whose first one was not seen.
    UnknownFragment,
    /// Bucket is owned.
    Own,
    /// Bucket is guarded: a new connection, or no connection at all (UDP, ICMP).
    GuardedNew,
    /// Bucket is guarded and this host has the connection.
    GuardedKnown,
    /// Bucket is guarded and this host does not have the connection.
    GuardedUnknown,
    /// Bucket is draining and this host has the connection.
    DrainingKnown,
    /// Bucket is draining and the packet belongs to nothing here.
    DrainingOther,
    /// Bucket is somebody else's.
    Foreign,
    /// Bucket is nobody's: no server is ready.
    NoOwner,
    /// Bucket is changing hands, from or to this node.
    Opening,
    /// Bucket was this node's until just now: sent on to its new owner, or, if that has sent it, kept until that works.
    HandedOver,
}

impl Reason {
    /// All reasons, in the order of their counters.
    pub const ALL: [Self; 15] = [
        Self::NotVip,
        Self::OtherMac,
        Self::NoRule,
        Self::Malformed,
        Self::UnknownFragment,
        Self::Own,
        Self::GuardedNew,
        Self::GuardedKnown,
        Self::GuardedUnknown,
        Self::DrainingKnown,
        Self::DrainingOther,
        Self::Foreign,
        Self::NoOwner,
        Self::Opening,
        Self::HandedOver,
    ];

    /// Name of its counter.
    pub const fn name(self) -> &'static str {
        match self {
            Self::NotVip => "not_vip",
            Self::OtherMac => "other_mac",
            Self::NoRule => "no_rule",
            Self::Malformed => "malformed",
            Self::UnknownFragment => "unknown_fragment",
            Self::Own => "own",
            Self::GuardedNew => "guarded_new",
            Self::GuardedKnown => "guarded_known",
            Self::GuardedUnknown => "guarded_unknown",
            Self::DrainingKnown => "draining_known",
            Self::DrainingOther => "draining_other",
            Self::Foreign => "foreign",
            Self::NoOwner => "no_owner",
            Self::Opening => "opening",
            Self::HandedOver => "handed_over",
        }
    }
}

/// Verdict, reason, and who else gets the frame.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Decision {
    /// What happens here.
    pub verdict: Verdict,
    /// Why.
    pub reason: Reason,
    /// Peers the frame goes on to. Empty unless this node is the entry node (`vmac_directed`) and the frame came from outside, or it is
    /// [`Reason::HandedOver`].
    pub forward: NodeSet,
    /// Owner of the packet's bucket, where a bucket was looked up.
    pub owner: Option<NodeId>,
    /// That bucket, and the position of its group in the plan.
    pub place: Option<(usize, Bucket)>,
    /// Accepted as the first packet of a connection in a guarded bucket: later packets of this flow are known.
    pub opens: Option<FlowKey>,
}

impl Decision {
    /// One for this host alone, of a packet whose bucket was not looked up.
    pub const fn local(verdict: Verdict, reason: Reason) -> Self {
        Self {
            verdict,
            reason,
            forward: NodeSet::EMPTY,
            owner: None,
            place: None,
            opens: None,
        }
    }

    const fn drop(reason: Reason) -> Self {
        Self::local(Verdict::Drop, reason)
    }
}

/// What the state table needs to know of a packet beside its bucket.
enum Kind {
    /// Starts a TCP connection.
    Opening(FlowKey),
    /// Belongs to a TCP connection, if it belongs to anything.
    Belonging(FlowKey),
    /// Has no connection: UDP, echo.
    Loose,
}

/// Judges `packet`. `has_socket` says if this host has a connection (not a listener) for a flow; it is asked only
/// in guarded and draining buckets. `fragments` remembers first fragments, by which later ones are judged; `now` ages them.
pub fn decide(
    plan: &Plan,
    packet: &Packet,
    fragments: &mut FragmentTable,
    now: Duration,
    has_socket: &mut dyn FnMut(&FlowKey) -> bool,
) -> Decision {
    let Some(vip) = plan.vip(packet.destination) else {
        return Decision::local(Verdict::Pass, Reason::NotVip);
    };
    if packet.destination_mac != vip.service_mac() && !is_handed_on(vip, packet) {
        return Decision::drop(Reason::OtherMac);
    }
    let first = match packet.l4 {
        L4::LaterFragment => fragments.recall(now, packet),
        l4 => Some(l4),
    };
    let decision = match first {
        None | Some(L4::LaterFragment) => without_ports(plan, vip, packet),
        Some(L4::Malformed) => Decision::drop(Reason::Malformed),
        Some(L4::Other) => Decision::drop(Reason::NoRule),
        Some(L4::Echo) => {
            let bucket = plan.bucket(Affinity::ClientIp, packet, packet.source, 0);
            by_state(plan, vip, packet, vip.entry_group, bucket, &Kind::Loose, has_socket)
        }
        Some(L4::Tcp {
            source,
            destination,
            syn,
            ..
        }) => {
            let flow = flow(packet, TCP, source, destination);
            let kind = if syn {
                Kind::Opening(flow)
            } else {
                Kind::Belonging(flow)
            };
            by_rule(plan, vip, packet, Protocol::Tcp, &flow, &kind, has_socket)
        }
        Some(L4::Udp { source, destination }) => {
            let flow = flow(packet, UDP, source, destination);
            by_rule(plan, vip, packet, Protocol::Udp, &flow, &Kind::Loose, has_socket)
        }
        Some(L4::Error(flow)) => by_inner_flow(plan, vip, packet, &flow, has_socket),
    };
    let decision = only_from_outside(vip, packet, decision);
    match packet.l4 {
        L4::LaterFragment => Decision {
            opens: None,
            ..decision
        },
        L4::Tcp { .. } | L4::Udp { .. } | L4::Echo if packet.more_fragments => {
            fragments.remember(now, packet, packet.l4);
            decision
        }
        _ => decision,
    }
}

fn flow(packet: &Packet, protocol: u8, client_port: u16, vip_port: u16) -> FlowKey {
    FlowKey {
        protocol,
        vip: packet.destination,
        vip_port,
        client: packet.source,
        client_port,
    }
}

fn by_rule(
    plan: &Plan,
    vip: &VipPlan,
    packet: &Packet,
    protocol: Protocol,
    flow: &FlowKey,
    kind: &Kind,
    has_socket: &mut dyn FnMut(&FlowKey) -> bool,
) -> Decision {
    match vip.rule(protocol, flow.vip_port) {
        Some(rule) => {
            let bucket = plan.bucket(rule.affinity, packet, flow.client, flow.client_port);
            by_state(plan, vip, packet, rule.group, bucket, kind, has_socket)
        }
        None => Decision::drop(Reason::NoRule),
    }
}

/// An ICMP error goes where the packet it quotes came from.
fn by_inner_flow(
    plan: &Plan,
    vip: &VipPlan,
    packet: &Packet,
    flow: &FlowKey,
    has_socket: &mut dyn FnMut(&FlowKey) -> bool,
) -> Decision {
    if flow.vip != vip.addr {
        return Decision::drop(Reason::Malformed);
    }
    match flow.protocol {
        TCP => by_rule(
            plan,
            vip,
            packet,
            Protocol::Tcp,
            flow,
            &Kind::Belonging(*flow),
            has_socket,
        ),
        UDP => by_rule(plan, vip, packet, Protocol::Udp, flow, &Kind::Loose, has_socket),
        _ => {
            let bucket = plan.bucket(Affinity::ClientIp, packet, flow.client, 0);
            by_state(plan, vip, packet, vip.entry_group, bucket, &Kind::Loose, has_socket)
        }
    }
}

fn by_state(
    plan: &Plan,
    vip: &VipPlan,
    packet: &Packet,
    group: usize,
    bucket: Bucket,
    kind: &Kind,
    has_socket: &mut dyn FnMut(&FlowKey) -> bool,
) -> Decision {
    let place = (group, bucket);
    let Some(group) = plan.groups.get(group) else {
        return Decision::drop(Reason::NoRule);
    };
    let owner = group.owners.owner(bucket);
    let starts = matches!(kind, Kind::Opening(_) | Kind::Loose);
    let leaving = starts && group.leaving.contains(bucket.index());
    let mut decision = match (group.states[bucket.index()], kind) {
        (BucketState::Own, _) => Decision::local(Verdict::Accept, Reason::Own),
        (BucketState::Guarded, Kind::Opening(flow)) => Decision {
            opens: Some(*flow),
            ..Decision::local(Verdict::Accept, Reason::GuardedNew)
        },
        (BucketState::Guarded, Kind::Loose) => Decision::local(Verdict::Accept, Reason::GuardedNew),
        (BucketState::Guarded, Kind::Belonging(flow)) => {
            if has_socket(flow) {
                Decision::local(Verdict::Accept, Reason::GuardedKnown)
            } else {
                Decision::drop(Reason::GuardedUnknown)
            }
        }
        (BucketState::Draining, Kind::Belonging(flow)) if has_socket(flow) => {
            Decision::local(Verdict::Accept, Reason::DrainingKnown)
        }
        (BucketState::Draining | BucketState::Foreign, _) if leaving => match owner {
            Some(owner) if owner != plan.this => Decision {
                forward: [owner].into_iter().collect(),
                ..Decision::drop(Reason::HandedOver)
            },
            _ => Decision::local(Verdict::Hold, Reason::Opening),
        },
        // A member hands on only what is this node's by its map, so this node's plan is behind. What comes from outside is the loser's until then.
        (BucketState::Draining | BucketState::Foreign, _) if starts && !group.shut && is_handed_on(vip, packet) => {
            Decision::local(Verdict::Hold, Reason::Opening)
        }
        (BucketState::Draining, _) => Decision::drop(Reason::DrainingOther),
        (BucketState::Foreign, _) if owner.is_none() => Decision::drop(Reason::NoOwner),
        (BucketState::Foreign, _) => Decision::drop(Reason::Foreign),
    };
    (decision.owner, decision.place) = (owner, Some(place));
    if vip.mode == L2Mode::Directed {
        if let Some(owner) = owner {
            decision.forward.insert(owner);
        }
        if let (Kind::Belonging(_), Some(holders)) = (kind, group.holders.get(&bucket.index())) {
            decision.forward = NodeSet::from_bits(decision.forward.bits() | holders.bits());
        }
        decision.forward.remove(plan.this);
    }
    decision
}

/// A frame that a member has sent on is never sent on again, except by who has just given up its bucket. If the new owner itself has sent it, its
/// data plane is behind: to go back at once could go on for as long as that, so it is kept.
fn only_from_outside(vip: &VipPlan, packet: &Packet, decision: Decision) -> Decision {
    let sender = vip.peers.iter().find(|(_, mac)| **mac == packet.source_mac);
    let (verdict, reason, forward) = match sender {
        None => return decision,
        Some((sender, _)) if decision.reason == Reason::HandedOver => {
            if !decision.forward.contains(*sender) {
                return decision;
            }
            (Verdict::Hold, Reason::HandedOver, NodeSet::EMPTY)
        }
        Some(_) => (decision.verdict, decision.reason, NodeSet::EMPTY),
    };
    Decision {
        verdict,
        reason,
        forward,
        ..decision
    }
}

/// A member sends to this host's own address what it has kept for it.
fn is_handed_on(vip: &VipPlan, packet: &Packet) -> bool {
    packet.destination_mac == vip.own_mac && vip.peers.values().any(|mac| *mac == packet.source_mac)
}

/// A later fragment whose first one was not seen: only rules that need no port, and agree, can tell whose it is.
fn without_ports(plan: &Plan, vip: &VipPlan, packet: &Packet) -> Decision {
    let protocol = match packet.protocol {
        TCP => Protocol::Tcp,
        UDP => Protocol::Udp,
        _ => return Decision::drop(Reason::UnknownFragment),
    };
    match vip.portless_rule(protocol) {
        Some(rule) => {
            let bucket = plan.bucket(rule.affinity, packet, packet.source, 0);
            by_state(plan, vip, packet, rule.group, bucket, &Kind::Loose, &mut |_| false)
        }
        None => Decision::drop(Reason::UnknownFragment),
    }
}

#[cfg(test)]
#[path = "decide_move_tests.rs"]
mod move_tests;
#[cfg(test)]
#[path = "decide_tests.rs"]
mod tests;
