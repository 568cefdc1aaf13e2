//! Heartbeats on two lans and by broadcast: what a broken lan costs, what is seen of it, and what the wire carries.

use std::fs;
use std::net::SocketAddrV4;
use std::time::{Duration, Instant};

use farm_core::api::LinkStatus;
use farm_core::api::history::{DepartureCause, Happening, HistoryEntry};
use farm_lab::client::Batch;
use farm_lab::config::{FIRST_LAN, SECOND_LAN};
use farm_lab::probe::{ProbeConfig, Prober};
use farm_lab::{Lab, LabConfig, MODULE, Node, VIP, wait_until};

use crate::common::{counter, flooded_farm, history, mentions, module_of, own_row};

const WEB: SocketAddrV4 = SocketAddrV4::new(VIP, 80);
const LIMIT: Duration = Duration::from_secs(20);

/// How `node` hears each of its peers on `lan`.
fn links(node: &Node, lan: &str) -> Vec<LinkStatus> {
    let cluster = node.status().expect("the node answers").cluster;
    let links = cluster.nodes.into_iter().flat_map(|peer| peer.links);
    links.filter(|link| link.lan == lan).collect()
}

/// Waits until every one of `nodes` says of each peer on `lan` what `right` accepts.
fn wait_links(nodes: &[Node], lan: &str, what: &str, right: impl Fn(&LinkStatus) -> bool) {
    for node in nodes {
        wait_until(LIMIT, what, || {
            let links = links(node, lan);
            (links.len() == nodes.len() - 1 && links.iter().all(&right)).then_some(())
        })
        .unwrap_or_else(|e| panic!("{e} on {} of {}: {:#?}", lan, node.name(), links(node, lan)));
    }
}

/// Entries of a node, after number `after`, that tell of a node that went or of a share that moved.
fn alarms(node: &Node, after: u64) -> Vec<HistoryEntry> {
    let alarm = |entry: &HistoryEntry| {
        matches!(
            entry.what,
            Happening::NodeDown(_)
                | Happening::ViewChanged { .. }
                | Happening::MapChanged { .. }
                | Happening::MapLearned { .. }
                | Happening::Fenced { .. }
                | Happening::Closed { .. }
        )
    };
    history(node)
        .into_iter()
        .filter(|entry| entry.seq > after && alarm(entry))
        .collect()
}

fn newest(node: &Node) -> u64 {
    history(node).last().map_or(0, |entry| entry.seq)
}

/// Whether a thread of a node's farmd has real-time priority, as the kernel says.
fn is_realtime(node: &Node) -> bool {
    let threads = format!("/proc/{}/task", node.farmd_pid().expect("farmd runs"));
    fs::read_dir(threads).expect("it has threads").flatten().any(|thread| {
        let stat = fs::read_to_string(thread.path().join("stat")).unwrap_or_default();
        // Field 41, the policy, is SCHED_FIFO (proc_pid_stat(5)); the name in field 2 may hold blanks and brackets.
        let after_name = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
        after_name.split_whitespace().nth(38) == Some("1")
    })
}

/// Fails unless every node shows, as JSON and to people, a round trip to each peer on each lan, `coordinator`, and that its heartbeats have priority.
fn all_is_shown(lab: &Lab, coordinator: &Node) {
    for lan in [FIRST_LAN, SECOND_LAN] {
        wait_links(&lab.nodes, lan, "a round trip", |link| {
            let (Some(least), Some(mean), Some(last)) = (link.rtt_min_us, link.rtt_avg_us, link.rtt_us) else {
                return false;
            };
            least <= mean && least <= last && last < 1_000_000
        });
    }
    for node in &lab.nodes {
        let cluster = node.status().expect("the node answers").cluster;
        assert_eq!(
            cluster.coordinator.as_deref(),
            Some(coordinator.name()),
            "{}",
            node.name()
        );
        assert_eq!(
            (cluster.heartbeat.realtime, is_realtime(node)),
            (true, true),
            "{}",
            node.name()
        );
        let told = node.farm_ok(&["status", "-v"]).expect("a status for people");
        mentions(&told, &[&format!("coordinator {}\n", coordinator.name())]);
        mentions(&told, &["real-time priority: yes"]);
        for peer in lab.nodes.iter().filter(|peer| peer.name() != node.name()) {
            for lan in [FIRST_LAN, SECOND_LAN] {
                let words = |line: &str| line.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
                let mut rows = told
                    .lines()
                    .map(words)
                    .filter(|row| row.starts_with(&[peer.name().to_owned(), lan.to_owned()]));
                let row = rows
                    .next()
                    .unwrap_or_else(|| panic!("no row of {} on {lan} in {told}", peer.name()));
                let trips = row.iter().rev().take_while(|word| word.ends_with("ms")).count();
                assert_eq!(trips, 3, "newest, shortest and mean: {row:?}");
            }
        }
    }
}

