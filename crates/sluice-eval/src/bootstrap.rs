//! Confidence intervals for means over token positions. Knows numbers in reading order, one list per document, and nothing about models.
//!
//! Neighbouring tokens err together (the queries of a block share one kept set, a chapter shares one topic), so single positions are not
//! independent and resampling them one by one gives intervals that are far too narrow. What is resampled here is
//! 1. documents, with replacement, when there are several, and
//! 2. inside each drawn document, blocks of consecutive positions (circular, so every position is equally likely).
//!
//! The interval is the percentile interval of the resampled means; the mean weighs every position alike.
//! Künsch (1989), "The jackknife and the bootstrap for general stationary observations"; Davison and Hinkley (1997), section 3.8.

use serde::{Deserialize, Serialize};

use crate::rng::Rng;

/// A mean with its interval.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Estimate {
    /// Mean over all positions counted.
    #[serde(with = "nan_as_null")]
    pub mean: f64,
    /// Lower end of the interval.
    #[serde(with = "nan_as_null")]
    pub low: f64,
    /// Upper end of the interval.
    #[serde(with = "nan_as_null")]
    pub high: f64,
    /// Positions (or trials) counted.
    pub n: usize,
}

impl Estimate {
    /// A value known without sampling error, such as the difference of a policy to itself.
    pub fn exact(value: f64, n: usize) -> Self {
        Self { mean: value, low: value, high: value, n }
    }

    /// `successes` of `n` independent trials: [`Estimate::share`].
    pub fn proportion(successes: usize, n: usize) -> Option<Self> {
        assert!(successes <= n, "{successes} successes in {n} trials");
        Self::share(successes as f64 / n as f64, n)
    }

    /// A mean share over `n` independent trials with the Wilson 95 % interval, which stays honest at 0 and at 1, where a bootstrap would
    /// claim certainty. Trials that succeed in part (some tokens of an answer) vary less than the interval allows for. `None` without trials.
    pub fn share(p: f64, n: usize) -> Option<Self> {
        if n == 0 {
            return None;
        }
        assert!((0.0..=1.0).contains(&p), "{p} is not a share");
        let z = 1.959_963_984_540_054; // 97.5 % point of the normal distribution
        let m = n as f64;
        let centre = (p + z * z / (2.0 * m)) / (1.0 + z * z / m);
        let half = z / (1.0 + z * z / m) * (p * (1.0 - p) / m + z * z / (4.0 * m * m)).sqrt();
        // Rounding must not push the interval past its own mean or past a share.
        Some(Self { mean: p, low: (centre - half).clamp(0.0, p), high: (centre + half).clamp(p, 1.0), n })
    }

    /// Whether the interval lies above zero or below it.
    pub fn excludes_zero(&self) -> bool {
        self.low > 0.0 || self.high < 0.0
    }
}

/// Settings of the block bootstrap.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Bootstrap {
    /// Resampled means behind an interval.
    pub n_resamples: usize,
    /// Consecutive positions drawn together; at most a tenth of a document is, so that a short one still varies.
    pub block_len: usize,
    /// Probability that the interval aims at.
    pub level: f64,
    /// Seed of the resampling.
    pub seed: u64,
}

impl Default for Bootstrap {
    /// 2,000 resamples, 95 %, blocks of 128 positions: two routing blocks of the default rhythm.
    fn default() -> Self {
        Self { n_resamples: 2000, block_len: 128, level: 0.95, seed: 0 }
    }
}

impl Bootstrap {
    /// Mean of `documents`, each the values of its counted positions in reading order. `None` when no position was counted.
    pub fn mean<D: AsRef<[f32]>>(&self, documents: &[D]) -> Option<Estimate> {
        let sums: Vec<Vec<f64>> = documents.iter().map(|d| prefix_sums(d.as_ref().iter().map(|&v| f64::from(v)))).collect();
        self.interval(&[sums], |totals, n| totals[0] / n)
    }

    /// Mean of `a - b` on the same positions, for instance the nll of a policy and of dense attention. Pairing matters: both vary far
    /// more from token to token than they differ. Panics when the positions do not correspond.
    #[track_caller]
    pub fn paired_difference<A: AsRef<[f32]>, B: AsRef<[f32]>>(&self, a: &[A], b: &[B]) -> Option<Estimate> {
        assert_same_positions("paired_difference", a, b);
        let sums = a
            .iter()
            .zip(b)
            .map(|(a, b)| prefix_sums(a.as_ref().iter().zip(b.as_ref()).map(|(&a, &b)| f64::from(a) - f64::from(b))))
            .collect();
        self.interval(&[sums], |totals, n| totals[0] / n)
    }

