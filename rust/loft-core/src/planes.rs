//! Splitting a skew matrix into its invariant planes, by a real method in f64.
//!
//! Householder reflections bring `K` to tridiagonal skew form, `K = H T H^T`. Ordered by even and odd
//! indices `T = [[0, -B^T], [B, 0]]` with `B` bidiagonal of half the size (Ward & Gray 1978), and
//! `B = U diag(sigma) V^T` gives every plane at once: with `p1 = H [0; u]`, `p2 = H [v; 0]`,
//!
//! ```text
//! K p2 = sigma p1,      K p1 = -sigma p2,      p1^T K p2 = sigma >= 0
//! ```
//!
//! No square of `K` is taken and clusters need no care, since U and V are orthonormal whatever the
//! sigma. Planes come whole; an odd rank takes one direction of the next plane, which adds nothing.

use faer::Mat;

use crate::error::Result;
use crate::panel::Panel;
use crate::scalar::Real;
use crate::small;

/// Leading planes in the coordinates of the skew matrix that was split.
#[derive(Debug, Clone)]
pub struct Planes {
    /// `k x r`, orthonormal; columns `2i`, `2i + 1` span plane i.
    pub vectors: Mat<f64>,
    /// All strengths, descending, one for each plane of the whole matrix.
    pub strengths: Vec<f64>,
}

/// The top-`rank` invariant subspace of a dense skew matrix; only its skew part is read.
///
/// # Errors
/// Non-convergence of the half-size SVD.
pub fn split(k: &Mat<f64>, rank: usize) -> Result<Planes> {
    let size = k.nrows();
    let mut work =
        Panel::from_rows(size, size, (0..size * size).map(|x| half_difference(k, x / size, x % size)).collect());
    let reflectors = tridiagonalize(&mut work);
    let (even, odd) = (size.div_ceil(2), size / 2);
    let below = |i: usize| work.at(i + 1, i);
    let mut half = Mat::<f64>::zeros(odd, even);
    for o in 0..odd {
        half[(o, o)] = below(2 * o);
        if o + 1 < even {
            half[(o, o + 1)] = -below(2 * o + 1);
        }
    }
    let (u, strengths, v) = small::svd(&half)?;
    let mut vectors = Panel::<f64>::zeros(size, rank);
    for j in 0..rank.min(2 * odd) {
        for o in 0..if j % 2 == 0 { odd } else { even } {
            let (row, x) = if j % 2 == 0 { (2 * o + 1, u[(o, j / 2)]) } else { (2 * o, v[(o, j / 2)]) };
            vectors.data[row * rank + j] = x;
        }
    }
    if rank > 2 * odd {
        null_direction(&half, &mut vectors);
    }
    reflectors.iter().rev().for_each(|reflector| reflector.apply(&mut vectors));
    Ok(Planes { vectors: vectors.mat().to_owned(), strengths })
}

fn half_difference(k: &Mat<f64>, i: usize, j: usize) -> f64 {
    (k[(i, j)] - k[(j, i)]) / 2.0
}

/// `I - beta v v^T` on the rows from `start` on.
struct Reflector {
    start: usize,
    v: Vec<f64>,
    beta: f64,
}

impl Reflector {
    fn apply(&self, x: &mut Panel<f64>) {
        let cols = x.cols;
        let rows = &mut x.data[self.start * cols..];
        let mut w = vec![0.0; cols];
        for (row, v) in rows.chunks(cols).zip(&self.v) {
            row.iter().zip(&mut w).for_each(|(x, w)| *w += v * x);
        }
        for (row, v) in rows.chunks_mut(cols).zip(&self.v) {
            let factor = self.beta * v;
            row.iter_mut().zip(&w).for_each(|(x, w)| *x -= factor * w);
        }
    }
}

