//! Sums in independent lanes: the compiler may not reorder a plain `f64` sum, so one accumulator would be latency-bound.
//!
//! The order of additions is fixed by the code, not by the CPU's vectors: every machine gives the same bits.

use core::array;
use core::hint::black_box;

use crate::Float;

/// Independent accumulators: two AVX registers, four of SSE.
pub(crate) const LANES: usize = 8;

/// Add `f(x)` of each element to its lane.
#[inline(always)]
pub(crate) fn accumulate<T: Float>(lanes: &mut [f64; LANES], x: &[T], f: impl Fn(f64) -> f64) {
    let (chunks, rest) = x.as_chunks::<LANES>();
    for chunk in chunks {
        // Arrays by value, so that the compiler sees vectors rather than eight scalars.
        let terms = chunk.map(|value| f(value.widen()));
        *lanes = array::from_fn(|i| lanes[i] + terms[i]);
    }
    for (lane, value) in lanes.iter_mut().zip(rest) {
        *lane += f(value.widen());
    }
}

/// Values that go through memory as one vector: a store that crosses a cache line is not forwarded to the load after it.
#[derive(Clone, Copy)]
#[repr(align(64))]
pub(crate) struct Aligned<const N: usize>(pub(crate) [f64; N]);

/// The sum of the lanes, in a fixed order.
#[inline(always)]
pub(crate) fn fold(lanes: [f64; LANES]) -> f64 {
    // Opaque to the compiler, which would otherwise cut everything before into halves and pairs to suit those added here.
    let Aligned(lanes) = black_box(Aligned(lanes));
    let Aligned(four) = black_box(Aligned(array::from_fn::<f64, 4, _>(|i| lanes[i] + lanes[i + 4])));
    (four[0] + four[2]) + (four[1] + four[3])
}

/// Mean of a non-empty slice; exactly the common value where all are equal, which makes their deviations exactly zero.
///
/// `exact` is [`Float::EXACT_SUM`] of what `x` was widened from.
#[inline(always)]
pub(crate) fn mean<T: Float>(x: &[T], exact: bool, inv_len: f64) -> f64 {
    let first = x[0].widen();
    let mut lanes = [-0.0; LANES]; // the sum that changes nothing, -0.0 included: the first addition is left out
    if exact && x.len() <= 1 << 28 {
        accumulate(&mut lanes, x, |v| v);
        let sum = fold(lanes);
        if x.len().is_power_of_two() {
            return sum * inv_len; // 1/len is exact, so len equal values divide back to themselves
        }
        // Otherwise they need not: only the excess over the first value is scaled by the rounded 1/len.
        first + (sum - first * x.len() as f64) * inv_len
    } else {
        accumulate(&mut lanes, x, |v| v - first);
        first + fold(lanes) * inv_len
    }
}

/// Mean of a non-empty slice, and its squared deviations added to `squares`.
///
/// Two passes over data in registers or cache are faster than Welford's division per element, and lose no digits to a
/// large offset.
#[inline(always)]
pub(crate) fn mean_and_squares<T: Float>(x: &[T], exact: bool, inv_len: f64, squares: &mut [f64; LANES]) -> f64 {
    let mean = mean(x, exact, inv_len);
    accumulate(squares, x, |v| (v - mean) * (v - mean));
    mean
}

/// Mean and sum of squared deviations of a non-empty slice.
#[inline(always)]
pub(crate) fn mean_and_ssw<T: Float>(x: &[T], inv_len: f64) -> (f64, f64) {
    let mut squares = [0.0; LANES];
    let mean = mean_and_squares(x, T::EXACT_SUM, inv_len, &mut squares);
    (mean, fold(squares))
}
