//! Whether two sets of rounds differ, and how sure that is.
//!
//! Against an earlier run: a difference counts when the ranges of the two do not overlap. Of n and m rounds of the same thing
//! that happens by chance in 2 of (n+m over n) cases, which is said beside it. Against a target that was measured in
//! alternation: the ratios within rounds count, and whether they all lie on one side (by chance in 2 of 2^n cases).
//!
//! That chance is the rounds' noise alone. It knows nothing of what differs between two runs for all of their rounds (another
//! neighbour on the host, temperature, where memory came to lie), so a run apart has to show more than rounds by turns.

use super::record::{Sample, Spread};

/// Chance from which a difference within one run is not believed: five rounds by turns.
const CHANCE_PAIRED: f64 = 0.11;
/// The same between two runs: four rounds of each.
const CHANCE_APART: f64 = 0.03;

/// What a comparison says.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Verdict {
    /// New through old.
    pub ratio: f64,
    /// Lowest and highest ratio that the rounds allow.
    pub range: (f64, f64),
    /// Whether it is beyond the spread.
    pub significant: bool,
    /// How often the rounds' noise alone would look like this.
    pub chance: f64,
    /// Whether these are rounds enough to tell.
    pub enough: bool,
}

impl Verdict {
    /// For people: `+12.0% (beyond the spread, p 0.8%)`.
    pub fn text(&self) -> String {
        let change = 100.0 * (self.ratio - 1.0);
        match (self.significant, self.enough) {
            (true, _) => format!("{change:+.1}% (beyond the spread; by noise {:.1}%)", 100.0 * self.chance),
            (false, false) => format!("{change:+.1}% (too few rounds to tell)"),
            (false, true) => format!("{change:+.1}% (within the spread)"),
        }
    }
}

/// New against old, measured at different times. `None`: one of them is missing.
pub fn apart(new: &Spread, old: &Spread) -> Option<Verdict> {
    if new.rounds == 0 || old.rounds == 0 || old.min <= 0.0 {
        return None;
    }
    let (n, m) = (new.rounds as u64, old.rounds as u64);
    // 2 / (n+m over n); the product stays small where the chance is of interest, and large means none.
    let ways = (1..=n).fold(1.0, |ways, k| ways * (m + k) as f64 / k as f64);
    let chance = (2.0 / ways).min(1.0);
    let enough = chance <= CHANCE_APART;
    let overlap = new.min <= old.max && old.min <= new.max;
    Some(Verdict {
        ratio: new.median / old.median,
        range: (new.min / old.max, new.max / old.min),
        significant: !overlap && enough,
        chance,
        enough,
    })
}

/// Ours against another one's, measured in alternation.
pub fn paired(ours: &[Sample], other: &[Sample], value: fn(&Sample) -> f64) -> Option<Verdict> {
    let pair = |a: &Sample| {
        let b = other.iter().find(|b| b.round == a.round).map(value).filter(|b| *b > 0.0)?;
        Some(value(a) / b)
    };
    let ratios: Vec<f64> = ours.iter().filter_map(pair).collect();
    let spread = Spread::of(ratios.iter().copied());
    if ratios.is_empty() {
        return None;
    }
    let chance = (2.0 * 0.5f64.powi(ratios.len() as i32)).min(1.0);
    let enough = chance <= CHANCE_PAIRED;
    let one_side = spread.min > 1.0 || spread.max < 1.0;
    Some(Verdict {
        ratio: spread.median,
        range: (spread.min, spread.max),
        significant: one_side && enough,
        chance,
        enough,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spread(values: &[f64]) -> Spread {
        Spread::of(values.iter().copied())
    }

    #[test]
    fn ranges_that_overlap_tell_nothing() {
        let old = spread(&[100.0, 101.0, 102.0, 103.0, 104.0]);
        let same = apart(&spread(&[104.0, 105.0, 106.0, 107.0, 108.0]), &old).expect("both are there");
        assert!(!same.significant && same.text().contains("within the spread"), "{}", same.text());
        let faster = apart(&spread(&[105.0, 106.0, 107.0, 108.0, 109.0]), &old).expect("both are there");
        assert!(faster.significant && faster.text().starts_with("+4.9% (beyond"), "{}", faster.text());
        assert!((faster.chance - 2.0 / 252.0).abs() < 1e-9, "10 over 5 are 252");
        assert_eq!(faster.range, (105.0 / 104.0, 109.0 / 100.0));
    }

    #[test]
    fn few_rounds_prove_nothing() {
        // Three rounds of each differ by noise in one case of ten; two runs may differ by more than noise.
        let (old, new) = (spread(&[1.0, 1.1, 1.2]), spread(&[9.0, 9.1, 9.2]));
        let verdict = apart(&new, &old).expect("both are there");
        assert!(!verdict.significant && verdict.text().contains("too few"), "{}", verdict.text());
        let (old, new) = (spread(&[1.0, 1.1, 1.2, 1.3]), spread(&[9.0, 9.1, 9.2, 9.3]));
        assert!(apart(&new, &old).is_some_and(|v| v.significant), "four of each are enough");
        assert!(apart(&spread(&[]), &old).is_none() && apart(&new, &spread(&[0.0])).is_none());
    }

    #[test]
    fn pairs_are_compared_within_their_round() {
        let samples = |values: &[f64]| -> Vec<Sample> {
            let round = |(i, v): (usize, &f64)| Sample { round: i as u32 + 1, iops: *v, ..Sample::default() };
            values.iter().enumerate().map(round).collect()
        };
        // The machine's speed changes threefold between rounds; ours is always 10% faster.
        let verdict = paired(
            &samples(&[110.0, 330.0, 220.0, 110.0, 330.0]),
            &samples(&[100.0, 300.0, 200.0, 100.0, 300.0]),
            |s| s.iops,
        );
        let verdict = verdict.expect("pairs");
        assert!(verdict.significant && (verdict.ratio - 1.1).abs() < 1e-9);
        let mixed = paired(&samples(&[90.0, 110.0, 110.0, 110.0, 110.0]), &samples(&[100.0; 5]), |s| s.iops);
        assert!(!mixed.expect("pairs").significant);
        assert!(paired(&samples(&[1.0]), &[], |s| s.iops).is_none());
    }
}
