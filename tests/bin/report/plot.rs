//! Bars and lines as SVG, written by hand: medians, with the least and the most of each as a whisker, and the goal as a dashed line.
//!
//! Owns the picture. Never judges: the numbers are in the tables.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use farm_lab::bench::Figure;
use farm_lab::outcome::{Line, Plot};

use super::record::{Kind, Record};
use super::svg::{escape, step_for};

/// Width of a picture, where its scale begins and ends, and what stands over and under it.
const WIDTH: f64 = 800.0;
const LEFT: f64 = 260.0;
const RIGHT: f64 = 650.0;
const TOP: f64 = 40.0;
const BOTTOM: f64 = 44.0;
/// Height of a bar with the space around it.
const BAR: f64 = 28.0;
/// Where the field of lines begins and ends, and how tall it is.
const FIELD_LEFT: f64 = 70.0;
const FIELD_RIGHT: f64 = 620.0;
const FIELD: f64 = 250.0;
/// Space above the highest value.
const HEADROOM: f64 = 1.04;
/// Colours that differ for every kind of eye.
const COLOURS: [&str; 6] = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"];
const GOAL: &str = "#c0392b";

/// Writes every picture of the record into `folder`; their paths.
pub fn write_all(record: &Record, folder: &Path, kind: Kind) -> Result<Vec<PathBuf>> {
    fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    let mut files = Vec::new();
    for plot in record.outcomes.iter().flat_map(|outcome| &outcome.plots) {
        let file = folder.join(format!("{}-{}.svg", kind.name(), plot.name));
        fs::write(&file, draw(plot)).with_context(|| format!("cannot write {}", file.display()))?;
        files.push(file);
    }
    Ok(files)
}

fn draw(plot: &Plot) -> String {
    match &plot.over {
        Some(over) => lines(plot, over),
        None => bars(plot),
    }
}

/// The largest value or goal.
fn most(plot: &Plot) -> f64 {
    let values = plot.lines.iter().flat_map(|line| &line.points);
    let values = values.map(|point| Figure::of(&point.values).most);
    let most = values.chain(plot.goal).filter(|v| v.is_finite()).fold(0.0, f64::max);
    if most > 0.0 { most * HEADROOM } else { 1.0 }
}

fn begin(plot: &Plot, left: f64, height: f64) -> String {
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" width=\"{WIDTH}\" height=\"{height}\" \
         font-family=\"sans-serif\" font-size=\"12\" fill=\"#222\">\n<rect width=\"100%\" height=\"100%\" fill=\"#fff\"/>\n\
         <text x=\"{left}\" y=\"20\" font-weight=\"bold\">{}</text>\n",
        escape(&plot.title)
    )
}

fn bars(plot: &Plot) -> String {
    let bottom = TOP + BAR * plot.lines.len() as f64;
    let most = most(plot);
    // Six lines at most: the numbers under them need room.
    let step = step_for(most * 10.0 / 6.0);
    let end = (most / step).ceil() * step;
    let digits = if most >= 100.0 { 0 } else { decimals(step) + 1 };
    let x = |value: f64| LEFT + (RIGHT - LEFT) * (value / end).clamp(0.0, 1.0);
    let mut svg = begin(plot, LEFT, bottom + BOTTOM);
    for tick in ticks(step, end) {
        let _ = writeln!(
            svg,
            "<path d=\"M{0:.1} {TOP}V{bottom}\" stroke=\"#e4e4e4\"/><text x=\"{0:.1}\" y=\"{1}\" text-anchor=\"middle\" fill=\"#666\">{2}</text>",
            x(tick),
            bottom + 16.0,
            number(tick, step)
        );
    }
    let _ = writeln!(
        svg,
        "<text x=\"{:.1}\" y=\"{}\" text-anchor=\"middle\" fill=\"#666\">{}</text>",
        f64::midpoint(LEFT, RIGHT),
        bottom + 34.0,
        escape(&plot.unit)
    );
    for (index, line) in plot.lines.iter().enumerate() {
        let (top, middle) = (TOP + BAR * index as f64 + 5.0, TOP + BAR * index as f64 + BAR / 2.0);
        let _ = writeln!(
            svg,
            "<text x=\"{}\" y=\"{}\" text-anchor=\"end\">{}</text>",
            LEFT - 8.0,
            middle + 4.0,
            escape(&line.name)
        );
        let Some(point) = line.points.first().filter(|point| !point.values.is_empty()) else {
            let _ = writeln!(
                svg,
                "<text x=\"{}\" y=\"{}\" fill=\"#888\">not measured</text>",
                LEFT + 6.0,
                middle + 4.0
            );
            continue;
        };
        let figure = Figure::of(&point.values);
        let _ = writeln!(
            svg,
            "<rect x=\"{LEFT}\" y=\"{top}\" width=\"{:.1}\" height=\"{}\" fill=\"#8fb4d6\"/>\
             <path d=\"M{:.1} {middle}H{:.1}\" stroke=\"#222\" stroke-width=\"2\"/>\
             <text x=\"{}\" y=\"{}\">{}</text>",
            x(figure.median) - LEFT,
            BAR - 10.0,
            x(figure.least),
            x(figure.most),
            RIGHT + 10.0,
            middle + 4.0,
            figure.text(digits)
        );
    }
    if let Some(goal) = plot.goal {
        let _ = writeln!(
            svg,
            "<path d=\"M{:.1} {}V{bottom}\" stroke=\"{GOAL}\" stroke-dasharray=\"4 3\"/>\
             <text x=\"{0:.1}\" y=\"{}\" text-anchor=\"middle\" font-size=\"10\" fill=\"{GOAL}\">goal</text>",
            x(goal),
            TOP - 4.0,
            TOP - 7.0
        );
    }
    svg.push_str("</svg>\n");
    svg
}

