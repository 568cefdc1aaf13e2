//! Answers to questions about single buckets and connections: `farm why`, `farm map`, `farm flows`.
//!
//! Works on a [`Sight`] that the owner loop has handed out, and asks the kernel for connections on threads of its own, so that no heartbeat
//! waits for an answer however many connections there are. Changes nothing. Called by the route table ([`crate::control`]).

pub mod flows;
pub mod map;
#[cfg(test)]
mod test_sight;
pub mod why;

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;

use farm_core::api::history::HistoryEntry;
use farm_core::api::{ModuleState, NodeModuleStatus, Quality};
use farm_core::balance::plan::Plan;
use farm_core::config::ModuleConfig;
use farm_core::id::{ModuleName, NodeId};
use tokio::sync::oneshot;
use tracing::debug;

/// How far the threads that ask the kernel stand behind ordinary ones: packets come first.
const NICE: i8 = 5;

/// What one node knows at one moment.
#[derive(Debug)]
pub struct Sight {
    /// This node.
    pub this: NodeId,
    /// Names of all nodes, by [`NodeId`].
    pub nodes: Vec<String>,
    /// The newest plan of the data plane.
    pub plan: Arc<Plan>,
    /// Module and group of each position in it.
    pub groups: Vec<(ModuleName, usize)>,
    /// Modules that are configured here.
    pub modules: Vec<ModuleSight>,
    /// The entry of the history that brought the bucket asked for.
    pub since: Option<Arc<HistoryEntry>>,
}

/// One module.
#[derive(Debug)]
pub struct ModuleSight {
    /// Its name.
    pub name: ModuleName,
    /// Its configuration.
    pub config: Arc<ModuleConfig>,
    /// It on each node, by [`NodeId`].
    pub nodes: Vec<NodeModuleStatus>,
    /// Its groups, in order.
    pub groups: Vec<GroupSight>,
}

/// One group.
#[derive(Debug)]
pub struct GroupSight {
    /// Number of the map in force here.
    pub map: u64,
    /// Weights of those that take part, with what they say of themselves.
    pub weights: BTreeMap<NodeId, (u16, String)>,
}

impl Sight {
    /// A node's name.
    pub fn name(&self, node: NodeId) -> String {
        self.nodes.get(node.index()).map_or("?", String::as_str).to_owned()
    }

    /// The module at `name`.
    pub fn module(&self, name: &str) -> Option<&ModuleSight> {
        self.modules.iter().find(|module| module.name.as_str() == name)
    }

    /// Module and name of the group at `position` of the plan.
    pub fn group_name(&self, position: usize) -> (String, String) {
        let Some((module, index)) = self.groups.get(position) else {
            return ("?".to_owned(), "?".to_owned());
        };
        let sight = self.modules.iter().find(|m| m.name == *module);
        let group = sight.and_then(|m| m.group_name(*index)).unwrap_or("?");
        (module.to_string(), group.to_owned())
    }
}

impl ModuleSight {
    /// Names of its groups, in order.
    pub fn group_names(&self) -> impl Iterator<Item = &str> {
        let groups = self.config.vip.iter().flat_map(|vip| &vip.groups);
        groups.map(|group| group.name.as_str())
    }

    /// Name of the group at `index`.
    pub fn group_name(&self, index: usize) -> Option<&str> {
        self.group_names().nth(index)
    }

    /// It on `node`.
    pub fn on(&self, node: NodeId) -> Option<&NodeModuleStatus> {
        self.nodes.get(node.index())
    }

    /// Nodes that serve their share of it.
    pub fn serving(&self) -> Vec<String> {
        let serves = |n: &&NodeModuleStatus| {
            (n.state, n.quality) == (Some(ModuleState::Up), Some(Quality::Ready)) && n.why.is_empty()
        };
        self.nodes.iter().filter(serves).map(|n| n.node.clone()).collect()
    }

    /// What to do on a node that knows nothing of it, in words; `command` is what to ask elsewhere.
    fn ask_elsewhere(&self, command: &str) -> String {
        match self.serving().first() {
            Some(node) => format!("ask a node that serves: farm -H {node} {command}"),
            None => "no node serves it".to_owned(),
        }
    }
}

/// Has `work` done on a thread of its own.
///
/// # Errors
/// What the system says if there is no thread.
pub(crate) async fn aside<T: Send + 'static>(
    name: &str,
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    let (answer, answered) = oneshot::channel();
    let run = move || {
        if let Err(error) = farm_sys::sched::set_nice(NICE) {
            debug!(%error, "a question to the kernel keeps its ordinary share of the processors");
        }
        // Whoever asked may have gone.
        let _ = answer.send(work());
    };
    std::thread::Builder::new().name(name.to_owned()).spawn(run)?;
    let ended = |_| io::Error::other("the thread that asks the kernel has ended without an answer");
    answered.await.map_err(ended)?
}
