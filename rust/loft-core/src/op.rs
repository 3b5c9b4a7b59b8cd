//! Linear operators with a *block* apply, so that one solver serves dense, skew and stacked matrices.
//!
//! Dense: `A X`, `A^T Y`, `A^T A X`. Skew, matrix-free: `S X = (W^T (G X) - G^T (W X)) / 2`. Skew, formed: `S X`.
//! Stacked: `[A; B] X`. Operators work at unit scale: an input is applied as `2^-e A` with `e` from its
//! scan, so that products of 1e-30 or 1e30 entries neither under- nor overflow.
//!
//! `A^T A X` and matrix-free `S X` go through `sandwich`, which reads a row-major matrix once for both of its products. A strip of
//! columns, which `A A^T X` would need, lies in short pieces: to read it once took longer than two products (measured).

use std::ops::Range;

use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef};

use crate::control::Control;
use crate::error::Result;
use crate::panel::{BLOCK, Panel, times};
use crate::par::Par;
use crate::scalar::{Real, pow2};
use crate::view::View;

/// A matrix known by what it does to a block of vectors.
pub trait Operator<T: Real>: Sync {
    /// Number of rows.
    fn rows(&self) -> usize;
    /// Number of columns.
    fn cols(&self) -> usize;
    /// `A X` for a `cols x k` panel.
    fn apply(&self, x: &Panel<T>, par: Par) -> Panel<T>;
    /// `A^T Y` for a `rows x k` panel.
    fn adjoint(&self, y: &Panel<T>, par: Par) -> Panel<T>;
    /// `A^T A X` for a `cols x k` panel.
    fn normal(&self, x: &Panel<T>, par: Par) -> Panel<T> {
        self.adjoint(&self.apply(x, par), par)
    }
}

/// `2^-e A` for a borrowed matrix of any dtype and strides.
#[derive(Debug, Clone, Copy)]
pub struct Dense<'a> {
    pub(crate) view: View<'a>,
    pub(crate) exponent: i32,
    before: f64,
    after: f64,
}

/// Scales at which no product of two entries leaves the range of f32.
const ORDINARY: i32 = 40;

/// Where no more columns than this are multiplied, faer's sums depend on the strides; those matrices are copied.
const NARROW: usize = 16;

/// Depth of a tile: it and its panel rows stay in the second-level cache.
const DEPTH: usize = 256;

impl<'a> Dense<'a> {
    /// `2^-exponent` times the matrix.
    pub fn new(view: View<'a>, exponent: i32) -> Self {
        // Half of the scale on each side of the product keeps both factors inside the range of f32.
        let half = exponent / 2;
        Self { view, exponent, before: pow2(-half), after: pow2(half - exponent) }
    }

    /// The exponent that is taken out of copied rows; an ordinary one is left to the factor of the product.
    fn copied_at(&self) -> i32 {
        if self.exponent.abs() <= ORDINARY { 0 } else { self.exponent }
    }

    /// What is left of the scale after that.
    fn factor(&self) -> f64 {
        pow2(self.copied_at() - self.exponent)
    }

    /// Some rows but for `factor`, where they lie or copied.
    fn rows<'b, T: Real>(&self, rows: Range<usize>, room: &'b mut Vec<T>, par: Par) -> MatRef<'b, T>
    where
        'a: 'b,
    {
        let wide = self.view.cols() > NARROW;
        if let Some(whole) = self.view.direct::<T>().filter(|_| wide && self.copied_at() == 0) {
            return whole.subrows(rows.start, rows.len());
        }
        *room = self.view.part(rows.clone()).copied(self.copied_at(), par);
        MatRef::from_row_major_slice(room, rows.len(), self.view.cols())
    }

    fn product<T: Real>(&self, view: View<'_>, x: &Panel<T>, par: Par) -> Panel<T> {
        let scaled;
        let x = if self.before == 1.0 {
            x
        } else {
            scaled = x.scaled(self.before);
            &scaled
        };
        let mut out = Panel::zeros(view.rows(), x.cols);
        // The kernel broadcasts along rows of A; where those are not contiguous a copied tile is twice as fast.
        let direct = view.direct::<T>().filter(|a| a.col_stride() == 1);
        out.each_block(par, |start, block| match direct {
            Some(a) => in_place(a, start, block, x),
            None => tiled(view, start, block, x),
        });
        if self.after != 1.0 {
            let after = T::of(self.after);
            out.data.iter_mut().for_each(|y| *y *= after);
        }
        out
    }
}

