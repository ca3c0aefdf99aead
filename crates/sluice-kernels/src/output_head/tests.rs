use sluice_tensor::{DType, Tensor};
use sluice_testkit::{Rng, assert_close, check_gradient};

use super::cases::{CASES, Case, Inputs, TERMS};
use super::*;
use crate::row_chunks::on_one_and_three_threads;

const BOTH: Wanted = Wanted { input: true, weight: true };

impl Inputs {
    fn distill(&self, terms: DistillTerms, grads: Wanted) -> Distill {
        distill(&self.h_s, &self.w_s, &self.h_t, &self.w_t, Some(&self.targets), &self.weights, terms, grads)
    }
}

/// Gradients of input and weight from those of the logits.
fn through_projection(dz: &[Vec<f64>], h: &Tensor, w: &Tensor) -> (Vec<f32>, Vec<f32>) {
    let [vocab, m] = w.dims();
    let (mut dh, mut dw) = (vec![0.0f64; h.len()], vec![0.0f64; w.len()]);
    for (i, dz) in dz.iter().enumerate() {
        for j in 0..vocab {
            for p in 0..m {
                dh[i * m + p] += dz[j] * w.f32()[j * m + p] as f64;
                dw[j * m + p] += dz[j] * h.f32()[i * m + p] as f64;
            }
        }
    }
    (to_f32(&dh), to_f32(&dw))
}

fn to_f32(x: &[f64]) -> Vec<f32> {
    x.iter().map(|&x| x as f32).collect()
}

fn check_cross_entropy(case: &Case) {
    let what = format!("cross entropy {} x {} x {}", case.n, case.m_s, case.vocab);
    let inputs = Inputs::new(case);
    let got = cross_entropy(&inputs.h_s, &inputs.w_s, &inputs.targets, &inputs.weights, BOTH);
    let z = naive::logits(&inputs.h_s, &inputs.w_s);
    let (mut nll, mut dz) = (vec![0.0; case.n], vec![vec![0.0; case.vocab]; case.n]);
    for i in (0..case.n).filter(|&i| inputs.weights[i] != 0.0) {
        let (loss, gradient) = naive::cross_entropy(&z[i], inputs.targets[i] as usize);
        nll[i] = loss;
        dz[i] = gradient.iter().map(|g| g * inputs.weights[i] as f64).collect();
        let best = z[i].iter().copied().fold(f64::NEG_INFINITY, f64::max);
        assert!(best - z[i][got.top1[i] as usize] < 1e-5, "{what}: top token of row {i}");
    }
    let (dh, dw) = through_projection(&dz, &inputs.h_s, &inputs.w_s);
    assert_close(&what, &got.nll, &to_f32(&nll), 3e-6);
    assert_close(&what, got.dh.unwrap().f32(), &dh, 5e-6);
    assert_close(&what, got.dw.unwrap().f32(), &dw, 1e-5);
}

fn check_distill(case: &Case) {
    let what = format!("distill {} x {} x {}", case.n, case.m_s, case.vocab);
    let inputs = Inputs::new(case);
    let got = inputs.distill(case.terms, BOTH);
    let (z_s, z_t) = (naive::logits(&inputs.h_s, &inputs.w_s), naive::logits(&inputs.h_t, &inputs.w_t));
    let mut dz = vec![vec![0.0; case.vocab]; case.n];
    for i in 0..case.n {
        let weight = inputs.weights[i] as f64;
        if weight == 0.0 {
            assert_eq!((got.kl[i], got.boundary[i], got.nll_student[i], got.nll_teacher[i], got.agree[i]), (0.0, 0.0, 0.0, 0.0, false));
            continue;
        }
        let target = inputs.targets[i] as usize;
        let (ce, d_ce) = naive::cross_entropy(&z_s[i], target);
        let (kl, d_kl) = naive::kl(&z_s[i], &z_t[i], case.terms.temperature as f64);
        let (boundary, d_boundary) = naive::boundary(&z_s[i], &z_t[i], &case.terms);
        let nll_t = naive::cross_entropy(&z_t[i], target).0;
        for j in 0..case.vocab {
            let terms = &case.terms;
            dz[i][j] = weight * (terms.kl as f64 * d_kl[j] + terms.ce as f64 * d_ce[j] + terms.boundary as f64 * d_boundary[j]);
        }
        let (got, want) =
            ([got.kl[i], got.boundary[i], got.nll_student[i], got.nll_teacher[i]], [kl, boundary, ce, nll_t].map(|x| x as f32));
        assert_close(&format!("{what} row {i}"), &got, &want, 1e-5);
    }
    let (dh, dw) = through_projection(&dz, &inputs.h_s, &inputs.w_s);
    assert_close(&what, got.dh.unwrap().f32(), &dh, 1e-5);
    assert_close(&what, got.dw.unwrap().f32(), &dw, 2e-5);

    // Without gradients the same losses come out.
    let losses = inputs.distill(case.terms, Wanted::NOTHING);
    assert!(losses.dh.is_none() && losses.dw.is_none());
    assert_close(&what, &losses.kl, &got.kl, 0.0);
}

