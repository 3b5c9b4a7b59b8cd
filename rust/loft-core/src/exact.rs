//! The dense decomposition, for matrices so small or ranks so high that a Krylov space would fill them.
//!
//! From f64 input `A = U diag(sigma) V^T` by faer (bidiagonalisation, no Gram matrix), so trailing directions are right to
//! the rounding of f64 relative to sigma_1. From narrower input the eigenvectors of the smaller of `A^T A` and `A A^T`
//! in f64, which lose nothing that the input holds. Directions of a zero sigma are an orthonormal completion.

use faer::Mat;

use crate::control::{Control, abandonable};
use crate::error::Result;
use crate::krylov::{Call, Truncated, Work, fix_signs};
use crate::op::Dense;
use crate::orth::orthonormalize;
use crate::panel::{Panel, cross, times};
use crate::par::Par;
use crate::scalar::Real;
use crate::small::{self, SQUARE_HIDES};

/// The `call.rank` leading triplets of `op` (`2^-e A`), exact to the rounding of `T`.
///
/// # Errors
/// What `call.control` returns, and non-convergence of the decomposition.
pub fn exact_svd<T: Real>(op: Dense<'_>, call: Call<'_>) -> Result<Truncated<T>> {
    let Call { rank, params, par, .. } = call;
    let view = op.view;
    let a = Panel::from_rows(view.rows(), view.cols(), view.copied::<f64>(op.exponent, par));
    let (left, values, right) = if T::EPS < SQUARE_HIDES { by_svd(&a, call)? } else { by_gram(&a, call)? };
    let (mut left, mut right) = (left, right);
    fix_signs(&mut right, Some(&mut left));
    let back = times(a.mat().transpose(), left.mat(), par);
    let mut miss = right.clone();
    for (row, image) in miss.data.chunks_mut(rank).zip(back.data.chunks(rank)) {
        (0..rank).for_each(|j| row[j] = image[j] - values[j] * row[j]);
    }
    Ok(Truncated {
        left: params.left.then(|| left.cast()),
        right: right.cast(),
        next: values.get(rank).copied(),
        // The vectors are handed out rounded.
        residuals: miss.norms().into_iter().map(|miss| miss.hypot(T::EPS * values[0])).collect(),
        values: values[..rank].to_vec(),
        work: Work::DENSE,
    })
}

type Triplets = (Panel<f64>, Vec<f64>, Panel<f64>);

fn by_svd(a: &Panel<f64>, call: Call<'_>) -> Result<Triplets> {
    let Call { rank, control, .. } = call;
    let whole = a.mat().to_owned();
    let (u, values, v) = abandonable(control, move || small::svd(&whole))??;
    Ok((Panel::from_mat(u.subcols(0, rank)), values, Panel::from_mat(v.subcols(0, rank))))
}

fn by_gram(a: &Panel<f64>, call: Call<'_>) -> Result<Triplets> {
    if a.cols > a.rows {
        let (right, values, left) = by_gram(&a.transposed(), call)?;
        return Ok((left, values, right));
    }
    let Call { rank, control, par, .. } = call;
    let gram = gram(a, control, par)?;
    let (squares, v) = abandonable(control, move || small::eigen(&gram))??;
    let values: Vec<f64> = squares.into_iter().map(|x| x.max(0.0).sqrt()).collect();
    let right = Panel::from_mat(v.subcols(0, rank));
    // A V = U Sigma: its columns are orthogonal, and those of no length are completed.
    let left = orthonormalize(times(a.mat(), right.mat(), par), par);
    Ok((left, values, right))
}

/// `A^T A`, a few columns at a time so that a stop is met between them.
fn gram(a: &Panel<f64>, control: &dyn Control, par: Par) -> Result<Mat<f64>> {
    const WIDTH: usize = 256;
    let mut gram = Mat::zeros(a.cols, a.cols);
    for start in (0..a.cols).step_by(WIDTH) {
        control.check()?;
        let end = (start + WIDTH).min(a.cols);
        let part = cross(a.mat().subcols(start, a.cols - start), a.mat().subcols(start, end - start), par);
        // Only the lower half is read.
        gram.as_mut().submatrix_mut(start, start, a.cols - start, end - start).copy_from(&part);
    }
    Ok(gram)
}
