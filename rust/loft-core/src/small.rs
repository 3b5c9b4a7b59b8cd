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

/// `G = V diag(lambda) V^T` of a Gram matrix (its lower half is read), `lambda` descending.
pub(crate) fn eigen(gram: &Mat<f64>) -> Result<(Vec<f64>, Mat<f64>)> {
    // faer may not converge where most of G is zero (found by fuzzing): its QR steps stop relative to the neighbouring
    // diagonal entries, which are rounding there. G + c I has the same vectors, and none so small.
    let largest = (0..gram.nrows()).map(|i| gram[(i, i)]).fold(0.0, f64::max);
    let shifted = || gram + Mat::<f64>::identity(gram.nrows(), gram.ncols()) * faer::Scale(largest);
    let (eigen, shift) = gram
        .self_adjoint_eigen(faer::Side::Lower)
        .map(|eigen| (eigen, 0.0))
        .or_else(|_| shifted().self_adjoint_eigen(faer::Side::Lower).map(|eigen| (eigen, largest)))
        .map_err(|_| Error::NoConvergence("a small eigenproblem"))?;
    let values = eigen.S().column_vector().iter().rev().map(|x| x - shift).collect();
    Ok((values, eigen.U().reverse_cols().to_owned()))
}

/// Where numbers carry more rounding than this, a Gram matrix in f64 loses nothing that they hold.
pub(crate) const SQUARE_HIDES: f64 = 1e-10;

#[cfg(test)]
mod tests {
    use super::*;

    /// The Gram matrix of a gradient with 23 nonzero entries, all in seven columns of 309.
    #[test]
    fn found_by_fuzzing() {
        const PLACES: [usize; 7] = [49, 124, 131, 203, 269, 285, 304];
        const QUARTERS: [[i8; 7]; 7] = [
            [1, 0, -1, 0, 0, 0, -1],
            [0, 1, 1, 1, 0, 0, 1],
            [-1, 1, 2, 1, 0, 0, 2],
            [0, 1, 1, 1, 0, 0, 1],
            [0, 0, 0, 0, 1, 0, 1],
            [0, 0, 0, 0, 0, 1, -1],
            [-1, 1, 2, 1, 1, -1, 16],
        ];
        let mut gram = Mat::<f64>::zeros(309, 309);
        for (i, row) in PLACES.iter().zip(QUARTERS) {
            PLACES.iter().zip(row).for_each(|(j, x)| gram[(*i, *j)] = f64::from(x) / 4.0);
        }
        let (values, v) = eigen(&gram).unwrap();
        let scaled = Mat::from_fn(309, 309, |i, j| v[(i, j)] * values[j]);
        assert!((&gram * &v - scaled).norm_max() < 309.0 * f64::EPSILON * gram.norm_l2());
        assert!((v.transpose() * &v - Mat::<f64>::identity(309, 309)).norm_max() < 309.0 * f64::EPSILON);
        assert!(values.windows(2).all(|w| w[0] >= w[1]));
    }
}
