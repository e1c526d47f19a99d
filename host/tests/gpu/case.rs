//! A batch with its tensors, on the host and on the device, and the exact result.

use std::io::{self, Write};
use std::sync::LazyLock;

use packinfer::{
    AttentionShape, Batch, DeviceModel, DevicePlan, Engine, EngineError, EngineOptions, KernelFamily, Mask, Plan, Planner,
    RunOptions, Stamps, Stream, Tensors, Workspace,
};
use packinfer::{DeviceBuffer, NarrowItems, Packing};
use packinfer_cpu::reference::{self, Reference};
use packinfer_cpu::{Inputs, Options, largest_difference, random_elements, relative_error};

/// An element type of the engine and of the reference.
pub trait Element: packinfer::Element + packinfer_cpu::Element {}
impl<T: packinfer::Element + packinfer_cpu::Element> Element for T {}

/// A type of K and V of the engine and of the reference.
pub trait KvElement<E: Element>: packinfer::KvElement<E> + packinfer_cpu::KvElement<E> {}
impl<E: Element, K: packinfer::KvElement<E> + packinfer_cpu::KvElement<E>> KvElement<E> for K {}

/// Largest absolute error of the log-sum-exp: the scores are products of the same elements, summed in float32.
const LSE_TOLERANCE: f64 = 1e-3;

/// The engine that all tests use, from their several threads; none where there is no device for it.
///
/// `PACKINFER_TEST_KERNELS` names a family of kernels, where those that the device runs best are not the ones to be tested.
static ENGINE: LazyLock<Option<Engine>> = LazyLock::new(|| match Engine::new(options()) {
    Ok(engine) => Some(engine),
    Err(
        error @ (EngineError::NoDriver(_)
        | EngineError::DriverTooOld { .. }
        | EngineError::NoDevice
        | EngineError::DeviceTooOld { .. }),
    ) => {
        // Not `println!`, which the test harness keeps to itself.
        let _ = writeln!(io::stderr(), "GPU tests are skipped: {error}");
        None
    }
    Err(error) => panic!("{error}"),
});

fn options() -> EngineOptions {
    let family = std::env::var("PACKINFER_TEST_KERNELS").ok();
    let kernel_family = family.map(|name| name.parse().expect("PACKINFER_TEST_KERNELS names a family"));
    EngineOptions { kernel_family, ..EngineOptions::default() }
}

/// The engine, or nothing where tests are to be skipped.
pub fn engine() -> Option<&'static Engine> {
    ENGINE.as_ref()
}

/// O and LSE.
pub type Results<E> = (Vec<E>, Vec<f32>);

/// A batch with random tensors.
pub struct Case<E, K = E> {
    pub batch: Batch,
    pub scale: Option<f32>,
    pub logit_soft_cap: Option<f32>,
    /// A logit for each query head.
    pub sinks: Option<Vec<f32>>,
    q: Vec<E>,
    /// Numbers for each KV head.
    pub k_scales: Option<Vec<f32>>,
    pub v_scales: Option<Vec<f32>>,
    k: Vec<K>,
    v: Vec<K>,
}

impl<E: Element, K: KvElement<E>> Case<E, K> {
    pub fn new(batch: Batch) -> Self {
        let shape = batch.shape();
        let qo_len = batch.num_query_tokens() as usize * shape.qo_elements_per_token() as usize;
        let kv_len = batch.kv_elements() as usize;
        Self {
            batch,
            scale: None,
            logit_soft_cap: None,
            sinks: None,
            k_scales: None,
            v_scales: None,
            q: random_elements(qo_len, 1),
            k: random_elements(kv_len, 2),
            v: random_elements(kv_len, 3),
        }
    }

    pub fn plan(&self, engine: &Engine, packing: Packing) -> Plan {
        engine.planner().with_packing(packing).plan(&self.batch).expect("the batch can be planned")
    }

