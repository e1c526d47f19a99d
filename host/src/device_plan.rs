//! A plan on the device.

use std::fmt;
use std::sync::Arc;

use packinfer_abi::{Attendance, HeadGroups, KvRun, KvWidenPiece, MergeToken, RowSegment, TALL_TILE_ROWS, WorkItem};
use packinfer_batch::{AttentionShape, KvDType, KvLayout};
use packinfer_planner::{KernelFamily, KvTensors, Plan, Widening};

use crate::EngineError;
use crate::context::Shared;
use crate::kernels::{Kernel, KernelSource, MAX_BLOCKS};
use crate::stream::Stream;
use crate::upload::Upload;

/// What the arrays of a plan are aligned to on the device, in bytes: more than any of the kernels' loads need.
const ALIGNMENT: usize = 128;
/// K and V.
const KV_TENSORS: u32 = 2;

/// A plan on the device: runs once for each layer of a step, on any streams, several of them at a time.
///
/// Its memory is used again by [`crate::Engine::upload_into`]. Dropping it waits for the device, so keep one from step to step.
pub struct DevicePlan {
    pub(crate) layout: Layout,
    kernels: PlanKernels,
    arrays: Upload,
    pub(crate) shared: Arc<Shared>,
}

impl DevicePlan {
    pub(crate) fn upload(shared: &Arc<Shared>, plan: &Plan, stream: &Stream) -> Result<Self, EngineError> {
        shared.enter()?;
        let layout = Layout::new(plan)?;
        let kernels = PlanKernels::of_plan(shared, &layout)?;
        stream.check_not_captured("uploading a plan")?;
        let mut arrays = Upload::new("a plan", layout.num_bytes, stream)?;
        arrays.replace(&layout.arrays(plan), stream)?;
        Ok(Self { layout, kernels, arrays, shared: shared.clone() })
    }

    /// Replaces the plan.
    pub(crate) fn replace(&mut self, plan: &Plan, stream: &Stream) -> Result<(), EngineError> {
        self.shared.enter()?;
        stream.check_not_captured("uploading a plan")?;
        let layout = Layout::new(plan)?;
        let kernels = PlanKernels::of_plan(&self.shared, &layout)?;
        // What runs nothing, lest an error leave half a plan.
        self.layout = Layout { attention_tasks: 0, ..layout };
        self.arrays.replace(&layout.arrays(plan), stream)?;
        (self.layout, self.kernels) = (layout, kernels);
        Ok(())
    }

    /// Has the stream wait for the upload, once, and remembers it.
    pub(crate) fn run_on(&self, stream: &Stream) -> Result<(), EngineError> {
        self.arrays.read_on(stream)
    }

    /// Address on the device of the array at `offset`.
    pub(crate) fn address(&self, offset: usize) -> u64 {
        self.arrays.address(offset)
    }

    /// Whether graphs that were captured with this plan stay right when `plan` is uploaded in its place
    /// ([`crate::Engine::upload_into`]): it has as much of everything, for the same kernels.
    ///
    /// # Errors
    ///
    /// A plan too large for a launch.
    pub fn keeps_graphs(&self, plan: &Plan) -> Result<bool, EngineError> {
        Ok(self.layout.launches_as(&Layout::new(plan)?))
    }

    /// The kernels that it runs with.
    pub fn kernel_family(&self) -> KernelFamily {
        self.layout.family
    }

    /// The kernels for a run with a logit soft-cap or without.
    pub(crate) fn kernels(&self, soft_cap: bool) -> Result<PlanKernels, EngineError> {
        if soft_cap { PlanKernels::new(&self.shared, &self.layout, soft_cap) } else { Ok(self.kernels) }
    }

    /// Thread blocks of an attention kernel, which may do tasks `beside` others.
    pub(crate) fn attention_blocks(&self, beside: bool) -> u32 {
        self.layout.attention_blocks(self.shared.info.multiprocessors, beside)
    }

