//! Nodes that break one rule each, so that it is seen whether the checker would notice.
//!
//! Nothing of it is in the product: a broken node does something else around its [`Farm`], its data plane does not do what the plan says, or
//! its heartbeats are changed and sealed again on their way out. Called by [`crate::node`].

use std::collections::BTreeMap;
use std::time::Duration;

use farm_core::balance::assign::BucketMap;
use farm_core::config::PartitionPolicy;
use farm_core::farm::Farm;
use farm_core::handover::step::Phase;
use farm_core::id::{BUCKETS, Epoch, NodeId};
use farm_core::membership::OPEN_PULSES;
use farm_core::wire::heartbeat::{Ack, BucketSet, Hearsay, Heartbeat};

use crate::fingerprint::Seqs;
use crate::node::{CONFIGURATION, Fixed};
use crate::plane::Sheet;

/// Which rule.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Broken {
    /// A plan counts as confirmed while the data plane still works with the one before.
    ConfirmsEarly,
    /// A node that was not run goes on, lease and all, as if nothing had been.
    ForgetsPause,
    /// The lease ends a pulse after the others' detection time.
    LongLease,
    /// The lease counts from the node's last turn, whatever the others have heard, be it out or not.
    LeaseFromLastTurn,
    /// It promises while it still has open what it is to give away.
    PromisesEarly,
    /// It passes on a promise that was not given yet.
    PassesOnMore,
    /// It says that it hears everybody.
    SaysItHears,
    /// It takes itself for heard by everybody.
    TakesItselfForHeard,
    /// A restart is not told from a late datagram of the run before.
    SameIncarnation,
    /// It does not say in which buckets it has connections.
    HidesConnections,
    /// It proposes maps that move buckets for nothing.
    MovesTooMuch,
    /// It never promises.
    NeverPromises,
    /// It says that it works with no map while it has buckets open.
    SaysNothingCommitted,
    /// It says that it has stepped out while it has buckets open.
    SaysItHasSteppedOut,
    /// It commits its proposal without the promises of the others.
    CommitsEarly,
    /// It does not notice that the witness no longer answers.
    BelievesInWitness,
    /// It serves in whatever part of a divided farm it is.
    ServesInAnyPart,
    /// It does not say that it is withheld.
    HidesWithheld,
    /// It takes a share before its join time is over, while it says that it is joining.
    SharesWhileJoining,
    /// What it gains is its own at once, whoever has connections in it.
    NeverGuards,
    /// It says, and believes, that its module's configuration is that of the others.
    HidesConfiguration,
    /// It takes everybody's configuration for its own.
    MistakesConfiguration,
    /// It does not take what comes from nodes with another `cluster.xml`.
    IgnoresOtherCluster,
    /// It says goodbye as soon as it is to end, with all its buckets open.
    SaysGoodbyeEarly,
    /// What came in while it was not run counts as heard when it goes on.
    TakesOldHeartbeats,
    /// It leaves out of its view whom it alone does not hear.
    EvictsAlone,
    /// It takes all that it hears for talking with each other, so that the lowest of them is to propose.
    OverlooksBrokenWays,
    /// It takes what it has heard before, or something older, for news.
    TakesRecordings,
    /// It passes on the last word of each node for good, as if it had been heard just now.
    KeepsRowsYoung,
    /// It does not take what comes from nodes that no longer hear it, as if they were gone.
    HidesThoseThatDoNotHearIt,
    /// A short stop is hidden from its core, which judges as if it had been run.
    HidesShortStop,
    /// It does not carry out the command that it does not hear who hears it.
    IgnoresCommand,
    /// It takes every goodbye for one for good.
    ForgetsWhoReturns,
    /// It does not look whether anything comes in.
    NeverLooks,
    /// It takes all that do not hear it for nodes that have stepped out, and all outside its view for such that have nothing open.
    OverlooksOutsiders,
    /// It was out, or not run, and has its lease as soon as it is back, with its buckets open.
    LeaseWhenBack,
    /// It goes on to say what it promised last although it has closed everything since, until somebody proposes anew.
    NeverWithdraws,
    /// It takes a share as soon as its join time is over.
    SkipsOpening,
}

