//! Times of work on the device, and what the device can do at best.

use std::ffi::c_void;
use std::ptr;
use std::time::{Duration, Instant};

use cust::sys;
use packinfer_abi::{MMA_RATE_FLOPS_PER_ITERATION, MMA_RATE_THREADS, WGMMA_RATE_FLOPS_PER_ITERATION, WGMMA_RATE_THREADS};

use crate::error::Doing;
use crate::kernels::KernelSource;
use crate::stream::{Event, Stream};
use crate::{DeviceBuffer, Engine, EngineError, KernelFamily};

/// What is written before a run so that it finds nothing of its data in the L2 cache: several times what the largest holds.
const COLD_BYTES: usize = 256 << 20;

/// Bytes that are copied to measure the memory.
const COPY_BYTES: usize = 1 << 30;

/// Rounds of products in a run that measures the tensor cores: some milliseconds.
const MMA_ITERATIONS: u32 = 1 << 15;

/// Blocks for each multiprocessor in such a run: enough warps to keep its tensor cores busy.
const MMA_BLOCKS_PER_MULTIPROCESSOR: u32 = 4;
/// As above, of the kernel whose blocks are two warpgroups.
const WGMMA_BLOCKS_PER_MULTIPROCESSOR: u32 = 1;

/// Runs of a measurement of the device. The first are to wake it up: the median is not of them.
const REPEATS: usize = 15;

/// How long runs are repeated before they are timed: a device that has rested needs a while until its clocks are up. Triton's
/// `do_bench` is usually given as long.
const WARM_UP: Duration = Duration::from_millis(30);

/// Times `repeats` runs, each from a cold L2 cache, after others for 30 ms. `run` gives its work to the stream that it is handed.
///
/// # Errors
///
/// What `run` returns, or what the driver reports.
pub fn time_cold(
    engine: &Engine,
    stream: &Stream,
    repeats: usize,
    mut run: impl FnMut(&Stream) -> Result<(), EngineError>,
) -> Result<Vec<Duration>, EngineError> {
    let cold: DeviceBuffer<u8> = engine.zeros(COLD_BYTES)?;
    let begin = Instant::now();
    while begin.elapsed() < WARM_UP {
        time(engine, stream, 1, |stream| write(&cold, stream), &mut run)?;
    }
    time(engine, stream, repeats, |stream| write(&cold, stream), run)
}

/// As [`time_cold`], but gives each run's time to `each` when the run is done, before the next one.
///
/// # Errors
///
/// What `run` or `each` returns, or what the driver reports.
pub fn time_cold_each(
    engine: &Engine,
    stream: &Stream,
    repeats: usize,
    run: impl FnMut(&Stream) -> Result<(), EngineError>,
    each: impl FnMut(Duration) -> Result<(), EngineError>,
) -> Result<(), EngineError> {
    let cold: DeviceBuffer<u8> = engine.zeros(COLD_BYTES)?;
    time_each(engine, stream, repeats, |stream| write(&cold, stream), run, each)
}

/// As [`time_cold`], of the launches of a graph of the run.
///
/// # Errors
///
/// As [`time_cold`].
pub fn time_cold_replays(
    engine: &Engine,
    stream: &Stream,
    repeats: usize,
    mut run: impl FnMut(&Stream) -> Result<(), EngineError>,
) -> Result<Vec<Duration>, EngineError> {
    run(stream)?;
    let graph = engine.capture(stream, &mut run)?;
    // SAFETY: `run` still has all that it gave to the stream.
    time_cold(engine, stream, repeats, |stream| unsafe { graph.launch(stream) })
}

/// Times `repeats` runs, one after the other: each finds in the L2 cache what the one before left there.
///
/// # Errors
///
/// As [`time_cold`].
pub fn time_warm(
    engine: &Engine,
    stream: &Stream,
    repeats: usize,
    run: impl FnMut(&Stream) -> Result<(), EngineError>,
) -> Result<Vec<Duration>, EngineError> {
    time(engine, stream, repeats, |_| Ok(()), run)
}

/// Marks in the work of streams, and the times between them.
#[derive(Debug, Default)]
pub struct Marks {
    events: Vec<Event>,
}

/// One of the [`Marks`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mark(usize);

impl Marks {
    /// Marks what was given to a stream until now.
    ///
    /// # Errors
    ///
    /// What the driver reports.
    pub fn set(&mut self, engine: &Engine, stream: &Stream) -> Result<Mark, EngineError> {
        let event = Event::timed(engine.shared())?;
        event.record(stream)?;
        self.events.push(event);
        Ok(Mark(self.events.len() - 1))
    }

    /// Waits until the device has come to both marks, and returns how long it took from one to the other; zero if that was the
    /// earlier one, or if they are not of these marks.
    ///
    /// # Errors
    ///
    /// That of the work.
    pub fn between(&self, from: Mark, to: Mark) -> Result<Duration, EngineError> {
        let (Some(from), Some(to)) = (self.events.get(from.0), self.events.get(to.0)) else { return Ok(Duration::ZERO) };
        from.synchronize()?;
        to.synchronize()?;
        Ok(Duration::from_secs_f32(to.milliseconds_since(from)?.max(0.0) * 1e-3))
    }
}

