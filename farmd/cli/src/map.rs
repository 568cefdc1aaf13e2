//! `farm map`: whose each of the 4096 buckets is, as a picture.
//!
//! Asks farmd; here the picture is drawn: one letter per bucket, and on a terminal a colour per node.

use farm_core::api::exit;
use farm_core::api::map::{GroupMap, MapRange, Maps};
use farm_core::module::logline::escape;

use crate::args::look::MapArgs;
use crate::client::Client;
use crate::failure::Failure;
use crate::folders::Context;
use crate::terminal::{Cell, Paint, Style, Table, show, show_json, wrap};

/// Buckets in a line: at least, and where lines may be as long as they like.
const LEAST: usize = 64;
/// Buckets in a line at most.
const MOST: usize = 128;
/// Lines are a multiple of so many buckets.
const STEP: usize = 16;
/// Columns of a line before its buckets.
const MARGIN: usize = 7;
/// Signs of the nodes where there are more than letters.
const SIGNS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789@#";
/// Most nodes that have a capital letter, and a small one for what is in transition.
const LETTERS: usize = 26;

/// Runs `farm map`.
pub fn run(context: &Context, args: &MapArgs) -> Result<u8, Failure> {
    let module = context.module_if_any(args.module.as_deref())?;
    let words = [
        module.as_ref().map(|module| format!("module={module}")),
        args.group.as_ref().map(|group| group_word(group)).transpose()?,
    ];
    let words: Vec<String> = words.into_iter().flatten().collect();
    let maps: Maps = Client::new(context)?.get(&format!("/v1/map?{}", words.join("&")))?;
    if let (Some(module), [absent]) = (&module, &maps.absent[..]) {
        return Err(Failure::new(exit::REFUSED, format!("{module}: {}", absent.why)));
    }
    if context.json {
        show_json(&maps)?;
    } else {
        show(&page(&maps, Style::of_stdout()))?;
    }
    Ok(exit::OK)
}

fn group_word(group: &str) -> Result<String, Failure> {
    let fits = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    match !group.is_empty() && group.chars().all(fits) {
        true => Ok(format!("group={group}")),
        false => Err(Failure::usage(format!("`{group}` is no group's name"))),
    }
}

/// One picture after the other, then what has none.
fn page(maps: &Maps, style: Style) -> String {
    let pictures = maps.groups.iter().map(|group| picture(group, &maps.node, style));
    let mut text = pictures.collect::<Vec<_>>().join("\n");
    for absent in &maps.absent {
        text.push_str(&format!("{}: {}\n", escape(&absent.module), escape(&absent.why)));
    }
    if text.is_empty() {
        text = format!("no module is configured on {}\n", maps.node);
    }
    text
}

/// One group: title, buckets, legend.
fn picture(group: &GroupMap, this: &str, style: Style) -> String {
    let title = style.paint(Paint::Bold, &escape(&format!("{}/{}", group.module, group.group)));
    let mut text = format!("{title}  map {}, as {this} sees it\n", group.map);
    let cells = cells(group);
    let per_line = per_line(style);
    for (line, cells) in cells.chunks(per_line).enumerate() {
        let label = style.paint(Paint::Dim, &format!("{:>4}", line * per_line));
        text.push_str(&format!("  {label} "));
        // Neighbours of one colour are painted at once.
        for run in cells.chunk_by(|a, b| a.node == b.node) {
            let signs: String = run.iter().map(|cell| cell.sign).collect();
            let paint = run.first().map_or(Paint::Plain, BucketCell::paint);
            text.push_str(&style.paint(paint, &signs));
        }
        text.push('\n');
    }
    text.push_str(&legend(group, this, style));
    text
}

fn per_line(style: Style) -> usize {
    let room = style.width.map_or(LEAST, |width| width.saturating_sub(MARGIN));
    (room / STEP * STEP).clamp(LEAST, MOST)
}

/// How one bucket is drawn.
#[derive(Clone, Copy)]
struct BucketCell {
    /// Position of its owner among the nodes.
    node: Option<usize>,
    sign: char,
}

impl BucketCell {
    fn paint(&self) -> Paint {
        self.node.map_or(Paint::Dim, paint_of)
    }
}

