//! How shares set at run time are told to a person. Pure, but for the clock.

use std::time::{SystemTime, UNIX_EPOCH};

use farm_core::api::{ClientConnections, ShareScope, ShareSetting};

use crate::event::ShareVerb;

/// How the reason of a share begins that an administrator gave away.
const GIVEN_AWAY: [&str; 2] = ["drained", "weight 0"];

/// Whether the reason of a node says that an administrator gave its share away.
pub(super) fn is_given_away(why: &str) -> bool {
    GIVEN_AWAY.iter().any(|word| why.starts_with(word))
}

/// A command about shares in the words of the command line, for the history: `weight s2 5`, `drain s2 --timeout 600s --group web`.
pub(super) fn asked(verb: &ShareVerb, node: &str) -> String {
    let in_group = |scope: &ShareScope| {
        scope
            .group
            .as_ref()
            .map_or_else(String::new, |g| format!(" --group {g}"))
    };
    match verb {
        ShareVerb::Drain(r) => {
            let timeout = match r.timeout_ms {
                ms if ms.is_multiple_of(1000) => format!("{}s", ms / 1000),
                ms => format!("{ms}ms"),
            };
            format!("drain {node} --timeout {timeout}{}", in_group(&r.scope))
        }
        ShareVerb::Undrain(r) => format!("undrain {node}{}", in_group(&r.scope)),
        ShareVerb::Weight(r) => {
            let weight = r.weight.map_or_else(|| "default".to_owned(), |w| w.to_string());
            format!("weight {node} {weight}{}", in_group(&r.scope))
        }
    }
}

/// Who gave a share away, then what is true only now: `drained (group web) by root on s1; 5 min ago, 3 connections left`,
/// `weight 0, set by root; no connection left`. `which` names the groups where it is not all of them.
pub(super) fn given_away(setting: &ShareSetting, which: &str, connections: u32) -> String {
    let left = left(connections);
    match &setting.drained {
        Some(drained) => format!("drained{which} by {}; {}, {left}", drained.by, ago(drained.since)),
        None => {
            let by = setting.weight_by.as_ref();
            let by = by.map_or_else(|| "at run time".to_owned(), |by| format!("by {by}"));
            let left = if connections == 0 {
                String::new()
            } else {
                format!("; {left}")
            };
            format!("weight 0{which}, set {by}{left}")
        }
    }
}

/// The part of a module's reason that will still be right tomorrow: without the age and the connections that are left.
pub(in crate::node) fn lasting(why: &str) -> &str {
    if is_given_away(why) || why.starts_with("stops when") {
        why.split_once("; ").map_or(why, |(lasting, _)| lasting)
    } else {
        why
    }
}

/// How long ago, in the coarsest unit: it is told to the other nodes, and should not change at every pulse.
fn ago(since: u64) -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
    match now.saturating_sub(since) {
        0..60 => "less than a minute ago".to_owned(),
        s @ 60..3600 => format!("{} min ago", s / 60),
        s @ 3600..86_400 => format!("{} h ago", s / 3600),
        s => format!("{} d ago", s / 86_400),
    }
}

/// `3 connections left`.
pub(super) fn left(connections: u32) -> String {
    match connections {
        0 => "no connection left".to_owned(),
        1 => "1 connection left".to_owned(),
        n => format!("{n} connections left"),
    }
}

/// `: 198.18.0.1 (2), 198.18.0.7 (1)`, or nothing.
pub(super) fn from_whom(clients: &[ClientConnections], connections: u32) -> String {
    if clients.is_empty() || connections == 0 {
        return String::new();
    }
    let named: Vec<String> = clients
        .iter()
        .map(|c| format!("{} ({})", c.addr, c.connections))
        .collect();
    let others = connections.saturating_sub(clients.iter().map(|c| c.connections).sum());
    let others = if others > 0 {
        format!(", others ({others})")
    } else {
        String::new()
    };
    format!(": {}{others}", named.join(", "))
}

#[cfg(test)]
mod tests {
    use farm_core::api::{DrainRequest, Drained, UndrainRequest, WeightRequest};

    use super::*;

    #[test]
    fn connections_are_told_with_their_clients_and_the_rest_as_others() {
        let client = |addr: &str, connections| ClientConnections {
            addr: addr.parse().unwrap(),
            connections,
        };
        let clients = [client("198.18.0.7", 3), client("198.18.0.1", 1)];
        assert_eq!(from_whom(&clients, 4), ": 198.18.0.7 (3), 198.18.0.1 (1)");
        assert_eq!(from_whom(&clients, 9), ": 198.18.0.7 (3), 198.18.0.1 (1), others (5)");
        assert_eq!(from_whom(&[], 3), "");
        assert_eq!(
            [left(0), left(1), left(2)],
            ["no connection left", "1 connection left", "2 connections left"]
        );
    }

    #[test]
    fn a_command_is_told_as_it_was_typed() {
        let scope = |group: Option<&str>| ShareScope {
            module: None,
            group: group.map(str::to_owned),
        };
        let drain = |timeout_ms| {
            ShareVerb::Drain(DrainRequest {
                scope: scope(Some("web")),
                timeout_ms,
                force: false,
                wait: true,
            })
        };
        let weight = |weight| {
            ShareVerb::Weight(WeightRequest {
                scope: scope(None),
                weight,
                force: false,
            })
        };
        assert_eq!(asked(&drain(90_000), "s2"), "drain s2 --timeout 90s --group web");
        assert_eq!(asked(&drain(500), "s2"), "drain s2 --timeout 500ms --group web");
        assert_eq!(asked(&weight(Some(5)), "s2"), "weight s2 5");
        assert_eq!(asked(&weight(None), "s2"), "weight s2 default");
        let undrain = ShareVerb::Undrain(UndrainRequest { scope: scope(None) });
        assert_eq!(asked(&undrain, "s2"), "undrain s2");
    }

    #[test]
    fn what_the_history_keeps_of_a_reason_has_no_age() {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
        let drained = ShareSetting {
            drained: Some(Drained {
                by: "root on s1".to_owned(),
                since: now - 150,
                until: None,
            }),
            ..ShareSetting::default()
        };
        let told = given_away(&drained, " (group web)", 3);
        assert_eq!(told, "drained (group web) by root on s1; 2 min ago, 3 connections left");
        assert_eq!(lasting(&told), "drained (group web) by root on s1");
        let zero = ShareSetting {
            weight: Some(0),
            weight_by: Some("root on s1".to_owned()),
            drained: None,
        };
        assert_eq!(given_away(&zero, "", 0), "weight 0, set by root on s1");
        assert_eq!(lasting(&given_away(&zero, "", 1)), "weight 0, set by root on s1");
        let other = "start_both failed: exit code 1; see its log";
        assert_eq!(lasting(other), other);
    }

    #[test]
    fn a_time_is_told_in_the_coarsest_unit() {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
        assert_eq!(ago(now + 5), "less than a minute ago");
        assert_eq!(ago(now - 150), "2 min ago");
        assert_eq!(ago(now - 3 * 3600 - 60), "3 h ago");
        assert_eq!(ago(now - 3 * 86_400 - 60), "3 d ago");
    }
}