/// Rows `start..` of `A X`, in the same steps as `tiled`, so that the bits do not depend on the strides.
fn in_place<T: Real>(a: MatRef<'_, T>, start: usize, mut block: MatMut<'_, T>, x: &Panel<T>) {
    let rows = a.subrows(start, block.nrows());
    for from in (0..a.ncols()).step_by(DEPTH) {
        let depth = DEPTH.min(a.ncols() - from);
        let part = rows.subcols(from, depth);
        matmul(block.as_mut(), Accum::Add, part, x.mat().subrows(from, depth), T::of(1.0), faer::Par::Seq);
    }
}

/// Rows `start..` of `A X`, each tile of `A` copied (and widened) into the cache first.
fn tiled<T: Real>(view: View<'_>, start: usize, mut block: MatMut<'_, T>, x: &Panel<T>) {
    let rows = block.nrows();
    let mut room = Vec::<T>::new();
    for from in (0..view.cols()).step_by(DEPTH) {
        let depth = DEPTH.min(view.cols() - from);
        let tile = view.stored_tile(start..start + rows, from..from + depth, &mut room);
        matmul(block.as_mut(), Accum::Add, tile, x.mat().subrows(from, depth), T::of(1.0), faer::Par::Seq);
    }
}

impl<T: Real> Operator<T> for Dense<'_> {
    fn rows(&self) -> usize {
        self.view.rows()
    }

    fn cols(&self) -> usize {
        self.view.cols()
    }

    fn apply(&self, x: &Panel<T>, par: Par) -> Panel<T> {
        self.product(self.view, x, par)
    }

    fn adjoint(&self, y: &Panel<T>, par: Par) -> Panel<T> {
        self.product(self.view.transpose(), y, par)
    }

    fn normal(&self, x: &Panel<T>, par: Par) -> Panel<T> {
        if self.view.by_column() {
            return self.adjoint(&self.apply(x, par), par);
        }
        sandwich(&[*self], &[(0, 0, 1.0)], x, par)
    }
}

/// Rows that are copied (and widened) at a time: they stay in the cache for every product that reads them.
const ROWS: usize = 64;

/// Partial sums of a sandwich, whatever the thread count.
const GROUPS: usize = 8;