/// What a broken node keeps for what it says.
#[derive(Clone, Debug, Default)]
pub struct Kept {
    /// Until when it says that it is joining, whatever it is.
    pub feigns_until: Option<Duration>,
    /// What others have said of themselves, if it lets none of that age.
    pub rows: BTreeMap<NodeId, Hearsay>,
    /// What it promised last, if it does not withdraw that.
    pub promised: Epoch,
}

impl Kept {
    /// Notes the promise that the node keeps to now, if it keeps to one.
    fn note_promise(&mut self, farm: &Farm, fixed: &Fixed) {
        let group = farm.group(&fixed.module, 0);
        let kept = group.filter(|g| g.phase() == Phase::Promised || g.committed() == g.promised());
        self.promised = kept.map_or(self.promised, |g| g.promised().max(self.promised));
    }
}

/// Until when the data plane accepts after a turn.
pub fn lease(broken: Option<Broken>, now: Duration, farm: Option<&Farm>, fixed: &Fixed) -> Duration {
    match (broken, farm) {
        (Some(Broken::LeaseWhenBack), Some(farm)) if farm.membership().fenced().is_none() => {
            farm.membership().lease_until(now)
        }
        (Some(Broken::LeaseFromLastTurn), Some(farm)) if farm.membership().fenced().is_some() => {
            now + fixed.detection() - fixed.pulse()
        }
        (_, Some(farm)) if farm.is_closing() => now,
        (Some(Broken::LongLease), _) => now + fixed.detection() + fixed.pulse(),
        (Some(Broken::LeaseFromLastTurn | Broken::ForgetsPause), _) => now + fixed.detection() - fixed.pulse(),
        (_, Some(farm)) => farm.lease_until(now),
        (_, None) => now,
    }
}

/// What a node makes of a witness that answers it or not.
pub fn witness(broken: Option<Broken>, answers: bool) -> bool {
    answers || broken == Some(Broken::BelievesInWitness)
}

/// By which policy a node serves in a divided farm.
pub fn partition(broken: Option<Broken>, policy: PartitionPolicy) -> PartitionPolicy {
    match broken {
        Some(Broken::ServesInAnyPart) => PartitionPolicy::Serve,
        _ => policy,
    }
}

/// What `node` takes for the digest of its module's configuration.
pub fn digest(broken: Option<Broken>, node: NodeId, fixed: &Fixed) -> u64 {
    match broken {
        Some(Broken::HidesConfiguration) => CONFIGURATION,
        _ => fixed.digest_of(node),
    }
}

/// By how much earlier than it does a node takes itself to have begun to join, and how long it says that it is joining. In what is left of its
/// join time, and of the pulses after it in which it takes nothing either, it says so as all do.
pub fn feigned_joining(broken: Option<Broken>, fixed: &Fixed) -> Option<(Duration, Duration)> {
    let joining = fixed.detection() + fixed.pulse();
    let opening = fixed.pulse() * OPEN_PULSES;
    match broken {
        Some(Broken::SharesWhileJoining) => Some((joining + opening, joining + opening)),
        Some(Broken::SkipsOpening) => Some((opening, joining)),
        _ => None,
    }
}

/// What a data plane makes of a plan.
pub fn sheet(broken: Option<Broken>, sheet: Sheet) -> Sheet {
    match broken {
        Some(Broken::NeverGuards) => Sheet {
            own: sheet.open,
            ..sheet
        },
        _ => sheet,
    }
}

/// Has a core that was not run from `before` to `now` go through that time as if it had been; what it would have sent is lost.
pub fn hide_stop(farm: &mut Farm, before: Duration, now: Duration, fixed: &Fixed) {
    let step = fixed.pulse() / 4;
    let mut at = before + step;
    while at < now {
        if farm.poll_timeout() <= at {
            farm.handle_timeout(at);
        }
        while farm.poll_transmit().is_some() {}
        at += step;
    }
}

