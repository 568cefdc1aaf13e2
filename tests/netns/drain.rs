//! Shares set at run time, and commands from node to node: what they move, keep, end and refuse.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Read as _;
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpStream};
use std::path::Path;
use std::time::{Duration, Instant};

use farm_core::api::{ModuleState, NodeModuleStatus, exit};
use farm_lab::client::Batch;
use farm_lab::hold::{HoldConfig, HoldReport, Holder};
use farm_lab::http::{Connection, Failure};
use farm_lab::process::{Finished, run_limited};
use farm_lab::{Group, Lab, LabConfig, MODULE, Mode, Node, VIP, wait_until};

use crate::common::{changed, configured, counter, farm_of, frames_of, mentions, own_row, patient_clients, start};

const WEB: SocketAddrV4 = SocketAddrV4::new(VIP, 80);
const ALT: SocketAddrV4 = SocketAddrV4::new(VIP, 8080);

/// A serving farm with the lab's module, its `userconfig.xml` changed by `change`.
fn serving(config: LabConfig, change: impl Fn(&str) -> String) -> Lab {
    let farm = configured(config, |_, mut module| {
        module.userconfig = change(&module.userconfig);
        module
    });
    start(&farm, MODULE);
    farm
}

fn hold(lab: &Lab, to: SocketAddrV4, count: usize) -> Holder {
    let holder = Holder::start(&lab.client, HoldConfig::new(to, count)).expect("connections can be held");
    holder.wait_rounds(2, Duration::from_secs(30)).expect("they go on");
    holder
}

/// Buckets of each node, as `node` sees them.
fn buckets(node: &Node) -> BTreeMap<String, u32> {
    let status = node.status().expect("the node answers");
    let module = status
        .modules
        .into_iter()
        .find(|m| m.name == MODULE)
        .expect("the module");
    let shares = |row: &NodeModuleStatus| row.shares.iter().map(|s| s.buckets).sum();
    module.nodes.iter().map(|row| (row.node.clone(), shares(row))).collect()
}

pub fn wait_buckets(node: &Node, wanted: &[(&str, u32)]) {
    let wanted: BTreeMap<String, u32> = wanted.iter().map(|(n, b)| ((*n).to_owned(), *b)).collect();
    wait_until(Duration::from_secs(20), &format!("shares {wanted:?}"), || {
        (buckets(node) == wanted).then_some(())
    })
    .unwrap_or_else(|e| panic!("{e}: {:?}", buckets(node)));
}

/// Waits until `node` itself has no bucket and still holds connections.
fn wait_drained(node: &Node) {
    wait_until(Duration::from_secs(20), "the share to go", || {
        let row = own_row(node, MODULE);
        row.shares
            .iter()
            .all(|s| s.buckets == 0 && s.draining > 0)
            .then_some(())
    })
    .unwrap_or_else(|e| panic!("{e}: {:?}", own_row(node, MODULE)));
}

fn broken(report: &HoldReport) -> BTreeMap<String, usize> {
    report.broken_per_node()
}

/// A command that may take as long as a slow machine needs.
pub fn farm(node: &Node, args: &[&str]) -> Finished {
    let program = crate::common::program("farm");
    let mut command = node.command(&program).expect("the node has power");
    command.args(args);
    run_limited(command, Duration::from_secs(240)).expect("farm runs")
}

