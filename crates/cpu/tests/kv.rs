//! Copies of slots and new tokens on the CPU; and the arithmetic of the kernels that do the same, which is tested here because it
//! is the same code.

use float8::F8E4M3;
use half::{bf16, f16};
use packinfer_batch::{AttentionShape, DType, KvDType, Rope, RopeLayout};
use packinfer_cpu::kv::{Append, append, copy_slots, turn};
use packinfer_cpu::{CpuError, random_elements};
use packinfer_kv::SlotCopy;

fn shape(dtype: DType) -> AttentionShape {
    AttentionShape::new(4, 2, 64, dtype).expect("a good shape")
}

/// Elements of a slot of that shape.
const SLOT: usize = 2 * 64;

#[test]
fn slots_are_copied() {
    let mut pool: Vec<bf16> = random_elements(10 * SLOT, 1);
    let before = pool.clone();
    let copy = |from, to, num_slots| SlotCopy { from, to, num_slots };
    copy_slots(&mut pool, SLOT, &[copy(1, 7, 3), copy(0, 5, 1)]).expect("there are such slots");
    let sources = [0, 1, 2, 3, 4, 0, 6, 1, 2, 3];
    for (slot, source) in sources.into_iter().enumerate() {
        assert_eq!(pool[slot * SLOT..][..SLOT], before[source * SLOT..][..SLOT], "slot {slot}");
    }
    let error = copy_slots(&mut pool, SLOT, &[copy(8, 0, 3)]);
    assert_eq!(error, Err(CpuError::NoSuchSlot { slot: 10, num_slots: 10 }));
}

#[test]
fn tokens_go_to_their_slots() {
    let (k, v): (Vec<bf16>, Vec<bf16>) = (random_elements(2 * SLOT, 1), random_elements(2 * SLOT, 2));
    let new = Append { k: &k, v: &v, slots: &[4, 1], positions: &[0, 9], rope: None, k_scales: None, v_scales: None };
    let (mut k_pool, mut v_pool) = (vec![bf16::ONE; 5 * SLOT], vec![bf16::ONE; 5 * SLOT]);
    append(shape(DType::Bf16), new, &mut k_pool, &mut v_pool).expect("they fit");
    for (pool, new) in [(&k_pool, &k), (&v_pool, &v)] {
        assert_eq!(pool[4 * SLOT..], new[..SLOT]);
        assert_eq!(pool[SLOT..2 * SLOT], new[SLOT..]);
        assert!(pool[..SLOT].iter().chain(&pool[2 * SLOT..4 * SLOT]).all(|&element| element == bf16::ONE));
    }
    let fp8 = shape(DType::Bf16).with_kv_dtype(KvDType::E4m3);
    let (mut k_pool, mut v_pool) = (vec![F8E4M3::ZERO; 5 * SLOT], vec![F8E4M3::ZERO; 5 * SLOT]);
    let scales = [0.001, 2.0];
    append(fp8, Append { v_scales: Some(&scales), ..new }, &mut k_pool, &mut v_pool).expect("they fit");
    for (index, (&element, stored)) in v[..SLOT].iter().zip(&v_pool[4 * SLOT..]).enumerate() {
        assert_eq!(*stored, F8E4M3::from_f32(f32::from(element) / scales[index / 64]));
    }
    assert!(v_pool[4 * SLOT..].contains(&F8E4M3::from_f32(448.0)), "nothing was too large");
    assert_eq!(k_pool[4 * SLOT], F8E4M3::from_f32(k[0].into()));
}

#[test]
fn what_does_not_fit_is_an_error() {
    let k: Vec<f16> = random_elements(2 * SLOT, 1);
    let new = Append { k: &k, v: &k, slots: &[0, 1], positions: &[0, 0], rope: None, k_scales: None, v_scales: None };
    let error_of = |shape, new| {
        let [mut k_pool, mut v_pool] = [(); 2].map(|()| vec![f16::ONE; 2 * SLOT]);
        append(shape, new, &mut k_pool, &mut v_pool).expect_err("it does not fit")
    };
    let is_length = |error, name| matches!(error, CpuError::Length { buffer, .. } if buffer == name);
    let shape = shape(DType::F16);
    assert!(is_length(error_of(shape, Append { k: &k[1..], ..new }), "new K"));
    assert!(is_length(error_of(shape, Append { v: &k[1..], ..new }), "new V"));
    assert!(is_length(error_of(shape, Append { positions: &[0], ..new }), "positions"));
    assert!(is_length(error_of(shape, Append { k_scales: Some(&[1.0]), ..new }), "k_scales"));
    assert_eq!(error_of(shape, Append { slots: &[1, 2], ..new }), CpuError::NoSuchSlot { slot: 2, num_slots: 2 });
    assert!(matches!(error_of(shape, Append { rope: Some(Rope::new(128)), ..new }), CpuError::Rope(_)));
    assert!(matches!(error_of(self::shape(DType::Bf16), new), CpuError::DType { .. }));
    assert!(matches!(error_of(shape.with_kv_dtype(KvDType::E4m3), new), CpuError::KvDType { .. }));
}

