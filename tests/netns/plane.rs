//! Where a node does not have in the kernel what it is asked for: `dataplane="bpf"` is no wish, and XDP has to prove itself on a card. What it has stays over a reload.

use std::fs;
use std::net::SocketAddrV4;
use std::process::Stdio;
use std::time::Duration;

use farm_core::api::ModuleState;
use farm_lab::client::Batch;
use farm_lab::process::spawn_kept;
use farm_lab::{Lab, LabConfig, MODULE, Mode, Node, VIP, wait_until};

use crate::common::{
    configured, farm_of, log_of, mentions, own_row, patient_clients, shell, shell_ok, start, wait_state,
};

const WEB: SocketAddrV4 = SocketAddrV4::new(VIP, 80);
/// farmd looks at its programs once a second.
const SOON: Duration = Duration::from_secs(5);
const LONG: Duration = Duration::from_secs(20);
/// Why a node does not serve on which [`occupy`] has been.
const REFUSAL: &str = "<vip dataplane=\"bpf\"> cannot be had here: the program cannot be attached to eth0 (clsact)";
const PROBATION: &str = ", on probation";
const PROVED: &str = "XDP has proved itself";
const FAILED: &str = "XDP has not proved itself: nothing came in any more in 3 s";

/// Gives the place that the program needs to somebody else's filter.
fn occupy(node: &Node) {
    let line = "tc qdisc del dev eth0 clsact 2>/dev/null; tc qdisc add dev eth0 clsact && \
                tc filter add dev eth0 ingress prio 1 protocol ip u32 match ip dst 203.0.113.1/32";
    // farmd may put its own back between two of these.
    wait_until(SOON, "another filter to be first", || {
        shell(node, line).ok().then_some(())
    })
    .unwrap_or_else(|e| panic!("{e}: {:?}", shell(node, line)));
}

/// What `farm status -v` says, on one line; a module that is stopped is no success there.
fn told(node: &Node) -> String {
    let shown = node.farm(&["status", "-v"]).expect("farm runs").stdout;
    shown.split_whitespace().collect::<Vec<_>>().join(" ")
}

fn wait_told(node: &Node, what: &str) {
    wait_until(SOON, what, || told(node).contains(what).then_some(()))
        .unwrap_or_else(|e| panic!("{e}: {}", told(node)));
}

/// How often a line with `what` is in farmd's own log.
fn logged(node: &Node, what: &str) -> usize {
    node.log_text().matches(what).count()
}

fn answers(lab: &Lab) {
    let report = lab.client.batch(Batch::new(WEB, 40)).expect("a batch");
    assert_eq!(report.lost(), 0, "{:?}", report.failures());
}

/// Waits until the second node is out for the reason that the kernel does not take its program, and the first one has all.
fn second_is_refused(lab: &Lab) {
    let [good, bad] = [&lab.nodes[0], &lab.nodes[1]];
    wait_until(LONG, "the refusal", || {
        own_row(bad, MODULE).why.contains(REFUSAL).then_some(())
    })
    .unwrap_or_else(|e| panic!("{e}: {:?}\n{}", own_row(bad, MODULE), log_of(bad, MODULE)));
    wait_state(bad, MODULE, ModuleState::Stop, LONG);
    wait_told(bad, REFUSAL);
    mentions(&log_of(bad, MODULE), &[REFUSAL]);
    // Nothing of the virtual address is left, so nothing is served in user space either.
    assert!(!shell(bad, "ip link show farm0").ok());
    lab.wait_ready(MODULE, &[good], LONG)
        .expect("the other node has its share");
    answers(lab);
}

#[test]
fn a_module_that_wants_the_kernel_is_not_served_in_user_space_where_the_program_cannot_be_attached() {
    let config = LabConfig {
        plane: "bpf",
        attach: "clsact",
        ..farm_of(2)
    };
    let lab = configured(config, |_, module| module);
    let [good, bad] = [&lab.nodes[0], &lab.nodes[1]];
    occupy(bad);
    good.farm_ok(&["start", MODULE]).expect("the first node starts");
    let refused = bad.farm(&["start", MODULE]).expect("farm runs");
    assert!(!refused.ok() && !refused.timed_out, "{refused:?}");
    mentions(&format!("{}{}", refused.stdout, refused.stderr), &["dataplane=\"bpf\""]);
    second_is_refused(&lab);

    shell_ok(bad, "tc filter del dev eth0 ingress prio 1");
    bad.farm_ok(&["start", MODULE]).expect("it starts");
    lab.wait_ready(MODULE, &[good, bad], LONG).expect("both serve");
    wait_told(bad, "bpf (eBPF at tc ingress, clsact");

    // A module that serves goes on, and its interface made another one is attached to anew.
    occupy(bad);
    wait_told(bad, "raw (the program cannot be attached to eth0 (clsact)");
    answers(&lab);
    // The neighbours hear of the new address at once.
    shell_ok(
        bad,
        "echo 1 > /proc/sys/net/ipv4/conf/eth0/arp_notify && ip link set dev eth0 address 02:00:c6:12:00:99",
    );
    second_is_refused(&lab);
}