#[test]
fn drain_of_another_node_keeps_connections_names_their_clients_and_sends_new_ones_elsewhere() {
    let lab = Lab::serve(farm_of(3)).expect("the farm comes up");
    let (first, second) = (&lab.nodes[0], &lab.nodes[1]);
    let holder = hold(&lab, WEB, 30);
    let (told, report) = std::thread::scope(|scope| {
        let drain = scope.spawn(|| farm(first, &["drain", "node2", "--timeout", "200s"]));
        wait_drained(second);
        // Still UP, and it says why it has no share: to itself and to the others.
        let row = own_row(second, MODULE);
        assert_eq!(row.state, Some(ModuleState::Up));
        mentions(&row.why, &["drained by root on node1"]);
        mentions(&row.why, &["connection"]);
        let clients: BTreeSet<_> = row.shares[0].clients.iter().map(|c| c.addr).collect();
        assert!(!clients.is_empty() && clients.len() <= 8, "{row:?}");
        assert!(
            clients.iter().all(|c| lab.client.addrs().iter().any(|a| *c == *a)),
            "{clients:?}"
        );
        let named = clients.iter().next().expect("a client").to_string();
        mentions(&second.farm(&["status", "-v"]).expect("a status").stdout, &[&named]);
        let seen_by_first = first.status().expect("a status");
        let row = seen_by_first.modules[0]
            .nodes
            .iter()
            .find(|row| row.node == "node2")
            .expect("a row")
            .clone();
        mentions(&row.why, &["drained by root on node1"]);

        let batch = lab.client.batch(Batch::new(WEB, 200)).expect("connections can be made");
        assert_eq!(batch.lost(), 0, "{:?}", batch.failures());
        assert!(!batch.per_node().contains_key("node2"), "{:?}", batch.per_node());
        holder.wait_rounds(2, Duration::from_secs(30)).expect("they go on");
        assert!(!drain.is_finished(), "it waits for the connections");
        let report = holder.stop().expect("the holder ends");
        (drain.join().expect("the drain ends"), report)
    });
    assert!(told.ok(), "{told:?}");
    mentions(&told.stdout, &["connections left: 198.18."]);
    mentions(&told.stdout, &["no connection left"]);
    assert!(report.per_node().contains_key("node2"), "{:?}", report.per_node());
    assert!(broken(&report).is_empty(), "{:?}", broken(&report));
    let audit = std::fs::read_to_string(second.dirs().var.join("audit.log")).expect("an audit");
    assert!(
        audit
            .lines()
            .any(|line| line.contains("root on node1") && line.contains("drain: drained")),
        "{audit}"
    );

    // A new start does not undrain; the command does, from a third node.
    let started = farm(first, &["--on", "node2", "stopstart", MODULE]);
    assert!(started.ok(), "{started:?}");
    mentions(&started.stdout, &["drained by root"]);
    assert_eq!(buckets(second)["node2"], 0);
    let undrained = farm(&lab.nodes[2], &["undrain", "node2"]);
    assert!(undrained.ok(), "{undrained:?}");
    let row = own_row(second, MODULE);
    assert_eq!(
        (row.shares[0].buckets > 1300, row.why.as_str()),
        (true, ""),
        "the share is there when the command ends"
    );
    lab.wait_ready(MODULE, &lab.nodes.iter().collect::<Vec<_>>(), Duration::from_secs(20))
        .expect("all serve");
}

#[test]
fn drain_resets_at_its_deadline_what_is_left_of_the_group_and_nothing_else() {
    let config = LabConfig {
        groups: vec![Group::tcp("web", 80, "on_addr"), Group::tcp("alt", 8080, "on_addr")],
        ..farm_of(3)
    };
    let lab = Lab::new(config).expect("a lab");
    lab.start_daemons().expect("the daemons start");
    for node in &lab.nodes {
        let module = lab.module_text(node, Some("1s"));
        node.install_text(MODULE, &module, &["80".to_owned(), "8080".to_owned()])
            .expect("a module");
    }
    lab.start_module(MODULE).expect("the module starts");
    let (web, alt) = (hold(&lab, WEB, 30), hold(&lab, ALT, 30));
    let drained = farm(&lab.nodes[0], &["drain", "node2", "--group", "web", "--timeout", "1s"]);
    assert!(drained.ok(), "{drained:?}");
    mentions(&drained.stdout, &["connections were reset"]);
    // What is left goes on.
    alt.wait_rounds(2, Duration::from_secs(30))
        .expect("the other group's connections go on");
    let (web, alt) = (web.stop().expect("held"), alt.stop().expect("held"));
    let of_node2 = web.per_node()["node2"];
    assert_eq!(
        broken(&web),
        BTreeMap::from([("node2".to_owned(), of_node2)]),
        "{:?}",
        web.per_node()
    );
    assert!(
        alt.per_node().contains_key("node2") && broken(&alt).is_empty(),
        "{:?}",
        broken(&alt)
    );
    let row = own_row(&lab.nodes[1], MODULE);
    mentions(&row.why, &["drained (group web) by root on node1"]);
    assert_eq!(
        (row.shares[0].buckets, row.shares[1].buckets > 1300),
        (0, true),
        "{row:?}"
    );
    let all = farm(&lab.nodes[1], &["undrain"]);
    assert!(all.ok(), "{all:?}");
}

