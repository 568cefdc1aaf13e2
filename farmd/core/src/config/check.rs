//! `<check>`: checkers.
//!
//! Only TCP checkers that run with the application do something; the others are understood, checked and
//! named in a warning. Called by [`super::module`].

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

use super::decode::{Child, Node};
use super::inert;
use super::report::{Report, Span, Wrong, quote};
use super::value::{self, Unit};
use super::{CheckerAction, TcpCheckerConfig};

/// `when` of a checker.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum When {
    Both,
    Pre,
    Other,
}

/// `action` of a TCP checker.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Reaction {
    Act(CheckerAction),
    Wait,
}

/// The TCP checkers of the `<check>` that `child` is.
pub(super) fn decode(report: &mut Report<'_>, child: &Child<'_>) -> Vec<TcpCheckerConfig> {
    let node = child.open(report, &[]);
    let children = node.children(report, &["tcp", "ping", "intf", "ip", "custom", "module", "splitbrain"]);
    let mut checkers = Vec::new();
    let mut idents: BTreeMap<(&str, &str), Span> = BTreeMap::new();
    for child in children.iter() {
        let node = match child.name() {
            "tcp" => {
                let node = child.open(report, &["ident", "when", "action"]);
                checkers.extend(tcp(report, &node));
                node
            }
            class => match inert::CHECKERS.iter().find(|shape| shape.name == class) {
                Some(shape) => inert::check(report, child, shape),
                None => continue,
            },
        };
        let ident = node.element.attrs.iter().find(|attr| attr.name == "ident");
        let Some(ident) = ident.filter(|attr| !attr.reported && !attr.value.is_empty()) else {
            continue;
        };
        let key = (child.name(), ident.value.as_str());
        if let Some(first) = idents.get(&key) {
            let wrong = Wrong::new(format!(
                "a second `<{}>` has the ident {}",
                child.name(),
                quote(&ident.value)
            ));
            let hint = format!("the first one is at line {}", report.line(*first));
            node.error(report, "ident", wrong.hint(hint));
        } else {
            idents.insert(key, ident.value_span);
        }
    }
    checkers
}

fn tcp(report: &mut Report<'_>, node: &Node<'_>) -> Option<TcpCheckerConfig> {
    const WHENS: [(&str, When); 4] = [
        ("both", When::Both),
        ("pre", When::Pre),
        ("prim", When::Other),
        ("second", When::Other),
    ];
    const ACTIONS: [(&str, Reaction); 5] = [
        ("restart", Reaction::Act(CheckerAction::Restart)),
        ("stopstart", Reaction::Act(CheckerAction::StopStart)),
        ("stop", Reaction::Act(CheckerAction::Stop)),
        ("noaction", Reaction::Act(CheckerAction::NoAction)),
        ("wait", Reaction::Wait),
    ];
    let ident = node.need(report, "ident", value::name);
    let when = match node.has("when") {
        true => node.read(report, "when", value::word(&WHENS)),
        false => Some(When::Both),
    };
    let action = match node.has("action") {
        true => node.read(report, "action", value::word(&ACTIONS)),
        false if when == Some(When::Pre) => Some(Reaction::Wait),
        false => Some(Reaction::Act(CheckerAction::Restart)),
    };
    match (when, action) {
        (Some(When::Both | When::Other), Some(Reaction::Wait)) => {
            let wrong = Wrong::new("a checker that runs with the application cannot wait for it");
            let hint = "`restart`, `stopstart`, `stop` or `noaction` is expected, or when=\"pre\"";
            node.error(report, "action", wrong.hint(hint));
        }
        (
            Some(When::Pre),
            Some(Reaction::Act(CheckerAction::Restart | CheckerAction::StopStart | CheckerAction::Stop)),
        ) => {
            let wrong = Wrong::new("a checker that runs before the application can only wait");
            node.error(
                report,
                "action",
                wrong.hint("`wait` or `noaction` is expected, or when=\"both\""),
            );
        }
        (Some(_), Some(_)) | (None, _) | (_, None) => {}
    }
    if matches!(when, Some(When::Pre | When::Other)) {
        let wrong = Wrong::new("this checker has no effect: only checkers with when=\"both\" run");
        node.warning(report, "when", wrong);
    }
    let children = node.children(report, &["to"]);
    children.need(report, "to");
    let to = children.one(report, "to")?;
    let to = to.open(report, &["addr", "port", "interval", "timeout", "rise", "fall"]);
    to.children(report, &[]);
    let addr = match to.has("addr") {
        true => to.read(report, "addr", value::host_addr),
        false => Some(IpAddr::V4(Ipv4Addr::LOCALHOST)),
    };
    let port = to.need(report, "port", value::port);
    let interval = to.duration(report, "interval", Unit::Second, 1..=86_400);
    let timeout = to.duration(report, "timeout", Unit::Second, 1..=3600);
    let mut count = |name, default| to.read(report, name, value::number(1..=100_u32)).unwrap_or(default);
    let (rise, fall) = (count("rise", 1), count("fall", 2));
    if when != Some(When::Both) {
        return None;
    }
    let Reaction::Act(action) = action? else {
        return None;
    };
    Some(TcpCheckerConfig {
        ident: ident?.to_owned(),
        action,
        addr: addr?,
        port: port?,
        interval: interval.unwrap_or(Duration::from_secs(10)),
        timeout: timeout.unwrap_or(Duration::from_secs(5)),
        rise,
        fall,
    })
}