/// The second lan's cables of all nodes, pulled or put back.
fn second_cables(lab: &Lab, up: bool) {
    let state = if up { "up" } else { "down" };
    let lines: Vec<String> = (1..=lab.nodes.len())
        .map(|port| format!("link set q{port} {state}"))
        .collect();
    lab.switch.ip(&lines).expect("the ports of the second switch");
}

/// Clients that ask all the time, each with time for retransmissions.
fn probing(lab: &Lab) -> Prober {
    let config = ProbeConfig {
        limit: Duration::from_secs(5),
        rate: 200,
        ..ProbeConfig::new(WEB)
    };
    Prober::start(&lab.client, config).expect("probing")
}

#[test]
fn a_lost_lan_costs_no_node_and_no_share_and_is_shown() {
    let lab = flooded_farm(LabConfig {
        second_lan: true,
        ..LabConfig::default()
    });
    all_is_shown(&lab, &lab.nodes[0]);
    let before: Vec<u64> = lab.nodes.iter().map(newest).collect();
    let prober = probing(&lab);
    let lost = |link: &LinkStatus| link.loss_permille.is_some_and(|loss| loss > 100) && link.heard_ms > Some(500);
    let back = |link: &LinkStatus| link.heard_ms.is_some_and(|ms| ms < 200);

    second_cables(&lab, false);
    wait_links(&lab.nodes, SECOND_LAN, "the second lan to be seen as lost", lost);
    let told = lab.nodes[0].farm_ok(&["status", "-v"]).expect("a status for people");
    let row = |name: &str| {
        let row = |line: &&str| line.split_whitespace().take(2).eq([name, SECOND_LAN]);
        told.lines().find(row).unwrap_or_else(|| panic!("no row in {told}"))
    };
    assert!(!row("node2").contains(" 0.0%"), "{}", row("node2"));
    second_cables(&lab, true);
    wait_links(&lab.nodes, SECOND_LAN, "the second lan to be back", back);

    // The first lan: the nodes no longer hear each other there, and the clients still reach all.
    lab.cut_between(&Lab::split_by(&[0, 1, 2])).expect("a cut");
    wait_links(&lab.nodes, FIRST_LAN, "the first lan to be seen as lost", lost);
    // A pair on each: node2 and node3 hear each other on the second lan only, node1 hears both on the first only.
    lab.cut_between(&[("p2".to_owned(), "p3".to_owned())]).expect("a cut");
    lab.switch.ip(&["link set q1 down"]).expect("a port");
    wait_until(LIMIT, "node1 to hear node2 on the first lan only", || {
        let first = links(&lab.nodes[0], FIRST_LAN);
        let second = links(&lab.nodes[0], SECOND_LAN);
        (first[0].heard_ms < Some(200) && second[0].heard_ms > Some(500)).then_some(())
    })
    .expect("it does");
    lab.switch.ip(&["link set q1 up"]).expect("a port");
    lab.cut_between(&[]).expect("mended");
    wait_links(&lab.nodes, FIRST_LAN, "the first lan to be back", back);

    let probe = prober.stop().expect("the prober ends");
    assert_eq!(probe.report.lost(), 0, "{:?}", probe.report.failures());
    for (node, before) in lab.nodes.iter().zip(before) {
        assert_eq!(alarms(node, before), Vec::<HistoryEntry>::new(), "{}", node.name());
    }
}

