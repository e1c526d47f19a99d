//! Arithmetic that is to give the same on the device as on the host, where it is tested: rounding to FP8, and the angles of RoPE.
//!
//! Angles are fixed-point numbers whose unit is a turn. Multiplying one by a position wraps around by itself, which leaves exactly the part of a turn
//! that matters, however many turns came before; in radians and float32 it would be lost at positions of some thousands.

use core::f32::consts::TAU;

/// The angle of a position, in 2^−32 of a turn, where each position turns `frequency` 2^−64 of a turn further.
#[inline(always)]
pub const fn turn(position: u32, frequency: u64) -> u32 {
    ((position as u64).wrapping_mul(frequency) >> 32) as u32
}

/// Sine and cosine of an angle in 2^−32 of a turn, to 2^−23.
#[inline(always)]
pub const fn sin_cos(turn: u32) -> (f32, f32) {
    const RADIANS: f32 = TAU / (1u64 << 32) as f32;
    // The nearest quarter of a turn, and what is left to it: at most an eighth, where few terms of the series are enough.
    let quarter = turn.wrapping_add(1 << 29) >> 30;
    let x = turn.wrapping_sub(quarter << 30) as i32 as f32 * RADIANS;
    let y = x * x;
    let sin = x + x * y * (-1.0 / 6.0 + y * (1.0 / 120.0 + y * (-1.0 / 5_040.0 + y * (1.0 / 362_880.0))));
    let cos = 1.0 + y * (-1.0 / 2.0 + y * (1.0 / 24.0 + y * (-1.0 / 720.0 + y * (1.0 / 40_320.0 + y * (-1.0 / 3_628_800.0)))));
    let (sin, cos) = if quarter & 1 == 0 { (sin, cos) } else { (cos, -sin) };
    if quarter & 2 == 0 { (sin, cos) } else { (-sin, -cos) }
}

/// A number in e4m3 (sign, 4 bits of exponent, 3 of fraction), rounded to the nearest, ties to even; what is too large becomes the largest, 448.
#[inline(always)]
pub const fn e4m3(number: f32) -> u8 {
    const LARGEST: u32 = 448f32.to_bits();
    const INFINITY: u32 = f32::INFINITY.to_bits();
    /// The least whose fraction has its three bits.
    const LEAST_NORMAL: u32 = (1.0f32 / 64.0).to_bits();
    /// 2^14, whose float32 neighbours are as far apart as e4m3's least numbers, 2^−9.
    const ROUNDER: f32 = 16_384.0;
    /// Bits of float32's fraction that e4m3 does not have.
    const DROPPED: u32 = 23 - 3;
    /// What the exponents differ by.
    const BIASES: u32 = 127 - 7;
    let sign = number.to_bits() >> 24 & 0x80;
    let magnitude = number.to_bits() & 0x7FFF_FFFF;
    let rounded = if magnitude > INFINITY {
        0x7F // NaN
    } else if magnitude >= LARGEST {
        0x7E
    } else if magnitude >= LEAST_NORMAL {
        let odd = magnitude >> DROPPED & 1;
        ((magnitude + (1 << (DROPPED - 1)) - 1 + odd) >> DROPPED) - (BIASES << 3)
    } else {
        (f32::from_bits(magnitude) + ROUNDER).to_bits() - ROUNDER.to_bits()
    };
    (sign | rounded) as u8
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sines_are_right_to_2_to_the_minus_23() {
        extern crate std;
        let mut worst = 0f64;
        // A prime, so that all parts of the circle come.
        for turn in (0..=u32::MAX).step_by(4_099) {
            let (sin, cos) = sin_cos(turn);
            let (exact_sin, exact_cos) = (f64::from(turn) / 2f64.powi(32) * std::f64::consts::TAU).sin_cos();
            worst = worst.max((f64::from(sin) - exact_sin).abs()).max((f64::from(cos) - exact_cos).abs());
        }
        assert!(worst < 2f64.powi(-23), "{worst}");
        assert_eq!(sin_cos(0), (0.0, 1.0));
        assert_eq!(sin_cos(1 << 31), (-0.0, -1.0));
    }

    #[test]
    fn angles_wrap_around() {
        let third = u64::MAX / 3;
        assert_eq!(turn(1, third), turn(3_000_001, third));
        assert_eq!(turn(u32::MAX, 1 << 63), 1 << 31);
        assert_eq!(turn(u32::MAX - 1, 1 << 63), 0);
    }
}
