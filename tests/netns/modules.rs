//! The shipped modules as an administrator uses them: installed with the command line, configured, started, serving, stopped.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::net::SocketAddrV4;
use std::path::PathBuf;
use std::time::Duration;

use farm_core::api::{ModuleState, exit};
use farm_lab::client::Batch;
use farm_lab::http::Connection;
use farm_lab::module::{nginx_conf, repository, set_macro, write_file};
use farm_lab::{Lab, Node, VIP};

use crate::common::{farm_of, mentions, on_all, own_row, processes, shell_ok, start};

const WEB: SocketAddrV4 = SocketAddrV4::new(VIP, 80);

/// Nodes whose daemons run, without any module.
fn farm(nodes: usize) -> Lab {
    let lab = Lab::new(farm_of(nodes)).expect("a lab can be built");
    lab.start_daemons().expect("the daemons start");
    lab
}

/// The folder of a shipped module.
fn shipped(name: &str) -> String {
    let path = repository().expect("the repository").join("modules").join(name);
    path.display().to_string()
}

fn all_processes(lab: &Lab) -> BTreeMap<String, BTreeSet<String>> {
    lab.nodes
        .iter()
        .map(|node| (node.name().to_owned(), processes(node)))
        .collect()
}

/// Every node serves connections, and each connection is answered.
fn serves_from_all(lab: &Lab) {
    let report = lab.client.batch(Batch::new(WEB, 300)).expect("a batch");
    assert_eq!(report.lost(), 0, "{:?}", report.failures());
    assert_eq!(report.per_node().len(), lab.nodes.len(), "{:?}", report.per_node());
}

/// Stops `module` everywhere: the VIP is silent, and every process that came since `before` is gone.
fn stops_without_a_trace(lab: &Lab, module: &str, before: &BTreeMap<String, BTreeSet<String>>) {
    on_all(lab, &["stop", module]);
    for node in &lab.nodes {
        let left = processes(node);
        let left: Vec<_> = left.difference(&before[node.name()]).collect();
        assert!(left.is_empty(), "left on {}: {left:?}", node.name());
        let addrs = shell_ok(node, "ip -o -4 addr");
        assert!(!addrs.contains(&VIP.to_string()), "{addrs}");
    }
    let silent = lab.client.batch(Batch {
        limit: Duration::from_millis(400),
        ..Batch::new(WEB, 2)
    });
    assert_eq!(silent.expect("a batch").answered(), 0, "who serves a stopped farm?");
    let status = lab.nodes[0].farm(&["status", module]).expect("farm runs");
    assert_eq!(status.code, Some(i32::from(exit::STOPPED)), "{}", status.stdout);
}

fn edit_macro(node: &Node, module: &str, name: &str, value: &str) {
    let file = node.dirs().etc.join("modules").join(module).join("conf/userconfig.xml");
    let text = fs::read_to_string(&file).expect("it is installed");
    fs::write(&file, set_macro(&text, name, value).expect("it has the macro")).expect("it can be edited");
}

/// An nginx of the machine's own, as somebody may have it, and the command that starts it.
fn own_nginx(node: &Node, more: &str) -> String {
    let folder = node.nginx_dir();
    let conf = nginx_conf(&folder, node.name(), &["80".to_owned()]);
    write_file(&folder.join("nginx.conf"), &conf, 0o644).expect("a file");
    let at = folder.display();
    format!("/usr/sbin/nginx -p {at} -c {at}/nginx.conf -e {at}/error.log{more}")
}

#[test]
fn iis_farm_starts_serves_and_stops_the_services_it_is_given() {
    let lab = farm(3);
    let before = all_processes(&lab);
    for (node, more) in lab.nodes.iter().zip(["", " -g 'daemon off;'", ""]) {
        node.farm_ok(&["module", "install", &shipped("iis_farm")])
            .expect("it is installed");
        edit_macro(node, "iis_farm", "SERVICES", &own_nginx(node, more));
        node.farm_ok(&["config", "iis_farm"]).expect("it is right");
    }
    start(&lab, "iis_farm");
    serves_from_all(&lab);
    stops_without_a_trace(&lab, "iis_farm", &before);

    // Twice, because the second start meets what the first stop left.
    start(&lab, "iis_farm");
    serves_from_all(&lab);
    on_all(&lab, &["forcestop", "iis_farm"]);
    for node in &lab.nodes {
        let left = processes(node);
        let left: Vec<_> = left.difference(&before[node.name()]).collect();
        assert!(left.is_empty(), "left on {} by a forced stop: {left:?}", node.name());
    }
}

