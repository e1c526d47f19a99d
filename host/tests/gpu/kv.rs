//! KV pools on the device: copies of slots and appended tokens, bit for bit as on the CPU; RoPE against float64.

use float8::F8E4M3;
use half::{bf16, f16};
use packinfer::{
    AppendSlots, AttentionShape, DType, DeviceBuffer, DeviceSlice, Engine, EngineError, KvAppend, KvArena, KvDType,
    KvMemoryError, Rope, RopeLayout, SlotCopy, Stream,
};
use packinfer_cpu::{kv, random_elements};

use crate::case::{Element, KvElement, engine};

const LAYERS: u32 = 3;

/// A shape with `num_kv_heads` KV heads, and K and V of type `K`.
fn shape<E: Element, K: KvElement<E>>(num_kv_heads: u32, head_dim: u32) -> AttentionShape {
    let shape = AttentionShape::new(num_kv_heads, num_kv_heads, head_dim, <E as packinfer::Element>::DTYPE);
    shape.expect("a good shape").with_kv_dtype(<K as packinfer::KvElement<E>>::KV_DTYPE)
}

/// An arena on the device and its elements on the host: random at first.
struct Arena<E, K> {
    device: KvArena<E, K>,
    host: Vec<K>,
    /// Elements of K or V of a layer.
    pool_len: usize,
}

impl<E: Element, K: KvElement<E>> Arena<E, K> {
    fn new(engine: &Engine, shape: AttentionShape, num_slots: u32) -> Self {
        let mut device = KvArena::new(engine, shape, LAYERS, num_slots).expect("there is room");
        let host = random_elements(device.elements().len(), 7);
        device.elements_mut().upload(&host).expect("as many elements");
        let pool_len = host.len() / (2 * LAYERS as usize);
        Self { device, host, pool_len }
    }

    /// Copies slots on the host.
    fn copy_slots(&mut self, copies: &[SlotCopy]) {
        let slot_len = self.device.shape().kv_elements_per_slot() as usize;
        for pool in self.host.chunks_exact_mut(self.pool_len) {
            kv::copy_slots(pool, slot_len, copies).expect("good copies");
        }
    }

    /// K and V of a layer on the host.
    fn layer(&mut self, layer: u32) -> (&mut [K], &mut [K]) {
        let begin = 2 * layer as usize * self.pool_len;
        self.host[begin..][..2 * self.pool_len].split_at_mut(self.pool_len)
    }

    fn check(&self, what: &str) {
        let device = self.device.elements().download().expect("the work is done");
        let bytes = |elements| bytemuck::cast_slice::<K, u8>(elements).to_vec();
        let (device, host) = (bytes(&device), bytes(&self.host));
        let wrong = device.iter().zip(&host).position(|(device, host)| device != host);
        assert_eq!(wrong, None, "the first byte that differs, {what}");
    }
}

fn copy(from: u32, to: u32, num_slots: u32) -> SlotCopy {
    SlotCopy { from, to, num_slots }
}

/// Lists for a pool of 1000 slots.
fn lists() -> Vec<Vec<SlotCopy>> {
    vec![
        vec![],
        vec![copy(3, 999, 1)],
        vec![copy(0, 500, 500)],
        vec![copy(501, 1, 499), copy(0, 500, 1)],
        // Pages that become an extent, as a move makes them.
        (0..20).map(|page| copy(16 * (page * 7 % 20), 400 + 16 * page, 16)).collect(),
        // Single slots, backwards.
        (0..300).map(|slot| copy(slot, 999 - slot, 1)).collect(),
        // One page to several places, parts of pages, and nothing.
        vec![copy(0, 100, 16), copy(0, 200, 16), copy(3, 300, 5), copy(5, 5, 0), copy(40, 310, 37)],
    ]
}

