//! Linear operators with a *block* apply, so that one solver serves dense, skew and stacked matrices.
//!
//! Dense: `A X`, `A^T Y`. Skew, matrix-free: `S X = (W^T (G X) - G^T (W X)) / 2`. Skew, formed: `S X`.
//! Stacked: `[A; B] X`. Operators work at unit scale: an input is applied as `2^-e A` with `e` from its
//! scan, so that products of 1e-30 or 1e30 entries neither under- nor overflow.

use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef};

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
}

/// `2^-e A` for a borrowed matrix of any dtype and strides.
#[derive(Debug, Clone, Copy)]
pub struct Dense<'a> {
    view: View<'a>,
    before: f64,
    after: f64,
}

/// Depth of a tile: it and its panel rows stay in the second-level cache.
const DEPTH: usize = 512;

impl<'a> Dense<'a> {
    /// `2^-exponent` times the matrix.
    pub fn new(view: View<'a>, exponent: i32) -> Self {
        // Half of the scale on each side of the product keeps both factors inside the range of f32.
        let half = exponent / 2;
        Self { view, before: pow2(-half), after: pow2(half - exponent) }
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
        let direct = view.direct::<T>();
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
    let mut tile = vec![T::default(); rows * DEPTH.min(view.cols())];
    for from in (0..view.cols()).step_by(DEPTH) {
        let depth = DEPTH.min(view.cols() - from);
        let tile = view.stored_tile(start..start + rows, from..from + depth, &mut tile);
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
}

/// `S = (W^T G - G^T W) / 2`, never formed: 8 m n operations a column.
#[derive(Debug, Clone, Copy)]
pub struct SkewProduct<'a> {
    weight: Dense<'a>,
    grad: Dense<'a>,
}

impl<'a> SkewProduct<'a> {
    /// From two operators of the same shape `(m, n)`.
    pub fn new(weight: Dense<'a>, grad: Dense<'a>) -> Self {
        Self { weight, grad }
    }
}

impl<T: Real> Operator<T> for SkewProduct<'_> {
    fn rows(&self) -> usize {
        self.weight.view.cols()
    }

    fn cols(&self) -> usize {
        self.weight.view.cols()
    }

    fn apply(&self, x: &Panel<T>, par: Par) -> Panel<T> {
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

/// A skew matrix that was formed: 2 n^2 operations a column.
#[derive(Debug, Clone)]
pub struct SkewDense<T> {
    pub(crate) matrix: Panel<T>,
}

impl<T: Real> SkewDense<T> {
    /// Forms `(W^T G - G^T W) / 2` from row-major `W` and `G`: 2 m n^2 operations.
    pub fn form(weight: &Panel<T>, grad: &Panel<T>, par: Par) -> Self {
        let product = times(weight.mat().transpose(), grad.mat(), par);
        let mut matrix = Panel::zeros(product.rows, product.cols);
        let half = T::of(0.5);
        matrix.each_row(par, |i, row| {
            for (j, x) in row.iter_mut().enumerate() {
                *x = (product.at(i, j) - product.at(j, i)) * half;
            }
        });
        Self { matrix }
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

const _: () = assert!(BLOCK * DEPTH * size_of::<f32>() <= 1 << 20);
