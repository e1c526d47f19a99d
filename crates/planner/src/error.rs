//! What can keep a batch from being planned.

/// A batch that cannot be planned.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum PlanError {
    /// An array of the plan would be longer than its indices can say.
    #[error("the plan needs {count} {what}, but at most {most} can be numbered: divide the batch among several calls")]
    TooMany {
        /// What there is too much of.
        what: &'static str,
        /// How much the plan needs.
        count: u64,
        /// The limit.
        most: u64,
    },
}
