//! From a batch to a plan.

use std::cmp::Ordering;
use std::mem;

use packinfer_abi::{HeadGroups, MOST_NARROW_LOADERS, TileKind};
use packinfer_batch::{AttentionShape, Batch, KvDType};
use serde::{Deserialize, Serialize};

use crate::cost::{CostModel, WorkTimes};
use crate::device::{LanesOfGroups, LeastWork};
use crate::items::{Item, Merger, make_items};
use crate::lanes::Lanes;
use crate::order::Order;
use crate::pack::Packer;
use crate::plan::KvTensors;
use crate::queues::{Arrangement, Beside, Queues};
use crate::share::Sharing;
use crate::split::Splitter;
use crate::tile::{self, Tile};
use crate::widen::Widener;
use crate::{DeviceModel, Headroom, KernelFamily, Plan, PlanError, reuse};

/// How requests are put into tiles.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Packing {
    /// KV that several requests begin with is read once for all of them where that is faster; query heads of a KV head together,
    /// short requests together, long tiles split, the longest items first.
    #[default]
    Packed,
    /// The same, but every request reads all of its KV by itself. It is there to be compared with.
    Unshared,
    /// A grid of tiles for each request and query head, one request after the other: how kernels without packing work. It is
    /// there to be compared with.
    PerRequest,
}

/// How narrow items are done where there are wide ones, too.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NarrowItems {
    /// By themselves: there are none of the other kind, or nothing else is worth it.
    #[default]
    Alone,
    /// While other multiprocessors do wide ones.
    InTurn,
    /// Beside wide ones, on the same multiprocessors.
    Beside,
}

impl NarrowItems {
    pub(crate) fn are_alone(&self) -> bool {
        *self == Self::Alone
    }
}

/// Makes plans. It keeps its memory from plan to plan.
///
/// Planning goes through four steps: it is chosen what requests read together, their query tokens are put into tiles, the tiles'
/// columns are divided among work items, and these are put in order.
#[derive(Clone, Debug)]
pub struct Planner {
    /// At least one.
    models: Vec<DeviceModel>,
    packing: Packing,
    /// How narrow items are to be done; if nothing is said, so that the call is predicted to end first.
    narrow_items: Option<NarrowItems>,
    headroom: Headroom,
    widener: Widener,
    /// A plan of the same batch that was not taken.
    other: Option<Plan>,
    sharing: Sharing,
    packer: Packer,
    tiles: Vec<Tile>,
    splitter: Splitter,
    items: Vec<Item>,
    merger: Merger,
    /// For predictions.
    lanes: Lanes,
    order: Order,
    /// What the parts of each item take.
    times: Vec<WorkTimes>,
    queues: Queues,
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

    /// A planner for a device that has several families of kernels, with models of each; a default model if there are none. It
    /// plans a batch by the model of each family that suits its head dimension, for the family that needs the least time for its
    /// bytes and products: the last of those that need about the same, as families that fewer devices can run come later.
    pub fn choosing(mut models: Vec<DeviceModel>) -> Self {
        if models.is_empty() {
            models.push(DeviceModel::default());
        }
        Self {
            models,
            packing: Packing::default(),
            narrow_items: None,
            headroom: Headroom::default(),
            widener: Widener::default(),
            other: None,
            sharing: Sharing::default(),
            packer: Packer::default(),
            tiles: Vec::new(),
            splitter: Splitter::default(),
            items: Vec::new(),
            merger: Merger::default(),
            lanes: Lanes::default(),
            order: Order::default(),
            times: Vec::new(),
            queues: Queues::default(),
        }
    }

    /// The same planner, with another way of putting requests into tiles.
    pub fn with_packing(self, packing: Packing) -> Self {
        Self { packing, ..self }
    }

    /// The same planner, whose plans have narrow items done so wherever there are kernels for that and wide items beside which
    /// they can be, whatever is faster: to compare and to calibrate. Tiles of prompts are not tall then, as there are no narrow
    /// ones with these.
    pub fn with_narrow_items(self, narrow_items: NarrowItems) -> Self {
        Self { narrow_items: Some(narrow_items), ..self }
    }

    /// The same planner, whose plans of decodes have room for further steps.
    pub fn with_headroom(self, headroom: Headroom) -> Self {
        Self { headroom, ..self }
    }

