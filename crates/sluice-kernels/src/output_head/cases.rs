//! The case list of [`selftest`](crate::selftest).

use sluice_tensor::{Device, Tensor};
use sluice_testkit::Rng;

use super::{DistillTerms, RowWeights, Wanted, cross_entropy, distill, naive, queue_cross_entropy, queue_distill};
use crate::selftest::Check;

pub(super) const TERMS: DistillTerms =
    DistillTerms { kl: 1.0, ce: 0.3, boundary: 0.7, temperature: 1.0, margin_cap: 5.0, boundary_delta: 2.0, boundary_width: 0.5 };

/// Rows, width of student and teacher, vocabulary, and whether every third row is left out.
pub(super) struct Case {
    pub(super) n: usize,
    pub(super) m_s: usize,
    pub(super) m_t: usize,
    pub(super) vocab: usize,
    pub(super) terms: DistillTerms,
    pub(super) gaps: bool,
}

pub(super) const CASES: &[Case] = &[
    Case { n: 0, m_s: 5, m_t: 3, vocab: 63, terms: TERMS, gaps: true },
    Case { n: 1, m_s: 1, m_t: 1, vocab: 1, terms: TERMS, gaps: true },
    Case { n: 3, m_s: 5, m_t: 7, vocab: 2, terms: TERMS, gaps: true },
    Case { n: 63, m_s: 24, m_t: 31, vocab: 100, terms: TERMS, gaps: true },
    Case { n: 64, m_s: 24, m_t: 31, vocab: 100, terms: TERMS, gaps: false },
    Case { n: 63, m_s: 24, m_t: 31, vocab: 63, terms: DistillTerms { temperature: 2.5, ..TERMS }, gaps: true },
    Case { n: 100, m_s: 17, m_t: 9, vocab: 1000, terms: DistillTerms { ce: 0.0, boundary: 0.0, temperature: 0.5, ..TERMS }, gaps: true },
];

pub(super) struct Inputs {
    pub(super) h_s: Tensor,
    pub(super) w_s: Tensor,
    pub(super) h_t: Tensor,
    pub(super) w_t: Tensor,
    pub(super) targets: Vec<u32>,
    pub(super) weights: Vec<f32>,
}

impl Inputs {
    pub(super) fn new(case: &Case) -> Self {
        let mut rng = Rng::new(case.vocab as u64 + 1);
        // Logits with a spread of about 2, as in a language model.
        let mut scaled = |shape: [usize; 2]| {
            let mut t = rng.normal_tensor(shape);
            let factor = 2.0 / (shape[1] as f32).sqrt();
            t.f32_mut().iter_mut().for_each(|x| *x *= factor.sqrt());
            t
        };
        let (h_s, w_s) = (scaled([case.n, case.m_s]), scaled([case.vocab, case.m_s]));
        let (h_t, w_t) = (scaled([case.n, case.m_t]), scaled([case.vocab, case.m_t]));
        let targets = (0..case.n).map(|_| rng.below(case.vocab) as u32).collect();
        let weights = (0..case.n).map(|i| if case.gaps && i % 3 == 1 { 0.0 } else { 0.5 + rng.uniform() }).collect();
        Self { h_s, w_s, h_t, w_t, targets, weights }
    }
}

/// Losses per row and gradients of everything, in f64.
#[derive(Default)]
struct Want {
    nll: Vec<f64>,
    kl: Vec<f64>,
    boundary: Vec<f64>,
    dh: Vec<f64>,
    dw: Vec<f64>,
}

