//! What the farm is compared with, each as its own documentation builds it: HAProxy in front of the servers, and servers that share
//! an address by keepalived and iptables' `cluster` match.
//!
//! Owns their configuration and their processes, which end with the values. Never measures anything.

use std::fs;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::path::Path;
use std::process::{Child, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::bulk::{BULK_PORT, BulkServer};
use super::load::WEB_PORT;
use crate::client::Batch;
use crate::config::{LabConfig, VIP};
use crate::http::Connection;
use crate::module::{nginx_conf, write_file};
use crate::node::NODE_LINK;
use crate::process::{run_limited, spawn_kept, wait_until, with_parent_death};
use crate::{Lab, Space, add_host};

/// Where HAProxy listens.
pub const PROXY: Ipv4Addr = Ipv4Addr::new(198, 18, 0, 90);

/// The multicast Ethernet address that the servers of a cluster match share, as iptables-extensions(8) has it.
pub const CLUSTER_MAC: &str = "01:00:5e:12:00:14";

/// HAProxy on a host of its own in a lab's network, in front of the lab's nodes.
#[derive(Debug)]
pub struct Proxy {
    child: Child,
    _space: Space,
}

impl Proxy {
    /// Starts it, in TCP mode with two threads, and waits until it answers.
    ///
    /// # Errors
    /// It is not installed, or does not answer.
    pub fn start(lab: &Lab) -> Result<Self> {
        let space = add_host(lab, "proxy", "ph", PROXY)?;
        let file = lab.base().join("haproxy.cfg");
        let mut text = String::from(
            "global\n  nbthread 2\n  maxconn 8000\ndefaults\n  mode tcp\n  timeout connect 5s\n  timeout client 60s\n  timeout server 60s\n",
        );
        for port in [WEB_PORT, BULK_PORT] {
            text.push_str(&format!(
                "listen port{port}\n  bind {PROXY}:{port}\n  balance roundrobin\n"
            ));
            for node in &lab.nodes {
                text.push_str(&format!("  server {} {}:{port}\n", node.name(), node.addr()));
            }
        }
        fs::write(&file, text).with_context(|| format!("cannot write {}", file.display()))?;
        let mut command = with_parent_death("haproxy");
        let log_file = lab.base().join("haproxy.log");
        let log = fs::File::create(&log_file)?;
        command
            .args(["-db", "-f"])
            .arg(&file)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log);
        space.enter(&mut command);
        let child = spawn_kept(command).context("cannot start haproxy; is its package installed?")?;
        let proxy = Self { child, _space: space };
        let source = lab.client.addrs()[0];
        wait_until(Duration::from_secs(10), "HAProxy to answer", || {
            // Through a proxy the servers see the proxy's address, so this is not one of the lab's own checks.
            let get = async move || {
                let limit = Duration::from_secs(1);
                let to = SocketAddrV4::new(PROXY, WEB_PORT);
                let open = Connection::open(source, to, limit).await.ok()?;
                open.get_last("/who", limit).await.ok()
            };
            lab.client.start(get).ok()?.wait().ok()?
        })
        .with_context(|| fs::read_to_string(log_file).unwrap_or_default())?;
        Ok(proxy)
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Three servers that all get the frames for [`VIP`]: iptables keeps those whose client the `cluster` match deals to this server, and keepalived
/// says who has which third.
#[derive(Debug)]
pub struct Cluster {
    // Ended before the namespaces they are in.
    _bulk: Vec<BulkServer>,
    children: Vec<Child>,
    /// The servers and their client.
    pub lab: Lab,
}

impl Cluster {
    /// Builds it and waits until every client address is answered and every server has some.
    ///
    /// # Errors
    /// iptables or keepalived is not installed, the kernel has no `cluster` match, or not all of it works.
    pub fn start() -> Result<Self> {
        iptables_version()?;
        let lab = Lab::bare(LabConfig::default())?;
        let mut cluster = Self {
            _bulk: Vec::new(),
            children: Vec::new(),
            lab,
        };
        for index in 0..cluster.lab.nodes.len() {
            cluster.set_up(index)?;
        }
        cluster.lab.client.space().ip(&[format!(
            "neighbour replace {VIP} lladdr {CLUSTER_MAC} dev {NODE_LINK} nud permanent"
        )])?;
        // keepalived waits for three missing advertisements before each server takes its third.
        wait_until(Duration::from_secs(20), "all thirds to be served", || {
            let report = cluster.lab.client.batch(Batch {
                limit: Duration::from_millis(500),
                ..Batch::new((VIP, WEB_PORT), 48)
            });
            let report = report.ok()?;
            (report.lost() == 0 && report.per_node().len() == 3).then_some(())
        })
        .with_context(|| cluster.logs())?;
        Ok(cluster)
    }

    fn set_up(&mut self, index: usize) -> Result<()> {
        let node = &self.lab.nodes[index];
        let space = node.space();
        space.sysctl("net.ipv4.conf.all.arp_ignore", "1")?;
        space.sysctl("net.ipv4.conf.all.arp_announce", "2")?;
        // An ACK without a known connection is nobody's: a reply that another server's client gets must not become one.
        space.sysctl("net.netfilter.nf_conntrack_tcp_loose", "0")?;
        space.ip(&[
            format!("address add {VIP}/32 dev lo"),
            format!("maddress add {CLUSTER_MAC} dev {NODE_LINK}"),
        ])?;
        let folder = node.dirs().base.join("cluster");
        let script = folder.join("notify");
        write_file(&script, &notify_script(&folder), 0o755)?;
        let taken = run_limited(
            {
                let mut command = node.command(&script)?;
                command.args(["0", "BACKUP"]);
                command
            },
            Duration::from_secs(10),
        )?;
        if !taken.ok() {
            bail!(
                "iptables does not take the rules of the cluster match: {}",
                taken.stderr.trim()
            );
        }
        let nginx = node.nginx_dir();
        write_file(
            &nginx.join("nginx.conf"),
            &nginx_conf(&nginx, node.name(), &[WEB_PORT.to_string()]),
            0o644,
        )?;
        let path = |file: &Path| file.display().to_string();
        self.children.push(node.spawn(
            Path::new("nginx"),
            &[
                "-p",
                &path(&nginx),
                "-c",
                &path(&nginx.join("nginx.conf")),
                "-e",
                &path(&nginx.join("error.log")),
                "-g",
                "daemon off;",
            ],
        )?);
        let file = folder.join("keepalived.conf");
        write_file(&file, &keepalived_conf(index, &script), 0o644)?;
        self.children.push(node.spawn(
            Path::new("keepalived"),
            &[
                "--dont-fork",
                "--vrrp",
                "--log-console",
                "--dont-respawn",
                "--use-file",
                &path(&file),
                "--pid",
                &path(&folder.join("keepalived.pid")),
                "--vrrp_pid",
                &path(&folder.join("vrrp.pid")),
            ],
        )?);
        self._bulk.push(BulkServer::start(space)?);
        Ok(())
    }

    fn logs(&self) -> String {
        let logs = self.lab.nodes.iter();
        let logs = logs.map(|node| fs::read_to_string(node.dirs().base.join("log")));
        logs.map(Result::unwrap_or_default).collect()
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        for child in &mut self.children {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// What iptables(8) calls itself, with its back end.
///
/// # Errors
/// It is not installed.
pub fn iptables_version() -> Result<String> {
    let mut command = std::process::Command::new("iptables");
    command.arg("--version");
    let finished = run_limited(command, Duration::from_secs(5)).context("is the package iptables installed?")?;
    Ok(finished.stdout.trim().to_owned())
}

/// Rules of the cluster match for the thirds in `mask`, as iptables-restore(8) reads them; a mask of 0 keeps nothing.
pub fn cluster_rules(vip: Ipv4Addr, mask: u32) -> String {
    let keep = format!(
        "-A PREROUTING -i {NODE_LINK} -d {vip}/32 -m cluster --cluster-total-nodes 3 --cluster-local-nodemask {mask} \
         --cluster-hash-seed 0x5afe -j ACCEPT\n"
    );
    let keep = if mask == 0 { "" } else { &keep };
    format!("*mangle\n:PREROUTING ACCEPT [0:0]\n{keep}-A PREROUTING -i {NODE_LINK} -d {vip}/32 -j DROP\nCOMMIT\n")
}

/// keepalived calls it with a third, 1 to 3, and its state here; it puts the rules for all thirds of this server in force at once.
fn notify_script(folder: &Path) -> String {
    let rules: String = (0..8)
        .map(|mask| format!("  {mask}) cat <<'END' ;;\n{}END\n", cluster_rules(VIP, mask)))
        .collect();
    format!(
        "#!/bin/sh\nPATH=/usr/sbin:/sbin:$PATH\nDIR='{}'\nexec 9>\"$DIR/lock\"\nflock 9\n\
         case $2 in MASTER) : >\"$DIR/third$1\" ;; *) rm -f \"$DIR/third$1\" ;; esac\n\
         mask=0\nfor third in 1 2 3; do\n  [ ! -e \"$DIR/third$third\" ] || mask=$((mask | 1 << (third - 1)))\ndone\n\
         rules() {{\n  case $mask in\n{rules}  esac\n}}\nrules | iptables-restore\n",
        folder.display()
    )
}

/// Server `index` is the first choice for its own third, and a second for the others.
fn keepalived_conf(index: usize, script: &Path) -> String {
    let mut text = format!(
        "global_defs {{\n  router_id node{}\n  vrrp_version 3\n  script_user root\n}}\n",
        index + 1
    );
    for third in 1..=3 {
        let priority = if third == index + 1 { 200 } else { 100 - index };
        text.push_str(&format!(
            "vrrp_instance third{third} {{\n  state BACKUP\n  interface {NODE_LINK}\n  virtual_router_id {}\n  priority {priority}\n\
             \x20 advert_int 1\n  virtual_ipaddress {{\n    198.18.0.{}/32\n  }}\n",
            50 + third,
            21 + third
        ));
        for state in ["MASTER", "BACKUP", "FAULT"] {
            let when = state.to_lowercase();
            text.push_str(&format!("  notify_{when} \"{} {third} {state}\"\n", script.display()));
        }
        text.push_str("}\n");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_without_a_third_keep_nothing() {
        assert!(!cluster_rules(VIP, 0).contains("ACCEPT\n-A PREROUTING -i eth0 -d 198.18.0.20/32 -m"));
        let both = cluster_rules(VIP, 5);
        assert!(
            both.contains("--cluster-local-nodemask 5 ") && both.ends_with("-j DROP\nCOMMIT\n"),
            "{both}"
        );
    }

    #[test]
    fn each_server_is_the_first_choice_for_its_own_third() {
        for index in 0..3 {
            let text = keepalived_conf(index, Path::new("/x"));
            let own = text.split("vrrp_instance ").nth(index + 1).unwrap();
            assert!(own.contains("priority 200"), "{text}");
            assert_eq!(text.matches("priority 200").count(), 1);
        }
    }
}
