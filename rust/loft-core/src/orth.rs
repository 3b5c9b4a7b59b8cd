//! Orthonormalisation: CholeskyQR2 and what to do when it must not be trusted.
//!
//! One step takes `R^T R = Y^T Y` (the Gram matrix in f64) and `Q = Y R^{-1}`; after it
//! `||Q^T Q - I||` is about `eps cond(Y)`, after a second one about `eps` (Yamamoto et al., ETNA 44,
//! 2015). Where Cholesky shows that `cond(Y)` is too large for that, Householder QR in f64 takes
//! over; it completes a rank-deficient basis deterministically. `diag(R) >= 0` throughout.
//!
//! `extend` is the same against an existing basis, for the Krylov solvers: columns lost to rank
//! deficiency are replaced by fresh random directions with zero coefficients, which keeps
//! `W = Q C + Q' R` exact and restarts the search where it had ended.

use faer::linalg::matmul::matmul;
use faer::linalg::triangular_solve::solve_lower_triangular_in_place;
use faer::{Accum, Mat};

use crate::panel::{Basis, Panel, cross};
use crate::par::Par;
use crate::rng::{Stream, gaussians};
use crate::scalar::Real;
use crate::small::cholesky;

/// Orthonormal columns with the span of `a`'s, in order, `diag(R) >= 0`; `a` has at least as many rows as columns.
///
/// Where `a` is rank deficient the basis is completed, deterministically; so is a column of which less than
/// `16 m eps ||A||_F` lies outside the ones before it.
pub fn orthonormalize<T: Real>(a: Panel<T>, par: Par) -> Panel<T> {
    orthonormalize_with_r(a, par).0
}

pub(crate) fn orthonormalize_with_r<T: Real>(a: Panel<T>, par: Par) -> (Panel<T>, Mat<f64>) {
    let mut q = a.clone();
    let steps = cholesky_step(&mut q, par).and_then(|first| Some((cholesky_step(&mut q, par)?, first)));
    match steps {
        Some((second, first)) => (q, second * first),
        None => householder(&a),
    }
}

/// `Q <- Q R^{-1}` with the Cholesky factor of its Gram matrix; `None`, and no change, if that is too ill-conditioned.
pub(crate) fn cholesky_step<T: Real>(q: &mut Panel<T>, par: Par) -> Option<Mat<f64>> {
    // A pivot of this size still leaves eps * cond well below one, so that the next step repairs it.
    let limit = if T::EPS > 1e-10 { 1e-10 } else { 1e-13 };
    let r = cholesky(&q.gram(par), limit)?;
    q.each_block(par, |_, mut block| {
        // Solved, not multiplied by an inverse, and in f64: QR stays A to the rounding of T, whatever the condition.
        let mut wide = Mat::from_fn(block.ncols(), block.nrows(), |j, i| block[(i, j)].f64());
        solve_lower_triangular_in_place(r.transpose(), wide.as_mut(), faer::Par::Seq);
        for i in 0..block.nrows() {
            (0..block.ncols()).for_each(|j| block[(i, j)] = T::of(wide[(j, i)]));
        }
    });
    Some(r)
}

fn householder<T: Real>(a: &Panel<T>) -> (Panel<T>, Mat<f64>) {
    let wide = a.cast::<f64>();
    let qr = wide.mat().qr();
    let (mut q, mut r) = (qr.compute_thin_Q(), qr.thin_R().to_owned());
    for j in 0..r.ncols() {
        if r[(j, j)] < 0.0 {
            q.col_mut(j).iter_mut().for_each(|x| *x = -*x);
            r.row_mut(j).iter_mut().for_each(|x| *x = -*x);
        }
    }
    (Panel::from_mat(q.as_ref()), r)
}

/// `W = Q C + Q' R` with `[Q, Q']` orthonormal.
pub(crate) struct Extension<T> {
    pub(crate) block: Panel<T>,
    pub(crate) coefficients: Mat<f64>,
    pub(crate) r: Mat<f64>,
}

/// What the extension of one basis remembers: where replacements for lost columns come from, below which norm a
/// column counts as lost, and how far from orthonormal the basis may have become.
pub(crate) struct Deflation {
    seed: u64,
    drawn: usize,
    pub(crate) floor: f64,
    loss: f64,
}

impl Deflation {
    pub(crate) fn new(seed: u64, floor: f64) -> Self {
        Self { seed, drawn: 0, floor, loss: 0.0 }
    }
}

/// Loss of orthogonality, in units of eps, up to which a basis is left as it is. It enters Ritz values squared
/// (Simon 1984: up to sqrt(eps) it is harmless), and what is handed out is polished.
const LOSS: f64 = 16.0;