/// `K <- H^T K H` tridiagonal. With `p = beta K v` and `v^T K v = 0`, a step is the rank-two update `K + v p^T - p v^T`.
fn tridiagonalize(k: &mut Panel<f64>) -> Vec<Reflector> {
    let size = k.rows;
    let mut reflectors = Vec::with_capacity(size);
    for j in 0..size.saturating_sub(2) {
        let start = j + 1;
        let mut v: Vec<f64> = (start..size).map(|i| k.at(i, j)).collect();
        if v[1..].iter().all(|x| *x == 0.0) {
            continue;
        }
        // At its own scale: the squares of small entries would underflow, and their inverse overflow (found by fuzzing).
        let largest = v.iter().fold(0.0f64, |m, x| m.max(x.abs()));
        v.iter_mut().for_each(|x| *x /= largest);
        let length = v.iter().map(|x| x * x).sum::<f64>().sqrt();
        let (norm, head) = (length * largest, v[0]);
        v[0] += length.copysign(head);
        let beta = 2.0 / v.iter().map(|x| x * x).sum::<f64>();
        let image = -norm.copysign(head);
        for i in start..size {
            k.data[i * size + j] = if i == start { image } else { 0.0 };
            k.data[j * size + i] = -k.data[i * size + j];
        }
        let p: Vec<f64> = (start..size).map(|i| beta * dot(&k.data[i * size + start..(i + 1) * size], &v)).collect();
        for i in start..size {
            let (vi, pi) = (v[i - start], p[i - start]);
            let row = &mut k.data[i * size + start..(i + 1) * size];
            row.iter_mut().zip(v.iter().zip(&p)).for_each(|(x, (v, p))| *x += vi * p - pi * v);
        }
        reflectors.push(Reflector { start, v, beta });
    }
    reflectors
}

/// An inner product in eight partial sums, so that it vectorises.
fn dot(a: &[f64], b: &[f64]) -> f64 {
    let mut sums = [0.0; 8];
    let (a8, b8) = (a.chunks_exact(8), b.chunks_exact(8));
    let rest: f64 = a8.remainder().iter().zip(b8.remainder()).map(|(x, y)| x * y).sum();
    for (x, y) in a8.zip(b8) {
        (0..8).for_each(|l| sums[l] += x[l] * y[l]);
    }
    sums.iter().sum::<f64>() + rest
}

/// The one direction that a matrix of odd size has beside its planes: the null vector of the bidiagonal `B`.
fn null_direction(half: &Mat<f64>, vectors: &mut Panel<f64>) {
    let (odd, even) = half.shape();
    // Completing the rows of B by Householder QR of B^T leaves it as the last column.
    let square = half.transpose().qr().compute_Q();
    for e in 0..even {
        vectors.data[2 * e * vectors.cols + 2 * odd] = square[(e, even - 1)];
    }
}

