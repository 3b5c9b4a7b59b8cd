//! Truncated SVD by a randomised block Krylov method: block Golub-Kahan bidiagonalisation from a
//! Gaussian start (Musco & Musco 2015; RandLAPACK's ABRIK), with full reorthogonalisation.
//!
//! ```text
//! A V_j = U_{<j} C_j + U_j R_j,      A^T U_j = V_{<=j} C'_j + V_{j+1} R'_j
//! ```
//!
//! so `A V = U B` holds exactly for the small `B = [C; R]`, whose SVD in f64 gives the Ritz triplets
//! (sigma, u, v); nothing of size `k x n` is ever decomposed. Consequences, all free:
//! the captured energy is `sum sigma_i^2` exactly (up to rounding), and the residual of a triplet is
//! `||A^T u - sigma v|| = ||R'_q y||` with `y` the last block of its left vector in `U`.
//!
//! Differences from ABRIK: the block is about a quarter of the rank, since a deep Krylov space of small
//! blocks captures more per product than a shallow one of wide blocks; both bases are kept orthonormal;
//! blocks that lose rank are completed. It stops when the energy
//! that the residuals allow to be missing is below `tol` of that captured, and at once when the space is invariant.
//! Without a `tol` it takes the depth that decaying spectra need and, while that estimate stays above 1e-3, a few
//! blocks more.

use faer::Mat;

use crate::control::Control;
use crate::error::Result;
use crate::op::Operator;
use crate::orth::{Deflation, Extension, extend, orthonormalize, polish};
use crate::panel::{Basis, Panel, round, times};
use crate::par::Par;
use crate::rng::{Stream, gaussians};
use crate::scalar::Real;
use crate::small;

/// What the solvers may be told.
#[derive(Debug, Clone, Copy)]
pub struct Params {
    /// Largest fraction of the captured energy that may be missing; `None` for the default.
    pub tol: Option<f64>,
    /// Seed of every draw.
    pub seed: u64,
}

/// Leading singular triplets and what is known about them.
#[derive(Debug, Clone)]
pub struct Truncated<T> {
    /// `m x r`, orthonormal columns.
    pub left: Panel<T>,
    /// `n x r`, orthonormal columns, the largest entry of each positive.
    pub right: Panel<T>,
    /// Singular values, descending.
    pub values: Vec<f64>,
    /// The next singular value, if there is one.
    pub next: Option<f64>,
    /// `||A^T u_i - sigma_i v_i||`.
    pub residuals: Vec<f64>,
    /// Passes over the data.
    pub passes: usize,
}

/// Columns for which the products run fastest (measured).
const WIDTH: usize = 24;

/// Block size of a Krylov space, and how many blocks it gets without a `tol`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Depth {
    pub(crate) block: usize,
    /// Enough for a decaying spectrum; from here on the residuals decide.
    pub(crate) steps: usize,
    /// Where a flat spectrum is given up on.
    pub(crate) most: usize,
}

/// Without a `tol`, the estimate of the missing fraction of energy that ends the search.
const CLOSE: f64 = 1e-3;

/// Up to this dimension a dense decomposition takes well under a second.
const DENSE: usize = 1024;

impl Depth {
    /// Blocks of about a quarter of the rank, whole multiples of what the kernels like best, and
    /// `spread r / b + least` of them: the fewer the blocks per rank, the more depth a given energy takes.
    pub(crate) fn new(rank: usize, spread: f64, least: f64) -> Self {
        let block = rank.div_ceil(4).next_multiple_of(WIDTH);
        let steps = (spread * rank as f64 / block as f64 + least).round() as usize;
        Self { block, steps, most: steps + 3 }
    }

    pub(crate) fn columns(self) -> usize {
        self.block * self.steps
    }

    /// Whether the space stays well below `dimension`; if not, a dense decomposition is cheaper and exact.
    pub(crate) fn fits(self, dimension: usize) -> bool {
        fits(self.columns() + self.block, dimension)
    }

    /// Whether the Ritz values should be looked at after `step` blocks.
    pub(crate) fn tests(self, step: usize, rank: usize, tol: Option<f64>) -> bool {
        if tol.is_some() { 2 * step * self.block > 3 * rank } else { step >= self.steps }
    }

