//! Arithmetic that is to give the same on the device as on the host, where it is tested: rounding to FP8, bf16 as float16, and
//! the angles of RoPE.
//!
//! Angles are fixed-point numbers whose unit is a turn. Multiplying one by a position wraps around by itself, which leaves
//! exactly the part of a turn that matters, however many turns came before; in radians and float32 it would be lost at positions
//! of some thousands.

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

/// A number in e4m3 (sign, 4 bits of exponent, 3 of fraction), rounded to the nearest, ties to even; what is too large becomes
/// the largest, 448.
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

/// A word of two equal halves, each 1.
const ONES: u32 = 0x1_0001;
/// Signs of the two numbers of a word, in bf16 or float16.
const SIGNS: u32 = ONES << 15;

/// The power of two that a row of numbers in bf16 is multiplied with to become float16, which has more bits but a narrower range:
/// one that has its greatest number between 2^14 and 2^15; at most 2^112.
#[derive(Clone, Copy)]
pub struct ScaleToF16 {
    /// The exponent of the row's greatest number, as it is stored.
    exponent: u32,
    /// What all exponents become less by.
    less: u32,
}

impl ScaleToF16 {
    /// Bits of the fraction in bf16, in float16 and in float32.
    const FRACTION: u32 = 7;
    const FRACTION_OF_F16: u32 = 10;
    const FRACTION_OF_F32: u32 = 23;
    /// What is added to an exponent in float16.
    const BIAS_OF_F16: u32 = 15;
    /// The exponent that the greatest number of a row gets.
    const GREATEST: u32 = Self::BIAS_OF_F16 + 14;
    /// The exponent of infinities and NaN in bf16.
    const NOT_FINITE: u32 = 0xFF;

    /// The numbers of a word without their signs: they have the order of their bits.
    #[inline(always)]
    pub const fn magnitudes(word: u32) -> u32 {
        word & !SIGNS
    }

    /// Of a row of which either half of `greatest` is the greatest [magnitude](Self::magnitudes).
    #[inline(always)]
    pub const fn of_greatest(greatest: u32) -> Self {
        let (high, low) = (greatest >> 16, greatest & 0xFFFF);
        let exponent = (if high > low { high } else { low }) >> Self::FRACTION;
        Self { exponent, less: (if exponent > Self::GREATEST { exponent } else { Self::GREATEST }) - Self::GREATEST }
    }

    /// Two numbers of the row, as float16. That is exact, but for numbers that are less than a 2^28th part of the greatest, which
    /// are off by half of such a part at most. `max` is that of both halves of words, without signs.
    #[inline(always)]
    pub fn pair(self, word: u32, max: impl Fn(u32, u32) -> u32) -> u32 {
        let subtrahends = (self.less << Self::FRACTION) * ONES;
        let bits = max(Self::magnitudes(word), subtrahends) - subtrahends;
        (word & SIGNS) | bits << (Self::FRACTION_OF_F16 - Self::FRACTION)
    }

    /// What these numbers must be multiplied with to be what they were; NaN if one of the row is not finite, as then none of them
    /// is right.
    #[inline(always)]
    pub const fn inverse(self) -> f32 {
        if self.exponent == Self::NOT_FINITE {
            return f32::NAN;
        }
        // The bias of float32 is that of bf16; that of what was made of it, that of float16.
        f32::from_bits((self.less + Self::BIAS_OF_F16) << Self::FRACTION_OF_F32)
    }
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

    fn bf16(bits: u32) -> f64 {
        f64::from(f32::from_bits(bits << 16))
    }

    fn f16(bits: u32) -> f64 {
        extern crate std;
        let (exponent, fraction) = (bits >> 10 & 0x1F, bits & 0x3FF);
        assert!(exponent < 0x1F, "{bits:#x} is not finite");
        let magnitude =
            if exponent == 0 { f64::from(fraction) } else { f64::from(1 << 10 | fraction) * 2f64.powi(exponent as i32 - 1) };
        magnitude / 2f64.powi(24) * if bits >> 15 == 0 { 1.0 } else { -1.0 }
    }

    fn max_of_halves(a: u32, b: u32) -> u32 {
        (a >> 16).max(b >> 16) << 16 | (a & 0xFFFF).max(b & 0xFFFF)
    }

    #[test]
    fn numbers_in_bf16_are_numbers_of_float16_once_they_are_scaled() {
        extern crate std;
        const INFINITY: u32 = 0x7F80;
        // All exponents, with the least and the greatest fraction.
        for greatest in (0..INFINITY).step_by(0x80).flat_map(|power| [power, power + 0x7F]) {
            let scale = ScaleToF16::of_greatest(greatest << 16);
            let inverse = f64::from(scale.inverse());
            for number in 0..=greatest {
                let pair = scale.pair(number << 16 | number | 1 << 15, max_of_halves);
                let (exact, made) = (bf16(number), [f16(pair >> 16), -f16(pair & 0xFFFF)]);
                for made in made {
                    let error = (made * inverse - exact).abs();
                    let part = bf16(greatest) / 2f64.powi(28);
                    assert!(error == 0.0 || exact < part && error <= part / 2.0, "{exact:e} of {:e}: {made}", bf16(greatest));
                }
            }
        }
    }

    #[test]
    fn rows_with_numbers_that_are_not_finite_have_no_scale() {
        for greatest in [0x7F80, 0x7F81, 0x7FFF] {
            assert!(ScaleToF16::of_greatest(greatest).inverse().is_nan());
            assert!(ScaleToF16::of_greatest(greatest << 16).inverse().is_nan());
        }
    }
}
