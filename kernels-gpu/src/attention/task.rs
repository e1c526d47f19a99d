//! What a thread block does at a time: one work item for one head group.

use packinfer_abi::{AttentionParams, DIRECT, DeviceAddress, TaskStamp, WorkItem};

#[cfg(feature = "sm_90a")]
use crate::e4m3::scale;
use crate::ptx::math::{divide, opaque_address};
use crate::ptx::memory::{load_global_x4, store_global, store_global_u64};
use crate::ptx::special::{global_timer, multiprocessor};
use crate::rows::RowTable;

/// One work item for one head group.
#[derive(Clone, Copy)]
pub(crate) struct Task {
    pub params: AttentionParams,
    pub index: u32,
    pub item: WorkItem,
    pub head_group: u32,
    pub kv_head: u32,
    pub rows: RowTable,
}

impl Task {
    /// The task of the given index, with its rows in `rows`.
    ///
    /// # Safety
    ///
    /// `params` are valid, and there is such a task.
    #[inline(always)]
    pub unsafe fn load(params: AttentionParams, index: u32, rows: RowTable) -> Self {
        let item_index = divide(index, params.heads.num_groups);
        let head_group = index - item_index * params.heads.num_groups;
        Self {
            index,
            item: load_item(params.items + u64::from(item_index) * size_of::<WorkItem>() as u64),
            head_group,
            kv_head: divide(head_group, params.heads.groups_per_kv_head()),
            params,
            rows,
        }
    }

    /// What K and V in FP8 are multiplied with.
    ///
    /// # Safety
    ///
    /// The scales are valid.
    #[cfg(feature = "sm_90a")]
    #[inline(always)]
    pub unsafe fn kv_scales(&self) -> [f32; 2] {
        [scale(self.params.k_scales, self.kv_head), scale(self.params.v_scales, self.kv_head)]
    }

    /// Whether the item writes O itself.
    #[inline(always)]
    pub fn is_direct(&self) -> bool {
        self.item.partial_row == DIRECT
    }

    /// Whether somebody wants the log-sum-exp of its rows: the caller, or whoever merges them.
    #[inline(always)]
    pub fn stores_lse(&self) -> bool {
        !self.is_direct() || opaque_address(self.params.lse) != 0
    }

    /// Whether the rows get their sinks here: those of partials get them when they are merged.
    #[inline(always)]
    pub fn has_sinks(&self) -> bool {
        self.is_direct() && opaque_address(self.params.sinks) != 0
    }

    /// Index of a tile row in the partial buffers.
    #[inline(always)]
    pub fn partial_index(&self, row: u32) -> u64 {
        u64::from(self.head_group) * u64::from(self.params.num_partial_rows) + u64::from(self.item.partial_row + row)
    }
}

/// Notes when tasks begin and end.
#[derive(Clone, Copy)]
pub(crate) struct Stamper {
    stamps: DeviceAddress,
}

impl Stamper {
    /// Of a launch, if it asks for it.
    #[inline(always)]
    pub fn of(params: &AttentionParams) -> Option<Self> {
        let stamps = opaque_address(params.stamps);
        (stamps != 0).then_some(Self { stamps })
    }

    /// Notes that a task begins.
    ///
    /// # Safety
    ///
    /// There is such a task.
    #[inline(always)]
    pub unsafe fn begin(self, task: u32) {
        let stamp = self.stamp(task);
        store_global_u64(stamp + core::mem::offset_of!(TaskStamp, begin_ns) as u64, global_timer());
        store_global(stamp + core::mem::offset_of!(TaskStamp, sm) as u64, multiprocessor());
    }

    /// Notes that a task has ended.
    ///
    /// # Safety
    ///
    /// There is such a task.
    #[inline(always)]
    pub unsafe fn end(self, task: u32) {
        store_global_u64(self.stamp(task) + core::mem::offset_of!(TaskStamp, end_ns) as u64, global_timer());
    }

    #[inline(always)]
    fn stamp(self, task: u32) -> DeviceAddress {
        self.stamps + u64::from(task) * size_of::<TaskStamp>() as u64
    }
}

/// Reads a work item: two loads of 16 bytes.
#[inline(always)]
unsafe fn load_item(address: u64) -> WorkItem {
    const { assert!(size_of::<WorkItem>() == 32) };
    let words = [load_global_x4(address), load_global_x4(address + 16)];
    core::mem::transmute(words)
}
