//! How fast a device is: what the cost model knows of it.

use std::ops::RangeInclusive;

use packinfer_abi::{ATTENTION_BLOCKS_PER_SM, TileKind, WIDE_TILE_ROWS};
use packinfer_batch::{Batch, KvDType};
use serde::{Deserialize, Serialize};

use crate::{Calibration, KernelFamily};

/// More multiprocessors, or anything else that is counted, than any device has.
const MOST_COUNT: f64 = 65_536.0;
/// Bytes and operations a second, from a small part of the slowest device to more than the fastest can do.
const PLAUSIBLE_RATES: RangeInclusive<f64> = 1e9..=1e18;
/// What items take beside others, as a part of what they take without: from half to ten times.
const PLAUSIBLE_FACTORS: RangeInclusive<f64> = 0.5..=10.0;
/// Nanoseconds of what is not in proportion to an item's work: up to a millisecond.
const PLAUSIBLE_TIMES: RangeInclusive<f64> = 0.0..=1e6;
/// Bytes of a cache: up to a gigabyte.
const PLAUSIBLE_CACHES: RangeInclusive<f64> = 0.0..=1e9;

/// What a device takes for the parts of a work item.
///
/// The rates are what attention kernels reach, which is less than a data sheet says. A thread block has an equal share of them:
/// the planner balances work for a device that is full. A work item takes [`Self::item_ns`], and besides the longer of two times:
/// what its bytes take at the block's share of the memory and of the cache; and what its [`TileTimes`] and products take.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeviceModel {
    /// The kernels that it is a model of.
    pub kernel_family: KernelFamily,
    /// The head dimension that it is a model of. It serves for others too, if there is no model that is closer.
    pub head_dim: u32,
    /// Multiprocessors.
    pub num_sms: u32,
    /// Blocks of the attention kernel that a multiprocessor works on at a time.
    pub blocks_per_sm: u32,
    /// Bytes a second from memory.
    pub bytes_per_s: f64,
    /// Bytes a second from the L2 cache, where a tile finds KV that another tile of the same request has read.
    pub cached_bytes_per_s: f64,
    /// Floating-point operations a second of the tensor cores, in wide tiles, besides what a step takes whatever its rows.
    pub flops_per_s: f64,
    /// Bytes that others have left in the cache, which are stored in memory when the call begins to read.
    #[serde(default)]
    pub displaced_bytes: f64,
    /// Nanoseconds that a work item takes besides, whatever it does and whatever is done beside it.
    pub item_ns: f64,
    /// Times of wide tiles, besides their products.
    pub wide: TileTimes,
    /// Times of wide tiles of 192 rows, besides their products; those of others if nothing is said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tall: Option<TileTimes>,
    /// Times of narrow tiles, with their products.
    pub narrow: TileTimes,
    /// What is different where K and V are stored in FP8; nothing if nothing is said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub e4m3: Option<Fp8Times>,
    /// Nanoseconds from the launch of the attention kernel to its first work item, and from its last to the end.
    pub launch_ns: f64,
    /// Nanoseconds that merging takes besides its traffic: with `sm_80`, one more launch, which waits for the attention kernel.
    pub merge_ns: f64,
    /// How long items take where narrow ones are done beside wide ones; nothing if they cannot be.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub beside: Option<BesideTimes>,
}

/// What tiles take whose K and V are stored in FP8.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Fp8Times {
    /// Bytes a second from memory: fewer where a row is less than what memory gives at a time.
    pub bytes_per_s: f64,
    /// Times of wide tiles, besides their products.
    pub wide: TileTimes,
    /// Times of narrow tiles, with their products.
    pub narrow: TileTimes,
}

/// What items take where a multiprocessor does a narrow one and a wide one at the same time, as parts of what they take where it
/// does one at a time: until all of either kind have ended.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BesideTimes {
    /// Wide items.
    pub wide: f64,
    /// Narrow items, where all multiprocessors do some.
    pub narrow: f64,
    /// Nanoseconds that a step of a narrow item takes at least where its K and V are in FP8 and those of wide items are not.
    #[serde(default)]
    pub stored_step_ns: f64,
}

