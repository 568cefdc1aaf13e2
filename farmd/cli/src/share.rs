//! `farm drain`, `undrain` and `weight`; and `--on NODE`, which has other nodes do what a verb says.
//!
//! Decides nothing about shares: the daemon of the node concerned does. The daemon here passes requests on, so no key is
//! needed.

use farm_core::api::{DrainRequest, Reply, ShareScope, UndrainRequest, WeightRequest, exit};
use serde::Serialize;
use serde_json::json;

use crate::args::{ClusterVerb, DrainArgs, UndrainArgs, Verb, WeightArgs};
use crate::client::Client;
use crate::command::{Steps, known};
use crate::failure::Failure;
use crate::folders::Context;
use crate::terminal::{show, show_json};

/// Runs `drain`.
pub fn drain(context: &Context, args: &DrainArgs) -> Result<u8, Failure> {
    let request = DrainRequest {
        scope: scope(context, args.group.as_ref())?,
        timeout_ms: u64::try_from(args.timeout.as_millis()).unwrap_or(u64::MAX),
        force: args.force,
        wait: !args.no_wait,
    };
    send(&at(context, args.node.as_deref())?, "drain", &request)
}

/// Runs `undrain`.
pub fn undrain(context: &Context, args: &UndrainArgs) -> Result<u8, Failure> {
    let scope = scope(context, args.group.as_ref())?;
    send(
        &at(context, args.node.as_deref())?,
        "undrain",
        &UndrainRequest { scope },
    )
}

/// Runs `weight`.
pub fn weight(context: &Context, args: &WeightArgs) -> Result<u8, Failure> {
    let request = WeightRequest {
        scope: scope(context, args.group.as_ref())?,
        weight: args.weight.0,
        force: args.force,
    };
    send(&at(context, Some(&args.node))?, "weight", &request)
}

fn scope(context: &Context, group: Option<&String>) -> Result<ShareScope, Failure> {
    Ok(ShareScope {
        module: context.module_if_any(None)?.map(String::from),
        group: group.cloned(),
    })
}

/// `context` with the node that the argument names.
fn at(context: &Context, node: Option<&str>) -> Result<Context, Failure> {
    match (node, context.node.as_deref()) {
        (Some(named), Some(on)) if named != on => Err(Failure::usage(format!(
            "two nodes are named: `{named}` and, with --on, `{on}`"
        ))),
        (Some(named), _) => on(context, named),
        (None, _) => Ok(context.clone()),
    }
}

/// `context` with another node, whose name must be one.
fn on(context: &Context, node: &str) -> Result<Context, Failure> {
    let fits = |c: char| c.is_alphanumeric() || "-_.".contains(c);
    if node.is_empty() || !node.chars().all(fits) {
        return Err(Failure::usage(format!(
            "`{node}` is no node's name; cluster.xml has them"
        )));
    }
    Ok(context.on(node))
}

fn send(context: &Context, verb: &str, request: &impl Serialize) -> Result<u8, Failure> {
    let client = Client::new(context)?;
    let steps = Steps::new(context);
    let reply = client.post(&format!("/v1/{verb}"), request, |text| steps.add(text))?;
    let steps = steps.into_texts()?;
    let node = context.node.as_deref();
    match reply {
        Reply::Failed { error, code } => Err(Failure::new(
            known(code),
            match node {
                Some(node) => format!("{verb} {node}: {error}"),
                None => format!("{verb}: {error}"),
            },
        )
        .with("node", node)
        .with("verb", verb)
        .with("steps", steps)),
        Reply::Done { text } | Reply::Progress { text } => {
            if context.json {
                show_json(&json!({ "node": node, "verb": verb, "text": text, "steps": steps }))?;
            } else {
                let node = node.map_or_else(String::new, |node| format!("{node}: "));
                show(&format!("{node}{text}\n"))?;
            }
            Ok(exit::OK)
        }
    }
}

/// Has each of `nodes` do `verb`, one after the other, and goes on after a failure. Returns the first exit code that is not 0.
///
/// # Errors
/// If the verb is one of this node's files only, or the names of all nodes cannot be had.
pub fn on_nodes(
    context: &Context,
    nodes: &[String],
    verb: &Verb,
    perform: fn(&Context, &Verb) -> Result<u8, Failure>,
) -> Result<u8, Failure> {
    if !works_on_nodes(verb) {
        return Err(Failure::usage(
            "--on is for commands to a module, drain, undrain, weight, status, history, why, map, flows, trace, cluster state, reload \
             and shutdown; this one works on this node's own files",
        ));
    }
    if nodes.iter().any(|name| name.trim().is_empty()) {
        return Err(Failure::usage(format!(
            "--on {}: the name of a node is expected before and after each comma",
            nodes.join(",")
        )));
    }
    let known: Vec<String> = Client::new(context)?
        .cluster()?
        .nodes
        .into_iter()
        .map(|node| node.name)
        .collect();
    let nodes = named(nodes, known)?;
    if let [node] = &nodes[..] {
        return perform(&on(context, node)?, verb);
    }
    if matches!(verb, Verb::Trace(_)) {
        return Err(Failure::usage(
            "trace shows the frames of one node at a time: name one with -H",
        ));
    }
    let mut code = exit::OK;
    for node in &nodes {
        if !context.json {
            show(&format!("{node}:\n"))?;
        }
        let ended = match on(context, node).and_then(|there| perform(&there, verb)) {
            Ok(ended) => ended,
            Err(failure) => crate::report("farm", context.json, &failure),
        };
        if code == exit::OK {
            code = ended;
        }
    }
    Ok(code)
}

