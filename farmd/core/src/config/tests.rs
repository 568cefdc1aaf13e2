//! What the parsers make of files that are right, and the limits. Files that are wrong are in `tests/config`.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use super::diag::{Diagnostic, Diagnostics};
use super::*;

const THREE: &str = include_str!("../../../../tests/config/cluster.xml");
const IIS: &str = include_str!("../../../../tests/config/valid/module-iis_farm.xml");
const GROUPS: &str = include_str!("../../../../tests/config/valid/module-several-groups.xml");
const MACROS: &str = include_str!("../../../../tests/config/valid/module-macros.xml");

fn three() -> ClusterConfig {
    cluster::parse("cluster.xml", THREE).unwrap().0
}

fn env() -> BTreeMap<String, String> {
    [("FARM_SAMPLE", "a \"<b>\""), ("FARM_BOTH", "no")]
        .map(|(k, v)| (k.into(), v.into()))
        .into()
}

fn read(text: &str) -> ModuleConfig {
    match module::parse("userconfig.xml", text, &env(), Some(&three())) {
        Ok((config, _)) => config,
        Err(found) => panic!("{}", Diagnostics(found).render(text)),
    }
}

fn refused(text: &str) -> Vec<Diagnostic> {
    module::parse("userconfig.xml", text, &env(), Some(&three())).unwrap_err()
}