#[test]
fn a_node_without_its_service_cable_stays_a_member_by_the_other_lan() {
    let lab = flooded_farm(LabConfig {
        second_lan: true,
        ..LabConfig::default()
    });
    let node = &lab.nodes[1];
    let before: Vec<u64> = lab.nodes.iter().map(newest).collect();
    node.set_link(false).expect("the cable is pulled");
    lab.wait_ready(MODULE, &lab.others(1), LIMIT)
        .expect("the others have all");
    let said = wait_until(LIMIT, "the node to say why it has no share", || {
        let row = own_row(node, MODULE);
        let none = row.shares.iter().all(|share| share.buckets == 0);
        (none && row.why.contains("is down")).then_some(())
    });
    said.unwrap_or_else(|e| panic!("{e}: {:?}", own_row(node, MODULE)));
    for (seen_from, before) in lab.nodes.iter().zip(before) {
        let gone: Vec<HistoryEntry> = alarms(seen_from, before)
            .into_iter()
            .filter(|entry| matches!(entry.what, Happening::NodeDown(_) | Happening::ViewChanged { .. }))
            .collect();
        assert_eq!(gone, [], "nobody went, as {} sees it", seen_from.name());
        let view = seen_from.status().expect("the node answers").cluster.view;
        assert_eq!(view.len(), 3, "{view:?}");
    }
    node.set_link(true).expect("the cable is back");
    lab.wait_ready(MODULE, &lab.nodes.iter().collect::<Vec<_>>(), LIMIT)
        .expect("all serve");
}

