//! Least squares with unknowns that are not negative.

/// Sums up to which the unknowns are solved for.
const MAX_SWEEPS: u32 = 100_000;
/// A sweep that changes no unknown by more than this is the last. Unknowns are of about 1.
const PRECISION: f64 = 1e-12;

/// A problem of `N` unknowns, as its normal equations.
#[derive(Clone, Copy, Debug)]
pub(crate) struct NonNegative<const N: usize> {
    matrix: [[f64; N]; N],
    right: [f64; N],
}

impl<const N: usize> Default for NonNegative<N> {
    fn default() -> Self {
        Self { matrix: [[0.0; N]; N], right: [0.0; N] }
    }
}

impl<const N: usize> NonNegative<N> {
    /// Wants `row` · unknowns to be `value`; its squared error counts `weight` times.
    pub fn add(&mut self, row: &[f64; N], value: f64, weight: f64) {
        for i in 0..N {
            self.right[i] += weight * row[i] * value;
            for j in 0..N {
                self.matrix[i][j] += weight * row[i] * row[j];
            }
        }
    }

    /// The unknowns, none of them negative, with the least sum of squares: one after the other is set to what is best for it,
    /// until none changes. The sum is convex, so there is no other minimum to end at.
    pub fn solve(&self) -> [f64; N] {
        let mut unknowns = [0.0; N];
        for _ in 0..MAX_SWEEPS {
            let mut change: f64 = 0.0;
            for i in 0..N {
                if self.matrix[i][i] > 0.0 {
                    let sum: f64 = (0..N).map(|j| self.matrix[i][j] * unknowns[j]).sum();
                    let best = (unknowns[i] + (self.right[i] - sum) / self.matrix[i][i]).max(0.0);
                    change = change.max((best - unknowns[i]).abs());
                    unknowns[i] = best;
                }
            }
            if change <= PRECISION {
                break;
            }
        }
        unknowns
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknowns_are_found_and_not_negative() {
        let rows = [[1.0, 2.0, 0.0], [0.0, 1.0, 1.0], [3.0, 0.0, 1.0], [1.0, 1.0, 1.0]];
        let solve = |truth: [f64; 3]| {
            let mut squares = NonNegative::default();
            for row in &rows {
                squares.add(row, row.iter().zip(&truth).map(|(a, b)| a * b).sum(), 0.5);
            }
            squares.solve()
        };
        for (found, truth) in solve([0.5, 2.0, 0.0]).into_iter().zip([0.5, 2.0, 0.0]) {
            assert!((found - truth).abs() < 1e-6, "{found}, not {truth}");
        }
        assert!(solve([1.0, 1.0, -1.0]).iter().all(|&unknown| unknown >= 0.0));
        assert_eq!(NonNegative::<2>::default().solve(), [0.0; 2]);
    }
}
