//! `packinfer bench-kv`: how fast slots are copied and tokens appended, beside the bandwidth that the device copies its memory
//! at.

use std::io::{Write, stdout};
use std::time::{Duration, Instant, SystemTime};

use float8::F8E4M3;
use half::bf16;
use indicatif::HumanBytes;
use packinfer::{Engine, KvAppend, KvArena, Rope, SlotCopy, measure};
use packinfer_batch::{AttentionShape, DType, KvDType};
use packinfer_cpu::random_elements;
use rand::rngs::SmallRng;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use serde::Serialize;

use crate::args::BenchKvArgs;
use crate::backend::{BackendKv, Cuda};
use crate::bench::Timing;
use crate::json_file::JsonFile;
use crate::progress::Progress;
use crate::table;
use crate::units::significant;

/// KV heads, and elements of each: 2 KiB of K a slot in bf16.
const KV_HEADS: u32 = 8;
const HEAD_DIM: u32 = 128;
/// Layers of the arena.
const LAYERS: u32 = 16;
/// Slots of the arena: 2 GiB in bf16.
const SLOTS: u32 = 1 << 15;
/// Slots of a page.
const PAGE_SIZE: u32 = 16;
/// Tokens that are appended: a decode step of as many requests.
const TOKENS: u32 = 256;
/// The highest position of a token.
const MOST_POSITION: u32 = 1_000_000;

/// Everything that was measured.
#[derive(Debug, Serialize)]
struct Report {
    program: &'static str,
    device: String,
    /// When, in UTC.
    date: String,
    /// Bytes a second, read and written together.
    copy_bytes_per_s: f64,
    num_kv_heads: u32,
    head_dim: u32,
    layers: u32,
    launches: Vec<Measured>,
}

/// One kind of launch.
#[derive(Debug, Serialize)]
struct Measured {
    name: String,
    kv_dtype: KvDType,
    /// Slots that are copied or written, in each layer of the launch.
    slots: u32,
    /// Read and written.
    bytes: u64,
    #[serde(flatten)]
    timing: Timing,
    gb_per_s: f64,
    /// Share of the copy bandwidth.
    of_copy: f64,
    /// What the host takes to check, cut and send the list, once for all layers.
    list_us: f64,
}

/// Measures copies and appends, in bf16 and in FP8.
pub fn run(args: &BenchKvArgs) -> anyhow::Result<()> {
    let mut out = JsonFile::open(args.json.as_ref())?;
    let cuda = Cuda::open(None, None)?;
    let progress = Progress::new(3);
    progress.doing("copy bandwidth of the device");
    let mut bench = Bench {
        engine: cuda.engine(),
        copy_bytes_per_s: measure::copy_bandwidth(cuda.engine())?,
        runs: args.repeat as usize,
        seed: args.seed,
        launches: Vec::new(),
    };
    progress.step();
    progress.doing("K and V in bf16");
    bench.measure::<bf16>(KvDType::Same)?;
    progress.step();
    progress.doing("K and V in FP8");
    bench.measure::<F8E4M3>(KvDType::E4m3)?;
    drop(progress);
    let report = Report {
        program: concat!("packinfer ", env!("CARGO_PKG_VERSION")),
        device: cuda.engine().device().name.clone(),
        date: humantime::format_rfc3339_seconds(SystemTime::now()).to_string(),
        copy_bytes_per_s: bench.copy_bytes_per_s,
        num_kv_heads: KV_HEADS,
        head_dim: HEAD_DIM,
        layers: LAYERS,
        launches: bench.launches,
    };
    if let Some(out) = &mut out {
        out.write(&report)?;
    }
    report.print()
}

/// A device, and what was measured on it so far.
struct Bench<'a> {
    engine: &'a Engine,
    copy_bytes_per_s: f64,
    runs: usize,
    seed: u64,
    launches: Vec<Measured>,
}