fn paint_of(node: usize) -> Paint {
    Paint::Node(u8::try_from(node).unwrap_or(u8::MAX))
}

fn cells(group: &GroupMap) -> Vec<BucketCell> {
    let nodes = group.nodes.len();
    let of = |range: &MapRange| {
        let owner = range.owner.as_ref();
        let node = owner.and_then(|owner| group.nodes.iter().position(|node| node.node == *owner));
        let sign = match node {
            None => '.',
            Some(_) if range.in_transition() && nodes > LETTERS => '+',
            Some(node) if range.in_transition() => sign(node).to_ascii_lowercase(),
            Some(node) => sign(node),
        };
        let buckets = usize::from(range.last.saturating_sub(range.first)) + 1;
        std::iter::repeat_n(BucketCell { node, sign }, buckets)
    };
    group.ranges.iter().flat_map(of).collect()
}

fn sign(node: usize) -> char {
    SIGNS.get(node).map_or('?', |sign| char::from(*sign))
}

/// Who has which sign and how much, and what small letters mean.
fn legend(group: &GroupMap, this: &str, style: Style) -> String {
    let mut table = Table::new(["", "NODE", "BUCKETS", "SHARE", "WEIGHT", "HOLDS", "STATE"]);
    let share = |buckets: u32| {
        let of = u64::from(group.of.max(1));
        let permille = (u64::from(buckets) * 1000 + of / 2) / of;
        format!("{:>3}.{} %", permille / 10, permille % 10)
    };
    for (position, node) in group.nodes.iter().enumerate() {
        let mark = if node.node == this { "*" } else { " " };
        table.row([
            Cell::new(format!(" {} ", sign(position)), paint_of(position)),
            format!("{mark}{}", node.node).into(),
            format!("{:>7}", node.buckets).into(),
            share(node.buckets).into(),
            node.weight
                .map_or_else(|| "     -".to_owned(), |w| format!("{w:>6}"))
                .into(),
            match node.holds {
                0 => String::new(),
                holds => format!("{holds:>5}"),
            }
            .into(),
            escape(&node.state).into(),
        ]);
    }
    if group.nobody > 0 {
        table.row([
            Cell::new(" . ", Paint::Dim),
            " nobody".into(),
            format!("{:>7}", group.nobody).into(),
            share(group.nobody).into(),
            "".into(),
            "".into(),
            "".into(),
        ]);
    }
    let mut text = table.render(style, "  ");
    if let Some(moving) = moving(group, this) {
        let lines = style
            .width
            .map_or_else(|| vec![moving.clone()], |width| wrap(&moving, width.saturating_sub(2)));
        text.push_str(&format!("  {}\n", lines.join("\n  ")));
    }
    text
}

/// What is in transition, if anything is.
fn moving(group: &GroupMap, this: &str) -> Option<String> {
    let size = |range: &MapRange| u32::from(range.last.saturating_sub(range.first)) + 1;
    let all: u32 = group.ranges.iter().filter(|r| r.in_transition()).map(size).sum();
    if all == 0 {
        return None;
    }
    let mark = if group.nodes.len() > LETTERS {
        "+"
    } else {
        "small letters"
    };
    let here = &group.here;
    let counts = [
        (here.guarded, "guarded"),
        (here.draining, "draining"),
        (here.leaving, "being handed over"),
    ];
    let counts: Vec<String> = counts
        .iter()
        .filter(|(count, _)| *count > 0)
        .map(|(count, what)| format!("{count} {what}"))
        .collect();
    let here = match counts.is_empty() {
        true => String::new(),
        false => format!("; on {this} {}", counts.join(", ")),
    };
    Some(format!(
        "{mark}: {all} buckets in transition, another node than the owner still has connections in them{here}"
    ))
}

#[cfg(test)]
mod tests {
    use farm_core::api::map::{HereCounts, MapAbsent, MapNode};
    use farm_core::api::why::BucketWord;

    use super::*;

    fn range(first: u16, last: u16, owner: Option<&str>, state: BucketWord) -> MapRange {
        MapRange {
            first,
            last,
            owner: owner.map(str::to_owned),
            state,
            holders: Vec::new(),
            leaving: false,
        }
    }

