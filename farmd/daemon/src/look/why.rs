//! `GET /v1/why`: rule, group, bucket, owner and verdict for one client.
//!
//! Decides nothing: the place and the verdicts are [`farm_core::balance::explain`]'s. Asks the kernel for the one connection that is meant.

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr};

use farm_core::api::why::{Why, WhyBucket, WhyRule, WhyVerdict};
use farm_core::api::why_text::{Scene, Subject, dealt_by, filter_word};
use farm_core::api::{ModuleState, Quality};
use farm_core::balance::explain::{Inquiry, Place, Placeless};
use farm_core::balance::plan::{GroupPlan, Plan, RulePlan, VipPlan};
use farm_core::config::{L2Mode, PlaneChoice, Protocol, XdpChoice};
use farm_core::id::{MacAddr, NodeSet};

use super::{ModuleSight, Sight};
use crate::dataplane::connections::{Connection, Connections};

/// Why a question has no answer.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum WhyError {
    /// The address is no VIP of a module that is configured here.
    NoVip {
        /// The address.
        addr: IpAddr,
        /// Those there are.
        vips: Vec<IpAddr>,
    },
    /// The rule deals by the client's port.
    NeedsPort {
        /// The client.
        client: IpAddr,
        /// `MODULE/GROUP`.
        group: String,
        /// The rule's filter.
        filter: &'static str,
    },
}

impl fmt::Display for WhyError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoVip { addr, vips } if vips.is_empty() => {
                write!(
                    f,
                    "{addr} is no virtual IP: no module that has one is configured on this node"
                )
            }
            Self::NoVip { addr, vips } => {
                let vips: Vec<String> = vips.iter().map(IpAddr::to_string).collect();
                write!(
                    f,
                    "{addr} is no virtual IP of a module that is configured on this node; these are: {}",
                    vips.join(", ")
                )
            }
            Self::NeedsPort { client, group, filter } => {
                let example = SocketAddr::new(*client, 40_000);
                write!(
                    f,
                    "{group} deals {} ({filter}): name the client's port too, as in {example}",
                    dealt_by(filter)
                )
            }
        }
    }
}

impl std::error::Error for WhyError {}

/// The connection that `inquiry` is about, if it names one that a host can have.
pub fn connection(inquiry: &Inquiry) -> Option<Connection> {
    let port = inquiry.client_port.filter(|_| inquiry.protocol == Protocol::Tcp)?;
    Some(Connection {
        vip: (inquiry.vip, inquiry.vip_port).into(),
        client: (inquiry.client, port).into(),
    })
}

/// Whether this host has that very connection. For a thread that may wait.
///
/// # Errors
/// If the kernel cannot be asked.
pub fn is_here(connection: Connection) -> io::Result<bool> {
    Connections::open()?.has(connection)
}

/// The answer, where this host has the connection that is meant or not, or that is not known.
///
/// # Errors
/// If the address is no VIP, or the rule needs a port.
pub fn answer(sight: &Sight, inquiry: &Inquiry, has: Option<bool>) -> Result<Why, WhyError> {
    let module = module_of(sight, inquiry.vip)?;
    let carried = sight.plan.vip(inquiry.vip).is_some();
    let idle = (!carried).then(|| rules_only(sight, module, inquiry.vip));
    let plan = idle.as_ref().unwrap_or(&sight.plan);
    let group_of = |rule: &RulePlan| {
        let index = match carried {
            true => sight.groups.get(rule.group).map(|(_, index)| *index),
            false => Some(rule.group),
        };
        index
            .and_then(|index| module.group_name(index))
            .unwrap_or("?")
            .to_owned()
    };
    let (rule, place) = match inquiry.place(plan) {
        Ok(place) => (Some(place.rule), Some(place).filter(|_| carried)),
        Err(Placeless::PerPacket(rule)) => (Some(rule), None),
        Err(Placeless::NoRule | Placeless::NoVip) => (None, None),
        Err(Placeless::NeedsPort(rule)) => {
            return Err(WhyError::NeedsPort {
                client: inquiry.client,
                group: format!("{}/{}", module.name, group_of(&rule)),
                filter: filter_word(rule.affinity),
            });
        }
    };
    let here = module.on(sight.this);
    let verdicts = Verdicts::of(sight, inquiry, place.as_ref(), has);
    Ok(Why {
        node: sight.name(sight.this),
        protocol: match inquiry.protocol {
            Protocol::Tcp => "tcp".to_owned(),
            Protocol::Udp => "udp".to_owned(),
        },
        client: inquiry.client,
        client_port: inquiry.client_port,
        vip: inquiry.vip,
        port: inquiry.vip_port,
        module: module.name.to_string(),
        state: here.and_then(|h| h.state).unwrap_or(ModuleState::Stop),
        quality: here.and_then(|h| h.quality).unwrap_or(Quality::NotReady),
        no_share: here.map_or_else(String::new, |h| h.why.clone()),
        serving: module.serving(),
        rule: rule.map(|rule| WhyRule {
            group: group_of(&rule),
            first_port: rule.first_port,
            last_port: rule.last_port,
            filter: filter_word(rule.affinity).to_owned(),
        }),
        bucket: place.map(|place| bucket(sight, module, inquiry, place)),
        connection: has,
        opening: verdicts.opening,
        belonging: verdicts.belonging,
        if_connected: verdicts.if_connected,
        elsewhere: None,
    })
}

