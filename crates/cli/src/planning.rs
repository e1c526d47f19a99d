//! Plans of batches, and how long they take to make.

use std::time::Instant;

use packinfer_batch::Batch;
use packinfer_planner::{Packing, Plan, PlanError, Planner};

/// A plan, and the time of making it.
pub struct Planned {
    pub plan: Plan,
    /// Time of a second plan in the memory of the first, in µs: what a step costs in a server that has been running for a while.
    pub plan_us: f64,
}

/// Plans a batch, twice.
pub fn packed(batch: &Batch, mut planner: Planner) -> Result<Planned, PlanError> {
    let mut plan = planner.plan(batch)?;
    let start = Instant::now();
    planner.plan_into(batch, &mut plan)?;
    Ok(Planned { plan, plan_us: start.elapsed().as_secs_f64() * 1e6 })
}

/// Plans a batch in another way, for the kernels that `packed`, another plan of it, is for.
pub fn for_comparison(batch: &Batch, packed: &Plan, packing: Packing) -> Result<Plan, PlanError> {
    Planner::new(*packed.model()).with_packing(packing).plan(batch)
}
