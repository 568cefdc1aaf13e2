//! Median and spread of values that were measured again and again.

/// Median, least and most.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Figure {
    /// The middle one; of an even number half-way between the two.
    pub median: f64,
    /// The least.
    pub least: f64,
    /// The most.
    pub most: f64,
}

impl Figure {
    /// Of these; not numbers if there are none.
    pub fn of(values: &[f64]) -> Self {
        let mut sorted = values.to_vec();
        sorted.sort_by(f64::total_cmp);
        let half = sorted.len() / 2;
        let at = |index: usize| sorted.get(index).copied().unwrap_or(f64::NAN);
        let median = if sorted.len() % 2 == 1 {
            at(half)
        } else {
            f64::midpoint(at(half.wrapping_sub(1)), at(half))
        };
        Self {
            median,
            least: at(0),
            most: at(sorted.len().wrapping_sub(1)),
        }
    }

    /// `median (least–most)`, with as many digits after the point.
    pub fn text(self, digits: usize) -> String {
        if self.median.is_nan() {
            return "–".to_owned();
        }
        // Without the sign that a small negative number would leave on its zero.
        let cell = |value: f64| {
            let text = format!("{value:.digits$}");
            if text.trim_start_matches('-').chars().all(|c| matches!(c, '0' | '.')) {
                text.trim_start_matches('-').to_owned()
            } else {
                text
            }
        };
        format!("{} ({}–{})", cell(self.median), cell(self.least), cell(self.most))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_of_an_even_number_lies_between() {
        assert_eq!(Figure::of(&[4.0, 1.0, 3.0, 2.0]).median, 2.5);
        assert_eq!(Figure::of(&[4.0, 1.0, 3.0]).text(1), "3.0 (1.0–4.0)");
    }

    #[test]
    fn nothing_measured_is_no_number() {
        assert!(Figure::of(&[]).median.is_nan());
        assert_eq!(Figure::of(&[]).text(2), "–");
    }

    #[test]
    fn a_small_negative_number_has_no_sign_when_it_is_shown_as_zero() {
        assert_eq!(Figure::of(&[-0.2]).text(0), "0 (0–0)");
    }
}
