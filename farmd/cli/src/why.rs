//! `farm why`: who answers a client, and why, as one node sees it.
//!
//! Asks farmd, which decides; here the answer is laid out, one fact a line.

use std::net::SocketAddr;
use std::time::{SystemTime, UNIX_EPOCH};

use farm_core::api::history::HistoryEntry;
use farm_core::api::why::{BucketWord, Why, WhyBucket, WhyVerdict};
use farm_core::api::why_text::dealt_by;
use farm_core::api::{ModuleState, Quality, exit};
use farm_core::module::logline::escape;

use crate::args::look::{Transport, WhyArgs};
use crate::client::Client;
use crate::failure::Failure;
use crate::folders::Context;
use crate::terminal::{Paint, Style, age, show, show_json, wrap};

/// Where values begin: behind the widest label.
const HANG: usize = 14;

/// Runs `farm why`.
pub fn run(context: &Context, args: &WhyArgs) -> Result<u8, Failure> {
    let mut why: Why = Client::new(context)?.get(&path(args))?;
    if let Some(node) = knows(&why).filter(|_| context.node.is_none()) {
        match Client::new(&context.on(node))?.get(&path(args)) {
            Ok(there) => why.elsewhere = Some(Box::new(there)),
            Err(error) => eprintln!("farm: {node} serves {}, and was asked in vain: {error}", why.module),
        }
    }
    if context.json {
        show_json(&why)?;
    } else {
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        let now_us = now.map_or(0, |now| u64::try_from(now.as_micros()).unwrap_or(u64::MAX));
        show(&page(&why, Style::of_stdout(), now_us))?;
    }
    Ok(exit::OK)
}

/// The node to ask, where the one that answers does not run the module and so follows no map.
fn knows(why: &Why) -> Option<&String> {
    let is_dealt = why.rule.as_ref().is_some_and(|rule| rule.filter != "on_ipid");
    why.serving.first().filter(|_| is_dealt && why.bucket.is_none())
}

/// The question to farmd.
fn path(args: &WhyArgs) -> String {
    let protocol = match args.protocol {
        Transport::Tcp => "tcp",
        Transport::Udp => "udp",
    };
    let port = args
        .client
        .port
        .map_or_else(String::new, |port| format!("&port={port}"));
    format!(
        "/v1/why?protocol={protocol}&client={}{port}&vip={}&vip_port={}",
        args.client.addr,
        args.service.ip(),
        args.service.port()
    )
}

/// The whole answer, at the moment `now_us` (microseconds since 1970).
fn page(why: &Why, style: Style, now_us: u64) -> String {
    let client = match why.client_port {
        Some(port) => SocketAddr::new(why.client, port).to_string(),
        None => why.client.to_string(),
    };
    let service = SocketAddr::new(why.vip, why.port);
    let node = &why.node;
    let title = style.paint(Paint::Bold, &format!("{client} to {service} {}", why.protocol));
    let mut page = Page {
        text: format!("{title}, as {node} sees it\n"),
        style,
    };
    page.row("rule", Paint::Plain, &rule(why));
    if (why.state, why.quality) != (ModuleState::Up, Quality::Ready) || !why.no_share.is_empty() {
        page.row("module", Paint::Moving, &module(why));
    }
    if let Some(bucket) = &why.bucket {
        page.bucket(why, bucket, now_us);
    }
    match why.connection {
        Some(true) => page.row("connection", Paint::Plain, &format!("{node} has it")),
        Some(false) => page.row("connection", Paint::Plain, &format!("{node} does not have it")),
        None => {}
    }
    let what = if why.belonging.is_some() {
        "new (SYN)"
    } else {
        "datagram"
    };
    page.verdict(what, &why.opening);
    if let Some(belonging) = &why.belonging {
        page.verdict("segment", belonging);
    }
    if let Some(connected) = &why.if_connected {
        page.verdict("if it is here", connected);
    }
    let there = why.elsewhere.as_ref();
    let there = there.map(|there| format!("\n{}", self::page(there, style, now_us)));
    page.text + &there.unwrap_or_default()
}

