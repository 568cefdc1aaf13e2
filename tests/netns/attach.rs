//! The program in the kernel is taken off by others, by each way that it is attached: it is put back, or frames are captured until it can be.

use std::net::SocketAddrV4;
use std::time::Duration;

use farm_lab::client::Batch;
use farm_lab::{Lab, LabConfig, Node, VIP, wait_until};

use crate::common::{counter, farm_of, shell, shell_ok};

const WEB: SocketAddrV4 = SocketAddrV4::new(VIP, 80);
/// farmd looks once a second, and whoever was not answered asks again after a second.
const BACK: Duration = Duration::from_secs(5);

/// One node, so that no other answers in its place.
fn farm(attach: &'static str) -> Lab {
    let config = LabConfig {
        plane: "bpf",
        attach,
        ..farm_of(1)
    };
    let lab = Lab::serve(config).expect("the farm comes up");
    answers(&lab);
    judged(&lab.nodes[0], &format!("bpf (eBPF at tc ingress, {attach}"));
    lab
}

fn answers(lab: &Lab) {
    let report = lab.client.batch(Batch::new(WEB, 20)).expect("a batch");
    assert_eq!(
        report.lost(),
        0,
        "{:?}\n{}",
        report.failures(),
        lab.nodes[0].log_tail(20)
    );
}

/// Waits until the node says that its frames are judged so.
fn judged(node: &Node, how: &str) {
    let told = || node.farm_ok(&["status", "-v"]).expect("a status");
    wait_until(BACK, how, || told().contains(how).then_some(())).unwrap_or_else(|e| panic!("{e}: {}", told()));
}

/// Waits for a line of farmd's own log, which is written after what it tells.
fn logged(node: &Node, line: &str) {
    wait_until(BACK, line, || node.log_text().contains(line).then_some(()))
        .unwrap_or_else(|e| panic!("{e}:\n{}", node.log_tail(20)));
}

/// Numbers of the links that farmd has at tc ingress.
fn links(node: &Node) -> Vec<String> {
    let pid = node.farmd_pid().expect("farmd runs");
    let entries = std::fs::read_dir(format!("/proc/{pid}/fdinfo")).expect("its descriptors");
    let infos = entries.filter_map(|entry| std::fs::read_to_string(entry.ok()?.path()).ok());
    let tcx = infos.filter(|info| {
        info.lines()
            .any(|line| line.starts_with("link_type:") && line.ends_with("tcx"))
    });
    let number = |info: String| {
        Some(
            info.lines()
                .find_map(|line| line.strip_prefix("link_id:"))?
                .trim()
                .to_owned(),
        )
    };
    tcx.filter_map(number).collect()
}

/// Does `take_off`, and waits until that was noticed and mended.
fn is_put_back(lab: &Lab, take_off: impl FnOnce(&Node)) {
    let node = &lab.nodes[0];
    let before = counter(node, "dataplane_program_lost");
    take_off(node);
    wait_until(BACK, "the loss to be noticed", || {
        (counter(node, "dataplane_program_lost") > before).then_some(())
    })
    .expect("it looks once a second");
    answers(lab);
    logged(node, "has taken the eBPF program off the interface; it was put back");
}

#[test]
fn a_tcx_link_that_somebody_detaches_is_made_again() {
    let lab = farm("tcx");
    is_put_back(&lab, |node| {
        let links = links(node);
        assert_eq!(links.len(), 1, "one service interface: {links:?}");
        shell_ok(node, &format!("bpftool link detach id {}", links[0]));
    });
    assert_eq!(links(&lab.nodes[0]).len(), 1);
}

#[test]
fn a_filter_or_a_clsact_that_somebody_deletes_is_made_again_and_frames_are_captured_until_it_can_be() {
    let lab = farm("clsact");
    let node = &lab.nodes[0];
    is_put_back(&lab, |node| drop(shell_ok(node, "tc filter del dev eth0 ingress")));
    is_put_back(&lab, |node| drop(shell_ok(node, "tc qdisc del dev eth0 clsact")));

    // The place that it needs is somebody else's.
    let occupy = "tc qdisc del dev eth0 clsact; tc qdisc add dev eth0 clsact && \
                  tc filter add dev eth0 ingress prio 1 protocol ip u32 match ip dst 203.0.113.1/32";
    wait_until(BACK, "another filter to be first", || {
        shell(node, occupy).ok().then_some(())
    })
    .unwrap_or_else(|e| panic!("{e}: {:?}", shell(node, occupy)));
    judged(node, "raw (the program cannot be attached to eth0 (clsact)");
    answers(&lab);
    logged(node, "it cannot be put back: frames are captured");

    shell_ok(node, "tc filter del dev eth0 ingress prio 1");
    judged(node, "bpf (eBPF at tc ingress, clsact");
    answers(&lab);

    // What another one has there by then stays.
    shell_ok(
        node,
        "tc filter add dev eth0 ingress prio 7 protocol ip u32 match ip dst 203.0.113.1/32",
    );
    node.stop_farmd().expect("farmd ends");
    let left = shell_ok(node, "tc filter show dev eth0 ingress; tc qdisc show dev eth0");
    assert!(
        left.contains("u32") && left.contains("clsact") && !left.contains("farm"),
        "{left}"
    );
}

/// As on a kernel without BPF, or where farmd may not load programs.
#[test]
fn a_host_that_takes_no_program_serves_in_user_space_and_says_why() {
    let config = |plane| LabConfig {
        plane,
        attach: "none",
        falls_back: true,
        ..farm_of(1)
    };
    let lab = Lab::serve(config("auto")).expect("the farm comes up");
    answers(&lab);
    judged(&lab.nodes[0], "raw (FARM_ATTACH says that this host takes no program");
    logged(&lab.nodes[0], "FARM_ATTACH says that this host takes no program");
    assert_eq!(links(&lab.nodes[0]), Vec::<String>::new());
    drop(lab);

    // Who insists on the kernel is not served otherwise.
    let Err(error) = Lab::serve(config("bpf")) else {
        panic!("it serves in user space");
    };
    let refusal = "<vip dataplane=\"bpf\"> cannot be had here: FARM_ATTACH says that this host takes no program";
    assert!(format!("{error:#}").contains(refusal), "{error:#}");
}
