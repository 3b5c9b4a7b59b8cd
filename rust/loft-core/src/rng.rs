//! Counter-based Gaussian draws: Philox4x32-10 (Salmon et al., SC 2011) and Box-Muller,
//! `g = sqrt(-2 ln u) cos(2 pi v)`, with libm's portable functions.
//!
//! A draw depends on (seed, stream, row, column) alone: not on the platform, the threads, or how many
//! others were drawn.

use crate::panel::Panel;
use crate::par::Par;
use crate::scalar::Real;

const MULTIPLY: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];

/// What a draw is for; each has its own stream, so that none repeats another.
#[derive(Debug, Clone, Copy)]
pub enum Stream {
    /// The first Krylov block.
    Start = 0,
    /// Columns that replace those lost to rank deficiency.
    Deflation = 1,
    /// Hutchinson probes.
    Probe = 2,
    /// A random support.
    Basis = 3,
    /// A coordinate support.
    Coordinate = 4,
    /// Samples of a range that may be small.
    Sample = 5,
}

fn philox(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for _ in 0..10 {
        let low = u64::from(MULTIPLY[0]) * u64::from(counter[0]);
        let high = u64::from(MULTIPLY[1]) * u64::from(counter[2]);
        counter = [
            (high >> 32) as u32 ^ counter[1] ^ key[0],
            high as u32,
            (low >> 32) as u32 ^ counter[3] ^ key[1],
            low as u32,
        ];
        key = [key[0].wrapping_add(WEYL[0]), key[1].wrapping_add(WEYL[1])];
    }
    counter
}

/// Two independent 64-bit words at a place of a stream.
fn words(seed: u64, stream: Stream, row: u64, column: u32) -> [u64; 2] {
    let counter = [row as u32, (row >> 32) as u32, column, stream as u32];
    let [a, b, c, d] = philox(counter, [seed as u32, (seed >> 32) as u32]);
    [u64::from(a) << 32 | u64::from(b), u64::from(c) << 32 | u64::from(d)]
}

/// A uniform in (0, 1].
fn open(word: u64) -> f64 {
    ((word >> 11) + 1) as f64 * (1.0 / (1u64 << 53) as f64)
}

/// One standard normal.
pub fn gaussian(seed: u64, stream: Stream, row: usize, column: usize) -> f64 {
    let [u, v] = words(seed, stream, row as u64, column as u32);
    libm::sqrt(-2.0 * libm::log(open(u))) * libm::cos(2.0 * std::f64::consts::PI * open(v))
}

/// A `rows x cols` panel of standard normals whose first column has number `first`.
pub(crate) fn gaussians<T: Real>(
    seed: u64,
    stream: Stream,
    rows: usize,
    cols: usize,
    first: usize,
    par: Par,
) -> Panel<T> {
    let mut panel = Panel::zeros(rows, cols);
    panel.each_row(par, |i, row| {
        for (j, x) in row.iter_mut().enumerate() {
            *x = T::of(gaussian(seed, stream, i, first + j));
        }
    });
    panel
}

/// `count` distinct indices below `n`, ascending: the partial Fisher-Yates shuffle.
pub(crate) fn distinct(seed: u64, n: usize, count: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..n).collect();
    for i in 0..count {
        let [word, _] = words(seed, Stream::Coordinate, i as u64, 0);
        // The high half of a 128-bit product is uniform to within n / 2^64.
        let offset = ((u128::from(word) * (n - i) as u128) >> 64) as usize;
        order.swap(i, i + offset);
    }
    order.truncate(count);
    order.sort_unstable();
    order
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn philox_known_answers() {
        // From Random123's kat_vectors.
        assert_eq!(philox([0; 4], [0; 2]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        assert_eq!(philox([u32::MAX; 4], [u32::MAX; 2]), [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
    }

    #[test]
    fn moments() {
        let draws: Vec<f64> = (0..40_000).map(|i| gaussian(3, Stream::Start, i, 5)).collect();
        let mean = draws.iter().sum::<f64>() / 4e4;
        let square = draws.iter().map(|x| x * x).sum::<f64>() / 4e4;
        assert!(mean.abs() < 0.02 && (square - 1.0).abs() < 0.03);
    }

    #[test]
    fn distinct_indices() {
        let all = distinct(1, 10, 10);
        assert_eq!(all, (0..10).collect::<Vec<_>>());
        let some = distinct(2, 1000, 30);
        assert!(some.windows(2).all(|w| w[0] < w[1]) && some.len() == 30);
        assert_ne!(some, distinct(3, 1000, 30));
    }
}
