//! IPv6 virtual addresses: served, found, taken over and drained as IPv4 ones are.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV6};
use std::time::Duration;

use farm_core::api::why::Why;
use farm_lab::client::Batch;
use farm_lab::hold::{HoldConfig, Holder};
use farm_lab::process::run_limited;
use farm_lab::wire::Watcher;
use farm_lab::{Group, Lab, LabConfig, MODULE, Mode, VIP6, Vip, add_host, wait_until};

use crate::bulk::{Service, Step, bulk, spread, transfers};
use crate::common::{changed, configured, counter, entry_of, start};

const WEB: SocketAddr = SocketAddr::V6(SocketAddrV6::new(VIP6, 80, 0, 0));
const BULK: SocketAddr = SocketAddr::V6(SocketAddrV6::new(VIP6, 8080, 0, 0));
const MIB: usize = 1024 * 1024;
const MODES: [Mode; 2] = [Mode::Directed, Mode::Invisible];
/// Where frames are judged: always in user space, or where the machine lets farmd.
const PLANES: [&str; 2] = ["raw", "auto"];

fn config(mode: Mode, plane: &'static str) -> LabConfig {
    let web = Group {
        rules: vec![
            ("tcp", "80".to_owned(), "on_addr"),
            ("tcp", "8080".to_owned(), "on_addr"),
        ],
        ..Group::tcp("web", 0, "on_addr")
    };
    LabConfig {
        client_addrs: 60,
        vips: vec![Vip::new(VIP6, mode)],
        groups: vec![web],
        plane,
        ..LabConfig::default()
    }
}

fn farm(mode: Mode, plane: &'static str) -> Lab {
    Lab::serve(config(mode, plane)).expect("the farm comes up")
}

fn both_modes() -> impl Iterator<Item = (Mode, &'static str)> {
    MODES.into_iter().flat_map(|mode| PLANES.map(|plane| (mode, plane)))
}

/// Each connection and each echo once, by all nodes, and nothing with the virtual MAC as source.
fn serves(config: LabConfig) {
    let mode = config.vips[0].mode;
    let lab = Lab::serve(config).expect("the farm comes up");
    let watcher = Watcher::start(&lab).expect("the wire can be watched");
    let report = lab.client.batch(Batch::new(WEB, 600)).expect("a batch");
    assert_eq!(report.lost(), 0, "{mode:?}: {:?}", report.failures());
    assert_eq!(report.per_node().len(), 3, "{mode:?}: {:?}", report.per_node());
    let by_addr = lab.config().groups[0].rules[0].2 == "on_addr";
    for (source, answered) in report.nodes_by_source().iter().take(if by_addr { 4 } else { 0 }) {
        for node in &lab.nodes {
            let json = node.farm_ok(&["--json", "why", &source.to_string(), &WEB.to_string()]);
            let why: Why = serde_json::from_str(&json.expect("farm why answers")).expect("JSON");
            let owner = why.bucket.and_then(|bucket| bucket.owner);
            assert_eq!(owner.as_slice(), answered, "{mode:?}: {source} by {}", node.name());
        }
    }
    for source in &lab.client.addrs6()[..8] {
        let mut ping = lab.client.space().command("ping");
        let (source, vip) = (source.to_string(), VIP6.to_string());
        ping.args(["-6", "-c", "3", "-i", "0.05", "-W", "2", "-I", &source, &vip]);
        let pinged = run_limited(ping, Duration::from_secs(10)).expect("ping runs");
        assert!(
            pinged.ok() && !pinged.stdout.contains("DUP!"),
            "{mode:?} {}{}",
            pinged.stdout,
            pinged.stderr
        );
    }
    let evidence = watcher.stop().expect("the watcher ends");
    evidence.check_single_owner().expect("one owner for everything");
    assert_eq!(evidence.syn_acks.len(), 600, "every handshake was seen on the wire");
    assert_eq!(evidence.echo_replies.len(), 24);
    let repliers: BTreeSet<&String> = evidence.echo_replies.values().flat_map(|p| p.keys()).collect();
    assert!(repliers.len() > 1, "eight clients and one replier: {repliers:?}");
    let vmac = lab.config().vips[0].vmac().to_string();
    assert!(
        !lab.switch_knows(&vmac).expect("bridge(8) runs"),
        "the switch learned the virtual MAC"
    );
}

#[test]
fn all_nodes_serve_an_ipv6_vip_and_one_answers_in_directed_mode() {
    for plane in PLANES {
        serves(config(Mode::Directed, plane));
    }
}