fn lines(plot: &Plot, over: &str) -> String {
    let bottom = TOP + FIELD;
    let most = most(plot);
    let step = step_for(most);
    let end = (most / step).ceil() * step;
    let y = |value: f64| bottom - FIELD * (value / end).clamp(0.0, 1.0);
    let mut places: Vec<f64> = plot
        .lines
        .iter()
        .flat_map(|line| line.points.iter().map(|point| point.at))
        .collect();
    places.sort_by(f64::total_cmp);
    places.dedup();
    let scale = |at: f64| {
        if plot.by_factors {
            at.max(f64::MIN_POSITIVE).log10()
        } else {
            at
        }
    };
    let (first, last) = (
        places.first().copied().map_or(0.0, scale),
        places.last().copied().map_or(1.0, scale),
    );
    let width = (last - first).max(1e-9);
    // Half a finger of room at both ends, for the whiskers.
    let x = |at: f64| FIELD_LEFT + 20.0 + (FIELD_RIGHT - FIELD_LEFT - 40.0) * (scale(at) - first) / width;
    let mut svg = begin(plot, FIELD_LEFT, bottom + BOTTOM);
    for tick in ticks(step, end) {
        let _ = writeln!(
            svg,
            "<path d=\"M{FIELD_LEFT} {0:.1}H{FIELD_RIGHT}\" stroke=\"#e4e4e4\"/><text x=\"{1}\" y=\"{2:.1}\" text-anchor=\"end\" fill=\"#666\">{3}</text>",
            y(tick),
            FIELD_LEFT - 8.0,
            y(tick) + 4.0,
            number(tick, step)
        );
    }
    for place in &places {
        let _ = writeln!(
            svg,
            "<path d=\"M{0:.1} {bottom}v5\" stroke=\"#999\"/><text x=\"{0:.1}\" y=\"{1}\" text-anchor=\"middle\" fill=\"#666\">{2}</text>",
            x(*place),
            bottom + 18.0,
            thousands(*place)
        );
    }
    let _ = writeln!(
        svg,
        "<path d=\"M{FIELD_LEFT} {bottom}H{FIELD_RIGHT}\" stroke=\"#999\"/>\
         <text x=\"{:.1}\" y=\"{}\" text-anchor=\"middle\" fill=\"#666\">{}</text>\
         <text x=\"16\" y=\"{:.1}\" text-anchor=\"middle\" fill=\"#666\" transform=\"rotate(-90 16 {3:.1})\">{}</text>",
        f64::midpoint(FIELD_LEFT, FIELD_RIGHT),
        bottom + 36.0,
        escape(over),
        f64::midpoint(TOP, bottom),
        escape(&plot.unit)
    );
    if let Some(goal) = plot.goal {
        let _ = writeln!(
            svg,
            "<path d=\"M{FIELD_LEFT} {0:.1}H{FIELD_RIGHT}\" stroke=\"{GOAL}\" stroke-dasharray=\"4 3\"/>\
             <text x=\"{1}\" y=\"{2:.1}\" font-size=\"10\" fill=\"{GOAL}\">goal</text>",
            y(goal),
            FIELD_RIGHT + 4.0,
            y(goal) + 3.0
        );
    }
    for (index, line) in plot.lines.iter().enumerate() {
        one_line(&mut svg, line, index, &x, &y);
    }
    svg.push_str("</svg>\n");
    svg
}

