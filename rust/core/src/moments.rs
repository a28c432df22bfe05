//! Count, mean and sum of squared deviations of a stream: the paper's Welford accumulator.

use crate::Error;

/// Moments of everything seen; [`Moments::default`] is empty and is the identity of [`Moments::merge`].
///
/// The count is a float because forgetting ([`Moments::decay`]) makes it fractional; it is exact below 2^53.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Moments {
    count: f64,
    mean: f64,
    m2: f64,
}

impl Moments {
    /// Moments with the given parts, which the caller has just computed from data.
    #[inline]
    pub(crate) fn new(count: f64, mean: f64, m2: f64) -> Self {
        Self { count, mean, m2 }
    }

    /// Moments from stored parts; refuses what no data can have.
    pub fn from_parts(count: f64, mean: f64, m2: f64) -> Result<Self, Error> {
        let check = |field, value: f64, ok, expected| {
            if ok && value.is_finite() { Ok(()) } else { Err(Error::InvalidState { field, value, expected }) }
        };
        check("count", count, count >= 0.0, "a finite number, at least 0")?;
        check("mean", mean, mean.abs() <= crate::MAX_REWARD, "a finite number of magnitude at most 1e140")?;
        check("m2", m2, m2 >= 0.0, "a finite number, at least 0")?;
        if count == 0.0 {
            check("mean", mean, mean == 0.0, "0, since the count is 0")?;
            check("m2", m2, m2 == 0.0, "0, since the count is 0")?;
        }
        Ok(Self { count, mean, m2 })
    }

    /// Weight of everything seen: the number of values, less what was forgotten.
    pub fn count(&self) -> f64 {
        self.count
    }

    /// Mean; 0 when empty.
    pub fn mean(&self) -> f64 {
        self.mean
    }

    /// Sum of squared deviations from the mean.
    pub fn m2(&self) -> f64 {
        self.m2
    }

    /// Add everything another accumulator has seen (Chan, Golub & LeVeque 1979, eq. 2.1).
    #[inline]
    pub fn merge(&mut self, other: &Self) {
        if other.count == 0.0 {
            return;
        }
        if self.count == 0.0 {
            *self = *other;
            return;
        }
        let count = self.count + other.count;
        let delta = other.mean - self.mean;
        let weight = other.count / count;
        self.m2 += other.m2 + delta * delta * (self.count * weight);
        self.mean += delta * weight;
        self.count = count;
    }

    /// Forget: multiply the weight of everything seen by `rho`; the mean and the variance stay.
    pub fn decay(&mut self, rho: f64) {
        self.count *= rho;
        self.m2 *= rho;
    }

    /// `m2 / (count - ddof)`, and 0 when that divisor is not positive.
    #[inline]
    pub fn variance(&self, ddof: u8) -> f64 {
        let divisor = self.count - f64::from(ddof);
        if divisor > 0.0 { self.m2 / divisor } else { 0.0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(values: &[f64]) -> Moments {
        let mut m = Moments::default();
        for &v in values {
            m.merge(&Moments::new(1.0, v, 0.0));
        }
        m
    }

    #[test]
    fn known_values() {
        let m = of(&[1.0, 2.0, 3.0, 4.0]);
        assert_eq!((m.count(), m.mean(), m.variance(0)), (4.0, 2.5, 1.25));
        assert!((m.variance(1) - 5.0 / 3.0).abs() < 1e-15);
    }

    #[test]
    fn equal_values_have_no_variance() {
        let mut m = of(&[0.1; 7]);
        m.merge(&of(&[0.1; 1000]));
        assert_eq!((m.mean(), m.m2()), (0.1, 0.0));
    }

    #[test]
    fn too_few_values_have_variance_zero() {
        assert_eq!(Moments::default().variance(0), 0.0);
        assert_eq!(of(&[5.0]).variance(1), 0.0);
    }

    #[test]
    fn impossible_parts_are_refused() {
        for (count, mean, m2) in
            [(-1.0, 0.0, 0.0), (f64::NAN, 0.0, 0.0), (1.0, f64::INFINITY, 0.0), (2.0, 0.0, -1.0), (0.0, 1.0, 0.0)]
        {
            assert!(Moments::from_parts(count, mean, m2).is_err(), "{count} {mean} {m2}");
        }
        assert_eq!(Moments::from_parts(4.0, 2.5, 5.0), Ok(of(&[1.0, 2.0, 3.0, 4.0])));
    }

    #[test]
    fn decay_keeps_mean_and_population_variance() {
        let mut m = of(&[1.0, 2.0, 4.0]);
        let (mean, variance) = (m.mean(), m.variance(0));
        m.decay(0.25);
        assert_eq!((m.count(), m.mean(), m.variance(0)), (0.75, mean, variance));
    }
}
