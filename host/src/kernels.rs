//! The kernels: PTX in this program, compiled by the driver for the device when first needed.

use std::collections::HashMap;
use std::ffi::c_void;
use std::ptr;
use std::sync::{Mutex, PoisonError};

use cust::module::Module;
use cust::sys::{self, CUfunction, CUfunction_attribute};
use packinfer_abi::{
    ATTENTION_SHARED_BYTES, ATTENTION_THREADS, BESIDE_SHARED_BYTES, BESIDE_THREADS, CONVERTING_SHARED_BYTES, CONVERTING_THREADS,
    HOPPER_SHARED_BYTES, HOPPER_THREADS, KV_APPEND_THREADS, KV_MOVE_THREADS, KV_WIDEN_THREADS, MERGE_SHARED_BYTES, MERGE_THREADS,
    MMA_RATE_THREADS, TALL_SHARED_BYTES, TALL_THREADS, WGMMA_RATE_SHARED_BYTES, WGMMA_RATE_THREADS,
};
use packinfer_batch::{AttentionShape, DType, KvDType};

use crate::error::Doing;
use crate::{EngineError, KernelFamily, Stream, overlap};

/// The most thread blocks of a launch.
pub(crate) const MAX_BLOCKS: u32 = i32::MAX as u32;

/// A kernel as it was built: its PTX and what it is launched with.
#[derive(Clone, Copy, Debug)]
pub(crate) struct KernelSource {
    architecture: &'static str,
    name: &'static str,
    ptx: &'static str,
    threads: u32,
    /// Dynamic shared memory of a block.
    shared_bytes: u32,
    /// Whether it may begin before the launch before it has ended: it then waits by itself.
    overlaps: bool,
}

/// The source of a kernel, by architecture and name.
macro_rules! kernel {
    ($architecture:literal, $name:expr, $threads:expr, $shared_bytes:expr) => {
        KernelSource {
            architecture: $architecture,
            name: $name,
            ptx: include_str!(concat!("../../kernels-gpu/ptx/", $architecture, "/", $name, ".ptx")),
            threads: $threads,
            shared_bytes: $shared_bytes,
            overlaps: false,
        }
    };
}