    /// Share of the distance from `reference` (dense) to `baseline` (StreamingLLM) that `policy` closes, all on the same positions:
    /// `1 - mean(policy - reference) / mean(baseline - reference)`. 1 is as good as dense, 0 as the baseline, negative is worse.
    /// `None` when no position was counted or the baseline is no worse than the reference, which leaves nothing to close.
    #[track_caller]
    pub fn gap_closed<A, B, C>(&self, policy: &[A], baseline: &[B], reference: &[C]) -> Option<Estimate>
    where
        A: AsRef<[f32]>,
        B: AsRef<[f32]>,
        C: AsRef<[f32]>,
    {
        assert_same_positions("gap_closed: policy and reference", policy, reference);
        assert_same_positions("gap_closed: baseline and reference", baseline, reference);
        let minus_reference =
            |values: &[f32], reference: &[f32]| prefix_sums(values.iter().zip(reference).map(|(&v, &r)| f64::from(v) - f64::from(r)));
        let of_policy: Vec<Vec<f64>> = policy.iter().zip(reference).map(|(v, r)| minus_reference(v.as_ref(), r.as_ref())).collect();
        let of_baseline: Vec<Vec<f64>> = baseline.iter().zip(reference).map(|(v, r)| minus_reference(v.as_ref(), r.as_ref())).collect();
        let gap: f64 = of_baseline.iter().map(|d| d[d.len() - 1]).sum();
        if gap <= 0.0 {
            return None;
        }
        self.interval(&[of_policy, of_baseline], |totals, _| 1.0 - totals[0] / totals[1])
    }

    /// `series[s][d]` = prefix sums of series `s` in document `d`; all series are resampled at the same positions.
    fn interval(&self, series: &[Vec<Vec<f64>>], statistic: impl Fn(&[f64], f64) -> f64) -> Option<Estimate> {
        assert!(
            self.n_resamples > 0 && self.block_len > 0,
            "bootstrap with {} resamples of blocks of {}",
            self.n_resamples,
            self.block_len
        );
        assert!(self.level > 0.0 && self.level < 1.0, "bootstrap level {} is not a probability", self.level);
        // Documents that are too short to have a counted position take no part.
        let used: Vec<usize> = (0..series[0].len()).filter(|&d| series[0][d].len() > 1).collect();
        let len = |d: usize| series[0][d].len() - 1;
        let n: usize = used.iter().map(|&d| len(d)).sum();
        if n == 0 {
            return None;
        }
        let whole: Vec<f64> = series.iter().map(|s| used.iter().map(|&d| s[d][len(d)]).sum()).collect();

        let mut rng = Rng::new(self.seed);
        let mut totals = vec![0.0; series.len()];
        let mut means: Vec<f64> = (0..self.n_resamples)
            .map(|_| {
                totals.fill(0.0);
                let mut counted = 0;
                for i in 0..used.len() {
                    let d = if used.len() > 1 { used[rng.below(used.len())] } else { used[i] };
                    counted += len(d);
                    self.resample_document(&mut rng, len(d), |from, to| {
                        for (total, s) in totals.iter_mut().zip(series) {
                            *total += s[d][to] - s[d][from];
                        }
                    });
                }
                statistic(&totals, counted as f64)
            })
            .collect();
        means.sort_by(f64::total_cmp);
        let tail = (1.0 - self.level) / 2.0;
        Some(Estimate { mean: statistic(&whole, n as f64), low: quantile(&means, tail), high: quantile(&means, 1.0 - tail), n })
    }

    /// Draw blocks until they cover `len` positions; a block that runs past the end continues at the start.
    fn resample_document(&self, rng: &mut Rng, len: usize, mut take: impl FnMut(usize, usize)) {
        let block = self.block_len.min(len / 10).max(1);
        let mut left = len;
        while left > 0 {
            let (start, size) = (rng.below(len), block.min(left));
            let end = start + size;
            take(start, end.min(len));
            if end > len {
                take(0, end - len);
            }
            left -= size;
        }
    }
}

/// Value at probability `p` of an ascending list, linear between neighbours.
pub fn quantile(sorted: &[f64], p: f64) -> f64 {
    assert!(!sorted.is_empty() && (0.0..=1.0).contains(&p), "quantile {p} of {} values", sorted.len());
    let at = p * (sorted.len() - 1) as f64;
    let (below, above) = (at.floor() as usize, at.ceil() as usize);
    sorted[below] + (sorted[above] - sorted[below]) * (at - below as f64)
}

