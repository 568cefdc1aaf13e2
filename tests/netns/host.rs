//! Whatever farmd changes on the host is undone: by a stop, and after a kill by the next start or by `farm cleanup`.

use std::time::Duration;

use farm_core::api::{ModuleState, exit};
use farm_lab::{Lab, LabConfig, MODULE, Mode, ModuleText, Node, VIP, VIP6, Vip, wait_until};

use crate::common::{changed, configured, farm_of, install, mentions, on_all, own_row, shell_ok, start};

/// Everything of the host that a farm may touch, as text, one fact per line. The link's own addresses are waited for: the end of their duplicate address
/// detection changes routes too.
fn host(node: &Node) -> String {
    wait_until(Duration::from_secs(5), "the link's own addresses", || {
        (!shell_ok(node, "ip -6 -o addr show dev eth0").contains("tentative")).then_some(())
    })
    .expect("they settle");
    let look = concat!(
        "ip -d addr; echo '# maddr'; ip maddr; echo '# routes'; ip -4 route show table all; ip rule; ip -6 route show table all | grep -v '^multicast'; ip -6 rule; ",
        "echo '# neighbours'; ip -4 neigh show proxy; ip -6 neigh show proxy; echo '# filters'; nft list ruleset; tc filter show dev eth0; tc filter show dev eth0 ingress; tc qdisc show dev eth0; ",
        "echo '# sysctls'; cd /proc/sys/net/ipv4/conf && grep -H . eth0/* all/* default/* lo/* | sort; ",
        "cd /proc/sys/net/ipv4 && grep -H . ip_forward ip_nonlocal_bind tcp_* 2>/dev/null | sort; ",
        "cd /proc/sys/net/ipv6/conf && grep -H . eth0/disable_ipv6 all/disable_ipv6 default/disable_ipv6 eth0/accept_* 2>/dev/null"
    );
    shell_ok(node, look)
}

/// Fails with the lines that differ.
fn same(before: &str, now: &str, when: &str) {
    let only = |a: &str, b: &str, sign: char| {
        let lines = a.lines().filter(|line| !b.lines().any(|other| other == *line));
        lines.map(|line| format!("{sign} {line}\n")).collect::<String>()
    };
    let differs = only(before, now, '-') + &only(now, before, '+');
    assert!(differs.is_empty() && before == now, "{when}:\n{differs}");
}

/// The first node's host before any farmd, and the farm serving.
fn serving(config: LabConfig) -> (Lab, String) {
    let lab = Lab::new(config).expect("a lab can be built");
    let node = &lab.nodes[0];
    let before = host(node);
    lab.start_daemons().expect("the daemons start");
    for node in &lab.nodes {
        install(&lab, node, &|_, module| module);
    }
    same(
        &before,
        &host(node),
        "a daemon without a started module touches nothing",
    );
    start(&lab, MODULE);
    let during = host(node);
    assert_ne!(before, during);
    mentions(&during, &["farm0"]);
    mentions(&during, &["table netdev farm_eth0"]);
    mentions(&during, &["eth0/arp_announce:2"]);
    (lab, before)
}

fn stop_undoes_all(config: LabConfig) {
    let (lab, before) = serving(LabConfig {
        nodes: 2,
        client_addrs: 20,
        ..config
    });
    let node = &lab.nodes[0];
    node.farm_ok(&["stop", MODULE]).expect("the module stops");
    same(&before, &host(node), "after farm stop");
    node.farm_ok(&["start", MODULE]).expect("it starts again");
    mentions(&host(node), &["table netdev farm_eth0"]);
    // The daemon's own end stops the module first.
    assert_eq!(node.stop_farmd().expect("farmd ends"), Some(0), "{}", node.log_tail(20));
    same(&before, &host(node), "after the daemon's end");
}

#[test]
fn a_stop_and_the_daemons_end_leave_the_host_as_it_was_in_directed_mode() {
    stop_undoes_all(LabConfig::with_mode(Mode::Directed));
}

#[test]
fn a_stop_and_the_daemons_end_leave_the_host_as_it_was_in_invisible_mode() {
    stop_undoes_all(LabConfig::with_mode(Mode::Invisible));
}

#[test]
fn a_stop_and_the_daemons_end_leave_the_host_as_it_was_with_an_ipv6_vip() {
    stop_undoes_all(LabConfig {
        vips: vec![Vip::new(VIP, Mode::Directed), Vip::new(VIP6, Mode::Invisible)],
        plane: "raw",
        ..LabConfig::default()
    });
}

#[test]
fn a_stop_and_the_daemons_end_leave_the_host_as_it_was_with_filters_at_clsact() {
    stop_undoes_all(LabConfig {
        plane: "bpf",
        attach: "clsact",
        ..LabConfig::default()
    });
}

#[test]
fn what_a_killed_daemon_left_is_undone_by_cleanup_and_by_the_next_start() {
    cleaned_up_after_a_kill(farm_of(2), &["table netdev farm_eth0"]);
}