fn check_moves<E: Element, K: KvElement<E>>(engine: &Engine, num_kv_heads: u32, head_dim: u32) {
    let stream = engine.stream().expect("a stream");
    let mut arena = Arena::<E, K>::new(engine, shape::<E, K>(num_kv_heads, head_dim), 1000);
    let mut list = engine.upload_copies(&arena.device, &[], &stream).expect("a good list");
    for copies in lists() {
        list.update(&copies, &stream).expect("a good list");
        engine.kv_move(&mut arena.device, &list, &stream).expect("the list fits");
        arena.copy_slots(&copies);
        arena.check(&format!("{copies:?} with {num_kv_heads} heads of {head_dim}"));
    }
}

#[test]
fn moves_are_exact() {
    let Some(engine) = engine() else { return };
    for (num_kv_heads, head_dim) in [(1, 64), (8, 128), (3, 96), (12, 256)] {
        check_moves::<bf16, bf16>(engine, num_kv_heads, head_dim);
        check_moves::<f16, F8E4M3>(engine, num_kv_heads, head_dim);
    }
}

/// Nothing waits for the device in between but the engine itself, be the list updated on the stream that copies or on another.
#[test]
fn a_list_makes_room_for_the_next_on_any_stream() {
    let Some(engine) = engine() else { return };
    let streams = [(); 2].map(|()| engine.stream().expect("a stream"));
    let mut arena = Arena::<bf16, bf16>::new(engine, shape::<bf16, bf16>(8, 128), 1000);
    let mut list = engine.upload_copies(&arena.device, &[], &streams[0]).expect("a good list");
    for (index, copies) in lists().iter().cycle().take(30).enumerate() {
        list.update(copies, &streams[index % 2]).expect("a good list");
        // The copies themselves are in order on one stream.
        engine.kv_move(&mut arena.device, &list, &streams[0]).expect("the list fits");
        arena.copy_slots(copies);
    }
    arena.check("after 30 lists");
}

#[test]
fn lists_for_other_arenas_are_errors() {
    let Some(engine) = engine() else { return };
    let stream = engine.stream().expect("a stream");
    let mut arena = KvArena::<bf16>::new(engine, shape::<bf16, bf16>(8, 128), 1, 100).expect("there is room");
    let mut list = engine.upload_copies(&arena, &[copy(0, 50, 50)], &stream).expect("a good list");
    for (num_kv_heads, num_slots) in [(4, 100), (8, 99)] {
        let shape = shape::<bf16, bf16>(num_kv_heads, 128);
        let mut other = KvArena::<bf16>::new(engine, shape, 1, num_slots).expect("there is room");
        let error = engine.kv_move(&mut other, &list, &stream).expect_err("another arena");
        assert!(matches!(error, EngineError::KvMemory(KvMemoryError::OtherArena { .. })), "{error}");
    }
    let error = list.update(&[copy(0, 51, 50)], &stream).expect_err("past the last slot");
    assert!(matches!(error, EngineError::KvMemory(KvMemoryError::CopyOutOfRange { .. })), "{error}");
    engine.kv_move(&mut arena, &list, &stream).expect("the list is as it was");
    assert!(matches!(arena.layer(1), Err(EngineError::KvMemory(KvMemoryError::NoSuchLayer { layer: 1, num_layers: 1 }))));
}

/// New tokens on both sides.
struct NewTokens<E> {
    k: Vec<E>,
    v: Vec<E>,
    slots: Vec<u32>,
    positions: Vec<u32>,
    k_device: DeviceBuffer<E>,
    v_device: DeviceBuffer<E>,
    device_slots: AppendSlots,
}