    /// Heads, head dimension, element type.
    pub fn shape(&self) -> AttentionShape {
        self.layout.stored.shape
    }

    /// Query tokens: rows of Q and O.
    pub fn num_query_tokens(&self) -> u32 {
        self.layout.num_query_tokens
    }

    /// The least number of slots of K and V.
    pub fn num_slots(&self) -> u32 {
        self.layout.stored.num_slots
    }

    /// How K and V lie in their pool.
    pub fn kv_layout(&self) -> KvLayout {
        self.layout.stored.layout
    }
}

impl fmt::Debug for DevicePlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DevicePlan").field("layout", &self.layout).finish_non_exhaustive()
    }
}

/// The numbers of a plan, and where its arrays lie, in bytes from the first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Layout {
    pub family: KernelFamily,
    pub heads: HeadGroups,
    pub num_query_tokens: u32,
    /// K and V of the batch.
    pub stored: KvTensors,
    /// K and V as attention reads them: the same, or what is made of them before.
    pub attended: KvTensors,
    /// K and V that are made of them before, if any are: for all tiles or for wide ones alone.
    pub widened: Option<KvTensors>,
    pub widening_blocks: u32,
    pub num_partial_rows: u32,
    pub num_items: u32,
    pub num_runs: u32,
    /// Work items, for each head group. If there are none, there is nothing to merge either.
    pub attention_tasks: u32,
    /// Of these, tasks of the front queue.
    pub front_tasks: u32,
    /// Head groups of which these come together.
    pub groups_at_once: u32,
    /// By kind of tile, the bytes of K that a block brings before the L2 cache is to give up first what it brings.
    pub settled_bytes: [u32; 2],
    /// Warps of a block that bring K of narrow tiles in FP8, and as many that bring V.
    pub narrow_loaders: u32,
    /// Lanes that begin with the tasks behind these.
    back_lanes: u32,
    /// Whether tasks behind the front may be done beside those of the front.
    pub beside: bool,
    /// Rows of O that are merged: thread blocks of the merge kernel, or counters of those that merge in the attention kernel.
    pub merged_rows: u32,
    pub items: usize,
    pub segments: usize,
    pub runs: usize,
    pub merge_tokens: usize,
    pub merge_sources: usize,
    pub pieces: usize,
    /// Work items for a kernel whose wide tiles alone read what is made, if the plan has them.
    pub widened_items: Option<usize>,
    /// Bytes of all arrays.
    num_bytes: usize,
}

impl Layout {
    fn new(plan: &Plan) -> Result<Self, EngineError> {
        let heads = plan.heads();
        let mut num_bytes = 0;
        let mut place = |bytes: &[u8]| {
            let offset = num_bytes;
            num_bytes = (offset + bytes.len()).next_multiple_of(ALIGNMENT);
            offset
        };
        Ok(Self {
            family: plan.model().kernel_family,
            heads,
            num_query_tokens: plan.num_query_tokens(),
            stored: plan.stored(),
            attended: plan.attended(),
            widened: widened_of(plan),
            widening_blocks: num_blocks("the kernel that makes K and V in FP8 what Q is", pieces_of(plan).len(), KV_TENSORS)?,
            num_partial_rows: plan.num_partial_rows(),
            num_items: plan.items().len() as u32,
            num_runs: plan.runs().len() as u32,
            attention_tasks: num_blocks("the attention kernel", plan.items().len(), heads.num_groups)?,
            front_tasks: num_blocks("the attention kernel", plan.num_front_items() as usize, heads.num_groups)?,
            groups_at_once: plan.groups_at_once(),
            settled_bytes: plan.settled_bytes(),
            narrow_loaders: plan.narrow_loaders(),
            back_lanes: plan.back_lanes(),
            beside: plan.is_beside(),
            merged_rows: num_blocks("the merge kernel", plan.merge_tokens().len(), heads.num_qo_heads)?,
            items: place(bytes_of(plan.items())),
            segments: place(bytes_of(plan.segments())),
            runs: place(bytes_of(plan.runs())),
            merge_tokens: place(bytes_of(plan.merge_tokens())),
            merge_sources: place(bytes_of(plan.merge_sources())),
            pieces: place(bytes_of(pieces_of(plan))),
            widened_items: plan.wide_tile_widening().map(|of_wide| place(bytes_of(of_wide.items))),
            num_bytes,
        })
    }

