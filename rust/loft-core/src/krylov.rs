//! Truncated SVD by a randomised block Krylov method (Musco & Musco 2015): block Lanczos on `A^T A` from a Gaussian start,
//! with full reorthogonalisation.
//!
//! ```text
//! A^T A V_j = V_{<=j} C_j + V_{j+1} R_j,      T = V^T A^T A V = Y diag(sigma^2) Y^T,      P = V Y
//! ```
//!
//! `T` is small and decomposed in f64; nothing of size `k x n` is. Consequences, all free: the captured energy
//! `||A P||_F^2` is `sum sigma_i^2` exactly (up to rounding), and the residual of a triplet is
//! `||A^T u - sigma v|| = ||R_q y_last|| / sigma`, with `y_last` the rows of y that belong to the last block.
//!
//! Where A is wide and the rank high the space is that of `A A^T`, in the shorter `R^m`, and the blocks `Z_j = A^T V_j` are kept. With
//! `U = V Y`, `P = A^T U Sigma^{-1} = Z Y Sigma^{-1}` and `D = R_q Y_last Sigma^{-1}`
//!
//! ```text
//! A P = U Sigma + V_{q+1} D,      P^T A^T A P = Sigma^2 + D^T D,      (I - P P^T) A^T A P = (I - P P^T) A^T V_{q+1} D
//! ```
//!
//! so that a small eigenproblem in the span of P and one product `A^T V_{q+1}` give the same certificates.
//!
//! Numbered differences from RandLAPACK's ABRIK (block Golub-Kahan):
//! 1. one basis is kept, not two, since `A^T A V_j` costs one reading of a row-major A;
//! 2. blocks are of 24 or 48 columns whatever the rank: a deep space of small blocks captures more per product;
//! 3. blocks that lose rank are completed;
//! 4. it stops when the energy that the residuals allow to be missing is below `tol` of that captured, and at once when
//!    the space is invariant. Without a `tol` it takes the depth that decaying spectra need and, while that estimate
//!    stays above 1e-2, a few blocks more.

use faer::Mat;

use crate::control::Control;
use crate::error::Result;
use crate::op::Operator;
use crate::orth::{Deflation, Extension, cholesky_step, extend, orthonormalize, orthonormalize_with_r, polish};
use crate::panel::{Basis, Panel, cross, round, times};
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
    /// Whether left singular vectors are wanted too.
    pub left: bool,
}

/// One call of a solver, handed on unchanged from a driver down to the loop over passes: what is
/// asked for, who may stop it, and which threads work on it.
#[derive(Clone, Copy)]
pub struct Call<'c> {
    /// Columns `r` of the basis.
    pub rank: usize,
    /// What the solver may be told.
    pub params: Params,
    /// Who is asked between two passes whether to go on.
    pub control: &'c dyn Control,
    /// Who does the work.
    pub par: Par,
}

/// Leading singular triplets and what is known about them.
#[derive(Debug, Clone)]
pub struct Truncated<T> {
    /// `m x r`, orthonormal columns; only where asked for.
    pub left: Option<Panel<T>>,
    /// `n x r`, orthonormal columns, the largest entry of each positive.
    pub right: Panel<T>,
    /// Singular values, descending.
    pub values: Vec<f64>,
    /// The next singular value, if there is one.
    pub next: Option<f64>,
    /// `||A^T u_i - sigma_i v_i||`.
    pub residuals: Vec<f64>,
    /// What that took.
    pub work: Work,
}

/// Products with the data.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Work {
    /// Passes over the data.
    pub passes: usize,
    /// Columns multiplied, summed over the passes.
    pub columns: usize,
}

impl Work {
    /// Reading all of the data for something else than a product with a few columns.
    pub(crate) const DENSE: Self = Self { passes: 1, columns: 0 };

    /// `passes` of `columns` each.
    pub(crate) fn of(passes: usize, columns: usize) -> Self {
        Self { passes, columns: passes * columns }
    }
}

