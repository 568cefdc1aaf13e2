//! How shares set at run time are told to a person. Pure, but for the clock.

use std::time::{SystemTime, UNIX_EPOCH};

use farm_core::api::ClientConnections;

/// How long ago, in the coarsest unit: it is told to the other nodes, and should not change at every pulse.
pub(super) fn ago(since: u64) -> String {
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
    fn a_time_is_told_in_the_coarsest_unit() {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
        assert_eq!(ago(now + 5), "less than a minute ago");
        assert_eq!(ago(now - 150), "2 min ago");
        assert_eq!(ago(now - 3 * 3600 - 60), "3 h ago");
        assert_eq!(ago(now - 3 * 86_400 - 60), "3 d ago");
    }
}