/// Clients of a drained node end their connections with a reset and open new ones at once from the same ports: those are another node's alone.
fn reopen_at_once(mode: Mode) {
    const LIMIT: Duration = Duration::from_secs(10);
    let config = LabConfig {
        client_addrs: 40,
        ..LabConfig::with_mode(mode)
    };
    let lab = serving(config, str::to_owned);
    let node2 = &lab.nodes[1];
    let holder = hold(&lab, WEB, 40);
    let addrs = lab.client.addrs().to_vec();
    let (drained, wait) = tokio::sync::oneshot::channel::<()>();
    let (ready, opened) = std::sync::mpsc::channel();
    let clients = lab.client.start(async move || {
        let mut on_node2 = Vec::new();
        for source in addrs.iter().cycle().take(4 * addrs.len()) {
            let mut connection = Connection::open(*source, WEB, LIMIT).await?;
            if connection.get("/echo/1", LIMIT).await?.starts_with("node2 ") {
                on_node2.push(connection);
            }
        }
        let _ = ready.send(on_node2.len());
        let _ = wait.await;
        let mut answers = Vec::new();
        for connection in on_node2 {
            let Some(SocketAddr::V4(source)) = connection.local() else {
                continue;
            };
            connection.reset()?;
            let mut again = Connection::open_from(source, WEB, LIMIT).await;
            // A command that another test starts at this moment holds the old socket for a moment more.
            for _ in 0..1000 {
                if !matches!(again, Err(Failure::Io(_))) {
                    break;
                }
                tokio::time::sleep(Duration::from_millis(1)).await;
                again = Connection::open_from(source, WEB, LIMIT).await;
            }
            let mut again = again?;
            for _ in 0..3 {
                answers.push(again.get("/echo/2", LIMIT).await?);
            }
        }
        Ok::<_, Failure>(answers)
    });
    let clients = clients.expect("a client");
    let count = opened.recv_timeout(Duration::from_secs(60)).expect("connections");
    assert!(count > 10, "{count} connections are node2's");
    assert!(farm(&lab.nodes[0], &["drain", "node2", "--no-wait"]).ok());
    wait_drained(node2);
    let _ = drained.send(());
    let answers = clients.wait().expect("a client");
    let answers = answers.unwrap_or_else(|failure| panic!("{failure}\n{}", frames_of(node2)));
    assert_eq!(answers.len(), 3 * count);
    assert!(
        answers.iter().all(|answer| !answer.starts_with("node2 ")),
        "{answers:?}"
    );
    let report = holder.stop().expect("the holder ends");
    assert!(broken(&report).is_empty(), "{:?}", broken(&report));
}

#[test]
fn drain_leaves_ports_that_are_used_again_at_once_to_the_new_owner_in_directed_mode() {
    reopen_at_once(Mode::Directed);
}

#[test]
fn drain_leaves_ports_that_are_used_again_at_once_to_the_new_owner_in_invisible_mode() {
    reopen_at_once(Mode::Invisible);
}

