//! `farm reload`: the daemon is restarted in place. Owns the waiting: the one that was asked cannot tell that the next one serves.

use std::time::{Duration, Instant};

use farm_core::api::{ClusterStatus, FarmStatus, NodeModuleStatus, PeerStatus, Reply, exit};
use serde_json::json;

use crate::client::{Client, ClientError};
use crate::command::{Steps, known};
use crate::failure::Failure;
use crate::folders::Context;
use crate::status::{is_drained, is_ready};
use crate::terminal::{show, show_json};

/// How long the next daemon may take until it serves as the one before.
const BACK_LIMIT: Duration = Duration::from_secs(30);
/// Time between two looks.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// So long must the next daemon say the same that keeps it from serving: while it joins it cannot know all.
const CERTAIN: Duration = Duration::from_secs(2);
/// How long the nodes that were alive before may take until they are so again, once the daemon serves.
const PEERS_LIMIT: Duration = Duration::from_secs(3);

/// Runs `reload`.
pub fn run(context: &Context) -> Result<u8, Failure> {
    let steps = Steps::new(context);
    let text = restart(&Client::new(context)?, &steps)?;
    let steps = steps.into_texts()?;
    if context.json {
        show_json(&json!({ "verb": "reload", "text": text, "steps": steps }))?;
    } else {
        show(&format!("{text}\n"))?;
    }
    Ok(exit::OK)
}

/// Restarts the daemon that `client` speaks to and waits until the next one serves what this one did; returns what to say.
///
/// # Errors
/// If the daemon refuses, if the next one does not serve in time or says that it cannot, and if it serves and a node that was alive before
/// cannot prove itself to it any more: then both sides serve.
pub fn restart(client: &Client, steps: &Steps) -> Result<String, Failure> {
    let before = client.status()?;
    let serving = serving(&before);
    let begun = Instant::now();
    match client.post("/v1/reload", &json!({}), |text| steps.add(text)) {
        Ok(Reply::Failed { error, code }) => return Err(Failure::new(known(code), error)),
        // The daemon may be gone before its last word has come.
        Ok(Reply::Done { .. } | Reply::Progress { .. }) | Err(ClientError::NoAnswer { .. }) => {}
        Err(error) => return Err(error.into()),
    }
    let mut missing = "the new farmd does not answer".to_owned();
    let mut hopeless: Option<(String, Instant)> = None;
    let mut served: Option<(Instant, String)> = None;
    while begun.elapsed() < BACK_LIMIT {
        if let Ok(status) = client.status()
            && status.cluster.incarnation > before.cluster.incarnation
        {
            let cannot = cannot_serve(&status, &serving);
            hopeless = cannot.map(|why| match hopeless.take() {
                Some((same, since)) if same == why => (same, since),
                _ => (why, Instant::now()),
            });
            if let Some((why, _)) = hopeless.as_ref().filter(|(_, since)| since.elapsed() >= CERTAIN) {
                let text = format!("farmd has been restarted in place and does not serve: {why}");
                return Err(Failure::new(exit::FAILED, text));
            }
            match serving.iter().find(|module| !is_back(&status, module)) {
                Some(module) => missing = format!("{module} is not ready"),
                None if hopeless.is_some() => {}
                None => {
                    let (since, text) = served.get_or_insert_with(|| {
                        let ms = begun.elapsed().as_millis();
                        let text = format!("farmd has been restarted in place and serves, after {ms} ms");
                        (Instant::now(), text)
                    });
                    let lost = lost(&before.cluster, &status.cluster);
                    if let Some(peer) = lost.iter().find(|peer| peer.why.contains(NOT_AUTHENTIC)) {
                        let text = format!(
                            "{text}, but {} is no longer one farm with it, and both may serve: {}; make the files equal, then farm reload",
                            peer.name, peer.why
                        );
                        return Err(Failure::new(exit::FAILED, text));
                    }
                    if lost.is_empty() {
                        return Ok(text.clone());
                    }
                    if since.elapsed() >= PEERS_LIMIT {
                        let lost: Vec<String> = lost.iter().map(|p| format!("{} is {}", p.name, p.state)).collect();
                        return Ok(format!("{text}; {}", lost.join(", ")));
                    }
                }
            }
        }
        std::thread::sleep(LOOK_EVERY);
    }
    if let Some((_, text)) = served {
        return Ok(text);
    }
    let text = format!(
        "{missing}, {} s after farmd was restarted; see farm status and its log",
        BACK_LIMIT.as_secs()
    );
    Err(Failure::new(exit::FAILED, text))
}

/// What a daemon says of a node whose heartbeats it cannot take for authentic.
const NOT_AUTHENTIC: &str = "are not authentic";

/// Nodes that were alive for the daemon `before` and are not for the one `now`.
fn lost<'a>(before: &ClusterStatus, now: &'a ClusterStatus) -> Vec<&'a PeerStatus> {
    let was_alive = |name: &str| before.nodes.iter().any(|p| p.name == name && p.state == "alive");
    let lost = |p: &&PeerStatus| !matches!(p.state.as_str(), "alive" | "this") && was_alive(&p.name);
    now.nodes.iter().filter(lost).collect()
}

