//! What the tests share: matrices of a known spectrum, and exact references in f64.

use faer::Mat;

use crate::orth::orthonormalize;
use crate::panel::{Panel, times};
use crate::par::Par;
use crate::rng::{Stream, gaussians};
use crate::scalar::Real;
use crate::small;

pub(crate) fn gaussian_panel<T: Real>(rows: usize, cols: usize, seed: u64) -> Panel<T> {
    gaussians(seed, Stream::Probe, rows, cols, 1000, Par::Seq)
}

pub(crate) fn random_orthonormal(rows: usize, cols: usize, seed: u64) -> Panel<f64> {
    orthonormalize(gaussian_panel(rows, cols, seed), Par::Seq)
}

/// `m x n` with the singular values `spectrum(1), spectrum(2), ..`.
pub(crate) fn with_spectrum(m: usize, n: usize, seed: u64, spectrum: impl Fn(f64) -> f64) -> Panel<f64> {
    let k = m.min(n);
    let mut left = random_orthonormal(m, k, seed);
    for row in left.data.chunks_mut(k) {
        row.iter_mut().enumerate().for_each(|(i, x)| *x *= spectrum(i as f64 + 1.0));
    }
    times(left.mat(), random_orthonormal(n, k, seed + 1).mat().transpose(), Par::Seq)
}

/// All singular values, by the dense SVD.
pub(crate) fn singular_values<T: Real>(a: &Panel<T>) -> Vec<f64> {
    small::svd(&a.cast::<f64>().mat().to_owned()).unwrap().1
}

/// `(W^T G - G^T W) / 2` in f64.
pub(crate) fn skew_of<T: Real>(w: &Panel<T>, g: &Panel<T>) -> Mat<f64> {
    let (w, g) = (w.cast::<f64>(), g.cast::<f64>());
    let product = w.mat().transpose() * g.mat();
    (&product - product.transpose()) * faer::Scale(0.5)
}

/// `||A P||_F^2` or, for a square of projections, `||P^T S P||_F^2`.
pub(crate) fn captured<T: Real>(a: &Panel<T>, p: &Panel<f32>) -> f64 {
    (a.cast::<f64>().mat() * p.cast::<f64>().mat()).squared_norm_l2()
}

pub(crate) fn captured_skew(s: &Mat<f64>, p: &Panel<f32>) -> f64 {
    let p = p.cast::<f64>();
    (p.mat().transpose() * s * p.mat()).squared_norm_l2()
}

/// Largest difference of entries.
pub(crate) fn distance<T: Real>(a: &Panel<T>, b: &Panel<T>) -> f64 {
    assert_eq!((a.rows, a.cols), (b.rows, b.cols));
    a.data.iter().zip(&b.data).map(|(x, y)| (x.f64() - y.f64()).abs()).fold(0.0, f64::max)
}

/// `||A||_2`.
pub(crate) fn norm_2(a: &Mat<f64>) -> f64 {
    small::svd(a).unwrap().1[0]
}