#[test]
fn cross_entropy_agrees_with_the_naive_twin() {
    CASES.iter().for_each(check_cross_entropy);
}

#[test]
fn distillation_agrees_with_the_naive_twin() {
    CASES.iter().for_each(check_distill);
}

#[test]
fn gradients_match_finite_differences() {
    let case = Case { n: 4, m_s: 6, m_t: 5, vocab: 11, terms: DistillTerms { temperature: 1.7, ..TERMS }, gaps: true };
    let inputs = Inputs::new(&case);
    let weighted = |rows: &mut dyn FnMut(usize) -> f64| (0..case.n).map(|i| inputs.weights[i] as f64 * rows(i)).sum::<f64>();

    let got = cross_entropy(&inputs.h_s, &inputs.w_s, &inputs.targets, &inputs.weights, BOTH);
    let loss = |h: &Tensor, w: &Tensor| {
        let z = naive::logits(h, w);
        weighted(&mut |i| naive::cross_entropy(&z[i], inputs.targets[i] as usize).0)
    };
    check_gradient("cross entropy dh", &inputs.h_s, &got.dh.unwrap(), 1e-3, 1e-4, 30, |h| loss(h, &inputs.w_s));
    check_gradient("cross entropy dw", &inputs.w_s, &got.dw.unwrap(), 1e-3, 1e-4, 30, |w| loss(&inputs.h_s, w));

    // One term at a time, so that none hides behind another.
    let none = DistillTerms { kl: 0.0, ce: 0.0, boundary: 0.0, ..case.terms };
    for terms in [DistillTerms { kl: 1.0, ..none }, DistillTerms { ce: 1.0, ..none }, DistillTerms { boundary: 1.0, ..none }] {
        let got = inputs.distill(terms, BOTH);
        let z_t = naive::logits(&inputs.h_t, &inputs.w_t);
        let loss = |h: &Tensor, w: &Tensor| {
            let z_s = naive::logits(h, w);
            weighted(&mut |i| {
                terms.kl as f64 * naive::kl(&z_s[i], &z_t[i], terms.temperature as f64).0
                    + terms.ce as f64 * naive::cross_entropy(&z_s[i], inputs.targets[i] as usize).0
                    + terms.boundary as f64 * naive::boundary(&z_s[i], &z_t[i], &terms).0
            })
        };
        let what = format!("{terms:?}");
        check_gradient(&what, &inputs.h_s, &got.dh.unwrap(), 1e-3, 2e-4, 30, |h| loss(h, &inputs.w_s));
        check_gradient(&what, &inputs.w_s, &got.dw.unwrap(), 1e-3, 2e-4, 30, |w| loss(&inputs.h_s, w));
    }
}

/// Hidden states that are the logits themselves: the projection is the identity.
fn with_logits(student: &[f32], teacher: &[f32], terms: DistillTerms) -> Distill {
    let n = student.len();
    let identity = Tensor::from_vec((0..n * n).map(|i| if i % (n + 1) == 0 { 1.0 } else { 0.0 }).collect(), [n, n]);
    let row = |z: &[f32]| Tensor::from_vec(z.to_vec(), [1, n]);
    distill(&row(student), &identity, &row(teacher), &identity, None, &[1.0], terms, BOTH)
}

#[test]
fn kl_puts_the_teacher_first() {
    let (p_t, p_s) = ([0.9f32, 0.05, 0.05], [0.2f32, 0.5, 0.3]);
    let forward: f32 = p_t.iter().zip(&p_s).map(|(t, s)| t * (t / s).ln()).sum();
    let reverse: f32 = p_t.iter().zip(&p_s).map(|(t, s)| s * (s / t).ln()).sum();
    assert!((forward - reverse).abs() > 0.1);
    let got = with_logits(&p_s.map(f32::ln), &p_t.map(f32::ln), DistillTerms { boundary: 0.0, ..DistillTerms::default() });
    assert_close("KL", &got.kl, &[forward], 1e-6);
    // d KL(p_T || p_S) / dz_S = p_S - p_T
    assert_close("dz", got.dh.unwrap().f32(), &[-0.7, 0.45, 0.25], 1e-6);
    assert_eq!(got.agree, [false]);
    assert!(got.nll_student.is_empty() && got.nll_teacher.is_empty());
}

