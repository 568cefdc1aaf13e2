//! The wish to end: Ctrl-C or SIGTERM, remembered for whoever is in the middle of something.
//!
//! The main thread is to notice within a few seconds; if it is stuck, the process ends anyway and takes all namespaces along.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use tokio::signal::unix::{SignalKind, signal};

static ASKED: AtomicBool = AtomicBool::new(false);

/// Begins to listen for the signals.
pub fn watch() {
    std::thread::spawn(|| {
        let Ok(runtime) = tokio::runtime::Builder::new_current_thread().enable_all().build() else {
            return;
        };
        runtime.block_on(async {
            let (Ok(mut interrupt), Ok(mut terminate)) =
                (signal(SignalKind::interrupt()), signal(SignalKind::terminate()))
            else {
                return;
            };
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
            }
            ASKED.store(true, Ordering::Relaxed);
            tokio::time::sleep(Duration::from_secs(5)).await;
            farm_lab::clean_up();
            std::process::exit(130);
        });
    });
}

/// True once a signal came.
pub fn asked() -> bool {
    ASKED.load(Ordering::Relaxed)
}

/// An error once a signal came; for the seams between two steps.
pub fn check() -> Result<()> {
    if asked() { bail!("ended by a signal") } else { Ok(()) }
}

/// Sleeps, but not past a signal.
pub fn sleep(pause: Duration) -> Result<()> {
    let end = Instant::now() + pause;
    while Instant::now() < end {
        check()?;
        std::thread::sleep(Duration::from_millis(20).min(pause));
    }
    Ok(())
}
