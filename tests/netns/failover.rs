//! Nodes go away, by accident and in order, while clients keep asking.

use std::net::SocketAddrV4;
use std::time::{Duration, Instant};

use farm_lab::client::Batch;
use farm_lab::probe::{ProbeConfig, Prober};
use farm_lab::process::run_limited;
use farm_lab::wire::{Evidence, Watcher};
use farm_lab::yardstick::PlainHost;
use farm_lab::{Lab, LabConfig, MODULE, Mode, Node, VIP, VIP2, Vip, wait_until};

use crate::common::{entry_of, farm_of, frames_of, patient_clients, shell_ok};

const WEB: SocketAddrV4 = SocketAddrV4::new(VIP, 80);

/// Power cuts, and how many of them may show a longer silence than [`GAP`]. `scripts/chaos` cuts hundreds.
const CUTS: usize = 8;
const SLOW: usize = 1;
/// The longest silence that counts as short, over what a plain host's clients wait at the same time.
const GAP: Duration = Duration::from_millis(500);

/// A take-over waits for a processor as often: to see the silence, to propose, to promise, to open. A plain host's answer does once.
const TURNS: u32 = 4;

/// Power cuts in turn over the nodes; prints every gap. Clients of both modes are looked at in each cut, because it is the cuts that take time.
#[test]
fn power_cuts_leave_short_gaps_in_both_modes() {
    let modes = [(Mode::Directed, VIP), (Mode::Invisible, VIP2)];
    let lab = Lab::serve(LabConfig {
        vips: modes.map(|(mode, vip)| Vip::new(vip, mode)).into(),
        ..LabConfig::default()
    });
    let lab = lab.expect("the farm comes up");
    let plain = PlainHost::start(&lab).expect("a plain host");
    let mut gaps = [Vec::new(), Vec::new()];
    for round in 0..CUTS {
        let victim = round % lab.nodes.len();
        let name = lab.nodes[victim].name();
        let probing = modes.map(|(_, vip)| {
            let to = SocketAddrV4::new(vip, 80);
            Prober::start(&lab.client, ProbeConfig::new(to)).expect("probing")
        });
        let yardstick = plain.ask(&lab, ProbeConfig::new(WEB)).expect("probing");
        // Another phase of heartbeats and checkers in each round.
        std::thread::sleep(Duration::from_millis(400 + 37 * round as u64));
        lab.nodes[victim].crash().expect("power goes");
        lab.wait_ready(MODULE, &lab.others(victim), Duration::from_secs(10))
            .expect("the others have all");
        std::thread::sleep(GAP);
        let probes = probing.map(|prober| prober.stop().expect("the prober ends"));
        let machine = yardstick.stop().expect("the prober ends");
        for (((mode, _), probe), gaps) in modes.iter().zip(probes).zip(&mut gaps) {
            let gap = probe.longest_gap().expect("something was answered");
            assert!(
                probe.report.per_node().contains_key(name),
                "{mode:?}: no probing client was on {name}"
            );
            assert!(
                gap.after.is_some(),
                "{mode:?}, round {round}, {name}: nobody took over: {gap:?}"
            );
            gaps.push((gap.length().saturating_sub(machine * TURNS), machine));
        }
        lab.rejoin(victim, MODULE).expect("the node comes back");
    }
    for ((mode, _), mut gaps) in modes.into_iter().zip(gaps) {
        gaps.sort_unstable();
        println!(
            "{mode:?}: longest silence of each cut, less {TURNS} times what a plain host's clients waited, and the latter: {gaps:?}"
        );
        assert!(
            gaps.iter().filter(|(gap, _)| *gap > GAP).count() <= SLOW,
            "{mode:?}: {gaps:?}"
        );
    }
}