    fn node(name: &str, buckets: u32, holds: u32) -> MapNode {
        MapNode {
            node: name.to_owned(),
            buckets,
            weight: Some(1),
            state: "UP Ready".to_owned(),
            holds,
        }
    }

    fn group() -> GroupMap {
        GroupMap {
            module: "web".to_owned(),
            group: "http".to_owned(),
            map: 7,
            of: 4096,
            nodes: vec![node("s1", 2048, 0), node("s2", 2038, 3)],
            nobody: 10,
            here: HereCounts {
                own: 2045,
                guarded: 3,
                draining: 0,
                leaving: 0,
            },
            ranges: vec![
                range(0, 2, Some("s1"), BucketWord::Guarded),
                range(3, 2047, Some("s1"), BucketWord::Own),
                range(2048, 4085, Some("s2"), BucketWord::Foreign),
                range(4086, 4095, None, BucketWord::Foreign),
            ],
        }
    }

    #[test]
    fn a_picture_has_one_sign_per_bucket_and_a_legend() {
        let shown = picture(&group(), "s1", Style::PLAIN);
        let lines: Vec<&str> = shown.lines().collect();
        assert_eq!(lines[0], "web/http  map 7, as s1 sees it");
        assert_eq!(lines[1], format!("     0 aaa{}", "A".repeat(61)));
        assert_eq!(lines[2], format!("    64 {}", "A".repeat(64)));
        assert_eq!(lines[33], format!("  2048 {}", "B".repeat(64)));
        assert_eq!(lines[64], format!("  4032 {}..........", "B".repeat(54)));
        let legend = lines[65..].join("\n");
        let expected = "       NODE     BUCKETS  SHARE    WEIGHT  HOLDS  STATE
   A   *s1         2048   50.0 %       1         UP Ready
   B    s2         2038   49.8 %       1      3  UP Ready
   .    nobody       10    0.2 %
  small letters: 3 buckets in transition, another node than the owner still has connections in them; on s1 3 guarded";
        assert_eq!(legend, expected);
    }

    #[test]
    fn lines_follow_the_width_of_the_terminal_within_bounds() {
        let at = |width| {
            per_line(Style {
                width: Some(width),
                ..Style::PLAIN
            })
        };
        assert_eq!([40, 80, 100, 120, 135, 300].map(at), [64, 64, 80, 112, 128, 128]);
        assert_eq!(per_line(Style::PLAIN), 64);
    }

    #[test]
    fn colours_change_nothing_but_colours() {
        let plain = picture(&group(), "s1", Style::PLAIN);
        let rich = picture(&group(), "s1", Style::RICH);
        let mut stripped = String::new();
        for (number, part) in rich.split('\x1b').enumerate() {
            let text = if number == 0 {
                part
            } else {
                part.split_once('m').unwrap().1
            };
            stripped.push_str(text);
        }
        assert_eq!(stripped, plain);
        assert!(rich.len() > plain.len() && !plain.contains('\x1b'));
    }

    #[test]
    fn many_nodes_have_a_sign_each_and_one_for_what_is_in_transition() {
        let mut group = group();
        group.nodes = (0..64).map(|i| node(&format!("s{}", i + 1), 1, 0)).collect();
        let signs: std::collections::BTreeSet<char> = (0..64).map(sign).collect();
        assert_eq!(signs.len(), 64);
        assert!(picture(&group, "s1", Style::PLAIN).contains("     0 +++AAA"));
    }

    #[test]
    fn what_has_no_map_is_named_with_the_reason() {
        let maps = Maps {
            node: "s1".to_owned(),
            groups: Vec::new(),
            absent: vec![MapAbsent {
                module: "web".to_owned(),
                why: "STOP NotReady on s1".to_owned(),
            }],
        };
        assert_eq!(page(&maps, Style::PLAIN), "web: STOP NotReady on s1\n");
        let none = Maps {
            absent: Vec::new(),
            ..maps
        };
        assert_eq!(page(&none, Style::PLAIN), "no module is configured on s1\n");
        assert!(group_word("a&n=1").is_err());
    }
}