/// The newest that each other node has ever said of itself, kept in `rows`, as if it had been heard just now.
fn young_rows(now: Duration, farm: &Farm, rows: &mut BTreeMap<NodeId, Hearsay>, fixed: &Fixed) -> Vec<Hearsay> {
    let nodes = (0..fixed.cluster.nodes.len()).filter_map(NodeId::new);
    let words = nodes.filter_map(|node| farm.membership().peer(node)?.word(node, now, fixed.detection()));
    rows.extend(words.map(|word| (word.node, word)));
    rows.values().map(|word| Hearsay { age_us: 0, ..*word }).collect()
}

/// Changes what a broken node says; true if something is changed.
pub fn forge(
    broken: Broken,
    now: Duration,
    heartbeat: &mut Heartbeat,
    farm: &Farm,
    kept: &mut Kept,
    fixed: &Fixed,
) -> bool {
    let before = heartbeat.clone();
    let feigns_joining = kept.feigns_until.is_some_and(|until| now < until);
    let proposed = |sender: NodeId| {
        let report = farm.report(sender, &fixed.module)?;
        Some(report.groups.first()?.map.as_ref()?.epoch)
    };
    let newest = farm.reports().keys().filter_map(|n| proposed(*n)).max();
    if broken == Broken::SaysItHears {
        heartbeat.hears = heard_all(now, farm, fixed);
        heartbeat.hears.sort_by_key(|(n, _)| *n);
    }
    if broken == Broken::SaysItHasSteppedOut {
        heartbeat.fenced = true;
    }
    if broken == Broken::KeepsRowsYoung {
        heartbeat.hearsay = young_rows(now, farm, &mut kept.rows, fixed);
    }
    if feigns_joining {
        heartbeat.joining = true;
        heartbeat.modules.iter_mut().for_each(|m| m.joining = true);
    }
    if broken == Broken::HidesWithheld {
        heartbeat.modules.iter_mut().for_each(|m| m.withheld = false);
    }
    if broken == Broken::NeverWithdraws {
        kept.note_promise(farm, fixed);
    }
    if broken == Broken::PassesOnMore {
        let groups = heartbeat.relayed.iter_mut().flat_map(|word| &mut word.modules);
        let groups = groups.flat_map(|module| &mut module.groups);
        groups.for_each(|group| group.promised = group.promised.max(newest.unwrap_or_default()));
    }
    let groups = heartbeat.modules.iter_mut().flat_map(|m| &mut m.groups);
    for group in groups {
        match broken {
            Broken::SaysNothingCommitted => {
                group.committed = Epoch::default();
                group.map = None;
            }
            Broken::PromisesEarly => group.promised = group.promised.max(newest.unwrap_or_default()),
            Broken::HidesConnections => {
                group.held = BucketSet::default();
                group.held_connections = 0;
            }
            Broken::NeverPromises => group.promised = Epoch::default(),
            // Of what is proposed anew it says as all do that it is too old, so that it is proposed once more.
            Broken::NeverWithdraws if newest.is_none_or(|newest| newest <= kept.promised) => {
                group.promised = kept.promised;
            }
            Broken::SkipsOpening if feigns_joining => group.weight = 0,
            Broken::MovesTooMuch => {
                let committed = group.committed;
                let proposal = group.map.as_mut().filter(|m| m.epoch > committed);
                proposal.into_iter().for_each(|m| m.map = mirrored(&m.map));
            }
            _ => {}
        }
    }
    *heartbeat != before
}

