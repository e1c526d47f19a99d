//! When and where the tasks of a run were done, as the attention kernel notes it.

use std::fmt;
use std::mem::offset_of;
use std::sync::Arc;

use packinfer_abi::{Attendance, MOST_MERGING_WARPS, TaskStamp};

use crate::EngineError;
use crate::context::Shared;
use crate::memory::DeviceBuffer;

/// Words of a stamp: begin, end, and one whose lower half is the multiprocessor.
type Words = [u64; 3];
const _: () = assert!(size_of::<Words>() == size_of::<TaskStamp>() && offset_of!(TaskStamp, sm) == 16);

/// The stamps of a run.
#[derive(Clone, Debug)]
pub struct RunStamps {
    /// In the order of the plan: task `t` is work item `t / num_groups` for head group `t % num_groups`.
    pub tasks: Vec<TaskStamp>,
    /// Of each warp that merged rows of O when its block had no task left, of whatever block; none where another launch merges.
    pub merges: Vec<TaskStamp>,
}

/// Room on the device for the stamps of a plan's tasks.
pub struct Stamps {
    words: DeviceBuffer<Words>,
    tasks: u32,
    shared: Arc<Shared>,
}

impl Stamps {
    pub(crate) fn new(shared: &Arc<Shared>, tasks: u32) -> Result<Self, EngineError> {
        let merging_warps = shared.info.multiprocessors.min(Attendance::MOST_BLOCKS) * MOST_MERGING_WARPS;
        let words = DeviceBuffer::zeroed(shared, tasks as usize + merging_warps as usize, "stamps")?;
        Ok(Self { words, tasks, shared: shared.clone() })
    }

    /// The stamps of the last run. Waits for the device.
    ///
    /// # Errors
    ///
    /// What the driver reports, be it of the run.
    pub fn read(&self) -> Result<RunStamps, EngineError> {
        let stamp = |[begin_ns, end_ns, sm]: Words| TaskStamp { begin_ns, end_ns, sm: sm as u32, unused: 0 };
        let mut tasks: Vec<_> = self.words.download()?.into_iter().map(stamp).collect();
        let mut merges = tasks.split_off(self.tasks as usize);
        let begin_ns = tasks.iter().map(|task| task.begin_ns).min().unwrap_or(u64::MAX);
        merges.retain(|merge| merge.begin_ns >= begin_ns);
        Ok(RunStamps { tasks, merges })
    }

    /// Where a run of so many tasks notes them.
    pub(crate) fn address_for(&mut self, tasks: u32) -> Result<u64, EngineError> {
        if tasks == self.tasks { Ok(self.words.address()) } else { Err(EngineError::Stamps { room: self.tasks, tasks }) }
    }

    pub(crate) fn shared(&self) -> &Shared {
        &self.shared
    }
}

impl fmt::Debug for Stamps {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Stamps").field("tasks", &self.tasks).finish_non_exhaustive()
    }
}