/// What a thread block takes for tiles of one kind, where it does not wait for its share of the memory.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TileTimes {
    /// Nanoseconds of a work item: reading its description, filling the pipeline, storing the result.
    pub setup_ns: f64,
    /// Nanoseconds of a step of columns, of which a family of kernels has its own number.
    pub step_ns: f64,
}

impl DeviceModel {
    /// NVIDIA H100 SXM, 80 GB: round figures. [`Self::all_for_device`] knows what was measured.
    pub const H100: Self = Self {
        kernel_family: KernelFamily::Sm80,
        head_dim: 128,
        num_sms: 132,
        blocks_per_sm: ATTENTION_BLOCKS_PER_SM,
        bytes_per_s: 3.0e12,
        cached_bytes_per_s: 5.5e12,
        flops_per_s: 3.9e14,
        displaced_bytes: 0.0,
        item_ns: 500.0,
        wide: TileTimes { setup_ns: 4500.0, step_ns: 200.0 },
        tall: None,
        narrow: TileTimes { setup_ns: 1000.0, step_ns: 500.0 },
        e4m3: None,
        launch_ns: 4000.0,
        merge_ns: 3000.0,
        beside: None,
    };

    /// NVIDIA H200 SXM: an H100 with faster memory.
    pub const H200: Self = Self { bytes_per_s: 4.3e12, ..Self::H100 };

    /// NVIDIA A100 SXM, 80 GB. Its multiprocessors have shared memory for one block.
    pub const A100: Self = Self {
        num_sms: 108,
        blocks_per_sm: 1,
        bytes_per_s: 1.75e12,
        cached_bytes_per_s: 3.5e12,
        flops_per_s: 2.0e14,
        ..Self::H100
    };

    /// NVIDIA H100 on a PCIe card.
    const H100_PCIE: Self = Self { num_sms: 114, bytes_per_s: 1.8e12, flops_per_s: 2.8e14, ..Self::H100 };

    /// What workstation and inference cards have in common: about 8 GB/s and 1 TFLOP/s for each multiprocessor, and shared memory
    /// for one block. These are the figures of an RTX 4090.
    const WORKSTATION: Self = Self {
        num_sms: 128,
        blocks_per_sm: 1,
        bytes_per_s: 0.93e12,
        cached_bytes_per_s: 3.0e12,
        flops_per_s: 1.3e14,
        ..Self::H100
    };

    /// The same device with the `sm_90a` kernels instead of the `sm_80` kernels: one block a multiprocessor, which takes items in
    /// turn and loads for the next while it finishes one; products through `wgmma`. Round figures of an H100, head dimension 128.
    fn with_hopper_kernels(self) -> Self {
        /// What `wgmma` gives the wide tiles, of what `mma` does with all that a step takes besides.
        const PRODUCTS: f64 = 5.0;
        let times = |setup_ns, step_ns| TileTimes { setup_ns, step_ns };
        let e4m3 = Fp8Times { bytes_per_s: self.bytes_per_s, wide: times(2800.0, 1130.0), narrow: times(1600.0, 1200.0) };
        Self {
            kernel_family: KernelFamily::Sm90a,
            blocks_per_sm: 1,
            flops_per_s: self.flops_per_s * PRODUCTS,
            wide: times(1900.0, 790.0),
            tall: Some(times(1600.0, 1200.0)),
            narrow: times(1300.0, 1000.0),
            e4m3: Some(e4m3),
            beside: Some(BesideTimes { wide: 1.3, narrow: 1.8, stored_step_ns: 5500.0 }),
            ..self
        }
    }

    /// The models of a device with the given name, as its driver gives it, and compute capability (major, minor): for each family
    /// of kernels that it can run, one or one for each of some head dimensions. They are what was measured on a device of that
    /// name, or else [`Self::estimates_for_device`].
    ///
    /// A part of a device, which has fewer multiprocessors, has that part of its rates.
    pub fn all_for_device(name: &str, compute_capability: (u32, u32), num_sms: u32) -> Vec<Self> {
        match Calibration::measured_models(name) {
            Some(measured) => measured.into_iter().map(|model| model.with_sms(num_sms)).collect(),
            None => Self::estimates_for_device(name, compute_capability, num_sms),
        }
    }