/// The nodes that `words` mean, of those that are `known`; `*` means all.
///
/// # Errors
/// The first name that is none of theirs: then nothing is done on the others either.
fn named(words: &[String], known: Vec<String>) -> Result<Vec<String>, Failure> {
    if let Some(unknown) = words.iter().find(|word| *word != "*" && !known.contains(word)) {
        return Err(Failure::new(
            exit::NOT_FOUND,
            format!("there is no node {unknown}; cluster.xml has {}", known.join(", ")),
        ));
    }
    Ok(if words.iter().any(|word| word == "*") {
        known
    } else {
        words.to_vec()
    })
}

fn works_on_nodes(verb: &Verb) -> bool {
    match verb {
        Verb::Start(_)
        | Verb::Stop(_)
        | Verb::Restart(_)
        | Verb::Stopstart(_)
        | Verb::Forcestop(_)
        | Verb::Drain(_)
        | Verb::Undrain(_)
        | Verb::Weight(_)
        | Verb::Status(_)
        | Verb::Waitstart(_)
        | Verb::Waitstop(_)
        | Verb::Waitstate(_)
        | Verb::Config(_)
        | Verb::Deconfig(_)
        | Verb::Cluster(ClusterVerb::State)
        | Verb::Reload
        | Verb::Shutdown
        | Verb::Printi(_)
        | Verb::Printe(_)
        | Verb::Set(_)
        | Verb::Get(_)
        | Verb::History(_)
        | Verb::Why(_)
        | Verb::Map(_)
        | Verb::Flows(_)
        | Verb::Trace(_) => true,
        Verb::RollingRestart(_)
        | Verb::Confcheck(_)
        | Verb::Log(_)
        | Verb::Module(_)
        | Verb::Cluster(ClusterVerb::Genkey { .. } | ClusterVerb::Confcheck { .. })
        | Verb::Snapshot(_)
        | Verb::Cleanup
        | Verb::DemoServer(_) => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::folders::test::{Folder, context};

    #[test]
    fn a_node_named_twice_must_be_the_same() {
        let here = context(&Folder("/nowhere".into()));
        assert_eq!(at(&here, None).unwrap().node, None);
        assert_eq!(at(&here, Some("s2")).unwrap().node.as_deref(), Some("s2"));
        assert_eq!(at(&here.on("s2"), None).unwrap().node.as_deref(), Some("s2"));
        assert!(at(&here, Some("a b/c")).unwrap_err().text.contains("no node's name"));
        assert!(at(&here.on("s1"), Some("s2")).unwrap_err().text.contains("two nodes"));
    }

    #[test]
    fn a_verb_of_this_nodes_files_is_refused_before_anything_is_asked() {
        let here = context(&Folder("/nowhere".into()));
        let never = |_: &Context, _: &Verb| -> Result<u8, Failure> { panic!("performed") };
        let failure = on_nodes(&here, &["s2".to_owned()], &Verb::Cleanup, never).unwrap_err();
        assert_eq!(failure.code, exit::USAGE);
        let empty = ["s1".to_owned(), String::new()];
        let failure = on_nodes(&here, &empty, &Verb::Reload, never).unwrap_err();
        assert_eq!(failure.code, exit::USAGE, "{}", failure.text);
    }

    #[test]
    fn one_name_that_is_none_is_refused_before_anything_is_done() {
        let names = |words: &[&str]| words.iter().map(|w| (*w).to_owned()).collect::<Vec<_>>();
        let known = || names(&["s1", "s2"]);
        assert_eq!(named(&names(&["s2"]), known()).unwrap(), ["s2"]);
        assert_eq!(named(&names(&["*"]), known()).unwrap(), ["s1", "s2"]);
        for words in [&["s9", "s2"][..], &["s2", "s9"], &["*", "s9"]] {
            let failure = named(&names(words), known()).unwrap_err();
            assert_eq!(failure.code, exit::NOT_FOUND);
            assert!(failure.text.contains("no node s9") && failure.text.contains("s1, s2"));
        }
    }
}
