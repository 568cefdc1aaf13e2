//! `farm reload`: the daemon is restarted in place. Owns the waiting: the one that was asked cannot tell that the next one serves.

use std::time::{Duration, Instant};

use farm_core::api::{FarmStatus, Reply, exit};
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
/// If the daemon refuses, or the next one does not serve in time.
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
    while begun.elapsed() < BACK_LIMIT {
        if let Ok(status) = client.status()
            && status.cluster.incarnation > before.cluster.incarnation
        {
            match serving.iter().find(|module| !is_back(&status, module)) {
                Some(module) => missing = format!("{module} is not ready"),
                None => {
                    let ms = begun.elapsed().as_millis();
                    return Ok(format!("farmd has been restarted in place and serves, after {ms} ms"));
                }
            }
        }
        std::thread::sleep(LOOK_EVERY);
    }
    let text = format!(
        "{missing}, {} s after farmd was restarted; see farm status and its log",
        BACK_LIMIT.as_secs()
    );
    Err(Failure::new(exit::FAILED, text))
}

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
