//! What all pictures share: the lines of a scale, and text as XML wants it.

/// The distance of the scale's lines: 1, 2 or 5 times a power of ten, at most ten of them.
pub fn step_for(most: f64) -> f64 {
    let power = 10_f64.powf((most / 10.0).log10().floor());
    [1.0, 2.0, 5.0, 10.0]
        .map(|times| times * power)
        .into_iter()
        .find(|step| most / step <= 10.0)
        .unwrap_or(10.0 * power)
}

/// `text` as it may stand in an element.
pub fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scale_has_five_to_ten_parts_or_so() {
        for (most, step) in [(1.0, 0.1), (350.0, 50.0), (420.0, 50.0), (3300.0, 500.0)] {
            assert!((step_for(most) - step).abs() < 1e-9, "{most}: {}", step_for(most));
        }
    }
}
