//! The fuzz target is `tests/operations.rs`. With stable Rust, for ten minutes:
//!
//! ```text
//! BOLERO_RANDOM_TEST_TIME_MS=600000 BOLERO_RANDOM_ITERATIONS=1000000000 cargo test -- --nocapture
//! ```
//!
//! With nightly Rust and `cargo install cargo-bolero`, `cargo bolero test operations` lets libFuzzer search by coverage.
//!
//! The last long run was of bolero's random engine, without coverage: 600 seconds, 549,822 inputs of up to 2048 operations,
//! no finding.