/// JSON has no NaN; a diverged loss is written as `null` and read back as NaN.
pub(crate) mod nan_as_null {
    use serde::{Deserialize, Deserializer, Serializer};

    #[expect(clippy::trivially_copy_pass_by_ref, reason = "serde prescribes the signature")]
    pub(crate) fn serialize<S: Serializer>(value: &f64, serializer: S) -> Result<S::Ok, S::Error> {
        if value.is_finite() { serializer.serialize_f64(*value) } else { serializer.serialize_none() }
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
        Ok(Option::<f64>::deserialize(deserializer)?.unwrap_or(f64::NAN))
    }
}

fn prefix_sums(values: impl Iterator<Item = f64>) -> Vec<f64> {
    let mut sum = 0.0;
    let mut sums = vec![0.0];
    sums.extend(values.map(|v| {
        sum += v;
        sum
    }));
    sums
}

#[track_caller]
fn assert_same_positions<A: AsRef<[f32]>, B: AsRef<[f32]>>(what: &str, a: &[A], b: &[B]) {
    let lens = |d: &[usize]| d.iter().map(usize::to_string).collect::<Vec<_>>().join(", ");
    let of_a: Vec<usize> = a.iter().map(|d| d.as_ref().len()).collect();
    let of_b: Vec<usize> = b.iter().map(|d| d.as_ref().len()).collect();
    assert!(of_a == of_b, "{what}: documents of [{}] and of [{}] positions", lens(&of_a), lens(&of_b));
}

#[cfg(test)]
mod tests {
    use sluice_testkit::Rng;

    use super::{Bootstrap, Estimate};

    /// `mean` plus an AR(1) series with unit variance and lag-1 correlation `rho`.
    fn correlated(rng: &mut Rng, n: usize, mean: f64, rho: f64) -> Vec<f32> {
        let mut state = f64::from(rng.normal());
        (0..n)
            .map(|_| {
                state = rho * state + (1.0 - rho * rho).sqrt() * f64::from(rng.normal());
                (mean + state) as f32
            })
            .collect()
    }

    /// Share of simulated data sets whose interval contains the true mean 0.3.
    fn coverage(settings: Bootstrap, mut sample: impl FnMut(&mut Rng) -> Vec<Vec<f32>>) -> f64 {
        let mut rng = Rng::new(7);
        let n_sets = 300;
        let covered = (0..n_sets)
            .filter(|&i| {
                let estimate = Bootstrap { seed: i, n_resamples: 500, ..settings }.mean(&sample(&mut rng)).unwrap();
                estimate.low <= 0.3 && 0.3 <= estimate.high
            })
            .count();
        covered as f64 / n_sets as f64
    }

    #[test]
    fn interval_covers_the_mean_of_independent_positions() {
        let share = coverage(Bootstrap { block_len: 1, ..Bootstrap::default() }, |rng| vec![correlated(rng, 400, 0.3, 0.0)]);
        assert!((0.91..=0.985).contains(&share), "coverage {share}");
    }

    #[test]
    fn blocks_cover_the_mean_of_correlated_positions_and_single_positions_do_not() {
        let sample = |rng: &mut Rng| vec![correlated(rng, 4000, 0.3, 0.9)];
        let blocks = coverage(Bootstrap { block_len: 128, ..Bootstrap::default() }, sample);
        assert!((0.90..=0.985).contains(&blocks), "coverage with blocks {blocks}");
        let single = coverage(Bootstrap { block_len: 1, ..Bootstrap::default() }, sample);
        assert!(single < 0.6, "coverage without blocks {single}");
    }

    #[test]
    fn documents_that_differ_widen_the_interval() {
        // Twelve documents, each with a level of its own: positions of one document say little about the next.
        let sample = |rng: &mut Rng| {
            (0..12)
                .map(|_| {
                    let level = 0.3 + 0.5 * f64::from(rng.normal());
                    correlated(rng, 300, level, 0.5)
                })
                .collect()
        };
        let share = coverage(Bootstrap::default(), sample);
        assert!((0.87..=0.985).contains(&share), "coverage {share}");
    }