fn one_line(svg: &mut String, line: &Line, index: usize, x: &impl Fn(f64) -> f64, y: &impl Fn(f64) -> f64) {
    let colour = COLOURS[index % COLOURS.len()];
    let known = line.points.iter().filter(|point| !point.values.is_empty());
    let known: Vec<(f64, Figure)> = known.map(|point| (point.at, Figure::of(&point.values))).collect();
    let path: Vec<String> = known
        .iter()
        .map(|(at, figure)| format!("{:.1},{:.1}", x(*at), y(figure.median)))
        .collect();
    let _ = writeln!(
        svg,
        "<polyline points=\"{}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\"/>",
        path.join(" ")
    );
    for (at, figure) in &known {
        let _ = writeln!(
            svg,
            "<path d=\"M{0:.1} {1:.1}V{2:.1}\" stroke=\"{colour}\"/><circle cx=\"{0:.1}\" cy=\"{3:.1}\" r=\"3\" fill=\"{colour}\"/>",
            x(*at),
            y(figure.least),
            y(figure.most),
            y(figure.median)
        );
    }
    let at = TOP + 40.0 + 20.0 * index as f64;
    let _ = writeln!(
        svg,
        "<path d=\"M{0} {at}h16\" stroke=\"{colour}\" stroke-width=\"2\"/><text x=\"{1}\" y=\"{2}\" font-size=\"11\">{3}</text>",
        FIELD_RIGHT + 6.0,
        FIELD_RIGHT + 26.0,
        at + 4.0,
        escape(&line.name)
    );
}

fn ticks(step: f64, end: f64) -> impl Iterator<Item = f64> {
    (0..)
        .map(move |n| f64::from(n) * step)
        .take_while(move |tick| *tick <= end + step / 2.0)
}

/// Digits after the point that tell neighbours of a scale with this step apart.
fn decimals(step: f64) -> usize {
    (-step.log10()).ceil().clamp(0.0, 6.0) as usize
}

fn number(value: f64, step: f64) -> String {
    if step >= 1.0 {
        thousands(value)
    } else {
        format!("{value:.*}", decimals(step))
    }
}

/// Whole, with blanks between the thousands.
fn thousands(value: f64) -> String {
    let digits = format!("{value:.0}");
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push('\u{a0}');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use farm_lab::outcome::Point;

    fn plot(over: Option<&str>) -> Plot {
        let point = |at: f64| Point {
            at,
            values: vec![at, at + 1.0, at + 2.0],
        };
        let line = |name: &str| Line {
            name: name.to_owned(),
            points: vec![point(1.0), point(100.0)],
        };
        Plot {
            name: "p".to_owned(),
            title: "A & B".to_owned(),
            unit: "ns".to_owned(),
            over: over.map(str::to_owned),
            by_factors: true,
            lines: vec![line("a<b"), line("c")],
            goal: Some(50.0),
        }
    }

    #[test]
    fn each_line_is_drawn_with_its_name_and_the_goal_once() {
        let svg = draw(&plot(Some("rules")));
        assert_eq!(svg.matches("<polyline").count(), 2);
        assert_eq!(svg.matches("stroke-dasharray").count(), 1);
        assert!(svg.contains("a&lt;b") && svg.contains("A &amp; B"), "{svg}");
    }

    #[test]
    fn a_bar_without_values_says_so() {
        let mut bars = plot(None);
        bars.lines[1].points.clear();
        let svg = draw(&bars);
        assert_eq!(
            (
                svg.matches("fill=\"#8fb4d6\"").count(),
                svg.matches("not measured").count()
            ),
            (1, 1)
        );
        assert!(svg.contains("2.0 (1.0–3.0)") || svg.contains("2 (1–3)"), "{svg}");
    }

    #[test]
    fn a_picture_of_nothing_is_a_picture() {
        for over in [None, Some("x")] {
            let empty = Plot {
                lines: Vec::new(),
                goal: None,
                ..plot(over)
            };
            let svg = draw(&empty);
            assert!(svg.ends_with("</svg>\n") && !svg.contains("NaN"), "{svg}");
        }
    }

    #[test]
    fn thousands_are_told_apart() {
        assert_eq!(
            [thousands(7.0), thousands(1000.0), thousands(1_234_567.0)],
            ["7", "1\u{a0}000", "1\u{a0}234\u{a0}567"]
        );
    }
}