#[test]
fn all_nodes_serve_an_ipv6_vip_and_one_answers_in_invisible_mode() {
    for plane in PLANES {
        serves(config(Mode::Invisible, plane));
    }
}

#[test]
fn all_nodes_serve_an_ipv6_vip_by_client_port() {
    let web = Group::tcp("web", 80, "on_port");
    for (mode, plane) in both_modes() {
        serves(LabConfig {
            groups: vec![web.clone()],
            ..config(mode, plane)
        });
    }
}

#[test]
fn each_requester_of_an_ipv6_vip_hears_one_answer_and_none_of_the_kernel() {
    for (mode, plane) in MODES.into_iter().flat_map(|mode| [(mode, "raw"), (mode, "bpf")]) {
        let lab = farm(mode, plane);
        let sources = &lab.client.addrs6()[..20];
        let answered = || -> u64 { lab.nodes.iter().map(|n| counter(n, "dataplane_nd_answered")).sum() };
        let before = answered();
        let watcher = Watcher::start(&lab).expect("the wire can be watched");
        for source in sources {
            // One neighbour entry serves all addresses of a host: without it the kernel asks anew, in the name of this source.
            lab.client.space().ip(&["neighbour flush dev eth0"]).expect("ip runs");
            let record = lab
                .client
                .ask(*source, WEB, Duration::from_secs(2))
                .expect("a connection");
            assert!(record.outcome.is_ok(), "{mode:?}, {plane}: {record:?}");
        }
        let evidence = watcher.stop().expect("the watcher ends");
        let (asked, by_farmd) = (&evidence.arp, answered() - before);
        let told: usize = asked.values().flat_map(|seen| seen.replies.values()).sum();
        assert!(
            told >= 20 && told as u64 <= by_farmd,
            "{mode:?}, {plane}: {told} answers, {by_farmd} of farmd: {asked:?}"
        );
        let mut entries = BTreeMap::<String, usize>::new();
        for source in sources {
            let seen = evidence
                .arp
                .get(&((*source).into(), VIP6.into()))
                .unwrap_or_else(|| panic!("{source} asked nothing"));
            assert_eq!(
                (seen.replies.len(), seen.macs.len()),
                (1, 1),
                "{plane}, {source}: {seen:?}"
            );
            if mode == Mode::Invisible {
                assert!(seen.macs.contains(&lab.config().vips[0].vmac()), "{seen:?}");
            }
            let port = seen.replies.keys().next().expect("one");
            *entries.entry(port.clone()).or_default() += 1;
        }
        assert!(entries.len() > 1, "twenty requesters and one entry node: {entries:?}");
        nobody_answers_without_farmd(&lab);
    }
}

/// With every farmd stopped a requester asks until it gives up: the VIP is an address of each node, and no node's kernel answers for it.
fn nobody_answers_without_farmd(lab: &Lab) {
    let (client, source) = (lab.client.space(), lab.client.addrs6()[0]);
    client
        .sysctl("net.ipv6.neigh.eth0.retrans_time_ms", "100")
        .expect("it asks more often");
    for node in &lab.nodes {
        node.signal_farmd("STOP").expect("a signal");
    }
    client.ip(&["neighbour flush dev eth0"]).expect("ip runs");
    let watcher = Watcher::start(lab).expect("the wire can be watched");
    wait_until(Duration::from_secs(10), "the client to give up", || {
        // Each try of a connection begins a round of questions, if none is under way.
        let tried = lab.client.ask(source, WEB, Duration::from_millis(500)).ok()?;
        assert!(tried.outcome.is_err(), "{tried:?}");
        entry_of(lab, VIP6).0.contains("FAILED").then_some(())
    })
    .unwrap_or_else(|e| panic!("{e}: {:?}", entry_of(lab, VIP6)));
    let evidence = watcher.stop().expect("the watcher ends");
    let seen = &evidence.arp[&(source.into(), VIP6.into())];
    assert!(seen.requests > 0 && seen.replies.is_empty(), "{seen:?}");
    assert!(evidence.announcements.is_empty(), "{:?}", evidence.announcements);
}