#[test]
fn a_stop_and_a_start_lose_no_request() {
    for mode in [Mode::Directed, Mode::Invisible] {
        let lab = Lab::serve(LabConfig::with_mode(mode)).expect("the farm comes up");
        let prober = patient_clients(&lab, WEB);
        std::thread::sleep(Duration::from_millis(500));
        let (entry, stopped) = (entry_of(&lab, VIP), Instant::now());
        lab.nodes[1].farm_ok(&["stop", MODULE]).expect("the module stops");
        lab.wait_ready(MODULE, &lab.others(1), Duration::from_secs(10))
            .expect("the others have all");
        std::thread::sleep(Duration::from_millis(500));
        let (then, started) = (entry_of(&lab, VIP), Instant::now());
        lab.nodes[1].farm_ok(&["start", MODULE]).expect("the module starts");
        lab.wait_ready(MODULE, &lab.nodes.iter().collect::<Vec<_>>(), Duration::from_secs(20))
            .expect("all serve");
        std::thread::sleep(Duration::from_millis(500));
        let probe = prober.stop().expect("the prober ends");
        assert_eq!(probe.report.lost(), 0, "{mode:?}: {:?}", probe.report.failures());
        let again = lab.client.requests_sent_again().expect("the kernel counts");
        let slow = probe
            .report
            .records
            .iter()
            .filter(|r| r.latency > Duration::from_millis(900));
        let slow: Vec<_> = slow.map(|r| (r.started - stopped, r)).collect();
        assert_eq!(
            again,
            0,
            "{mode:?}: no SYN had to be sent twice; entry {entry:?}, then {then:?}, started after {:?}: {slow:#?}\n{}",
            started - stopped,
            lab.nodes.iter().map(frames_of).collect::<Vec<_>>().join("\n")
        );
    }
}

#[test]
fn a_killed_daemon_is_taken_over_and_its_next_run_cleans_up_and_rejoins() {
    let lab = Lab::serve(LabConfig::default()).expect("the farm comes up");
    let plain = PlainHost::start(&lab).expect("a plain host");
    let prober = Prober::start(&lab.client, ProbeConfig::new(WEB)).expect("probing");
    let yardstick = plain.ask(&lab, ProbeConfig::new(WEB)).expect("probing");
    std::thread::sleep(Duration::from_millis(500));
    lab.nodes[0].signal_farmd("KILL").expect("a signal");
    lab.nodes[0].wait_farmd_end(Duration::from_secs(5)).expect("farmd ends");
    lab.wait_ready(MODULE, &lab.others(0), Duration::from_secs(10))
        .expect("the others have all");
    std::thread::sleep(Duration::from_millis(500));
    let gap = prober.stop().expect("the prober ends").longest_gap().expect("answers");
    let machine = yardstick.stop().expect("the prober ends");
    assert!(
        gap.after.is_some() && gap.length() <= Duration::from_millis(700) + machine * TURNS,
        "{gap:?}; a plain host's clients waited {machine:?}"
    );
    lab.rejoin(0, MODULE).expect("the node comes back");
}

/// What was on the wire while a farmd was killed: no request was answered by two of the living, and what the killed node had answered too, its heir answered
/// later, because it cannot know of that.
fn one_owner_at_a_time(evidence: &Evidence, killed: &Node) {
    assert_eq!(evidence.missed, 0, "the watcher sees all");
    let mut answers = evidence.syn_acks.values();
    let answered = answers.any(|ports| ports.contains_key(killed.port()));
    assert!(answered, "{} answered nobody before", killed.name());
    for (attempt, ports) in evidence.two_owners() {
        let (own, heirs): (Vec<_>, Vec<_>) = ports.iter().partition(|(port, _)| *port == killed.port());
        let ([(_, before)], [(_, after)]) = (&own[..], &heirs[..]) else {
            panic!("{attempt:?} was answered by {ports:?}")
        };
        assert!(before.iter().max() < after.iter().min(), "{attempt:?}: {ports:?}");
    }
}

