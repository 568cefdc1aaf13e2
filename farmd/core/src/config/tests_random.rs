//! Random texts: nothing panics, nothing takes long, every finding has a place in the text, and what was made of a
//! random valid file is what was written.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::select;

use super::diag::Diagnostic;
use super::*;

const SAMPLES: [&str; 4] = [
    include_str!("../../../../tests/config/valid/module-several-groups.xml"),
    include_str!("../../../../tests/config/valid/module-parts-without-effect.xml"),
    include_str!("../../../../tests/config/valid/module-macros.xml"),
    include_str!("../../../../tests/config/valid/cluster-safekit.xml"),
];

/// Pieces that mean something to some layer of the parsers.
const PIECES: [&str; 36] = [
    "<",
    ">",
    "/>",
    "</",
    "&",
    ";",
    "&lt;",
    "&#0;",
    "&#xD800;",
    "&x;",
    "\"",
    "'",
    "=",
    "%",
    "%%",
    "%A%",
    "%VIP%",
    "<!--",
    "-->",
    "<![CDATA[",
    "]]>",
    "<?",
    "?>",
    "<?xml version=\"1.0\"?>",
    "<!DOCTYPE safe>",
    "<!DOCTYPE",
    "[",
    "<safe>",
    "</safe>",
    "<macro name=\"A\" value=\"%A%\"/>",
    "é",
    "\u{feff}",
    "\u{0}",
    "\t",
    "\r\n",
    "99999999999999999999d",
];

/// Parses `text` as everything it could be, and checks what is promised for any text.
fn survives(text: &str) {
    let start = Instant::now();
    let env = BTreeMap::from([("VIP".to_owned(), "%A%<&\"".to_owned())]);
    let outcomes = [
        module::parse("f", text, &env, None).map(|(_, warnings)| warnings),
        cluster::parse("f", text).map(|(_, warnings)| warnings),
        module::expand("f", text, &env).map(|_| Vec::new()),
    ];
    let spent = start.elapsed();
    // A second is usual for the largest; what grows with the square of the length takes hours.
    assert!(spent < Duration::from_secs(120), "{spent:?} for {} bytes", text.len());
    for outcome in outcomes {
        let refused = outcome.is_err();
        let found = outcome.unwrap_or_else(|found| found);
        assert_eq!(found.iter().any(Diagnostic::is_error), refused, "{text:?}");
        let lines = text.split('\n').count();
        for diagnostic in &found {
            assert!(
                (1..=lines).contains(&(diagnostic.line as usize)),
                "{diagnostic} of {text:?}"
            );
            let line = text.split('\n').nth(diagnostic.line as usize - 1).unwrap();
            assert!(
                (1..=line.chars().count() + 1).contains(&(diagnostic.col as usize)),
                "{diagnostic} of {text:?}"
            );
            assert!(!diagnostic.render(text).is_empty());
        }
    }
}

/// `text` with the characters `at..at + cut` replaced by `piece`; places wrap around.
fn mutate(text: &str, at: usize, cut: usize, piece: &str) -> String {
    let length = text.chars().count().max(1);
    let at = at % length;
    let head: String = text.chars().take(at).collect();
    let tail: String = text.chars().skip(at + cut).collect();
    head + piece + &tail
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn random_bytes_never_panic(bytes in vec(any::<u8>(), 0..400)) {
        survives(&String::from_utf8_lossy(&bytes));
    }

    #[test]
    fn random_pieces_of_xml_never_panic(pieces in vec(select(&PIECES[..]), 0..60)) {
        survives(&pieces.concat());
    }

    #[test]
    fn mutated_samples_never_panic(
        sample in select(&SAMPLES[..]),
        edits in vec((any::<usize>(), 0..12_usize, select(&PIECES[..])), 1..6),
    ) {
        let mut text = sample.to_owned();
        for (at, cut, piece) in edits {
            text = mutate(&text, at, cut, piece);
        }
        survives(&text);
    }

    #[test]
    fn a_cut_sample_is_never_accepted(sample in select(&SAMPLES[..]), at in any::<usize>()) {
        let end = sample.trim_end().len() - 1;
        let at = sample.char_indices().map(|(i, _)| i).nth(at % end).unwrap_or(0).min(end);
        survives(&sample[..at]);
        prop_assert!(module::parse("f", &sample[..at], &BTreeMap::new(), None).is_err());
        prop_assert!(cluster::parse("f", &sample[..at]).is_err());
    }

    #[test]
    fn what_is_written_is_what_is_read(rules in vec(written_rule(), 1..40)) {
        let mut text = String::from(
            "<safe><service mode=\"farm\"><farm><lan name=\"l\"/></farm><vip><interface_list><interface>\
             <virtual_interface type=\"vmac_directed\"><virtual_addr addr=\"198.18.0.1\"/><virtual_addr addr=\"198.18.0.2\"/>\
             </virtual_interface></interface></interface_list><loadbalancing_list><group name=\"g\">",
        );
        for rule in &rules {
            text.push_str(&as_xml(rule));
        }
        text.push_str("</group></loadbalancing_list></vip></service></safe>");
        let overlap = rules.iter().enumerate().any(|(i, a)| rules[..i].iter().any(|b| clash(a, b)));
        match module::parse("f", &text, &BTreeMap::new(), None) {
            Ok((config, _)) => {
                prop_assert!(!overlap);
                prop_assert_eq!(&config.vip.unwrap().groups[0].rules, &rules);
            }
            Err(found) => {
                prop_assert!(overlap, "{:?}", found);
                prop_assert!(found.iter().all(|d| d.message.contains("this rule")), "{:?}", found);
            }
        }
    }
}