    /// A plan for the Hopper kernels by changed models, if the engine has them.
    pub fn plan_for_hopper(&self, engine: &Engine, change: impl Fn(DeviceModel) -> DeviceModel) -> Option<Plan> {
        Some(self.plan_of(hopper_planner(engine, change)?))
    }

    /// A plan that has narrow items done beside wide ones, if the engine has the kernels for Hopper.
    pub fn plan_beside(&self, engine: &Engine, change: impl Fn(DeviceModel) -> DeviceModel) -> Option<Plan> {
        let plan = self.plan_of(hopper_planner(engine, change)?.with_narrow_items(NarrowItems::Beside));
        assert!(plan.is_beside(), "{:?}", self.batch.shape());
        Some(plan)
    }

    fn plan_of(&self, mut planner: Planner) -> Plan {
        planner.plan(&self.batch).expect("the batch can be planned")
    }

    pub fn on_device(&self, engine: &Engine) -> DeviceCase<E, K> {
        let lse_len = self.batch.num_query_tokens() as usize * self.batch.shape().num_qo_heads() as usize;
        let per_head =
            |numbers: &Option<Vec<f32>>| numbers.as_ref().map(|numbers| engine.copy_of(numbers).expect("there is room"));
        DeviceCase {
            q: engine.copy_of(&self.q).expect("there is room"),
            k: engine.copy_of(&self.k).expect("there is room"),
            v: engine.copy_of(&self.v).expect("there is room"),
            o: engine.zeros(self.q.len()).expect("there is room"),
            lse: engine.zeros(lse_len).expect("there is room"),
            sinks: per_head(&self.sinks),
            k_scales: per_head(&self.k_scales),
            v_scales: per_head(&self.v_scales),
            options: RunOptions { softmax_scale: self.scale, logit_soft_cap: self.logit_soft_cap, ..RunOptions::default() },
        }
    }

    /// Changes Q: each number of it, given its row (a query token's head) and its place in the row.
    pub fn change_q(&mut self, change: impl Fn(usize, usize, E) -> E) {
        let head_dim = self.batch.shape().head_dim() as usize;
        for (row, numbers) in self.q.chunks_mut(head_dim).enumerate() {
            numbers.iter_mut().enumerate().for_each(|(place, number)| *number = change(row, place, *number));
        }
    }

    /// Changes K: each number of it, given its slot.
    pub fn change_k(&mut self, change: impl Fn(usize, K) -> K) {
        let slot_elements = self.batch.shape().num_kv_heads() as usize * self.batch.shape().head_dim() as usize;
        for (slot, numbers) in self.k.chunks_mut(slot_elements).enumerate() {
            numbers.iter_mut().for_each(|number| *number = change(slot, *number));
        }
    }

    /// Replaces K and V.
    pub fn set_kv(&mut self, k: &[K], v: &[K]) {
        (self.k, self.v) = (k.to_vec(), v.to_vec());
    }

    /// Runs the batch once, on a stream of its own.
    pub fn run(&self, engine: &Engine, packing: Packing) -> Results<E> {
        self.run_plan(engine, &self.plan(engine, packing))
    }

    /// Runs a plan of the batch once, on a stream of its own.
    pub fn run_plan(&self, engine: &Engine, plan: &Plan) -> Results<E> {
        let stream = engine.stream().expect("a stream");
        let plan = engine.upload(plan, &stream).expect("the plan fits");
        let mut device = self.on_device(engine);
        device.run(engine, &plan, &mut engine.workspace().expect("there is room"), &stream).expect("the run is right");
        device.results()
    }

    /// Runs a plan twice, which must give the same, and compares it with exact attention; and the same without log-sum-exps, for
    /// which kernels may find O in another way.
    pub fn check_plan(&self, engine: &Engine, plan: &Plan)
    where
        E: PartialEq,
    {
        let exact = self.exact();
        let first = self.run_plan(engine, plan);
        self.compare(&first, &exact);
        assert!(self.run_plan(engine, plan) == first, "a second run gave something else");
        let alone = self.run_plan_for_o_alone(engine, plan);
        self.compare_o(&alone, &exact);
        assert!(self.run_plan_for_o_alone(engine, plan) == alone, "a second run without LSE gave something else");
    }