impl Bench<'_> {
    fn measure<K: BackendKv<bf16>>(&mut self, kv_dtype: KvDType) -> anyhow::Result<()> {
        let shape = AttentionShape::new(KV_HEADS, KV_HEADS, HEAD_DIM, DType::Bf16)?.with_kv_dtype(kv_dtype);
        let mut arena = KvArena::<bf16, K>::new(self.engine, shape, LAYERS, SLOTS)?;
        let half = SLOTS / 2;
        self.copy(&mut arena, "pages to an extent", &to_extent(half, PAGE_SIZE, self.seed))?;
        self.copy(&mut arena, "pages of a request of 1024 tokens", &to_extent(1024, PAGE_SIZE, self.seed))?;
        self.copy(&mut arena, "single slots to an extent", &to_extent(half / PAGE_SIZE, 1, self.seed))?;
        self.copy(&mut arena, "an extent", &[SlotCopy { from: 0, to: half, num_slots: half }])?;
        let turned = Some(Rope::new(HEAD_DIM));
        self.append(&mut arena, "append", None)?;
        self.append(&mut arena, "append with RoPE", turned)
    }

    /// Times one launch that copies slots in all layers. More passes through the L2 cache than it holds, so it needs no emptying.
    fn copy<K: BackendKv<bf16>>(&mut self, arena: &mut KvArena<bf16, K>, name: &str, copies: &[SlotCopy]) -> anyhow::Result<()> {
        let stream = self.engine.stream()?;
        let mut list = self.engine.upload_copies(arena, copies, &stream)?;
        let list_times = self.host_times(|| Ok(list.update(copies, &stream)?))?;
        let times = measure::time_warm(self.engine, &stream, self.runs, |stream| self.engine.kv_move(arena, &list, stream))?;
        let slots = copies.iter().map(|copy| copy.num_slots).sum();
        let bytes = 2 * u64::from(slots) * u64::from(LAYERS) * arena.shape().kv_bytes_per_slot();
        self.add(format!("{name}, {} layers", LAYERS), arena.shape().kv_dtype(), slots, bytes, times, list_times)
    }

    /// Times one launch that appends tokens to a layer, from a cold L2 cache.
    fn append<K: BackendKv<bf16>>(&mut self, arena: &mut KvArena<bf16, K>, name: &str, rope: Option<Rope>) -> anyhow::Result<()> {
        let (stream, shape) = (self.engine.stream()?, arena.shape());
        let mut slots: Vec<u32> = (0..SLOTS).collect();
        let mut random = SmallRng::seed_from_u64(self.seed);
        slots.shuffle(&mut random);
        slots.truncate(TOKENS as usize);
        let positions: Vec<u32> = slots.iter().map(|_| random.random_range(0..MOST_POSITION)).collect();
        let mut device_slots = self.engine.upload_append_slots(&slots, &positions, SLOTS, &stream)?;
        let list_times = self.host_times(|| Ok(device_slots.update(&slots, &positions, &stream)?))?;

        let len = TOKENS as usize * shape.kv_elements_per_slot() as usize;
        let k = self.engine.copy_of(&random_elements::<bf16>(len, self.seed))?;
        let v = self.engine.copy_of(&random_elements::<bf16>(len, self.seed.wrapping_add(1)))?;
        let rope = rope.map(|rope| self.engine.rope(rope)).transpose()?;
        let append = KvAppend { rope: rope.as_ref(), ..KvAppend::new(k.as_slice(), v.as_slice(), &device_slots) };
        let times =
            measure::time_cold(self.engine, &stream, self.runs, |stream| self.engine.kv_append(arena, 0, append, stream))?;
        let new_bytes = 2 * len as u64 * shape.dtype().size_in_bytes();
        let bytes = new_bytes + u64::from(TOKENS) * shape.kv_bytes_per_slot();
        self.add(format!("{name}, 1 layer"), shape.kv_dtype(), TOKENS, bytes, times, list_times)
    }

    /// Times of the host.
    fn host_times(&self, mut work: impl FnMut() -> anyhow::Result<()>) -> anyhow::Result<Vec<Duration>> {
        let mut time = |_| {
            self.engine.synchronize()?;
            let start = Instant::now();
            work()?;
            Ok(start.elapsed())
        };
        (0..self.runs).map(&mut time).collect()
    }

    fn add(
        &mut self,
        name: String,
        kv_dtype: KvDType,
        slots: u32,
        bytes: u64,
        times: Vec<Duration>,
        list_times: Vec<Duration>,
    ) -> anyhow::Result<()> {
        let timing = Timing::new(times)?;
        let gb_per_s = bytes as f64 / timing.time_us * 1e-3;
        let of_copy = gb_per_s * 1e9 / self.copy_bytes_per_s;
        let list_us = Timing::new(list_times)?.time_us;
        self.launches.push(Measured { name, kv_dtype, slots, bytes, timing, gb_per_s, of_copy, list_us });
        Ok(())
    }
}

/// Copies of pages that lie anywhere in the first half of the slots to an extent in the second.
fn to_extent(num_slots: u32, page_size: u32, seed: u64) -> Vec<SlotCopy> {
    let mut pages: Vec<u32> = (0..SLOTS / 2 / page_size).collect();
    pages.shuffle(&mut SmallRng::seed_from_u64(seed));
    let targets = (SLOTS / 2..).step_by(page_size as usize).take((num_slots / page_size) as usize);
    pages.iter().zip(targets).map(|(page, to)| SlotCopy { from: page * page_size, to, num_slots: page_size }).collect()
}

impl Report {
    fn print(&self) -> anyhow::Result<()> {
        let header = ["launch", "K and V", "slots", "bytes", "time µs", "GB/s", "of copying", "list µs", "runs"];
        let mut table = table::new(&header);
        for measured in &self.launches {
            let Measured { name, kv_dtype, slots, bytes, timing, gb_per_s, of_copy, list_us } = measured;
            let kv_dtype = if *kv_dtype == KvDType::E4m3 { "e4m3" } else { "bf16" };
            table.add_row([
                name.clone(),
                kv_dtype.into(),
                slots.to_string(),
                HumanBytes(*bytes).to_string(),
                significant(timing.time_us),
                significant(*gb_per_s),
                format!("{:.1} %", 100.0 * of_copy),
                significant(*list_us),
                timing.runs.to_string(),
            ]);
        }
        let copy = significant(self.copy_bytes_per_s * 1e-9);
        writeln!(
            stdout(),
            "{}, copying at {copy} GB/s\n{KV_HEADS} KV heads of {HEAD_DIM}; bytes are read and written ones\n{table}",
            self.device
        )?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_come_from_one_half_and_go_to_the_other() {
        for (num_slots, page_size) in [(SLOTS / 2, PAGE_SIZE), (1024, PAGE_SIZE), (100, 1)] {
            let copies = to_extent(num_slots, page_size, 1);
            assert_eq!(copies.iter().map(|copy| copy.num_slots).sum::<u32>(), num_slots);
            let mut sources: Vec<_> = copies.iter().map(|copy| copy.from).collect();
            assert!(!sources.is_sorted());
            sources.sort_unstable();
            sources.dedup();
            assert_eq!(sources.len(), copies.len());
            assert!(copies.iter().all(|copy| copy.from + copy.num_slots <= SLOTS / 2 && copy.to + copy.num_slots <= SLOTS));
            assert!(copies.windows(2).all(|pair| pair[0].to + page_size == pair[1].to));
        }
    }
}