#[test]
fn kl_of_nearly_equal_distributions_keeps_its_digits() {
    let mut rng = Rng::new(5);
    let teacher: Vec<f32> = (0..1000).map(|_| 3.0 * rng.normal()).collect();
    assert_eq!(with_logits(&teacher, &teacher, DistillTerms::default()).kl, [0.0]);
    let student: Vec<f32> = teacher.iter().map(|z| z + 0.01 * rng.normal()).collect();
    let widen = |z: &[f32]| z.iter().map(|&z| z as f64).collect::<Vec<_>>();
    let want = naive::kl(&widen(&student), &widen(&teacher), 1.0).0;
    assert!(want > 1e-6 && want < 1e-4, "{want}");
    let got = with_logits(&student, &teacher, DistillTerms::default()).kl[0] as f64;
    assert!((got - want).abs() < 0.01 * want, "{got}, expected {want}");
}

#[test]
fn boundary_loss_is_one_sided_and_strongest_near_a_tie() {
    let only = DistillTerms { kl: 0.0, boundary: 1.0, ..DistillTerms::default() };
    // The teacher is sure by 1: omega = sigmoid((2 - 1) / 0.5). The student prefers token 1 by 0.5.
    let near = with_logits(&[0.0, 0.5, -3.0], &[2.0, 1.0, -3.0], only);
    let omega = 1.0 / (1.0 + (-2.0f32).exp());
    assert_close("loss", &near.boundary, &[omega * 1.5 * 1.5], 1e-6);
    assert_close("dz", near.dh.unwrap().f32(), &[-2.0 * omega * 1.5, 2.0 * omega * 1.5, 0.0], 1e-6);
    // A larger margin than the teacher's is no fault.
    let ahead = with_logits(&[4.0, 0.5, -3.0], &[2.0, 1.0, -3.0], only);
    assert_eq!(ahead.boundary, [0.0]);
    assert_eq!(ahead.dh.unwrap().f32(), [0.0; 3]);
    // Where the teacher is sure by 9, the wanted margin is capped at 5 and hardly counts.
    let sure = with_logits(&[0.0, 0.5, -3.0], &[10.0, 1.0, -3.0], only);
    let omega = 1.0 / (1.0 + 14.0f32.exp());
    assert_close("loss", &[sure.boundary[0] / omega], &[5.5 * 5.5], 1e-4);
}

#[test]
fn teacher_that_rules_tokens_out_gives_a_finite_kl() {
    let got = with_logits(&[0.0, 0.0, 0.0], &[200.0, 0.0, -200.0], DistillTerms::default());
    assert_close("KL", &got.kl, &[3f32.ln()], 1e-6);
    assert!(got.dh.unwrap().f32().iter().all(|d| d.is_finite()));
}

#[test]
fn diverged_logits_show_up_as_nan() {
    let got = with_logits(&[f32::NAN, 0.0], &[0.0, 1.0], DistillTerms::default());
    assert!(got.kl[0].is_nan());
    let h = Tensor::full(f32::NAN, [1, 2]);
    let got = cross_entropy(&h, &Tensor::full(1.0, [3, 2]), &[0], &[1.0], BOTH);
    assert!(got.nll[0].is_nan() && got.dh.unwrap().f32()[0].is_nan());
}

#[test]
fn rows_of_weight_zero_are_not_even_read() {
    let mut inputs = Inputs::new(&CASES[3]);
    let clean = inputs.distill(TERMS, BOTH);
    let clean_ce = cross_entropy(&inputs.h_s, &inputs.w_s, &inputs.targets, &inputs.weights, BOTH);
    for i in (0..63).filter(|i| i % 3 == 1) {
        inputs.h_s.f32_mut()[i * 24..(i + 1) * 24].fill(f32::NAN);
        inputs.h_t.f32_mut()[i * 31..(i + 1) * 31].fill(f32::NAN);
        inputs.targets[i] = u32::MAX;
    }
    let poisoned = inputs.distill(TERMS, BOTH);
    assert_eq!(poisoned.kl, clean.kl);
    assert_eq!(poisoned.dw.unwrap().f32(), clean.dw.unwrap().f32());
    let dh = poisoned.dh.unwrap();
    assert_eq!(dh.f32(), clean.dh.unwrap().f32());
    assert_eq!(dh.f32()[24..48], [0.0; 24]);
    let poisoned_ce = cross_entropy(&inputs.h_s, &inputs.w_s, &inputs.targets, &inputs.weights, BOTH);
    assert_eq!((poisoned_ce.nll, poisoned_ce.top1[1]), (clean_ce.nll, u32::MAX));
    assert_eq!(poisoned_ce.dw.unwrap().f32(), clean_ce.dw.unwrap().f32());
}