impl<E: Element> NewTokens<E> {
    /// Tokens that go to every third slot of `num_slots`, backwards, at positions of all sizes.
    fn new(engine: &Engine, shape: AttentionShape, num_tokens: u32, num_slots: u32, stream: &Stream) -> Self {
        let len = num_tokens as usize * shape.kv_elements_per_slot() as usize;
        let (k, v) = (random_elements(len, 1), random_elements(len, 2));
        let slots: Vec<_> = (0..num_tokens).map(|token| num_slots - 1 - 3 * token).collect();
        let positions: Vec<_> =
            (0..num_tokens).map(|token| [token, 4_000 + token, 131_071 * token % 1_000_001][token as usize % 3]).collect();
        let device_slots = engine.upload_append_slots(&slots, &positions, num_slots, stream).expect("good slots");
        let [k_device, v_device] = [&k, &v].map(|elements| engine.copy_of(elements).expect("there is room"));
        Self { k, v, slots, positions, k_device, v_device, device_slots }
    }

    fn on_device(&self) -> KvAppend<'_, E> {
        KvAppend::new(self.k_device.as_slice(), self.v_device.as_slice(), &self.device_slots)
    }

    fn on_host(&self) -> kv::Append<'_, E> {
        let Self { k, v, slots, positions, .. } = self;
        kv::Append { k, v, slots, positions, rope: None, k_scales: None, v_scales: None }
    }
}

/// Appends on both sides, with other scales for each head, or without.
fn check_appends<E: Element, K: KvElement<E>>(engine: &Engine, num_kv_heads: u32, head_dim: u32, with_scales: bool) {
    let stream = engine.stream().expect("a stream");
    let shape = shape::<E, K>(num_kv_heads, head_dim);
    let mut arena = Arena::<E, K>::new(engine, shape, 300);
    let scales: [Vec<f32>; 2] = [1.0, 0.01].map(|scale: f32| (0..num_kv_heads).map(|head| scale / (head + 3) as f32).collect());
    let device_scales = scales.each_ref().map(|scales| engine.copy_of(scales).expect("there is room"));
    for (layer, num_tokens) in [(0, 1), (2, 100), (1, 37)] {
        let new = NewTokens::<E>::new(engine, shape, num_tokens, 300, &stream);
        let [k_scales, v_scales] = device_scales.each_ref().map(|scales| with_scales.then(|| scales.as_slice()));
        let append = KvAppend { k_scales, v_scales, ..new.on_device() };
        engine.kv_append(&mut arena.device, layer, append, &stream).expect("it fits");
        let [k_scales, v_scales] = scales.each_ref().map(|scales| with_scales.then_some(&scales[..]));
        let (k, v) = arena.layer(layer);
        kv::append(shape, kv::Append { k_scales, v_scales, ..new.on_host() }, k, v).expect("it fits");
        arena.check(&format!("{num_tokens} tokens of {shape:?} in layer {layer}, scales: {with_scales}"));
    }
}

#[test]
fn appends_are_exact() {
    let Some(engine) = engine() else { return };
    for head_dim in AttentionShape::HEAD_DIMS {
        for num_kv_heads in [1, 8, 5] {
            check_appends::<bf16, bf16>(engine, num_kv_heads, head_dim, false);
            check_appends::<f16, f16>(engine, num_kv_heads, head_dim, false);
            for with_scales in [false, true] {
                check_appends::<bf16, F8E4M3>(engine, num_kv_heads, head_dim, with_scales);
                check_appends::<f16, F8E4M3>(engine, num_kv_heads, head_dim, with_scales);
            }
        }
    }
}

/// Forms of RoPE for a head dimension: all of it and parts, of which some have halves that do not begin at 16 bytes.
fn ropes(head_dim: u32) -> impl Iterator<Item = Rope> {
    [head_dim, head_dim / 2, 48, 24, 6, 2].into_iter().flat_map(move |rotary_dim| {
        [RopeLayout::HalfSplit, RopeLayout::Interleaved].into_iter().flat_map(move |layout| {
            let rope = Rope { layout, rotary_dim, ..Rope::new(head_dim) };
            [rope, Rope { base: 500_000.0, position_scale: 0.125, ..rope }]
        })
    })
}

