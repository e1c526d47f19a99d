//! Writes new tokens' K and V into their KV slots, K turned by RoPE on the way if that is asked for, both rounded to FP8 where
//! the pool is in FP8.
//!
//! A thread makes 16 bytes of a slot: of 8 elements of one head, or of 16 in FP8. RoPE needs each element's partner as well,
//! which in the half-split layout another thread has: it is loaded again, from a cache, rather than exchanged. Everything in
//! between is float32: K is rounded once.
//!
//! Angles are fixed-point numbers, exact to 2^−32 of a turn ([`turn`]): up to position 10^6, what is turned is off by at most 1.5
//! · 10^−7 of the pair's length, which is what rounding to float32 leaves.

use packinfer_abi::{KV_APPEND_THREADS, KvAppendParams, RopeLayout, VECTOR_BYTES, e4m3, sin_cos, turn};

use crate::element::{Bf16, ELEMENT_BYTES, Element, F16};
use crate::ptx::math;
use crate::ptx::memory::{load_global, load_global_u16, load_global_x2, load_global_x4, store_global_x4};
use crate::ptx::special::{block_index, thread_index};

/// Elements of 16 bits in a vector.
const ELEMENTS: u32 = VECTOR_BYTES / ELEMENT_BYTES;

/// Some elements of one head of a new token.
struct Part {
    /// Address of the head's first element.
    head: u64,
    /// The first element of the part.
    first: u32,
    /// Address in the pool of its first element, which has `bytes` bytes there.
    to: u64,
    /// RoPE turns some of them.
    turns: bool,
    /// What they are divided by in FP8.
    scale: f32,
    token: u32,
}

impl Part {
    /// The thread's part, of `elements` elements with `bytes` bytes each in the pool, if there is one for it.
    #[inline(always)]
    unsafe fn of_thread(params: &KvAppendParams, elements: u32, bytes: u32) -> Option<Self> {
        let slot_vectors = params.slot_vectors(elements);
        let blocks_per_token = params.blocks_per_token(elements);
        let token = math::divide(block_index(), blocks_per_token);
        let vector = (block_index() - token * blocks_per_token) * KV_APPEND_THREADS + thread_index();
        if vector >= 2 * slot_vectors {
            return None;
        }
        let is_k = vector < slot_vectors;
        let (new, pool, scales, vector) = match is_k {
            true => (params.k, params.k_pool, params.k_scales, vector),
            false => (params.v, params.v_pool, params.v_scales, vector - slot_vectors),
        };
        let element = vector * elements;
        let kv_head = math::divide(element, params.head_dim);
        let first = element - kv_head * params.head_dim;
        let slot_elements = u64::from(params.num_kv_heads * params.head_dim);
        let slot = load_global(params.slots + 4 * u64::from(token));
        Some(Self {
            head: new + (u64::from(token) * slot_elements + u64::from(element - first)) * u64::from(ELEMENT_BYTES),
            first,
            to: pool + (u64::from(slot) * slot_elements + u64::from(element)) * u64::from(bytes),
            turns: is_k && params.frequencies != 0 && first < params.rotary_dim,
            scale: if scales == 0 { 1.0 } else { f32::from_bits(load_global(scales + 4 * u64::from(kv_head))) },
            token,
        })
    }

    /// Address of an element of the head.
    #[inline(always)]
    fn element(&self, index: u32) -> u64 {
        self.head + u64::from(index * ELEMENT_BYTES)
    }

    /// Eight elements of the head as numbers, those of `words`, which begin with element `first`; turned if RoPE turns them.
    #[inline(always)]
    unsafe fn numbers<E: Element>(&self, params: &KvAppendParams, first: u32, words: [u32; 4]) -> [f32; ELEMENTS as usize] {
        let numbers = unpack::<E>(words);
        if !self.turns || first >= params.rotary_dim {
            return numbers;
        }
        let angles =
            Angles { frequencies: params.frequencies, position: load_global(params.positions + 4 * u64::from(self.token)) };
        match params.rope_layout {
            RopeLayout::HalfSplit => self.turn_halves::<E>(params.rotary_dim, &angles, first, numbers),
            RopeLayout::Interleaved => turn_neighbours(params.rotary_dim, &angles, first, numbers),
        }
    }