#[test]
fn a_module_that_leaves_the_choice_to_farmd_is_served_in_user_space_where_the_program_cannot_be_attached() {
    let config = LabConfig {
        plane: "auto",
        falls_back: true,
        attach: "clsact",
        ..farm_of(1)
    };
    let lab = configured(config, |_, module| module);
    occupy(&lab.nodes[0]);
    start(&lab, MODULE);
    wait_told(&lab.nodes[0], "raw (the program cannot be attached to eth0 (clsact)");
    answers(&lab);
}

#[test]
fn a_module_is_served_in_user_space_where_the_programs_clock_is_not_farmds() {
    let config = LabConfig {
        plane: "auto",
        falls_back: true,
        ..farm_of(2)
    };
    let lab = configured(config, |_, module| module);
    let [elsewhere, usual] = &lab.nodes[..] else {
        panic!("two nodes")
    };
    assert_eq!(elsewhere.stop_farmd().expect("farmd ends"), Some(0));
    let ahead = ["unshare", "--time", "--boottime", "100000"];
    elsewhere.start_farmd_under(&ahead).expect("farmd starts");
    elsewhere.wait_farmd(LONG).expect("farmd answers");
    start(&lab, MODULE);
    wait_told(
        elsewhere,
        "raw (farmd runs in a time namespace whose clock is 100000 s off the kernel's",
    );
    wait_told(usual, "bpf (eBPF at tc ingress");
    answers(&lab);
}

/// Packets of requests for the VIP that the stack has got: where they came in, through the TAP, and with a mark that is left.
fn came_up(node: &Node) -> [u64; 3] {
    let shown = shell_ok(node, "nft list table inet watch");
    let counts = shown.split("packets ").skip(1).map(|rest| {
        let word = rest.split_whitespace().next().expect("a number");
        word.parse().expect("a number")
    });
    counts.collect::<Vec<u64>>().try_into().expect("three counters")
}

#[test]
fn what_is_accepted_goes_up_where_it_came_in_unless_reverse_path_filtering_is_strict() {
    for (attach, mode) in [("tcx", Mode::Directed), ("clsact", Mode::Invisible)] {
        let lab = Lab::serve(LabConfig {
            plane: "bpf",
            attach,
            vips: LabConfig::with_mode(mode).vips,
            ..farm_of(1)
        });
        let lab = lab.expect("the farm comes up");
        let node = &lab.nodes[0];
        let rules = format!(
            "table inet watch {{ chain c {{ type filter hook input priority 0;
                ip daddr {VIP} iifname eth0 counter
                ip daddr {VIP} iifname farm0 counter
                ip daddr {VIP} meta mark != 0 counter
            }}; }}"
        );
        shell_ok(node, &format!("nft '{rules}'"));
        for (rp_filter, through_tap) in [("0", false), ("1", true), ("2", false)] {
            shell_ok(
                node,
                &format!("echo {rp_filter} > /proc/sys/net/ipv4/conf/eth0/rp_filter"),
            );
            // farmd looks once a second, and new connections in buckets that have just opened are its own to judge.
            wait_until(LONG, "all to go one way", || {
                let before = came_up(node);
                answers(&lab);
                let after = came_up(node);
                let [where_in, tap, marked] = [0, 1, 2].map(|i| after[i] - before[i]);
                assert_eq!(marked, 0, "{attach}");
                assert!(where_in + tap >= 40, "{attach}: {where_in} and {tap}");
                (if through_tap { where_in } else { tap } == 0).then_some(())
            })
            .unwrap_or_else(|e| panic!("{attach}, rp_filter {rp_filter}: {e}: {:?}", came_up(node)));
        }
    }
}

/// Whether the driver of the node's interface has a program.
fn is_in_driver(node: &Node) -> bool {
    shell_ok(node, "ip -d link show eth0").contains("prog/xdp")
}

/// Number of the link that farmd has in the driver, and of the program that it is of.
fn link_and_program(node: &Node) -> (String, String) {
    let word = |info: &str, name: &str| Some(info.lines().find_map(|line| line.strip_prefix(name))?.trim().to_owned());
    let pid = node.farmd_pid().expect("farmd runs");
    let entries = fs::read_dir(format!("/proc/{pid}/fdinfo")).expect("its descriptors");
    let infos = entries.filter_map(|entry| fs::read_to_string(entry.ok()?.path()).ok());
    let mut links = infos.filter_map(|info| {
        let is_xdp = word(&info, "link_type:")? == "xdp";
        is_xdp.then_some((word(&info, "link_id:")?, word(&info, "prog_id:")?))
    });
    let link = links.next().expect("a link in the driver");
    assert_eq!(links.next(), None, "one service interface");
    link
}

