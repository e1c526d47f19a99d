//! One attention call: checks, then the launches.

use std::f32::consts::LOG2_E;

use packinfer_abi::{AttentionParams, DeviceAddress, KvWidenParams, MergeParams};
use packinfer_batch::KvDType;
use packinfer_planner::KvTensors;

use crate::device_plan::{DevicePlan, Layout};
use crate::kernels::parameter;
use crate::memory::{DeviceSlice, DeviceSliceMut};
use crate::stamps::Stamps;
use crate::stream::Stream;
use crate::tensor_maps::{MappedKv, QueryTensor};
use crate::workspace::Workspace;
use crate::{Element, EngineError, KernelFamily, KvElement};

/// What the tensors' addresses must be a multiple of, in bytes: the kernels load and store 16 bytes at a time.
const ALIGNMENT: u64 = 16;

/// What attention reads and writes.
#[derive(Debug)]
pub struct Tensors<'a, E, K = E> {
    /// Q, `[tokens, num_qo_heads, head_dim]`.
    pub q: DeviceSlice<'a, E>,
    /// K, `[slots, num_kv_heads, head_dim]`, or as the batch's [`KvLayout`](crate::KvLayout) says.
    pub k: DeviceSlice<'a, K>,
    /// V, like K.
    pub v: DeviceSlice<'a, K>,
    /// O, like Q.
    pub o: DeviceSliceMut<'a, E>,
    /// Log-sum-exp of the logits, those of sinks included, natural logarithm, `[tokens, num_qo_heads]`; or not wanted.
    pub lse: Option<DeviceSliceMut<'a, f32>>,
}

/// How attention is computed, besides what the batch says.
#[derive(Clone, Copy, Debug, Default)]
pub struct RunOptions<'a> {
    /// Factor of the scores before softmax; 1/√head_dim if `None`.
    pub softmax_scale: Option<f32>,
    /// Bound of the scaled scores: each score `s` becomes `cap · tanh(s / cap)`.
    pub logit_soft_cap: Option<f32>,
    /// A further logit of each query head, `[num_qo_heads]`, in its softmax, to which no V belongs.
    pub sinks: Option<DeviceSlice<'a, f32>>,
    /// What K in FP8 is multiplied with, `[num_kv_heads]`; 1 if `None`.
    pub k_scales: Option<DeviceSlice<'a, f32>>,
    /// What V in FP8 is multiplied with, `[num_kv_heads]`; 1 if `None`.
    pub v_scales: Option<DeviceSlice<'a, f32>>,
}

