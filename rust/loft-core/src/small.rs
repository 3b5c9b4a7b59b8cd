//! The small dense problems, all in f64 and on one thread.
//!
//! Cholesky `G = R^T R`, the inverse of a triangle, and the SVD and the symmetric eigenproblem of projected matrices.

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

/// `G = V diag(lambda) V^T` of a symmetric matrix (its lower half is read), `lambda` descending.
pub(crate) fn eigen(gram: &Mat<f64>) -> Result<(Vec<f64>, Mat<f64>)> {
    let eigen = gram.self_adjoint_eigen(faer::Side::Lower).map_err(|_| Error::NoConvergence("a small eigenproblem"))?;
    let values = eigen.S().column_vector().iter().rev().copied().collect();
    Ok((values, eigen.U().reverse_cols().to_owned()))
}

/// Where numbers carry more rounding than this, a Gram matrix in f64 loses nothing that they hold.
pub(crate) const SQUARE_HIDES: f64 = 1e-10;
