//! The lab's own instruments, checked against a network without a farm: what they report must be what was done.

use std::net::SocketAddrV4;
use std::path::Path;
use std::time::Duration;

use farm_lab::client::Batch;
use farm_lab::hold::{HoldConfig, Holder};
use farm_lab::http::Failure;
use farm_lab::module::{nginx_conf, write_file};
use farm_lab::probe::{ProbeConfig, Prober};
use farm_lab::process::run_limited;
use farm_lab::wire::Watcher;
use farm_lab::{Lab, LabConfig, Node, VIP};

const WEB: SocketAddrV4 = SocketAddrV4::new(VIP, 80);

/// Gives `node` the VIP by hand and starts its nginx.
fn serve_alone(node: &Node) {
    node.space()
        .ip(&[format!("address add {VIP}/32 dev eth0")])
        .expect("the VIP can be set");
    let dir = node.nginx_dir();
    write_file(
        &dir.join("nginx.conf"),
        &nginx_conf(&dir, node.name(), &["80".into()]),
        0o644,
    )
    .expect("a file");
    let mut nginx = node.command(Path::new("nginx")).expect("the node has power");
    nginx
        .arg("-p")
        .arg(&dir)
        .arg("-c")
        .arg(dir.join("nginx.conf"))
        .arg("-e")
        .arg(dir.join("error.log"));
    let started = run_limited(nginx, Duration::from_secs(10)).expect("nginx can be started");
    assert!(started.ok(), "{started:?}");
}

#[test]
fn a_lab_of_plain_hosts_measures_what_was_done_to_it() {
    let lab = Lab::bare(LabConfig {
        nodes: 2,
        routed: true,
        ..LabConfig::default()
    })
    .expect("a lab can be built");
    serve_alone(&lab.nodes[0]);

    let watcher = Watcher::start(&lab).expect("the wire can be watched");
    let report = lab.client.batch(Batch::new(WEB, 400)).expect("a batch");
    assert_eq!(report.lost(), 0, "{:?}", report.failures());
    assert_eq!(report.per_node().get("node1"), Some(&400));
    assert_eq!(report.nodes_by_source().len(), lab.client.addrs().len());
    let far = lab
        .far
        .as_ref()
        .expect("the lab is routed")
        .batch(Batch::new(WEB, 50))
        .expect("a batch");
    assert_eq!((far.lost(), far.answered()), (0, 50), "{:?}", far.failures());

    let mut ping = lab.client.space().command("ping");
    ping.args(["-c", "3", "-i", "0.05", "-W", "2", &VIP.to_string()]);
    assert!(run_limited(ping, Duration::from_secs(10)).expect("ping runs").ok());

    let holder = Holder::start(
        &lab.client,
        HoldConfig {
            limit: Duration::from_secs(1),
            ..HoldConfig::new(WEB, 20)
        },
    );
    let holder = holder.expect("connections can be held");
    holder.wait_rounds(3, Duration::from_secs(5)).expect("they go on");

    let evidence = watcher.stop().expect("the watcher ends");
    evidence.check_single_owner().expect("one plain host owns everything");
    assert_eq!(evidence.syn_acks.len(), 400 + 50 + 20, "every handshake was seen");
    assert_eq!(evidence.echo_replies.len(), 3);
    let asked = evidence
        .arp
        .iter()
        .filter(|((requester, vip), _)| lab.client.sources(WEB.into()).contains(requester) && *vip == VIP);
    assert!(asked.clone().count() > 0 && asked.clone().all(|(_, seen)| seen.replies.len() <= 1));

    // A power cut: the prober's silence never ends, the held connections break, nothing says a word on the wire.
    let prober = Prober::start(
        &lab.client,
        ProbeConfig {
            sources: 4,
            rate: 100,
            ..ProbeConfig::new(WEB)
        },
    )
    .expect("probing");
    std::thread::sleep(Duration::from_millis(500));
    let watcher = Watcher::start(&lab).expect("the wire can be watched");
    lab.nodes[0].power_off().expect("power goes");
    std::thread::sleep(Duration::from_millis(1200));
    let held = holder.stop().expect("the holder ends");
    assert_eq!(
        held.broken_per_node().get("node1"),
        Some(&20),
        "{:?}",
        held.broken_per_node()
    );
    let probe = prober.stop().expect("the prober ends");
    let gap = probe.longest_gap().expect("something was answered before");
    assert!(gap.after.is_none() && gap.length() >= Duration::from_secs(1), "{gap:?}");
    assert!(watcher.stop().expect("the watcher ends").resets.is_empty());

    // Power without nginx: refusals are seen by the client and as resets on the wire.
    let watcher = Watcher::start(&lab).expect("the wire can be watched");
    lab.nodes[0].power_on().expect("power comes");
    let report = lab.client.batch(Batch::new(WEB, 10)).expect("a batch");
    assert_eq!(
        report.failures().get(&Failure::Refused),
        Some(&10),
        "{:?}",
        report.failures()
    );
    let evidence = watcher.stop().expect("the watcher ends");
    assert!(evidence.resets.len() >= 10 && evidence.check_single_owner().is_err());

    // Cuts are one-way and end.
    serve_alone_again(&lab.nodes[0]);
    for outbound in [true, false] {
        lab.nodes[0].cut(outbound).expect("a cut");
        let one = Batch {
            limit: Duration::from_millis(300),
            ..Batch::new(WEB, 2)
        };
        assert_eq!(
            lab.client.batch(one.clone()).expect("a batch").answered(),
            0,
            "cut outbound: {outbound}"
        );
        lab.nodes[0].heal().expect("healed");
        assert_eq!(
            lab.client
                .batch(Batch {
                    limit: Duration::from_secs(4),
                    ..one
                })
                .expect("a batch")
                .answered(),
            2
        );
    }
}

/// nginx after a power cut: the VIP is still set, since the network namespace stays.
fn serve_alone_again(node: &Node) {
    node.space()
        .ip(&[format!("address del {VIP}/32 dev eth0")])
        .expect("the VIP was set");
    serve_alone(node);
}
