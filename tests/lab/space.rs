//! One network namespace of the lab, and the links between them.
//!
//! Owns namespaces (held by a descriptor, so they vanish with the process) and runs iproute2 inside them: lab code may,
//! product code may not. Never touches the namespace the lab itself was started in.

use std::io::Write;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use farm_sys::netns::NetNs;

use crate::process::run;

/// A network namespace with a name for messages.
#[derive(Debug)]
pub struct Space {
    name: String,
    ns: NetNs,
}

impl Space {
    /// Makes an empty namespace with its loopback interface up. Needs root, or a user namespace in which we are.
    pub fn create(name: &str) -> Result<Self> {
        let ns = NetNs::create().with_context(|| {
            format!("cannot make the network namespace `{name}`: root is needed, or `unshare -Urnm --map-root-user`")
        })?;
        Ok(Self {
            name: name.to_owned(),
            ns,
        })
    }

    /// Name for messages: `sw`, `node1`, `client`…
    pub fn name(&self) -> &str {
        &self.name
    }

    /// A path by which other processes enter this namespace as long as the lab runs (`nsenter --net=PATH`).
    pub fn path(&self) -> String {
        self.ns.path().display().to_string()
    }

    /// Makes `command` run in this namespace.
    pub fn enter(&self, command: &mut Command) {
        self.ns.command(command);
    }

    /// A command that will run in this namespace.
    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        self.enter(&mut command);
        command
    }

    /// Runs `work` on a thread inside this namespace and waits for it; sockets it opens belong to the namespace for good.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        self.ns.run(work)
    }

    /// Runs ip(8) lines in one batch.
    pub fn ip(&self, lines: &[impl AsRef<str>]) -> Result<()> {
        self.batch("ip", &["-batch", "-"], &join(lines))
    }

    /// Runs nft(8) text.
    pub fn nft(&self, text: &str) -> Result<()> {
        self.batch("nft", &["-f", "-"], text)
    }

    /// Runs iptables-restore(8) text, which replaces the tables that it names.
    pub fn iptables(&self, text: &str) -> Result<()> {
        self.batch("iptables-restore", &[], text)
    }

    /// Writes a sysctl of this namespace, e.g. `net.ipv4.ip_forward`.
    pub fn sysctl(&self, key: &str, value: &str) -> Result<()> {
        let path = format!("/proc/sys/{}", key.replace('.', "/"));
        self.run(|| std::fs::write(&path, value))
            .with_context(|| format!("cannot write {path}"))
    }

    /// Hardware address of `link` as text, `aa:bb:cc:dd:ee:ff`.
    pub fn mac(&self, link: &str) -> Result<String> {
        let shown = run(self.command("ip").args(["-o", "link", "show", "dev", link]))?;
        let mac = shown.split_whitespace().skip_while(|word| *word != "link/ether").nth(1);
        mac.map(str::to_owned)
            .with_context(|| format!("`{link}` in {} has no Ethernet address: {shown}", self.name))
    }

    fn batch(&self, program: &str, args: &[&str], text: &str) -> Result<()> {
        let mut child = self
            .command(program)
            .args(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot start {program}; is its package installed?"))?;
        if let Some(mut stdin) = child.stdin.take() {
            // A program that refuses its input early closes the pipe; its own message says more than ours would.
            let _ = stdin.write_all(text.as_bytes());
        }
        let output = child.wait_with_output()?;
        if !output.status.success() {
            bail!(
                "{program} in {}: {}\n{text}",
                self.name,
                String::from_utf8_lossy(&output.stderr).trim()
            );
        }
        Ok(())
    }
}

fn join(lines: &[impl AsRef<str>]) -> String {
    lines.iter().map(|line| format!("{}\n", line.as_ref())).collect()
}

/// Joins two namespaces by a veth pair: `a_link` in `a`, `b_link` in `b`, both up.
pub fn connect(a: &Space, a_link: &str, b: &Space, b_link: &str) -> Result<()> {
    a.ip(&[format!(
        "link add {a_link} type veth peer name {b_link} netns {}",
        b.path()
    )])?;
    a.ip(&[format!("link set {a_link} up")])?;
    b.ip(&[format!("link set {b_link} up")])
}