    /// Runs a plan of the batch once, on a stream of its own, without log-sum-exps.
    fn run_plan_for_o_alone(&self, engine: &Engine, plan: &Plan) -> Vec<E> {
        let stream = engine.stream().expect("a stream");
        let plan = engine.upload(plan, &stream).expect("the plan fits");
        let mut device = self.on_device(engine);
        let mut workspace = engine.workspace().expect("there is room");
        let (tensors, options) = device.arguments();
        engine.run(&plan, &mut workspace, &stream, Tensors { lse: None, ..tensors }, options).expect("the run is right");
        device.o.download().expect("the work is done")
    }

    /// Compares results with exact attention.
    pub fn check(&self, results: &Results<E>) {
        self.compare(results, &self.exact());
    }

    fn compare(&self, (o, lse): &Results<E>, exact: &Reference) {
        self.compare_o(o, exact);
        let error = largest_difference(lse, &exact.lse);
        assert!(error <= LSE_TOLERANCE, "error {error} of LSE, {}", self.describe());
    }

    fn compare_o(&self, o: &[E], exact: &Reference) {
        let error = relative_error(o, &exact.o);
        assert!(error <= E::TOLERANCE, "relative error {error} of O, {}", self.describe());
    }

    /// Exact attention of all rows.
    fn exact(&self) -> Reference {
        let options = Options {
            scale: self.scale,
            logit_soft_cap: self.logit_soft_cap,
            sinks: self.sinks.as_deref(),
            k_scales: self.k_scales.as_deref(),
            v_scales: self.v_scales.as_deref(),
        };
        let inputs = Inputs { q: &self.q, k: &self.k, v: &self.v, options };
        let tokens: Vec<u32> = (0..self.batch.num_query_tokens()).collect();
        reference::attention(&self.batch, inputs, &tokens).expect("the inputs are right")
    }

    fn describe(&self) -> String {
        let lengths = self.batch.requests().iter().map(|request| (request.query_len, request.kv_len));
        let options = (self.scale, self.logit_soft_cap, self.sinks.is_some());
        let lengths = lengths.collect::<Vec<_>>();
        format!(
            "{:?}, {:?}, (scale, soft-cap, sinks) {options:?}, (query, KV) {lengths:?}",
            self.batch.shape(),
            self.batch.mask()
        )
    }
}

/// The tensors of a case on the device.
pub struct DeviceCase<E, K = E> {
    pub q: DeviceBuffer<E>,
    pub k: DeviceBuffer<K>,
    pub v: DeviceBuffer<K>,
    pub o: DeviceBuffer<E>,
    pub lse: DeviceBuffer<f32>,
    pub sinks: Option<DeviceBuffer<f32>>,
    pub k_scales: Option<DeviceBuffer<f32>>,
    pub v_scales: Option<DeviceBuffer<f32>>,
    /// All but these.
    pub options: RunOptions<'static>,
}

impl<E: Element, K: KvElement<E>> DeviceCase<E, K> {
    pub fn run(
        &mut self,
        engine: &Engine,
        plan: &DevicePlan,
        workspace: &mut Workspace,
        stream: &Stream,
    ) -> Result<(), EngineError> {
        let (tensors, options) = self.arguments();
        engine.run(plan, workspace, stream, tensors, options)
    }

    pub fn run_stamped(
        &mut self,
        engine: &Engine,
        plan: &DevicePlan,
        workspace: &mut Workspace,
        stream: &Stream,
        stamps: &mut Stamps,
    ) -> Result<(), EngineError> {
        let (tensors, options) = self.arguments();
        engine.run_stamped(plan, workspace, stream, tensors, options, stamps)
    }