impl Want {
    /// With `terms`, the loss of a distillation, else plain cross-entropy. The logits come from `h` and `w`.
    fn of(h_s: &Tensor, w_s: &Tensor, h_t: &Tensor, w_t: &Tensor, x: &Inputs, terms: Option<&DistillTerms>) -> Self {
        let ([n, m], [vocab, _]) = (h_s.dims(), w_s.dims());
        let (z_s, z_t) = (naive::logits(h_s, w_s), naive::logits(h_t, w_t));
        let mut want = Self { dh: vec![0.0; n * m], dw: vec![0.0; vocab * m], ..Self::default() };
        for i in 0..n {
            let weight = x.weights[i] as f64;
            if weight == 0.0 {
                [&mut want.nll, &mut want.kl, &mut want.boundary].into_iter().for_each(|v| v.push(0.0));
                continue;
            }
            let (nll, dz_nll) = naive::cross_entropy(&z_s[i], x.targets[i] as usize);
            want.nll.push(nll);
            let dz: Vec<f64> = match terms {
                None => dz_nll,
                Some(terms) => {
                    let (kl, dz_kl) = naive::kl(&z_s[i], &z_t[i], terms.temperature as f64);
                    let (boundary, dz_boundary) = naive::boundary(&z_s[i], &z_t[i], terms);
                    want.kl.push(kl);
                    want.boundary.push(boundary);
                    let sum = |j| terms.kl as f64 * dz_kl[j] + terms.ce as f64 * dz_nll[j] + terms.boundary as f64 * dz_boundary[j];
                    (0..vocab).map(sum).collect()
                }
            };
            for (j, dz) in dz.iter().enumerate() {
                for p in 0..m {
                    want.dh[i * m + p] += weight * dz * w_s.f32()[j * m + p] as f64;
                    want.dw[j * m + p] += weight * dz * h_s.f32()[i * m + p] as f64;
                }
            }
        }
        want
    }
}