/// Why the node that answers cannot serve one of the modules `serving` until an administrator does something: it has stepped out, or is kept
/// out. `None` if it is only on its way.
fn cannot_serve(status: &FarmStatus, serving: &[String]) -> Option<String> {
    let own = status.cluster.nodes.iter().find(|p| p.name == status.node);
    if let Some(own) = own.filter(|own| !own.why.is_empty()) {
        return Some(format!("stepped out: {}", own.why));
    }
    let modules = status.modules.iter().filter(|m| serving.contains(&m.name));
    let mut rows = modules.flat_map(|m| m.nodes.iter().map(move |row| (m, row)));
    let out = |row: &NodeModuleStatus| row.node == status.node && OUT.iter().any(|word| row.why.starts_with(word));
    let (module, row) = rows.find(|(_, row)| out(row))?;
    Some(format!("{}: {}", module.name, row.why))
}

/// How the reason begins of a node that does not serve although its application runs.
const OUT: [&str; 2] = ["stepped out", "kept out"];

/// Modules that serve on the node that answers.
fn serving(status: &FarmStatus) -> Vec<String> {
    let serves =
        |row: &&farm_core::api::NodeModuleStatus| row.node == status.node && (is_ready(row) || is_drained(row));
    let modules = status.modules.iter().filter(|m| m.nodes.iter().any(|row| serves(&row)));
    modules.map(|m| m.name.clone()).collect()
}

fn is_back(status: &FarmStatus, module: &str) -> bool {
    serving(status).iter().any(|name| name == module)
}

#[cfg(test)]
mod tests {
    use farm_core::api::{API_VERSION, HeartbeatStatus, ModuleState, ModuleStatus, Quality};

    use super::*;

    fn peer(name: &str, state: &str, why: &str) -> PeerStatus {
        PeerStatus {
            name: name.into(),
            addrs: Vec::new(),
            state: state.into(),
            since_ms: 0,
            heard_ms: None,
            why: why.into(),
            incarnation: 1,
            uptime_ms: None,
            links: Vec::new(),
        }
    }

    /// The answer of s1, which says of itself that it is UP Ready, but for `why`.
    fn status(why: &str, peers: Vec<PeerStatus>) -> FarmStatus {
        let row = NodeModuleStatus {
            node: "s1".into(),
            state: Some(ModuleState::Up),
            quality: Some(Quality::Ready),
            shares: Vec::new(),
            why: why.into(),
            age_ms: 0,
        };
        FarmStatus {
            version: API_VERSION,
            node: "s1".into(),
            modules: vec![ModuleStatus {
                name: "web".into(),
                vips: Vec::new(),
                dataplane: String::new(),
                dataplane_why: String::new(),
                nodes: vec![row],
                resources: Default::default(),
                configured: true,
            }],
            cluster: ClusterStatus {
                node: "s1".into(),
                digest: String::new(),
                view: Vec::new(),
                coordinator: None,
                nodes: peers,
                plan_version: 1,
                incarnation: 1,
                heartbeat: HeartbeatStatus::default(),
            },
            warnings: Vec::new(),
        }
    }

    #[test]
    fn only_what_an_administrator_must_mend_ends_the_waiting() {
        let serving = ["web".to_owned()];
        let cannot = |why: &str| cannot_serve(&status(why, vec![peer("s1", "this", "")]), &serving);
        assert_eq!(cannot(""), None);
        assert_eq!(cannot("joining: listening for the others"), None);
        assert_eq!(cannot("no share yet: the hand-over is under way"), None);
        assert_eq!(cannot("kept out: another").as_deref(), Some("web: kept out: another"));
        assert_eq!(cannot_serve(&status("kept out: another", Vec::new()), &[]), None);
        let fenced = status("", vec![peer("s1", "this", "cluster.xml differs")]);
        assert_eq!(
            cannot_serve(&fenced, &[]).as_deref(),
            Some("stepped out: cluster.xml differs")
        );
    }

    #[test]
    fn nodes_that_were_alive_and_are_not_are_missed() {
        let cluster = |peers| status("", peers).cluster;
        let before = cluster(vec![
            peer("s1", "this", ""),
            peer("s2", "alive", ""),
            peer("s3", "alive", ""),
            peer("s4", "down", ""),
        ]);
        let strange = "heartbeats from its address are not authentic: its cluster.key differs from the one here";
        let now = cluster(vec![
            peer("s1", "this", ""),
            peer("s2", "alive", ""),
            peer("s3", "down", strange),
            peer("s4", "down", ""),
        ]);
        let lost = lost(&before, &now);
        assert_eq!(lost.iter().map(|p| p.name.as_str()).collect::<Vec<_>>(), ["s3"]);
        assert!(lost[0].why.contains(NOT_AUTHENTIC));
    }
}
