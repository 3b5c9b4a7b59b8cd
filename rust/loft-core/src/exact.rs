//! The dense SVD, for matrices so small or ranks so high that a Krylov space would fill them.
//!
//! `A = U diag(sigma) V^T` in f64 by faer (bidiagonalisation, no Gram matrix), so trailing directions are right
//! to the rounding of f64 relative to sigma_1; those of an exactly zero sigma are an orthonormal completion.

use crate::control::Control;
use crate::error::Result;
use crate::krylov::{Truncated, fix_signs};
use crate::panel::{Panel, times};
use crate::par::Par;
use crate::scalar::Real;
use crate::small;
use crate::view::View;

/// The `rank` leading triplets of `2^-exponent A`, exact to the rounding of `T`.
///
/// # Errors
/// What `control` returns, and non-convergence of the SVD.
pub fn exact_svd<T: Real>(
    view: View<'_>,
    exponent: i32,
    rank: usize,
    control: &dyn Control,
    par: Par,
) -> Result<Truncated<T>> {
    control.check()?;
    let a = Panel::from_rows(view.rows(), view.cols(), view.copied::<f64>(exponent, par));
    let (u, values, v) = small::svd(&a.mat().to_owned())?;
    let mut left = Panel::<f64>::from_mat(u.subcols(0, rank));
    let mut right = Panel::<f64>::from_mat(v.subcols(0, rank));
    fix_signs(&mut right, &mut left);
    let back = times(a.mat().transpose(), left.mat(), par);
    let mut miss = right.clone();
    for (row, image) in miss.data.chunks_mut(rank).zip(back.data.chunks(rank)) {
        (0..rank).for_each(|j| row[j] = image[j] - values[j] * row[j]);
    }
    Ok(Truncated {
        left: left.cast(),
        right: right.cast(),
        next: values.get(rank).copied(),
        values: values[..rank].to_vec(),
        residuals: miss.norms(),
        passes: 1,
    })
}