/// Asks for both virtual addresses in each way, and fails if anything comes by the killed node's port, or twice.
fn is_silent(lab: &Lab, killed: &Node) {
    let watcher = Watcher::start(lab).expect("the wire can be watched");
    for vip in [VIP, VIP2] {
        for source in &lab.client.addrs()[..6] {
            lab.client.space().ip(&["neighbour flush dev eth0"]).expect("ip runs");
            let mut ping = lab.client.space().command("ping");
            let (source, vip) = (source.to_string(), vip.to_string());
            ping.args(["-c", "1", "-W", "2", "-I", &source, &vip]);
            let pinged = run_limited(ping, Duration::from_secs(10)).expect("ping runs");
            assert!(pinged.ok() && !pinged.stdout.contains("DUP!"), "{}", pinged.stdout);
        }
        let to = SocketAddrV4::new(vip, 80);
        let report = lab.client.batch(Batch::new(to, 120)).expect("a batch");
        assert_eq!(report.lost(), 0, "{vip}: {:?}", report.failures());
        assert_eq!(report.per_node().len(), 2, "{vip}: {:?}", report.per_node());
    }
    let evidence = watcher.stop().expect("the watcher ends");
    assert_eq!((evidence.missed, evidence.double_echoes()), (0, 0));
    assert!(evidence.two_owners().is_empty(), "{:?}", evidence.two_owners());
    let port = killed.port();
    let (connections, echoes) = (&evidence.syn_acks, &evidence.echo_replies);
    assert!(
        connections.len() >= 240 && echoes.len() == 12 && !evidence.arp.is_empty(),
        "{} connections, {} echoes",
        connections.len(),
        echoes.len()
    );
    let spoke = connections.values().any(|ports| ports.contains_key(port))
        || echoes.values().any(|ports| ports.contains_key(port))
        || evidence.arp.values().any(|seen| seen.replies.contains_key(port))
        || evidence.resets.iter().any(|reset| reset.port == *port)
        || evidence.announcements.contains_key(port);
    assert!(!spoke, "{} says something: {evidence:?}", killed.name());
}

/// Its application runs on, and a filter at clsact stays where it is; a tcx link goes with the process.
#[test]
fn nothing_of_a_killed_daemon_answers_beside_those_that_took_over() {
    let lab = Lab::serve(LabConfig {
        plane: "bpf",
        attach: "tcx",
        vips: vec![Vip::new(VIP, Mode::Directed), Vip::new(VIP2, Mode::Invisible)],
        ..farm_of(3)
    });
    let lab = lab.expect("the farm comes up");
    let killed = &lab.nodes[0];
    for attach in ["tcx", "clsact"] {
        if attach == "clsact" {
            killed
                .start_farmd_under(&["env", "FARM_ATTACH=clsact"])
                .expect("farmd starts");
            killed.wait_farmd(Duration::from_secs(10)).expect("it answers");
            killed.farm_ok(&["start", MODULE]).expect("the module starts");
            lab.wait_ready(MODULE, &lab.nodes.iter().collect::<Vec<_>>(), Duration::from_secs(20))
                .expect("all serve");
        }
        let how = killed.farm_ok(&["status", "-v"]).expect("a status");
        assert!(how.contains(&format!("bpf (eBPF at tc ingress, {attach}")), "{how}");
        let watcher = Watcher::start(&lab).expect("the wire can be watched");
        let probers = [VIP, VIP2].map(|vip| {
            let config = ProbeConfig {
                sources: 40,
                limit: Duration::from_secs(5),
                ..ProbeConfig::new((vip, 80))
            };
            Prober::start(&lab.client, config).expect("probing")
        });
        for prober in &probers {
            wait_until(Duration::from_secs(10), "answers by all", || {
                (prober.so_far().per_node().len() == 3).then_some(())
            })
            .expect("all serve");
        }
        killed.signal_farmd("KILL").expect("a signal");
        killed.wait_farmd_end(Duration::from_secs(5)).expect("farmd ends");
        lab.wait_ready(MODULE, &lab.others(0), Duration::from_secs(10))
            .expect("the others have all");
        for prober in probers {
            prober.stop().expect("the prober ends");
        }
        one_owner_at_a_time(&watcher.stop().expect("the watcher ends"), killed);
        let left = shell_ok(killed, "tc filter show dev eth0 ingress");
        assert_eq!(left.contains("farm"), attach == "clsact", "{left}");
        is_silent(&lab, killed);
    }
}

#[test]
fn a_stopped_process_takes_nothing_that_others_took_over() {
    let lab = Lab::serve(LabConfig::with_mode(Mode::Invisible)).expect("the farm comes up");
    let watcher = Watcher::start(&lab).expect("the wire can be watched");
    lab.nodes[2].signal_farmd("STOP").expect("a signal");
    lab.wait_ready(MODULE, &lab.others(2), Duration::from_secs(10))
        .expect("the others have all");
    let prober = Prober::start(&lab.client, ProbeConfig::new(WEB)).expect("probing");
    std::thread::sleep(Duration::from_millis(500));
    lab.nodes[2].signal_farmd("CONT").expect("a signal");
    lab.wait_ready(MODULE, &lab.nodes.iter().collect::<Vec<_>>(), Duration::from_secs(20))
        .expect("all serve");
    let probe = prober.stop().expect("the prober ends");
    assert_eq!(probe.report.lost(), 0, "{:?}", probe.report.failures());
    let evidence = watcher.stop().expect("the watcher ends");
    assert!(evidence.two_owners().is_empty(), "{:?}", evidence.two_owners());
}

