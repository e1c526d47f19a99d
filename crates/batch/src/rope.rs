//! Rotary position embedding.

use std::f64::consts::TAU;

pub use packinfer_abi::RopeLayout;

/// Rotary position embedding (RoPE): pair `i` of a head's leading `rotary_dim` elements is turned by
/// `position · position_scale · base^(−2 i / rotary_dim)` radians.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rope {
    /// Which elements are a pair.
    pub layout: RopeLayout,
    /// Elements that are turned: even, and at most the head dimension.
    pub rotary_dim: u32,
    /// The ratio of the fastest turning pair to what would be the slowest: 10,000 in the original, more for long contexts.
    pub base: f64,
    /// Factor of all positions: 1, or less for a model that was extended by linear interpolation.
    pub position_scale: f64,
}

/// A [`Rope`] that cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum RopeError {
    /// A number of elements that heads cannot have turned.
    #[error("rotary_dim {rotary_dim} for heads of {head_dim}: it must be even, at least 2 and at most the head dimension")]
    RotaryDim {
        /// Elements to be turned.
        rotary_dim: u32,
        /// Elements of a head.
        head_dim: u32,
    },
    /// A base or a scale that is no positive number.
    #[error("RoPE with a {what} of {value}: it must be finite and greater than 0")]
    NotPositive {
        /// Which of them.
        what: &'static str,
        /// What it is.
        value: f64,
    },
}

impl Rope {
    /// RoPE in its usual form: all of `head_dim` elements, in the half-split layout, with a base of 10,000.
    pub fn new(head_dim: u32) -> Self {
        Self { layout: RopeLayout::HalfSplit, rotary_dim: head_dim, base: 10_000.0, position_scale: 1.0 }
    }

    /// Checks that heads of `head_dim` elements can be turned so.
    ///
    /// # Errors
    ///
    /// A `rotary_dim` that is odd, zero or larger than the heads; a base or a scale that is not finite and greater than 0.
    pub fn check(&self, head_dim: u32) -> Result<(), RopeError> {
        let Self { rotary_dim, base, position_scale, .. } = *self;
        if rotary_dim == 0 || !rotary_dim.is_multiple_of(2) || rotary_dim > head_dim {
            return Err(RopeError::RotaryDim { rotary_dim, head_dim });
        }
        for (what, value) in [("base", base), ("position scale", position_scale)] {
            if !value.is_finite() || value <= 0.0 {
                return Err(RopeError::NotPositive { what, value });
            }
        }
        Ok(())
    }

    /// Radians that each pair turns a position, `[rotary_dim / 2]`.
    pub fn frequencies(&self) -> impl Iterator<Item = f64> {
        let Self { rotary_dim, base, position_scale, .. } = *self;
        (0..rotary_dim / 2).map(move |pair| position_scale * base.powf(-2.0 * f64::from(pair) / f64::from(rotary_dim)))
    }

    /// As [`Self::frequencies`], in 2^−64 of a turn: as kernels take them. Whole turns are left out, as they change nothing.
    pub fn fixed_point_frequencies(&self) -> impl Iterator<Item = u64> {
        // A part of a turn so close to 1 that it rounds to it becomes the largest number below.
        self.frequencies().map(|radians| ((radians / TAU).fract() * 2f64.powi(64)) as u64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_turned_is_refused() {
        let rope = Rope::new(128);
        assert_eq!(rope.check(128), Ok(()));
        for (rotary_dim, head_dim) in [(0, 64), (7, 64), (66, 64)] {
            assert_eq!(Rope { rotary_dim, ..rope }.check(head_dim), Err(RopeError::RotaryDim { rotary_dim, head_dim }));
        }
        for wrong in [0.0, -1.0, f64::INFINITY] {
            let error = Err(RopeError::NotPositive { what: "base", value: wrong });
            assert_eq!(Rope { base: wrong, ..rope }.check(128), error);
            let error = Err(RopeError::NotPositive { what: "position scale", value: wrong });
            assert_eq!(Rope { position_scale: wrong, ..rope }.check(128), error);
        }
        assert!(Rope { base: f64::NAN, ..rope }.check(128).is_err());
    }

    #[test]
    fn angles_are_exact_at_the_millionth_position() {
        let rope = Rope { base: 500_000.0, position_scale: 0.25, ..Rope::new(128) };
        for (radians, fixed) in rope.frequencies().zip(rope.fixed_point_frequencies()) {
            for position in [1, 4_095, 131_071, 1_000_000] {
                let angle = f64::from(packinfer_abi::turn(position, fixed)) / 2f64.powi(32) * TAU;
                let exact = (f64::from(position) * radians).rem_euclid(TAU);
                assert!((angle - exact).abs() < 2e-9, "position {position}: {angle} for {exact}");
            }
        }
    }

    #[test]
    fn whole_turns_are_left_out() {
        let rope = Rope { rotary_dim: 2, position_scale: TAU * 3.25, ..Rope::new(64) };
        let frequencies: Vec<_> = rope.fixed_point_frequencies().collect();
        // float64 has 3.25 turns to about 2^-50 of a turn.
        assert!(matches!(frequencies[..], [quarter] if quarter.abs_diff(1 << 62) < 1 << 16), "{frequencies:x?}");
    }
}