impl std::ops::Add for Work {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self { passes: self.passes + other.passes, columns: self.columns + other.columns }
    }
}

/// Block size of a Krylov space, and how many blocks it gets without a `tol`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Depth {
    pub(crate) block: usize,
    /// Enough for a decaying spectrum; from here on the residuals decide.
    pub(crate) steps: usize,
    /// Where a flat spectrum is given up on.
    most: usize,
    /// Where a dense decomposition is cheaper.
    full: usize,
}

/// Without a `tol`, the estimate of the missing fraction of energy that ends the search. The estimate is two to seven
/// times the truth on decaying spectra (measured).
const CLOSE: f64 = 1e-2;

/// Rounding of an image `A^T A v`, in units of eps ||A||^2: a bound that hundreds of matrices keep (tests/test_certificates.py).
const ROUNDING: f64 = 32.0;

/// The same for a space that has not its usual depth yet.
const EARLY: f64 = 1e-5;

/// From this rank on a wide matrix is solved in R^m. Below it the panels in R^n are small, and cost less than the product at
/// the end and the second reading of A (measured at 4096x14336: +20 % at rank 16, +8 % at 64, -12 % at 352).
const SHORT_PAYS: usize = 128;

/// Up to this dimension a dense decomposition takes well under a second.
const DENSE: usize = 1024;

impl Depth {
    /// Blocks that run fast (measured: products of 16, 24 and 48 columns at 0.65, 0.78 and 0.8 of the sgemm rate) and
    /// `spread r / b + least` of them: the fewer the blocks per rank, the more columns a given energy takes.
    ///
    /// `None` if the space would not stay well below `dimension`: a dense decomposition is cheaper, and exact.
    pub(crate) fn new(rank: usize, dimension: usize, spread: f64, least: f64) -> Option<Self> {
        let block = match rank {
            ..128 => 24,
            _ => 48,
        };
        let full = 7 * dimension / (10 * block);
        let steps = (spread * rank as f64 / block as f64 + least).ceil() as usize;
        let steps = steps.min(full);
        let most = steps + steps.div_ceil(4).min(3);
        (10 * steps * block >= 14 * rank && steps > 1).then_some(Self { block, steps, most, full })
    }

    pub(crate) fn columns(self) -> usize {
        self.block * self.steps
    }

    /// Whether the Ritz values should be looked at after `step` blocks.
    pub(crate) fn tests(self, step: usize, rank: usize, tol: Option<f64>) -> bool {
        if tol.is_some() { 2 * step * self.block > 3 * rank } else { step >= self.steps }
    }

