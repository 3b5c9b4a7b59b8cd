//! What results are held against, in f64, at unit scale (`2^-e A` with `e` the exponent of the largest entry).

use loft_core::{Panel, Real};

use crate::Matrix;

/// A matrix times `2^-exponent`, row after row.
pub struct Unit {
    pub rows: usize,
    pub cols: usize,
    pub exponent: i32,
    pub data: Vec<f64>,
}

impl Unit {
    pub fn of(matrix: &Matrix) -> Self {
        Self::new(matrix.rows, matrix.cols, matrix.entries())
    }

    pub fn new(rows: usize, cols: usize, mut data: Vec<f64>) -> Self {
        let largest = data.iter().fold(0.0f64, |m, x| m.max(x.abs()));
        let exponent = if largest > 0.0 && largest.is_finite() { largest.log2().floor() as i32 + 1 } else { 0 };
        let (half, rest) = (2f64.powi(-(exponent / 2)), 2f64.powi(-(exponent - exponent / 2)));
        data.iter_mut().for_each(|x| *x = *x * half * rest);
        Self { rows, cols, exponent, data }
    }

    pub fn transposed(&self) -> Self {
        let data = (0..self.data.len()).map(|k| self.data[k % self.rows * self.cols + k / self.rows]).collect();
        Self { rows: self.cols, cols: self.rows, exponent: self.exponent, data }
    }

    pub fn square(&self) -> f64 {
        self.data.iter().map(|x| x * x).sum()
    }

    /// `A X` for a `cols x k` matrix.
    pub fn times(&self, x: &Self) -> Self {
        let mut data = vec![0.0; self.rows * x.cols];
        for (row, out) in self.data.chunks(self.cols.max(1)).zip(data.chunks_mut(x.cols.max(1))) {
            for (a, line) in row.iter().zip(x.data.chunks(x.cols.max(1))) {
                out.iter_mut().zip(line).for_each(|(y, x)| *y += a * x);
            }
        }
        Self { rows: self.rows, cols: x.cols, exponent: 0, data }
    }

    pub fn column(&self, j: usize) -> impl Iterator<Item = f64> + '_ {
        (0..self.rows).map(move |i| self.data[i * self.cols + j])
    }

    /// `A^T A` or `A A^T`, whichever is smaller.
    pub fn gram(&self) -> Self {
        let turned = self.transposed();
        if self.rows < self.cols { self.times(&turned) } else { turned.times(self) }
    }

    /// What rounding a value to a denormal may change at unit scale.
    pub fn denormal(exponent: i32) -> f64 {
        Self::scaled(f64::from_bits(1), exponent)
    }

    /// Whether values at this scale are neither rounded to denormals altogether nor too large for f64.
    pub fn holds(exponent: i32) -> bool {
        (-1070..1000).contains(&exponent)
    }

    /// A value of the core at unit scale.
    pub fn scaled(value: f64, exponent: i32) -> f64 {
        value * 2f64.powi(-(exponent / 2)) * 2f64.powi(-(exponent - exponent / 2))
    }
}

impl<T: Real> From<&Panel<T>> for Unit {
    fn from(panel: &Panel<T>) -> Self {
        let data = panel.data().iter().map(|x| x.f64()).collect();
        Self { rows: panel.rows(), cols: panel.cols(), exponent: 0, data }
    }
}

/// `(W^T G - G^T W) / 2`.
pub fn skew(w: &Unit, g: &Unit) -> Unit {
    let mut s = w.transposed().times(g);
    let n = s.rows;
    for i in 0..n {
        for j in 0..=i {
            let x = (s.data[i * n + j] - s.data[j * n + i]) / 2.0;
            (s.data[i * n + j], s.data[j * n + i]) = (x, -x);
        }
    }
    s
}

/// Eigenvalues of a symmetric matrix, descending, by Jacobi's rotations.
pub fn eigenvalues(mut a: Unit) -> Vec<f64> {
    let n = a.rows;
    let total = a.square();
    for _sweep in 0..60 {
        let off: f64 = (0..n * n).filter(|k| k / n != k % n).map(|k| a.data[k] * a.data[k]).sum();
        if off <= 1e-26 * total {
            break;
        }
        for p in 0..n {
            for q in p + 1..n {
                rotate(&mut a.data, n, p, q);
            }
        }
    }
    let mut values: Vec<f64> = (0..n).map(|i| a.data[i * n + i].max(0.0)).collect();
    values.sort_by(|x, y| y.total_cmp(x));
    values
}

fn rotate(a: &mut [f64], n: usize, p: usize, q: usize) {
    let off = a[p * n + q];
    if off == 0.0 {
        return;
    }
    let theta = (a[q * n + q] - a[p * n + p]) / (2.0 * off);
    let t = if theta.abs() > 1e150 { 0.5 / theta } else { theta.signum() / (theta.abs() + theta.hypot(1.0)) };
    let c = 1.0 / t.hypot(1.0);
    let s = t * c;
    for k in 0..n {
        let (x, y) = (a[k * n + p], a[k * n + q]);
        (a[k * n + p], a[k * n + q]) = (c * x - s * y, s * x + c * y);
    }
    for k in 0..n {
        let (x, y) = (a[p * n + k], a[q * n + k]);
        (a[p * n + k], a[q * n + k]) = (c * x - s * y, s * x + c * y);
    }
}

/// The sum of the `count` largest.
pub fn top(values: &[f64], count: usize) -> f64 {
    values[..count.min(values.len())].iter().sum()
}

/// `max |Q^T Q - I|` by entries is at most 50 eps in f32; in f64, where no bound is promised, 1000 eps.
pub fn check_orthonormal<T: Real>(what: &str, q: &Panel<T>, rows: usize, cols: usize) {
    assert_eq!((q.rows(), q.cols()), (rows, cols), "shape of {what}");
    let q = Unit::from(q);
    let gram = q.transposed().times(&q);
    let most = T::EPS * if T::EPS > 1e-10 { 50.0 } else { 1000.0 };
    for k in 0..cols * cols {
        let miss = (gram.data[k] - f64::from(u8::from(k / cols == k % cols))).abs();
        assert!(miss <= most, "{what} is not orthonormal: {miss:e} at ({}, {})", k / cols, k % cols);
    }
}

/// Not negative, descending, and finite wherever the largest possible value is.
pub fn check_values(values: &[f64], count: usize, representable: bool) {
    assert_eq!(values.len(), count);
    assert!(values.iter().all(|x| *x >= 0.0 && (x.is_finite() || !representable)), "values {values:?}");
    assert!(values.windows(2).all(|w| w[0] >= w[1]), "values do not descend: {values:?}");
}

/// A reported energy is a fraction, and the true one.
pub fn check_fraction(energy: f64, truth: f64, slack: f64) {
    assert!((0.0..=1.0).contains(&energy), "energy {energy}");
    assert!((energy - truth).abs() <= slack, "energy {energy}, but {truth} was captured (slack {slack:e})");
}
