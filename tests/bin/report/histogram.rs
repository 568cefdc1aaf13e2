//! Histograms as SVG, written by hand: one strip for each series, one scale for all, the goal as a line.
//!
//! Owns the picture. Never judges: the numbers are in the tables.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use farm_lab::outcome::{Series, cell_ms, quantile};

use super::record::Record;
use super::svg::{escape, step_for};

/// Width of the picture, and where its strips begin and end.
const WIDTH: f64 = 760.0;
const LEFT: f64 = 170.0;
const RIGHT: f64 = 620.0;
/// Height of a strip and of what stands over and under all of them.
const STRIP: f64 = 46.0;
const TOP: f64 = 34.0;
const BOTTOM: f64 = 42.0;
/// Bars of a strip.
const BINS: usize = 75;

/// Writes one picture for each group of series; their paths.
pub fn write_all(record: &Record, folder: &Path) -> Result<Vec<PathBuf>> {
    fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    let mut groups: BTreeMap<&str, Vec<&Series>> = BTreeMap::new();
    let all = record.outcomes.iter().flat_map(|outcome| &outcome.series);
    for series in all.filter(|series| !series.values.is_empty()) {
        groups.entry(&series.group).or_default().push(series);
    }
    let mut files = Vec::new();
    for (group, series) in groups {
        let file = folder.join(format!("chaos-{group}.svg"));
        fs::write(&file, draw(group, &series)).with_context(|| format!("cannot write {}", file.display()))?;
        files.push(file);
    }
    Ok(files)
}

fn draw(group: &str, all: &[&Series]) -> String {
    let most = all
        .iter()
        .flat_map(|series| series.values.iter().copied().chain(series.goal))
        .fold(1.0, f64::max);
    let step = step_for(most);
    let end = (most / step).ceil() * step;
    let x = |value: f64| LEFT + (RIGHT - LEFT) * (value / end);
    let height = TOP + STRIP * all.len() as f64 + BOTTOM;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" width=\"{WIDTH}\" height=\"{height}\" \
         font-family=\"sans-serif\" font-size=\"12\" fill=\"#222\">\n<rect width=\"100%\" height=\"100%\" fill=\"#fff\"/>\n\
         <text x=\"{LEFT}\" y=\"18\" font-weight=\"bold\">{}</text>\n<text x=\"{}\" y=\"18\" fill=\"#666\">p50 / p99 / max, ms</text>\n",
        escape(&group.replace('-', ", ")),
        RIGHT + 12.0
    );
    let bottom = TOP + STRIP * all.len() as f64;
    let mut tick = 0.0;
    while tick <= end + step / 2.0 {
        let _ = writeln!(
            svg,
            "<path d=\"M{0:.1} {TOP}V{bottom}\" stroke=\"#e4e4e4\"/><text x=\"{0:.1}\" y=\"{1}\" text-anchor=\"middle\" fill=\"#666\">{tick:.0}</text>",
            x(tick),
            bottom + 16.0
        );
        tick += step;
    }
    let _ = writeln!(
        svg,
        "<text x=\"{:.1}\" y=\"{}\" text-anchor=\"middle\" fill=\"#666\">milliseconds</text>",
        f64::midpoint(LEFT, RIGHT),
        bottom + 34.0
    );
    for (index, series) in all.iter().enumerate() {
        strip(&mut svg, series, TOP + STRIP * index as f64, end, &x);
    }
    svg.push_str("</svg>\n");
    svg
}

fn strip(svg: &mut String, series: &Series, top: f64, end: f64, x: &impl Fn(f64) -> f64) {
    let base = top + STRIP - 6.0;
    let room = STRIP - 14.0;
    let bins = bins(&series.values, end);
    let tallest = bins.iter().copied().max().unwrap_or(1).max(1) as f64;
    let _ = writeln!(
        svg,
        "<text x=\"{}\" y=\"{}\" text-anchor=\"end\">{}</text><text x=\"{0}\" y=\"{}\" text-anchor=\"end\" fill=\"#888\" font-size=\"10\">{} values</text>",
        LEFT - 10.0,
        base - 14.0,
        escape(&series.name),
        base - 1.0,
        series.values.len()
    );
    for (bin, count) in bins.iter().enumerate().filter(|(_, count)| **count > 0) {
        // A single value among hundreds is what a reader looks for: at least two pixels.
        let tall = (room * *count as f64 / tallest).max(2.0);
        let (from, to) = (
            x(end * bin as f64 / BINS as f64),
            x(end * (bin + 1) as f64 / BINS as f64),
        );
        let _ = writeln!(
            svg,
            "<rect x=\"{from:.1}\" y=\"{:.1}\" width=\"{:.1}\" height=\"{tall:.1}\" fill=\"#3b76af\"/>",
            base - tall,
            to - from - 0.6
        );
    }
    let _ = writeln!(svg, "<path d=\"M{LEFT} {base}H{RIGHT}\" stroke=\"#999\"/>");
    if let Some(goal) = series.goal {
        let _ = writeln!(
            svg,
            "<path d=\"M{0:.1} {top}V{base}\" stroke=\"#c0392b\" stroke-dasharray=\"3 2\"/>",
            x(goal)
        );
    }
    let shown = [0.5, 0.99, 1.0].map(|share| cell_ms(quantile(&series.values, share)));
    let _ = writeln!(
        svg,
        "<text x=\"{}\" y=\"{}\">{}</text>",
        RIGHT + 12.0,
        base - 8.0,
        shown.join(" / ")
    );
}

/// How many values fall into each of [`BINS`] equal parts of 0 to `end`.
fn bins(values: &[f64], end: f64) -> Vec<usize> {
    let mut bins = vec![0; BINS];
    for value in values {
        let bin = (value / end * BINS as f64) as usize;
        bins[bin.min(BINS - 1)] += 1;
    }
    bins
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_value_is_in_one_bar_the_largest_too() {
        let values = [0.0, 1.0, 99.9, 100.0];
        let bins = bins(&values, 100.0);
        assert_eq!(bins.iter().sum::<usize>(), values.len());
        assert_eq!(bins[BINS - 1], 2);
    }

    #[test]
    fn a_picture_has_a_strip_for_each_series_and_its_goal() {
        let series = |name: &str, goal| Series {
            group: "g".into(),
            name: name.into(),
            values: vec![3.0, 4.0],
            goal,
        };
        let svg = draw("g", &[&series("a<b", Some(10.0)), &series("c", None)]);
        assert_eq!(svg.matches("stroke-dasharray").count(), 1);
        assert!(svg.contains("a&lt;b") && svg.contains(">c<"), "{svg}");
    }
}
