//! `farm-lab up`: a farm with nginx that stays until Ctrl-C, and the words that lead into it.

use std::time::Duration;

use anyhow::{Context, Result};
use farm_lab::{Lab, LabConfig, Mode, VIP, binaries};

use crate::screen::{Screen, picture_of};
use crate::stop;

/// Builds the farm and waits.
pub fn run(nodes: usize, mode: Mode, routed: bool) -> Result<bool> {
    let mut screen = Screen::new(1);
    screen.step("Build the farm");
    let lab = Lab::serve(LabConfig {
        nodes,
        routed,
        ..LabConfig::with_mode(mode)
    })?;
    screen.quote(&picture_of(&lab));
    println!("\nIt runs until Ctrl-C. In another terminal:");
    screen.quote(&hints(&lab)?);
    while stop::sleep(Duration::from_secs(3600)).is_ok() {}
    println!("\nEnding; nothing stays behind.");
    Ok(true)
}

/// How a person gets into the farm from another terminal.
pub fn hints(lab: &Lab) -> Result<String> {
    let node = lab.nodes.first().context("a lab has a node")?;
    let farm = binaries()?.join("farm");
    let client = lab.client.space().path();
    let mut text = format!("ask it          nsenter --net={client} curl -s http://{VIP}/who\n");
    if let Some(far) = &lab.far {
        text.push_str(&format!(
            "from far away   nsenter --net={} curl -s http://{VIP}/who\n",
            far.space().path()
        ));
    }
    text.push_str(&format!(
        "watch the wire  nsenter --net={} tcpdump -eni br0\n",
        lab.switch.path()
    ));
    text.push_str(&format!(
        "command it      export {}\n",
        node.environment().replace(' ', " \\\n                       ")
    ));
    text.push_str(&format!("                {} status\n", farm.display()));
    if let Some(init) = node.init_pid() {
        text.push_str(&format!(
            "be {}        nsenter --target {init} --net --pid --mount\n",
            node.name()
        ));
    }
    for node in &lab.nodes {
        if let Some(init) = node.init_pid() {
            text.push_str(&format!("cut {}'s power   kill -9 {init}\n", node.name()));
        }
    }
    Ok(text)
}
