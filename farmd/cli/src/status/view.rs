//! How a [`FarmStatus`] and a [`ClusterStatus`] look to a person. Pure: text out of values.

use std::fmt::Write;

use farm_core::api::{ClusterStatus, FarmStatus, ModuleState, ModuleStatus, NodeModuleStatus, Quality, Share};

use crate::terminal::{Cell, Paint, Style, Table, age, wrap};

/// Every module with one row per node, then what the administrator should know.
pub fn farm(status: &FarmStatus, style: Style, verbose: bool) -> String {
    let mut text = String::new();
    for (position, module) in status.modules.iter().enumerate() {
        if position > 0 {
            text.push('\n');
        }
        text.push_str(&module_rows(module, &status.node, style, verbose));
    }
    if status.modules.is_empty() {
        text.push_str("no node has a module; install one with: farm module install PATH\n");
    }
    if verbose {
        text.push('\n');
        text.push_str(&cluster(&status.cluster, style));
    }
    for warning in &status.warnings {
        let lines = style
            .width
            .map_or_else(|| vec![warning.clone()], |width| wrap(warning, width.saturating_sub(9)));
        let _ = writeln!(
            text,
            "{} {}",
            style.paint(Paint::Moving, "warning:"),
            lines.join("\n         ")
        );
    }
    text
}

/// One module: a title line and its table.
fn module_rows(module: &ModuleStatus, this: &str, style: Style, verbose: bool) -> String {
    let mut text = style.paint(Paint::Bold, &module.name);
    for (label, value) in [("vip", module.vips.join(" ")), ("plane", module.dataplane.clone())] {
        if !value.is_empty() {
            let _ = write!(text, "  {} {value}", style.paint(Paint::Dim, label));
        }
    }
    if verbose && !module.dataplane_why.is_empty() {
        let _ = write!(text, " ({})", module.dataplane_why);
    }
    if !module.configured {
        let _ = write!(text, "  {}", style.paint(Paint::Moving, "not configured here"));
    }
    text.push('\n');

    let mut table = Table::new([
        "NODE", "STATE", "QUALITY", "GROUP", "SHARE", "", "DRAINING", "AGE", "WHY",
    ]);
    for node in &module.nodes {
        let mut shares = node.shares.iter();
        let paint = paint_of(node);
        let mark = if node.node == this { "*" } else { " " };
        let [group, bar, count, draining] = share_cells(shares.next(), style, verbose);
        table.row([
            format!("{mark}{}", node.node).into(),
            Cell::new(node.state.map_or_else(|| "-".to_owned(), |s| s.to_string()), paint),
            Cell::new(node.quality.map_or_else(|| "-".to_owned(), |q| q.to_string()), paint),
            group,
            bar,
            count,
            draining,
            Cell::new(
                if node.age_ms > 0 {
                    age(node.age_ms)
                } else {
                    String::new()
                },
                Paint::Dim,
            ),
            node.why.as_str().into(),
        ]);
        for share in shares {
            let [group, bar, count, draining] = share_cells(Some(share), style, verbose);
            table.row([
                "".into(),
                "".into(),
                "".into(),
                group,
                bar,
                count,
                draining,
                "".into(),
                "".into(),
            ]);
        }
    }
    text.push_str(&table.render(style, "  "));

    if verbose {
        text.push_str(&settings(module));
    }
    if verbose && !module.resources.is_empty() {
        let mut table = Table::new(["RESOURCE", "VALUE"]);
        for (name, value) in &module.resources {
            let paint = match value.as_str() {
                "up" => Paint::Good,
                "down" => Paint::Bad,
                _ => Paint::Plain,
            };
            table.row([name.as_str().into(), Cell::new(value.as_str(), paint)]);
        }
        text.push_str(&table.render(style, "  "));
    }
    text
}

/// What was set for the shares at run time, and whose connections are left in what was given away.
fn settings(module: &ModuleStatus) -> String {
    let mut text = String::new();
    let shares = module
        .nodes
        .iter()
        .flat_map(|row| row.shares.iter().map(|share| (&row.node, share)));
    for (node, share) in shares {
        let group = &share.group;
        let setting = &share.setting;
        if let Some(weight) = setting.weight {
            let by = setting
                .weight_by
                .as_ref()
                .map_or_else(String::new, |by| format!(" by {by}"));
            let _ = writeln!(text, "  {node}, group {group}: weight {weight}, set at run time{by}");
        }
        if let Some(until) = setting.drained.as_ref().and_then(|drained| drained.until) {
            let _ = writeln!(
                text,
                "  {node}, group {group}: drained; connections left at {} are reset",
                clock(until)
            );
        }
        if !share.clients.is_empty() {
            let named: Vec<String> = share
                .clients
                .iter()
                .map(|c| format!("{} ({})", c.addr, c.connections))
                .collect();
            let _ = writeln!(
                text,
                "  {node}, group {group}: connections left of {}",
                named.join(", ")
            );
        }
    }
    text
}

/// Seconds since 1970 as local time.
fn clock(unix: u64) -> String {
    let at = i64::try_from(unix)
        .ok()
        .and_then(|s| chrono::DateTime::from_timestamp(s, 0));
    at.map_or_else(
        || format!("{unix} s since 1970"),
        |at| at.with_timezone(&chrono::Local).format("%Y-%m-%d %H:%M:%S").to_string(),
    )
}

