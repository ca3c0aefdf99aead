//! The case list of [`selftest`](crate::selftest).

use sluice_tensor::{DType, Tensor};
use sluice_testkit::Rng;

use super::{bwd, fwd, fwd_sum, naive};
use crate::selftest::Check;

/// `(tokens, vocabulary, width)`.
const CASES: &[(usize, usize, usize)] = &[(0, 5, 3), (1, 1, 1), (63, 100, 63), (1000, 63, 100), (100, 1000, 1000)];

pub(crate) fn run(check: &mut Check<'_>) {
    for &(n, vocab, m) in CASES {
        let mut rng = Rng::new(1);
        let table = rng.normal_tensor([vocab, m]);
        let dy = rng.normal_tensor([n, m]);
        let tokens: Vec<u32> = (0..n).map(|_| rng.below(vocab) as u32).collect();
        for table in [table.to_dtype(DType::Bf16), table] {
            if !check.case("embedding", format!("{n} of [{vocab}, {m}] {:?}", table.dtype())) {
                continue;
            }
            check.compare("y", &fwd(&tokens, &check.put(&table)), &naive::fwd(&tokens, &table), 0.0);
        }
        if !check.case("embedding", format!("gradient of [{vocab}, {m}] from {n}")) {
            continue;
        }
        let start = Tensor::full(10.0, [vocab, m]);
        let mut dtable = check.put(&start);
        bwd(&check.put(&dy), &tokens, &mut dtable);
        let want: Vec<f64> = naive::bwd(&dy, &tokens, vocab).into_iter().map(|x| x + 10.0).collect();
        check.compare("dtable added to what was there", &dtable, &want, 1e-5);
    }
    for (n, sizes, m) in [(0, [5, 4, 2], 3), (1, [1, 1, 1], 1), (70, [100, 63, 2], 300)] {
        if !check.case("embedding", format!("{n} sums of {sizes:?} by {m}")) {
            continue;
        }
        let mut rng = Rng::new(4);
        let tables = sizes.map(|vocab| rng.normal_tensor([vocab, m]));
        let rows = sizes.map(|vocab| (0..n).map(|_| rng.below(vocab) as u32).collect::<Vec<_>>());
        let there = [0, 1, 2].map(|i| check.put(&tables[i]));
        let y = fwd_sum([&rows[0], &rows[1], &rows[2]], [&there[0], &there[1], &there[2]]);
        let [a, b, c] = [0, 1, 2].map(|i| naive::fwd(&rows[i], &tables[i]));
        let want: Vec<f64> = a.iter().zip(&b).zip(&c).map(|((a, b), c)| a + b + c).collect();
        check.compare("y", &y, &want, 1e-6);
    }
}