    /// Turns elements whose partners are half of those to be turned away.
    #[inline(always)]
    unsafe fn turn_halves<E: Element>(
        &self,
        rotary_dim: u32,
        angles: &Angles,
        first: u32,
        mut numbers: [f32; ELEMENTS as usize],
    ) -> [f32; ELEMENTS as usize] {
        let half = rotary_dim / 2;
        let partner = |index: u32| if index < half { index + half } else { index - half };
        let mut partners = [0f32; ELEMENTS as usize];
        if half.is_multiple_of(ELEMENTS) {
            partners = unpack::<E>(load_global_x4(self.element(partner(first))));
        } else {
            for (i, number) in partners.iter_mut().enumerate() {
                let index = first + i as u32;
                if index < rotary_dim {
                    [*number, _] = E::unpack(load_global_u16(self.element(partner(index))));
                }
            }
        }
        for (i, (number, partner)) in numbers.iter_mut().zip(&partners).enumerate() {
            let index = first + i as u32;
            if index < rotary_dim {
                let (sin, cos) = angles.of_pair(if index < half { index } else { index - half });
                *number = *number * cos + partner * if index < half { -sin } else { sin };
            }
        }
        numbers
    }
}

/// Turns elements whose partners are their neighbours.
#[inline(always)]
unsafe fn turn_neighbours(
    rotary_dim: u32,
    angles: &Angles,
    first: u32,
    mut numbers: [f32; ELEMENTS as usize],
) -> [f32; ELEMENTS as usize] {
    for pair in 0..ELEMENTS / 2 {
        if first + 2 * pair < rotary_dim {
            let (sin, cos) = angles.of_pair(first / 2 + pair);
            let (even, odd) = (2 * pair as usize, 2 * pair as usize + 1);
            let (a, b) = (numbers[even], numbers[odd]);
            (numbers[even], numbers[odd]) = (a * cos - b * sin, b * cos + a * sin);
        }
    }
    numbers
}

/// How far RoPE turns the pairs of elements of a token.
struct Angles {
    frequencies: u64,
    position: u32,
}

impl Angles {
    /// Sine and cosine of the angle of a pair.
    #[inline(always)]
    unsafe fn of_pair(&self, pair: u32) -> (f32, f32) {
        let [low, high] = load_global_x2(self.frequencies + 8 * u64::from(pair));
        sin_cos(turn(self.position, u64::from(high) << 32 | u64::from(low)))
    }
}

#[inline(always)]
fn unpack<E: Element>(words: [u32; 4]) -> [f32; ELEMENTS as usize] {
    let [[a, b], [c, d], [e, f], [g, h]] = words.map(E::unpack);
    [a, b, c, d, e, f, g, h]
}

/// Into a pool of the same type: as they are, but for those that RoPE turns.
#[inline(always)]
unsafe fn append<E: Element>(params: KvAppendParams) {
    let Some(part) = Part::of_thread(&params, ELEMENTS, ELEMENT_BYTES) else { return };
    let mut words = load_global_x4(part.element(part.first));
    if part.turns {
        let [a, b, c, d, e, f, g, h] = part.numbers::<E>(&params, part.first, words);
        words = [E::pack(a, b), E::pack(c, d), E::pack(e, f), E::pack(g, h)];
    }
    store_global_x4(part.to, words);
}

/// Into a pool in FP8.
#[inline(always)]
unsafe fn append_e4m3<E: Element>(params: KvAppendParams) {
    let Some(part) = Part::of_thread(&params, VECTOR_BYTES, 1) else { return };
    let (first, second) = (part.first, part.first + ELEMENTS);
    let words = [load_global_x4(part.element(first)), load_global_x4(part.element(second))];
    let round = |numbers: [f32; ELEMENTS as usize]| {
        let [a, b, c, d, e, f, g, h] = numbers.map(|number| e4m3(number / part.scale));
        [u32::from_le_bytes([a, b, c, d]), u32::from_le_bytes([e, f, g, h])]
    };
    let [a, b] = round(part.numbers::<E>(&params, first, words[0]));
    let [c, d] = round(part.numbers::<E>(&params, second, words[1]));
    store_global_x4(part.to, [a, b, c, d]);
}

kernel! {
    /// Appends tokens in bf16.
    #[launch_bounds(threads = 128, blocks_per_sm = 8)]
    fn kv_append_bf16(params: KvAppendParams) {
        append::<Bf16>(params)
    }

    /// Appends tokens in f16.
    #[launch_bounds(threads = 128, blocks_per_sm = 8)]
    fn kv_append_f16(params: KvAppendParams) {
        append::<F16>(params)
    }

    /// Appends tokens in bf16 to a pool in FP8.
    #[launch_bounds(threads = 128, blocks_per_sm = 8)]
    fn kv_append_bf16_e4m3(params: KvAppendParams) {
        append_e4m3::<Bf16>(params)
    }

    /// Appends tokens in f16 to a pool in FP8.
    #[launch_bounds(threads = 128, blocks_per_sm = 8)]
    fn kv_append_f16_e4m3(params: KvAppendParams) {
        append_e4m3::<F16>(params)
    }
}
