//! Random Q, K and V, fast enough for the KV of a whole batch.

use rand::rngs::SmallRng;
use rand::{RngCore, SeedableRng};
use rayon::prelude::*;

use crate::Number;

/// Elements that one generator makes: enough to be worth a task.
const CHUNK: usize = 1 << 16;

/// `len` random elements, evenly distributed with mean 0 and variance 1. The same seed gives the same elements, whatever the
/// number of threads.
pub fn random_elements<E: Number>(len: usize, seed: u64) -> Vec<E> {
    // 16 random bits are evenly distributed over -2^15 .. 2^15, whose standard deviation is 2^15 / √3.
    let scale = 3f32.sqrt() / f32::from(1u16 << 15);
    let mut elements = vec![E::default(); len];
    elements.par_chunks_mut(CHUNK).enumerate().for_each(|(chunk, elements)| {
        let mut generator = SmallRng::seed_from_u64(seed);
        let mut generator = SmallRng::seed_from_u64(generator.next_u64().wrapping_add(chunk as u64));
        for elements in elements.chunks_mut(4) {
            let bits = generator.next_u64();
            for (lane, element) in elements.iter_mut().enumerate() {
                *element = E::from_f32(f32::from((bits >> (16 * lane)) as i16) * scale);
            }
        }
    });
    elements
}

#[cfg(test)]
mod tests {
    use half::{bf16, f16};

    use super::*;

    #[test]
    fn elements_have_mean_0_and_variance_1() {
        let elements: Vec<f16> = random_elements(1 << 20, 3);
        let values = || elements.iter().map(|&element| f64::from(element));
        let mean = values().sum::<f64>() / elements.len() as f64;
        let variance = values().map(|value| value * value).sum::<f64>() / elements.len() as f64;
        assert!(mean.abs() < 0.01 && (variance - 1.0).abs() < 0.01, "mean {mean}, variance {variance}");
    }

    #[test]
    fn the_seed_says_everything() {
        let elements: Vec<bf16> = random_elements(CHUNK + 3, 1);
        assert_eq!(elements, random_elements(CHUNK + 3, 1));
        assert_ne!(elements, random_elements(CHUNK + 3, 2));
        assert_ne!(elements[..3], elements[CHUNK..], "chunks repeat each other");
    }
}