    /// Whether launches of both differ in nothing but what lies in the plan's arrays. The pool may have any number of slots.
    fn launches_as(&self, other: &Self) -> bool {
        let stored = KvTensors { num_slots: self.stored.num_slots, ..other.stored };
        let attended = if other.widened == Some(other.attended) { other.attended } else { stored };
        Self { stored, attended, ..*other } == *self
    }

    /// Thread blocks of an attention kernel: one for each task; or persistent ones, as many as have a task to begin with, but no
    /// more than one for each multiprocessor. Those that do tasks `beside` others begin with one of each queue, if there are so
    /// many.
    fn attention_blocks(&self, multiprocessors: u32, beside: bool) -> u32 {
        let Self { attention_tasks: tasks, front_tasks, .. } = *self;
        let multiprocessors = multiprocessors.min(Attendance::MOST_BLOCKS);
        match self.family {
            KernelFamily::Sm90a if beside => front_tasks.max(tasks - front_tasks).min(multiprocessors),
            KernelFamily::Sm90a => tasks.min(multiprocessors),
            _ => tasks,
        }
    }

    /// Of `blocks` persistent blocks, those that begin with the queue behind the front: as many as the plan says, but no more
    /// than there are tasks, in either queue.
    pub fn back_blocks(&self, blocks: u32) -> u32 {
        let back_tasks = self.attention_tasks - self.front_tasks;
        self.back_lanes.clamp(blocks.saturating_sub(self.front_tasks).min(back_tasks), back_tasks.min(blocks))
    }

    /// The plan's arrays, where they lie.
    fn arrays<'a>(&self, plan: &'a Plan) -> [(usize, &'a [u8]); 7] {
        let widened_items = plan.wide_tile_widening().map_or(&[][..], |of_wide| of_wide.items);
        [
            (self.items, bytes_of(plan.items())),
            (self.segments, bytes_of(plan.segments())),
            (self.runs, bytes_of(plan.runs())),
            (self.merge_tokens, bytes_of(plan.merge_tokens())),
            (self.merge_sources, bytes_of(plan.merge_sources())),
            (self.pieces, bytes_of(pieces_of(plan))),
            (self.widened_items.unwrap_or(self.pieces), bytes_of(widened_items)),
        ]
    }
}

/// What is to be made of K and V before attention, if anything is.
fn pieces_of(plan: &Plan) -> &[KvWidenPiece] {
    plan.work_before().map_or(&[], Widening::pieces)
}

/// What is made.
fn widened_of(plan: &Plan) -> Option<KvTensors> {
    let shape = plan.shape().with_kv_dtype(KvDType::Same);
    plan.work_before().map(|made| KvTensors { shape, layout: KvLayout::default(), num_slots: made.num_slots() })
}

/// Blocks of a launch with so many for each of `tasks`: one for each head, head group or tensor.
fn num_blocks(kernel: &'static str, tasks: usize, blocks_per_task: u32) -> Result<u32, EngineError> {
    let blocks = tasks as u64 * u64::from(blocks_per_task);
    let fits = u32::try_from(blocks).ok().filter(|&blocks| blocks <= MAX_BLOCKS);
    fits.ok_or(EngineError::TooManyBlocks { kernel, blocks, most: MAX_BLOCKS })
}

/// What runs a plan.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PlanKernels {
    pub attention: Kernel,
    /// Whether it does tasks behind the front beside those of the front.
    pub beside: bool,
    /// What makes K and V what attention reads, if that is to be done: for all tiles, or for wide ones where the attention kernel
    /// reads those of narrow ones as they are stored.
    pub widen: Option<Kernel>,
    /// What merges partials, if the attention kernel does not.
    pub merge: Option<Kernel>,
}