/// Turning keeps the length of a pair, and positions that differ by as much have the same angle between them.
#[test]
fn rope_turns_by_the_position() {
    let shape = AttentionShape::new(1, 1, 64, DType::Bf16).expect("a good shape");
    for layout in [RopeLayout::HalfSplit, RopeLayout::Interleaved] {
        let rope = Rope { layout, rotary_dim: 48, ..Rope::new(64) };
        let head: Vec<f64> = (0..64).map(|element| f64::from(element) - 20.0).collect();
        let turned = |position| {
            let mut head = head.clone();
            turn(&mut head, shape, &rope, &[position]).expect("a good rope");
            head
        };
        let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
        assert_eq!(turned(0), head);
        let (near, far) = (dot(&turned(3), &turned(10)), dot(&turned(1003), &turned(1010)));
        assert!((near - far).abs() < 1e-6 && (near - dot(&head, &head)).abs() > 1.0, "{near} and {far}");
        assert_eq!(turned(77)[48..], head[48..]);
        // The first pair turns by a radian each position.
        let partner = if layout == RopeLayout::HalfSplit { 24 } else { 1 };
        let expected = head[0] * 5f64.cos() - head[partner] * 5f64.sin();
        assert!((turned(5)[0] - expected).abs() < 1e-12);
    }
}

/// What the kernels turn K by, in float32, is within 2^−22 of the pair's length of float64, at a million as at the beginning.
#[test]
fn angles_in_float32_are_as_good_as_float32() {
    for base in [10_000.0, 500_000.0, 1e6] {
        let rope = Rope { base, ..Rope::new(128) };
        let mut worst = 0f64;
        for position in (0..1000).chain((0..1_000_000).step_by(997)).chain(999_000..1_000_000) {
            for (radians, fixed) in rope.frequencies().zip(rope.fixed_point_frequencies()) {
                let (sin, cos) = packinfer_abi::sin_cos(packinfer_abi::turn(position, fixed));
                let (exact_sin, exact_cos) = (f64::from(position) * radians).sin_cos();
                let (a, b) = (0.6f32, 0.8f32);
                let (turned_a, turned_b) = (a * cos - b * sin, b * cos + a * sin);
                let (a, b) = (f64::from(a), f64::from(b));
                let error = (f64::from(turned_a) - (a * exact_cos - b * exact_sin)).abs();
                worst = worst.max(error).max((f64::from(turned_b) - (b * exact_cos + a * exact_sin)).abs());
            }
        }
        assert!(worst < 2f64.powi(-22), "2^{} with base {base}", worst.log2());
    }
}

/// The kernels' rounding to FP8 is that of the type, for all numbers that bf16 and f16 have, and many in between.
#[test]
fn rounding_to_fp8_is_that_of_the_type() {
    let check = |number: f32| {
        let (ours, theirs) = (packinfer_abi::e4m3(number), F8E4M3::from_f32(number));
        assert_eq!(ours, theirs.to_bits(), "{number:e}");
    };
    for bits in 0..=u16::MAX {
        check(bf16::from_bits(bits).to_f32());
        check(f16::from_bits(bits).to_f32());
    }
    (0..=u32::MAX).step_by(65_521).for_each(|bits| check(f32::from_bits(bits)));
    // Around what lies between two numbers.
    for number in (0..0x7F).map(F8E4M3::from_bits) {
        let (low, high) = (number.to_f32(), F8E4M3::from_bits((number.to_bits() + 1).min(0x7E)).to_f32());
        let middle = (low + high) / 2.0;
        for number in [middle.next_down(), middle, middle.next_up(), low.next_up(), high.next_down()] {
            check(number);
            check(-number);
        }
    }
}
