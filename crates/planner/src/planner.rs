//! From a batch to a plan.

use std::cmp::Reverse;

use packinfer_abi::{DIRECT, HeadGroups, KvRun, MergeToken, NARROW_TILE_ROWS, TileKind, WorkItem};
use packinfer_batch::Batch;

use crate::cost::{CostModel, Ns, num_rows};
use crate::pack::Packer;
use crate::split::{Part, Splitter};
use crate::tile::{self, Tile};
use crate::{DeviceModel, Plan, PlanError};

/// How requests are put into tiles.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Packing {
    /// Query heads of a KV head together, short requests together, long tiles split, the longest items first.
    #[default]
    Packed,
    /// A grid of tiles for each request and query head, one request after the other: how kernels without packing work. It is
    /// there to be compared with.
    PerRequest,
}

/// Makes plans. It keeps its memory from plan to plan.
///
/// Planning goes through three steps: the requests' query tokens are put into tiles, the tiles' columns are divided among work
/// items, and these are put in order.
#[derive(Clone, Debug)]
pub struct Planner {
    /// At least one.
    models: Vec<DeviceModel>,
    packing: Packing,
    packer: Packer,
    tiles: Vec<Tile>,
    splitter: Splitter,
    items: Vec<Item>,
    /// What the longest item of each pack takes.
    longest: Vec<Ns>,
    order: Vec<Place>,
}

/// What an item's place in the plan is decided by, in this order: what the longest of its pack takes, its pack, what it takes itself,
/// its index.
type Place = (Reverse<Ns>, u32, Reverse<Ns>, u32);

/// A work item that is not in its place yet.
#[derive(Clone, Copy, Debug)]
struct Item {
    item: WorkItem,
    pack: u32,
    fresh: f32,
}

impl Default for Planner {
    /// For an H100.
    fn default() -> Self {
        Self::new(DeviceModel::default())
    }
}

impl Planner {
    /// A planner for a device.
    pub fn new(model: DeviceModel) -> Self {
        Self::choosing(vec![model])
    }

    /// A planner for a device that has several families of kernels, one model each; a default model if there are none. It plans a batch
    /// for the family that needs the least time for its bytes and products, the first of those that need the same.
    pub fn choosing(mut models: Vec<DeviceModel>) -> Self {
        if models.is_empty() {
            models.push(DeviceModel::default());
        }
        Self {
            models,
            packing: Packing::default(),
            packer: Packer::default(),
            tiles: Vec::new(),
            splitter: Splitter::default(),
            items: Vec::new(),
            longest: Vec::new(),
            order: Vec::new(),
        }
    }

    /// The same planner, with another way of putting requests into tiles.
    pub fn with_packing(self, packing: Packing) -> Self {
        Self { packing, ..self }
    }

    /// Plans a batch.
    ///
    /// # Errors
    ///
    /// See [`Self::plan_into`].
    pub fn plan(&mut self, batch: &Batch) -> Result<Plan, PlanError> {
        let mut plan = Plan::empty(batch.shape());
        self.plan_into(batch, &mut plan)?;
        Ok(plan)
    }

    /// Plans a batch in the memory of an earlier plan.
    ///
    /// # Errors
    ///
    /// A batch whose plan has more of something than can be numbered, or that none of the families of kernels supports. The plan is empty then.
    pub fn plan_into(&mut self, batch: &Batch, plan: &mut Plan) -> Result<(), PlanError> {
        let shape = batch.shape();
        let heads = match self.packing {
            Packing::Packed => shape.packed_head_groups(),
            Packing::PerRequest => shape.single_head_groups(),
        };
        plan.reset(batch, heads);
        plan.model = self.choose(batch)?;
        let cost = CostModel::new(&plan.model, shape, heads);
        self.make_tiles(batch, plan, heads, &cost);
        let parts = match self.packing {
            Packing::Packed => self.splitter.split(&self.tiles, plan, &cost),
            Packing::PerRequest => self.splitter.whole(&self.tiles),
        };
        let partial_rows = make_items(&self.tiles, parts, plan, &mut self.items);
        self.put_in_order(plan, &cost);
        plan.num_partial_rows = partial_rows as u32;
        plan.check(partial_rows).inspect_err(|_| *plan = Plan::empty(shape))
    }

    /// The model that a batch is planned for.
    fn choose(&self, batch: &Batch) -> Result<DeviceModel, PlanError> {
        let shape = batch.shape();
        let faster = |a: &DeviceModel, b: &DeviceModel| if b.least_ns(batch) < a.least_ns(batch) { *b } else { *a };
        let able = self.models.iter().filter(|model| model.kernel_family.supports(shape)).copied();
        let chosen = able.reduce(|a, b| faster(&a, &b));
        chosen.ok_or(PlanError::NotSupported { family: self.models[0].kernel_family, head_dim: shape.head_dim() })
    }