/// The module whose configuration has `vip`.
fn module_of(sight: &Sight, vip: IpAddr) -> Result<&ModuleSight, WhyError> {
    let addrs = |module: &ModuleSight| -> Vec<IpAddr> {
        let config = module.config.vip.iter();
        config.flat_map(|v| v.addrs()).collect()
    };
    let found = sight.modules.iter().find(|module| addrs(module).contains(&vip));
    found.ok_or_else(|| WhyError::NoVip {
        addr: vip,
        vips: sight.modules.iter().flat_map(addrs).collect(),
    })
}

/// The rules for `vip` of a module that does not run here, as a plan of which everything is closed.
fn rules_only(sight: &Sight, module: &ModuleSight, vip: IpAddr) -> Plan {
    let config = module.config.vip.iter();
    let closed = |group: &farm_core::config::GroupConfig| GroupPlan::closed(group.name.clone());
    Plan {
        vips: config
            .clone()
            .map(|config| VipPlan {
                addr: vip,
                interface: 0,
                own_mac: MacAddr::default(),
                mode: L2Mode::Directed,
                entry_group: VipPlan::entry_group_of(config, vip),
                rules: VipPlan::rules_of(config, vip, 0),
                peers: BTreeMap::new(),
                choice: PlaneChoice::default(),
                xdp: XdpChoice::default(),
                arp_reroute: None,
            })
            .collect(),
        groups: config.flat_map(|config| &config.groups).map(closed).collect(),
        ..Plan::clone(&sight.plan)
    }
}

fn bucket(sight: &Sight, module: &ModuleSight, inquiry: &Inquiry, place: Place) -> WhyBucket {
    let plan = &sight.plan;
    let index = place.bucket.index();
    let group = plan.groups.get(place.rule.group);
    let directed = plan.vip(inquiry.vip).filter(|vip| vip.mode == L2Mode::Directed);
    let named = |node| sight.name(node);
    let map = sight.groups.get(place.rule.group);
    let map = map.and_then(|(_, index)| module.groups.get(*index));
    WhyBucket {
        number: index as u16,
        map: map.map_or(0, |group| group.map),
        owner: group.and_then(|g| g.owners.owner(place.bucket)).map(named),
        state: group.map(|g| g.states[index]).unwrap_or_default().into(),
        leaving: group.is_some_and(|g| g.leaving.contains(index)),
        holders: holders(plan, &place).iter().map(named).collect(),
        entry: directed.and_then(|vip| plan.entry_node(vip, inquiry.client)).map(named),
        since: sight.since.as_deref().cloned(),
    }
}

fn holders(plan: &Plan, place: &Place) -> NodeSet {
    let group = plan.groups.get(place.rule.group);
    let holders = group.and_then(|g| g.holders.get(&place.bucket.index()));
    holders.copied().unwrap_or(NodeSet::EMPTY)
}

/// The verdicts of an answer.
struct Verdicts {
    opening: WhyVerdict,
    belonging: Option<WhyVerdict>,
    if_connected: Option<WhyVerdict>,
}

impl Verdicts {
    fn of(sight: &Sight, inquiry: &Inquiry, place: Option<&Place>, has: Option<bool>) -> Self {
        let name = |node| sight.name(node);
        let scene = Scene {
            name: &name,
            holders: place.map_or(NodeSet::EMPTY, |place| holders(&sight.plan, place)),
        };
        let belonging = |here: bool| {
            let decision = inquiry.judge(&sight.plan, here).belonging?;
            Some(scene.verdict(Subject::Belonging { here }, &decision))
        };
        let told = belonging(has.unwrap_or(false));
        let differs = |other: &WhyVerdict| told.as_ref().is_some_and(|told| told.verdict != other.verdict);
        let if_connected = belonging(true).filter(|other| has.is_none() && differs(other));
        let opening = inquiry.judge(&sight.plan, has.unwrap_or(false)).opening;
        Self {
            opening: scene.verdict(Subject::Opening, &opening),
            belonging: told,
            if_connected,
        }
    }
}