impl KernelSource {
    /// The kernel of a family that does a plan's work items, with a soft-cap of the logits or without.
    pub fn attention(family: KernelFamily, shape: AttentionShape, soft_cap: bool) -> Self {
        macro_rules! sm_80 {
            ($name:literal) => {
                kernel!("sm_80", $name, ATTENTION_THREADS, ATTENTION_SHARED_BYTES)
            };
        }
        // Those for sm_80 have the soft-cap in the same kernel.
        macro_rules! sm_90a_launched_with {
            ($name:literal, $threads:expr, $shared_bytes:expr) => {
                match soft_cap {
                    true => kernel!("sm_90a", concat!($name, "_capped"), $threads, $shared_bytes),
                    false => kernel!("sm_90a", $name, $threads, $shared_bytes),
                }
            };
        }
        macro_rules! sm_90a {
            ($name:literal) => {
                sm_90a_launched_with!($name, HOPPER_THREADS, HOPPER_SHARED_BYTES)
            };
        }
        macro_rules! converting {
            ($name:literal) => {
                sm_90a_launched_with!($name, CONVERTING_THREADS, CONVERTING_SHARED_BYTES)
            };
        }
        if shape.kv_dtype() == KvDType::E4m3 {
            return match (family, shape.dtype(), shape.head_dim()) {
                (KernelFamily::Sm90a, DType::Bf16, 64) => converting!("attention_bf16_e4m3_d64"),
                (KernelFamily::Sm90a, DType::Bf16, 96) => converting!("attention_bf16_e4m3_d96"),
                (KernelFamily::Sm90a, DType::Bf16, 128) => converting!("attention_bf16_e4m3_d128"),
                (KernelFamily::Sm90a, DType::Bf16, _) => converting!("attention_bf16_e4m3_d256"),
                (KernelFamily::Sm90a, DType::F16, 64) => converting!("attention_f16_e4m3_d64"),
                (KernelFamily::Sm90a, DType::F16, 96) => converting!("attention_f16_e4m3_d96"),
                (KernelFamily::Sm90a, DType::F16, 128) => converting!("attention_f16_e4m3_d128"),
                (KernelFamily::Sm90a, DType::F16, _) => converting!("attention_f16_e4m3_d256"),
                (_, DType::Bf16, 64) => sm_80!("attention_bf16_e4m3_d64"),
                (_, DType::Bf16, 96) => sm_80!("attention_bf16_e4m3_d96"),
                (_, DType::Bf16, 128) => sm_80!("attention_bf16_e4m3_d128"),
                (_, DType::Bf16, _) => sm_80!("attention_bf16_e4m3_d256"),
                (_, DType::F16, 64) => sm_80!("attention_f16_e4m3_d64"),
                (_, DType::F16, 96) => sm_80!("attention_f16_e4m3_d96"),
                (_, DType::F16, 128) => sm_80!("attention_f16_e4m3_d128"),
                (_, DType::F16, _) => sm_80!("attention_f16_e4m3_d256"),
            };
        }
        match (family, shape.dtype(), shape.head_dim()) {
            (KernelFamily::Sm90a, DType::Bf16, 64) => sm_90a!("attention_bf16_d64"),
            (KernelFamily::Sm90a, DType::Bf16, 96) => sm_90a!("attention_bf16_d96"),
            (KernelFamily::Sm90a, DType::Bf16, 128) => sm_90a!("attention_bf16_d128"),
            (KernelFamily::Sm90a, DType::Bf16, _) => sm_90a!("attention_bf16_d256"),
            (KernelFamily::Sm90a, DType::F16, 64) => sm_90a!("attention_f16_d64"),
            (KernelFamily::Sm90a, DType::F16, 96) => sm_90a!("attention_f16_d96"),
            (KernelFamily::Sm90a, DType::F16, 128) => sm_90a!("attention_f16_d128"),
            (KernelFamily::Sm90a, DType::F16, _) => sm_90a!("attention_f16_d256"),
            (_, DType::Bf16, 64) => sm_80!("attention_bf16_d64"),
            (_, DType::Bf16, 96) => sm_80!("attention_bf16_d96"),
            (_, DType::Bf16, 128) => sm_80!("attention_bf16_d128"),
            (_, DType::Bf16, _) => sm_80!("attention_bf16_d256"),
            (_, DType::F16, 64) => sm_80!("attention_f16_d64"),
            (_, DType::F16, 96) => sm_80!("attention_f16_d96"),
            (_, DType::F16, 128) => sm_80!("attention_f16_d128"),
            (_, DType::F16, _) => sm_80!("attention_f16_d256"),
        }
    }

    /// The kernel for wide tiles of [`packinfer_abi::TALL_TILE_ROWS`], if there is one.
    pub fn attention_tall(shape: AttentionShape, soft_cap: bool) -> Option<Self> {
        macro_rules! tall {
            ($name:literal) => {
                match soft_cap {
                    true => kernel!("sm_90a", concat!($name, "_tall_capped"), TALL_THREADS, TALL_SHARED_BYTES),
                    false => kernel!("sm_90a", concat!($name, "_tall"), TALL_THREADS, TALL_SHARED_BYTES),
                }
            };
        }
        match (shape.kv_dtype(), shape.dtype(), shape.head_dim()) {
            (KvDType::Same, DType::Bf16, 64) => Some(tall!("attention_bf16_d64")),
            (KvDType::Same, DType::Bf16, 96) => Some(tall!("attention_bf16_d96")),
            (KvDType::Same, DType::Bf16, 128) => Some(tall!("attention_bf16_d128")),
            (KvDType::Same, DType::F16, 64) => Some(tall!("attention_f16_d64")),
            (KvDType::Same, DType::F16, 96) => Some(tall!("attention_f16_d96")),
            (KvDType::Same, DType::F16, 128) => Some(tall!("attention_f16_d128")),
            _ => None,
        }
    }