#[test]
fn a_host_that_is_about_to_take_an_ipv6_vip_is_refused_and_moves_nobody() {
    for mode in MODES {
        let lab = farm(mode, "raw");
        assert!(lab.client.batch(Batch::new(WEB, 1)).expect("a batch").lost() == 0);
        let entry = entry_of(&lab, VIP6).1.map(str::to_owned);
        let intruder = add_host(&lab, "intruder", "px", Ipv4Addr::new(198, 18, 0, 99)).expect("a host");
        let watcher = Watcher::start(&lab).expect("the wire can be watched");
        intruder
            .ip(&[format!("address add {VIP6}/64 dev eth0")])
            .expect("ip runs");
        wait_until(Duration::from_secs(10), "the address to be refused", || {
            let mut shown = intruder.command("ip");
            shown.args(["-6", "address", "show", "dev", "eth0"]);
            let shown = run_limited(shown, Duration::from_secs(5)).ok()?.stdout;
            shown.contains("dadfailed").then_some(())
        })
        .expect("duplicate address detection fails");
        let evidence = watcher.stop().expect("the watcher ends");
        let answers: usize = evidence
            .arp
            .iter()
            .filter(|((asker, _), _)| asker.is_unspecified())
            .map(|(_, seen)| seen.replies.values().sum::<usize>())
            .sum();
        assert!(
            answers > 0 && evidence.announcements.is_empty(),
            "{mode:?}: {evidence:?}"
        );
        let conflicts: u64 = lab.nodes.iter().map(|n| counter(n, "dataplane_nd_conflict")).sum();
        assert!(conflicts > 0, "{mode:?}: nobody counted the claim");
        let report = lab.client.batch(Batch::new(WEB, 60)).expect("a batch");
        assert_eq!(report.lost(), 0, "{mode:?}: {:?}", report.failures());
        if mode == Mode::Directed {
            assert_eq!(entry_of(&lab, VIP6).1.map(str::to_owned), entry);
        }
    }
}

/// The node that the client's frames go to, or one of those that serve, loses its power; the others' connections go on and all clients are served.
fn survives_a_power_cut(mode: Mode, plane: &'static str) {
    let lab = farm(mode, plane);
    let holder = Holder::start(&lab.client, HoldConfig::new(WEB, 60)).expect("connections can be held");
    let watcher = Watcher::start(&lab).expect("the wire can be watched");
    let entry = entry_of(&lab, VIP6).1;
    let victim = lab
        .nodes
        .iter()
        .position(|node| Some(node.name()) == entry)
        .unwrap_or(1);
    assert_eq!(entry.is_some(), mode == Mode::Directed, "{entry:?}");
    let name = lab.nodes[victim].name();
    lab.nodes[victim].crash().expect("power goes");
    lab.wait_ready(MODULE, &lab.others(victim), Duration::from_secs(10))
        .expect("the others have all");
    if mode == Mode::Directed {
        // By an advertisement of the new entry node: the client has not asked.
        wait_until(Duration::from_secs(3), "the client's entry to move", || {
            entry_of(&lab, VIP6).1.filter(|now| *now != name)
        })
        .expect("the new entry node tells the client");
        let evidence = watcher.stop().expect("the watcher ends");
        assert!(evidence.two_owners().is_empty(), "{:?}", evidence.two_owners());
        let told: u64 = lab
            .others(victim)
            .iter()
            .map(|node| counter(node, "dataplane_nd_announced"))
            .sum();
        assert!(told > 0, "nobody told the client");
    }
    let report = lab.client.batch(Batch::new(WEB, 120)).expect("a batch");
    assert_eq!(report.lost(), 0, "{mode:?}: {:?}", report.failures());
    assert!(!report.per_node().contains_key(name), "{:?}", report.per_node());
    let held = holder.stop().expect("the holder ends");
    let others: Vec<_> = held.broken().into_iter().filter(|one| one.node != name).collect();
    assert!(others.is_empty(), "{mode:?}: {others:?}");
    assert!(
        held.per_node().keys().filter(|node| *node != name).count() == 2,
        "{:?}",
        held.per_node()
    );
}

#[test]
fn a_power_cut_moves_the_clients_of_one_node_only_in_directed_mode() {
    for plane in PLANES {
        survives_a_power_cut(Mode::Directed, plane);
    }
}

#[test]
fn a_power_cut_moves_the_clients_of_one_node_only_in_invisible_mode() {
    for plane in PLANES {
        survives_a_power_cut(Mode::Invisible, plane);
    }
}

