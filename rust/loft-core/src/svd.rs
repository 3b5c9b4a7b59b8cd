//! The truncated SVD of a dense matrix, at the scale of the input: by block Krylov (krylov.rs), or densely (exact.rs) where a
//! Krylov space would fill the whole. `energy = sum_{i<=r} sigma_i^2 / ||A||_F^2`.

use std::time::Instant;

use crate::error::{Result, invalid};
use crate::exact::exact_svd;
use crate::krylov::{Call, Truncated, truncated_svd};
use crate::op::Dense;
use crate::scalar::{Real, pow2};
use crate::view::{Scan, View};

/// Leading triplets at unit scale: Krylov, or the dense SVD where that would fill the space.
pub(crate) fn leading<T: Real>(view: View<'_>, scan: Scan, call: Call<'_>) -> Result<Truncated<T>> {
    let op = Dense::new(view, scan.exponent);
    match truncated_svd(&op, scan.square, call)? {
        Some(found) => Ok(found),
        None => exact_svd(op, call),
    }
}

/// Singular triplets and what is known about them, for `randomized_svd`.
#[derive(Debug, Clone)]
pub struct Svd<T> {
    /// The triplets, at the scale of the input.
    pub triplets: Truncated<T>,
    /// Captured fraction of `||A||_F^2`.
    pub energy: f64,
    /// Relative gap to the next value.
    pub gap: f64,
    /// Wall-clock time.
    pub seconds: f64,
}

/// The `call.rank` leading singular triplets of a dense matrix.
///
/// # Errors
/// A rank outside `1..=min(m, n)`, a `tol` outside (0, 1), non-finite entries, what `call.control`
/// returns.
pub fn randomized_svd<T: Real>(view: View<'_>, call: Call<'_>) -> Result<Svd<T>> {
    let start = Instant::now();
    check_tol(call.params.tol)?;
    check_rank(call.rank, view.rows(), view.cols(), " a")?;
    let scan = view.scan("a", call.par)?;
    let mut triplets = leading::<T>(view, scan, call)?;
    let energy = fraction(triplets.values.iter().map(|x| x * x).sum(), scan.square);
    let gap = relative_gap::<T>(&triplets.values, triplets.next);
    rescale(&mut triplets.values, scan.exponent);
    rescale(&mut triplets.residuals, scan.exponent);
    Ok(Svd { triplets, energy, gap, seconds: start.elapsed().as_secs_f64() })
}

/// Ranks run from 1 to min(m, n).
pub(crate) fn check_rank(rank: usize, rows: usize, cols: usize, layer: &str) -> Result<()> {
    let most = rows.min(cols);
    if most == 0 {
        return invalid(format!("the matrix{layer} is empty: shape ({rows}, {cols})"));
    }
    if rank == 0 || rank > most {
        return invalid(format!(
            "rank must be from 1 to min(m, n) = {most} for the matrix{layer} of shape ({rows}, {cols}), got {rank}"
        ));
    }
    Ok(())
}

/// A tolerance is a fraction.
pub(crate) fn check_tol(tol: Option<f64>) -> Result<()> {
    if tol.is_some_and(|tol| !(tol > 0.0 && tol < 1.0)) {
        return invalid("tol must lie strictly between 0 and 1, or be None");
    }
    Ok(())
}

pub(crate) fn fraction(part: f64, whole: f64) -> f64 {
    if whole > 0.0 { (part / whole + 0.0).min(1.0) } else { 1.0 }
}

/// Zero where the last value is rounding: its direction is as arbitrary as the next one's.
pub(crate) fn relative_gap<T: Real>(values: &[f64], next: Option<f64>) -> f64 {
    match (values, next) {
        ([first, .., last] | [first @ last], Some(next)) => {
            if *last > 8.0 * T::EPS * first {
                (last - next).max(0.0) / last
            } else {
                0.0
            }
        }
        _ => f64::NAN,
    }
}

pub(crate) fn rescale(values: &mut [f64], exponent: i32) {
    let half = pow2(exponent / 2);
    let rest = pow2(exponent - exponent / 2);
    values.iter_mut().for_each(|x| *x = *x * half * rest);
}