#[test]
fn the_filter_that_a_killed_daemon_left_is_removed_by_cleanup_and_by_the_next_start() {
    let config = LabConfig {
        plane: "bpf",
        attach: "clsact",
        ..farm_of(2)
    };
    cleaned_up_after_a_kill(config, &["table netdev farm_eth0", "farm_ingress", "qdisc clsact"]);
}

/// `left` is what a kill leaves.
fn cleaned_up_after_a_kill(config: LabConfig, left: &[&str]) {
    let (lab, before) = serving(config);
    let is_left = |node: &Node| {
        let host = host(node);
        left.iter().for_each(|word| mentions(&host, &[word]));
    };
    let [first, second] = &lab.nodes[..] else {
        panic!("two nodes")
    };
    let refused = first.farm(&["cleanup"]).expect("farm runs");
    assert_eq!(refused.code, Some(i32::from(exit::REFUSED)), "{refused:?}");
    mentions(&host(first), &["table netdev farm_eth0"]);

    for node in [first, second] {
        node.signal_farmd("KILL").expect("farmd is killed");
        node.wait_farmd_end(Duration::from_secs(5)).expect("farmd is gone");
    }
    for node in [first, second] {
        wait_until(Duration::from_secs(2), "the device to go with the process", || {
            (!host(node).contains("farm0:")).then_some(())
        })
        .expect("the kernel removes it");
    }
    is_left(first);

    let said = first.farm_ok(&["cleanup"]).expect("cleanup works without a daemon");
    mentions(&said, &["farm_eth0"]);
    assert_eq!(
        said.contains("eBPF filter on eth0"),
        left.contains(&"farm_ingress"),
        "{said}"
    );
    same(&before, &host(first), "after farm cleanup");
    first
        .farm_ok(&["cleanup"])
        .expect("a second time there is nothing to do");

    // The other node has its own link: what is compared is that nothing of the farm is left.
    is_left(second);
    second.start_farmd().expect("farmd starts");
    second.wait_farmd(Duration::from_secs(10)).expect("it answers");
    let clean = |when: &str| {
        let now = host(second);
        for word in ["farm0", "farm_", &VIP.to_string(), "arp_announce:2"] {
            assert!(!now.contains(word), "{word} {when}:\n{now}");
        }
    };
    clean("after the next start");
    assert_eq!(second.stop_farmd().expect("farmd ends"), Some(0));
    clean("after the next start and end");

    // And the killed node serves again as if nothing had been.
    first.start_farmd().expect("farmd starts");
    first.wait_farmd(Duration::from_secs(10)).expect("it answers");
    first.farm_ok(&["start", MODULE]).expect("the module starts");
    first.farm_ok(&["stop", MODULE]).expect("the module stops");
    first.stop_farmd().expect("farmd ends");
    same(&before, &host(first), "after a kill, a cleanup, a start and a stop");
}

#[test]
fn settings_of_the_administrator_win_over_what_farmd_would_restore() {
    let lab = configured(farm_of(2), |_, module| module);
    let [first, second] = &lab.nodes[..] else {
        panic!("two nodes")
    };
    let announce = "net.ipv4.conf.eth0.arp_announce";
    let read = |node: &Node| shell_ok(node, "cat /proc/sys/net/ipv4/conf/eth0/arp_announce");
    first.space().sysctl(announce, "2").expect("a sysctl");
    start(&lab, MODULE);
    second.space().sysctl(announce, "1").expect("a sysctl");
    on_all(&lab, &["stop", MODULE]);
    assert_eq!(read(first).trim(), "2", "it was so before");
    assert_eq!(read(second).trim(), "1", "it was changed meanwhile");
}

/// The start of the first node fails with `words`, and its host is as it was.
fn refused(lab: &Lab, words: &[&str]) {
    let node = &lab.nodes[0];
    let before = host(node);
    let failed = node.farm(&["start", MODULE]).expect("farm runs");
    assert_eq!(failed.code, Some(i32::from(exit::FAILED)), "{failed:?}");
    for word in words {
        mentions(&format!("{}{}", failed.stdout, failed.stderr), &[word]);
        mentions(&own_row(node, MODULE).why, &[word]);
    }
    let row = own_row(node, MODULE);
    assert_eq!(row.state, Some(ModuleState::Stop), "{row:?}");
    same(&before, &host(node), "after a start that was refused");
}

#[test]
fn an_ordinary_address_and_a_missing_interface_are_refused_before_anything_is_touched() {
    let lab = configured(farm_of(1), |_, module| module);
    let node = &lab.nodes[0];
    let ordinary = |verb: &str| node.space().ip(&[format!("address {verb} {VIP}/16 dev eth0")]);
    ordinary("add").expect("an address");
    refused(&lab, &["198.18.0.20 is an ordinary address of eth0"]);
    ordinary("del").expect("it was there");

    install(&lab, node, &|_, module| {
        let userconfig = changed(&module.userconfig, "<interface>", "<interface name=\"eth7\">");
        ModuleText { userconfig, ..module }
    });
    refused(&lab, &["there is no interface eth7"]);
}
