use sluice_tensor::Tensor;
use sluice_testkit::{Rng, assert_close, check_gradient, max_abs_diff, probe_weights};

use super::{bwd, fwd, naive};

#[derive(Clone, Copy, Debug)]
struct Case {
    t: usize,
    start: usize,
    heads: (usize, usize),
    d: usize,
    /// Valid queries of the second sequence of the batch; the first is full. `None`: a batch of one.
    short: Option<usize>,
}

const BASE: Case = Case { t: 100, start: 0, heads: (3, 1), d: 64, short: None };

const CASES: &[Case] = &[
    Case { t: 1, ..BASE },
    Case { t: 1, start: 333, ..BASE },
    Case { t: 1, start: 333, heads: (9, 3), d: 128, ..BASE },
    Case { t: 2, start: 40, heads: (14, 2), short: Some(1), ..BASE },
    Case { t: 63, heads: (4, 4), ..BASE },
    Case { short: Some(41), ..BASE },
    Case { short: Some(0), heads: (4, 2), d: 32, ..BASE },
    Case { d: 20, heads: (2, 1), ..BASE },
    Case { d: 128, heads: (2, 2), start: 7, ..BASE },
    Case { t: 17, start: 200, ..BASE },
    Case { t: 1000, heads: (6, 2), short: Some(513), ..BASE },
];

struct Inputs {
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor,
    lens: Vec<usize>,
}

impl Inputs {
    fn new(case: &Case) -> Self {
        Self::filled(case, |rng| rng.normal())
    }

    /// Rows that must not be read are NaN.
    fn poisoned(case: &Case) -> Self {
        Self::filled(case, |_| f32::NAN)
    }

    fn filled(case: &Case, mut unread: impl FnMut(&mut Rng) -> f32) -> Self {
        let (n_batch, (h, g)) = (1 + case.short.is_some() as usize, case.heads);
        let (t, s, d) = (case.t, case.start + case.t + 3, case.d);
        let lens: Vec<usize> = [t].into_iter().chain(case.short).collect();
        let mut rng = Rng::new(5 + t as u64);
        let mut tensor = |rows: usize, heads: usize, first_unused: &dyn Fn(usize) -> usize| {
            let mut x = rng.normal_tensor([n_batch, rows, heads, d]);
            for b in 0..n_batch {
                let unread_rows = &mut x.f32_mut()[(b * rows + first_unused(b)) * heads * d..(b + 1) * rows * heads * d];
                unread_rows.iter_mut().for_each(|x| *x = unread(&mut rng));
            }
            x
        };
        let keys = |b: usize| if lens[b] == 0 { 0 } else { case.start + lens[b] };
        let k = tensor(s, g, &keys);
        let v = tensor(s, g, &keys);
        let q = tensor(t, h, &|b| lens[b]);
        let dout = tensor(t, h, &|b| lens[b]);
        Self { q, k, v, dout, lens }
    }
}

fn to_f32(x: &[f64]) -> Vec<f32> {
    x.iter().map(|&x| x as f32).collect()
}

#[test]
fn every_case_equals_the_specification_and_reads_no_unseen_row() {
    for case in CASES {
        let x = Inputs::poisoned(case);
        let (o, lse) = fwd(&x.q, &x.k, &x.v, case.start, &x.lens);
        let (want_o, want_lse) = naive::fwd(&x.q, &x.k, &x.v, case.start, &x.lens);
        assert_close(&format!("{case:?} o"), o.f32(), &to_f32(&want_o), 2e-5);
        assert_close(&format!("{case:?} lse"), lse.f32(), &to_f32(&want_lse), 1e-5);
        let (dq, dk, dv) = bwd(&x.dout, &x.q, &x.k, &x.v, &o, &lse, case.start, &x.lens);
        let (want_dq, want_dk, want_dv) = naive::bwd(&x.dout, &x.q, &x.k, &x.v, case.start, &x.lens);
        assert_close(&format!("{case:?} dq"), dq.f32(), &to_f32(&want_dq), 5e-5);
        assert_close(&format!("{case:?} dk"), dk.f32(), &to_f32(&want_dk), 5e-5);
        assert_close(&format!("{case:?} dv"), dv.f32(), &to_f32(&want_dv), 5e-5);
    }
}

#[test]
fn specification_gradients_equal_finite_differences() {
    let x = Inputs::new(&Case { t: 12, start: 3, heads: (4, 2), d: 6, short: Some(7) });
    let weights = probe_weights(x.q.len(), 3);
    let dout = Tensor::from_vec(weights.clone(), x.q.shape());
    let loss = |q: &Tensor, k: &Tensor, v: &Tensor| {
        let (o, _) = naive::fwd(q, k, v, 3, &x.lens);
        o.iter().zip(&weights).map(|(o, w)| o * *w as f64).sum()
    };
    let (dq, dk, dv) = naive::bwd(&dout, &x.q, &x.k, &x.v, 3, &x.lens);
    let like = |g: &[f64], x: &Tensor| Tensor::from_vec(to_f32(g), x.shape());
    check_gradient("q", &x.q, &like(&dq, &x.q), 1e-3, 1e-3, 60, |q| loss(q, &x.k, &x.v));
    check_gradient("k", &x.k, &like(&dk, &x.k), 1e-3, 1e-3, 60, |k| loss(&x.q, k, &x.v));
    check_gradient("v", &x.v, &like(&dv, &x.v), 1e-3, 1e-3, 60, |v| loss(&x.q, &x.k, v));
}

#[test]
fn large_logits_do_not_overflow() {
    let mut rng = Rng::new(8);
    let mut big = |heads| Tensor::from_vec((0..130 * heads * 64).map(|_| 30.0 * rng.normal()).collect(), [1, 130, heads, 64]);
    let (q, k, v) = (big(2), big(1), big(1));
    let (o, lse) = fwd(&q, &k, &v, 0, &[130]);
    let (want_o, want_lse) = naive::fwd(&q, &k, &v, 0, &[130]);
    // Logits of several thousand: one unit in the last place of a logit is 1e-3 in its exponential.
    assert_close("lse", lse.f32(), &to_f32(&want_lse), 1e-5);
    assert_close("o", o.f32(), &to_f32(&want_o), 5e-2);
}

#[test]
fn results_do_not_depend_on_the_number_of_threads() {
    let x = Inputs::poisoned(&Case { t: 700, heads: (4, 2), short: Some(333), ..BASE });
    let run = |threads| {
        rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(|| {
            let (o, lse) = fwd(&x.q, &x.k, &x.v, 0, &x.lens);
            let (dq, dk, dv) = bwd(&x.dout, &x.q, &x.k, &x.v, &o, &lse, 0, &x.lens);
            [o, lse, dq, dk, dv]
        })
    };
    for (one, five) in run(1).iter().zip(run(5)) {
        assert_eq!(max_abs_diff(one.f32(), five.f32()), 0.0);
    }
}