/// `sum f A_l^T (A_r X)` over the terms `(l, r, f)`, for row-major matrices of one shape: each is read once.
fn sandwich<T: Real>(mats: &[Dense<'_>], terms: &[(usize, usize, f64)], x: &Panel<T>, par: Par) -> Panel<T> {
    let (m, n, cols) = (mats[0].view.rows(), mats[0].view.cols(), x.cols);
    let group = m.div_ceil(GROUPS).next_multiple_of(ROWS);
    // No power of two, so that neighbouring rows do not evict each other from the cache.
    let stride = n.next_multiple_of(8) + 8;
    // Where the first product can read the matrix itself, its arithmetic hides the memory's latency from the copy.
    let whole: Option<Vec<_>> =
        mats.iter().map(|mat| mat.view.direct::<T>().filter(|_| mat.copied_at() == 0)).collect();
    let room = || (vec![vec![T::default(); ROWS * stride]; mats.len()], vec![Panel::zeros(ROWS, cols); terms.len()]);
    let parts = par.map_with(m.div_ceil(group), room, |(rooms, images), g| {
        let mut sum = Panel::<T>::zeros(n, cols);
        let end = ((g + 1) * group).min(m);
        for start in (g * group..end).step_by(ROWS) {
            let rows = ROWS.min(end - start);
            let copy = |rooms: &mut [Vec<T>]| {
                for (mat, room) in mats.iter().zip(rooms) {
                    mat.view.scaled_rows(start..start + rows, mat.copied_at(), stride, room);
                }
            };
            if whole.is_none() {
                copy(rooms);
            }
            for ((_, right, _), image) in terms.iter().zip(images.iter_mut()) {
                let a = whole.as_ref().map_or_else(
                    || MatRef::from_row_major_slice_with_stride(&rooms[*right][..rows * stride], rows, n, stride),
                    |whole| whole[*right].subrows(start, rows),
                );
                let image = MatMut::from_row_major_slice_mut(&mut image.data[..rows * cols], rows, cols);
                matmul(image, Accum::Replace, a, x.mat(), T::of(mats[*right].factor()), faer::Par::Seq);
            }
            if whole.is_some() {
                copy(rooms);
            }
            for ((left, _, factor), image) in terms.iter().zip(images.iter()) {
                let a = MatRef::from_row_major_slice_with_stride(&rooms[*left][..rows * stride], rows, n, stride);
                let image = MatRef::from_row_major_slice(&image.data[..rows * cols], rows, cols);
                let sum = MatMut::from_row_major_slice_mut(&mut sum.data, n, cols);
                let factor = T::of(factor * mats[*left].factor());
                matmul(sum, Accum::Add, a.transpose(), image, factor, faer::Par::Seq);
            }
        }
        sum
    });
    let mut total = Panel::zeros(n, x.cols);
    par.chunks(&mut total.data, BLOCK * x.cols, |block, chunk| {
        for part in &parts {
            let start = block * BLOCK * x.cols;
            chunk.iter_mut().zip(&part.data[start..]).for_each(|(total, part)| *total += *part);
        }
    });
    total
}

/// `S = (W^T G - G^T W) / 2`, `n x n`, as the solvers hand it on: by its factors, both `m x n`.
/// As an operator it is never formed: 8 m n operations a column.
#[derive(Debug, Clone, Copy)]
pub struct SkewProduct<'a> {
    /// `W`.
    pub weight: Dense<'a>,
    /// `G`.
    pub grad: Dense<'a>,
}

impl<T: Real> Operator<T> for SkewProduct<'_> {
    fn rows(&self) -> usize {
        self.weight.view.cols()
    }

    fn cols(&self) -> usize {
        self.weight.view.cols()
    }

    fn apply(&self, x: &Panel<T>, par: Par) -> Panel<T> {
        if !self.weight.view.by_column() && !self.grad.view.by_column() {
            return sandwich(&[self.weight, self.grad], &[(0, 1, 0.5), (1, 0, -0.5)], x, par);
        }
        let mut out = self.weight.adjoint(&self.grad.apply(x, par), par);
        let other: Panel<T> = self.grad.adjoint(&self.weight.apply(x, par), par);
        let half = T::of(0.5);
        out.data.iter_mut().zip(&other.data).for_each(|(a, b)| *a = (*a - *b) * half);
        out
    }

    fn adjoint(&self, y: &Panel<T>, par: Par) -> Panel<T> {
        negated(self.apply(y, par))
    }
}

/// Operations that a stop may have to wait for.
const BETWEEN_CHECKS: f64 = 2e10;

/// Rows of W and G that are multiplied at a time: with fewer the product, which is read and written for each, would wait for
/// the memory.
const DEEP: usize = 1024;

/// A skew matrix that was formed: 2 n^2 operations a column.
#[derive(Debug, Clone)]
pub struct SkewDense<T> {
    pub(crate) matrix: Panel<T>,
}