fn rule(why: &Why) -> String {
    let Some(rule) = &why.rule else {
        return format!("none of {} covers {} port {}", why.module, why.protocol, why.port);
    };
    let ports = match (rule.first_port, rule.last_port) {
        (first, last) if first == last => format!("port {first}"),
        (0 | 1, u16::MAX) => "all ports".to_owned(),
        (first, last) => format!("ports {first}-{last}"),
    };
    let (filter, by) = (escape(&rule.filter), dealt_by(&rule.filter));
    let group = escape(&rule.group);
    let each = match (&why.bucket, rule.filter.as_str()) {
        (None, "on_ipid") => "; each packet has a bucket of its own",
        _ => "",
    };
    format!("{}/{group}: {} {ports}, {filter}: {by}{each}", why.module, why.protocol)
}

fn module(why: &Why) -> String {
    let because = match why.no_share.as_str() {
        "" => String::new(),
        why => format!(" ({})", escape(why)),
    };
    let serving = match why.serving.is_empty() {
        true => "no node serves it".to_owned(),
        false => format!("served by {}", why.serving.join(", ")),
    };
    format!(
        "{} is {} {} on {}{because}; {serving}",
        why.module, why.state, why.quality, why.node
    )
}

/// One fact a line, labelled.
struct Page {
    text: String,
    style: Style,
}

impl Page {
    fn row(&mut self, label: &str, paint: Paint, value: &str) {
        let value = escape(value);
        let lines = match self.style.width {
            Some(width) => wrap(&value, width.saturating_sub(HANG + 2)),
            None => vec![value],
        };
        let label = self.style.paint(Paint::Dim, &format!("{label:<HANG$}"));
        let lines: Vec<String> = lines.iter().map(|line| self.style.paint(paint, line)).collect();
        let hang = format!("\n{}", " ".repeat(HANG + 2));
        self.text.push_str(&format!("  {label}{}\n", lines.join(&hang)));
    }

    fn bucket(&mut self, why: &Why, bucket: &WhyBucket, now_us: u64) {
        let node = &why.node;
        let map = match bucket.map {
            0 => "no map yet".to_owned(),
            map => format!("map {map}"),
        };
        self.row("bucket", Paint::Plain, &format!("{} of 4096, {map}", bucket.number));
        let owner = bucket.owner.as_deref().unwrap_or("nobody");
        self.row("owner", Paint::Bold, owner);
        let holders = bucket.holders.join(" and ");
        let here = match bucket.state {
            BucketWord::Own => format!("own: {node}'s alone"),
            BucketWord::Guarded => format!("guarded: {node}'s, but another node still has connections in it"),
            BucketWord::Draining => format!("draining: no longer {node}'s; its connections in it go on"),
            BucketWord::Foreign => format!("foreign: not {node}'s"),
        };
        let leaving = if bucket.leaving { "; just being handed over" } else { "" };
        self.row("here", Paint::Plain, &format!("{here}{leaving}"));
        if !holders.is_empty() {
            let have = if bucket.holders.len() == 1 { "has" } else { "have" };
            let text = format!("{holders} still {have} connections in it");
            self.row("elsewhere", Paint::Plain, &text);
        }
        if let Some(entry) = &bucket.entry {
            let text = format!("{entry} answers the client's ARP requests, if both are on one network");
            self.row("entry", Paint::Plain, &text);
        }
        let since = match (&bucket.since, bucket.map) {
            (Some(entry), _) => since(entry, now_us),
            (None, 0) => return,
            (None, _) => "before the oldest entry that this node's history has".to_owned(),
        };
        self.row("since", Paint::Plain, &since);
    }

    fn verdict(&mut self, label: &str, verdict: &WhyVerdict) {
        let paint = match verdict.verdict.as_str() {
            "accept" => Paint::Good,
            "hold" => Paint::Moving,
            _ => Paint::Bold,
        };
        let word = match (verdict.verdict.as_str(), &verdict.sent_on[..]) {
            ("drop", [_, ..]) => format!("SENT ON to {}", verdict.sent_on.join(" and ")),
            (word, _) => word.to_uppercase(),
        };
        self.row(label, paint, &format!("{word}: {}", verdict.text));
    }
}

/// When, how long ago, and what happened.
fn since(entry: &HistoryEntry, now_us: u64) -> String {
    // Milliseconds are enough: what is nearer is one and the same event.
    let time: String = entry.time.chars().take(23).collect();
    let ago = age(now_us.saturating_sub(entry.unix_us) / 1000);
    format!("{time}, {ago} ago: {}", entry.summary())
}

#[cfg(test)]
mod tests {
    use farm_core::api::history::Happening;
    use farm_core::api::why::WhyRule;