#[test]
fn iis_farm_names_the_service_that_cannot_start() {
    let lab = farm(1);
    let node = &lab.nodes[0];
    node.farm_ok(&["module", "install", &shipped("iis_farm")])
        .expect("it is installed");
    let services = format!("{}, no-such-service-4711", own_nginx(node, ""));
    edit_macro(node, "iis_farm", "SERVICES", &services);
    node.farm_ok(&["config", "iis_farm"]).expect("it is right");
    let before = processes(node);
    let failed = node.farm(&["start", "iis_farm"]).expect("farm runs");
    assert_eq!(failed.code, Some(i32::from(exit::FAILED)), "{failed:?}");
    let log = node.farm_ok(&["log", "iis_farm"]).expect("a log");
    mentions(&log, &["no-such-service-4711 (command) did not start"]);
    let left = processes(node);
    let left: Vec<_> = left.difference(&before).collect();
    assert!(left.is_empty(), "the first service was left running: {left:?}");
}

#[test]
fn nginx_farm_travels_as_a_safe_file_and_serves_its_own_site() {
    let lab = farm(3);
    let before = all_processes(&lab);
    let first = &lab.nodes[0];
    first
        .farm_ok(&["module", "install", &shipped("nginx_farm")])
        .expect("the folder is installed");
    let package: PathBuf = lab.base().join("nginx_farm.safe");
    let package = package.display().to_string();
    first
        .farm_ok(&["module", "package", "nginx_farm", &package])
        .expect("it is packaged");
    for node in &lab.nodes[1..] {
        node.farm_ok(&["module", "install", &package]).expect("it is installed");
    }
    on_all(&lab, &["config", "nginx_farm"]);
    start(&lab, "nginx_farm");

    // The shipped site answers with the node's name and nothing else.
    let addrs = lab.client.addrs().to_vec();
    let mut nodes = BTreeSet::new();
    let answers = lab
        .client
        .start(async move || {
            let mut answers = Vec::new();
            for source in addrs {
                let limit = Duration::from_secs(3);
                let answer = match Connection::open(source, WEB, limit).await {
                    Ok(connection) => connection.get_last("/", limit).await,
                    Err(failure) => Err(failure),
                };
                answers.push(answer);
            }
            answers
        })
        .expect("the client runs")
        .wait()
        .expect("the client ends");
    for answer in answers {
        nodes.insert(answer.expect("each connection is answered").trim().to_owned());
    }
    let names: BTreeSet<String> = lab.nodes.iter().map(|node| node.name().to_owned()).collect();
    assert_eq!(nodes, names);
    stops_without_a_trace(&lab, "nginx_farm", &before);
}

#[test]
fn demo_serves_from_all_nodes_and_stops() {
    let lab = farm(3);
    let before = all_processes(&lab);
    for node in &lab.nodes {
        node.farm_ok(&["module", "install", &shipped("demo")])
            .expect("it is installed");
        node.farm_ok(&["config", "demo"]).expect("it is right");
    }
    start(&lab, "demo");
    serves_from_all(&lab);
    stops_without_a_trace(&lab, "demo", &before);
}

#[test]
fn apache_farm_is_accepted_and_says_when_apache_is_missing() {
    let lab = farm(1);
    let node = &lab.nodes[0];
    let file = format!("{}/conf/userconfig.xml", shipped("apache_farm"));
    node.farm_ok(&["confcheck", &file]).expect("it is right");
    node.farm_ok(&["module", "install", &shipped("apache_farm")])
        .expect("it is installed");
    node.farm_ok(&["config", "apache_farm"]).expect("it is accepted");
    // A machine that has Apache plays one that has not.
    shell_ok(
        node,
        "[ ! -e /usr/sbin/apache2 ] || mount --bind /dev/null /usr/sbin/apache2",
    );
    let failed = node.farm(&["start", "apache_farm"]).expect("farm runs");
    assert_eq!(failed.code, Some(i32::from(exit::FAILED)), "{failed:?}");
    mentions(&format!("{}{}", failed.stdout, failed.stderr), &["start_both"]);
    let log = node.farm_ok(&["log", "apache_farm"]).expect("a log");
    mentions(&log, &["apache2 is not installed here: apt-get install apache2"]);
    let row = own_row(node, "apache_farm");
    assert_eq!(row.state, Some(ModuleState::Stop), "{row:?}");
    assert!(row.shares.iter().all(|share| share.buckets == 0), "{row:?}");
    mentions(&row.why, &["start_both"]);
}
