//! `farm flows`: which connections a node has, and whose buckets they lie in.
//!
//! Asks farmd, which reads the kernel's tables; here the numbers and the bounded lists are laid out.

use farm_core::api::exit;
use farm_core::api::flows::{Flows, MAX_FLOWS};
use farm_core::module::logline::escape;

use crate::args::look::FlowsArgs;
use crate::client::Client;
use crate::failure::Failure;
use crate::folders::Context;
use crate::terminal::{Cell, Paint, Style, Table, show, show_json};

/// Runs `farm flows`.
pub fn run(context: &Context, args: &FlowsArgs) -> Result<u8, Failure> {
    let module = context.module_if_any(None)?;
    if let Some(node) = &args.node {
        let fits = |c: char| c.is_alphanumeric() || "-_.".contains(c);
        if node.is_empty() || !node.chars().all(fits) {
            return Err(Failure::usage(format!(
                "`{node}` is no node's name; cluster.xml has them"
            )));
        }
    }
    let words = [
        Some(format!("n={}", args.lines.min(MAX_FLOWS))),
        args.client.map(|client| format!("client={client}")),
        args.node.as_ref().map(|node| format!("owner={node}")),
        module.map(|module| format!("module={module}")),
    ];
    let words: Vec<String> = words.into_iter().flatten().collect();
    let flows: Flows = Client::new(context)?.get(&format!("/v1/flows?{}", words.join("&")))?;
    if context.json {
        show_json(&flows)?;
    } else {
        show(&page(&flows, Style::of_stdout()))?;
    }
    Ok(exit::OK)
}

fn counted(n: u32, what: &str) -> String {
    match n {
        0 => format!("no {what}"),
        1 => format!("1 {what}"),
        n => format!("{n} {what}s"),
    }
}

fn page(flows: &Flows, style: Style) -> String {
    let count = style.paint(Paint::Bold, &counted(flows.connections, "connection"));
    let mut text = format!("{count} on {}", flows.node);
    if flows.elsewhere > 0 {
        let are = if flows.elsewhere == 1 { "is" } else { "are" };
        text.push_str(&format!(
            "; {} of them {are} in buckets of other nodes",
            flows.elsewhere
        ));
    }
    if flows.unshared > 0 {
        text.push_str(&format!(
            " ({} more to a virtual IP: no rule covers them, or they come from this host)",
            flows.unshared
        ));
    }
    text.push('\n');
    if flows.connections == 0 {
        return text;
    }
    text.push_str(&groups(flows, style));
    text.push_str(&owners(flows, style));
    text.push_str(&clients(flows, style));
    text.push_str(&connections(flows, style));
    text
}

/// A count under a title; nothing for none.
fn number(n: u32, title: &str) -> String {
    let width = title.len();
    match n {
        0 => String::new(),
        n => format!("{n:>width$}"),
    }
}

fn groups(flows: &Flows, style: Style) -> String {
    let mut table = Table::new(["GROUP", "CONNECTIONS", "CLIENTS", "GUARDED", "ELSEWHERE"]);
    for group in &flows.groups {
        table.row([
            escape(&format!("{}/{}", group.module, group.group)).into(),
            number(group.connections, "CONNECTIONS").into(),
            number(group.clients, "CLIENTS").into(),
            number(group.guarded, "GUARDED").into(),
            Cell::new(number(group.elsewhere, "ELSEWHERE"), Paint::Moving),
        ]);
    }
    table.render(style, "  ")
}

/// By owner; says nothing new if that is always the node itself.
fn owners(flows: &Flows, style: Style) -> String {
    if flows.elsewhere == 0 {
        return String::new();
    }
    let mut table = Table::new(["BUCKETS OF", "CONNECTIONS"]);
    for owner in &flows.owners {
        let node = owner.node.as_deref().unwrap_or("nobody");
        table.row([node.into(), number(owner.connections, "CONNECTIONS").into()]);
    }
    table.render(style, "  ")
}

