//! The words behind the question mark of a question: what each route takes, checked before anything is asked.
//!
//! Pure. Every word may stand once or more (the last one counts), in any order; one that a route does not know is a mistake.

use std::net::IpAddr;
use std::str::FromStr;

use farm_core::api::flows::MAX_FLOWS;
use farm_core::api::history::{HISTORY_LIMIT, HistoryFilter};
use farm_core::balance::explain::Inquiry;
use farm_core::config::Protocol;
use farm_core::id::ModuleName;

use super::{Refusal, short};
use crate::look::flows::FlowFilter;
use crate::look::map::MapFilter;

/// What `/v1/history?` asks for: `n`, `since`, `after` and `module`.
pub(super) fn history(words: &str) -> Result<HistoryFilter, Refusal> {
    let mut filter = HistoryFilter::default();
    for (name, value) in pairs(words) {
        match name {
            "n" => filter.last = Some(number(name, value)?),
            "since" => filter.since_us = Some(number(name, value)?),
            "after" => filter.after = Some(number(name, value)?),
            "module" => filter.module = Some(module(value)?.to_string()),
            _ => return Err(unknown(name, "n, since, after or module")),
        }
    }
    filter.last = filter.last.map(|n| n.min(HISTORY_LIMIT));
    Ok(filter)
}

/// What `/v1/why?` asks for: `client`, `vip` and `vip_port`; also `port` and `protocol`.
pub(super) fn why(words: &str) -> Result<Inquiry, Refusal> {
    let (mut client, mut client_port, mut vip, mut vip_port) = (None, None, None, None);
    let mut protocol = Protocol::Tcp;
    for (name, value) in pairs(words) {
        match name {
            "client" => client = Some(address(name, value)?),
            "port" => client_port = Some(number(name, value)?),
            "vip" => vip = Some(address(name, value)?),
            "vip_port" => vip_port = Some(number(name, value)?),
            "protocol" => {
                protocol = match value {
                    "tcp" => Protocol::Tcp,
                    "udp" => Protocol::Udp,
                    _ => return Err(Refusal::bad(format!("`protocol` is `{value}`, tcp or udp is expected"))),
                }
            }
            _ => return Err(unknown(name, "protocol, client, port, vip or vip_port")),
        }
    }
    let missing = |name: &str| Refusal::bad(format!("`{name}` is missing"));
    let inquiry = Inquiry {
        protocol,
        client: client.ok_or_else(|| missing("client"))?,
        client_port,
        vip: vip.ok_or_else(|| missing("vip"))?,
        vip_port: vip_port.ok_or_else(|| missing("vip_port"))?,
    };
    if inquiry.client.is_ipv4() != inquiry.vip.is_ipv4() {
        let (client, vip) = (inquiry.client, inquiry.vip);
        return Err(Refusal::bad(format!(
            "{client} cannot speak to {vip}: one is IPv4, the other IPv6"
        )));
    }
    Ok(inquiry)
}

/// What `/v1/map?` asks for: `module` and `group`.
pub(super) fn map(words: &str) -> Result<MapFilter, Refusal> {
    let mut filter = MapFilter::default();
    for (name, value) in pairs(words) {
        match name {
            "module" => filter.module = Some(module(value)?),
            "group" => filter.group = Some(short(name, value)?),
            _ => return Err(unknown(name, "module or group")),
        }
    }
    Ok(filter)
}

/// What `/v1/flows?` asks for: `n`, `client`, `owner` and `module`.
pub(super) fn flows(words: &str) -> Result<FlowFilter, Refusal> {
    let mut filter = FlowFilter::default();
    for (name, value) in pairs(words) {
        match name {
            "n" => filter.most = number::<usize>(name, value)?.min(MAX_FLOWS),
            "client" => filter.client = Some(address(name, value)?),
            "owner" => filter.owner = Some(short(name, value)?),
            "module" => filter.module = Some(module(value)?),
            _ => return Err(unknown(name, "n, client, owner or module")),
        }
    }
    Ok(filter)
}

fn pairs(words: &str) -> impl Iterator<Item = (&str, &str)> {
    let words = words.split('&').filter(|word| !word.is_empty());
    words.map(|word| word.split_once('=').unwrap_or((word, "")))
}

fn number<T: FromStr>(name: &str, value: &str) -> Result<T, Refusal> {
    let error = || Refusal::bad(format!("`{name}` is `{value}`, a whole number is expected"));
    value.parse().map_err(|_| error())
}

fn address(name: &str, value: &str) -> Result<IpAddr, Refusal> {
    let error = |_| Refusal::bad(format!("`{name}` is `{value}`, an address is expected"));
    value.parse().map(|addr: IpAddr| addr.to_canonical()).map_err(error)
}

fn module(value: &str) -> Result<ModuleName, Refusal> {
    value.parse().map_err(|e| Refusal::bad(format!("{e}")))
}

fn unknown(name: &str, expected: &str) -> Refusal {
    Refusal::bad(format!("`{name}` is not known here: {expected} is expected"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error<T>(result: Result<T, Refusal>) -> String {
        result.err().expect("it is wrong").error
    }

    #[test]
    fn the_words_of_a_question_about_the_history_are_read() {
        let all = history("n=20&since=1795000000000000&after=7&module=web").unwrap_or_default();
        let expected = HistoryFilter {
            module: Some("web".to_owned()),
            since_us: Some(1_795_000_000_000_000),
            after: Some(7),
            last: Some(20),
        };
        assert_eq!(all, expected);
        assert_eq!(history("").ok(), Some(HistoryFilter::default()));
        assert_eq!(history("n=99999999").ok().and_then(|f| f.last), Some(HISTORY_LIMIT));
    }

    #[test]
    fn a_client_may_be_named_with_and_without_a_port() {
        let asked = why("client=198.18.0.2&port=4000&vip=198.18.0.20&vip_port=53&protocol=udp").ok();
        let mut expected = Inquiry {
            protocol: Protocol::Udp,
            client: "198.18.0.2".parse().unwrap(),
            client_port: Some(4000),
            vip: "198.18.0.20".parse().unwrap(),
            vip_port: 53,
        };
        assert_eq!(asked, Some(expected));
        (expected.protocol, expected.client_port) = (Protocol::Tcp, None);
        let mapped = why("client=::ffff:198.18.0.2&vip=198.18.0.20&vip_port=53").ok();
        assert_eq!(mapped, Some(expected));
        assert!(why("client=2001:db8::2&vip=2001:db8::20&vip_port=80").is_ok());
    }

    #[test]
    fn what_is_wrong_is_named_with_what_is_expected() {
        for (words, expected) in [
            ("client=me&vip=198.18.0.20&vip_port=80", "an address"),
            ("vip=198.18.0.20&vip_port=80", "`client` is missing"),
            ("client=198.18.0.2&vip=198.18.0.20", "`vip_port` is missing"),
            ("client=198.18.0.2&port=70000", "a whole number"),
            ("protocol=icmp", "tcp or udp"),
            ("colour=red", "vip_port is expected"),
            ("client=2001:db8::2&vip=198.18.0.20&vip_port=80", "cannot speak to"),
        ] {
            assert!(error(why(words)).contains(expected), "{words}: {}", error(why(words)));
        }
        assert!(error(map("module=../x")).contains("no module name"));
        assert!(error(map("group=")).contains("`group`"));
        assert!(error(flows("owner=")).contains("`owner`"));
        assert!(error(flows("n=-1")).contains("a whole number"));
        assert_eq!(flows("n=99999999").ok().map(|f| f.most), Some(MAX_FLOWS));
    }
}