    #[test]
    fn blocks_are_wider_than_single_positions_on_a_correlated_series() {
        let series = [correlated(&mut Rng::new(1), 8000, 0.0, 0.9)];
        let width = |block_len| {
            let e = Bootstrap { block_len, ..Bootstrap::default() }.mean(&series).unwrap();
            e.high - e.low
        };
        // An AR(1) mean has (1 + rho) / (1 - rho) = 19 times the variance of an independent one.
        let ratio = width(200) / width(1);
        assert!((3.0..5.5).contains(&ratio), "ratio of widths {ratio}, theory {}", 19f64.sqrt());
    }

    #[test]
    fn pairing_removes_what_two_policies_share() {
        let mut rng = Rng::new(3);
        let shared = correlated(&mut rng, 5000, 2.0, 0.8);
        let a: Vec<f32> = shared.iter().map(|v| v + 0.05 + 0.01 * rng.normal()).collect();
        let settings = Bootstrap::default();
        let difference = settings.paired_difference(&[&a], &[&shared]).unwrap();
        assert!((difference.mean - 0.05).abs() < 1e-3 && difference.excludes_zero(), "{difference:?}");
        assert_eq!(difference.n, 5000);
        let alone = settings.mean(&[&a]).unwrap();
        assert!(difference.high - difference.low < 0.05 * (alone.high - alone.low), "{difference:?} against {alone:?}");
    }

    #[test]
    fn gap_closed_is_one_for_dense_zero_for_the_baseline_and_absent_without_a_gap() {
        let mut rng = Rng::new(4);
        let dense = vec![correlated(&mut rng, 1000, 2.0, 0.5), correlated(&mut rng, 700, 2.5, 0.5)];
        let shifted = |by: f32| -> Vec<Vec<f32>> { dense.iter().map(|d| d.iter().map(|v| v + by).collect()).collect() };
        let settings = Bootstrap::default();
        let closed = |policy: &[Vec<f32>]| settings.gap_closed(policy, &shifted(0.4), &dense).unwrap();
        assert!((closed(&dense).mean - 1.0).abs() < 1e-6);
        assert!(closed(&shifted(0.4)).mean.abs() < 1e-6);
        let half = closed(&shifted(0.1));
        assert!((half.mean - 0.75).abs() < 1e-4 && half.low <= half.mean && half.mean <= half.high, "{half:?}");
        assert_eq!(settings.gap_closed(&dense, &shifted(-0.1), &dense), None);
    }

    #[test]
    fn same_seed_same_interval_and_another_seed_another() {
        let data = [correlated(&mut Rng::new(5), 999, 0.1, 0.3)];
        let with = |seed| Bootstrap { seed, ..Bootstrap::default() }.mean(&data).unwrap();
        assert_eq!(with(1), with(1));
        assert_ne!(with(1), with(2));
    }

    #[test]
    fn nothing_counted_gives_no_estimate_and_one_position_gives_a_point() {
        let settings = Bootstrap::default();
        assert_eq!(settings.mean::<Vec<f32>>(&[]), None);
        assert_eq!(settings.mean(&[vec![], vec![]]), None);
        assert_eq!(settings.mean(&[vec![], vec![0.5]]), Some(Estimate::exact(0.5, 1)));
    }

    #[test]
    #[should_panic(expected = "documents of [3] and of [2] positions")]
    fn unequal_positions_are_refused() {
        Bootstrap::default().paired_difference(&[[1.0f32, 2.0, 3.0].as_slice()], &[[1.0f32, 2.0].as_slice()]);
    }

    #[test]
    fn proportion_matches_wilson_and_never_claims_certainty() {
        let all = Estimate::proportion(20, 20).unwrap();
        assert!((all.low - 0.8389).abs() < 1e-3 && all.high == 1.0, "{all:?}");
        let none = Estimate::proportion(0, 20).unwrap();
        assert!(none.low == 0.0 && (none.high - 0.1611).abs() < 1e-3, "{none:?}");
        let some = Estimate::proportion(7, 10).unwrap();
        assert!((some.low - 0.3968).abs() < 1e-3 && (some.high - 0.8922).abs() < 1e-3, "{some:?}");
        assert_eq!(Estimate::proportion(0, 0), None);
    }

    #[test]
    fn a_value_that_is_not_a_number_survives_json() {
        let text = serde_json::to_string(&Estimate::exact(f64::NAN, 3)).unwrap();
        assert_eq!(text, r#"{"mean":null,"low":null,"high":null,"n":3}"#);
        assert!(serde_json::from_str::<Estimate>(&text).unwrap().mean.is_nan());
    }
}