    fn make_tiles(&mut self, batch: &Batch, plan: &mut Plan, heads: HeadGroups, cost: &CostModel) {
        self.tiles.clear();
        match self.packing {
            Packing::Packed => {
                let lanes = f64::from(plan.model.lanes()) / f64::from(heads.num_groups);
                self.packer.pack(batch, heads, cost, lanes);
                for ((members, kind), pack) in self.packer.packs().zip(0..) {
                    tile::push_tiles(&mut self.tiles, plan, batch, pack, members, kind);
                }
            }
            Packing::PerRequest => {
                for (request, index) in batch.requests().iter().zip(0..) {
                    let kind = if request.query_len <= NARROW_TILE_ROWS { TileKind::Narrow } else { TileKind::Wide };
                    if request.query_len > 0 {
                        tile::push_tiles(&mut self.tiles, plan, batch, index, &[index], kind);
                    }
                }
            }
        }
    }

    /// Puts the items into the plan: pack after pack, so that tiles that read the same KV run at the same time and find it in the L2
    /// cache; the packs with the longest items first, and of each pack the longest first, so that the device ends with short ones.
    fn put_in_order(&mut self, plan: &mut Plan, cost: &CostModel) {
        if self.packing == Packing::PerRequest {
            plan.items.extend(self.items.iter().map(|item| item.item));
            plan.fresh.extend(self.items.iter().map(|item| item.fresh));
            return;
        }
        let takes = |Item { item, fresh, .. }: &Item| cost.work_item(item, plan.segments_of(item), *fresh);
        self.longest.clear();
        self.longest.resize(self.tiles.last().map_or(0, |tile| tile.pack as usize + 1), 0);
        self.order.clear();
        for (item, index) in self.items.iter().zip(0..) {
            let (takes, longest) = (takes(item), &mut self.longest[item.pack as usize]);
            *longest = takes.max(*longest);
            self.order.push((Reverse(0), item.pack, Reverse(takes), index));
        }
        for place in &mut self.order {
            place.0 = Reverse(self.longest[place.1 as usize]);
        }
        self.order.sort_unstable();
        let in_order = || self.order.iter().map(|place| &self.items[place.3 as usize]);
        plan.items.extend(in_order().map(|item| item.item));
        plan.fresh.extend(in_order().map(|item| item.fresh));
    }
}

/// Makes the work items of all parts, and the merges of tiles that have several. Returns the number of partial rows.
fn make_items(tiles: &[Tile], parts: &[Part], plan: &mut Plan, items: &mut Vec<Item>) -> u64 {
    let mut partial_rows = 0;
    items.clear();
    for parts in parts.chunk_by(|a, b| a.tile == b.tile) {
        let tile = &tiles[parts[0].tile as usize];
        let rows = u64::from(num_rows(plan.heads, tile.segments(&plan.segments)));
        let is_split = parts.len() > 1;
        if is_split {
            push_merges(tile, parts.len() as u64, partial_rows, rows, plan);
        }
        let mut cursor = RunCursor { run: tile.run_begin, run_slot: 0 };
        for Part { columns, .. } in parts {
            cursor.advance(&plan.runs, tile.run_skip + columns.start);
            let item = WorkItem {
                segment_begin: tile.segment_begin,
                num_segments: tile.num_segments,
                run_begin: cursor.run,
                run_skip: tile.run_skip + columns.start - cursor.run_slot,
                column_begin: columns.start,
                column_end: columns.end,
                partial_row: if is_split { partial_rows as u32 } else { DIRECT },
                tile: tile.kind,
            };
            items.push(Item { item, pack: tile.pack, fresh: tile.fresh });
            partial_rows += if is_split { rows } else { 0 };
        }
    }
    partial_rows
}

/// Merges every query token of a tile from all of its parts, which have `rows` partial rows each from `first_row` on.
fn push_merges(tile: &Tile, num_parts: u64, first_row: u64, rows: u64, plan: &mut Plan) {
    let mut row = first_row;
    for segment in &plan.segments[tile.segment_begin as usize..][..tile.num_segments as usize] {
        for token in segment.first_token..segment.first_token + segment.num_tokens {
            let source_begin = plan.merge_sources.len() as u32;
            plan.merge_tokens.push(MergeToken { token, source_begin, num_sources: num_parts as u32 });
            plan.merge_sources.extend((0..num_parts).map(|part| (row + part * rows) as u32));
            row += u64::from(plan.heads.heads_per_group);
        }
    }
}

/// Finds the run of a slot, counted from the first of a tile's runs, always forward.
struct RunCursor {
    run: u32,
    /// First slot of the run.
    run_slot: u32,
}

impl RunCursor {
    fn advance(&mut self, runs: &[KvRun], slot: u32) {
        while slot - self.run_slot >= runs[self.run as usize].num_slots {
            self.run_slot += runs[self.run as usize].num_slots;
            self.run += 1;
        }
    }
}