#[test]
fn a_one_way_cut_is_seen_by_both_ends_and_heals() {
    let lab = Lab::serve(LabConfig::default()).expect("the farm comes up");
    for outbound in [true, false] {
        lab.nodes[1].cut(outbound).expect("a cut");
        lab.wait_ready(MODULE, &lab.others(1), Duration::from_secs(10))
            .expect("the others have all");
        let shut = wait_until(
            Duration::from_secs(10),
            "the cut node to see that it is alone or out",
            || {
                let cluster = lab.nodes[1].status().ok()?.cluster;
                cluster
                    .nodes
                    .iter()
                    .any(|peer| peer.state != "alive" && peer.state != "this")
                    .then_some(())
            },
        );
        shut.expect("both ends see it");
        lab.nodes[1].heal().expect("healed");
        lab.wait_ready(MODULE, &lab.nodes.iter().collect::<Vec<_>>(), Duration::from_secs(20))
            .expect("all serve");
    }
}

/// A filter that drops heartbeats on their way in, as a careless firewall does: the node cannot hear that it is wrong to serve everybody.
#[test]
fn a_one_way_cut_of_heartbeats_alone_is_told_by_another_way() {
    let lab = Lab::serve(LabConfig::default()).expect("the farm comes up");
    let (deaf, others) = (&lab.nodes[1], lab.others(1));
    lab.switch
        .nft(&format!(
            "table bridge deaf {{ chain c {{ type filter hook postrouting priority -300; oifname \"{}\" ether type ip udp dport 4800 drop; }}; }}\n",
            deaf.port()
        ))
        .expect("its heartbeats do not come in");
    lab.wait_ready(MODULE, &others, Duration::from_secs(10))
        .expect("the others have all");
    let out = || {
        let status = deaf.status().ok()?;
        let shares = status
            .modules
            .iter()
            .flat_map(|m| &m.nodes)
            .filter(|n| n.node == deaf.name());
        let closed = shares.flat_map(|n| &n.shares).all(|share| share.buckets == 0);
        (closed && format!("{status:?}").contains("hears none of them")).then_some(())
    };
    wait_until(Duration::from_secs(5), "the deaf node to step out, and to say why", out).expect("it is told");
    // Longer than one telling lasts: it is told again.
    std::thread::sleep(Duration::from_millis(3500));
    wait_until(Duration::from_secs(1), "the deaf node to be out still", out).expect("it is told again");
    lab.switch
        .nft("delete table bridge deaf\n")
        .expect("they come in again");
    lab.wait_ready(MODULE, &lab.nodes.iter().collect::<Vec<_>>(), Duration::from_secs(20))
        .expect("all serve");
}

#[test]
fn a_node_whose_cable_is_pulled_has_no_share_and_says_why() {
    let lab = Lab::serve(LabConfig::default()).expect("the farm comes up");
    lab.nodes[1].set_link(false).expect("the cable is pulled");
    lab.wait_ready(MODULE, &lab.others(1), Duration::from_secs(10))
        .expect("the others have all");
    let said = wait_until(
        Duration::from_secs(5),
        "the node to say that its interface is down",
        || {
            let status = lab.nodes[1].status().ok()?;
            let module = status.modules.iter().find(|m| m.name == MODULE)?;
            let here = module.nodes.iter().find(|n| n.node == lab.nodes[1].name())?;
            let closed = here.shares.iter().all(|share| share.buckets == 0);
            (closed && here.why.contains("is down")).then_some(())
        },
    );
    said.expect("its own status tells");
    lab.nodes[1].set_link(true).expect("the cable is back");
    lab.wait_ready(MODULE, &lab.nodes.iter().collect::<Vec<_>>(), Duration::from_secs(20))
        .expect("all serve");
}