fn clients(flows: &Flows, style: Style) -> String {
    let mut table = Table::new(["CLIENT", "CONNECTIONS", "ELSEWHERE"]);
    for client in &flows.clients {
        table.row([
            client.addr.to_string().into(),
            number(client.connections, "CONNECTIONS").into(),
            Cell::new(number(client.elsewhere, "ELSEWHERE"), Paint::Moving),
        ]);
    }
    listed(&table, flows.clients.len(), flows.clients_of, "client", style)
}

fn connections(flows: &Flows, style: Style) -> String {
    let mut table = Table::new(["CONNECTION OF", "TO", "GROUP", "BUCKET", "OWNER", "HERE"]);
    for flow in &flows.flows {
        let paint = if flow.state.is_elsewhere() {
            Paint::Moving
        } else {
            Paint::Plain
        };
        table.row([
            flow.client.to_string().into(),
            flow.vip.to_string().into(),
            escape(&format!("{}/{}", flow.module, flow.group)).into(),
            format!("{:>6}", flow.bucket).into(),
            flow.owner.as_deref().unwrap_or("nobody").into(),
            Cell::new(flow.state.as_str(), paint),
        ]);
    }
    listed(&table, flows.flows.len(), flows.connections, "connection", style)
}

/// A table with `shown` of `all` rows, and how many there are besides.
fn listed(table: &Table, shown: usize, all: u32, what: &str, style: Style) -> String {
    let mut text = if shown > 0 {
        table.render(style, "  ")
    } else {
        String::new()
    };
    let more = u64::from(all).saturating_sub(shown as u64);
    if more > 0 {
        let more = u32::try_from(more).unwrap_or(u32::MAX);
        let hint = format!("  {} more; -n N names up to {MAX_FLOWS}\n", counted(more, what));
        text.push_str(&style.paint(Paint::Dim, &hint));
    }
    text
}

#[cfg(test)]
mod tests {
    use farm_core::api::flows::{Flow, FlowClient, FlowGroup, FlowOwner};
    use farm_core::api::why::BucketWord;

    use super::*;

    fn flows() -> Flows {
        Flows {
            node: "s1".to_owned(),
            connections: 40,
            elsewhere: 1,
            unshared: 0,
            groups: vec![FlowGroup {
                module: "web".to_owned(),
                group: "http".to_owned(),
                connections: 40,
                guarded: 0,
                elsewhere: 1,
                clients: 2,
            }],
            owners: vec![
                FlowOwner {
                    node: Some("s1".to_owned()),
                    connections: 39,
                },
                FlowOwner {
                    node: None,
                    connections: 1,
                },
            ],
            clients: vec![FlowClient {
                addr: "198.18.0.2".parse().unwrap(),
                connections: 39,
                elsewhere: 1,
            }],
            clients_of: 2,
            flows: vec![Flow {
                client: "198.18.0.2:4000".parse().unwrap(),
                vip: "198.18.0.20:80".parse().unwrap(),
                module: "web".to_owned(),
                group: "http".to_owned(),
                bucket: 17,
                owner: None,
                state: BucketWord::Draining,
            }],
        }
    }

    #[test]
    fn numbers_are_whole_and_lists_say_what_they_leave_out() {
        let expected = "\
40 connections on s1; 1 of them is in buckets of other nodes
  GROUP     CONNECTIONS  CLIENTS  ELSEWHERE
  web/http           40        2          1
  BUCKETS OF  CONNECTIONS
  s1                   39
  nobody                1
  CLIENT      CONNECTIONS  ELSEWHERE
  198.18.0.2           39          1
  1 client more; -n N names up to 1000
  CONNECTION OF    TO              GROUP     BUCKET  OWNER   HERE
  198.18.0.2:4000  198.18.0.20:80  web/http      17  nobody  draining
  39 connections more; -n N names up to 1000
";
        assert_eq!(page(&flows(), Style::PLAIN), expected);
    }

    #[test]
    fn where_there_is_nothing_one_line_says_so() {
        let none = Flows {
            connections: 0,
            elsewhere: 0,
            unshared: 2,
            ..flows()
        };
        let shown = page(&none, Style::PLAIN);
        assert!(
            shown.starts_with("no connection on s1 (2 more to a virtual IP"),
            "{shown}"
        );
        assert_eq!(shown.lines().count(), 1);
    }
}
