//! Checkers: one probe after the other for each resource, and a word to the owner loop when the verdict changes.
//!
//! Owns the probing tasks while a module's application is supposed to run. Never decides what a verdict means:
//! hysteresis and timing are [`farm_core::check`]'s, reactions the module machine's. The owner loop starts a
//! [`CheckerSet`] when the machine asks for it and drops it to stop all probes.

mod tcp;

use farm_core::check::outcome::{Judge, JudgeConfig, Verdict};
use farm_core::config::TcpCheckerConfig;
use farm_core::id::ModuleName;
use tokio::runtime::Handle;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep_until};

use crate::event::{Event, EventSender};

/// All running checkers of one module; dropping it ends them.
#[derive(Debug)]
pub struct CheckerSet {
    tasks: Vec<JoinHandle<()>>,
}

impl CheckerSet {
    /// Begins to probe at once; each checker tells `events` its first verdict and every change.
    pub fn start(runtime: &Handle, module: &ModuleName, checkers: &[TcpCheckerConfig], events: &EventSender) -> Self {
        let tasks = checkers
            .iter()
            .map(|config| runtime.spawn(watch(module.clone(), config.clone(), events.clone())))
            .collect();
        Self { tasks }
    }
}

impl Drop for CheckerSet {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
    }
}

async fn watch(module: ModuleName, config: TcpCheckerConfig, events: EventSender) {
    let start = Instant::now();
    let judge_config = JudgeConfig {
        interval: config.interval,
        timeout: config.timeout,
        rise: config.rise,
        fall: config.fall,
    };
    let mut judge = Judge::new(judge_config, start.elapsed());
    loop {
        let begin = Instant::now();
        let result = tcp::probe((config.addr, config.port).into(), config.timeout).await;
        let success = result.is_ok();
        let detail = match result {
            Ok(detail) => detail,
            Err(error) => error.to_string(),
        };
        tracing::trace!(%module, ident = config.ident, success, detail, "probe");
        let changed = judge.handle_result(start.elapsed(), success);
        if let Some(verdict) = changed {
            events.send(Event::Checked {
                module: module.clone(),
                resource: format!("tcp.{}", config.ident),
                up: verdict == Verdict::Up,
                detail,
            });
        }
        sleep_until(begin + judge.next_probe_in()).await;
    }
}

#[cfg(test)]
mod tests;