/// What node `this` makes of a heartbeat that came in, if it reads something else; `seqs` are the numbers it has used.
pub fn misread(
    broken: Broken,
    now: Duration,
    this: NodeId,
    payload: &[u8],
    farm: &Farm,
    seqs: &Seqs,
    fixed: &Fixed,
) -> Option<Vec<u8>> {
    let mut heartbeat = Heartbeat::parse(&fixed.key, payload).ok()?;
    let sender = heartbeat.sender;
    let heard = farm.membership().heard(now);
    match broken {
        Broken::CommitsEarly => {
            let own = farm.group(&fixed.module, 0)?.report(0, false).map?.epoch;
            let groups = heartbeat.modules.iter_mut().flat_map(|m| &mut m.groups);
            groups.for_each(|group| group.promised = own);
        }
        Broken::TakesItselfForHeard => {
            heartbeat.hears.retain(|(node, _)| *node != this);
            heartbeat.hears.push((this, Ack::of(seqs.newest())));
            heartbeat.hears.sort_by_key(|(node, _)| *node);
        }
        Broken::MistakesConfiguration => {
            let own = fixed.digest_of(this);
            heartbeat.modules.iter_mut().for_each(|m| m.digest = own);
        }
        Broken::IgnoresOtherCluster if heartbeat.cluster_digest != fixed.cluster_digest_of(this) => {
            // No tag: what cannot be read is not taken.
            return Some(Vec::new());
        }
        Broken::EvictsAlone => {
            let lost = |node: NodeId| node != this && node != sender && !heard.contains(node);
            heartbeat.hears.retain(|(node, _)| !lost(*node));
            heartbeat.hearsay.retain(|word| !lost(word.node));
        }
        Broken::OverlooksBrokenWays => {
            for node in heard.iter().filter(|node| *node != sender) {
                if heartbeat.acks(node).is_none() {
                    heartbeat.hears.push((node, Ack::of(0)));
                }
            }
            heartbeat.hears.sort_by_key(|(node, _)| *node);
        }
        Broken::TakesRecordings => {
            let last = farm.membership().peer(sender)?.last_seq();
            if heartbeat.seq > last {
                return None;
            }
            heartbeat.seq = last + 1;
        }
        Broken::HidesThoseThatDoNotHearIt => {
            let heard_at = heartbeat.acks(this).and_then(|ack| seqs.sent_at(ack));
            let hears = heard_at.is_some_and(|at| now <= at + fixed.pulse() * 3 / 2);
            // No tag, as above.
            return (!hears).then(Vec::new);
        }
        Broken::ForgetsWhoReturns => heartbeat.returning = false,
        Broken::OverlooksOutsiders => {
            let heard_at = heartbeat.acks(this).and_then(|ack| seqs.sent_at(ack));
            let hears = heard_at.is_some_and(|at| now <= at + fixed.pulse() * 3 / 2);
            if heartbeat.joining || (hears && farm.membership().view().contains(sender)) {
                return None;
            }
            heartbeat.fenced = true;
            let groups = heartbeat.modules.iter_mut().flat_map(|m| &mut m.groups);
            groups.for_each(|group| group.committed = Epoch::default());
        }
        _ => return None,
    }
    Some(heartbeat.emit(&fixed.key))
}

/// The same shares, dealt from the other end.
fn mirrored(map: &BucketMap) -> BucketMap {
    let mut bytes = Box::new([0; BUCKETS]);
    bytes.copy_from_slice(map.as_bytes());
    bytes.reverse();
    BucketMap::from_bytes(bytes).unwrap_or_default()
}

/// Every peer ever heard, as if it still were: each sends at least one heartbeat per pulse, so the number is one that it has used.
fn heard_all(now: Duration, farm: &Farm, fixed: &Fixed) -> Vec<(NodeId, Ack)> {
    let peers = (0..fixed.cluster.nodes.len()).filter_map(NodeId::new);
    let heard = peers.filter_map(|node| {
        let peer = farm.membership().peer(node)?;
        let missed = (now - peer.heard_at()?).as_micros() / fixed.pulse().as_micros();
        Some((node, Ack::of(peer.last_seq() + missed as u64)))
    });
    heard.collect()
}