impl<T: Real> SkewDense<T> {
    /// Forms `S = (W^T G - G^T W) / 2`, a block of rows at a time: 2 m n^2 operations.
    ///
    /// # Errors
    /// What `control` returns.
    pub fn form(skew: SkewProduct<'_>, control: &dyn Control, par: Par) -> Result<Self> {
        let SkewProduct { weight, grad } = skew;
        let (m, n) = (weight.view.rows(), weight.view.cols());
        let mut product = Panel::zeros(n, n);
        let factor = T::of(weight.factor() * grad.factor());
        let part = BLOCK * ((BETWEEN_CHECKS / (2.0 * (DEEP * n * BLOCK) as f64)) as usize).max(2);
        for start in (0..m).step_by(DEEP) {
            let some = start..(start + DEEP).min(m);
            let [mut left, mut right] = [Vec::<T>::new(), Vec::new()];
            let (w, g) = (weight.rows(some.clone(), &mut left, par), grad.rows(some, &mut right, par));
            for (p, rows) in product.data.chunks_mut(part * n).enumerate() {
                control.check()?;
                par.chunks(rows, BLOCK * n, |block, chunk| {
                    let rows = chunk.len() / n;
                    let w = w.transpose().subrows(p * part + block * BLOCK, rows);
                    let chunk = MatMut::from_row_major_slice_mut(chunk, rows, n);
                    matmul(chunk, Accum::Add, w, g, factor, faer::Par::Seq);
                });
            }
        }
        let mut matrix = Panel::zeros(product.rows, product.cols);
        let half = T::of(0.5);
        matrix.each_row(par, |i, row| {
            for (j, x) in row.iter_mut().enumerate() {
                *x = (product.at(i, j) - product.at(j, i)) * half;
            }
        });
        Ok(Self { matrix })
    }

    /// `||S||_F^2`, in f64.
    pub(crate) fn square(&self) -> f64 {
        self.matrix.norms().iter().map(|x| x * x).sum()
    }
}

impl<T: Real> Operator<T> for SkewDense<T> {
    fn rows(&self) -> usize {
        self.matrix.rows
    }

    fn cols(&self) -> usize {
        self.matrix.cols
    }

    fn apply(&self, x: &Panel<T>, par: Par) -> Panel<T> {
        times(self.matrix.mat(), x.mat(), par)
    }

    fn adjoint(&self, y: &Panel<T>, par: Par) -> Panel<T> {
        negated(self.apply(y, par))
    }
}

/// `[A; B]`, for layers that share one input.
#[derive(Debug, Clone, Copy)]
pub struct Stacked<'o, A, B> {
    /// The upper rows.
    pub upper: &'o A,
    /// The lower rows, with as many columns.
    pub lower: &'o B,
}

impl<T: Real, A: Operator<T>, B: Operator<T>> Operator<T> for Stacked<'_, A, B> {
    fn rows(&self) -> usize {
        self.upper.rows() + self.lower.rows()
    }

    fn cols(&self) -> usize {
        self.upper.cols()
    }

    fn apply(&self, x: &Panel<T>, par: Par) -> Panel<T> {
        let mut out = self.upper.apply(x, par);
        let lower = self.lower.apply(x, par);
        out.rows += lower.rows;
        out.data.extend(lower.data);
        out
    }

    fn adjoint(&self, y: &Panel<T>, par: Par) -> Panel<T> {
        let (upper, lower) = y.data.split_at(self.upper.rows() * y.cols);
        let part = |rows, data: &[T]| Panel::from_rows(rows, y.cols, data.to_vec());
        let mut out = self.upper.adjoint(&part(self.upper.rows(), upper), par);
        let other = self.lower.adjoint(&part(self.lower.rows(), lower), par);
        out.data.iter_mut().zip(&other.data).for_each(|(a, b)| *a += *b);
        out
    }
}

fn negated<T: Real>(mut panel: Panel<T>) -> Panel<T> {
    panel.data.iter_mut().for_each(|x| *x = -*x);
    panel
}