/// Appends K, and returns what the device has of it with what float64 has, and how far off float32 may be.
fn turned<E: Element, K: KvElement<E>>(engine: &Engine, rope: Rope, head_dim: u32) -> Vec<(K, f64, f64)> {
    let stream = engine.stream().expect("a stream");
    let shape = shape::<E, K>(3, head_dim);
    let mut arena = KvArena::<E, K>::new(engine, shape, 1, 300).expect("there is room");
    let new = NewTokens::<E>::new(engine, shape, 100, 300, &stream);
    let device_rope = engine.rope(rope).expect("a good rope");
    let append = KvAppend { rope: Some(&device_rope), ..new.on_device() };
    engine.kv_append(&mut arena, 0, append, &stream).expect("it fits");

    let given: Vec<f64> = new.k.iter().map(|&element| element.into()).collect();
    let mut exact = given.clone();
    kv::turn(&mut exact, shape, &rope, &new.positions).expect("a good rope");
    let elements = arena.elements().download().expect("the work is done");
    let (slot_len, rotary_dim) = (shape.kv_elements_per_slot() as usize, rope.rotary_dim as usize);
    let of_device = new.slots.iter().flat_map(|&slot| &elements[slot as usize * slot_len..][..slot_len]);
    of_device
        .zip(exact)
        .enumerate()
        .map(|(index, (&of_device, exact))| {
            let in_head = index % head_dim as usize;
            let partner = match rope.layout {
                _ if in_head >= rotary_dim => return (of_device, exact, 0.0),
                RopeLayout::Interleaved => index ^ 1,
                RopeLayout::HalfSplit if in_head < rotary_dim / 2 => index + rotary_dim / 2,
                RopeLayout::HalfSplit => index - rotary_dim / 2,
            };
            (of_device, exact, given[index].hypot(given[partner]) * 2f64.powi(-22))
        })
        .collect()
}

/// Rounded to within one unit in the last place, but for what float32 leaves of differences of nearly equal numbers.
fn check_rope<E: Element>(engine: &Engine, fraction_bits: i32, least_exponent: i32) {
    for head_dim in AttentionShape::HEAD_DIMS {
        for rope in ropes(head_dim) {
            for (of_device, exact, float32) in turned::<E, E>(engine, rope, head_dim) {
                let of_device: f64 = of_device.into();
                let exponent = exact.abs().max(2f64.powi(least_exponent)).log2().floor() as i32;
                let ulp = 2f64.powi(exponent - fraction_bits);
                assert!((of_device - exact).abs() <= ulp + float32, "{of_device} for {exact}, {rope:?} of {head_dim}");
            }
        }
    }
}

#[test]
fn rope_is_that_of_float64() {
    let Some(engine) = engine() else { return };
    check_rope::<bf16>(engine, 7, -126);
    check_rope::<f16>(engine, 10, -14);
}

#[test]
fn rope_in_fp8_is_that_of_float64() {
    let Some(engine) = engine() else { return };
    for head_dim in AttentionShape::HEAD_DIMS {
        for rope in ropes(head_dim) {
            for (of_device, exact, float32) in turned::<bf16, F8E4M3>(engine, rope, head_dim) {
                let exponent = exact.abs().max(2f64.powi(-6)).log2().floor() as i32;
                // Half a unit in the last place.
                let rounding = 2f64.powi(exponent - 3 - 1);
                let of_device = F8E4M3::to_f64(&of_device);
                assert!((of_device - exact).abs() <= rounding + float32, "{of_device} for {exact}, {rope:?} of {head_dim}");
            }
        }
    }
}