#[test]
fn chunks_of_any_size_give_the_same_result() {
    let inputs = Inputs::new(&CASES[3]);
    let Inputs { h_s, w_s, h_t, w_t, targets, weights } = &inputs;
    let whole = distill::in_chunks(h_s, w_s, h_t, w_t, Some(targets), weights, TERMS, BOTH, 1000);
    let whole_ce = cross_entropy::in_chunks(h_s, w_s, targets, weights, BOTH, 1000);
    for per_chunk in [1, 2, 5, 41] {
        let parts = distill::in_chunks(h_s, w_s, h_t, w_t, Some(targets), weights, TERMS, BOTH, per_chunk);
        assert_close("kl", &parts.kl, &whole.kl, 2e-6);
        assert_close("boundary", &parts.boundary, &whole.boundary, 1e-5);
        assert_close("dh", parts.dh.unwrap().f32(), whole.dh.as_ref().unwrap().f32(), 1e-5);
        assert_close("dw", parts.dw.unwrap().f32(), whole.dw.as_ref().unwrap().f32(), 2e-5);
        let parts_ce = cross_entropy::in_chunks(h_s, w_s, targets, weights, BOTH, per_chunk);
        assert_close("nll", &parts_ce.nll, &whole_ce.nll, 2e-6);
        assert_close("dh", parts_ce.dh.unwrap().f32(), whole_ce.dh.as_ref().unwrap().f32(), 1e-5);
        assert_close("dw", parts_ce.dw.unwrap().f32(), whole_ce.dw.as_ref().unwrap().f32(), 2e-5);
    }
}

#[test]
fn bf16_vocabulary_equals_its_f32_values() {
    let mut inputs = Inputs::new(&CASES[5]);
    inputs.w_s = inputs.w_s.to_dtype(DType::Bf16);
    inputs.w_t = inputs.w_t.to_dtype(DType::Bf16);
    let stored = inputs.distill(TERMS, Wanted { input: true, weight: false });
    inputs.w_s = inputs.w_s.to_dtype(DType::F32);
    inputs.w_t = inputs.w_t.to_dtype(DType::F32);
    let widened = inputs.distill(TERMS, Wanted { input: true, weight: false });
    assert_close("kl", &stored.kl, &widened.kl, 2e-6);
    assert_close("dh", stored.dh.unwrap().f32(), widened.dh.unwrap().f32(), 2e-6);
}

#[test]
fn thread_count_does_not_change_a_bit() {
    let case = Case { n: 50, m_s: 64, m_t: 32, vocab: 3000, terms: TERMS, gaps: true };
    let inputs = Inputs::new(&case);
    let (one, three) = on_one_and_three_threads(|| inputs.distill(TERMS, BOTH));
    assert_eq!((one.kl, one.boundary), (three.kl, three.boundary));
    assert_eq!(one.dh.unwrap().f32(), three.dh.unwrap().f32());
    assert_eq!(one.dw.unwrap().f32(), three.dw.unwrap().f32());
}

#[test]
fn memory_stays_at_a_chunk_of_logits() {
    assert!(rows_per_chunk(49_152) * 49_152 * 4 <= CHUNK_BYTES);
    assert_eq!(rows_per_chunk(100_000_000), 1);
}

#[test]
fn logits_are_the_plain_projection() {
    let inputs = Inputs::new(&CASES[3]);
    let want: Vec<f32> = naive::logits(&inputs.h_s, &inputs.w_s).concat().iter().map(|&z| z as f32).collect();
    let z = logits(&inputs.h_s, &inputs.w_s);
    assert_eq!(z.shape(), [63, 100]);
    assert_close("logits", z.f32(), &want, 3e-6);
}

#[test]
#[should_panic(expected = "student w [5, 2] and teacher w [6, 2]")]
fn different_vocabularies_are_refused() {
    let h = Tensor::zeros([1, 2]);
    distill(&h, &Tensor::zeros([5, 2]), &h, &Tensor::zeros([6, 2]), None, &[1.0], DistillTerms::default(), Wanted::NOTHING);
}