#[test]
fn drain_and_weight_refuse_what_would_leave_nobody_or_is_not_there() {
    let lab = serving(farm_of(2), str::to_owned);
    let node = &lab.nodes[0];
    assert!(farm(node, &["drain", "node2"]).ok());
    for args in [&["drain"][..], &["weight", "node1", "0"]] {
        let refused = farm(node, args);
        assert_eq!(refused.code, Some(i32::from(exit::REFUSED)), "{args:?}: {refused:?}");
        mentions(&refused.stderr, &["no other node serves"]);
    }
    assert_eq!(buckets(node)["node1"], 4096, "nothing has changed");
    for (args, code, word) in [
        (&["drain", "node9"][..], exit::NOT_FOUND, "there is no node node9"),
        (&["drain", "-m", "mail"], exit::NOT_FOUND, "mail"),
        (&["drain", "--group", "mail"], exit::NOT_FOUND, "web of web"),
        (&["weight", "node1", "-1"], exit::USAGE, "0 to 65535"),
        (&["drain", "--timeout", "-5"], exit::USAGE, "at most a day"),
        (
            &["--on", "node9,node1", "drain"],
            exit::NOT_FOUND,
            "there is no node node9",
        ),
        (&["--on", "node1,", "drain"], exit::USAGE, "each comma"),
        (&["history", "nix"], exit::NOT_FOUND, "nix"),
        (&["config", "nix"], exit::NOT_FOUND, "not installed"),
        (&["drain", "--timeout", "2d"], exit::USAGE, "at most a day"),
        (&["--on", "node2", "log", "web"], exit::USAGE, "--on"),
    ] {
        let refused = farm(node, args);
        assert_eq!(refused.code, Some(i32::from(code)), "{args:?}: {refused:?}");
        mentions(&refused.stderr, &[word]);
    }
    // Where farmd is not running nothing can be asked, and the text says which address was tried.
    lab.nodes[1].stop_farmd().expect("farmd ends");
    let gone = farm(node, &["undrain", "node2"]);
    assert_eq!(gone.code, Some(i32::from(exit::NO_DAEMON)), "{gone:?}");
    mentions(&gone.stderr, &["198.18.0.12:4800"]);
}

/// What each knows of the other is a heartbeat old: both commands come before the next one.
#[test]
fn drain_of_all_nodes_at_the_same_moment_leaves_one_that_serves() {
    let lab = serving(farm_of(2), str::to_owned);
    let program = crate::common::program("farm");
    // By a drain that nobody waits for, and by a weight.
    let mut taken_back = [0, 0];
    for round in 0..20 {
        let other: &[&str] = if round % 2 == 0 {
            &["drain", "--no-wait"]
        } else {
            &["weight", "node2", "0"]
        };
        // Neither hears of the other's command before it has taken its own.
        lab.switch
            .nft("table bridge late { chain c { type filter hook prerouting priority -300; udp dport 4800 drop; }; }\n")
            .expect("no heartbeat passes");
        let (mut first, mut second) = (None, None);
        let commands: [(&Node, &[&str], _); 2] = [
            (&lab.nodes[0], &["drain"], &mut first),
            (&lab.nodes[1], other, &mut second),
        ];
        for (node, args, end) in commands {
            let mut command = node.command(&program).expect("the node has power");
            command.args(args);
            *end = Some(std::thread::spawn(move || {
                run_limited(command, Duration::from_secs(60)).expect("farm runs")
            }));
        }
        std::thread::sleep(Duration::from_millis(60));
        lab.switch.nft("delete table bridge late\n").expect("they pass again");
        let ends = [first, second].map(|end| end.expect("begun").join().expect("it ends"));
        let refused: Vec<&Finished> = ends.iter().filter(|end| !end.ok()).collect();
        assert!(!refused.is_empty(), "{ends:?}");
        for end in &refused {
            assert_eq!(end.code, Some(i32::from(exit::REFUSED)), "{end:?}");
        }
        taken_back[round % 2] += refused.iter().filter(|end| end.stderr.contains("taken back")).count();
        wait_until(Duration::from_secs(20), "all buckets to be served", || {
            (buckets(&lab.nodes[0]).values().sum::<u32>() == 4096).then_some(())
        })
        .unwrap_or_else(|e| panic!("{e}: {ends:?} {:?}", buckets(&lab.nodes[0])));
        if !taken_back.contains(&0) {
            break;
        }
        for node in &lab.nodes {
            assert!(farm(node, &["undrain"]).ok() && farm(node, &["weight", node.name(), "default"]).ok());
        }
        wait_buckets(&lab.nodes[0], &[("node1", 2048), ("node2", 2048)]);
    }
    assert!(
        !taken_back.contains(&0),
        "the commands never came at the same moment: {taken_back:?}"
    );
    let history = lab.nodes[1].farm(&["history"]).expect("the history");
    mentions(
        &history.stdout,
        &["taken back, or nobody would serve group web of module web"],
    );
}

