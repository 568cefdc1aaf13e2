//! `farm trace`: what became of each frame on each node, in both data planes, and that nothing of it is left when nobody listens.

use std::io::{BufRead, BufReader};
use std::net::{Ipv4Addr, SocketAddrV4, TcpListener};
use std::process::{Child, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use farm_core::api::exit;
use farm_core::api::trace::{TraceEnd, TraceFrame, TraceLine, TraceStart};
use farm_lab::config::Vip;
use farm_lab::process::{children_of, signal, spawn_kept, wait_limited};
use farm_lab::{Group, Lab, LabConfig, Mode, Node, VIP, wait_until};

use crate::common::{counter, farm_of, mentions, program, shell_ok};

const LIMIT: Duration = Duration::from_secs(20);
const WEB: SocketAddrV4 = SocketAddrV4::new(VIP, 80);
/// A port that no rule covers.
const CLOSED: SocketAddrV4 = SocketAddrV4::new(VIP, 81);
/// Where frames are judged: always in user space, or where the machine lets farmd.
const PLANES: [&str; 2] = ["raw", "auto"];

fn farm(mode: Mode, plane: &'static str, filter: &'static str) -> Lab {
    Lab::serve(LabConfig {
        client_addrs: 12,
        vips: vec![Vip::new(VIP, mode)],
        groups: vec![Group::tcp("web", 80, filter)],
        plane,
        ..LabConfig::default()
    })
    .expect("the farm comes up")
}

/// A `farm trace --json` that runs.
struct Tracing {
    child: Child,
    lines: Receiver<TraceLine>,
    start: TraceStart,
}

impl Tracing {
    /// Begins one and waits until it says that it has begun.
    fn start(node: &Node, args: &[&str]) -> Self {
        let mut command = node.command(&program("farm")).expect("the node has power");
        command
            .args(args)
            .arg("--json")
            .stdin(Stdio::null())
            .stdout(Stdio::piped());
        let mut child = spawn_kept(command).expect("farm runs");
        let stdout = BufReader::new(child.stdout.take().expect("a pipe"));
        let (sender, lines) = channel();
        std::thread::spawn(move || {
            for line in stdout.lines().map_while(Result::ok) {
                let line = serde_json::from_str(&line).unwrap_or_else(|e| panic!("{e}: {line}"));
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        match lines.recv_timeout(LIMIT) {
            Ok(TraceLine::Start(start)) => Self { child, lines, start },
            other => panic!("{args:?} on {}: {other:?}", node.name()),
        }
    }

    /// Sends a signal to the command itself, which runs in the node's process namespace.
    fn signal(&self, name: &str) {
        for inner in children_of(self.child.id()) {
            signal(inner, name).expect("it is there");
        }
    }

    /// Waits for its end; what it showed.
    fn finish(mut self) -> (Vec<TraceFrame>, TraceEnd) {
        let mut frames = Vec::new();
        loop {
            match self.lines.recv_timeout(LIMIT) {
                Ok(TraceLine::Frame(frame)) => frames.push(*frame),
                Ok(TraceLine::End(end)) => {
                    let status = wait_limited(&mut self.child, LIMIT).expect("it can be waited for");
                    assert_eq!(status.and_then(|s| s.code()), Some(0));
                    assert!(
                        frames.len() as u64 <= end.shown,
                        "some may have been taken before: {end:?}"
                    );
                    return (frames, end);
                }
                other => panic!("no end after {frames:?}: {other:?}"),
            }
        }
    }

    /// As Ctrl-C does.
    fn interrupt(self) -> (Vec<TraceFrame>, TraceEnd) {
        self.signal("INT");
        self.finish()
    }

    /// The next frame that it shows.
    fn next(&self) -> TraceFrame {
        match self.lines.recv_timeout(LIMIT) {
            Ok(TraceLine::Frame(frame)) => *frame,
            other => panic!("no frame: {other:?}"),
        }
    }
}

impl Drop for Tracing {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Programs that a node's farmd has at tcx links; none where it judges in user space.
fn programs(node: &Node) -> Vec<String> {
    let pid = node.farmd_pid().expect("farmd runs");
    let infos = std::fs::read_dir(format!("/proc/{pid}/fdinfo")).expect("its descriptors");
    let infos = infos
        .flatten()
        .filter_map(|entry| std::fs::read_to_string(entry.path()).ok());
    let tcx = infos.filter(|info| {
        info.lines()
            .any(|line| line.starts_with("link_type:") && line.ends_with("tcx"))
    });
    let ids = tcx.filter_map(|info| {
        let line = info.lines().find_map(|line| line.strip_prefix("prog_id:"))?;
        Some(line.trim().to_owned())
    });
    ids.map(|id| {
        let shown = shell_ok(node, &format!("bpftool prog show id {id}"));
        let words: Vec<&str> = shown.split_whitespace().collect();
        let name = words
            .iter()
            .position(|word| *word == "name")
            .and_then(|at| words.get(at + 1));
        (*name.expect("a name")).to_owned()
    })
    .collect()
}

/// Waits until the node has no program that tells. The ordinary one is attached where frames are captured, too.
fn wait_ordinary(node: &Node) {
    let ordinary = || programs(node).iter().all(|name| name == "farm_ingress");
    wait_until(LIMIT, "the ordinary program", || ordinary().then_some(()))
        .unwrap_or_else(|e| panic!("{e}: {:?}", programs(node)));
}

fn in_kernel(node: &Node) -> bool {
    crate::common::module_of(node, farm_lab::MODULE).dataplane == "bpf"
}

fn asked(lab: &Lab, from: Ipv4Addr) -> String {
    let record = lab.client.ask(from, WEB, LIMIT).expect("a request");
    record.outcome.expect("a node answers")
}

#[test]
fn every_node_says_of_each_frame_what_became_of_it_and_why() {
    for plane in PLANES {
        let lab = farm(Mode::Invisible, plane, "on_addr");
        let from = lab.client.addrs()[1];
        let host = from.to_string();
        let tracing = lab
            .nodes
            .iter()
            .map(|node| Tracing::start(node, &["trace", "host", &host]));
        let tracing: Vec<Tracing> = tracing.collect();
        let answered = asked(&lab, from);
        let refused = lab
            .client
            .ask(from, CLOSED, Duration::from_millis(300))
            .expect("a request");
        assert!(refused.outcome.is_err(), "{plane}: no rule covers it");
        let mut buckets = Vec::new();
        for (node, tracing) in lab.nodes.iter().zip(tracing) {
            let (name, by_kernel) = (node.name(), in_kernel(node));
            assert_eq!(tracing.start.node, name);
            assert_eq!(
                (tracing.start.filter.as_str(), &tracing.start.problem),
                (format!("host {from}").as_str(), &None)
            );
            let (frames, end) = tracing.interrupt();
            assert!(end.lost == 0 && end.seen >= end.shown, "{end:?}");
            assert!(frames.iter().all(|f| f.client == from && f.vip == VIP), "{frames:?}");
            // What comes soon after a bucket has opened the program leaves to farmd, and says so.
            let (punted, frames): (Vec<TraceFrame>, Vec<TraceFrame>) =
                frames.into_iter().partition(|f| f.verdict == "punted");
            let left = |f: &TraceFrame| {
                punted
                    .iter()
                    .any(|p| (p.client_port, &p.detail) == (f.client_port, &f.detail))
            };
            assert!(
                frames.iter().all(|f| (f.by == "kernel") == (by_kernel && !left(f))),
                "{plane}: {punted:?} {frames:?}"
            );
            let (web, closed): (Vec<&TraceFrame>, Vec<&TraceFrame>) =
                frames.iter().partition(|f| f.vip_port == Some(80));
            let told = |f: &TraceFrame| (f.verdict.clone(), f.reason.clone());
            let expected = match name == answered {
                true => ("accepted".to_owned(), "own".to_owned()),
                false => ("dropped".to_owned(), "foreign".to_owned()),
            };
            assert!(
                !web.is_empty() && web.iter().all(|f| told(f) == expected),
                "{plane}, {name}: {web:?}"
            );
            assert!(web.iter().any(|f| f.detail == "S"), "{web:?}");
            assert!(web.iter().all(|f| f.protocol == "tcp"), "{web:?}");
            assert!(web.iter().all(|f| f.owner.as_ref() == Some(&answered)), "{web:?}");
            assert!(
                web.iter().all(|f| f.bytes.len() as u32 == 2 * f.length.min(128)),
                "{web:?}"
            );
            let no_rule = ("dropped".to_owned(), "no_rule".to_owned());
            assert!(
                !closed.is_empty() && closed.iter().all(|f| told(f) == no_rule),
                "{plane}, {name}: {closed:?}"
            );
            buckets.extend(web.iter().map(|f| (f.group.clone(), f.bucket)));
            wait_ordinary(node);
        }
        assert!(
            buckets.windows(2).all(|pair| pair[0] == pair[1]),
            "{plane}: one bucket: {buckets:?}"
        );
        assert!(buckets[0].1.is_some(), "{buckets:?}");
    }
}

#[test]
fn where_frames_are_sent_on_each_step_is_shown() {
    for plane in PLANES {
        let lab = farm(Mode::Directed, plane, "on_port");
        let from = lab.client.addrs()[0];
        // With the client's port in the key, some connections belong to another node than the one where the client's frames come in.
        let tracing = lab
            .nodes
            .iter()
            .map(|node| Tracing::start(node, &["trace", "tcp", "port", "80"]));
        let tracing: Vec<Tracing> = tracing.collect();
        let answered: Vec<String> = (0..12).map(|_| asked(&lab, from)).collect();
        let shown: Vec<Vec<TraceFrame>> = tracing.into_iter().map(|t| t.interrupt().0).collect();
        let accepted_by = |port: Option<u16>| {
            let has = |frames: &[TraceFrame]| {
                frames
                    .iter()
                    .any(|f| f.client_port == port && f.verdict == "accepted" && f.detail == "S")
            };
            let nodes = lab.nodes.iter().zip(&shown);
            nodes
                .filter(|(_, frames)| has(frames))
                .map(|(node, _)| node.name().to_owned())
                .collect::<Vec<_>>()
        };
        let mut forwarded = 0;
        for frame in shown.iter().flatten().filter(|f| f.verdict == "forwarded") {
            forwarded += 1;
            assert_eq!(frame.reason, "foreign", "{plane}: {frame:?}");
            assert_eq!(
                frame.sent_on,
                [frame.owner.clone().expect("an owner")],
                "{plane}: {frame:?}"
            );
            assert_eq!(accepted_by(frame.client_port), frame.sent_on, "{plane}: {frame:?}");
        }
        assert!(forwarded > 0, "{plane}: {answered:?}");
    }
}

#[test]
fn a_file_has_the_frames_and_what_became_of_them() {
    for plane in PLANES {
        let lab = farm(Mode::Invisible, plane, "on_addr");
        let from = lab.client.addrs()[1];
        let answered = asked(&lab, from);
        let owner = lab
            .nodes
            .iter()
            .find(|node| node.name() == answered)
            .expect("it is a node");
        let file = lab.base().join("frames.pcapng");
        let path = file.display().to_string();
        let ended = std::thread::scope(|scope| {
            let traced = scope.spawn(|| owner.farm(&["trace", "-c", "5", "-w", &path, "tcp", "and", "accepted"]));
            while !traced.is_finished() {
                asked(&lab, from);
            }
            traced.join().expect("it ends").expect("farm runs")
        });
        assert!(ended.ok() && ended.stdout.is_empty(), "{ended:?}");
        mentions(&ended.stderr, &[&format!("5 frames written to {path}")]);
        let bytes = std::fs::read(&file).expect("a file");
        let comment = b"accepted own";
        let comments = bytes.windows(comment.len()).filter(|part| part == comment).count();
        assert_eq!(comments, 5, "{plane}");
        let read = shell_ok(owner, &format!("tcpdump -nn -r {path} 2>/dev/null"));
        assert_eq!(read.lines().count(), 5, "{plane}: {read}");
        let spoken = format!("IP {from}.");
        assert!(
            read.lines()
                .all(|line| line.contains(&spoken) && line.contains("> 198.18.0.20.80: Flags")),
            "{read}"
        );
    }
}

#[test]
fn traces_run_side_by_side_and_a_killed_one_leaves_nothing() {
    for plane in PLANES {
        let lab = farm(Mode::Directed, plane, "on_addr");
        let (from, node) = (lab.client.addrs()[0], &lab.nodes[0]);
        let by_kernel = in_kernel(node);
        wait_ordinary(node);
        let echoes = Tracing::start(node, &["trace", "icmp"]);
        let all = Tracing::start(node, &["trace", "host", &from.to_string()]);
        if by_kernel {
            assert_eq!(programs(node), ["farm_traced"]);
        }
        let ping = |what: &str| {
            let mut ping = lab.client.space().command("ping");
            ping.args(["-c", "1", "-W", "2", "-I", &from.to_string(), &VIP.to_string()]);
            let finished = farm_lab::process::run_limited(ping, LIMIT).expect("ping runs");
            assert!(finished.ok(), "{plane}, {what}: {finished:?}");
        };
        // On whichever node it comes in: the one that answers the client's ARP request.
        let enters = lab
            .nodes
            .iter()
            .map(|n| crate::common::entry_of(&lab, VIP).1 == Some(n.name()));
        let here = {
            ping("once");
            enters.into_iter().next() == Some(true)
        };
        if here {
            assert_eq!(
                (echoes.next().detail, all.next().detail),
                ("echo".to_owned(), "echo".to_owned())
            );
        }
        all.signal("KILL");
        drop(all);
        ping("again");
        if here {
            assert_eq!(echoes.next().protocol, "icmp");
        }
        let more: Vec<Tracing> = (0..3).map(|_| Tracing::start(node, &["trace", "punted"])).collect();
        let refused = node.farm(&["trace"]).expect("farm runs");
        assert_eq!(refused.code, Some(exit::REFUSED.into()), "{refused:?}");
        mentions(&refused.stderr, &["4 traces run here already"]);
        for trace in more {
            trace.signal("KILL");
        }
        echoes.interrupt();
        wait_ordinary(node);

        // By way of another node, and killed there.
        let second = &lab.nodes[1];
        let remote = Tracing::start(node, &["-H", second.name(), "trace", "host", &from.to_string()]);
        assert_eq!(remote.start.node, second.name());
        remote.signal("KILL");
        drop(remote);
        wait_ordinary(second);
        let ended = || second.log_text().matches("a trace has ended").count();
        wait_until(LIMIT, "its end in the log", || (ended() == 1).then_some(())).expect("the other node notices");
    }
}

/// The name of the program that is the only filter at a node's clsact.
fn filter(node: &Node) -> String {
    let shown = shell_ok(node, "tc filter show dev eth0 ingress");
    let mut words = shown.split_whitespace().skip_while(|word| *word != "id").skip(1);
    let id = words.next().unwrap_or_else(|| panic!("no program in {shown}"));
    assert_eq!(words.find(|word| *word == "id"), None, "one program: {shown}");
    let shown = shell_ok(node, &format!("bpftool prog show id {id}"));
    let mut words = shown.split_whitespace().skip_while(|word| *word != "name").skip(1);
    words.next().expect("a name").to_owned()
}

#[test]
fn a_filter_at_clsact_tells_while_somebody_listens_and_the_ordinary_one_judges_again_after_it() {
    let lab = Lab::serve(LabConfig {
        attach: "clsact",
        plane: "bpf",
        ..farm_of(1)
    });
    let lab = lab.expect("the farm comes up");
    let (node, from) = (&lab.nodes[0], lab.client.addrs()[0]);
    // Somebody would answer.
    let _reached = node.space().run(|| TcpListener::bind("0.0.0.0:81")).expect("a port");
    let judges = || {
        let before = [counter(node, "frames_own"), counter(node, "frames_no_rule")];
        assert_eq!(asked(&lab, from), node.name());
        let refused = lab.client.ask(from, CLOSED, Duration::from_millis(300));
        assert!(refused.expect("a request").outcome.is_err(), "no rule covers it");
        let after = [counter(node, "frames_own"), counter(node, "frames_no_rule")];
        assert!(after[0] > before[0] && after[1] > before[1], "{before:?} {after:?}");
    };
    assert_eq!(filter(node), "farm_ingress");
    for _ in 0..2 {
        let tracing = Tracing::start(node, &["trace", "tcp"]);
        assert_eq!(filter(node), "farm_traced");
        judges();
        let (frames, end) = tracing.interrupt();
        let told = |verdict: &str, reason: &str| frames.iter().find(|f| (&*f.verdict, &*f.reason) == (verdict, reason));
        assert!(told("accepted", "own").is_some(), "{end:?} {frames:?}");
        let by = told("dropped", "no_rule").map(|frame| frame.by.as_str());
        assert_eq!(by, Some("kernel"), "{end:?} {frames:?}");
        wait_until(LIMIT, "the ordinary program", || {
            (filter(node) == "farm_ingress").then_some(())
        })
        .unwrap_or_else(|e| panic!("{e}: {}", filter(node)));
        judges();
    }
}

#[test]
fn what_is_wrong_is_said_with_its_place() {
    let lab = farm(Mode::Directed, "auto", "on_addr");
    let node = &lab.nodes[0];
    let wrong = node.farm(&["trace", "tcp", "prot", "80"]).expect("farm runs");
    assert_eq!(wrong.code, Some(exit::USAGE.into()), "{wrong:?}");
    let expected =
        "farm: filter, character 5: `prot`: `and` is expected before another condition\n  tcp prot 80\n      ^^^^\n";
    assert_eq!(wrong.stderr, expected);
    let time = node
        .farm(&["trace", "--seconds", "1", "reason", "lease_ended"])
        .expect("farm runs");
    assert!(time.ok(), "{time:?}");
    mentions(&time.stderr, &["1 s are over"]);
    assert_eq!(node.stop_farmd().expect("farmd ends"), Some(0));
    let nobody = node.farm(&["trace"]).expect("farm runs");
    assert_eq!(nobody.code, Some(exit::NO_DAEMON.into()), "{nobody:?}");
}
