//! When service interfaces and tables are looked at: as soon as the kernel says that something of the kind has changed, and from time to time.

use std::io;
use std::time::Duration;

use farm_sys::change_socket::ChangeSocket;
use tokio::time::{Instant, Interval, MissedTickBehavior, interval, sleep_until};
use tracing::warn;

/// Where the kernel tells: only so that nothing is missed for good.
const CALM: Duration = Duration::from_secs(1);
/// Where it does not: a lost link moves the share in well under a second.
const ANXIOUS: Duration = Duration::from_millis(100);
/// Shortest time between two looks, whatever changes.
const REST: Duration = Duration::from_millis(20);

/// What there is to look at.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct News {
    /// nf_tables may have changed too.
    pub tables: bool,
}

/// See the module doc.
#[derive(Debug)]
pub struct Changes {
    links: Option<ChangeSocket>,
    tables: Option<ChangeSocket>,
    regular: Interval,
    /// What has not been looked at yet.
    news: Option<News>,
    rests_until: Instant,
}

impl Changes {
    /// Listens in the network namespace of the caller, within a runtime.
    pub fn listen() -> Self {
        let open = |socket: io::Result<ChangeSocket>| {
            socket
                .inspect_err(|error| warn!(%error, "looked at ten times a second instead"))
                .ok()
        };
        let (links, tables) = (open(ChangeSocket::links()), open(ChangeSocket::tables()));
        let all = links.is_some() && tables.is_some();
        let mut regular = interval(if all { CALM } else { ANXIOUS });
        regular.set_missed_tick_behavior(MissedTickBehavior::Skip);
        Self {
            links,
            tables,
            regular,
            news: None,
            rests_until: Instant::now(),
        }
    }

    /// Waits until there is something to look at. Nothing is lost if it is dropped before it is done.
    pub async fn next(&mut self) -> News {
        let news = match self.news {
            Some(news) => news,
            None => tokio::select! {
                () = told(self.links.as_ref()) => News { tables: false },
                () = told(self.tables.as_ref()) => News { tables: true },
                _ = self.regular.tick() => News { tables: false },
            },
        };
        self.news = Some(news);
        sleep_until(self.rests_until).await;
        self.rests_until = Instant::now() + REST;
        self.news = None;
        news
    }
}

/// Waits for a change, without end where there is no socket.
async fn told(socket: Option<&ChangeSocket>) {
    match socket {
        Some(socket) => socket.changed().await,
        None => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests {
    use farm_sys::netns::NetNs;
    use farm_sys::nft;
    use farm_sys::process::effective_uid;

    use super::*;

    #[test]
    fn a_change_is_told_at_once_and_the_next_one_after_a_rest() {
        let root = effective_uid() == 0;
        assert!(root || std::env::var_os("CI").is_none(), "this test needs root");
        if !root {
            eprintln!("skipped: needs root to make a network namespace");
            return;
        }
        NetNs::create().unwrap().run(|| {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            runtime.unwrap().block_on(async {
                let mut changes = Changes::listen();
                assert_eq!(changes.next().await, News { tables: false }, "the first look");
                // Only what is told counts here.
                changes.regular = interval(Duration::from_secs(3600));
                changes.regular.tick().await;
                nft::install("farm_lo", "lo", &[], false).unwrap();
                let told = Instant::now();
                assert_eq!(changes.next().await, News { tables: true });
                assert!(changes.rests_until >= told + REST, "it rests");
                // However busy the machine is, this rest is not over.
                changes.rests_until = Instant::now() + Duration::from_secs(3600);
                nft::remove("farm_lo").unwrap();
                // Given up in the middle, and nothing is lost.
                assert!(tokio::time::timeout(REST, changes.next()).await.is_err());
                changes.rests_until = Instant::now();
                assert_eq!(changes.next().await, News { tables: true });
                let more = tokio::time::timeout(REST * 5, changes.next()).await;
                assert!(more.is_err(), "there is no more");
            });
        });
    }
}