#[test]
fn drain_and_weight_outlast_a_restart_of_farmd_and_weight_moves_the_exact_share() {
    let lab = serving(farm_of(3), str::to_owned);
    let (first, second) = (&lab.nodes[0], &lab.nodes[1]);
    let set = farm(first, &["weight", "node2", "3"]);
    assert!(set.ok(), "{set:?}");
    // 4096 in the proportion 1:3:1 by the largest remainder; there when the command ends.
    let exact = [("node1", 819), ("node2", 2458), ("node3", 819)];
    assert_eq!(buckets(second)["node2"], 2458);
    wait_buckets(first, &exact);
    // Seen from another node too, and in the history of the one it was asked of.
    mentions(
        &lab.nodes[2].farm_ok(&["status", "-v"]).expect("a status"),
        &["node2, group web: weight 3"],
    );
    let told = second.farm_ok(&["history"]).expect("a history");
    mentions(&told, &["root on node1: weight node2 3"]);
    assert!(farm(first, &["drain", "node3"]).ok());
    wait_buckets(first, &[("node1", 1024), ("node2", 3072), ("node3", 0)]);

    for node in &lab.nodes[1..] {
        assert_eq!(node.stop_farmd().expect("farmd ends"), Some(0));
        node.start_farmd().expect("farmd starts");
        node.wait_farmd(Duration::from_secs(20)).expect("it answers");
        let started = farm(node, &["start", MODULE]);
        assert!(started.ok(), "{started:?}");
    }
    wait_buckets(first, &[("node1", 1024), ("node2", 3072), ("node3", 0)]);
    mentions(&own_row(&lab.nodes[2], MODULE).why, &["drained by root"]);
    mentions(&second.farm(&["status", "-v"]).expect("a status").stdout, &["weight 3"]);
    assert!(farm(first, &["undrain", "node3"]).ok());
    wait_buckets(first, &exact);
    let none = farm(first, &["weight", "node2", "0"]);
    assert!(none.ok(), "{none:?}");
    assert_eq!(own_row(second, MODULE).why, "weight 0, set by root on node1");
    let told = first.farm_ok(&["history"]).expect("a history");
    mentions(&told, &["node2 leaves (weight 0, set by root on node1)"]);
    mentions(&told, &["node3 leaves (drained by root on node1)"]);
    let unset = farm(first, &["weight", "node2", "default"]);
    assert!(unset.ok(), "{unset:?}");
    lab.wait_ready(MODULE, &lab.nodes.iter().collect::<Vec<_>>(), Duration::from_secs(20))
        .expect("equal shares");
}

