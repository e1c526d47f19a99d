//! The batches that a device is calibrated with: each is limited by one thing, or by two in a known ratio.

use packinfer_batch::{AttentionShape, Batch, BatchError, Mask};
use packinfer_planner::{DeviceModel, NarrowItems};

/// How often a lane gets a task, on average: so many that there are always some when the device is full.
const WAVES: u32 = 6;
/// KV lengths of most designs, from one step of columns to where nothing but the steps counts.
const LENGTHS: [u32; 8] = [16, 64, 128, 256, 512, 1024, 2048, 4096];
/// Slots of a page.
const PAGE_SIZE: u32 = 16;

/// A batch of requests that are all alike, or of some kinds in turn.
pub struct Design {
    pub name: String,
    mask: Mask,
    /// Query tokens and KV tokens of the requests, in turn.
    requests: Vec<(u32, u32)>,
    /// All requests read the same KV, which is in the L2 cache then; else each its own.
    pub is_cached: bool,
    /// Requests; if `None`, as many as fill the device several times.
    count: Option<u32>,
    /// How narrow items are to be done.
    pub narrow_items: NarrowItems,
}

impl Design {
    fn new(name: String, mask: Mask, requests: &[(u32, u32)], is_cached: bool) -> Self {
        Self { name, mask, requests: requests.into(), is_cached, count: None, narrow_items: NarrowItems::Alone }
    }

    /// Whether it is there for its items to be split, and merged.
    pub fn is_split(&self) -> bool {
        self.count.is_some() && self.narrow_items == NarrowItems::Alone
    }

    /// The batch for a device, whose KV lies in pages in a pool of so many slots. Where KV is not to be cached, pages come again
    /// only when the whole pool was read in between.
    pub fn batch(&self, shape: AttentionShape, model: &DeviceModel, num_slots: u32) -> Result<Batch, BatchError> {
        let num_pages = num_slots / PAGE_SIZE;
        let heads = shape.packed_head_groups();
        let tiles = |&(query_len, _): &(u32, u32)| (query_len * heads.heads_per_group).div_ceil(packinfer_abi::WIDE_TILE_ROWS);
        let tasks_in_turn = self.requests.iter().map(tiles).sum::<u32>() * heads.num_groups;
        let turns = (WAVES * model.lanes()).div_ceil(tasks_in_turn.max(1));
        let count = self.count.unwrap_or(turns * self.requests.len() as u32);
        let mut batch = Batch::new(shape, self.mask);
        let (mut pages, mut next_page) = (Vec::new(), 0);
        for &(query_len, kv_len) in self.requests.iter().cycle().take(count as usize) {
            let needed = kv_len.div_ceil(PAGE_SIZE);
            if self.is_cached || next_page + needed > num_pages {
                next_page = 0;
            }
            pages.clear();
            pages.extend((next_page..next_page + needed).map(|page| shuffled(page, num_pages)));
            batch.push_paged(query_len, kv_len, &pages, PAGE_SIZE)?;
            next_page += needed;
        }
        Ok(batch)
    }
}

/// Where a page lies, so that those that follow each other do not lie side by side, as after a long time of serving.
fn shuffled(page: u32, num_pages: u32) -> u32 {
    /// Pages of other residues fill the gaps that those of one residue leave.
    const STRIDE: u32 = 509;
    let of_residue = num_pages / STRIDE;
    let (residue, index) = (page % STRIDE, page / STRIDE);
    // The last pages, which are no whole round, stay where they are.
    if page < of_residue * STRIDE { residue * of_residue + index } else { page }
}