    /// What to do when `missing` of `energy` may still be outside after `step` blocks.
    pub(crate) fn verdict(self, step: usize, dimension: usize, missing: f64, energy: f64, tol: Option<f64>) -> Verdict {
        let full = !fits((step + 2) * self.block, dimension);
        let spent = step >= self.most || (full && dimension > DENSE);
        if missing <= tol.unwrap_or(CLOSE) * energy || (tol.is_none() && spent) {
            Verdict::Done
        } else if full {
            Verdict::Dense
        } else {
            Verdict::Deeper
        }
    }
}

/// Stop, take another block, or give the Krylov space up for a dense decomposition.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict {
    Done,
    Deeper,
    Dense,
}

pub(crate) fn fits(columns: usize, dimension: usize) -> bool {
    5 * columns <= 3 * dimension
}

pub(crate) fn svd_depth(rank: usize) -> Depth {
    Depth::new(rank, 2.2, 2.5)
}

/// The energy that residuals `rho` allow to be missing: second order in `sigma rho` where a gap separates
/// the value from `next`, first order where none does.
pub(crate) fn missing(values: &[f64], residuals: &[f64], next: f64) -> f64 {
    let pairs = values.iter().zip(residuals);
    pairs
        .map(|(sigma, rho)| {
            let coupling = sigma * rho;
            let gap = sigma * sigma - next * next;
            if gap > coupling { coupling * coupling / gap } else { coupling }
        })
        .sum()
}

/// The `rank` leading singular triplets of `op`, whose squared Frobenius norm is `square`.
///
/// `None` if the Krylov space would fill the whole, so that a dense decomposition is called for.
///
/// # Errors
/// What `control` returns, and non-convergence of a small SVD.
pub fn truncated_svd<T: Real>(
    op: &impl Operator<T>,
    rank: usize,
    square: f64,
    params: Params,
    control: &dyn Control,
    par: Par,
) -> Result<Option<Truncated<T>>> {
    let depth = svd_depth(rank);
    let dimension = op.rows().min(op.cols());
    if !depth.fits(dimension) {
        return Ok(None);
    }
    let mut space = Space::start(op, depth, square, params.seed, par);
    for step in 1.. {
        control.check()?;
        space.advance(op, par);
        // With nothing left outside, and room for the rank inside, the triplets are final.
        let final_already = space.tail.norm_max() == 0.0 && space.right.cols() >= rank;
        if !final_already && !depth.tests(step, rank, params.tol) {
            continue;
        }
        let small = Small::solve(&space, rank)?;
        let missing = if final_already { 0.0 } else { small.missing() };
        match depth.verdict(step, dimension, missing, small.energy(), params.tol) {
            Verdict::Done => return Ok(Some(space.finish(small, par))),
            Verdict::Dense => return Ok(None),
            Verdict::Deeper => {}
        }
    }
    unreachable!("the loop above ends by returning")
}

/// The two bases and the projected matrix.
struct Space<T> {
    left: Basis<T>,
    right: Basis<T>,
    next: Panel<T>,
    columns: Vec<Mat<f64>>,
    tail: Mat<f64>,
    deflation: Deflation,
}

impl<T: Real> Space<T> {
    fn start(op: &impl Operator<T>, depth: Depth, square: f64, seed: u64, par: Par) -> Self {
        let next = orthonormalize(gaussians(seed, Stream::Start, op.cols(), depth.block, 0, par), par);
        Self {
            left: Basis::new(op.rows(), depth.columns()),
            right: Basis::new(op.cols(), depth.columns()),
            next,
            columns: Vec::new(),
            tail: Mat::zeros(0, 0),
            // A product with A is only right to about eps ||A||, whatever its size.
            deflation: Deflation { seed, drawn: 0, floor: 4.0 * T::EPS * square.sqrt() },
        }
    }

    fn advance(&mut self, op: &impl Operator<T>, par: Par) {
        self.right.push(&self.next);
        let image = op.apply(&self.next, par);
        let Extension { block, coefficients, r } = extend(&self.left, &image, &mut self.deflation, par);
        self.columns.push(stack(&coefficients, &r));
        self.left.push(&block);
        let back = op.adjoint(&block, par);
        let Extension { block, r, .. } = extend(&self.right, &back, &mut self.deflation, par);
        (self.next, self.tail) = (block, r);
    }

