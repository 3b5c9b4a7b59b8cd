//! The small dense problems, all in f64 and on one thread.
//!
//! Cholesky `G = R^T R`, the inverse of a triangle, and the SVD of the projected matrix.

use faer::Mat;

use crate::error::{Error, Result};

/// The upper Cholesky factor, or `None` when a pivot falls below `limit` times its diagonal entry.
pub(crate) fn cholesky(gram: &Mat<f64>, limit: f64) -> Option<Mat<f64>> {
    let k = gram.ncols();
    // Columns of R are contiguous, so the inner product below runs over two of them.
    let mut r = Mat::<f64>::zeros(k, k);
    for j in 0..k {
        for i in 0..=j {
            let dot: f64 = (0..i).map(|l| r[(l, i)] * r[(l, j)]).sum();
            let rest = gram[(i, j)] - dot;
            if i < j {
                r[(i, j)] = rest / r[(i, i)];
            } else if rest > limit * gram[(j, j)] && rest.is_finite() {
                r[(j, j)] = rest.sqrt();
            } else {
                return None;
            }
        }
    }
    Some(r)
}

/// The inverse of an upper triangle with a nonzero diagonal.
pub(crate) fn inverse_upper(r: &Mat<f64>) -> Mat<f64> {
    let mut inverse = Mat::<f64>::identity(r.nrows(), r.ncols());
    faer::linalg::triangular_solve::solve_upper_triangular_in_place(r.as_ref(), inverse.as_mut(), faer::Par::Seq);
    inverse
}

/// `A = U diag(s) V^T` with `s` descending; thin.
pub(crate) fn svd(a: &Mat<f64>) -> Result<(Mat<f64>, Vec<f64>, Mat<f64>)> {
    let svd = a.thin_svd().map_err(|_| Error::NoConvergence("the SVD of a small matrix"))?;
    let values = svd.S().column_vector().iter().copied().collect();
    Ok((svd.U().to_owned(), values, svd.V().to_owned()))
}
