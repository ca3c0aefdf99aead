//! The case list of [`selftest`](crate::selftest).

use sluice_tensor::cuda::Precision;
use sluice_tensor::{Device, Tensor};
use sluice_testkit::Rng;

use super::{Lens, WHOLE, bwd, bwd_bidirectional, fwd, fwd_bidirectional, fwd_packed, naive, unpack};
use crate::selftest::Check;

#[derive(Clone, Copy, Debug)]
pub(super) struct Case {
    pub(super) t: usize,
    pub(super) start: usize,
    pub(super) heads: (usize, usize),
    pub(super) d: usize,
    /// Valid queries of the second sequence of the batch; the first is full. `None`: a batch of one.
    pub(super) short: Option<usize>,
}

pub(super) const BASE: Case = Case { t: 100, start: 0, heads: (3, 1), d: 64, short: None };

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
    Case { t: 300, heads: (9, 3), start: 100, short: Some(130), ..BASE },
    Case { t: 300, heads: (8, 2), d: 128, short: Some(65), ..BASE },
    Case { t: 1, start: WHOLE, ..BASE },
    Case { t: 63, start: WHOLE, heads: (4, 4), d: 32, ..BASE },
    Case { t: 128, start: WHOLE, heads: (2, 2), short: Some(77), ..BASE },
    Case { t: 300, start: WHOLE, heads: (4, 2), d: 100, short: Some(0) },
    Case { t: 200, start: WHOLE, heads: (6, 2), d: 32, short: Some(65) },
    Case { t: 300, start: WHOLE, heads: (4, 2), short: Some(0), ..BASE },
    Case { t: 300, start: WHOLE, heads: (4, 2), d: 128, short: Some(129) },
    Case { t: 150, start: WHOLE, heads: (3, 3), d: 32, short: Some(64) },
    Case { t: 130, start: WHOLE, heads: (3, 3), d: 64, short: Some(0) },
    Case { t: 1, start: WHOLE, heads: (2, 2), ..BASE },
    Case { t: 100, start: WHOLE, heads: (5, 5), short: Some(0), ..BASE },
    Case { t: 65, start: WHOLE, heads: (3, 3), short: Some(64), ..BASE },
    // More heads than blocks of threads that stay.
    Case { t: 20, start: WHOLE, heads: (140, 140), short: Some(7), ..BASE },
];

pub(super) struct Inputs {
    pub(super) q: Tensor,
    pub(super) k: Tensor,
    pub(super) v: Tensor,
    pub(super) dout: Tensor,
    pub(super) lens: Vec<usize>,
}

impl Inputs {
    /// Rows that must not be read are NaN.
    pub(super) fn poisoned(case: &Case) -> Self {
        Self::filled(case, |_| f32::NAN)
    }

    pub(super) fn filled(case: &Case, mut unread: impl FnMut(&mut Rng) -> f32) -> Self {
        let (n_batch, (h, g)) = (1 + case.short.is_some() as usize, case.heads);
        let whole = case.start == WHOLE;
        let (t, s, d) = (case.t, if whole { case.t } else { case.start + case.t + 3 }, case.d);
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
        let keys = |b: usize| if lens[b] == 0 || whole { lens[b] } else { case.start + lens[b] };
        let k = tensor(s, g, &keys);
        let v = tensor(s, g, &keys);
        let q = tensor(t, h, &|b| lens[b]);
        let dout = tensor(t, h, &|b| lens[b]);
        Self { q, k, v, dout, lens }
    }
}