#[test]
fn drain_before_a_stop_lets_connections_end_and_stops_at_its_time() {
    let lab = serving(farm_of(3), |text| changed(text, "<vip>", "<vip drain=\"100s\">"));
    let second = &lab.nodes[1];
    let holder = hold(&lab, WEB, 30);
    let report = std::thread::scope(|scope| {
        let stop = scope.spawn(|| farm(second, &["stop", MODULE]));
        wait_drained(second);
        mentions(&own_row(second, MODULE).why, &["stops when its connections have ended"]);
        holder.wait_rounds(2, Duration::from_secs(30)).expect("they go on");
        assert!(!stop.is_finished(), "it waits for the connections");
        let ended = Instant::now();
        let report = holder.stop().expect("the holder ends");
        let stopped = stop.join().expect("it ends");
        assert!(stopped.ok(), "{stopped:?}");
        mentions(&stopped.stdout, &["Drained before the stop, no connection left"]);
        assert!(ended.elapsed() < Duration::from_secs(60), "{:?}", ended.elapsed());
        report
    });
    assert!(broken(&report).is_empty(), "{:?}", broken(&report));

    // Whoever asks twice does not wait, and the connections that are left end.
    assert!(farm(second, &["start", MODULE]).ok());
    lab.wait_ready(MODULE, &lab.nodes.iter().collect::<Vec<_>>(), Duration::from_secs(20))
        .expect("all serve");
    let holder = hold(&lab, WEB, 30);
    assert!(farm(second, &["stop", MODULE, "--no-wait"]).ok());
    wait_drained(second);
    assert!(farm(second, &["stop", MODULE]).ok());
    assert_eq!(own_row(second, MODULE).state, Some(ModuleState::Stop));
    // They speak every 100 ms, and those that are left notice at once.
    std::thread::sleep(Duration::from_secs(1));
    let report = holder.stop().expect("the holder ends");
    let of_node2 = report.per_node()["node2"];
    assert_eq!(broken(&report), BTreeMap::from([("node2".to_owned(), of_node2)]));

    // The end of farmd is a stop too; a second signal does not wait.
    let third = &lab.nodes[2];
    let holder = hold(&lab, WEB, 30);
    third.signal_farmd("TERM").expect("a signal");
    wait_drained(third);
    holder.wait_rounds(2, Duration::from_secs(30)).expect("they go on");
    third.signal_farmd("TERM").expect("a signal");
    let ended = third.wait_farmd_end(Duration::from_secs(60)).expect("farmd ends");
    assert_eq!(ended, Some(0), "{}", third.log_tail(20));
    drop(holder.stop().expect("the holder ends"));
}

#[test]
fn drain_before_a_stop_that_runs_out_ends_what_is_left_and_nothing_before() {
    const TIME: Duration = Duration::from_secs(2);
    let lab = serving(farm_of(3), |text| changed(text, "<vip", "<vip drain=\"2s\""));
    let second = &lab.nodes[1];
    let (holder, prober) = (hold(&lab, WEB, 30), patient_clients(&lab, WEB));
    let begun = Instant::now();
    let (stopped, drained, ended) = std::thread::scope(|scope| {
        let stop = scope.spawn(|| (farm(second, &["stop", MODULE]), Instant::now()));
        wait_drained(second);
        let drained = Instant::now();
        let (stopped, ended) = stop.join().expect("it ends");
        (stopped, drained, ended)
    });
    assert!(stopped.ok(), "{stopped:?}");
    mentions(&stopped.stdout, &["its connections have 2 s to end"]);
    let took = ended - begun;
    assert!((TIME..TIME * 10).contains(&took), "{took:?}: {stopped:?}");
    assert_eq!(own_row(second, MODULE).state, Some(ModuleState::Stop));

    // They speak every 100 ms: those that are still there notice.
    std::thread::sleep(Duration::from_secs(1));
    let held = holder.stop().expect("the holder ends");
    let of_node2 = held.per_node()["node2"];
    assert_eq!(broken(&held), BTreeMap::from([("node2".to_owned(), of_node2)]));
    for held in held.broken() {
        let (at, failure) = held.broken.as_ref().expect("it broke");
        assert!(*at >= begun + TIME, "after {:?}: {held:?}", *at - begun);
        assert_ne!(*failure, Failure::AnswerTimeout, "it was ended: {held:?}");
    }
    let report = prober.stop().expect("the prober ends").report;
    assert_eq!(report.lost(), 0, "{:?}", report.failures());
    let meanwhile = report.records.iter().filter(|r| (drained..ended).contains(&r.started));
    let served: BTreeSet<&str> = meanwhile.filter_map(|r| r.outcome.as_deref().ok()).collect();
    assert_eq!(served, BTreeSet::from(["node1", "node3"]));
}