/// Orthonormalises `w` against `basis` and within itself.
pub(crate) fn extend<T: Real>(basis: &Basis<T>, w: &Panel<T>, deflation: &mut Deflation, par: Par) -> Extension<T> {
    let mut fresh = Extension::of(basis, w.clone());
    let before = w.norms();
    fresh.project(basis, par);
    let after = fresh.block.norms();
    let lost = after.iter().any(|norm| *norm <= deflation.floor);
    if !lost && cholesky_into(&mut fresh, par) {
        // What one round leaves behind grows by as much as it took away, and by the condition of the block.
        let kept = |j: usize| fresh.r[(j, j)] / before[j];
        let loss = (deflation.loss + T::EPS) / (0..before.len()).map(kept).fold(1.0, f64::min);
        if loss <= LOSS * T::EPS {
            deflation.loss = deflation.loss.max(loss);
            return fresh;
        }
        if fresh.settle(basis, par) {
            return fresh;
        }
    }
    deflate(basis, w, deflation, par)
}

impl<T: Real> Extension<T> {
    fn of(basis: &Basis<T>, w: Panel<T>) -> Self {
        let cols = w.cols;
        Self { block: w, coefficients: Mat::zeros(basis.cols(), cols), r: Mat::identity(cols, cols) }
    }

    /// Removes from the block what lies in the basis.
    fn project(&mut self, basis: &Basis<T>, par: Par) {
        let c = cross(basis.mat(), self.block.mat(), par);
        self.block.subtract(basis.mat(), c.as_ref(), par);
        let wide = Mat::from_fn(c.nrows(), c.ncols(), |i, j| c[(i, j)].f64());
        matmul(self.coefficients.as_mut(), Accum::Add, wide.as_ref(), self.r.as_ref(), 1.0, faer::Par::Seq);
    }

    /// Projects and orthonormalises until a round changes no column by much; false if none does.
    fn settle(&mut self, basis: &Basis<T>, par: Par) -> bool {
        for _ in 0..3 {
            self.project(basis, par);
            let Some(step) = cholesky_step(&mut self.block, par) else { return false };
            let settled = (0..step.ncols()).all(|j| step[(j, j)] > 0.7);
            self.r = step * &self.r;
            if settled {
                return true;
            }
        }
        false
    }
}

fn cholesky_into<T: Real>(fresh: &mut Extension<T>, par: Par) -> bool {
    let step = cholesky_step(&mut fresh.block, par);
    step.map(|step| fresh.r = step * &fresh.r).is_some()
}

/// Gram-Schmidt a column at a time inside the block, with a random direction for every column that is lost.
fn deflate<T: Real>(basis: &Basis<T>, w: &Panel<T>, deflation: &mut Deflation, par: Par) -> Extension<T> {
    let mut fresh = Extension::of(basis, w.clone());
    let spare = gaussians::<T>(deflation.seed, Stream::Deflation, w.rows, w.cols, deflation.drawn, par);
    deflation.drawn += w.cols;
    let mut spare = Extension::of(basis, spare);
    for _ in 0..2 {
        fresh.project(basis, par);
        spare.project(basis, par);
    }
    let mut r = Mat::<f64>::zeros(w.cols, w.cols);
    let mut done: Vec<Vec<f64>> = Vec::with_capacity(w.cols);
    for j in 0..w.cols {
        let column = |panel: &Panel<T>| -> Vec<f64> { (0..panel.rows).map(|i| panel.at(i, j).f64()).collect() };
        let mut v = column(&fresh.block);
        for _ in 0..2 {
            remove(&mut v, &done).iter().enumerate().for_each(|(i, dot)| r[(i, j)] += dot);
        }
        let mut norm = length(&v);
        if norm > deflation.floor {
            r[(j, j)] = norm;
        } else {
            v = column(&spare.block);
            (0..2).for_each(|_| drop(remove(&mut v, &done)));
            norm = length(&v);
        }
        v.iter_mut().for_each(|x| *x /= norm);
        done.push(v);
    }
    let rows = (0..w.rows).flat_map(|i| done.iter().map(move |v| T::of(v[i])));
    fresh.block = Panel::from_rows(w.rows, w.cols, rows.collect());
    fresh.r = r;
    fresh.settle(basis, par);
    fresh
}

/// Subtracts from `v` its components along orthonormal vectors, and returns them.
fn remove(v: &mut [f64], others: &[Vec<f64>]) -> Vec<f64> {
    let mut dots = Vec::with_capacity(others.len());
    for other in others {
        let dot: f64 = v.iter().zip(other).map(|(a, b)| a * b).sum();
        v.iter_mut().zip(other).for_each(|(a, b)| *a -= dot * b);
        dots.push(dot);
    }
    dots
}

fn length(v: &[f64]) -> f64 {
    v.iter().map(|x| x * x).sum::<f64>().sqrt()
}

/// Makes a basis that is orthonormal but for the rounding of a product orthonormal to eps, without turning it.
pub(crate) fn polish<T: Real>(q: &mut Panel<T>, par: Par) {
    if cholesky_step(q, par).is_none() {
        *q = householder(q).0;
    }
}