fn written_rule() -> impl Strategy<Value = PortRule> {
    let vip = select(vec![
        None,
        Some("198.18.0.1".parse().unwrap()),
        Some("198.18.0.2".parse().unwrap()),
    ]);
    let protocol = select(vec![Protocol::Tcp, Protocol::Udp]);
    let ports = prop_oneof![
        8 => (1..=u16::MAX).prop_map(|port| (port, port)),
        3 => (1..=u16::MAX, 0..300_u16).prop_map(|(first, more)| (first, first.saturating_add(more))),
        1 => Just((0, u16::MAX)),
    ];
    let affinity = select(vec![Affinity::ClientIp, Affinity::ClientPort, Affinity::ClientNet]);
    (vip, protocol, ports, affinity).prop_map(|(vip, protocol, (first_port, last_port), affinity)| PortRule {
        vip,
        protocol,
        first_port,
        last_port,
        affinity,
    })
}

fn as_xml(rule: &PortRule) -> String {
    let vip = rule.vip.map_or("*".to_owned(), |vip| vip.to_string());
    let port = match (rule.first_port, rule.last_port) {
        (0, u16::MAX) => "*".to_owned(),
        (first, last) if first == last => first.to_string(),
        (first, last) => format!("{first}-{last}"),
    };
    let proto = if rule.protocol == Protocol::Tcp { "tcp" } else { "udp" };
    let filter = match rule.affinity {
        Affinity::ClientIp => "on_addr",
        Affinity::ClientPort => "on_port",
        Affinity::ClientNet => "on_net",
        Affinity::IpId => "on_ipid",
    };
    format!("<rule virtual_addr=\"{vip}\" port=\"{port}\" proto=\"{proto}\" filter=\"{filter}\"/>")
}

/// The rule for overlaps, in the plainest words.
fn clash(a: &PortRule, b: &PortRule) -> bool {
    let kind = |rule: &PortRule| match (rule.first_port, rule.last_port) {
        (0, u16::MAX) => 2,
        (first, last) => u8::from(first != last),
    };
    a.vip == b.vip
        && a.protocol == b.protocol
        && kind(a) == kind(b)
        && a.first_port <= b.last_port
        && b.first_port <= a.last_port
}

#[test]
fn the_largest_hostile_texts_take_no_time() {
    let megabyte = |piece: &str| piece.repeat((1 << 20) / piece.len() - 64);
    let inside = |text: String| format!("<safe>{text}</safe>");
    let most = |piece: &str| inside(piece.repeat(9_990));
    for text in [
        megabyte("<"),
        megabyte("<a>"),
        megabyte("<a "),
        megabyte("&"),
        megabyte("\""),
        inside(megabyte("&x;")),
        inside(megabyte("</a>")),
        inside(megabyte("<!---->")),
        inside(megabyte("<?a?>")),
        format!("<safe a=\"{}\"/>", megabyte("%A")),
        format!("<safe a=\"{}\"/>", megabyte("%A%")),
        format!("<safe a=\"{}\"/>", megabyte("&amp;")),
        format!("<safe {}/>", megabyte("a=\"\" ")),
        format!("<safe {}/>", megabyte("a ")),
        most("<servce mod=\"frm\" bot=\"x\"/>"),
        most("<macro name=\"A\" value=\"%A%\"/>"),
        most("<service mode=\"farm\"><x></service>"),
        inside(format!(
            "<service mode=\"farm\"><farm>{}</farm></service>",
            "<lan name=\"a\"/>".repeat(9_900)
        )),
        inside(format!(
            "<service mode=\"farm\"><user>{}</user></service>",
            "<var name=\"a\" value=\"\"/>".repeat(9_900)
        )),
    ] {
        survives(&text);
    }
}