#[cfg(test)]
mod tests {
    use farm_core::api::why::BucketWord;

    use super::*;
    use crate::look::test_sight::{CLIENT_ADDRS, CLIENT_PORTS, VIP, client, sight};

    fn inquiry(protocol: Protocol, port: Option<u16>, vip_port: u16) -> Inquiry {
        Inquiry {
            protocol,
            client: client(1),
            client_port: port,
            vip: VIP,
            vip_port,
        }
    }

    #[test]
    fn an_answer_names_rule_bucket_owner_and_verdicts() {
        let sight = sight(true);
        // Of these connections some are this node's, some another's.
        let mut owners = std::collections::BTreeSet::new();
        for port in 1000..1100 {
            let why = answer(&sight, &inquiry(Protocol::Tcp, Some(port), 443), Some(false)).unwrap();
            assert_eq!((why.node.as_str(), why.module.as_str()), ("s1", "web"));
            let rule = why.rule.unwrap();
            assert_eq!((rule.group.as_str(), rule.filter.as_str()), (CLIENT_PORTS, "on_port"));
            let bucket = why.bucket.unwrap();
            let owner = bucket.owner.unwrap();
            let mine = owner == "s1";
            assert_eq!(bucket.state, if mine { BucketWord::Own } else { BucketWord::Foreign });
            assert_eq!(why.opening.verdict, if mine { "accept" } else { "drop" });
            assert_eq!(why.opening.sent_on, if mine { vec![] } else { vec![owner.clone()] });
            assert!(bucket.entry.is_some() && why.if_connected.is_none());
            owners.insert(owner);
        }
        assert_eq!(owners.into_iter().collect::<Vec<_>>(), ["s1", "s2"]);
    }

    #[test]
    fn without_a_port_both_verdicts_on_a_segment_are_told_where_they_differ() {
        let mut sight = sight(true);
        let plan = std::sync::Arc::get_mut(&mut sight.plan).unwrap();
        for group in &mut plan.groups {
            group.states.fill(farm_core::balance::plan::BucketState::Draining);
        }
        let why = answer(&sight, &inquiry(Protocol::Tcp, None, 80), None).unwrap();
        assert_eq!(why.rule.unwrap().group, CLIENT_ADDRS);
        assert_eq!(why.belonging.unwrap().verdict, "drop");
        assert_eq!(why.if_connected.unwrap().verdict, "accept");
        let known = answer(&sight, &inquiry(Protocol::Tcp, Some(9), 80), Some(true)).unwrap();
        assert_eq!(
            (known.belonging.unwrap().verdict.as_str(), known.if_connected),
            ("accept", None)
        );
    }

    #[test]
    fn what_has_no_answer_says_what_is_missing() {
        let sight = sight(true);
        let elsewhere = Inquiry {
            vip: client(9),
            ..inquiry(Protocol::Tcp, None, 80)
        };
        let error = answer(&sight, &elsewhere, None).unwrap_err().to_string();
        assert!(
            error.contains("is no virtual IP") && error.contains("198.18.0.20"),
            "{error}"
        );
        let error = answer(&sight, &inquiry(Protocol::Tcp, None, 443), None)
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("web/ports deals by the client's address and port (on_port)"),
            "{error}"
        );
        let why = answer(&sight, &inquiry(Protocol::Tcp, None, 81), None).unwrap();
        assert_eq!(
            (why.rule, why.bucket, why.opening.reason.as_str()),
            (None, None, "no_rule")
        );
        let why = answer(&sight, &inquiry(Protocol::Udp, None, 53), None).unwrap();
        assert_eq!(
            (why.rule.unwrap().filter.as_str(), why.bucket, why.belonging),
            ("on_ipid", None, None)
        );
    }

    #[test]
    fn a_module_that_does_not_run_here_still_has_its_rule() {
        let sight = sight(false);
        let why = answer(&sight, &inquiry(Protocol::Tcp, Some(9), 443), Some(false)).unwrap();
        assert_eq!((why.state, why.bucket), (ModuleState::Stop, None));
        assert_eq!(
            (why.rule.unwrap().group.as_str(), why.serving),
            (CLIENT_PORTS, vec!["s2".to_owned()])
        );
        assert_eq!(
            (why.opening.verdict.as_str(), why.opening.reason.as_str()),
            ("pass", "not_vip")
        );
        let why = answer(&sight, &inquiry(Protocol::Tcp, Some(9), 81), Some(false)).unwrap();
        assert_eq!(why.rule, None);
    }
}
