//! One line per frame: tcpdump's on the left, `farm why`'s on the right.
//!
//! Owns the layout. Columns widen as wider frames come; where a terminal is too narrow for a line, what became of the frame goes below.

use farm_core::api::trace::TraceFrame;
use farm_core::module::logline::escape;

use crate::terminal::{Paint, Style};

/// A terminal of so many columns has room for everything, with columns that line up.
const WIDE: usize = 110;
/// Where the second line of a frame begins: under its addresses, behind `03:12:07.412 `.
const HANG: usize = 13;

/// Lays out frames one after the other.
pub struct Page {
    style: Style,
    /// Widest yet: interface, both ends, and what is carried.
    widths: [usize; 3],
}

impl Page {
    /// Nothing has come yet.
    pub fn new(style: Style) -> Self {
        Self {
            style,
            // `198.18.16.1:40000 > 198.18.0.20:80`, `tcp S.`
            widths: [0, 34, 6],
        }
    }

    /// `frame`, judged at `time` (`03:12:07.412345`), with its line end.
    pub fn line(&mut self, frame: &TraceFrame, time: &str) -> String {
        let wide = self.style.width.is_none_or(|columns| columns >= WIDE);
        let carried = match frame.detail.as_str() {
            "" => frame.protocol.clone(),
            detail => format!("{} {detail}", frame.protocol),
        };
        let parts = [escape(&frame.interface), ends(frame), escape(&carried)];
        for (width, part) in self.widths.iter_mut().zip(&parts) {
            *width = (*width).max(part.chars().count());
        }
        let [interface, ends, carried] = &parts;
        let [w0, w1, w2] = self.widths;
        let length = frame.length;
        let head = if wide {
            format!("{time} {interface:<w0$} {ends:<w1$} {carried:<w2$} {length:>5}")
        } else {
            // Milliseconds are enough to read; what is nearer is in JSON and in files.
            let time: String = time.chars().take(HANG - 1).collect();
            format!("{time} {ends} {carried} {length}")
        };
        let (verdict, rest) = (escape(&frame.verdict), rest(frame, wide));
        let verdict = if wide { format!("{verdict:<9}") } else { verdict };
        let columns = head.chars().count() + 1 + verdict.chars().count() + 1 + rest.chars().count();
        let gap = match self.style.width {
            Some(width) if columns > width => format!("\n{}", " ".repeat(HANG)),
            _ => " ".to_owned(),
        };
        format!("{head}{gap}{} {rest}\n", self.style.paint(paint(frame), &verdict))
    }
}

/// Who speaks to whom.
fn ends(frame: &TraceFrame) -> String {
    let end = |addr: std::net::IpAddr, port: Option<u16>| match port {
        Some(port) => std::net::SocketAddr::new(addr, port).to_string(),
        None => addr.to_string(),
    };
    format!(
        "{} > {}",
        end(frame.client, frame.client_port),
        end(frame.vip, frame.vip_port)
    )
}

/// Reason, bucket, owner, and who else got it.
fn rest(frame: &TraceFrame, wide: bool) -> String {
    let mut text = match wide && frame.bucket.is_some() {
        true => format!("{:<14}", escape(&frame.reason)),
        false => escape(&frame.reason),
    };
    if let Some(bucket) = frame.bucket {
        let owner = frame.owner.as_deref().unwrap_or("nobody");
        if let Some(group) = frame.group.as_ref().filter(|_| wide) {
            text.push_str(&format!(" {}", escape(group)));
        }
        text.push_str(&format!(" {bucket} of {}", escape(owner)));
    }
    if !frame.sent_on.is_empty() {
        text.push_str(&format!(", sent on to {}", escape(&frame.sent_on.join(" and "))));
    }
    text
}