/// All designs.
pub fn all() -> Vec<Design> {
    let mut designs = Vec::new();
    // Narrow tiles: limited by memory. They are of several lengths, as blocks that do the same at the same time all wait at the
    // same time, too.
    for kv_len in LENGTHS {
        let lengths = [kv_len / 2, kv_len * 3 / 2, kv_len * 3 / 4, kv_len * 5 / 4].map(|kv_len| (1, kv_len));
        designs.push(Design::new(format!("decodes of about {kv_len}"), Mask::Causal, &lengths, false));
    }
    designs.push(Design::new("decodes of 200 to 3000".into(), Mask::Causal, &[(1, 200), (1, 3000), (1, 700), (1, 1500)], false));
    // Wide tiles of 32, 64 and 128 rows: limited by products where the KV is cached.
    // And of 192, where there are kernels for that.
    for (query_len, lengths) in [(8, &LENGTHS[1..]), (16, &LENGTHS[3..6]), (32, &LENGTHS[1..]), (48, &LENGTHS[1..])] {
        for &kv_len in lengths {
            let name = format!("{query_len} tokens of {kv_len}, cached");
            designs.push(Design::new(name, Mask::None, &[(query_len, kv_len)], true));
        }
    }
    for kv_len in [64, 256, 1024, 4096] {
        designs.push(Design::new(format!("8 tokens of {kv_len}"), Mask::None, &[(8, kv_len)], false));
        designs.push(Design::new(format!("32 tokens of {kv_len}"), Mask::None, &[(32, kv_len)], false));
    }
    // What batches are made of.
    for query_len in [32, 128, 512, 1024, 2048] {
        designs.push(Design::new(format!("prompt of {query_len}"), Mask::Causal, &[(query_len, query_len)], false));
    }
    designs.push(Design::new("chunk of 256 of 4096".into(), Mask::Causal, &[(256, 4096)], false));
    designs.push(Design::new("prompts of 16 to 160".into(), Mask::Causal, &[(16, 16), (160, 160), (48, 48), (100, 100)], false));
    // Few long requests: they are split, and merged.
    for (count, query_len, kv_len) in [(1, 1, 65_536), (4, 1, 32_768), (4, 8, 16_384), (8, 4, 8192)] {
        let name = format!("{count} of {query_len} tokens of {kv_len}");
        designs.push(Design { count: Some(count), ..Design::new(name, Mask::Causal, &[(query_len, kv_len)], false) });
    }
    // Both kinds: chunks, and about as much to do of decodes.
    for narrow_items in [NarrowItems::InTurn, NarrowItems::Beside] {
        let how = if narrow_items == NarrowItems::Beside { "beside" } else { "and" };
        let mut requests = vec![(512, 4096); 6];
        requests.extend([(1, 1024); 128]);
        let name = format!("decodes of 1024 {how} chunks of 512 of 4096");
        designs.push(Design { count: Some(134), narrow_items, ..Design::new(name, Mask::Causal, &requests, false) });
    }
    designs
}

#[cfg(test)]
mod tests {
    use packinfer_batch::DType;
    use packinfer_planner::{Packing, Planner, Schedule};

    use super::*;

    #[test]
    fn pages_are_shuffled() {
        for num_pages in [1, 508, 509, 510, 32_768] {
            let mut pages: Vec<u32> = (0..num_pages).map(|page| shuffled(page, num_pages)).collect();
            assert!(num_pages < 1018 || pages.windows(2).all(|pair| pair[0] + 1 != pair[1] || pair[0] >= num_pages - 509));
            pages.sort_unstable();
            assert!(pages.into_iter().eq(0..num_pages), "{num_pages} pages");
        }
    }

    #[test]
    fn designs_fill_the_device_and_fit_the_pool() {
        const NUM_SLOTS: u32 = 524_288;
        let shape = AttentionShape::new(32, 8, 128, DType::Bf16).expect("a good shape");
        for model in DeviceModel::estimates_for_device("H100", (9, 0), 132) {
            for design in all() {
                let batch = design.batch(shape, &model, NUM_SLOTS).expect("a good batch");
                assert!(batch.num_slots() <= NUM_SLOTS, "{}", design.name);
                let plan = Planner::new(model).with_packing(Packing::Unshared).plan(&batch).expect("it can be planned");
                let full = Schedule::predicted(&plan, &model).tasks_of_full_device().count() as u32;
                let is_split = !plan.merge_tokens().is_empty();
                assert!(!design.is_split() || is_split, "{} has nothing to merge", design.name);
                assert!(design.count.is_some() || full >= model.lanes(), "{}: {full} tasks", design.name);
            }
        }
    }
}