/// Gives the launches of a checked run to the stream, whose context is current; its tasks are noted in `stamps`, if they are
/// given.
pub(crate) fn run<E: Element, K: KvElement<E>>(
    plan: &DevicePlan,
    workspace: &mut Workspace,
    stream: &Stream,
    tensors: &Tensors<'_, E, K>,
    options: RunOptions<'_>,
    stamps: Option<&mut Stamps>,
) -> Result<(), EngineError> {
    let layout = &plan.layout;
    tensors.check(layout)?;
    let Logits { scale_log2, soft_cap_log2 } = options.logits(layout)?;
    let PerHead { sinks, k_scales, v_scales } = options.per_head(layout)?;
    if layout.attention_tasks == 0 {
        return Ok(());
    }
    let parts = workspace.parts(plan, stream)?;
    let kernels = plan.kernels(options.logit_soft_cap.is_some())?;
    let attention_blocks = plan.attention_blocks(kernels.beside);
    let stored = tensors.kv(layout);
    let widening = kernels.widen.zip(parts.widened);
    let of_wide = widening.map_or(stored, |(_, widened)| widened);
    // Where items are others, those of narrow tiles read what is stored.
    let widened_items = layout.widened_items.filter(|_| widening.is_some());
    let of_narrow = if widened_items.is_some() { stored } else { of_wide };
    let (q_maps, [kv_maps, narrow_kv_maps]) = match layout.family {
        KernelFamily::Sm90a => {
            (workspace.q_maps(stream, tensors.queries(layout))?, workspace.kv_maps(stream, [of_wide, of_narrow])?)
        }
        // Other kernels copy without tensor maps.
        _ => (0, [0; 2]),
    };
    plan.run_on(stream)?;
    if let Some((widen, widened)) = widening {
        let from = SlotBytes::of(layout.stored);
        let params = KvWidenParams {
            from: [tensors.k.address, tensors.v.address],
            to: widened.addresses,
            pieces: plan.address(layout.pieces),
            num_kv_heads: layout.attended.shape.num_kv_heads(),
            head_dim: layout.attended.shape.head_dim(),
            from_slot_bytes: from.slot,
            from_head_bytes: from.head,
        };
        // SAFETY: as for the attention kernel below. The workspace has room for what the pieces write.
        unsafe { widen.launch(layout.widening_blocks, &mut [parameter(&params)], stream) }?;
    }
    let attended = SlotBytes::of(layout.attended);
    let stamps = stamps.map_or(Ok(0), |stamps| stamps.address_for(layout.attention_tasks))?;
    let lse = tensors.lse.as_ref().map_or(0, |lse| lse.address);
    let attention = AttentionParams {
        q: tensors.q.address,
        k: of_narrow.addresses[0],
        v: of_narrow.addresses[1],
        o: tensors.o.address,
        lse,
        partial_o: parts.partial_o,
        partial_lse: parts.partial_lse,
        items: plan.address(widened_items.unwrap_or(layout.items)),
        segments: plan.address(layout.segments),
        runs: plan.address(layout.runs),
        merge_tokens: plan.address(layout.merge_tokens),
        merge_sources: plan.address(layout.merge_sources),
        lse_readers: parts.lse_readers,
        kv_maps,
        narrow_kv_maps,
        q_maps,
        heads: layout.heads,
        num_partial_rows: layout.num_partial_rows,
        num_merged_rows: layout.merged_rows,
        num_items: layout.num_items,
        num_runs: layout.num_runs,
        scheduler: parts.scheduler,
        front_tasks: layout.front_tasks,
        groups_at_once: layout.groups_at_once,
        back_blocks: if kernels.beside { 0 } else { layout.back_blocks(attention_blocks) },
        settled_bytes: layout.settled_bytes,
        narrow_loaders: layout.narrow_loaders,
        scale_log2,
        soft_cap_log2,
        sinks,
        k_scales,
        v_scales,
        stamps,
        kv_slot_bytes: attended.slot,
        kv_head_bytes: attended.head,
    };
    // SAFETY: the kernel has this one parameter. The plan is on the device when the stream gets there, its indices are within
    // tensors of the checked lengths, and within the workspace, which no other run uses at that time. Freeing any of this
    // memory waits for the device.
    unsafe { kernels.attention.launch(attention_blocks, &mut [parameter(&attention)], stream) }?;
    let Some(merge_kernel) = kernels.merge.filter(|_| layout.merged_rows > 0) else { return Ok(()) };
    let merge = MergeParams {
        partial_o: parts.partial_o,
        partial_lse: parts.partial_lse,
        o: tensors.o.address,
        lse,
        tokens: attention.merge_tokens,
        sources: attention.merge_sources,
        sinks,
        heads: layout.heads,
        num_partial_rows: layout.num_partial_rows,
    };
    // SAFETY: as above.
    unsafe { merge_kernel.launch(layout.merged_rows, &mut [parameter(&merge)], stream) }
}

/// Options as the kernels take them.
struct Logits {
    scale_log2: f32,
    soft_cap_log2: f32,
}

/// Bytes from one place in K, or V, to another.
struct SlotBytes {
    /// From a slot to the one with the next number.
    slot: u32,
    /// From a head of a slot to its next head.
    head: u32,
}

impl SlotBytes {
    fn of(tensors: KvTensors) -> Self {
        let strides = tensors.layout.strides(tensors.shape);
        // They are few enough: the batch was checked for that.
        let bytes = |elements: u64| (elements * tensors.shape.kv_element_bytes()) as u32;
        Self { slot: bytes(strides.slot), head: bytes(strides.head) }
    }
}

/// Addresses of a number for each head, or zero.
struct PerHead {
    sinks: DeviceAddress,
    k_scales: DeviceAddress,
    v_scales: DeviceAddress,
}