pub(crate) fn run(check: &mut Check<'_>) {
    for case in CASES {
        let Case { t, start, heads: (h, g), d, short } = *case;
        if !check.case(
            "dense_attention",
            format!(
                "{t} {}, {h} on {g} heads of {d}, {}",
                if start == WHOLE { "whole".into() } else { format!("from {start}") },
                short.map_or("one".into(), |n| format!("and {n}"))
            ),
        ) {
            continue;
        }
        // Half a unit in the last place of a factor on tensor cores.
        let rounding = match (check.device().gpu().map(|gpu| gpu.precision()), d) {
            (Some(Precision::Bf16), 64 | 128) => 1.0 / 512.0,
            (Some(Precision::Bf16 | Precision::Tf32), 32 | 64) if start == WHOLE => 1.0 / 4096.0,
            _ => 0.0,
        };
        let on_tensor_cores = rounding > 0.0;
        let mut x = Inputs::poisoned(case);
        if on_tensor_cores {
            for factor in [&mut x.q, &mut x.k, &mut x.v, &mut x.dout] {
                *factor = check.factor(factor);
            }
        }
        let [q, k, v, dout] = [&x.q, &x.k, &x.v, &x.dout].map(|t| check.put(t));
        let (o, lse) = if start == WHOLE { fwd_bidirectional(&q, &k, &v, &x.lens) } else { fwd(&q, &k, &v, start, &x.lens) };
        let (want_o, want_lse) = naive::fwd(&x.q, &x.k, &x.v, start, &x.lens);
        check.compare("lse", &lse, &want_lse, if on_tensor_cores { 1e-4 } else { 1e-5 });
        let backward = || match start {
            WHOLE => bwd_bidirectional(&dout, &q, &k, &v, &o, &lse, &x.lens),
            _ => bwd(&dout, &q, &k, &v, &o, &lse, start, &x.lens),
        };
        let (dq, dk, dv) = backward();
        let (want, allowed) = if on_tensor_cores && start == WHOLE {
            // Forward on tensor cores, where weights (of which a few are near 1) and results are rounded; backward in f32, from that result.
            let (dq, dk, dv) = naive::bwd(&x.dout, &x.q, &x.k, &x.v, start, &x.lens);
            ([want_o, dq, dk, dv], [2e-5 + 4.0 * rounding, 5e-5 + 8.0 * rounding])
        } else if on_tensor_cores {
            // The twin rounds where tensor cores do, so what is left are factors and results that lie near the middle of two
            // numbers and go the other way.
            (naive::rounded(&x.dout, &x.q, &x.k, &x.v, start, &x.lens), [1.0 / 256.0, 1.0 / 128.0])
        } else {
            let (dq, dk, dv) = naive::bwd(&x.dout, &x.q, &x.k, &x.v, start, &x.lens);
            ([want_o, dq, dk, dv], [2e-5, 5e-5])
        };
        for ((output, got), want) in [("o", &o), ("dq", &dq), ("dk", &dk), ("dv", &dv)].into_iter().zip(&want) {
            check.compare(output, got, want, allowed[usize::from(output != "o")]);
        }
        if start == WHOLE && h == g {
            let packed = packed([&x.q, &x.k, &x.v]);
            check.compare("o of packed rows", &fwd_packed(&check.put(&packed), &Lens::new(&x.lens, check.device())), &want[0], allowed[0]);
            let parts = unpack(&check.put(&packed));
            let same = parts.iter().zip([&q, &k, &v]).all(|(a, b)| same_bits(a, b));
            check.require("packed rows come apart", same);
        }
        let again = backward();
        let same = [(&dq, &again.0), (&dk, &again.1), (&dv, &again.2)].into_iter().all(|(a, b)| same_bits(a, b));
        check.require("the same bits again", same);
    }
}

/// `[B, T, 3, H, D]` of three `[B, T, H, D]`.
pub(crate) fn packed(parts: [&Tensor; 3]) -> Tensor {
    let [b, t, h, d] = parts[0].dims();
    let row = |i: usize| parts.into_iter().flat_map(move |part| &part.f32()[i * h * d..(i + 1) * h * d]);
    Tensor::from_vec((0..b * t).flat_map(row).copied().collect(), [b, t, 3, h, d])
}

fn same_bits(a: &Tensor, b: &Tensor) -> bool {
    let [a, b] = [a, b].map(|x| x.to(&Device::Cpu));
    a.f32().iter().map(|x| x.to_bits()).eq(b.f32().iter().map(|x| x.to_bits()))
}