    fn finish(self, small: Small, par: Par) -> Truncated<T> {
        let lift = |basis: &Basis<T>, y: &Mat<f64>| {
            let mut panel = times(basis.mat(), round::<T>(y.as_ref()).as_ref(), par);
            polish(&mut panel, par);
            panel
        };
        let (mut left, mut right) = (lift(&self.left, &small.left), lift(&self.right, &small.right));
        fix_signs(&mut right, &mut left);
        let passes = 2 * self.columns.len();
        Truncated { left, right, values: small.values, next: Some(small.next), residuals: small.residuals, passes }
    }
}

pub(crate) fn stack(upper: &Mat<f64>, lower: &Mat<f64>) -> Mat<f64> {
    let cut = upper.nrows();
    Mat::from_fn(cut + lower.nrows(), lower.ncols(), |i, j| if i < cut { upper[(i, j)] } else { lower[(i - cut, j)] })
}

/// The Ritz triplets in the coordinates of the bases.
struct Small {
    left: Mat<f64>,
    right: Mat<f64>,
    values: Vec<f64>,
    next: f64,
    residuals: Vec<f64>,
}

impl Small {
    fn solve<T: Real>(space: &Space<T>, rank: usize) -> Result<Self> {
        let k = space.right.cols();
        let block = space.tail.ncols();
        let projected = Mat::from_fn(k, k, |i, j| {
            let column = &space.columns[j / block];
            if i < column.nrows() { column[(i, j % block)] } else { 0.0 }
        });
        let (u, mut values, v) = small::svd(&projected)?;
        let next = values[rank];
        values.truncate(rank);
        let (left, right) = (u.subcols(0, rank).to_owned(), v.subcols(0, rank).to_owned());
        let last = left.subrows(k - block, block);
        let coupled = &space.tail * last;
        let residuals = (0..rank).map(|j| coupled.col(j).norm_l2()).collect();
        Ok(Self { left, right, values, next, residuals })
    }

    fn energy(&self) -> f64 {
        self.values.iter().map(|x| x * x).sum()
    }

    fn missing(&self) -> f64 {
        missing(&self.values, &self.residuals, self.next)
    }
}

/// Makes the largest entry of each right vector positive (the first of equals) and turns the left with it.
pub(crate) fn fix_signs<T: Real>(right: &mut Panel<T>, left: &mut Panel<T>) {
    let flips: Vec<bool> =
        largest_rows(right).into_iter().enumerate().map(|(j, i)| right.at(i, j).f64() < 0.0).collect();
    for panel in [right, left] {
        for row in panel.data.chunks_mut(flips.len()) {
            row.iter_mut().zip(&flips).filter(|(_, flip)| **flip).for_each(|(x, _)| *x = -*x);
        }
    }
}

