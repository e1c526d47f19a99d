//! Under construction.
mod plan;
pub use plan::Plan;