fn addr(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn service(inner: &str) -> String {
    format!("<safe><service mode=\"farm\"><farm><lan name=\"default\"/></farm>{inner}</service></safe>")
}

#[test]
fn a_module_of_the_model_product_is_read_as_it_means() {
    let config = read(IIS);
    assert_eq!(config.macros["VIRTUAL_IP"], "198.18.0.100");
    assert_eq!(config.lans, ["default"]);
    let expected = ServiceConfig {
        boot: Boot::Off,
        boot_delay: Duration::ZERO,
        maxloop: 3,
        loop_interval: Duration::from_secs(24 * 3600),
    };
    assert_eq!(config.service, expected);
    let vip = config.vip.unwrap();
    assert!(vip.tcp_reset);
    assert_eq!(
        (vip.drain, vip.plane, vip.xdp),
        (Duration::ZERO, PlaneChoice::Auto, XdpChoice::Auto)
    );
    assert_eq!(vip.addrs().collect::<Vec<_>>(), [addr("198.18.0.100")]);
    let interface = &vip.interfaces[0];
    assert_eq!((interface.name.as_deref(), interface.check), (None, true));
    let reroute = interface.arp_reroute.unwrap();
    assert_eq!((reroute.interval.as_secs(), reroute.elapse.as_secs()), (60, 1200));
    assert_eq!(interface.virtual_interfaces[0].mode, L2Mode::Directed);
    let rule = PortRule {
        vip: None,
        protocol: Protocol::Tcp,
        first_port: 80,
        last_port: 80,
        affinity: Affinity::ClientIp,
    };
    let group = GroupConfig {
        name: "IIS".into(),
        weights: BTreeMap::new(),
        rules: vec![rule],
        arp: false,
    };
    assert_eq!(vip.groups, [group]);
    let checker = TcpCheckerConfig {
        ident: "HTTP_IIS".into(),
        action: CheckerAction::Restart,
        addr: addr("198.18.0.100"),
        port: 80,
        interval: Duration::from_secs(10),
        timeout: Duration::from_secs(5),
        rise: 1,
        fall: 2,
    };
    assert_eq!(config.tcp_checkers, [checker]);
    let user = config.user.unwrap();
    assert!(user.logging && user.vars.is_empty());
    assert_eq!((user.nice_stop_timeout.as_secs(), user.log_size_kb), (300, 2048));
}

#[test]
fn interfaces_groups_weights_and_checkers_are_read() {
    let config = read(GROUPS);
    assert_eq!(config.lans, ["default", "backup"]);
    assert_eq!((config.service.boot, config.service.maxloop), (Boot::On, 5));
    assert_eq!(config.service.loop_interval.as_secs(), 2 * 3600);
    let vip = config.vip.unwrap();
    assert!(!vip.tcp_reset);
    assert_eq!(
        (vip.drain, vip.plane, vip.xdp),
        (Duration::from_secs(90), PlaneChoice::Bpf, XdpChoice::Off)
    );
    let [first, second] = &vip.interfaces[..] else { panic!() };
    assert_eq!((first.name.as_deref(), first.check), (Some("eth0"), false));
    let reroute = first.arp_reroute.unwrap();
    assert_eq!((reroute.interval.as_secs(), reroute.elapse.as_secs()), (30, 600));
    assert!(!first.virtual_interfaces[0].addrs[1].check);
    assert_eq!(second.arp_reroute, None);
    let made = L2Mode::Invisible(MacAddr([0x5a, 0xfe, 198, 18, 1, 100]));
    let given = L2Mode::Invisible(MacAddr([0x5a, 0xfe, 1, 2, 3, 4]));
    let modes: Vec<L2Mode> = second.virtual_interfaces.iter().map(|v| v.mode).collect();
    assert_eq!(modes, [made, given]);
    let [web, dns] = &vip.groups[..] else { panic!() };
    assert!(web.arp && !dns.arp);
    let weights = ["s1", "s2", "s3", "s4"].map(|name| web.weight(name));
    assert_eq!((weights, dns.weight("s3")), ([3, 1, 0, 0], 1));
    let ports: Vec<(u16, u16)> = web.rules.iter().map(|r| (r.first_port, r.last_port)).collect();
    assert_eq!(ports, [(80, 80), (443, 443), (8000, 8010)]);
    assert_eq!(web.rules[0].vip, Some(addr("198.18.0.100")));
    assert_eq!(web.rules[2].affinity, Affinity::ClientNet);
    let all = (dns.rules[1].first_port, dns.rules[1].last_port, dns.rules[1].affinity);
    assert_eq!(all, (0, 65535, Affinity::ClientPort));
    assert_eq!(
        (dns.rules[0].protocol, dns.rules[0].affinity),
        (Protocol::Udp, Affinity::IpId)
    );
    let [local, v6] = &config.tcp_checkers[..] else {
        panic!()
    };
    assert_eq!((local.addr, local.rise, local.fall), (addr("127.0.0.1"), 2, 3));
    assert_eq!(
        (local.action, v6.action),
        (CheckerAction::NoAction, CheckerAction::StopStart)
    );
    assert_eq!(v6.addr, addr("::1"));
    assert_eq!(config.user.unwrap().start_timeout.as_secs(), 60);
}

#[test]
fn ipv6_virtual_addresses_are_read_and_make_a_virtual_mac_where_no_ipv4_one_does() {
    let config = read(include_str!("../../../../tests/config/valid/module-ipv6.xml"));
    let vip = config.vip.unwrap();
    let expected = ["198.18.0.100", "2001:db8::100", "2001:db8::101"].map(addr);
    assert_eq!(vip.addrs().collect::<Vec<_>>(), expected);
    let named: Vec<_> = vip.groups[0].rules.iter().map(|rule| rule.vip).collect();
    assert_eq!(named, [None, Some(expected[1]), Some(expected[2]), Some(expected[0])]);
    let invisible = |addrs: &[&str]| {
        let list: String = addrs.iter().map(|a| format!("<virtual_addr addr=\"{a}\"/>")).collect();
        let vip = read(&service(&format!(
            "<vip><interface_list><interface><virtual_interface type=\"vmac_invisible\">{list}</virtual_interface></interface></interface_list>\
             <loadbalancing_list><group name=\"g\"><rule proto=\"tcp\" filter=\"on_addr\"/></group></loadbalancing_list></vip>"
        )));
        vip.vip.unwrap().interfaces[0].virtual_interfaces[0].mode
    };
    let made_of = |bytes: [u8; 4]| {
        let [a, b, c, d] = bytes;
        L2Mode::Invisible(MacAddr([0x5a, 0xfe, a, b, c, d]))
    };
    assert_eq!(invisible(&["2001:db8::a1:1020"]), made_of([0, 0xa1, 0x10, 0x20]));
    assert_eq!(invisible(&["2001:db8::1", "198.18.0.20"]), made_of([198, 18, 0, 20]));
}

#[test]
fn a_checker_of_another_phase_is_left_out() {
    let text = service(
        "<check><tcp ident=\"a\" when=\"pre\"><to port=\"1\"/></tcp><tcp ident=\"b\"><to port=\"2\"/></tcp></check>",
    );
    let config = read(&text);
    assert_eq!(config.tcp_checkers.len(), 1);
    assert_eq!(config.tcp_checkers[0].ident, "b");
}

#[test]
fn without_a_cluster_its_names_are_taken_as_they_are() {
    let text = "<safe><service mode=\"farm\"><farm><lan name=\"elsewhere\"/></farm></service></safe>";
    let (config, warnings) = module::parse("u", text, &env(), None).unwrap();
    assert_eq!(config.lans, ["elsewhere"]);
    assert_eq!(warnings, []);
}

#[test]
fn macros_win_over_the_environment_and_percent_signs_can_be_written() {
    let config = read(MACROS);
    let vars = config.user.unwrap().vars;
    assert_eq!(vars["PLAIN"], "100% of % and %NET% <");
    assert_eq!(vars["FROM_ENV"], "a \"<b>\"");
    assert_eq!(vars["MACRO_WINS"], "macro & co");
    let vip = config.vip.unwrap();
    assert_eq!(vip.addrs().next(), Some(addr("198.18.0.100")));
    assert_eq!(
        (vip.groups[0].rules[0].first_port, vip.groups[0].rules[0].last_port),
        (8000, 8010)
    );
}

#[test]
fn expansion_changes_values_and_nothing_else() {
    let text = "<!-- %A% -->\n<safe>\n  <macro name=\"A\" value=\"1&amp;2\" />\n  <x a = '%A%%A%' b='100%' c=\"%%A%%\"/>%A%\n</safe>\n";
    let expanded = module::expand("u", text, &env()).unwrap();
    let expected = "<!-- %A% -->\n<safe>\n  <macro name=\"A\" value=\"1&amp;2\" />\n  <x a = '1&amp;21&amp;2' b='100%' c=\"%A%\"/>%A%\n</safe>\n";
    assert_eq!(expanded, expected);
    let from_env = module::expand("u", "<safe a=\"%FARM_SAMPLE%\"/>", &env()).unwrap();
    assert_eq!(from_env, "<safe a=\"a &quot;&lt;b&gt;&quot;\"/>");
    let errors = module::expand("u", "<safe a=\"%NOWHERE%\"/>", &env()).unwrap_err();
    assert_eq!(errors.len(), 1);
}

#[test]
fn a_wrong_macro_is_reported_once_however_often_it_is_used() {
    let uses = "<var name=\"V\" value=\"%A%\"/><x y=\"%A%\"/>";
    let text = format!(
        "<safe><macro name=\"A\" value=\"%NO%\"/><service mode=\"%A%\"><farm><lan name=\"%A%\"/></farm>{uses}</service></safe>"
    );
    let messages: Vec<String> = refused(&text).into_iter().map(|d| d.message).collect();
    assert_eq!(messages.iter().filter(|m| m.contains("NO")).count(), 1, "{messages:?}");
    assert!(
        !messages.iter().any(|m| m.contains("is not valid here")),
        "{messages:?}"
    );
}

#[test]
fn macros_that_double_and_double_are_refused_at_once() {
    let mut text = String::from("<safe><macro name=\"M0\" value=\"0123456789abcdef\"/>");
    for i in 1..60 {
        let before = format!("%M{}%", i - 1);
        text.push_str(&format!("<macro name=\"M{i}\" value=\"{before}{before}\"/>"));
    }
    text.push_str("</safe>");
    let start = Instant::now();
    let found = refused(&text);
    assert!(start.elapsed() < Duration::from_secs(2));
    assert!(found.iter().any(|d| d.message.contains("too long")), "{found:?}");
}

#[test]
fn many_long_values_are_refused_before_they_fill_the_memory() {
    let mut text = format!("<safe><macro name=\"M\" value=\"{}\"/>", "x".repeat(16_000));
    text.push_str(&"<m a=\"%M%\"/>".repeat(9_000));
    text.push_str("</safe>");
    let found = refused(&text);
    assert!(found.iter().any(|d| d.message.contains("too long")));
}

#[test]
fn a_document_past_a_limit_is_refused_with_the_limit() {
    let says = |text: &str, word: &str| {
        let found = refused(text);
        assert!(found.iter().any(|d| d.message.contains(word)), "{word}: {found:?}");
    };
    says(&format!("<safe><!--{}--></safe>", "x".repeat(1 << 20)), "bytes");
    says(
        &("<safe>".to_owned() + &"<a>".repeat(32) + &"</a>".repeat(32) + "</safe>"),
        "deep",
    );
    says(&("<safe>".to_owned() + &"<a/>".repeat(10_000) + "</safe>"), "elements");
    let attrs: String = (0..65).map(|i| format!(" a{i}=\"\"")).collect();
    says(&format!("<safe{attrs}/>"), "attributes");
    says(&format!("<safe><{}/></safe>", "n".repeat(65)), "longer than 64");
    says(&format!("<safe {}=\"\"/>", "n".repeat(65)), "longer than 64");
    says("<safe>\u{1}</safe>", "U+0001");
}

#[test]
fn a_document_at_a_limit_is_read() {
    let unlike = |text: &str, word: &str| {
        let found = refused(text);
        assert!(!found.iter().any(|d| d.message.contains(word)), "{word}");
    };
    unlike(
        &("<safe>".to_owned() + &"<a>".repeat(31) + &"</a>".repeat(31) + "</safe>"),
        "deep",
    );
    unlike(
        &("<safe>".to_owned() + &"<a/>".repeat(9_999) + "</safe>"),
        "has more than",
    );
    let attrs: String = (0..64).map(|i| format!(" a{i}=\"\"")).collect();
    unlike(&format!("<safe{attrs}/>"), "has more than");
}

#[test]
fn errors_past_a_number_are_counted() {
    let found = refused(&("<safe>".to_owned() + &"<a/>".repeat(500) + "</safe>"));
    assert_eq!(found.len(), 201);
    // 500 unknown elements and the missing service.
    assert_eq!(found[200].message, "301 more errors of this file are not shown");
}

#[test]
fn the_digest_of_a_module_is_over_what_nodes_must_share() {
    let base = read(IIS).digest;
    let with = |from: &str, to: &str| {
        assert!(IIS.contains(from), "{from}");
        read(&IIS.replace(from, to)).digest
    };
    for (from, to) in [
        ("what a user changes", "another comment"),
        ("<interface check=\"on\"", "<interface name=\"eth7\" check=\"off\""),
        ("maxloop=\"3\"", "maxloop=\"4\""),
        ("interval=\"10s\"", "interval=\"20s\""),
        ("%IIS_PORT%\" proto", "80\" proto"),
        ("nicestoptimeout=\"300\"", "nicestoptimeout=\"10\""),
        ("<vip>", "<vip drain=\"30s\">"),
    ] {
        assert_eq!(with(from, to), base, "{to}");
    }
    for (from, to) in [
        ("198.18.0.100", "198.18.0.101"),
        ("value=\"80\"", "value=\"81\""),
        ("on_addr", "on_port"),
        ("group name=\"IIS\"", "group name=\"WEB\""),
        ("vmac_directed", "vmac_invisible"),
        ("<vip>", "<vip tcpreset=\"off\">"),
        ("name=\"default\"", "name=\"backup\""),
        ("<rule ", "<rule proto=\"arp\" filter=\"on_addr\"/><rule "),
        (
            "<rule ",
            "<cluster><host name=\"s1\" power=\"2\"/><host name=\"s2\" power=\"1\"/></cluster><rule ",
        ),
    ] {
        assert_ne!(with(from, to), base, "{to}");
    }
}

#[test]
fn a_cluster_has_defaults_and_puts_the_lan_of_the_commands_first() {
    let config = three();
    assert_eq!((config.port, config.detect_multiplier), (4800, 5));
    assert_eq!(config.detection_time(), Duration::from_millis(250));
    assert_eq!(config.nodes, ["s1", "s2", "s3"]);
    assert_eq!(config.lans[0].name, "default");
    let text = include_str!("../../../../tests/config/valid/cluster-two-lans.xml");
    let (config, warnings) = cluster::parse("c", text).unwrap();
    let said: Vec<&str> = warnings.iter().map(|d| d.message.as_str()).collect();
    assert_eq!(said, ["`command` has no effect"]);
    assert_eq!(
        (
            config.port,
            config.heartbeat_interval.as_millis(),
            config.detect_multiplier
        ),
        (4900, 20, 7)
    );
    let lans: Vec<&str> = config.lans.iter().map(|lan| lan.name.as_str()).collect();
    assert_eq!(lans, ["control", "default"]);
    // Numbers follow the first appearance in the file, whatever the order of the lans.
    let s2 = config.node_by_addr(&[addr("198.18.1.12")]).unwrap();
    assert_eq!((s2.index(), config.name(s2)), (1, "s2"));
}

#[test]
fn a_profile_is_a_pulse_and_missed_heartbeats_and_what_is_written_beside_it_counts_more() {
    for (written, pulse_ms, lost) in [
        ("profile=\"default\"", 50, 5),
        ("profile=\"fast\"", 20, 5),
        ("profile=\"fast\" pulse=\"30ms\"", 30, 5),
        ("slost_count=\"9\" profile=\"fast\"", 20, 9),
        ("profile=\"default\" pulse=\"30ms\" slost_count=\"9\"", 30, 9),
        ("pulse=\"5ms\" slost_count=\"4\"", 5, 4),
        ("pulse=\"5s\" slost_count=\"100\"", 5000, 100),
    ] {
        let text = THREE.replace("<lans>", &format!("<lans {written}>"));
        let (config, warnings) = cluster::parse("c", &text).unwrap();
        let pulse = Duration::from_millis(pulse_ms);
        assert_eq!(
            (config.heartbeat_interval, config.detect_multiplier),
            (pulse, lost),
            "{written}"
        );
        assert_eq!(config.detection_time(), pulse * lost, "{written}");
        assert!(warnings.is_empty(), "{written}: {warnings:?}");
    }
}

#[test]
fn the_digest_of_a_cluster_is_over_its_meaning() {
    let of = |text: &str| cluster::parse("c", text).unwrap().0.digest;
    let base = of(THREE);
    assert_eq!(
        of(&THREE.replace("<lans>", "<!-- x --><lans port=\"4800\" pulse=\"50ms\">")),
        base
    );
    assert_eq!(of(&THREE.replace("<lans>", "<lans profile=\"default\">")), base);
    assert_ne!(of(&THREE.replace("<lans>", "<lans profile=\"fast\">")), base);
    assert_ne!(of(&THREE.replace("<lans>", "<lans port=\"4801\">")), base);
    assert_ne!(of(&THREE.replace("198.18.1.13", "198.18.1.14")), base);
    assert_ne!(of(&THREE.replace("\"s3\"", "\"s4\"")), base);
    assert_ne!(of(&THREE.replace("\"backup\"", "\"spare\"")), base);
}

#[test]
fn sixty_four_nodes_fit() {
    let nodes: String = (1..=64)
        .map(|i| format!("<node name=\"s{i}\" addr=\"198.18.0.{i}\"/>"))
        .collect();
    let text = format!("<cluster><lans><lan name=\"default\">{nodes}</lan></lans></cluster>");
    assert_eq!(cluster::parse("c", &text).unwrap().0.nodes.len(), 64);
}

#[test]
fn places_are_of_characters_and_after_a_byte_order_mark() {
    let text = "\u{feff}<safe é=\"ü\"/>";
    let found = refused(text);
    assert_eq!((found[0].line, found[0].col), (1, 1));
    assert_eq!((found[1].line, found[1].col), (1, 7));
    assert!(
        found[1].render(text).contains("| <safe é=\"ü\"/>\n   |       ^\n"),
        "{}",
        found[1].render(text)
    );
    let found = refused("<safe>\r\n\t<ß ä=\"\" service=\"\"/>\r\n</safe>");
    let places: Vec<(u32, u32)> = found.iter().map(|d| (d.line, d.col)).collect();
    assert_eq!(places, [(1, 1), (2, 2)]);
}
