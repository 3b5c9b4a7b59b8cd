//! Tall row-major panels and the few products that the solvers need, cut into fixed row blocks.
//!
//! `Y = A X` and `Y -= Q C` are independent per row block; `C = Q^T Y` is summed over row blocks in
//! order; the Gram matrix `Y^T Y` is accumulated in f64.

use faer::linalg::matmul::matmul;
use faer::{Accum, Mat, MatMut, MatRef};

use crate::par::Par;
use crate::scalar::Real;

/// Rows of a block of work; independent of the thread count, so that results are too.
pub(crate) const BLOCK: usize = 192;

/// A row-major `rows x cols` matrix that is owned.
#[derive(Debug, Clone, PartialEq)]
pub struct Panel<T> {
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    pub(crate) data: Vec<T>,
}

impl<T: Real> Panel<T> {
    /// Zeros.
    pub fn zeros(rows: usize, cols: usize) -> Self {
        Self { rows, cols, data: vec![T::default(); rows * cols] }
    }

    /// From entries, row after row.
    ///
    /// # Panics
    /// If `data` has other than `rows * cols` entries.
    pub fn from_rows(rows: usize, cols: usize, data: Vec<T>) -> Self {
        assert_eq!(data.len(), rows * cols);
        Self { rows, cols, data }
    }

    /// Copies any matrix, rounding to `T`.
    pub(crate) fn from_mat<S: Real>(a: MatRef<'_, S>) -> Self {
        let mut panel = Self::zeros(a.nrows(), a.ncols());
        for i in 0..a.nrows() {
            for j in 0..a.ncols() {
                panel.data[i * a.ncols() + j] = T::of(a[(i, j)].f64());
            }
        }
        panel
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of columns.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Entries, row after row.
    pub fn data(&self) -> &[T] {
        &self.data
    }

    /// The entries themselves.
    pub fn into_data(self) -> Vec<T> {
        self.data
    }

    /// Entry (i, j).
    pub fn at(&self, i: usize, j: usize) -> T {
        self.data[i * self.cols + j]
    }

    pub(crate) fn mat(&self) -> MatRef<'_, T> {
        MatRef::from_row_major_slice(&self.data, self.rows, self.cols)
    }

    /// The same numbers in the other precision.
    pub(crate) fn cast<S: Real>(&self) -> Panel<S> {
        Panel { rows: self.rows, cols: self.cols, data: self.data.iter().map(|x| S::of(x.f64())).collect() }
    }

    /// The transpose, row-major again.
    pub fn transposed(&self) -> Self {
        Self::from_mat(self.mat().transpose())
    }

    pub(crate) fn scaled(&self, factor: f64) -> Self {
        let factor = T::of(factor);
        Self { rows: self.rows, cols: self.cols, data: self.data.iter().map(|x| *x * factor).collect() }
    }

    pub(crate) fn each_row(&mut self, par: Par, work: impl Fn(usize, &mut [T]) + Sync + Send) {
        let cols = self.cols.max(1);
        par.chunks(&mut self.data, BLOCK * cols, |block, chunk| {
            for (i, row) in chunk.chunks_mut(cols).enumerate() {
                work(block * BLOCK + i, row);
            }
        });
    }