    /// The kernel that does narrow work items beside wide ones, if there is one. With K and V in FP8, wide ones read what these
    /// are made before.
    pub fn attention_beside(shape: AttentionShape) -> Option<Self> {
        macro_rules! beside {
            ($name:literal) => {
                kernel!("sm_90a", $name, BESIDE_THREADS, BESIDE_SHARED_BYTES)
            };
        }
        match (shape.kv_dtype(), shape.dtype(), shape.head_dim()) {
            (KvDType::Same, DType::Bf16, 64) => Some(beside!("attention_bf16_d64_beside")),
            (KvDType::Same, DType::Bf16, 128) => Some(beside!("attention_bf16_d128_beside")),
            (KvDType::Same, DType::F16, 64) => Some(beside!("attention_f16_d64_beside")),
            (KvDType::Same, DType::F16, 128) => Some(beside!("attention_f16_d128_beside")),
            (KvDType::E4m3, DType::Bf16, 64) => Some(beside!("attention_bf16_e4m3_d64_beside")),
            (KvDType::E4m3, DType::Bf16, 128) => Some(beside!("attention_bf16_e4m3_d128_beside")),
            (KvDType::E4m3, DType::F16, 64) => Some(beside!("attention_f16_e4m3_d64_beside")),
            (KvDType::E4m3, DType::F16, 128) => Some(beside!("attention_f16_e4m3_d128_beside")),
            _ => None,
        }
    }

    /// The kernel that merges the partials of an attention kernel for `sm_80`; one that may begin while the attention kernel is
    /// still at work, if launches can overlap.
    pub fn merge(shape: AttentionShape, overlaps: bool) -> Self {
        macro_rules! merge {
            ($name:literal) => {
                match overlaps {
                    true => Self { overlaps, ..kernel!("sm_90a", $name, MERGE_THREADS, MERGE_SHARED_BYTES) },
                    false => kernel!("sm_80", $name, MERGE_THREADS, MERGE_SHARED_BYTES),
                }
            };
        }
        match (shape.dtype(), shape.head_dim()) {
            (DType::Bf16, 64) => merge!("merge_bf16_d64"),
            (DType::Bf16, 96) => merge!("merge_bf16_d96"),
            (DType::Bf16, 128) => merge!("merge_bf16_d128"),
            (DType::Bf16, _) => merge!("merge_bf16_d256"),
            (DType::F16, 64) => merge!("merge_f16_d64"),
            (DType::F16, 96) => merge!("merge_f16_d96"),
            (DType::F16, 128) => merge!("merge_f16_d128"),
            (DType::F16, _) => merge!("merge_f16_d256"),
        }
    }

    /// The kernel that copies slots.
    pub fn kv_move() -> Self {
        kernel!("sm_80", "kv_move", KV_MOVE_THREADS, 0)
    }

    /// The kernel that appends tokens.
    pub fn kv_append(shape: AttentionShape) -> Self {
        macro_rules! kv_append {
            ($name:literal) => {
                kernel!("sm_80", $name, KV_APPEND_THREADS, 0)
            };
        }
        match (shape.dtype(), shape.kv_dtype()) {
            (DType::Bf16, KvDType::Same) => kv_append!("kv_append_bf16"),
            (DType::Bf16, KvDType::E4m3) => kv_append!("kv_append_bf16_e4m3"),
            (DType::F16, KvDType::Same) => kv_append!("kv_append_f16"),
            (DType::F16, KvDType::E4m3) => kv_append!("kv_append_f16_e4m3"),
        }
    }

    /// The kernel that makes K and V in FP8 what Q is.
    pub fn kv_widen(dtype: DType) -> Self {
        match dtype {
            DType::Bf16 => kernel!("sm_90a", "kv_widen_bf16", KV_WIDEN_THREADS, 0),
            DType::F16 => kernel!("sm_90a", "kv_widen_f16", KV_WIDEN_THREADS, 0),
        }
    }

