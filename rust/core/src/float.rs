//! The two element types the kernels read and write; everything between is `f64`.

/// A reward or advantage as stored in an array.
pub trait Float: Copy + Default + Send + Sync + 'static {
    /// True where the plain sum of up to 2^29 equal values is exact in `f64`, so that their mean is that very value.
    ///
    /// True for `f32`, whose 24 bits leave 29 spare. An `f64` sum must be taken about the first value instead.
    const EXACT_SUM: bool;
    /// Largest finite value.
    const MAX: f64;
    /// Widen without loss.
    fn widen(self) -> f64;
    /// Round once, to nearest even.
    fn narrow(value: f64) -> Self;
}

impl Float for f32 {
    const EXACT_SUM: bool = true;
    const MAX: f64 = f32::MAX as f64;
    #[inline(always)]
    fn widen(self) -> f64 {
        f64::from(self)
    }
    #[inline(always)]
    #[allow(clippy::cast_possible_truncation)] // the one rounding of the result
    fn narrow(value: f64) -> Self {
        value as f32
    }
}

impl Float for f64 {
    const EXACT_SUM: bool = false;
    const MAX: f64 = f64::MAX;
    #[inline(always)]
    fn widen(self) -> f64 {
        self
    }
    #[inline(always)]
    fn narrow(value: f64) -> Self {
        value
    }
}