    /// As [`Self::all_for_device`], from what is known of devices of that name or at least of that compute capability.
    pub fn estimates_for_device(name: &str, compute_capability: (u32, u32), num_sms: u32) -> Vec<Self> {
        let model = Self::for_device(name, compute_capability, num_sms);
        let families = KernelFamily::ALL.into_iter().filter(|family| family.runs_on(compute_capability));
        let of_family = |family| match family {
            KernelFamily::Sm80 => model,
            KernelFamily::Sm90a => model.with_hopper_kernels(),
        };
        families.map(of_family).collect()
    }

    /// What is known of a device with the `sm_80` kernels.
    fn for_device(name: &str, compute_capability: (u32, u32), num_sms: u32) -> Self {
        let known = [("H200", Self::H200), ("H100 PCIe", Self::H100_PCIE), ("H100", Self::H100), ("A100", Self::A100)];
        match known.iter().find(|(words, _)| has_words(name, words)) {
            Some((_, model)) => model.with_sms(num_sms),
            None => Self::generic(num_sms, compute_capability),
        }
    }

    /// A device of which only the number of multiprocessors and the compute capability are known.
    pub fn generic(num_sms: u32, compute_capability: (u32, u32)) -> Self {
        let like = match compute_capability {
            (8, 0) => Self::A100,
            (9..12, _) => Self::H100,
            _ => Self::WORKSTATION,
        };
        like.with_sms(num_sms)
    }

    /// The same with another number of multiprocessors, and rates and the L2 cache in proportion.
    fn with_sms(self, num_sms: u32) -> Self {
        let num_sms = num_sms.max(1);
        let part = f64::from(num_sms) / f64::from(self.num_sms);
        Self {
            num_sms,
            bytes_per_s: self.bytes_per_s * part,
            cached_bytes_per_s: self.cached_bytes_per_s * part,
            flops_per_s: self.flops_per_s * part,
            displaced_bytes: self.displaced_bytes * part,
            e4m3: self.e4m3.map(|times| Fp8Times { bytes_per_s: times.bytes_per_s * part, ..times }),
            ..self
        }
    }

    /// Times of tiles of a kind, wide ones with so many rows, with K and V of a type.
    pub(crate) fn tile_times(&self, kind: TileKind, wide_tile_rows: u32, kv_dtype: KvDType) -> TileTimes {
        let fp8 = self.e4m3.filter(|_| kv_dtype == KvDType::E4m3);
        match kind {
            TileKind::Narrow => fp8.map_or(self.narrow, |times| times.narrow),
            TileKind::Wide if wide_tile_rows > WIDE_TILE_ROWS => self.tall.unwrap_or(self.wide),
            TileKind::Wide => fp8.map_or(self.wide, |times| times.wide),
        }
    }

    /// Bytes a second from memory, with K and V of a type.
    pub(crate) fn kv_bytes_per_s(&self, kv_dtype: KvDType) -> f64 {
        self.e4m3.filter(|_| kv_dtype == KvDType::E4m3).map_or(self.bytes_per_s, |times| times.bytes_per_s)
    }

    /// Bytes a second that narrow tiles read: memory limits them, or their steps.
    fn narrow_bytes_per_s(&self, kv_dtype: KvDType) -> f64 {
        let element_bytes = if kv_dtype == KvDType::E4m3 { 1.0 } else { 2.0 };
        let columns = f64::from(self.kernel_family.column_step(self.head_dim));
        let step_bytes = 2.0 * columns * f64::from(self.head_dim) * element_bytes * f64::from(self.lanes());
        let step_ns = self.tile_times(TileKind::Narrow, WIDE_TILE_ROWS, kv_dtype).step_ns;
        self.kv_bytes_per_s(kv_dtype).min(1e9 * step_bytes / step_ns)
    }

    /// Floating-point operations a second of full wide tiles, with what their steps take besides.
    fn full_tile_flops_per_s(&self) -> f64 {
        let step = WIDE_TILE_ROWS * self.kernel_family.column_step(self.head_dim);
        let step_flops = 4.0 * f64::from(step) * f64::from(self.head_dim) * f64::from(self.lanes());
        1e9 * step_flops / (self.wide.step_ns + 1e9 * step_flops / self.flops_per_s)
    }

    /// How badly it suits a head dimension: it serves for smaller ones rather than for larger ones, and for those that are close.
    pub(crate) fn misfit(&self, head_dim: u32) -> (bool, u32) {
        (self.head_dim < head_dim, self.head_dim.abs_diff(head_dim))
    }