/// The first two nodes do not hear each other, the third hears both: what has to be agreed goes by that one.
#[test]
fn a_pair_that_does_not_hear_each_other_costs_nobody_his_place() {
    let lab = flooded_farm(LabConfig::default());
    let [first, second, hub] = &lab.nodes[..] else {
        panic!("three nodes")
    };
    let names: Vec<String> = lab.nodes.iter().map(|node| node.name().to_owned()).collect();
    let coordinators = || -> Vec<Option<String>> {
        let clusters = lab
            .nodes
            .iter()
            .map(|node| node.status().expect("the node answers").cluster);
        clusters.map(|cluster| cluster.coordinator).collect()
    };
    let before: Vec<u64> = lab.nodes.iter().map(newest).collect();
    let prober = probing(&lab);
    let way = |from: &Node, to: &Node| {
        let (from, to) = (from.port(), to.port());
        format!("iifname \"{from}\" oifname \"{to}\" ether type ip udp dport 4800 drop; ")
    };
    let rules = way(first, second) + &way(second, first);
    lab.switch
        .nft(&format!(
            "table bridge pair {{ chain c {{ type filter hook forward priority -300; {rules} }}; }}\n"
        ))
        .expect("their heartbeats do not come in");
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_secs(2) {
        for node in &lab.nodes {
            let view = node.status().expect("the node answers").cluster.view;
            assert_eq!(view, names, "{} after {:?}", node.name(), begun.elapsed());
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    assert_eq!(
        coordinators(),
        vec![Some(hub.name().to_owned()); 3],
        "who talks with all proposes"
    );
    lab.switch
        .nft("delete table bridge pair\n")
        .expect("they come in again");
    wait_links(&lab.nodes, FIRST_LAN, "all to be heard again", |link| {
        link.heard_ms.is_some_and(|ms| ms < 200)
    });
    wait_until(LIMIT, "the first node to propose again", || {
        (coordinators() == vec![Some(first.name().to_owned()); 3]).then_some(())
    })
    .unwrap_or_else(|e| panic!("{e}: {:?}", coordinators()));

    let probe = prober.stop().expect("the prober ends");
    assert_eq!(probe.report.lost(), 0, "{:?}", probe.report.failures());
    // Each of the pair remembers that it did not hear the other, and that the third did. Nobody went, and nothing moved.
    for (node, other, before) in [(first, second, before[0]), (second, first, before[1])] {
        let told = alarms(node, before);
        let [
            HistoryEntry {
                what: Happening::NodeDown(out),
                ..
            },
        ] = &told[..]
        else {
            panic!("{}: {told:#?}", node.name())
        };
        assert_eq!(
            (out.node.as_str(), out.cause),
            (other.name(), DepartureCause::Silent),
            "{out:?}"
        );
        assert_eq!(out.observers, [node.name()], "{out:?}");
        assert_eq!(out.talk_with_it, [hub.name()], "{out:?}");
    }
    assert_eq!(alarms(hub, before[2]), Vec::<HistoryEntry>::new(), "{}", hub.name());
}

/// The first two nodes do not hear each other, nor do the other two: no node talks with all, and still everything can be agreed.
#[test]
fn two_pairs_that_do_not_hear_each_other_cost_nobody_his_place() {
    let lab = flooded_farm(LabConfig {
        nodes: 4,
        ..LabConfig::default()
    });
    let names: Vec<String> = lab.nodes.iter().map(|node| node.name().to_owned()).collect();
    let before: Vec<u64> = lab.nodes.iter().map(newest).collect();
    let prober = probing(&lab);
    let ways = [(0, 1), (1, 0), (2, 3), (3, 2)].map(|(from, to)| {
        let (from, to) = (lab.nodes[from].port(), lab.nodes[to].port());
        format!("iifname \"{from}\" oifname \"{to}\" ether type ip udp dport 4800 drop; ")
    });
    lab.switch
        .nft(&format!(
            "table bridge pairs {{ chain c {{ type filter hook forward priority -300; {} }}; }}\n",
            ways.concat()
        ))
        .expect("their heartbeats do not come in");
    let all_are_in = || {
        for node in &lab.nodes {
            let view = node.status().expect("the node answers").cluster.view;
            assert_eq!(view, names, "{}", node.name());
        }
    };
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_secs(2) {
        all_are_in();
        std::thread::sleep(Duration::from_millis(20));
    }
    // By the lowest that talks with both.
    let rows = module_of(&lab.nodes[0], MODULE).nodes;
    let second = rows
        .iter()
        .find(|row| row.node == names[1])
        .expect("a row for each node");
    assert_eq!(
        second.why,
        format!("not heard here; {} passes on what it says", names[2])
    );
    // The first proposes, and does not talk with the second.
    for node in &lab.nodes[1..3] {
        let others: Vec<&Node> = lab.nodes.iter().filter(|n| n.name() != node.name()).collect();
        node.farm_ok(&["drain"]).expect("it gives all away");
        let buckets = |of: &Node| own_row(of, MODULE).shares.iter().map(|s| s.buckets).sum::<u32>();
        assert_eq!(buckets(node), 0, "{}", node.name());
        assert_eq!(others.iter().map(|of| buckets(of)).sum::<u32>(), 4096);
        node.farm_ok(&["undrain"]).expect("it takes its share again");
        wait_until(LIMIT, "its share", || {
            (lab.nodes.iter().all(|of| buckets(of) == 1024)).then_some(())
        })
        .unwrap_or_else(|e| panic!("{e}: {:?}", lab.nodes.iter().map(buckets).collect::<Vec<_>>()));
        all_are_in();
    }
    lab.switch
        .nft("delete table bridge pairs\n")
        .expect("they come in again");
    lab.wait_ready(MODULE, &lab.nodes.iter().collect::<Vec<_>>(), LIMIT)
        .expect("all serve");
    let probe = prober.stop().expect("the prober ends");
    assert_eq!(probe.report.lost(), 0, "{:?}", probe.report.failures());
    for (node, before) in lab.nodes.iter().zip(before) {
        let views = alarms(node, before);
        let views = views.iter().filter(|e| matches!(e.what, Happening::ViewChanged { .. }));
        assert_eq!(views.count(), 0, "nobody went, as {} sees it", node.name());
    }
}

/// Heartbeats that came from a node's port so far: to the broadcast address, and to single nodes.
fn on_the_wire(lab: &Lab, port: usize) -> (u64, u64) {
    let mut nft = lab.switch.command("nft");
    nft.args(["-j", "list", "counters", "table", "bridge", "beats"]);
    let listed = farm_lab::process::run(&mut nft).expect("nft lists its counters");
    let listed: serde_json::Value = serde_json::from_str(&listed).expect("JSON");
    let packets = |name: String| {
        let all = listed["nftables"].as_array().expect("a list").iter();
        let mut own = all.filter(|one| one["counter"]["name"] == name.as_str());
        own.next()
            .and_then(|one| one["counter"]["packets"].as_u64())
            .expect("the counter")
    };
    (packets(format!("all{port}")), packets(format!("one{port}")))
}

/// Counts from now on what [`on_the_wire`] tells.
fn count_on_the_wire(lab: &Lab) {
    count_at_ports(lab, 'p');
}

/// As [`count_on_the_wire`], at the ports of the switch that begin with `letter`.
fn count_at_ports(lab: &Lab, letter: char) {
    let ports = 1..=lab.nodes.len();
    let counters: String = ports
        .clone()
        .map(|port| format!("counter all{port} {{ }}\ncounter one{port} {{ }}\n"))
        .collect();
    let rules: String = ports
        .map(|port| {
            // Broadcast, and all nodes of a link over IPv6.
            let all = "{ ff:ff:ff:ff:ff:ff, 33:33:00:00:00:01 }";
            let own = format!("iifname \"{letter}{port}\" udp dport 4800 ether daddr");
            format!("{own} {all} counter name all{port}\n{own} != {all} counter name one{port}\n")
        })
        .collect();
    lab.switch
        .nft(&format!(
            "table bridge beats {{ {counters} chain c {{ type filter hook prerouting priority -300; {rules} }}; }}\n"
        ))
        .expect("counters at the ports");
}

#[test]
fn many_nodes_are_spoken_to_by_broadcast_and_one_by_one_where_that_does_not_pass() {
    let lab = Lab::new(LabConfig {
        nodes: 17,
        client_addrs: 1,
        // All of them run on the processors of one machine.
        lans: "pulse=\"200ms\"".to_owned(),
        ..LabConfig::default()
    });
    let lab = lab.expect("a lab can be built");
    lab.start_daemons().expect("the daemons start");
    let whole = || {
        let view = |node: &Node| node.status().expect("the node answers").cluster.view.len();
        lab.nodes.iter().all(|node| view(node) == lab.nodes.len())
    };
    wait_until(LIMIT, "a view of all", || whole().then_some(())).expect("all find each other");
    count_on_the_wire(&lab);
    // What the nodes send in a second to all at once and to one each.
    let second = || {
        let ports = 1..=lab.nodes.len();
        let before: Vec<(u64, u64)> = ports.clone().map(|port| on_the_wire(&lab, port)).collect();
        std::thread::sleep(Duration::from_secs(1));
        let after = ports.map(|port| on_the_wire(&lab, port));
        let sent: Vec<(u64, u64)> = after
            .zip(before)
            .map(|(now, was)| (now.0 - was.0, now.1 - was.1))
            .collect();
        println!("to all and to one: {sent:?}");
        sent
    };
    let calm = |(all, one): &(u64, u64)| *all >= 3 && *one == 0;
    wait_until(LIMIT, "a second in which each node speaks to all at once only", || {
        second().iter().all(calm).then_some(())
    })
    .expect("one datagram goes to all");

    let before: Vec<u64> = lab.nodes.iter().map(newest).collect();
    lab.switch
        .nft("table bridge deaf { chain c { type filter hook forward priority 0; udp dport 4800 ether daddr ff:ff:ff:ff:ff:ff drop; }; }\n")
        .expect("a switch that drops broadcasts");
    let peers = lab.nodes.len() as u64 - 1;
    wait_until(LIMIT, "a second in which each node speaks to each", || {
        second().iter().all(|(_, one)| *one >= 3 * peers).then_some(())
    })
    .expect("each node is sent to by itself");
    // And where they pass in one direction only: not from one node, and not to another.
    for one_way in ["iifname \"p1\"", "oifname \"p2\""] {
        lab.switch
            .nft(&format!(
                "flush chain bridge deaf c\nadd rule bridge deaf c {one_way} udp dport 4800 ether daddr ff:ff:ff:ff:ff:ff drop\n"
            ))
            .expect("a port that drops broadcasts");
        // Twelve times the detection time.
        std::thread::sleep(Duration::from_secs(12));
        assert!(whole(), "somebody went: {one_way}");
    }
    for (node, before) in lab.nodes.iter().zip(before) {
        assert_eq!(alarms(node, before), Vec::<HistoryEntry>::new(), "{}", node.name());
    }

    lab.switch
        .nft("delete table bridge deaf\n")
        .expect("the switch is whole again");
    wait_until(LIMIT, "a second in which each node speaks to all at once only", || {
        second().iter().all(calm).then_some(())
    })
    .expect("one datagram goes to all again");
}

#[test]
fn heartbeats_by_broadcast_make_a_farm_and_find_a_dead_node() {
    speak_by_broadcast(false);
}

#[test]
fn heartbeats_to_all_nodes_of_an_ipv6_link_make_a_farm_and_find_a_dead_node() {
    speak_by_broadcast(true);
}

fn speak_by_broadcast(lan_ipv6: bool) {
    let lab = flooded_farm(LabConfig {
        nodes: 4,
        lan: "cast=\"broadcast\"",
        lan_ipv6,
        ..LabConfig::default()
    });
    let ports = 1..=lab.nodes.len();
    count_on_the_wire(&lab);
    // At rest one datagram goes to all; single ones are for peers of which some went missing, as on a machine that is busy just now.
    let calm = wait_until(LIMIT, "a second in which each node speaks to all at once", || {
        let before: Vec<(u64, u64)> = ports.clone().map(|port| on_the_wire(&lab, port)).collect();
        let sent: Vec<u64> = lab.nodes.iter().map(|node| counter(node, "heartbeats_sent")).collect();
        let begun = Instant::now();
        std::thread::sleep(Duration::from_secs(1));
        let rows: Vec<(u64, u64, u64)> = ports
            .clone()
            .zip(before)
            .map(|(port, before)| {
                let now = on_the_wire(&lab, port);
                let sent = counter(&lab.nodes[port - 1], "heartbeats_sent") - sent[port - 1];
                (now.0 - before.0, now.1 - before.1, sent)
            })
            .collect();
        println!(
            "in {:?}, by node: to all, to one, counted by itself: {rows:?}",
            begun.elapsed()
        );
        // What the daemon counts and what is on the wire are read one after the other.
        let calm = |(all, one, sent): &(u64, u64, u64)| *all >= 10 && *one == 0 && sent.abs_diff(*all) <= all / 2;
        rows.iter().all(calm).then_some(())
    });
    calm.expect("the lan has one datagram per node and pulse");
    for node in &lab.nodes {
        // The last seconds, of which the rate is, may have seen the start.
        let beat = || node.status().expect("the node answers").cluster.heartbeat;
        wait_until(LIMIT, "the rate of one datagram per pulse, not of three", || {
            let beat = beat();
            (beat.bytes_per_s < beat.bytes * 2_000_000 / beat.interval_us).then_some(())
        })
        .unwrap_or_else(|e| panic!("{e}: {:?}", beat()));
    }

    let (survivor, victim) = (&lab.nodes[0], &lab.nodes[3]);
    let before = newest(survivor);
    victim.power_off().expect("power goes");
    lab.wait_ready(MODULE, &lab.others(3), LIMIT)
        .expect("the others have all");
    let report = lab.client.batch(Batch::new(WEB, 120)).expect("a batch");
    assert_eq!(
        (report.lost(), report.per_node().len()),
        (0, 3),
        "{:?}",
        report.failures()
    );
    let down = wait_until(LIMIT, "the dead node's entry", || {
        history(survivor).into_iter().find_map(|entry| match entry.what {
            Happening::NodeDown(out) if entry.seq > before && out.node == victim.name() => Some(out),
            _ => None,
        })
    });
    let down = down.expect("it is remembered");
    assert_eq!(
        (down.cause, down.observers.len()),
        (DepartureCause::Silent, 3),
        "{down:?}"
    );
    lab.rejoin(3, MODULE).expect("the node comes back");
    mentions(&survivor.farm_ok(&["history"]).expect("a history"), &["not heard for"]);
}

/// The group of all nodes is one of an interface: the socket for it goes with the old one.
#[test]
fn a_lan_over_ipv6_is_listened_to_on_an_interface_that_was_made_anew() {
    let lab = flooded_farm(LabConfig {
        lan: "cast=\"broadcast\"",
        lan_ipv6: true,
        second_lan: true,
        ..LabConfig::default()
    });
    count_at_ports(&lab, 'q');
    let second = || {
        let at = || (1..=lab.nodes.len()).map(|port| on_the_wire(&lab, port));
        let before: Vec<(u64, u64)> = at().collect();
        std::thread::sleep(Duration::from_secs(1));
        let rows = at()
            .zip(before)
            .map(|(now, before)| (now.0 - before.0, now.1 - before.1));
        rows.collect::<Vec<_>>()
    };
    // There are no single ones here: whoever is heard sends to all, and whoever hears listens to that.
    let to_all_only = |rows: &Vec<(u64, u64)>| rows.iter().all(|(all, one)| *all >= 10 && *one == 0);
    let calm = |what: &str| wait_until(LIMIT, what, || Some(second()).filter(to_all_only));
    calm("a second in which all speak to all").expect("on the first interface");

    let before: Vec<u64> = lab.nodes.iter().map(newest).collect();
    lab.renew_second_link(0).expect("a new interface");
    calm("a second in which all speak to all").expect("on the new interface");
    let back = |link: &LinkStatus| link.heard_ms.is_some_and(|ms| ms < 200);
    wait_links(&lab.nodes, SECOND_LAN, "the second lan to be whole", back);
    for (node, before) in lab.nodes.iter().zip(before) {
        let views = alarms(node, before);
        let views = views.iter().filter(|e| matches!(e.what, Happening::ViewChanged { .. }));
        assert_eq!(views.count(), 0, "nobody went, as {} sees it", node.name());
    }
}
