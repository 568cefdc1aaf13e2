//! `farm cleanup`: undo what a killed daemon left on this host (devices, addresses, sysctls, filters).
//!
//! farmd knows what it changes, so farmd undoes it: this runs the `farmd cleanup` beside this program, or the one on the
//! search path, after making sure that no daemon is using what would be removed.

use std::path::PathBuf;
use std::process::Command;

use farm_core::api::exit;
use serde_json::json;

use crate::client::Client;
use crate::failure::Failure;
use crate::folders::Context;
use crate::terminal::{show, show_json};

/// Runs `farm cleanup`.
pub fn run(context: &Context) -> Result<u8, Failure> {
    if Client::new(context)?.answers() {
        let text = format!(
            "farmd is running (it answers on {}); stop it first: systemctl stop farmd",
            context.socket().display()
        );
        return Err(Failure::new(exit::REFUSED, text));
    }
    let program = farmd();
    let output = Command::new(&program)
        .arg("cleanup")
        .env("FARM_ETC", &context.etc)
        .env("FARM_VAR", &context.var)
        .env("FARM_RUN", &context.run)
        .output()
        .map_err(|e| Failure::new(exit::IO, format!("{} cannot be run: {e}", program.display())))?;
    let mut text = String::from_utf8_lossy(&output.stdout).into_owned();
    text.push_str(&String::from_utf8_lossy(&output.stderr));
    let text = text.trim_end();
    if !output.status.success() {
        let text = if text.is_empty() { "no output" } else { text };
        return Err(Failure::new(
            exit::FAILED,
            format!("farmd cleanup did not do all ({}): {text}", output.status),
        ));
    }
    if context.json {
        show_json(&json!({ "output": text.lines().collect::<Vec<_>>() }))?;
    } else if text.is_empty() {
        show("farmd cleanup is done\n")?;
    } else {
        show(&format!("{text}\n"))?;
    }
    Ok(exit::OK)
}

/// The daemon's program that belongs to this one.
fn farmd() -> PathBuf {
    let beside = std::env::current_exe().ok().map(|this| this.with_file_name("farmd"));
    beside
        .filter(|path| path.is_file())
        .unwrap_or_else(|| PathBuf::from("farmd"))
}