    /// Its first number that no device has, by name.
    pub(crate) fn implausible(&self) -> Option<(&'static str, f64)> {
        let counts = [("head_dim", self.head_dim), ("num_sms", self.num_sms), ("blocks_per_sm", self.blocks_per_sm)];
        let tall = self.tall.unwrap_or(self.wide);
        let Fp8Times { bytes_per_s, wide, narrow } =
            self.e4m3.unwrap_or(Fp8Times { bytes_per_s: self.bytes_per_s, wide: self.wide, narrow: self.narrow });
        let rates = [
            ("bytes_per_s", self.bytes_per_s),
            ("cached_bytes_per_s", self.cached_bytes_per_s),
            ("flops_per_s", self.flops_per_s),
            ("e4m3.bytes_per_s", bytes_per_s),
        ];
        let times = [
            ("item_ns", self.item_ns),
            ("wide.setup_ns", self.wide.setup_ns),
            ("wide.step_ns", self.wide.step_ns),
            ("tall.setup_ns", tall.setup_ns),
            ("tall.step_ns", tall.step_ns),
            ("narrow.setup_ns", self.narrow.setup_ns),
            ("narrow.step_ns", self.narrow.step_ns),
            ("e4m3.wide.setup_ns", wide.setup_ns),
            ("e4m3.wide.step_ns", wide.step_ns),
            ("e4m3.narrow.setup_ns", narrow.setup_ns),
            ("e4m3.narrow.step_ns", narrow.step_ns),
            ("launch_ns", self.launch_ns),
            ("merge_ns", self.merge_ns),
            ("beside.stored_step_ns", self.beside.map_or(0.0, |beside| beside.stored_step_ns)),
        ];
        let beside = self.beside.unwrap_or(BesideTimes { wide: 1.0, narrow: 1.0, stored_step_ns: 0.0 });
        let factors = [("beside.wide", beside.wide), ("beside.narrow", beside.narrow)];
        let counts = counts.map(|(name, count)| (name, f64::from(count))).into_iter();
        let mut wrong = counts.filter(|(_, count)| !(1.0..=MOST_COUNT).contains(count));
        let mut wrong_rates = rates.into_iter().filter(|(_, rate)| !PLAUSIBLE_RATES.contains(rate));
        let mut wrong_times = times.into_iter().filter(|(_, time)| !PLAUSIBLE_TIMES.contains(time));
        let displaced = ("displaced_bytes", self.displaced_bytes);
        let mut wrong_bytes = Some(displaced).into_iter().filter(|(_, bytes)| !PLAUSIBLE_CACHES.contains(bytes));
        let mut wrong_factors = factors.into_iter().filter(|(_, factor)| !PLAUSIBLE_FACTORS.contains(factor));
        let mut others = || wrong_times.next().or_else(|| wrong_factors.next()).or_else(|| wrong_bytes.next());
        wrong.next().or_else(|| wrong_rates.next()).or_else(&mut others)
    }

    /// Nanoseconds that a batch takes at least: its bytes or its products, whichever takes longer.
    pub(crate) fn least_ns(&self, work: LeastWork) -> f64 {
        1e9 * (work.bytes / self.kv_bytes_per_s(work.kv_dtype)).max(work.flops / self.full_tile_flops_per_s())
    }

    /// About what a batch takes whose bytes are mostly those of narrow tiles, or whose products take longer.
    pub(crate) fn about_ns(&self, work: LeastWork) -> f64 {
        self.least_ns(work).max(1e9 * work.bytes / self.narrow_bytes_per_s(work.kv_dtype))
    }

    /// Blocks that the device works on at a time.
    pub fn lanes(&self) -> u32 {
        /// More than any device has.
        const MOST_LANES: u32 = 1 << 16;
        self.num_sms.saturating_mul(self.blocks_per_sm).clamp(1, MOST_LANES)
    }

    /// The lanes that a head group has, if there are so many groups.
    pub(crate) fn lanes_of_groups(&self, num_groups: u32) -> LanesOfGroups {
        let (device_lanes, groups) = (self.lanes(), num_groups.max(1));
        let copies = if device_lanes.is_multiple_of(groups) { 1 } else { 2 };
        LanesOfGroups { lanes: (device_lanes * copies / groups).max(1), copies, device_lanes }
    }
}