impl RunOptions<'_> {
    fn logits(&self, layout: &Layout) -> Result<Logits, EngineError> {
        let scale = self.softmax_scale.unwrap_or((layout.attended.shape.head_dim() as f32).sqrt().recip());
        for (what, value) in [("softmax scale", scale), ("logit soft-cap", self.logit_soft_cap.unwrap_or(1.0))] {
            if !value.is_finite() || value <= 0.0 {
                return Err(EngineError::NotPositive { what, value });
            }
        }
        let (scale_log2, soft_cap_log2) = match self.logit_soft_cap {
            Some(cap) => (cap * LOG2_E, 2.0 * LOG2_E * (scale / cap)),
            None => (scale * LOG2_E, 0.0),
        };
        Ok(Logits { scale_log2, soft_cap_log2 })
    }

    fn per_head(&self, layout: &Layout) -> Result<PerHead, EngineError> {
        let shape = layout.stored.shape;
        for (option, given) in [("k_scales", self.k_scales), ("v_scales", self.v_scales)] {
            if given.is_some() && shape.kv_dtype() == KvDType::Same {
                return Err(EngineError::NoScales { option });
            }
        }
        let address = |tensor, heads, per_head: Option<DeviceSlice<'_, f32>>, num_heads: u32| -> Result<u64, EngineError> {
            let Some(per_head) = per_head else { return Ok(0) };
            check_length(tensor, heads, per_head.len, num_heads.into())?;
            check_alignment(tensor, per_head.address)?;
            Ok(per_head.address)
        };
        Ok(PerHead {
            sinks: address("sinks", "[num_qo_heads]", self.sinks, shape.num_qo_heads())?,
            k_scales: address("k_scales", "[num_kv_heads]", self.k_scales, shape.num_kv_heads())?,
            v_scales: address("v_scales", "[num_kv_heads]", self.v_scales, shape.num_kv_heads())?,
        })
    }
}

impl<E: Element, K: KvElement<E>> Tensors<'_, E, K> {
    fn queries(&self, layout: &Layout) -> QueryTensor {
        QueryTensor { shape: layout.attended.shape, heads_per_group: layout.heads.heads_per_group, address: self.q.address }
    }

    fn kv(&self, layout: &Layout) -> MappedKv {
        let KvTensors { shape, layout, .. } = layout.stored;
        let slots = |len: usize| len as u64 / layout.strides(shape).slot;
        MappedKv { shape, layout, addresses: [self.k.address, self.v.address], num_slots: [slots(self.k.len), slots(self.v.len)] }
    }

    fn check(&self, layout: &Layout) -> Result<(), EngineError> {
        let KvTensors { shape, layout: kv_layout, num_slots } = layout.stored;
        if E::DTYPE != shape.dtype() {
            return Err(EngineError::DType { found: E::DTYPE, needed: shape.dtype() });
        }
        if K::KV_DTYPE != shape.kv_dtype() {
            return Err(EngineError::KvDType { found: K::KV_DTYPE, needed: shape.kv_dtype() });
        }
        let tokens = u64::from(layout.num_query_tokens);
        for (tensor, len) in [("Q", self.q.len), ("O", self.o.len)] {
            check_length(tensor, "[tokens, num_qo_heads, head_dim]", len, tokens * shape.qo_elements_per_token())?;
        }
        if let Some(lse) = &self.lse {
            check_length("LSE", "[tokens, num_qo_heads]", lse.len, tokens * u64::from(shape.num_qo_heads()))?;
        }
        let needed = kv_layout.num_elements(shape, num_slots);
        for (tensor, len) in [("K", self.k.len), ("V", self.v.len)] {
            if (len as u64) < needed {
                return Err(EngineError::PoolTooSmall { tensor, found: len as u64, num_slots, needed });
            }
        }
        let lse = self.lse.as_ref().map_or(0, |lse| lse.address);
        for (tensor, address) in
            [("Q", self.q.address), ("K", self.k.address), ("V", self.v.address), ("O", self.o.address), ("LSE", lse)]
        {
            check_alignment(tensor, address)?;
        }
        Ok(())
    }
}

pub(crate) fn check_alignment(tensor: &'static str, address: DeviceAddress) -> Result<(), EngineError> {
    if address.is_multiple_of(ALIGNMENT) {
        Ok(())
    } else {
        Err(EngineError::Misaligned { tensor, address, alignment: ALIGNMENT })
    }
}

fn check_length(tensor: &'static str, shape: &'static str, found: usize, needed: u64) -> Result<(), EngineError> {
    let found = found as u64;
    if found == needed { Ok(()) } else { Err(EngineError::TensorLength { tensor, shape, found, needed }) }
}