    /// The same planner, whose plans have K and V in FP8 made what Q is before attention only where that takes so many bytes at
    /// most, which the device must have beside the pool: 512 MiB if nothing is said. With 0, it never is.
    pub fn with_widening(self, most_bytes: u64) -> Self {
        Self { widener: Widener::of_at_most(most_bytes), ..self }
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
    /// A batch whose plan has more of something than can be numbered. The plan is empty then.
    pub fn plan_into(&mut self, batch: &Batch, plan: &mut Plan) -> Result<(), PlanError> {
        let repeated_tokens = self.find_shared(batch);
        plan.model = self.choose(batch, repeated_tokens);
        plan.stored = None;
        plan.widening.clear();
        plan.widens_for_wide_tiles = false;
        plan.growth.reset(batch, self.headroom);
        let mut widener = mem::take(&mut self.widener);
        let is_packed = self.packing != Packing::PerRequest;
        let is_free = self.narrow_items.is_none();
        let widened = if is_packed && is_free { widener.widen(batch, &plan.model, &mut plan.widening) } else { None };
        let planned = match widened {
            Some(widened) => {
                self.find_shared(widened);
                self.plan_as_it_is(widened, plan).map(|()| plan.stored = Some(KvTensors::of(batch)))
            }
            None => self.plan_as_it_is(batch, plan),
        };
        let has_queues = plan.num_front_items() < plan.items.len() as u32;
        let may_pay = match self.narrow_items {
            None => has_queues && widener.may_widen_wide_tiles(batch, plan, repeated_tokens),
            Some(narrow_items) => narrow_items == NarrowItems::Beside && Widener::can_widen_wide_tiles(plan),
        };
        if planned.is_ok() && is_packed && may_pay {
            self.widen_wide_tiles(batch, plan, &mut widener);
        }
        self.widener = widener;
        planned.inspect_err(|_| *plan = Plan::empty(batch.shape()))
    }

    /// Finds what requests have in common, and how many KV tokens need not be read for that.
    fn find_shared(&mut self, batch: &Batch) -> u64 {
        match self.packing {
            Packing::Packed => self.sharing.find(batch),
            Packing::Unshared | Packing::PerRequest => self.sharing.find_nothing(),
        }
    }

    /// Plans a batch for the plan's model, of which it is known what requests have in common.
    fn plan_as_it_is(&mut self, batch: &Batch, plan: &mut Plan) -> Result<(), PlanError> {
        let shape = batch.shape();
        let heads = match self.packing {
            Packing::Packed | Packing::Unshared => shape.packed_head_groups(),
            Packing::PerRequest => shape.single_head_groups(),
        };
        let wide_tile_rows = match self.narrow_items {
            None => tile::wide_tile_rows(batch, shape, &plan.model, heads.heads_per_group),
            Some(_) => plan.model.kernel_family.wide_tile_rows(shape.head_dim()),
        };
        let heads = HeadGroups { wide_tile_rows, ..heads };
        (plan.attended, plan.heads) = (KvTensors::of(batch), heads);
        let cost = plan.cost_model(&plan.model);
        if self.sharing.choose(batch, heads, &cost) {
            self.lay_out_sharing(batch, plan, heads, &cost)
        } else {
            self.lay_out(batch, plan, heads, &cost)
        }
    }

    /// Plans a batch again, now with wide tiles that read what K and V are made before; and takes that plan instead, if it is
    /// faster, or is to be taken, and there is room for what is made.
    fn widen_wide_tiles(&mut self, batch: &Batch, plan: &mut Plan, widener: &mut Widener) {
        let mut other = self.other.take().unwrap_or_else(|| Plan::empty(batch.shape()));
        (other.model, other.stored, other.widens_for_wide_tiles) = (plan.model, None, true);
        other.widening.clear();
        other.growth.reset(batch, Headroom::default());
        let is_asked_for = self.narrow_items.is_some();
        let end_ns = if is_asked_for { f64::INFINITY } else { self.queues.end_ns() };
        let is_better = self.plan_as_it_is(batch, &mut other).is_ok()
            && other.beside
            && widener.widen_wide_tiles(&mut other, end_ns - self.queues.end_ns())
            && other.check(other.num_partial_rows.into()).is_ok()
            && (is_asked_for
                || other.predicted_ns(&other.model, &mut self.lanes) < plan.predicted_ns(&plan.model, &mut self.lanes));
        if is_better {
            // For a run with a soft-cap.
            other.back_lanes = plan.back_lanes;
            mem::swap(plan, &mut other);
        }
        self.other = Some(other);
    }

    /// The model that a batch is planned for, of whose KV tokens so many need not be read: of those that suit its head dimension
    /// best, the one that needs the least time for its bytes and products; the last of those that need about the same.
    fn choose(&self, batch: &Batch, repeated_tokens: u64) -> DeviceModel {
        /// What the models of two families may differ by where the kernels do not, as part of the time: fitted rates of memory do by
        /// up to 23 % (H200, head dimension 96).
        const SPREAD: f64 = 0.25;
        let shape = batch.shape();
        let better = |a: &DeviceModel, b: &DeviceModel| {
            a.kernel_family == b.kernel_family && a.misfit(shape.head_dim()) < b.misfit(shape.head_dim())
        };
        let suits = |model: &&DeviceModel| !self.models.iter().any(|other| better(other, model));
        let suiting = || self.models.iter().filter(suits).copied();
        let work = LeastWork::of(batch, repeated_tokens);
        let least = suiting().map(|model| model.about_ns(work)).fold(f64::INFINITY, f64::min);
        let most = least + least.abs() * SPREAD;
        let is_best = |model: &DeviceModel| model.about_ns(work).partial_cmp(&most) != Some(Ordering::Greater);
        suiting().rfind(is_best).unwrap_or(self.models[0])
    }

    /// Makes the plan with what is to be shared; or with nothing shared, if that takes no longer, or hardly.
    fn lay_out_sharing(&mut self, batch: &Batch, plan: &mut Plan, heads: HeadGroups, cost: &CostModel) -> Result<(), PlanError> {
        /// What sharing must save, as part of the time, to be worth its merges: predictions are not better than that.
        const WORTHWHILE: f64 = 0.01;
        let planned = self.lay_out(batch, plan, heads, cost);
        // Of what a request's tiles see, plans count the mean as read: no less than what its first query token sees.
        let not_seen_by_all = batch.requests().iter().map(|request| u64::from(request.query_len.saturating_sub(1))).sum();
        let least_ns = plan.model.least_ns(LeastWork::of(batch, not_seen_by_all)) + plan.model.launch_ns;
        let apart_ns = least_ns * (1.0 - WORTHWHILE);
        if planned.is_ok() && plan.predicted_at_most_ns(&plan.model, &self.times) < apart_ns {
            return planned;
        }
        let shared_ns = plan.predicted_ns(&plan.model, &mut self.lanes);
        if planned.is_ok() && shared_ns < apart_ns {
            return planned;
        }
        self.sharing.share_nothing();
        let planned_apart = self.lay_out(batch, plan, heads, cost);
        let apart_ns = plan.predicted_ns(&plan.model, &mut self.lanes);
        let most_ns = apart_ns * (1.0 - WORTHWHILE);
        if planned.is_err() || (planned_apart.is_ok() && shared_ns.partial_cmp(&most_ns) != Some(Ordering::Less)) {
            return planned_apart;
        }
        self.sharing.choose(batch, heads, cost);
        self.lay_out(batch, plan, heads, cost)
    }

    /// Makes the plan with what is shared now.
    fn lay_out(&mut self, batch: &Batch, plan: &mut Plan, heads: HeadGroups, cost: &CostModel) -> Result<(), PlanError> {
        plan.reset(batch, heads);
        self.make_tiles(batch, plan, heads, cost);
        let parts = match self.packing {
            Packing::Packed | Packing::Unshared => self.splitter.split(&self.tiles, plan, cost),
            Packing::PerRequest => self.splitter.whole(&self.tiles),
        };
        let partial_rows = make_items(&self.tiles, parts, plan, &mut self.items);
        plan.check(partial_rows)?;
        plan.num_partial_rows = partial_rows as u32;
        self.merger.push_merges(&self.items, plan);
        self.put_in_order(plan, cost);
        plan.find_tails();
        plan.check(partial_rows)
    }

    fn make_tiles(&mut self, batch: &Batch, plan: &mut Plan, heads: HeadGroups, cost: &CostModel) {
        let sharing = &self.sharing;
        self.tiles.clear();
        match self.packing {
            Packing::Packed | Packing::Unshared => {
                for ((group, members), pack) in sharing.groups().zip(0..) {
                    tile::push_group(&mut self.tiles, plan, batch, pack, members, group);
                }
                let lanes = f64::from(plan.model.lanes()) / f64::from(heads.num_groups);
                self.packer.pack(batch, sharing, heads, cost, lanes, !plan.growth.is_planned());
                for ((members, kind), pack) in self.packer.packs().zip(sharing.groups().count() as u32..) {
                    let members = members.iter().map(|&request| sharing.own(batch, request));
                    tile::push_tiles(&mut self.tiles, plan, batch, pack, members, kind);
                }
            }
            Packing::PerRequest => {
                for (request, index) in batch.requests().iter().zip(0..) {
                    let kind = tile::kind_for(request.query_len, heads);
                    if request.query_len > 0 {
                        let own = sharing.own(batch, index);
                        tile::push_tiles(&mut self.tiles, plan, batch, index, std::iter::once(own), kind);
                    }
                }
            }
        }
    }

    /// Puts the items into the plan, in [order](Order). Persistent blocks have two queues, if there are wide items and narrow
    /// ones.
    fn put_in_order(&mut self, plan: &mut Plan, cost: &CostModel) {
        let mut has_queues = false;
        if self.packing == Packing::PerRequest {
            self.order.keep(&self.items);
        } else {
            self.find_times(plan, cost);
            let device = plan.model.lanes_of_groups(plan.heads.num_groups);
            let Self { items, tiles, splitter, times, order, .. } = self;
            order.sort(items, tiles, times, splitter.longest_first(), device);
            if plan.model.kernel_family == KernelFamily::Sm90a {
                let can_be_beside = plan.model.kernel_family.does_narrow_beside_wide(plan.shape_of(TileKind::Wide));
                let beside = match plan.model.beside.filter(|_| can_be_beside) {
                    Some(_) if self.narrow_items.is_some_and(|narrow_items| narrow_items != NarrowItems::Beside) => Beside::Never,
                    Some(times) if plan.widens_for_wide_tiles || self.narrow_items.is_some() => Beside::Always(times),
                    Some(times) => Beside::IfFaster(times),
                    None => Beside::Never,
                };
                let queues = self.make_queues(device, beside);
                has_queues = queues.is_some();
                let Arrangement { back_lanes, beside } = queues.unwrap_or_default();
                (plan.back_lanes, plan.beside) = (back_lanes, beside);
            }
        }
        let Self { order, items, tiles, .. } = self;
        if has_queues || items.iter().all(|item| item.item.tile == TileKind::Wide) {
            plan.groups_at_once =
                groups_at_once(&plan.model, order.shared_columns(), plan.shape_of(TileKind::Wide)).min(plan.groups_at_once);
        }
        let in_order = || order.iter().map(|item| &items[item]);
        let is_front = |item: &&Item| !has_queues || item.item.tile == TileKind::Wide;
        plan.num_front_items = in_order().filter(is_front).count() as u32;
        plan.items.extend(in_order().map(|item| item.item));
        plan.fresh.extend(in_order().map(|item| tiles[item.tile as usize].fresh));
        plan.shared.extend(in_order().map(|item| tiles[item.tile as usize].shared));
        plan.settled_bytes = reuse::settled_bytes(plan);
        plan.narrow_loaders = narrow_loaders(plan);
    }

    /// Finds what the parts of each item take.
    fn find_times(&mut self, plan: &Plan, cost: &CostModel) {
        let Self { items, tiles, splitter, times, .. } = self;
        let of_tiles = splitter.times_of_tiles();
        times.clear();
        times.extend(items.iter().map(|Item { item, tile }| {
            let Tile { columns, fresh, .. } = tiles[*tile as usize];
            let is_whole = item.column_end - item.column_begin == columns;
            if is_whole { of_tiles[*tile as usize] } else { cost.times_of(item, plan.segments_of(item), fresh) }
        }));
    }

    /// Puts narrow items, which memory limits, behind wide ones, which products limit, if there is much of both; and returns how
    /// the device should go about them.
    fn make_queues(&mut self, device: LanesOfGroups, beside: Beside) -> Option<Arrangement> {
        let Self { items, order, times, queues, .. } = self;
        queues.fill(order.iter().map(|item| (items[item].item.tile, times[item])));
        let arrangement = queues.arrange(device, beside)?;
        order.put_narrow_last(items);
        Some(arrangement)
    }
}

/// Head groups that come at once where several wide tiles read the same columns, so many at most: few, if the L2 cache cannot
/// keep these for all KV heads, so that, where there are tiles enough, many multiprocessors read the same KV at the same time.
/// Each brings some of it from the memory for the others, that is `1 / TILES_AT_ONCE` of what it takes from the cache.
fn groups_at_once(model: &DeviceModel, shared_columns: u32, shape: AttentionShape) -> u32 {
    const TILES_AT_ONCE: u32 = 16;
    /// Half of an H100's L2 cache.
    const CACHED_BYTES: u64 = 25 << 20;
    let is_cached = u64::from(shared_columns) * shape.kv_bytes_per_slot() <= CACHED_BYTES;
    if is_cached || model.kernel_family != KernelFamily::Sm90a {
        return u32::MAX;
    }
    (model.lanes() / TILES_AT_ONCE).max(1)
}

/// Warps that bring K, and V, of narrow tiles in FP8: the most where rows are so short that a block waits for its boxes to be
/// brought, not for the memory, which few blocks with narrow tiles do sooner than many.
fn narrow_loaders(plan: &Plan) -> u32 {
    let has_most = match (plan.attended.shape.kv_dtype(), plan.attended.shape.head_dim()) {
        (KvDType::E4m3, 64) => true,
        (KvDType::E4m3, 96) => plan.back_lanes > 0,
        _ => false,
    };
    if has_most { MOST_NARROW_LOADERS } else { 1 }
}
