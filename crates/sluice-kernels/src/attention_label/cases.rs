//! The case list of [`selftest`](crate::selftest).

use sluice_tensor::{DType, Tensor};
use sluice_testkit::Rng;

use super::{key_weight, label, naive, query_weight};
use crate::selftest::Check;

/// `(B, T, H, G, D, M)`.
const CASES: &[(usize, usize, usize, usize, usize, usize)] =
    &[(1, 1, 1, 1, 1, 1), (2, 31, 4, 2, 8, 63), (1, 100, 3, 3, 17, 40), (1, 65, 9, 3, 64, 576), (1, 9, 2, 1, 128, 100), (1, 0, 2, 1, 4, 8)];

pub(crate) fn run(check: &mut Check<'_>) {
    for &(b, t, n_heads, g, d, m) in CASES {
        let mut rng = Rng::new(m as u64);
        let (mut w_o, v, h) = (rng.normal_tensor([m, n_heads * d]), rng.normal_tensor([b, t, g, d]), rng.normal_tensor([b, t, m]));
        w_o.f32_mut().iter_mut().for_each(|w| *w /= (d as f32).sqrt());
        if !check.case("attention_label", format!("[{b}, {t}, {n_heads} of {g}, {d}], width {m}")) {
            continue;
        }
        check.compare("key weight", &key_weight(&check.put(&w_o), &check.put(&v)), &naive::key_weight(&w_o, &v), 1e-5);
        let narrow = w_o.to_dtype(DType::Bf16);
        let want = naive::key_weight(&narrow.to_dtype(DType::F32), &v);
        check.compare("key weight of bf16", &key_weight(&check.put(&narrow), &check.put(&v)), &want, 1e-5);
        let narrow = v.to_dtype(DType::Bf16);
        let want = naive::key_weight(&w_o, &narrow.to_dtype(DType::F32));
        check.compare("key weight of bf16 values", &key_weight(&check.put(&w_o), &check.put(&narrow)), &want, 1e-5);
        check.compare("query weight", &query_weight(&check.put(&h)), &naive::query_weight(&h), 3e-6);
    }
    if !check.case("attention_label", "zeros") {
        return;
    }
    let nothing = Tensor::zeros([1, 3, 4]);
    check.compare("query weight", &query_weight(&check.put(&nothing)), &naive::query_weight(&nothing), 1e-6);
    let mass = Tensor::from_vec(vec![0.0, 1e-30, 1e-20, 0.5, 1.0, 300.0, 1e12], [7]);
    check.compare("label", &label(&check.put(&mass)), &naive::label(&mass), 1e-6);
}