fn largest_rows<T: Real>(panel: &Panel<T>) -> Vec<usize> {
    let mut best = vec![(0usize, -1.0); panel.cols];
    for (i, row) in panel.data.chunks(panel.cols.max(1)).enumerate() {
        for (x, best) in row.iter().zip(&mut best) {
            if x.f64().abs() > best.1 {
                *best = (i, x.f64().abs());
            }
        }
    }
    best.into_iter().map(|(i, _)| i).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::Free;
    use crate::op::{Dense, Stacked};
    use crate::orth::orthogonality_error;
    use crate::testing::{captured, gaussian_panel, singular_values, with_spectrum};
    use crate::view::View;

    const PARAMS: Params = Params { tol: None, seed: 0 };

    fn solve<T: Real>(a: &Panel<T>, rank: usize, params: Params) -> Truncated<T> {
        let view = View::row_major(&a.data, a.rows, a.cols);
        let scan = view.scan("a", Par::Seq).unwrap();
        assert_eq!(scan.exponent, 0, "the tests here are at unit scale");
        truncated_svd(&Dense::new(view, 0), rank, scan.square, params, &Free, Par::Seq).unwrap().unwrap()
    }

    fn unit(a: Panel<f64>) -> Panel<f64> {
        let largest = a.data.iter().fold(0.0f64, |m, x| m.max(x.abs()));
        a.scaled(0.7 / largest)
    }

    #[test]
    fn energy_on_decaying_spectra() {
        for (power, rank, most) in [(0.5, 4, 1e-3), (0.5, 16, 1e-3), (0.5, 64, 3e-4), (1.0, 16, 1e-6), (1.0, 64, 1e-6)]
        {
            for (m, n) in [(700, 400), (400, 700)] {
                let a = unit(with_spectrum(m, n, 3, |i| i.powf(-power)));
                let exact = singular_values(&a);
                let best: f64 = exact[..rank].iter().map(|x| x * x).sum();
                for found in [solve(&a, rank, PARAMS).right.cast(), solve(&a.cast::<f32>(), rank, PARAMS).right] {
                    assert!(orthogonality_error(&found) <= 50.0 * f64::from(f32::EPSILON));
                    let missing = 1.0 - captured(&a, &found) / best;
                    assert!(missing < most, "{m}x{n} i^-{power} r={rank}: {missing:e}");
                }
            }
        }
    }

    #[test]
    fn tol_is_kept_and_residuals_are_true() {
        let a = unit(with_spectrum(600, 500, 5, |i| i.powf(-0.3)));
        let exact = singular_values(&a);
        for tol in [1e-3, 1e-6] {
            let found = solve(&a, 12, Params { tol: Some(tol), seed: 2 });
            let best: f64 = exact[..12].iter().map(|x| x * x).sum();
            let kept: f64 = found.values.iter().map(|x| x * x).sum();
            assert!(1.0 - kept / best < tol, "{tol}: {:e}", 1.0 - kept / best);
            assert!((captured(&a, &found.right.cast()) - kept).abs() < 1e-6 * kept);
            let back = a.mat().transpose() * found.left.mat();
            for j in 0..12 {
                let miss =
                    (0..500).map(|i| (back[(i, j)] - found.values[j] * found.right.at(i, j)).powi(2)).sum::<f64>();
                assert!((miss.sqrt() - found.residuals[j]).abs() < 1e-12);
            }
        }
    }

    #[test]
    fn low_rank_is_found_exactly() {
        // Breakdown in the first blocks: what is left after rank 5 is rounding, and must be completed.
        for (rank, true_rank) in [(5, 5), (9, 5), (12, 1)] {
            let a = unit(with_spectrum(300, 260, 7, |i| if i <= f64::from(true_rank) { 1.0 / i } else { 0.0 }));
            for found in [solve(&a, rank, PARAMS), {
                let f = solve(&a.cast::<f32>(), rank, PARAMS);
                Truncated {
                    left: f.left.cast(),
                    right: f.right.cast(),
                    values: f.values,
                    next: f.next,
                    residuals: f.residuals,
                    passes: f.passes,
                }
            }] {
                assert!(orthogonality_error(&found.right) <= 50.0 * f64::from(f32::EPSILON));
                assert!(orthogonality_error(&found.left) <= 50.0 * f64::from(f32::EPSILON));
                let total: f64 = a.data.iter().map(|x| x * x).sum();
                let kept: f64 = found.values.iter().map(|x| x * x).sum();
                assert!((kept / total - 1.0).abs() < 1e-5, "{kept} of {total}");
            }
        }
    }

    #[test]
    fn stacked_is_the_stack() {
        let (a, b) = (gaussian_panel::<f64>(200, 300, 1), gaussian_panel::<f64>(150, 300, 2));
        let dense = |p: &Panel<f64>| -> Vec<f64> { p.data.clone() };
        let whole = Panel::from_rows(350, 300, [dense(&a), dense(&b)].concat());
        let (top, low) = (View::row_major(&a.data, 200, 300), View::row_major(&b.data, 150, 300));
        let op = Stacked { upper: &Dense::new(top, 3), lower: &Dense::new(low, 3) };
        let square = whole.data.iter().map(|x| x * x / 64.0).sum();
        let found = truncated_svd::<f64>(&op, 6, square, PARAMS, &Free, Par::Seq).unwrap().unwrap();
        let exact = singular_values(&whole);
        // A Gaussian matrix has a flat spectrum, the hardest to rank; the values still come close.
        let ratios: Vec<f64> = (0..6).map(|i| found.values[i] * 8.0 / exact[i]).collect();
        assert!(ratios.iter().all(|x| (0.95..1.0 + 1e-9).contains(x)), "{ratios:?}");
    }

    #[test]
    fn a_stop_is_obeyed() {
        struct Stop;
        impl Control for Stop {
            fn check(&self) -> Result<()> {
                Err(crate::Error::Interrupted)
            }
        }
        let a = gaussian_panel::<f32>(400, 400, 1);
        let op = Dense::new(View::row_major(&a.data, 400, 400), 3);
        let stopped = truncated_svd::<f32>(&op, 4, 1.0, PARAMS, &Stop, Par::Seq);
        assert_eq!(stopped.err(), Some(crate::Error::Interrupted));
    }
}