/// Bytes a second, read and written together, at which the device copies its memory.
///
/// # Errors
///
/// Not enough device memory, or what the driver reports.
pub fn copy_bandwidth(engine: &Engine) -> Result<f64, EngineError> {
    let from: DeviceBuffer<u8> = engine.zeros(COPY_BYTES)?;
    let to: DeviceBuffer<u8> = engine.zeros(COPY_BYTES)?;
    let times = time(
        engine,
        &engine.stream()?,
        REPEATS,
        |_| Ok(()),
        |stream| {
            // SAFETY: both have so many bytes, and dropping them waits for the device.
            unsafe { sys::cuMemcpyDtoDAsync_v2(to.address(), from.address(), COPY_BYTES, stream.as_raw()) }
                .doing("copying device memory")
        },
    )?;
    Ok((2 * COPY_BYTES) as f64 / median(times).as_secs_f64())
}

/// Floating-point operations a second of the tensor cores in bf16, through the fastest instruction that the engine's attention
/// kernels use.
///
/// # Errors
///
/// A kernel that the driver cannot load, or what it reports.
pub fn mma_rate(engine: &Engine) -> Result<f64, EngineError> {
    let family = if engine.kernel_families().contains(&KernelFamily::Sm90a) { KernelFamily::Sm90a } else { KernelFamily::Sm80 };
    let (threads, blocks_per_multiprocessor, flops_per_iteration) = match family {
        KernelFamily::Sm90a => (WGMMA_RATE_THREADS, WGMMA_BLOCKS_PER_MULTIPROCESSOR, WGMMA_RATE_FLOPS_PER_ITERATION),
        _ => (MMA_RATE_THREADS, MMA_BLOCKS_PER_MULTIPROCESSOR, MMA_RATE_FLOPS_PER_ITERATION),
    };
    engine.shared().enter()?;
    let kernel = engine.shared().kernels.get(KernelSource::mma_rate(family))?;
    let blocks = engine.device().multiprocessors * blocks_per_multiprocessor;
    let sums: DeviceBuffer<f32> = engine.zeros(blocks as usize * threads as usize)?;
    let (mut address, mut iterations) = (sums.address(), MMA_ITERATIONS);
    let mut params: [*mut c_void; 2] = [ptr::from_mut(&mut address).cast(), ptr::from_mut(&mut iterations).cast()];
    let times = time(
        engine,
        &engine.stream()?,
        REPEATS,
        |_| Ok(()),
        |stream| {
            // SAFETY: these are the kernel's parameters; the buffer has an element for each thread, and dropping it waits for the
            // device.
            unsafe { kernel.launch(blocks, &mut params, stream) }
        },
    )?;
    let flops = flops_per_iteration * u64::from(MMA_ITERATIONS) * u64::from(blocks);
    Ok(flops as f64 / median(times).as_secs_f64())
}

/// The median of some times; of an even number, the larger of the two in the middle. Zero if there are none.
pub fn median(mut times: Vec<Duration>) -> Duration {
    times.sort_unstable();
    times.get(times.len() / 2).copied().unwrap_or_default()
}

/// Times `repeats` runs between events of the stream, with `prepare` before each.
fn time(
    engine: &Engine,
    stream: &Stream,
    repeats: usize,
    prepare: impl FnMut(&Stream) -> Result<(), EngineError>,
    run: impl FnMut(&Stream) -> Result<(), EngineError>,
) -> Result<Vec<Duration>, EngineError> {
    let mut times = Vec::with_capacity(repeats);
    time_each(engine, stream, repeats, prepare, run, |time| {
        times.push(time);
        Ok(())
    })?;
    Ok(times)
}

/// As [`time`], but gives each time to `each` before the next run.
fn time_each(
    engine: &Engine,
    stream: &Stream,
    repeats: usize,
    mut prepare: impl FnMut(&Stream) -> Result<(), EngineError>,
    mut run: impl FnMut(&Stream) -> Result<(), EngineError>,
    mut each: impl FnMut(Duration) -> Result<(), EngineError>,
) -> Result<(), EngineError> {
    let (start, end) = (Event::timed(engine.shared())?, Event::timed(engine.shared())?);
    for _ in 0..repeats {
        prepare(stream)?;
        start.record(stream)?;
        run(stream)?;
        end.record(stream)?;
        end.synchronize()?;
        each(Duration::from_secs_f32(end.milliseconds_since(&start)?.max(0.0) * 1e-3))?;
    }
    Ok(())
}

fn write(buffer: &DeviceBuffer<u8>, stream: &Stream) -> Result<(), EngineError> {
    // SAFETY: the buffer has so many bytes, and dropping it waits for the device.
    unsafe { sys::cuMemsetD8Async(buffer.address(), 1, buffer.len(), stream.as_raw()) }.doing("writing device memory")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn median_is_in_the_middle() {
        let median = |times: &[u64]| median(times.iter().map(|&us| Duration::from_micros(us)).collect());
        assert_eq!(median(&[5, 1, 3]), Duration::from_micros(3));
        assert_eq!(median(&[4, 1, 3, 2]), Duration::from_micros(3));
        assert_eq!(median(&[]), Duration::ZERO);
    }
}