pub(crate) fn run(check: &mut Check<'_>) {
    let everything = Wanted { input: true, weight: true };
    for case in CASES {
        let x = Inputs::new(case);
        let [h_s, w_s, h_t, w_t] = [&x.h_s, &x.w_s, &x.h_t, &x.w_t].map(|t| check.put(t));
        let rounded = [&x.h_s, &x.w_s, &x.h_t, &x.w_t].map(|t| check.factor(t));
        let name = format!("{} of {} and {} to {}, T {}", case.n, case.m_s, case.m_t, case.vocab, case.terms.temperature);
        // The twin, and what it says of rounded factors.
        let twins = |terms: Option<&DistillTerms>| {
            let [a, b, c, d] = &rounded;
            (Want::of(&x.h_s, &x.w_s, &x.h_t, &x.w_t, &x, terms), Want::of(a, b, c, d, &x, terms))
        };

        if !check.case("cross_entropy", name.clone()) {
            continue;
        }
        let (want, off) = twins(None);
        let got = cross_entropy(&h_s, &w_s, &x.targets, &x.weights, everything);
        // Logits that become a gradient are activations: rounded ones are off by one part in 2^9 of up to about 8.
        let of_logits = if check.activations().len() > 1 { 2.0 * 8.0 / 512.0 } else { 0.0 };
        check.compare_slice("nll", &got.nll, &want.nll, check.allowed(3e-6, &want.nll, &off.nll, 2.0) + of_logits);
        check.compare(
            "dh",
            &got.dh.expect("asked for"),
            &want.dh,
            check.allowed(5e-6, &want.dh, &off.dh, 3.0) + dz_rounding(check) + of_logits,
        );
        check.compare(
            "dw",
            &got.dw.expect("asked for"),
            &want.dw,
            check.allowed(1e-5, &want.dw, &off.dw, 3.0) + dz_rounding(check) + of_logits,
        );
        let weights = RowWeights::of(&x.weights, check.device());
        let weighted = |of_row: &[f64]| x.weights.iter().zip(of_row).map(|(&weight, loss)| weight as f64 * loss).sum::<f64>();
        let queued = queue_cross_entropy(&h_s, &w_s, &x.targets, &weights, Wanted::NOTHING);
        let (sum, total) = (weighted(&want.nll), x.weights.iter().map(|&weight| weight as f64).sum::<f64>().max(1.0));
        for (what, scalar) in [("sum", &queued.loss), ("sum of the first term", &queued.first)] {
            check.compare(what, scalar, &[sum], check.allowed(3e-6, &want.nll, &off.nll, 2.0) * total);
        }
        let z = naive::logits(&x.h_s, &x.w_s);
        let slack = if check.rounds_factors() { 5e-2 } else { 1e-5 };
        let is_best = |i: usize| z[i].iter().all(|&other| other - z[i][got.top1[i] as usize] < slack);
        check.require("first choice", (0..case.n).all(|i| x.weights[i] == 0.0 || is_best(i)));
        let nothing = cross_entropy(&h_s, &w_s, &x.targets, &x.weights, Wanted::NOTHING);
        check.compare_slice("nll alone", &nothing.nll, &want.nll, check.allowed(3e-6, &want.nll, &off.nll, 2.0));
        let equal = of_logits > 0.0 || nothing.nll == got.nll;
        check.require("the loss without gradients is the same", equal && nothing.dh.is_none() && nothing.dw.is_none());

        assert!(check.case("distill", name), "the name that was chosen above");
        let (want, off) = twins(Some(&case.terms));
        let got = distill(&h_s, &w_s, &h_t, &w_t, Some(&x.targets), &x.weights, case.terms, everything);
        check.compare_slice("kl", &got.kl, &want.kl, check.allowed(1e-5, &want.kl, &off.kl, 2.0));
        check.compare_slice("boundary", &got.boundary, &want.boundary, check.allowed(1e-5, &want.boundary, &off.boundary, 2.0));
        check.compare_slice("nll of the student", &got.nll_student, &want.nll, check.allowed(1e-5, &want.nll, &off.nll, 2.0));
        check.compare("dh", &got.dh.expect("asked for"), &want.dh, check.allowed(1e-5, &want.dh, &off.dh, 3.0) + dz_rounding(check));
        check.compare("dw", &got.dw.expect("asked for"), &want.dw, check.allowed(2e-5, &want.dw, &off.dw, 3.0) + dz_rounding(check));
        let queued = queue_distill(&h_s, &w_s, &h_t, &w_t, Some(&x.targets), &weights, case.terms, Wanted::NOTHING);
        let of_row = |i: usize| {
            let DistillTerms { kl, ce, boundary, .. } = case.terms;
            kl as f64 * want.kl[i] + ce as f64 * want.nll[i] + boundary as f64 * want.boundary[i]
        };
        let allowed = check.allowed(1e-5, &want.kl, &off.kl, 2.0)
            + check.allowed(1e-5, &want.boundary, &off.boundary, 2.0)
            + check.allowed(1e-5, &want.nll, &off.nll, 2.0);
        check.compare("sum", &queued.loss, &[weighted(&(0..case.n).map(of_row).collect::<Vec<_>>())], allowed * total);
        check.compare("sum of the first term", &queued.first, &[weighted(&want.kl)], allowed * total);
        let without = distill(&h_s, &w_s, &h_t, &w_t, None, &x.weights, DistillTerms { ce: 0.0, ..case.terms }, Wanted::NOTHING);
        check.require("no targets, no likelihoods", without.nll_student.is_empty() && same(&without.kl, &got.kl));
    }
    if !check.case("cross_entropy", "logits without a number") {
        return;
    }
    let h = check.put(&Tensor::full(f32::NAN, [2, 3]));
    let w = check.put(&Tensor::full(1.0, [5, 3]));
    let got = cross_entropy(&h, &w, &[0, 1], &[1.0, 1.0], Wanted { input: true, weight: false });
    check.require("the loss says so", got.nll.iter().all(|x| x.is_nan()));
    let dh = got.dh.expect("asked for").to(&Device::Cpu);
    check.require("and the gradient", dh.f32().iter().all(|x| x.is_nan()));
}

/// The gradient of the logits is a factor of two products too: rounded, it is off by one part in 2^9 (bf16) of terms that reach about 2.
fn dz_rounding(check: &Check<'_>) -> f64 {
    if check.rounds_factors() { 3.0 * 2.0 / 512.0 } else { 0.0 }
}

fn same(a: &[f32], b: &[f32]) -> bool {
    a.iter().zip(b).all(|(a, b)| (a - b).abs() <= 1e-6 * b.abs().max(1.0))
}