    /// What to do when `missing` of `energy` may still be outside after `step` blocks.
    pub(crate) fn verdict(self, step: usize, dimension: usize, missing: f64, energy: f64, tol: Option<f64>) -> Verdict {
        let full = step >= self.full;
        let spent = step >= self.most || (full && dimension > DENSE);
        let limit = tol.unwrap_or(if step < self.steps { EARLY } else { CLOSE });
        if missing <= limit * energy || (tol.is_none() && spent) {
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

/// The `call.rank` leading singular triplets of `op`, whose squared Frobenius norm is `square`.
///
/// `None` if the Krylov space would fill the whole, so that a dense decomposition is called for.
///
/// # Errors
/// What `call.control` returns, and non-convergence of a small eigenproblem.
pub fn truncated_svd<T: Real>(op: &impl Operator<T>, square: f64, call: Call<'_>) -> Result<Option<Truncated<T>>> {
    let Call { rank, params, control, par } = call;
    let (m, n) = (op.rows(), op.cols());
    let Some(depth) = Depth::new(rank, n.min(m), 1.65, 1.9) else { return Ok(None) };
    let short = n > m && rank >= SHORT_PAYS;
    // A^T V, where V lies in R^m.
    let mut images = short.then(|| Basis::new(n, depth.columns()));
    // A product with A^T A is only right to about eps ||A||^2, whatever its size.
    let mut space = Space::start(if short { m } else { n }, depth, params.seed, Some(4.0 * T::EPS * square), par);
    for step in 1.. {
        control.check()?;
        let product = |x: &Panel<T>| match &mut images {
            Some(images) => {
                let inner = op.adjoint(x, par);
                images.push(&inner);
                op.apply(&inner, par)
            }
            None => op.normal(x, par),
        };
        space.advance(product, par);
        // The trace of A^T A is known, so no more than this can be missing, whatever the multiplicities.
        let outside = (square - space.trace()).max(0.0);
        let settled = space.basis.cols() >= rank && outside <= EARLY * square;
        if !settled && !depth.tests(step, rank, params.tol) {
            continue;
        }
        control.check()?;
        let ritz = Ritz::solve(&space, rank)?;
        let (residuals, next) = (ritz.residuals(0.0), ritz.next());
        let estimate = missing(&ritz.values[..rank], &residuals, next);
        let missing = if space.invariant() { outside } else { estimate.min(outside) };
        let energy = ritz.values[..rank].iter().map(|x| x * x).sum();
        match depth.verdict(step, n.min(m), missing, energy, params.tol) {
            Verdict::Done => {
                let found = match &images {
                    Some(images) => other_side(op, &space, images, ritz, par)?,
                    None => {
                        let mut right = space.lift(&ritz.leading(), par);
                        polish(&mut right, par);
                        (right, ritz)
                    }
                };
                let work = Work::of(2 * step + usize::from(images.is_some()), depth.block);
                return finish(op, found, params.left, work, par).map(Some);
            }
            Verdict::Dense => return Ok(None),
            Verdict::Deeper => {}
        }
    }
    unreachable!("the loop above ends by returning")
}

/// A block Lanczos basis of a symmetric or skew operator, `N V_j = V_{<=j} C_j + V_{j+1} R_j`, and its projection.
pub(crate) struct Space<T> {
    pub(crate) basis: Basis<T>,
    /// `R_j` of the last step: how the operator leaves the space.
    pub(crate) tail: Mat<f64>,
    next: Panel<T>,
    columns: Vec<Mat<f64>>,
    deflation: Deflation,
}

impl<T: Real> Space<T> {
    /// `floor`: the norm below which a column of an image is rounding; where it is not known, the first image tells it
    /// well enough.
    pub(crate) fn start(n: usize, depth: Depth, seed: u64, floor: Option<f64>, par: Par) -> Self {
        Self {
            basis: Basis::new(n, depth.columns()),
            tail: Mat::zeros(0, 0),
            next: orthonormalize(gaussians(seed, Stream::Start, n, depth.block, 0, par), par),
            columns: Vec::new(),
            deflation: Deflation::new(seed, floor.unwrap_or(0.0)),
        }
    }

    pub(crate) fn advance(&mut self, image: impl FnOnce(&Panel<T>) -> Panel<T>, par: Par) {
        self.basis.push(&self.next);
        let image = image(&self.next);
        if self.deflation.floor == 0.0 {
            self.deflation.floor = 4.0 * T::EPS * image.norms().into_iter().fold(0.0, f64::max);
        }
        let Extension { block, coefficients, r } = extend(&self.basis, &image, &mut self.deflation, par);
        self.columns.push(stack(&coefficients, &r));
        (self.next, self.tail) = (block, r);
    }

    /// Whether the operator maps the space into itself. It may still have more of the same values outside.
    pub(crate) fn invariant(&self) -> bool {
        self.tail.norm_max() == 0.0
    }

    /// Whether nothing is left outside: even the fresh directions that followed an invariant space have no image.
    pub(crate) fn exhausted(&self) -> bool {
        self.invariant() && self.columns.last().is_some_and(|last| last.norm_max() <= self.deflation.floor)
    }

    /// `tr V^T N V`.
    fn trace(&self) -> f64 {
        let block = self.tail.ncols();
        let diagonal = |(j, column): (usize, &Mat<f64>)| (0..block).map(|i| column[(j * block + i, i)]).sum::<f64>();
        self.columns.iter().enumerate().map(diagonal).sum()
    }

    /// `V^T N V`, its symmetric (`sign` 1) or skew (-1) part.
    pub(crate) fn projected(&self, sign: f64) -> Mat<f64> {
        let (k, block) = (self.basis.cols(), self.tail.ncols());
        let entry = |i: usize, j: usize| {
            let column = &self.columns[j / block];
            if i < column.nrows() { column[(i, j % block)] } else { 0.0 }
        };
        Mat::from_fn(k, k, |i, j| (entry(i, j) + sign * entry(j, i)) / 2.0)
    }

    /// `V y`, orthonormal but for rounding.
    pub(crate) fn lift(&self, y: &Mat<f64>, par: Par) -> Panel<T> {
        times(self.basis.mat(), round::<T>(y.as_ref()).as_ref(), par)
    }
}

fn stack(upper: &Mat<f64>, lower: &Mat<f64>) -> Mat<f64> {
    let cut = upper.nrows();
    Mat::from_fn(cut + lower.nrows(), lower.ncols(), |i, j| if i < cut { upper[(i, j)] } else { lower[(i - cut, j)] })
}

/// The `rank` leading Ritz vectors of `A^T A`, and the next where there is one, in the coordinates of the basis, with
/// singular values.
struct Ritz {
    rank: usize,
    vectors: Mat<f64>,
    values: Vec<f64>,
    /// How `A^T A` takes the vectors out of the space, a column for each.
    coupled: Mat<f64>,
}

impl Ritz {
    fn solve<T: Real>(space: &Space<T>, rank: usize) -> Result<Self> {
        let (squares, vectors) = small::eigen(&space.projected(1.0))?;
        let count = squares.len().min(rank + 1);
        let values = squares[..count].iter().map(|x| x.max(0.0).sqrt()).collect();
        let vectors = vectors.subcols(0, count).to_owned();
        let block = space.tail.ncols();
        let coupled = &space.tail * vectors.subrows(vectors.nrows() - block, block);
        Ok(Self { rank, vectors, values, coupled })
    }

    fn leading(&self) -> Mat<f64> {
        self.vectors.subcols(0, self.rank).to_owned()
    }

    fn next(&self) -> f64 {
        self.values.get(self.rank).copied().unwrap_or(0.0)
    }

    /// `||A^T u - sigma v||`, which is `||A^T A v - sigma^2 v|| / sigma`, where the numerator is only right to `noise`.
    fn residuals(&self, noise: f64) -> Vec<f64> {
        let residual = |(j, sigma): (usize, &f64)| {
            let miss = self.coupled.col(j).norm_l2().hypot(noise);
            (miss / sigma.max(f64::MIN_POSITIVE)).min(miss.sqrt())
        };
        self.values[..self.rank].iter().enumerate().map(residual).collect()
    }
}

/// `P` and its Ritz values from the Ritz vectors of `A A^T`, `images` being `A^T V`.
fn other_side<T: Real>(
    op: &impl Operator<T>,
    space: &Space<T>,
    images: &Basis<T>,
    ritz: Ritz,
    par: Par,
) -> Result<(Panel<T>, Ritz)> {
    let count = ritz.values.len();
    // A value that is rounding of the largest has a direction that is noise: it is not blown up to the length of one.
    let least = T::EPS.sqrt() * ritz.values[0];
    let inverse = |j: usize| 1.0 / ritz.values[j].max(least).max(f64::MIN_POSITIVE);
    let outside = Mat::from_fn(ritz.coupled.nrows(), count, |i, j| ritz.coupled[(i, j)] * inverse(j));
    let mut inside = outside.transpose() * &outside;
    (0..count).for_each(|j| inside[(j, j)] += ritz.values[j].powi(2));
    let (squares, turn) = small::eigen(&inside)?;
    let weighted = Mat::from_fn(ritz.vectors.nrows(), count, |i, j| ritz.vectors[(i, j)] * inverse(j));
    let right = weighted * &turn;
    // With the vector after the last, whose part of what leaves is no residual: the turn has taken it in.
    let mut right = times(images.mat(), round::<T>(right.as_ref()).as_ref(), par);
    let orthonormal = cholesky_step(&mut right, par).is_some_and(|r| (0..count).all(|j| r[(j, j)] > 0.7));
    if !orthonormal {
        right = orthonormalize(right, par);
    }
    let values = squares.into_iter().map(|x| x.max(0.0).sqrt()).collect();
    let mut leaving: Panel<T> = op.adjoint(&space.next, par);
    let within = cross(right.mat(), leaving.mat(), par);
    leaving.subtract(right.mat(), within.as_ref(), par);
    // Any K with K^T K its Gram matrix gives the norms.
    let (squares, axes) = small::eigen(&leaving.gram(par))?;
    let root = Mat::from_fn(squares.len(), squares.len(), |i, j| squares[i].max(0.0).sqrt() * axes[(j, i)]);
    let coupled = root * outside * turn;
    let right = Panel::from_mat(right.mat().subcols(0, ritz.rank));
    Ok((right, Ritz { values, coupled, ..ritz }))
}

fn finish<T: Real>(
    op: &impl Operator<T>,
    (mut right, mut ritz): (Panel<T>, Ritz),
    want_left: bool,
    mut work: Work,
    par: Par,
) -> Result<Truncated<T>> {
    let next = ritz.next();
    ritz.values.truncate(ritz.rank);
    let mut left = None;
    if want_left {
        // A V = Q R, R = X diag(sigma) Y^T: small values too are right to eps ||A||, which A^T A does not hold.
        let (q, r) = orthonormalize_with_r(op.apply(&right, par), par);
        let (x, refined, y) = small::svd(&r)?;
        ritz.values = refined;
        ritz.coupled = ritz.coupled.subcols(0, ritz.rank) * &y;
        right = times(right.mat(), round::<T>(y.as_ref()).as_ref(), par);
        polish(&mut right, par);
        let mut turned = times(q.mat(), round::<T>(x.as_ref()).as_ref(), par);
        polish(&mut turned, par);
        left = Some(turned);
        work = work + Work::of(1, ritz.rank);
    }
    fix_signs(&mut right, left.as_mut());
    // More depth does not mend this, so it is no part of the estimate that stops the search.
    let residuals = ritz.residuals(ROUNDING * T::EPS * ritz.values[0].powi(2));
    Ok(Truncated { left, right, values: ritz.values, next: Some(next), residuals, work })
}

/// Makes the largest entry of each right vector positive (the first of equals) and turns the left with it.
pub(crate) fn fix_signs<T: Real>(right: &mut Panel<T>, left: Option<&mut Panel<T>>) {
    let flips: Vec<bool> =
        largest_rows(right).into_iter().enumerate().map(|(j, i)| right.at(i, j).f64() < 0.0).collect();
    for panel in [Some(right), left].into_iter().flatten() {
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

    const PARAMS: Params = Params { tol: None, seed: 0, left: true };

    fn solve<T: Real>(a: &Panel<T>, rank: usize, params: Params) -> Truncated<T> {
        let view = View::row_major(&a.data, a.rows, a.cols);
        let scan = view.scan("a", Par::Seq).unwrap();
        assert_eq!(scan.exponent, 0, "the tests here are at unit scale");
        truncated_svd(&Dense::new(view, 0), scan.square, call(rank, params)).unwrap().unwrap()
    }

    fn call(rank: usize, params: Params) -> Call<'static> {
        Call { rank, params, control: &Free, par: Par::Seq }
    }

    fn unit(a: Panel<f64>) -> Panel<f64> {
        let largest = a.data.iter().fold(0.0f64, |m, x| m.max(x.abs()));
        a.scaled(0.7 / largest)
    }

    #[test]
    fn energy_on_decaying_spectra() {
        for (power, rank, most) in
            [(0.5, 4, CLOSE), (0.5, 16, CLOSE), (0.5, 64, CLOSE), (1.0, 16, 1e-4), (1.0, 64, 1e-5)]
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
        for (m, n, rank, power, tol) in [
            (600, 500, 12, 0.3, 1e-3),
            (500, 600, 12, 0.3, 1e-6),
            (800, 700, SHORT_PAYS, 1.0, 1e-4),
            (700, 800, SHORT_PAYS, 1.0, 1e-4),
        ] {
            let a = unit(with_spectrum(m, n, 5, |i| i.powf(-power)));
            let exact = singular_values(&a);
            let best: f64 = exact[..rank].iter().map(|x| x * x).sum();
            for left in [true, false] {
                let found = solve(&a, rank, Params { tol: Some(tol), seed: 2, left });
                let kept: f64 = found.values.iter().map(|x| x * x).sum();
                assert!(1.0 - kept / best < tol, "{tol}: {:e}", 1.0 - kept / best);
                assert!(found.next.unwrap() <= exact[rank] * (1.0 + 1e-9));
                assert!((captured(&a, &found.right.cast()) - kept).abs() < 1e-6 * kept);
                let images = a.mat() * found.right.mat();
                let back = a.mat().transpose() * &images;
                for j in 0..rank {
                    let sigma = found.values[j];
                    assert!((images.col(j).norm_l2() - sigma).abs() < 1e-12);
                    let miss = |i: usize| back[(i, j)] / sigma - sigma * found.right.at(i, j);
                    let miss = (0..n).map(|i| miss(i).powi(2)).sum::<f64>().sqrt();
                    assert!((miss - found.residuals[j]).abs() < 3e-12, "{m}x{n}: {miss:e} {:e}", found.residuals[j]);
                    if let Some(left) = &found.left {
                        let apart = |i: usize| images[(i, j)] - sigma * left.at(i, j);
                        assert!((0..m).all(|i| apart(i).abs() < 1e-12));
                    }
                }
            }
        }
    }

    #[test]
    fn low_rank_is_found_exactly() {
        // Breakdown in the first blocks: what is left after rank 5 is rounding, and must be completed.
        for (m, n, rank, true_rank) in
            [(300, 260, 5, 5), (300, 260, 9, 5), (300, 260, 12, 1), (500, 600, SHORT_PAYS, 5)]
        {
            let a = unit(with_spectrum(m, n, 7, |i| if i <= f64::from(true_rank) { 1.0 / i } else { 0.0 }));
            for found in [solve(&a, rank, PARAMS), {
                let f = solve(&a.cast::<f32>(), rank, PARAMS);
                Truncated {
                    left: f.left.map(|left| left.cast()),
                    right: f.right.cast(),
                    values: f.values,
                    next: f.next,
                    residuals: f.residuals,
                    work: f.work,
                }
            }] {
                assert!(orthogonality_error(&found.right) <= 50.0 * f64::from(f32::EPSILON));
                assert!(orthogonality_error(found.left.as_ref().unwrap()) <= 50.0 * f64::from(f32::EPSILON));
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
        let found = truncated_svd::<f64>(&op, square, call(6, PARAMS)).unwrap().unwrap();
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
        let stopped = truncated_svd::<f32>(&op, 1.0, Call { control: &Stop, ..call(4, PARAMS) });
        assert_eq!(stopped.err(), Some(crate::Error::Interrupted));
    }
}