    /// The kernel that measures the tensor cores through the instruction that a family's attention kernels use.
    pub fn mma_rate(family: KernelFamily) -> Self {
        match family {
            KernelFamily::Sm90a => kernel!("sm_90a", "wgmma_rate_bf16", WGMMA_RATE_THREADS, WGMMA_RATE_SHARED_BYTES),
            _ => kernel!("sm_80", "mma_rate_bf16", MMA_RATE_THREADS, 0),
        }
    }

    /// Adds the kernel to an error.
    fn refused(self) -> impl FnOnce(EngineError) -> EngineError {
        move |error| EngineError::Kernel { kernel: self.name, error: Box::new(error) }
    }
}

/// A kernel's parameter as the driver wants it, which only reads it.
pub(crate) fn parameter<T>(value: &T) -> *mut c_void {
    ptr::from_ref(value).cast_mut().cast()
}

/// A kernel on the device. It belongs to [`Kernels`], which whoever has one keeps.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Kernel {
    function: CUfunction,
    source: KernelSource,
}

// SAFETY: a function is an address of the driver's, which may be used from any thread.
unsafe impl Send for Kernel {}
// SAFETY: as above.
unsafe impl Sync for Kernel {}

impl Kernel {
    /// Gives `blocks` blocks of the kernel, at least one, to a stream.
    ///
    /// # Safety
    ///
    /// The stream's context is current. `params` point to the kernel's parameters, which are as it wants them, the memory that
    /// they refer to included, until the work is done.
    pub unsafe fn launch(&self, blocks: u32, params: &mut [*mut c_void], stream: &Stream) -> Result<(), EngineError> {
        let KernelSource { threads, shared_bytes, overlaps, .. } = self.source;
        if overlaps {
            // SAFETY: as the caller says, and kernels that overlap wait for what comes before.
            let launched = unsafe { overlap::launch(self.function, blocks, threads, shared_bytes, params, stream.as_raw()) };
            return launched.map_err(self.source.refused());
        }
        // SAFETY: the parameters are the kernel's, the caller says, and the driver copies them before it returns.
        let status = unsafe {
            sys::cuLaunchKernel(
                self.function,
                blocks,
                1,
                1,
                threads,
                1,
                1,
                shared_bytes,
                stream.as_raw(),
                params.as_mut_ptr(),
                ptr::null_mut(),
            )
        };
        status.doing("launching a kernel").map_err(self.source.refused())
    }
}

/// Architecture and name of a kernel.
type KernelKey = (&'static str, &'static str);

/// The kernels that were loaded so far.
pub(crate) struct Kernels {
    loaded: Mutex<HashMap<KernelKey, (Kernel, Module)>>,
    /// Shared memory that a block can have.
    shared_bytes: u32,
}

impl Kernels {
    /// None yet, for a device whose blocks can have `shared_bytes` bytes of shared memory.
    pub fn new(shared_bytes: u32) -> Self {
        Self { loaded: Mutex::default(), shared_bytes }
    }

    /// A kernel, loaded into the current context if this is the first time. That takes a moment, as the driver compiles it.
    pub fn get(&self, source: KernelSource) -> Result<Kernel, EngineError> {
        let mut loaded = self.loaded.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((kernel, _)) = loaded.get(&(source.architecture, source.name)) {
            return Ok(*kernel);
        }
        let (kernel, module) = self.load(source).map_err(source.refused())?;
        loaded.insert((source.architecture, source.name), (kernel, module));
        Ok(kernel)
    }

    fn load(&self, source: KernelSource) -> Result<(Kernel, Module), EngineError> {
        let KernelSource { name, ptx, shared_bytes, .. } = source;
        if shared_bytes > self.shared_bytes {
            return Err(EngineError::SharedMemory { needed: shared_bytes, available: self.shared_bytes });
        }
        let module = Module::from_ptx(ptx, &[]).doing("compiling a kernel for the device")?;
        let function = module.get_function(name).doing("finding a kernel in its module")?.to_raw();
        let attribute = CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        // SAFETY: the function is of the module.
        unsafe { sys::cuFuncSetAttribute(function, attribute, shared_bytes as i32) }
            .doing("giving a kernel its shared memory")?;
        Ok((Kernel { function, source }, module))
    }
}

