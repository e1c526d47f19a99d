//! Numbers as people read them.

/// Bytes in GB.
pub fn gigabytes(bytes: u64) -> String {
    format!("{:.1}", bytes as f64 / 1e9)
}

/// A number to about three significant digits.
pub fn significant(value: f64) -> String {
    match value.abs() {
        ..1.0 => format!("{value:.3}"),
        1.0..10.0 => format!("{value:.2}"),
        10.0..100.0 => format!("{value:.1}"),
        _ => format!("{value:.0}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digits_suit_the_size() {
        assert_eq!([0.123, 1.0, 12.34, 123.4, 123456.7].map(significant), ["0.123", "1.00", "12.3", "123", "123457"]);
    }
}
