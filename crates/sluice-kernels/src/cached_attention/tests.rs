use sluice_testkit::Rng;

use super::*;

struct Cache {
    shape: HeadShape,
    keys: Vec<u16>,
    values: Vec<u16>,
    bias: Vec<f32>,
}

impl Cache {
    /// Every row is random, free ones too: they must not matter.
    fn random(shape: HeadShape, n_slots: usize) -> Self {
        let mut rng = Rng::new(5);
        let (mut keys, mut values) = (vec![0; shape.key_len()], vec![0; shape.value_len()]);
        let mut row = |row: usize| {
            let mut numbers = || (0..shape.head_dim).map(|_| 2.0 * rng.normal()).collect::<Vec<f32>>();
            write_rows(shape, &mut keys, &mut values, row, std::iter::once((&numbers()[..], &numbers()[..])));
        };
        (0..shape.rows()).for_each(&mut row);
        let bias = (0..n_slots).map(|_| -rng.uniform()).collect();
        Self { shape, keys, values, bias }
    }

    fn head(&self, with_bias: bool) -> Head<'_> {
        let bias = with_bias.then_some(&self.bias[..]);
        Head { shape: self.shape, keys: &self.keys, values: &self.values, n_slots: self.bias.len(), bias }
    }
}

/// `(head_dim, top_k, strip, slots in use, strip rows of the last query, query heads, tokens)`.
const CASES: [[usize; 7]; 9] = [
    [64, 256, 191, 256, 191, 3, 1],
    [64, 256, 191, 100, 150, 3, 64],
    [64, 256, 191, 0, 1, 3, 1],
    [128, 192, 127, 192, 127, 7, 5],
    [32, 0, 71, 0, 71, 2, 9],
    [16, 10, 8, 10, 1, 1, 1],
    [80, 33, 40, 33, 40, 4, 13],
    [2, 1, 1, 1, 1, 1, 1],
    [96, 31, 64, 7, 33, 8, 3],
];

#[test]
fn agrees_with_the_naive_twin_and_has_the_same_bits_query_by_query() {
    for [head_dim, top_k, strip, n_slots, seen, group, tokens] in CASES {
        let shape = HeadShape { head_dim, top_k, strip };
        let cache = Cache::random(shape, n_slots);
        let mut rng = Rng::new(7);
        let q: Vec<f32> = (0..tokens * group * head_dim).map(|_| rng.normal()).collect();
        let query = |i: usize| Query { q: i * head_dim, o: i * head_dim, n_strip: seen + 1 + i / group - tokens };
        for with_bias in [false, true] {
            let head = cache.head(with_bias);
            let (mut o, mut alone) = (vec![f32::NAN; q.len()], vec![f32::NAN; q.len()]);
            let mut scratch = vec![f32::NAN; shape.scratch_len(usize::MAX)];
            attend(&head, &q, tokens * group, query, &mut o, &mut scratch);
            for i in 0..tokens * group {
                attend(&head, &q, 1, |_| query(i), &mut alone, &mut scratch);
                let want = naive::attend(&head, &q, query(i));
                for (got, want) in o[i * head_dim..][..head_dim].iter().zip(want) {
                    assert!((*got as f64 - want).abs() < 2e-5, "{got} for {want} in {shape:?}, query {i}, bias {with_bias}");
                }
            }
            assert_eq!(o, alone, "{shape:?}");
        }
    }
}

#[test]
fn rows_move_with_their_keys_and_values() {
    let shape = HeadShape { head_dim: 48, top_k: 40, strip: 50 };
    let mut cache = Cache::random(shape, 40);
    let row = |cache: &Cache, row: usize| {
        let keys: Vec<u16> = (0..48).map(|d| cache.keys[d * shape.rows() + row]).collect();
        (keys, cache.values[row * 64..row * 64 + 48].to_vec())
    };
    let (last, second) = (row(&cache, shape.strip_row() + 49), row(&cache, shape.strip_row() + 20));
    let departure = Departure { admitted: &[(3, 7), (19, 0), (20, 7)], n: 20, left: 30 };
    let admitted = row(&cache, shape.strip_row() + 19);
    departure.apply(shape, &mut cache.keys, &mut cache.values);
    // The later of two keys has the slot that both were given.
    assert_eq!(row(&cache, 7), second);
    assert_eq!(row(&cache, 0), admitted);
    assert_eq!(row(&cache, shape.strip_row()), second);
    assert_eq!(row(&cache, shape.strip_row() + 29), last);
}

#[test]
fn far_logits_neither_overflow_nor_vanish() {
    let shape = HeadShape { head_dim: 32, top_k: 0, strip: 2 };
    let (mut keys, mut values) = (vec![0; shape.key_len()], vec![0; shape.value_len()]);
    let tokens = [([100.0; 32], [1.0; 32]), ([-100.0; 32], [2.0; 32])];
    write_rows(shape, &mut keys, &mut values, 0, tokens.iter().map(|(key, value)| (&key[..], &value[..])));
    let head = Head { shape, keys: &keys, values: &values, n_slots: 0, bias: None };
    let mut o = [f32::NAN; 32];
    let mut scratch = vec![0.0; shape.scratch_len(usize::MAX)];
    for (q, want) in [(50.0, 1.0), (-50.0, 2.0)] {
        attend(&head, &[q; 32], 1, |_| Query { q: 0, o: 0, n_strip: 2 }, &mut o, &mut scratch);
        assert_eq!(o, [want; 32]);
    }
}