fn paint(frame: &TraceFrame) -> Paint {
    match (frame.verdict.as_str(), frame.reason.as_str()) {
        ("accepted", _) => Paint::Good,
        ("forwarded", _) => Paint::Notice,
        ("held" | "punted", _) => Paint::Moving,
        // Somebody else's business, as most frames are where every node gets all.
        ("dropped", "foreign" | "draining_other" | "other_mac") => Paint::Dim,
        _ => Paint::Bad,
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(in crate::trace) fn frame() -> TraceFrame {
        TraceFrame {
            unix_us: 1_795_000_000_123_456,
            interface: "lan0".to_owned(),
            by: "kernel".to_owned(),
            client: "198.18.16.1".parse().unwrap(),
            client_port: Some(40_000),
            vip: "198.18.0.20".parse().unwrap(),
            vip_port: Some(80),
            protocol: "tcp".to_owned(),
            detail: "S".to_owned(),
            length: 74,
            verdict: "accepted".to_owned(),
            reason: "own".to_owned(),
            sent_on: Vec::new(),
            group: Some("web/http".to_owned()),
            bucket: Some(1234),
            owner: Some("s1".to_owned()),
            bytes: "0102".to_owned(),
        }
    }

    const TIME: &str = "03:12:07.412345";

    fn at(columns: usize) -> Page {
        Page::new(Style {
            width: Some(columns),
            ..Style::PLAIN
        })
    }

    #[test]
    fn a_wide_terminal_has_it_all_in_columns() {
        let forwarded = TraceFrame {
            verdict: "forwarded".to_owned(),
            reason: "foreign".to_owned(),
            sent_on: vec!["s2".to_owned()],
            owner: Some("s2".to_owned()),
            client_port: Some(9),
            detail: "P.".to_owned(),
            length: 1514,
            ..frame()
        };
        let refused = TraceFrame {
            verdict: "dropped".to_owned(),
            reason: "no_rule".to_owned(),
            group: None,
            bucket: None,
            owner: None,
            protocol: "icmp".to_owned(),
            detail: "type 13/0".to_owned(),
            client_port: None,
            vip_port: None,
            ..frame()
        };
        let mut page = at(120);
        let shown: String = [frame(), forwarded, refused]
            .iter()
            .map(|f| page.line(f, TIME))
            .collect();
        // One of them is too long for the terminal.
        let expected = "\
03:12:07.412345 lan0 198.18.16.1:40000 > 198.18.0.20:80 tcp S     74 accepted  own            web/http 1234 of s1
03:12:07.412345 lan0 198.18.16.1:9 > 198.18.0.20:80     tcp P.  1514
             forwarded foreign        web/http 1234 of s2, sent on to s2
03:12:07.412345 lan0 198.18.16.1 > 198.18.0.20          icmp type 13/0    74 dropped   no_rule
";
        assert_eq!(shown, expected);
    }

    #[test]
    fn a_narrow_terminal_has_what_matters_in_eighty_columns() {
        let mut page = at(80);
        let shown = page.line(&frame(), TIME);
        let expected = "03:12:07.412 198.18.16.1:40000 > 198.18.0.20:80 tcp S 74 accepted own 1234 of s1\n";
        assert_eq!(shown, expected);
        assert!(shown.trim_end().len() <= 80);
        let long = TraceFrame {
            client: "2001:db8:16::1".parse().unwrap(),
            vip: "2001:db8::20".parse().unwrap(),
            verdict: "dropped".to_owned(),
            reason: "guarded_unknown".to_owned(),
            ..frame()
        };
        let expected = "\
03:12:07.412 [2001:db8:16::1]:40000 > [2001:db8::20]:80 tcp S 74
             dropped guarded_unknown 1234 of s1
";
        assert_eq!(page.line(&long, TIME), expected);
    }

    #[test]
    fn without_a_terminal_each_frame_is_one_line_and_nothing_breaks_out_of_it() {
        let hostile = TraceFrame {
            interface: "lan0\x1b[2J\nx".to_owned(),
            sent_on: vec!["s2".to_owned(), "s3".to_owned()],
            ..frame()
        };
        let shown = Page::new(Style::PLAIN).line(&hostile, TIME);
        assert!(shown.ends_with("of s1, sent on to s2 and s3\n"), "{shown}");
        assert!(shown.lines().count() == 1 && !shown.contains('\x1b'), "{shown}");
    }
}
