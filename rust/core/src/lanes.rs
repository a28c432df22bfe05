//! Sums in independent lanes: the compiler may not reorder a plain `f64` sum, so one accumulator would be latency-bound.

use crate::Float;

const LANES: usize = 4;

/// Sum of `f(x)` over a slice in four lanes, folded in a fixed order.
#[inline(always)]
pub(crate) fn lane_sum<T: Float>(x: &[T], f: impl Fn(f64) -> f64) -> f64 {
    let (chunks, rest) = x.as_chunks::<LANES>();
    let mut lanes = [0.0; LANES];
    for chunk in chunks {
        for (lane, value) in lanes.iter_mut().zip(chunk) {
            *lane += f(value.widen());
        }
    }
    let tail: f64 = rest.iter().map(|value| f(value.widen())).sum();
    (lanes[0] + lanes[1]) + (lanes[2] + lanes[3]) + tail
}

/// Mean of a non-empty slice; exactly the common value where all are equal, which makes their deviations exactly zero.
#[inline(always)]
pub(crate) fn mean<T: Float>(x: &[T], inv_len: f64) -> f64 {
    if T::EXACT_SUM && x.len() <= 1 << 28 {
        // inv_len is rounded, so a sum of equal values need not divide back exactly: correct by the first value's own sum.
        let first = x[0].widen();
        let sum = lane_sum(x, |v| v);
        let len = x.len() as f64;
        first + (sum - first * len) * inv_len
    } else {
        let first = x[0].widen();
        first + lane_sum(x, |v| v - first) * inv_len
    }
}

/// Mean and sum of squared deviations of a non-empty slice, in two passes.
///
/// Two passes over data in cache are faster than Welford's division per element, and lose no digits to a large offset.
#[inline(always)]
pub(crate) fn mean_and_ssw<T: Float>(x: &[T], inv_len: f64) -> (f64, f64) {
    let mean = mean(x, inv_len);
    let ssw = lane_sum(x, |v| {
        let d = v - mean;
        d * d
    });
    (mean, ssw)
}