    use super::*;

    fn verdict(verdict: &str, text: &str) -> WhyVerdict {
        WhyVerdict {
            verdict: verdict.to_owned(),
            reason: "foreign".to_owned(),
            sent_on: Vec::new(),
            text: text.to_owned(),
        }
    }

    fn why() -> Why {
        Why {
            node: "s1".to_owned(),
            protocol: "tcp".to_owned(),
            client: "198.18.0.2".parse().unwrap(),
            client_port: Some(40_000),
            vip: "198.18.0.20".parse().unwrap(),
            port: 80,
            module: "web".to_owned(),
            state: ModuleState::Up,
            quality: Quality::Ready,
            no_share: String::new(),
            serving: vec!["s1".to_owned(), "s2".to_owned()],
            rule: Some(WhyRule {
                group: "http".to_owned(),
                first_port: 80,
                last_port: 80,
                filter: "on_port".to_owned(),
            }),
            bucket: Some(WhyBucket {
                number: 17,
                map: 7,
                owner: Some("s2".to_owned()),
                state: BucketWord::Foreign,
                leaving: false,
                holders: vec!["s3".to_owned()],
                entry: Some("s2".to_owned()),
                since: Some(HistoryEntry {
                    seq: 9,
                    time: "2026-11-21 16:01:02.123456".to_owned(),
                    unix_us: 1_000_000,
                    module: Some("web".to_owned()),
                    what: Happening::Readmitted,
                }),
            }),
            connection: Some(false),
            opening: WhyVerdict {
                sent_on: vec!["s2".to_owned()],
                ..verdict("drop", "the bucket is s2's")
            },
            belonging: Some(verdict("drop", "the bucket is s2's")),
            if_connected: None,
            elsewhere: None,
        }
    }

    #[test]
    fn each_fact_has_a_line() {
        let shown = page(&why(), Style::PLAIN, 62_000_000);
        let expected = "\
198.18.0.2:40000 to 198.18.0.20:80 tcp, as s1 sees it
  rule          web/http: tcp port 80, on_port: by the client's address and port
  bucket        17 of 4096, map 7
  owner         s2
  here          foreign: not s1's
  elsewhere     s3 still has connections in it
  entry         s2 answers the client's ARP requests, if both are on one network
  since         2026-11-21 16:01:02.123, 1m01s ago: web is no longer kept out
  connection    s1 does not have it
  new (SYN)     SENT ON to s2: the bucket is s2's
  segment       DROP: the bucket is s2's
";
        assert_eq!(shown, expected);
    }

    #[test]
    fn what_is_missing_is_said() {
        let idle = Why {
            state: ModuleState::Stop,
            quality: Quality::NotReady,
            no_share: "stop called by \x1b[2Jroot".to_owned(),
            bucket: None,
            connection: None,
            ..why()
        };
        let shown = page(&idle, Style::PLAIN, 0);
        assert!(shown.contains("web is STOP NotReady on s1 (stop called by"), "{shown}");
        assert!(shown.contains("served by s1, s2") && !shown.contains('\x1b'), "{shown}");
        assert_eq!(knows(&idle), Some(&"s1".to_owned()));
        let there = Why {
            elsewhere: Some(Box::new(why())),
            ..idle
        };
        let both = page(&there, Style::PLAIN, 0);
        assert_eq!(both.matches("as s1 sees it").count(), 2, "{both}");
        assert!(
            both.starts_with(&shown) && both.contains("bucket        17 of 4096"),
            "{both}"
        );
        let uncovered = Why {
            rule: None,
            bucket: None,
            ..why()
        };
        assert!(page(&uncovered, Style::PLAIN, 0).contains("none of web covers tcp port 80"));
        assert_eq!((knows(&why()), knows(&uncovered)), (None, None));
    }

    #[test]
    fn the_question_has_what_was_named() {
        let mut args = WhyArgs {
            client: crate::args::look::Client {
                addr: "2001:db8::2".parse().unwrap(),
                port: None,
            },
            service: "[2001:db8::20]:53".parse().unwrap(),
            protocol: Transport::Udp,
        };
        let expected = "/v1/why?protocol=udp&client=2001:db8::2&vip=2001:db8::20&vip_port=53";
        assert_eq!(path(&args), expected);
        args.client.port = Some(9);
        assert!(path(&args).contains("&port=9&"));
    }
}