/// The fixed rotation inside each plane: in its largest row the first vector is positive and the second zero.
pub(crate) fn fix_rotations<T: Real>(basis: &mut Panel<T>) {
    let cols = basis.cols;
    for j in (0..cols.saturating_sub(1)).step_by(2) {
        let (mut best, mut place) = (-1.0, (1.0, 0.0));
        for row in basis.data.chunks(cols) {
            let (a, b) = (row[j].f64(), row[j + 1].f64());
            if a * a + b * b > best {
                (best, place) = (a * a + b * b, (a, b));
            }
        }
        let (c, s) = (place.0 / best.sqrt(), place.1 / best.sqrt());
        for row in basis.data.chunks_mut(cols) {
            let (a, b) = (row[j].f64(), row[j + 1].f64());
            (row[j], row[j + 1]) = (T::of(c * a + s * b), T::of(c * b - s * a));
        }
    }
    if cols % 2 == 1 {
        let column = basis.data.chunks(cols).map(|row| row[cols - 1].f64());
        let largest = column.fold(0.0f64, |best, x| if x.abs() > best.abs() { x } else { best });
        if largest < 0.0 {
            basis.data.chunks_mut(cols).for_each(|row| row[cols - 1] = -row[cols - 1]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{gaussian_panel, norm_2, random_orthonormal};
    use proptest::prelude::*;

    fn check(k: &Mat<f64>, rank: usize, strengths: Option<&[f64]>) {
        let planes = split(k, rank).unwrap();
        let y = &planes.vectors;
        let size = k.norm_l2().max(1e-300);
        assert!((y.transpose() * y - Mat::<f64>::identity(rank, rank)).norm_max() < 50.0 * f64::EPSILON);
        let projected = y.transpose() * k * y;
        for (i, sigma) in planes.strengths[..rank / 2].iter().enumerate() {
            assert!((projected[(2 * i, 2 * i + 1)] - sigma).abs() < 1e-13 * size);
        }
        let whole = y.subcols(0, rank / 2 * 2);
        let image = k * whole;
        let miss = &image - whole * (whole.transpose() * &image);
        assert!(miss.norm_max() < 1e-12 * size, "not invariant: {:e}", miss.norm_max() / size);
        if let Some(strengths) = strengths {
            assert!(planes.strengths.iter().zip(strengths).all(|(a, b)| (a - b).abs() < 1e-13 * size));
        }
    }

    /// A skew matrix with given strengths in a random orthonormal basis.
    fn with_strengths(size: usize, strengths: &[f64], seed: u64) -> Mat<f64> {
        let q = random_orthonormal(size, size, seed);
        let mut block = Mat::<f64>::zeros(size, size);
        for (i, sigma) in strengths.iter().enumerate() {
            block[(2 * i, 2 * i + 1)] = *sigma;
            block[(2 * i + 1, 2 * i)] = -sigma;
        }
        q.mat() * block * q.mat().transpose()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]
        #[test]
        fn random_skew(size in 1usize..60, fraction in 0.0f64..1.0, seed in 0u64..1000) {
            let a = gaussian_panel::<f64>(size, size, seed);
            let rank = 1 + (fraction * (size - 1) as f64) as usize;
            let skew = Mat::from_fn(size, size, |i, j| a.at(i, j) - a.at(j, i));
            check(&skew, rank, None);
            let exact = norm_2(&skew);
            prop_assert!(size < 2 || (split(&skew, rank).unwrap().strengths[0] / exact - 1.0).abs() < 1e-12);
        }
    }

    #[test]
    fn clusters_and_zeros() {
        check(&with_strengths(12, &[2.0; 6], 1), 4, Some(&[2.0; 6]));
        check(&with_strengths(13, &[3.0, 1.0, 1.0, 1.0, 1e-9, 0.0], 2), 13, Some(&[3.0, 1.0, 1.0, 1.0, 1e-9, 0.0]));
        check(&with_strengths(9, &[1.0], 3), 9, None);
        check(&Mat::zeros(5, 5), 5, Some(&[0.0; 2]));
        check(&Mat::zeros(1, 1), 1, None);
    }

    #[test]
    fn entries_whose_squares_underflow() {
        for a in [1e-160, 1e-200, 1e-308, 5e-324] {
            let s = [0.0, 1.0, 0.0, 0.0, -1.0, 0.0, a, a, 0.0, -a, 0.0, a, 0.0, -a, -a, 0.0];
            let planes = split(&Mat::from_fn(4, 4, |i, j| s[4 * i + j]), 2).unwrap();
            assert!((planes.strengths[0] - 1.0).abs() < 1e-15 && planes.strengths[1] <= 2.0 * a);
            check(&Mat::from_fn(4, 4, |i, j| s[4 * i + j]), 4, None);
        }
    }

    #[test]
    fn the_rotation_inside_a_plane_is_fixed() {
        let planes = split(&with_strengths(20, &[3.0, 2.0, 1.0], 4), 6).unwrap();
        let mut basis = Panel::<f64>::from_mat(planes.vectors.as_ref());
        let mut turned = basis.clone();
        for row in turned.data.chunks_mut(2) {
            (row[0], row[1]) = (0.6 * row[0] + 0.8 * row[1], 0.6 * row[1] - 0.8 * row[0]);
        }
        fix_rotations(&mut basis);
        fix_rotations(&mut turned);
        assert!(crate::testing::distance(&basis, &turned) < 1e-14);
    }
}