impl PlanKernels {
    /// Those that the plan was made for, without a soft-cap.
    fn of_plan(shared: &Shared, layout: &Layout) -> Result<Self, EngineError> {
        let family = layout.family;
        if !shared.families.contains(&family) {
            return Err(EngineError::KernelFamily { device: shared.info.name.clone(), family });
        }
        Self::new(shared, layout, false)
    }

    fn new(shared: &Shared, layout: &Layout, soft_cap: bool) -> Result<Self, EngineError> {
        let is_tall = layout.heads.wide_tile_rows == TALL_TILE_ROWS;
        let tall = if is_tall { KernelSource::attention_tall(layout.attended.shape, soft_cap) } else { None };
        let beside = if layout.beside && !soft_cap { KernelSource::attention_beside(layout.attended.shape) } else { None };
        let source = tall.or(beside).unwrap_or_else(|| KernelSource::attention(layout.family, layout.attended.shape, soft_cap));
        let attention = shared.kernels.get(source)?;
        let merge = match layout.family {
            KernelFamily::Sm90a => None,
            _ => Some(shared.kernels.get(KernelSource::merge(layout.attended.shape, shared.can_overlap))?),
        };
        // Kernels that are not for tasks beside others have wide tiles read what narrow ones do.
        let widens = layout.widened.is_some() && (layout.widened_items.is_none() || beside.is_some());
        let widen = widens.then(|| shared.kernels.get(KernelSource::kv_widen(layout.attended.shape.dtype())));
        Ok(Self { attention, beside: beside.is_some(), widen: widen.transpose()?, merge })
    }
}

/// A type that consists of `u32`s.
///
/// # Safety
///
/// It is `u32`, or `repr(C)` with fields that all have its size and no invalid bytes to be read from them.
unsafe trait Words: Copy {}

// SAFETY: it is.
unsafe impl Words for u32 {}
// SAFETY: its fields are `u32`s.
unsafe impl Words for KvRun {}
// SAFETY: its fields are `u32`s.
unsafe impl Words for RowSegment {}
// SAFETY: its fields are `u32`s and an enum of that representation.
unsafe impl Words for WorkItem {}
// SAFETY: its fields are `u32`s.
unsafe impl Words for MergeToken {}
// SAFETY: its fields are `u32`s.
unsafe impl Words for KvWidenPiece {}

fn bytes_of<T: Words>(array: &[T]) -> &[u8] {
    // SAFETY: there is no padding, so every byte has a value.
    unsafe { std::slice::from_raw_parts(array.as_ptr().cast(), size_of_val(array)) }
}

#[cfg(test)]
mod tests {
    use packinfer_batch::{Batch, DType, KvDType, Mask};
    use packinfer_planner::{DeviceModel, Planner};

    use super::*;

    /// Where a plan of prompts lies whose KV, of `kv_dtype`, begins with slot `first_slot`.
    fn layout_of_prompts(kv_dtype: KvDType, first_slot: u32, kv_len: u32) -> Layout {
        layout_beside_decodes(kv_dtype, first_slot, kv_len, 0)
    }

    /// The same of prompts beside so many decodes.
    fn layout_beside_decodes(kv_dtype: KvDType, first_slot: u32, kv_len: u32, decodes: u32) -> Layout {
        let shape = AttentionShape::new(32, 8, 128, DType::Bf16).expect("a good shape").with_kv_dtype(kv_dtype);
        let mut batch = Batch::new(shape, Mask::Causal);
        for request in 0..3 + decodes {
            let query_len = if request < 3 { 1500 } else { 1 };
            batch.push_contiguous(query_len, kv_len, first_slot + request * kv_len).expect("a good request");
        }
        let mut planner = Planner::choosing(DeviceModel::all_for_device("NVIDIA H100 80GB HBM3", (9, 0), 132));
        Layout::new(&planner.plan(&batch).expect("a batch that can be planned")).expect("the plan fits")
    }

