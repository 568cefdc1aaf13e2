//! XDP ahead of tc ingress: a farm serves with it as without it, and says what there is on an interface, and why.
//!
//! Interfaces here are veths, on which nothing but `xdp="on"` puts it; what it decides on single frames the battery of the data plane says.

use std::net::{SocketAddr, SocketAddrV4, SocketAddrV6};
use std::time::Duration;

use farm_lab::client::Batch;
use farm_lab::probe::{ProbeConfig, Prober};
use farm_lab::wire::Watcher;
use farm_lab::{Group, Lab, LabConfig, MODULE, Mode, Node, VIP, VIP6, Vip};

use crate::common::{counter, frames_of, mentions, shell_ok};

const WEB: SocketAddr = SocketAddr::V4(SocketAddrV4::new(VIP, 80));
const WEB6: SocketAddr = SocketAddr::V6(SocketAddrV6::new(VIP6, 80, 0, 0));
const MODES: [Mode; 2] = [Mode::Directed, Mode::Invisible];

fn config(mode: Mode, plane: &'static str) -> LabConfig {
    LabConfig {
        client_addrs: 60,
        vips: vec![Vip::new(VIP, mode), Vip::new(VIP6, mode)],
        // So that in directed mode most connections are another's than the entry node's.
        groups: vec![Group::tcp("web", 80, "on_port")],
        plane,
        ..LabConfig::default()
    }
}

/// What `farm status -v` says of the data plane, on one line.
fn plane_of(node: &Node) -> String {
    let shown = node.farm_ok(&["status", "-v"]).expect("a status");
    shown.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// Whether the driver of the node's interface has a program.
fn is_attached(node: &Node) -> bool {
    let link = shell_ok(node, "ip -d link show eth0");
    assert!(!link.contains("xdpgeneric"), "{link}");
    link.contains("prog/xdp")
}

fn serves(mode: Mode) {
    let lab = Lab::serve(config(mode, "xdp")).expect("the farm comes up");
    for node in &lab.nodes {
        assert!(is_attached(node), "{mode:?}, {}", node.name());
        mentions(&plane_of(node), &["XDP on eth0 (veth)"]);
    }
    let watcher = Watcher::start(&lab).expect("the wire can be watched");
    for vip in [WEB, WEB6] {
        let report = lab.client.batch(Batch::new(vip, 600)).expect("a batch");
        assert_eq!(report.lost(), 0, "{mode:?} {vip}: {:?}", report.failures());
        assert_eq!(report.per_node().len(), 3, "{mode:?} {vip}: {:?}", report.per_node());
    }
    let evidence = watcher.stop().expect("the watcher ends");
    evidence.check_single_owner().expect("one owner per connection");
    assert_eq!(evidence.syn_acks.len(), 1200, "every handshake was seen on the wire");
    // In directed mode by the client's entry node alone.
    let foreign: u64 = lab.nodes.iter().map(|node| counter(node, "frames_foreign")).sum();
    assert!(
        foreign > 0,
        "{mode:?}: nothing was another's: {:?}",
        lab.nodes.iter().map(frames_of).collect::<Vec<_>>()
    );
    // A node on which nothing is served any more has its driver back.
    lab.nodes[0].farm_ok(&["stop", MODULE]).expect("the module stops");
    assert!(!is_attached(&lab.nodes[0]), "{mode:?}");
}

#[test]
fn all_nodes_serve_with_xdp_and_one_answers_in_directed_mode() {
    serves(Mode::Directed);
}

#[test]
fn all_nodes_serve_with_xdp_and_one_answers_in_invisible_mode() {
    serves(Mode::Invisible);
}

#[test]
fn a_power_cut_under_xdp_is_taken_over() {
    for mode in MODES {
        let lab = Lab::serve(config(mode, "xdp")).expect("the farm comes up");
        let SocketAddr::V4(web) = WEB else { unreachable!() };
        let prober = Prober::start(&lab.client, ProbeConfig::new(web)).expect("probing");
        std::thread::sleep(Duration::from_millis(500));
        lab.nodes[1].crash().expect("power goes");
        lab.wait_ready(MODULE, &lab.others(1), Duration::from_secs(10))
            .expect("the others have all");
        std::thread::sleep(Duration::from_millis(500));
        let probe = prober.stop().expect("the prober ends");
        let gap = probe.longest_gap().expect("something was answered");
        assert!(gap.after.is_some(), "{mode:?}: nobody took over: {gap:?}");
        println!("{mode:?}: longest silence {:?}", gap.length());
        lab.rejoin(1, MODULE).expect("the node comes back");
        assert!(is_attached(&lab.nodes[1]), "{mode:?}");
    }
}

#[test]
fn without_being_asked_for_a_veth_has_no_xdp_and_its_node_says_why() {
    let lab = Lab::serve(config(Mode::Directed, "bpf")).expect("the farm comes up");
    let node = &lab.nodes[0];
    assert!(!is_attached(node));
    let why = "no XDP on eth0: it is a veth device";
    mentions(&plane_of(node), &[why]);
    mentions(&node.log_text(), &["no XDP: it is a veth device"]);
}