/// `max |Q^T Q - I|` by entries, in f64.
pub fn orthogonality_error<T: Real>(q: &Panel<T>) -> f64 {
    let gram = q.gram(Par::Seq);
    let k = gram.ncols();
    (0..k)
        .flat_map(|j| (0..k).map(move |i| (i, j)))
        .map(|(i, j)| (gram[(i, j)] - f64::from(u8::from(i == j))).abs())
        .fold(0.0, f64::max)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::panel::times;
    use crate::testing::{distance, gaussian_panel, random_orthonormal, with_spectrum};
    use proptest::prelude::*;

    fn check<T: Real>(a: &Panel<T>) -> Panel<T> {
        let (q, r) = orthonormalize_with_r(a.clone(), Par::Seq);
        assert!(orthogonality_error(&q) <= 50.0 * T::EPS, "{:e}", orthogonality_error(&q));
        assert!((0..r.ncols()).all(|j| r[(j, j)] >= 0.0));
        let back = times(q.cast::<f64>().mat(), r.as_ref(), Par::Seq);
        let size = a.norms().iter().map(|x| x * x).sum::<f64>().sqrt();
        let error = distance(&back, &a.cast::<f64>());
        let replaced = 16.0 * (a.cols as f64).sqrt();
        assert!(error <= (10.0 + replaced) * a.rows as f64 * T::EPS * size, "{error:e} of {size:e}");
        q
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]
        #[test]
        fn orthonormal_to_50_eps(n in 1usize..300, fraction in 0.0f64..1.0, decay in 0.0f64..9.0, seed in 0u64..1000) {
            let k = 1 + (fraction * (n - 1) as f64) as usize;
            let a = with_spectrum(n, k, seed, |i| 10f64.powf(-decay * (i - 1.0)));
            check(&a);
            check(&a.cast::<f32>());
        }

        #[test]
        fn rank_deficient_is_completed(n in 2usize..80, rank in 0usize..6, seed in 0u64..100) {
            let k = (rank + 3).min(n);
            let rank = rank.min(k);
            let a = times(gaussian_panel::<f64>(n, rank, seed).mat(), gaussian_panel::<f64>(rank, k, seed + 1).mat(), Par::Seq);
            check(&a);
            check(&a.cast::<f32>());
        }
    }

    #[test]
    fn zero_and_repeated_columns() {
        check(&Panel::<f32>::zeros(5, 5));
        let column = gaussian_panel::<f32>(9, 1, 0);
        let repeated = Panel::from_rows(9, 3, column.data.iter().flat_map(|x| [*x, *x, 0.0]).collect());
        let q = check(&repeated);
        assert!(distance(&Panel::from_mat(q.mat().subcols(0, 1)), &orthonormalize(column, Par::Seq)) < 1e-6);
    }

    /// Found by fuzzing: what is left of all columns but the first is near the limit below which they are replaced.
    #[test]
    fn rank_one_and_a_little_more() {
        for (noise, seed) in [(1e-16, 1), (1e-15, 2), (1e-14, 3), (4e-14, 4), (1e-13, 5), (1e-12, 6)] {
            let one = times(gaussian_panel::<f64>(33, 1, seed).mat(), gaussian_panel::<f64>(1, 4, 9).mat(), Par::Seq);
            let more = gaussian_panel::<f64>(33, 4, seed + 10);
            let sum = one.data.iter().zip(&more.data).map(|(x, y)| x + noise * y).collect();
            check(&Panel::from_rows(33, 4, sum));
        }
    }

    #[test]
    fn an_orthonormal_matrix_stays() {
        let q = random_orthonormal(60, 20, 1);
        assert!(distance(&check(&q), &q) < 1e-14);
    }

    #[test]
    fn extension_is_exact_whatever_the_rank() {
        let mut basis = Basis::new(50, 8);
        let start = random_orthonormal(50, 6, 3);
        basis.push(&start);
        let fresh = gaussian_panel::<f64>(50, 2, 5);
        let inside = times(start.mat(), gaussian_panel::<f64>(6, 2, 6).mat(), Par::Seq);
        let zero = Panel::zeros(50, 2);
        for parts in [[&fresh, &fresh], [&inside, &fresh], [&inside, &inside], [&zero, &fresh]] {
            let w = Panel::from_rows(
                50,
                4,
                (0..50).flat_map(|i| parts.map(|p| [p.at(i, 0), p.at(i, 1)]).concat()).collect(),
            );
            let mut deflation = Deflation::new(0, 1e-14);
            let Extension { block, coefficients, r } = extend(&basis, &w, &mut deflation, Par::Seq);
            let back = basis.mat() * &coefficients + block.mat() * &r;
            assert!(distance(&Panel::from_mat(back.as_ref()), &w) < 1e-13);
            let mut whole = Basis::new(50, 10);
            whole.push(&start);
            whole.push(&block);
            assert!(orthogonality_error(&Panel::<f64>::from_mat(whole.mat())) < 1e-13);
        }
    }
}