    /// Calls `work(first row, rows of the block)` on every block.
    pub(crate) fn each_block(&mut self, par: Par, work: impl Fn(usize, MatMut<'_, T>) + Sync + Send) {
        let cols = self.cols.max(1);
        par.chunks(&mut self.data, BLOCK * cols, |block, chunk| {
            let rows = chunk.len() / cols;
            work(block * BLOCK, MatMut::from_row_major_slice_mut(chunk, rows, cols));
        });
    }

    /// `self -= Q C`.
    pub(crate) fn subtract(&mut self, q: MatRef<'_, T>, c: MatRef<'_, T>, par: Par) {
        self.each_block(par, |start, block| {
            let rows = q.subrows(start, block.nrows());
            matmul(block, Accum::Add, rows, c, T::of(-1.0), faer::Par::Seq);
        });
    }

    /// Column norms, in f64.
    pub(crate) fn norms(&self) -> Vec<f64> {
        let mut squares = vec![0.0; self.cols];
        for row in self.data.chunks(self.cols.max(1)) {
            row.iter().zip(&mut squares).for_each(|(x, s)| *s += x.f64() * x.f64());
        }
        squares.into_iter().map(f64::sqrt).collect()
    }

    /// `self^T self`, accumulated in f64.
    pub(crate) fn gram(&self, par: Par) -> Mat<f64> {
        let k = self.cols;
        let parts = par.map(self.rows.div_ceil(BLOCK), |block| {
            let start = block * BLOCK;
            let rows = BLOCK.min(self.rows - start);
            let wide: Vec<f64> = self.data[start * k..(start + rows) * k].iter().map(|x| x.f64()).collect();
            let wide = MatRef::from_row_major_slice(&wide, rows, k);
            let mut part = Mat::zeros(k, k);
            matmul(part.as_mut(), Accum::Replace, wide.transpose(), wide, 1.0, faer::Par::Seq);
            part
        });
        sum(parts, k, k)
    }
}

/// `A X`, a block of rows at a time.
pub(crate) fn times<T: Real>(a: MatRef<'_, T>, x: MatRef<'_, T>, par: Par) -> Panel<T> {
    let mut out = Panel::zeros(a.nrows(), x.ncols());
    out.each_block(par, |start, block| {
        let rows = a.subrows(start, block.nrows());
        matmul(block, Accum::Replace, rows, x, T::of(1.0), faer::Par::Seq);
    });
    out
}

/// `Q^T Y`, both tall: summed over blocks of rows, in order.
pub(crate) fn cross<T: Real>(q: MatRef<'_, T>, y: MatRef<'_, T>, par: Par) -> Mat<T> {
    const ROWS: usize = 4 * BLOCK;
    let parts = par.map(q.nrows().div_ceil(ROWS), |block| {
        let start = block * ROWS;
        let rows = ROWS.min(q.nrows() - start);
        let mut part = Mat::zeros(q.ncols(), y.ncols());
        let (q, y) = (q.subrows(start, rows), y.subrows(start, rows));
        matmul(part.as_mut(), Accum::Replace, q.transpose(), y, T::of(1.0), faer::Par::Seq);
        part
    });
    sum(parts, q.ncols(), y.ncols())
}

fn sum<T: Real>(parts: Vec<Mat<T>>, rows: usize, cols: usize) -> Mat<T> {
    parts.into_iter().reduce(|total, part| total + part).unwrap_or_else(|| Mat::zeros(rows, cols))
}

/// Rounds a small f64 matrix to `T`.
pub(crate) fn round<T: Real>(a: MatRef<'_, f64>) -> Mat<T> {
    Mat::from_fn(a.nrows(), a.ncols(), |i, j| T::of(a[(i, j)]))
}

/// An orthonormal basis that grows by blocks of columns, row-major with room to spare.
#[derive(Debug)]
pub(crate) struct Basis<T> {
    rows: usize,
    room: usize,
    cols: usize,
    data: Vec<T>,
}

impl<T: Real> Basis<T> {
    pub(crate) fn new(rows: usize, room: usize) -> Self {
        Self { rows, room, cols: 0, data: vec![T::default(); rows * room] }
    }

    pub(crate) fn cols(&self) -> usize {
        self.cols
    }

    pub(crate) fn mat(&self) -> MatRef<'_, T> {
        MatRef::from_row_major_slice_with_stride(&self.data, self.rows, self.cols, self.room.max(1))
    }

    pub(crate) fn push(&mut self, block: &Panel<T>) {
        if self.cols + block.cols > self.room {
            self.widen((2 * self.room).max(self.cols + block.cols));
        }
        for (to, from) in self.data.chunks_mut(self.room).zip(block.data.chunks(block.cols)) {
            to[self.cols..self.cols + block.cols].copy_from_slice(from);
        }
        self.cols += block.cols;
    }

    fn widen(&mut self, room: usize) {
        let mut data = vec![T::default(); self.rows * room];
        for (to, from) in data.chunks_mut(room).zip(self.data.chunks(self.room.max(1))) {
            to[..self.cols].copy_from_slice(&from[..self.cols]);
        }
        (self.room, self.data) = (room, data);
    }
}