fn share_cells(share: Option<&Share>, style: Style, verbose: bool) -> [Cell; 4] {
    let Some(share) = share else {
        return ["".into(), "".into(), "".into(), "".into()];
    };
    let width = share.of.to_string().len();
    let draining = if share.draining > 0 || verbose {
        share.draining.to_string()
    } else {
        String::new()
    };
    [
        share.group.as_str().into(),
        Cell::new(style.bar(share.buckets, share.draining, share.of), Paint::Notice),
        format!("{:>width$}/{}", share.buckets, share.of).into(),
        draining.into(),
    ]
}

/// Green only for a node that serves.
fn paint_of(node: &NodeModuleStatus) -> Paint {
    match (node.state, node.quality) {
        (Some(ModuleState::Up), Some(Quality::Ready)) => Paint::Good,
        (_, Some(Quality::Transient)) => Paint::Moving,
        (Some(ModuleState::Stop | ModuleState::Wait | ModuleState::Up) | None, _) => Paint::Bad,
    }
}

/// Who hears whom, how well, and what this node sends for it.
pub fn cluster(status: &ClusterStatus, style: Style) -> String {
    let mut text = format!("{} seen by {}\n", style.paint(Paint::Bold, "cluster"), status.node);
    let mut table = Table::new(["NODE", "STATE", "SINCE", "UPTIME", "HEARD", "ADDRESSES", "WHY"]);
    for node in &status.nodes {
        let mark = if node.name == status.node { "*" } else { " " };
        let paint = match node.state.as_str() {
            "this" | "alive" => Paint::Good,
            "suspect" => Paint::Moving,
            _ => Paint::Bad,
        };
        table.row([
            format!("{mark}{}", node.name).into(),
            Cell::new(node.state.as_str(), paint),
            age(node.since_ms).into(),
            node.uptime_ms.map_or_else(String::new, age).into(),
            heard(node.heard_ms, node.state == "this").into(),
            node.addrs.join(" ").into(),
            node.why.as_str().into(),
        ]);
    }
    text.push_str(&table.render(style, "  "));
    text.push_str(&links(status, style));
    let view = if status.view.is_empty() {
        "none yet".to_owned()
    } else {
        status.view.join(" ")
    };
    let coordinator = status.coordinator.as_deref().unwrap_or("none yet");
    let sent = &status.heartbeat;
    let realtime = if sent.realtime { "yes" } else { "no" };
    for (label, value) in [
        ("view", format!("{view}; coordinator {coordinator}")),
        (
            "plan",
            format!("{}; cluster.xml {}", status.plan_version, status.digest),
        ),
        (
            "heartbeat",
            format!(
                "every {}, down after {} ms; {} bytes, {} sent; real-time priority: {realtime}; {} late, by {} at most; longest turn {}",
                millis(sent.interval_us),
                sent.detection_ms,
                sent.bytes,
                rate(sent.bytes_per_s),
                sent.late,
                millis(sent.late_most_us),
                millis(sent.turn_longest_us)
            ),
        ),
    ] {
        text.push_str(&labelled(label, &value, style));
    }
    text
}

/// One row per peer and lan: what arrives, what is lost, how long it takes.
fn links(status: &ClusterStatus, style: Style) -> String {
    let mut table = Table::new(["LINK", "LAN", "HEARD", "RECEIVED", "LOST", "LOSS", "RTT", "MIN", "AVG"]);
    let rtt = |us: Option<u64>| us.map_or_else(|| "-".to_owned(), millis);
    let mut any = false;
    for node in &status.nodes {
        for link in &node.links {
            any = true;
            let (loss, paint) = match link.loss_permille {
                None => ("-".to_owned(), Paint::Plain),
                Some(loss) => (
                    format!("{}.{}%", loss / 10, loss % 10),
                    if loss >= 50 { Paint::Bad } else { Paint::Plain },
                ),
            };
            table.row([
                format!(" {}", node.name).into(),
                link.lan.as_str().into(),
                heard(link.heard_ms, false).into(),
                link.received.to_string().into(),
                link.lost.to_string().into(),
                Cell::new(loss, paint),
                rtt(link.rtt_us).into(),
                rtt(link.rtt_min_us).into(),
                rtt(link.rtt_avg_us).into(),
            ]);
        }
    }
    if any { table.render(style, "  ") } else { String::new() }
}

/// `label value`, wrapped under the value.
fn labelled(label: &str, value: &str, style: Style) -> String {
    let hang = label.len() + 3;
    let lines = style.width.map_or_else(
        || vec![value.to_owned()],
        |width| wrap(value, width.saturating_sub(hang)),
    );
    let mut text = format!("  {} ", style.paint(Paint::Dim, label));
    text.push_str(&lines.join(&format!("\n{}", " ".repeat(hang))));
    text.push('\n');
    text
}

fn heard(ms: Option<u64>, this: bool) -> String {
    match ms {
        Some(ms) => format!("{} ago", age(ms)),
        None if this => String::new(),
        None => "never".to_owned(),
    }
}

/// Microseconds as `0.21ms`, `50ms`.
fn millis(us: u64) -> String {
    match us {
        0..=9_999 if !us.is_multiple_of(1000) => format!("{}.{:02}ms", us / 1000, us % 1000 / 10),
        _ => format!("{}ms", us / 1000),
    }
}

/// `820 B/s`, `4.9 kB/s`.
fn rate(bytes: u64) -> String {
    match bytes {
        0..=999 => format!("{bytes} B/s"),
        _ => format!("{}.{} kB/s", bytes / 1000, bytes % 1000 / 100),
    }
}