/// A driver that loses its program and gets another may set up its queues anew, and lose the carrier meanwhile.
#[test]
fn a_reload_leaves_the_link_in_the_driver_and_puts_the_next_program_into_it() {
    for attach in ["tcx", "clsact"] {
        let lab = Lab::serve(LabConfig {
            plane: "xdp",
            attach,
            ..farm_of(2)
        });
        let lab = lab.expect("the farm comes up");
        let node = &lab.nodes[1];
        let prober = patient_clients(&lab, WEB);
        for reloads in 1..=3 {
            let before = link_and_program(node);
            let reloaded = node.farm(&["reload"]).expect("farm runs");
            assert!(reloaded.ok(), "{reloaded:?}");
            lab.wait_ready(MODULE, &lab.nodes.iter().collect::<Vec<_>>(), LONG)
                .expect("all serve");
            wait_until(SOON, "the program of before to be off", || {
                (logged(node, "that of the one before is off") == reloads).then_some(())
            })
            .unwrap_or_else(|e| panic!("{e}\n{}", node.log_tail(40)));
            let after = link_and_program(node);
            assert_eq!(after.0, before.0, "{attach}: the link\n{}", node.log_tail(40));
            assert_ne!(after.1, before.1, "{attach}: the program");
            assert!(is_in_driver(node), "{attach}");
            wait_told(node, "XDP on eth0 (veth)");
        }
        let probe = prober.stop().expect("the prober ends");
        assert_eq!(probe.report.lost(), 0, "{attach}: {:?}", probe.report.failures());
        node.farm_ok(&["stop", MODULE]).expect("the module stops");
        assert!(!is_in_driver(node), "{attach}");
    }
}

/// A farm whose nodes take their veths for network cards, on which XDP is tried unasked.
fn on_cards(nodes: usize) -> LabConfig {
    LabConfig {
        plane: "bpf",
        attach: "card",
        ..farm_of(nodes)
    }
}

#[test]
fn xdp_on_a_card_on_which_frames_go_on_coming_in_has_proved_itself() {
    let lab = Lab::serve(on_cards(2)).expect("the farm comes up");
    for node in &lab.nodes {
        wait_until(SOON, PROVED, || (logged(node, PROVED) > 0).then_some(()))
            .unwrap_or_else(|e| panic!("{e}: {}\n{}", told(node), node.log_tail(20)));
        assert!(logged(node, PROBATION) > 0, "{}", node.log_tail(20));
        let shown = told(node);
        assert!(
            shown.contains("XDP on eth0 (veth)") && !shown.contains(PROBATION),
            "{shown}"
        );
        assert!(is_in_driver(node));
    }
    answers(&lab);
}

/// Starts the module, and has nothing come in as soon as XDP is on probation. True if that was before it had proved itself.
fn fails_on_probation(node: &Node) -> bool {
    let (tried, proved) = (logged(node, PROBATION), logged(node, PROVED));
    node.farm_ok(&["start", MODULE, "--no-wait"]).expect("it starts");
    wait_until(LONG, "XDP on probation", || {
        (logged(node, PROBATION) > tried).then_some(())
    })
    .unwrap_or_else(|e| panic!("{e}: {}\n{}", told(node), node.log_tail(20)));
    node.cut(false).expect("nothing comes in");
    let failed = wait_until(LONG, "a verdict", || {
        let failed = logged(node, FAILED) > 0;
        (failed || logged(node, PROVED) > proved).then_some(failed)
    });
    node.heal().expect("the cut ends");
    failed.unwrap_or_else(|e| panic!("{e}: {}\n{}", told(node), node.log_tail(20)))
}

#[test]
fn xdp_on_a_card_on_which_nothing_comes_in_any_more_is_taken_off_again() {
    let lab = configured(on_cards(1), |_, module| module);
    let node = &lab.nodes[0];
    // So that frames come in before; it ends by itself too.
    let mut ping = lab.client.space().command("ping");
    ping.args(["-q", "-i", "0.02", "-w", "120", &node.addr().to_string()])
        .stdout(Stdio::null());
    let mut ping = spawn_kept(ping).expect("ping runs");
    // The cut has half a second; on a busy machine it may come too late.
    let failed = (0..5).any(|_| {
        let failed = fails_on_probation(node);
        if !failed {
            node.farm_ok(&["stop", MODULE]).expect("the module stops");
        }
        failed
    });
    let _ = ping.kill();
    let _ = ping.wait();
    assert!(failed, "each cut came too late\n{}", node.log_tail(40));
    lab.wait_ready(MODULE, &[node], LONG).expect("it serves");
    wait_told(node, "no XDP on eth0: nothing came in any more in 3 s");
    assert!(!is_in_driver(node));
    answers(&lab);
}