    #[test]
    fn launches_depend_on_what_is_made_but_not_on_the_pool() {
        for kv_dtype in [KvDType::Same, KvDType::E4m3] {
            let layout = layout_of_prompts(kv_dtype, 0, 1500);
            assert_eq!(layout.widening_blocks, if kv_dtype == KvDType::Same { 0 } else { 2 * 3 * 1500u32.div_ceil(16) });
            let elsewhere = layout_of_prompts(kv_dtype, 10_000, 1500);
            assert!(elsewhere.stored.num_slots > layout.stored.num_slots && layout.launches_as(&elsewhere), "{elsewhere:?}");
        }
        let fp8 = layout_of_prompts(KvDType::E4m3, 0, 1500);
        assert_eq!([fp8.stored, fp8.attended].map(|tensors| tensors.shape.kv_dtype()), [KvDType::E4m3, KvDType::Same]);
        // As many work items, which read one piece more each.
        let longer = layout_of_prompts(KvDType::E4m3, 0, 1505);
        assert!(longer.widening_blocks > fp8.widening_blocks && !fp8.launches_as(&longer), "{longer:?}");
    }

    #[test]
    fn items_of_kernels_that_read_what_is_made_for_wide_tiles_lie_behind_the_others() {
        let layout = layout_beside_decodes(KvDType::E4m3, 0, 4000, 30);
        assert_eq!(layout.attended, layout.stored);
        let shape = layout.stored.shape.with_kv_dtype(KvDType::Same);
        assert_eq!(layout.widened, Some(KvTensors { shape, layout: KvLayout::Slots, num_slots: 3 * 4000 }));
        assert_eq!(layout.widening_blocks, 2 * 3 * 4000u32.div_ceil(16));
        assert!(layout.beside && layout.widened_items.is_some_and(|items| items > layout.pieces));
        let elsewhere = layout_beside_decodes(KvDType::E4m3, 10_000, 4000, 30);
        assert!(elsewhere.stored.num_slots > layout.stored.num_slots && layout.launches_as(&elsewhere), "{elsewhere:?}");
        let longer = layout_beside_decodes(KvDType::E4m3, 0, 4005, 30);
        assert!(longer.widening_blocks > layout.widening_blocks && !layout.launches_as(&longer), "{longer:?}");
        let in_bf16 = layout_beside_decodes(KvDType::Same, 0, 4000, 30);
        assert_eq!((in_bf16.widened, in_bf16.widened_items), (None, None));
    }

    #[test]
    fn every_block_has_a_first_task_of_its_queue() {
        let shape = AttentionShape::new(32, 8, 128, DType::Bf16).expect("a good shape");
        let layout = Layout::new(&Plan::empty(shape)).expect("an empty plan fits");
        for (front_tasks, back_tasks, back_lanes) in
            [(0, 0, 0), (1000, 0, 0), (1000, 1000, 40), (1000, 8, 40), (8, 1000, 40), (100, 100, 40), (8, 8, 40), (100, 20, 0)]
        {
            let layout = Layout { attention_tasks: front_tasks + back_tasks, front_tasks, back_lanes, ..layout };
            let layout = Layout { family: KernelFamily::Sm90a, ..layout };
            let blocks = layout.attention_blocks(132, false);
            assert_eq!(blocks, (front_tasks + back_tasks).min(132));
            assert_eq!(layout.attention_blocks(132, true), front_tasks.max(back_tasks).min(132));
            let back_blocks = layout.back_blocks(blocks);
            assert!(back_blocks <= back_tasks && blocks - back_blocks <= front_tasks, "{layout:?}");
            assert!(back_blocks == back_lanes || front_tasks < 132 || back_tasks < 132, "{layout:?}");
        }
    }
}