#[test]
fn drain_and_other_commands_of_a_host_with_another_key_are_refused_and_counted() {
    let lab = Lab::serve(farm_of(3)).expect("the farm comes up");
    let (first, third) = (&lab.nodes[0], &lab.nodes[2]);
    // node3 gets a key of its own.
    third.stop_farmd().expect("farmd ends");
    third.farm_ok(&["cluster", "genkey", "--force"]).expect("a key");
    third.start_farmd().expect("farmd starts");
    third.wait_farmd(Duration::from_secs(20)).expect("it answers");
    assert_eq!(counter(first, "commands_refused_authentication"), 0);
    for args in [&["-H", "node1", "stop", MODULE][..], &["drain", "node1"]] {
        let refused = farm(third, args);
        assert_eq!(refused.code, Some(i32::from(exit::NO_DAEMON)), "{refused:?}");
        mentions(&refused.stderr, &["cluster.key differs"]);
    }
    wait_until(Duration::from_secs(10), "both to be counted", || {
        (counter(first, "commands_refused_authentication") == 2).then_some(())
    })
    .expect("they are counted");
    assert_eq!(counter(first, "commands_accepted"), 0);
    let row = own_row(first, MODULE);
    assert_eq!(
        (row.state, row.shares[0].buckets),
        (Some(ModuleState::Up), 2048),
        "{row:?}"
    );
    let lines = first
        .log_text()
        .matches("a command from another node is refused")
        .count();
    assert_eq!(lines, 1, "one line a minute");

    // A host that is no node gets not a byte.
    let from: Ipv4Addr = lab.client.addrs()[0];
    let to = SocketAddrV4::new(first.addr(), 4800);
    let read = lab.client.space().run(move || {
        let mut stream = TcpStream::connect(to).expect("the port is open");
        stream.set_read_timeout(Some(Duration::from_secs(10))).expect("a limit");
        let mut bytes = Vec::new();
        // A reset is an end as well.
        let _ = stream.read_to_end(&mut bytes);
        bytes.len()
    });
    assert_eq!(read, 0, "{from}");
    wait_until(Duration::from_secs(10), "it to be counted", || {
        (counter(first, "commands_refused_address") == 1).then_some(())
    })
    .expect("it is counted");
    assert!(Path::new(&first.dirs().run).exists());
}

#[test]
fn drain_apart_a_command_goes_to_several_nodes_and_says_what_each_did() {
    let lab = serving(farm_of(3), str::to_owned);
    let first = &lab.nodes[0];
    let stopped = farm(first, &["-H", "node2,node3", "stop", MODULE]);
    assert!(stopped.ok(), "{stopped:?}");
    mentions(&stopped.stdout, &["node2:\n"]);
    assert_eq!(own_row(first, MODULE).state, Some(ModuleState::Up));
    for node in &lab.nodes[1..] {
        assert_eq!(own_row(node, MODULE).state, Some(ModuleState::Stop));
    }
    // Asked of this node too; `start` ends when the share is there.
    let started = farm(first, &["--on", "*", "start", MODULE]);
    assert!(started.ok(), "{started:?}");
    assert!(
        own_row(&lab.nodes[2], MODULE).shares[0].buckets > 1300,
        "{:?}",
        own_row(&lab.nodes[2], MODULE)
    );
    let status = farm(first, &["-H", "node3", "status", "--json"]);
    let status: farm_core::api::FarmStatus = serde_json::from_str(&status.stdout).expect("a status");
    assert_eq!(status.node, "node3");
    let failed = farm(first, &["-H", "node2,node3", "stop", "mail"]);
    assert_eq!(failed.code, Some(i32::from(exit::NOT_FOUND)), "{failed:?}");
    mentions(&failed.stdout, &["node3:\n"]);
}
