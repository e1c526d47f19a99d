//! Runs operations that the fuzzer makes up against the model that the property tests use.

#[path = "../../tests/model/mod.rs"]
mod model;

use bolero::generator::produce;
use model::Model;

/// Operations of an input at most.
const MAX_OPERATIONS: usize = 2048;
/// Bytes of an input at most: 4 for each operation, and what their number takes.
const MAX_INPUT: usize = 4 * MAX_OPERATIONS + 16;

#[test]
fn operations() {
    let codes = produce::<Vec<u32>>().with().len(0..=MAX_OPERATIONS);
    bolero::check!().with_generator(codes).with_max_len(MAX_INPUT).for_each(|codes| {
        let mut model = Model::new();
        codes.iter().for_each(|&code| model.step(code));
        model.finish_all();
    });
}