#[test]
fn drain_and_reload_keep_ipv6_connections() {
    for (mode, plane) in both_modes() {
        let lab = farm(mode, plane);
        let holder = Holder::start(&lab.client, HoldConfig::new(WEB, 60)).expect("connections can be held");
        lab.nodes[0]
            .farm_ok(&["-m", MODULE, "drain", "node2", "--no-wait"])
            .expect("it drains");
        wait_until(Duration::from_secs(10), "node2 to have no share", || {
            let shares = lab.shares(MODULE, "web").ok()?;
            (shares.get("node2") == Some(&0.0)).then_some(())
        })
        .expect("node2 gives its share away");
        holder.wait_rounds(5, Duration::from_secs(20)).expect("they go on");
        let report = lab.client.batch(Batch::new(WEB, 60)).expect("a batch");
        assert_eq!((report.lost(), report.per_node().len()), (0, 2), "{mode:?}");
        lab.nodes[0]
            .farm_ok(&["-m", MODULE, "undrain", "node2"])
            .expect("it is back");
        lab.nodes[2].farm_ok(&["reload"]).expect("farmd is restarted in place");
        lab.wait_ready(MODULE, &lab.nodes.iter().collect::<Vec<_>>(), Duration::from_secs(20))
            .expect("all serve");
        holder.wait_rounds(5, Duration::from_secs(20)).expect("they go on");
        let held = holder.stop().expect("the holder ends");
        assert!(held.broken().is_empty(), "{mode:?}: {:?}", held.broken());
        assert_eq!(held.per_node().len(), 3, "{:?}", held.per_node());
    }
}

/// The clients' entry is put right by what goes to all, and then by what goes to each, though nothing in the farm has changed.
#[test]
fn periodic_advertisements_put_wrong_entries_right() {
    let lab = configured(config(Mode::Directed, "raw"), |_, mut module| {
        let wanted = "<interface arpreroute=\"on\" arpinterval=\"1s\" arpelapse=\"60s\">";
        module.userconfig = changed(&module.userconfig, "<interface>", wanted);
        module
    });
    start(&lab, MODULE);
    assert_eq!(lab.client.batch(Batch::new(WEB, 1)).expect("a batch").lost(), 0);
    let right = entry_of(&lab, VIP6).1.expect("an entry node").to_owned();
    let watcher = Watcher::start(&lab).expect("the wire can be watched");
    let nowhere = format!("neighbour replace {VIP6} lladdr 02:00:00:00:00:77 dev eth0 nud reachable");
    lab.client.space().ip(&[nowhere]).expect("ip runs");
    wait_until(Duration::from_secs(5), "the entry to be put right", || {
        (entry_of(&lab, VIP6).1 == Some(&right)).then_some(())
    })
    .unwrap_or_else(|e| panic!("{e}: {:?}", entry_of(&lab, VIP6)));
    let evidence = watcher.stop().expect("the watcher ends");
    assert_eq!(evidence.announcements.len(), 1, "one node speaks for all: {evidence:?}");
}

#[test]
fn every_byte_of_large_transfers_over_ipv6_arrives() {
    for (mode, plane) in both_modes() {
        let lab = Lab::serve(LabConfig {
            routed: true,
            ..config(mode, plane)
        });
        let lab = lab.expect("the farm comes up");
        let services: Vec<Service> = lab.nodes.iter().map(|node| bulk(node, BULK)).collect();
        let sources = spread(&lab.client, WEB, 9);
        let servers = transfers(
            &lab.client,
            BULK,
            &sources,
            &[Step::Up(2 * MIB), Step::Down(MIB)],
            || (),
        );
        assert_eq!(servers.len(), 3, "{mode:?}: {servers:?}");
        transfers(&lab.client, BULK, &sources[..1], &[Step::Up(16 * MIB)], || ());

        // From beyond a link that is narrower than the nodes know: a "packet too big" must find the node whose packet it quotes.
        let (router, far) = (
            lab.router.as_ref().expect("a router"),
            lab.far.as_ref().expect("a far client"),
        );
        let beyond = spread(far, WEB, 9);
        let steps = [Step::Down(MIB / 4), Step::Down(MIB), Step::Up(MIB)];
        let servers = transfers(far, BULK, &beyond, &steps, || {
            router.ip(&["link set eth1 mtu 1300"]).expect("ip runs");
            // The client knows of it: its own segments would be lost in silence.
            far.space().ip(&["link set eth0 mtu 1300"]).expect("ip runs");
        });
        assert_eq!(servers.len(), 3, "{mode:?}: {servers:?}");
        drop(services);
    }
}