/// Whether the name of a device has these words: "NVIDIA GH200 480GB" has no "H200".
pub(crate) fn has_words(name: &str, words: &str) -> bool {
    name.match_indices(words).any(|(at, _)| !name[..at].ends_with(|before: char| before.is_ascii_alphanumeric()))
}

/// What a batch has to do at least.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LeastWork {
    bytes: f64,
    flops: f64,
    kv_dtype: KvDType,
}

impl LeastWork {
    /// Each request reads all KV that all of its query tokens see, but for `repeated_tokens` KV tokens that need not be read
    /// again.
    pub fn of(batch: &Batch, repeated_tokens: u64) -> Self {
        let shape = batch.shape();
        let kv_tokens: u64 = batch.requests().iter().map(|request| request.seen(batch.mask()).len() as u64).sum();
        let qo_bytes = u64::from(batch.num_query_tokens()) * shape.qo_bytes_per_token();
        let kv_bytes = kv_tokens.saturating_sub(repeated_tokens) as f64 * shape.kv_bytes_per_slot() as f64;
        Self { bytes: kv_bytes + qo_bytes as f64, flops: batch.flops(), kv_dtype: shape.kv_dtype() }
    }
}

/// The lanes of one head group. All head groups of an item cost the same, so what these do stands for what all lanes do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct LanesOfGroups {
    /// At least one.
    pub lanes: u32,
    /// Head groups that share them: two share the lanes of two where one has not a whole number of them.
    pub copies: u32,
    /// All lanes of the device.
    pub device_lanes: u32,
}

impl LanesOfGroups {
    /// So many of the lanes, of all groups together.
    pub fn of_device(self, lanes: u32) -> u32 {
        let scaled = u64::from(lanes) * u64::from(self.device_lanes) / u64::from(self.lanes);
        scaled.min(u64::from(self.device_lanes)) as u32
    }
}

impl Default for DeviceModel {
    /// An H100.
    fn default() -> Self {
        Self::H100
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_known_by_name() {
        assert_eq!(DeviceModel::for_device("NVIDIA H100 80GB HBM3", (9, 0), 132), DeviceModel::H100);
        assert_eq!(DeviceModel::for_device("NVIDIA H100 PCIe", (9, 0), 114), DeviceModel::H100_PCIE);
        assert_eq!(DeviceModel::for_device("NVIDIA H200", (9, 0), 132), DeviceModel::H200);
        assert_eq!(DeviceModel::for_device("NVIDIA A100-SXM4-80GB", (8, 0), 108), DeviceModel::A100);
        assert_eq!(DeviceModel::for_device("NVIDIA GH200 480GB", (9, 0), 132), DeviceModel::H100, "Grace and an H100");
        let measured =
            |name| DeviceModel::all_for_device(name, (9, 0), 132) != DeviceModel::estimates_for_device(name, (9, 0), 132);
        assert!(measured("NVIDIA H100 80GB HBM3") && measured("NVIDIA H200"));
        assert!(!measured("NVIDIA H100 NVL") && !measured("NVIDIA H100 PCIe") && !measured("NVIDIA GH200 480GB"));
    }

    #[test]
    fn parts_of_a_device_have_parts_of_its_rates() {
        let half = DeviceModel::for_device("NVIDIA H100 80GB HBM3 MIG 3g.40gb", (9, 0), 66);
        assert_eq!((half.num_sms, half.bytes_per_s, half.flops_per_s), (66, 1.5e12, 1.95e14));
        assert_eq!(half.item_ns, DeviceModel::H100.item_ns);
        assert_eq!(half.displaced_bytes, DeviceModel::H100.displaced_bytes / 2.0);
    }

    #[test]
    fn shared_memory_decides_on_blocks_per_sm() {
        for (compute_capability, blocks) in [((8, 0), 1), ((8, 6), 1), ((8, 9), 1), ((9, 0), 2), ((10, 0), 2), ((12, 0), 1)] {
            let model = DeviceModel::estimates_for_device("some device", compute_capability, 40)[0];
            assert_eq!(model.lanes(), 40 * blocks, "{compute_capability:?}");
        }
        assert_eq!(DeviceModel::generic(0, (9, 0)).num_sms, 1);
    }
}
