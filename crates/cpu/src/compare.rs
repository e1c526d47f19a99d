//! How far a result is from the exact one.

/// ‖result − exact‖ / ‖exact‖.
///
/// NaN, which is within no tolerance, if either has a NaN or their lengths differ; 0 if both are zero or empty.
pub fn relative_error<T: Copy + Into<f64>>(result: &[T], exact: &[f64]) -> f64 {
    if result.len() != exact.len() {
        return f64::NAN;
    }
    let mut difference = 0.0;
    let mut norm = 0.0;
    for (&result, &exact) in result.iter().zip(exact) {
        difference += (result.into() - exact).powi(2);
        norm += exact.powi(2);
    }
    if difference == 0.0 && norm == 0.0 { 0.0 } else { (difference / norm).sqrt() }
}

/// The largest |result − exact|.
///
/// NaN, which is within no tolerance, if any difference is NaN or the lengths differ.
pub fn largest_difference<T: Copy + Into<f64>>(result: &[T], exact: &[f64]) -> f64 {
    if result.len() != exact.len() {
        return f64::NAN;
    }
    let differences = result.iter().zip(exact).map(|(&result, &exact)| (result.into() - exact).abs());
    differences.fold(0.0, |a, b| if a.is_nan() || b.is_nan() { f64::NAN } else { a.max(b) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn relative_error_is_relative_in_norm() {
        assert_eq!(relative_error(&[3.0, 4.0], &[3.0, 4.0]), 0.0);
        assert_eq!(relative_error(&[3.0, 5.0], &[3.0, 4.0]), 0.2);
        assert_eq!(relative_error::<f64>(&[], &[]), 0.0);
        assert_eq!(relative_error(&[1.0], &[0.0]), f64::INFINITY);
    }

    #[test]
    fn largest_difference_is_absolute() {
        assert_eq!(largest_difference(&[1.0, -4.0, 3.0], &[1.0, -1.0, 4.0]), 3.0);
    }

    #[test]
    fn nan_is_within_no_tolerance() {
        for (result, exact) in [([1.0, f64::NAN], [1.0, 1.0]), ([f64::NAN, 1.0], [1.0, 1.0]), ([1.0, 1.0], [1.0, f64::NAN])] {
            assert!(relative_error(&result, &exact).is_nan());
            assert!(largest_difference(&result, &exact).is_nan());
        }
        assert!(relative_error(&[1.0], &[1.0, 2.0]).is_nan());
        assert!(largest_difference(&[1.0], &[1.0, 2.0]).is_nan());
    }
}