    fn arguments(&mut self) -> (Tensors<'_, E, K>, RunOptions<'_>) {
        let Self { q, k, v, o, lse, sinks, k_scales, v_scales, options } = self;
        let tensors =
            Tensors { q: q.as_slice(), k: k.as_slice(), v: v.as_slice(), o: o.as_mut_slice(), lse: Some(lse.as_mut_slice()) };
        let [sinks, k_scales, v_scales] =
            [sinks, k_scales, v_scales].map(|per_head| per_head.as_ref().map(DeviceBuffer::as_slice));
        (tensors, RunOptions { sinks, k_scales, v_scales, ..*options })
    }

    pub fn results(&self) -> Results<E> {
        (self.o.download().expect("the work is done"), self.lse.download().expect("the work is done"))
    }
}

/// Checks plans for causal batches of some lengths in all of these shapes, in pages of these numbers of slots and contiguous.
/// Ends where there is no engine, or `plan` has none for it.
pub fn check_shapes<E: Element + PartialEq, K: KvElement<E>>(
    head_dims: &[u32],
    gqa_ratios: &[u32],
    page_sizes: &[u32],
    lengths: &[(u32, u32)],
    case_of: impl Fn(Batch) -> Case<E, K>,
    plan: impl Fn(&Engine, &Case<E, K>) -> Option<Plan>,
) {
    let Some(engine) = engine() else { return };
    for &head_dim in head_dims {
        for &gqa_ratio in gqa_ratios {
            let shape = shape::<E>(gqa_ratio, head_dim).with_kv_dtype(<K as packinfer::KvElement<E>>::KV_DTYPE);
            let paged = page_sizes.iter().map(|&page_size| paged(shape, Mask::Causal, lengths, page_size));
            for batch in paged.chain([contiguous(shape, Mask::Causal, lengths)]) {
                let case = case_of(batch);
                let Some(plan) = plan(engine, &case) else { return };
                case.check_plan(engine, &plan);
            }
        }
    }
}

/// A planner by changed models of the kernels for Hopper, if the engine has them.
fn hopper_planner(engine: &Engine, change: impl Fn(DeviceModel) -> DeviceModel) -> Option<Planner> {
    let models = engine.device().models().into_iter().filter(|model| model.kernel_family == KernelFamily::Sm90a);
    let models: Vec<_> = models.map(change).collect();
    let has_kernels = !models.is_empty() && engine.kernel_families().contains(&KernelFamily::Sm90a);
    has_kernels.then(|| Planner::choosing(models))
}

/// A shape of two KV heads.
pub fn shape<E: Element>(gqa_ratio: u32, head_dim: u32) -> AttentionShape {
    AttentionShape::new(2 * gqa_ratio, 2, head_dim, <E as packinfer::Element>::DTYPE).expect("a good shape")
}

/// A batch of (query, KV) lengths whose KV lies one after the other.
pub fn contiguous(shape: AttentionShape, mask: Mask, lengths: &[(u32, u32)]) -> Batch {
    let mut batch = Batch::new(shape, mask);
    for &(query_len, kv_len) in lengths {
        batch.push_contiguous(query_len, kv_len, batch.num_slots()).expect("good lengths");
    }
    batch
}

/// A batch whose KV lies in pages that are handed out in turn, from the last one backwards.
pub fn paged(shape: AttentionShape, mask: Mask, lengths: &[(u32, u32)], page_size: u32) -> Batch {
    in_pages(Batch::new(shape, mask), lengths, page_size)
}

/// Adds requests to a batch as [`paged`] does.
pub fn in_pages(mut batch: Batch, lengths: &[(u32, u32)], page_size: u32) -> Batch {
    let pages_of = |kv_len: u32| kv_len.div_ceil(page_size);
    let most = lengths.iter().map(|&(_, kv_len)| pages_of(kv_len)).max().unwrap_or(0);
    let num_requests = lengths.len() as u32;
    for (request, &(query_len, kv_len)) in (0..).zip(lengths) {
        let pages: Vec<u32> = (0..pages_of(kv_len)).map(|page| (most - 1 - page) * num_requests + request).collect();
        batch.push_paged(query_len, kv_len, &pages, page_size).expect("good lengths");
    }
    batch
}