#[test]
fn a_captured_append_takes_the_next_steps_slots() {
    let Some(engine) = engine() else { return };
    let stream = engine.stream().expect("a stream");
    let shape = shape::<bf16, bf16>(8, 128);
    let mut arena = Arena::<bf16, bf16>::new(engine, shape, 300);
    let mut new = NewTokens::<bf16>::new(engine, shape, 20, 300, &stream);
    let graph = engine
        .capture(&stream, |stream| engine.kv_append(&mut arena.device, 1, new.on_device(), stream))
        .expect("an append can be captured");
    for step in 0..5 {
        new.slots = (0..20).map(|token| 10 * token + step).collect();
        new.device_slots.update(&new.slots, &new.positions, &stream).expect("good slots");
        // SAFETY: all that was captured is alive, and as many tokens are appended.
        unsafe { graph.launch(&stream) }.expect("it was captured");
        let (k, v) = arena.layer(1);
        kv::append(shape, new.on_host(), k, v).expect("it fits");
    }
    arena.check("after five launches of a graph");
}

#[test]
fn appends_that_do_not_fit_are_errors() {
    let Some(engine) = engine() else { return };
    let stream = engine.stream().expect("a stream");
    let plain = shape::<bf16, bf16>(8, 64);
    let mut arena = KvArena::<bf16>::new(engine, plain, 2, 300).expect("there is room");
    let new = NewTokens::<bf16>::new(engine, plain, 10, 300, &stream);
    let mut error_of = |layer, append| match engine.kv_append(&mut arena, layer, append, &stream) {
        Err(EngineError::KvMemory(error)) => error,
        other => panic!("{other:?}"),
    };
    assert!(matches!(error_of(2, new.on_device()), KvMemoryError::NoSuchLayer { layer: 2, num_layers: 2 }));
    let fewer = NewTokens::<bf16>::new(engine, plain, 9, 300, &stream);
    let is_length = |error, name: &str| matches!(error, KvMemoryError::Length { tensor, .. } if tensor == name);
    assert!(is_length(error_of(0, KvAppend { k: fewer.k_device.as_slice(), ..new.on_device() }), "new K"));
    assert!(is_length(error_of(0, KvAppend { v: fewer.v_device.as_slice(), ..new.on_device() }), "new V"));
    let larger = NewTokens::<bf16>::new(engine, plain, 10, 301, &stream);
    assert!(matches!(error_of(0, larger.on_device()), KvMemoryError::OtherPool { found: 301, num_slots: 300 }));
    let rope = engine.rope(Rope::new(128)).expect("heads of 128 can be turned");
    assert!(matches!(error_of(0, KvAppend { rope: Some(&rope), ..new.on_device() }), KvMemoryError::Rope(_)));
    let error = engine.rope(Rope { rotary_dim: 7, ..Rope::new(64) }).expect_err("an odd number");
    assert!(matches!(error, EngineError::KvMemory(KvMemoryError::Rope(_))), "{error}");

    let scales = engine.copy_of(&[1f32; 8]).expect("there is room");
    let append = KvAppend { v_scales: Some(scales.as_slice()), ..new.on_device() };
    let error = engine.kv_append(&mut arena, 0, append, &stream).expect_err("no scales in bf16");
    assert!(matches!(error, EngineError::NoScales { option: "v_scales" }), "{error}");
    // SAFETY: nothing reads it, as the address is rejected.
    let k = unsafe { DeviceSlice::from_raw(new.k_device.address() + 2, new.k_device.len()) };
    let error = engine.kv_append(&mut arena, 0, KvAppend { k, ..new.on_device() }, &stream).expect_err("a bad address");
    assert!(matches!(error, EngineError::Misaligned { tensor: "new K", .. }), "{error}");

    let shape = AttentionShape::new(8, 8, 64, DType::F16).expect("a good shape");
    let error = KvArena::<f16, F8E4M3>::new(engine, shape, 1, 1).expect_err("another type");
    assert!(matches!(error, EngineError::KvMemory(KvMemoryError::ElementTypes { .. })), "{error}");
    let shape = shape.with_kv_dtype(KvDType::E4m3);
    assert!(KvArena::<f16, F8E4M3>::new(engine, shape, 1, 1).is_ok());
}
