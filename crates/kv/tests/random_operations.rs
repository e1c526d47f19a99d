//! Long random runs of a pool and a tree against a simple model.

mod model;

use model::{Model, NUM_KINDS};
use proptest::collection::vec;
use proptest::prelude::*;

/// Operations a case.
const OPERATIONS: usize = 100_000;

proptest! {
    // A case takes seconds on a slow machine, and shrinking one may take minutes.
    #![proptest_config(ProptestConfig { cases: 12, max_shrink_iters: 2_000, ..ProptestConfig::default() })]

    #[test]
    fn kv_reads_as_it_was_written(codes in vec(any::<u32>(), OPERATIONS)) {
        let mut model = Model::new();
        codes.iter().for_each(|&code| model.step(code));
        let done = model.done;
        model.finish_all();
        prop_assert!(done.iter().all(|&count| count as usize > OPERATIONS / NUM_KINDS / 100), "{done:?}");
    }

    #[test]
    fn short_runs(codes in vec(any::<u32>(), 0..200)) {
        let mut model = Model::new();
        codes.iter().for_each(|&code| model.step(code));
        model.finish_all();
    }
}