#[cfg(test)]
mod tests {
    use packinfer_abi::{AttentionParams, KvAppendParams, KvMoveParams, KvWidenParams, MergeParams};

    use super::*;
    use crate::device::oldest_driver;

    /// Every kernel of this program.
    fn sources() -> Vec<KernelSource> {
        let mut sources: Vec<_> = KernelFamily::ALL.into_iter().map(KernelSource::mma_rate).collect();
        sources.push(KernelSource::kv_move());
        for dtype in [DType::Bf16, DType::F16] {
            sources.push(KernelSource::kv_widen(dtype));
            for head_dim in AttentionShape::HEAD_DIMS {
                let shape = AttentionShape::new(8, 8, head_dim, dtype).expect("a good shape");
                for shape in [KvDType::Same, KvDType::E4m3].map(|kv_dtype| shape.with_kv_dtype(kv_dtype)) {
                    sources.push(KernelSource::kv_append(shape));
                    let with_and_without =
                        |family| [false, true].map(|soft_cap| KernelSource::attention(family, shape, soft_cap));
                    sources.extend(KernelFamily::ALL.into_iter().flat_map(with_and_without));
                    sources
                        .extend([false, true].into_iter().filter_map(|soft_cap| KernelSource::attention_tall(shape, soft_cap)));
                    sources.extend(KernelSource::attention_beside(shape));
                }
                sources.extend([false, true].map(|overlaps| KernelSource::merge(shape, overlaps)));
            }
        }
        sources
    }

    #[test]
    fn the_ptx_has_the_kernel_and_nothing_else() {
        for source in sources() {
            let entries: Vec<_> = source.ptx.lines().filter(|line| line.contains(".entry ")).collect();
            assert!(matches!(entries[..], [entry] if entry.contains(&format!(" {}(", source.name))), "{entries:?}");
            let threads = format!(".maxntid {}, 1, 1", source.threads);
            assert!(source.ptx.contains(&threads), "{} is launched with {threads}", source.name);
        }
    }

    #[test]
    fn parameters_are_as_large_as_the_kernels_expect() {
        for source in sources() {
            let bytes = match source.name {
                name if name.starts_with("attention_") => size_of::<AttentionParams>(),
                name if name.starts_with("merge_") => size_of::<MergeParams>(),
                name if name.starts_with("kv_append_") => size_of::<KvAppendParams>(),
                name if name.starts_with("kv_widen_") => size_of::<KvWidenParams>(),
                "kv_move" => size_of::<KvMoveParams>(),
                _ => continue,
            };
            let parameter = format!("{}_param_0[{bytes}]", source.name);
            assert!(source.ptx.contains(&parameter), "the PTX was built for another {parameter}");
        }
    }

    #[test]
    fn kernels_that_overlap_wait_by_themselves() {
        for source in sources() {
            let waits = source.ptx.matches("griddepcontrol.wait;").count();
            assert_eq!(waits, usize::from(source.overlaps), "{} for {}", source.name, source.architecture);
        }
    }

    #[test]
    fn the_oldest_driver_knows_the_ptx() {
        for source in sources() {
            let version = source.ptx.lines().find_map(|line| line.strip_prefix(".version ")).expect("PTX says its version");
            let (major, minor) = version.split_once('.').expect("a version has two numbers");
            let number = |text: &str| text.trim().parse::<u32>().expect("a version has numbers");
            // PTX ISA 7 came with CUDA 11, and 8 with 12, minor version for minor version.
            let cuda = 1000 * (number(major) + 4) + 10 * number(minor);
            let family = if source.architecture == "sm_80" { KernelFamily::Sm80 } else { KernelFamily::Sm90a };
            assert!(cuda <= oldest_driver(family), "{} is of PTX ISA {version}", source.name);
        }
    }
}
