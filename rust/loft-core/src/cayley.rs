//! The Cayley transform `T = (I - A)(I + A)^{-1}` of a skew `A`, orthogonal with determinant one.
//!
//! Computed as `T = I - 2 A Z`, `Z = (I + A)^{-1}` by LU with partial pivoting in f64 (a Cholesky of
//! `I + A^T A` squares the condition and is worse), then rounded once.

use faer::Mat;
use faer::linalg::solvers::Solve;

use crate::error::{Result, invalid};
use crate::panel::Panel;
use crate::par::Par;
use crate::scalar::Real;
use crate::view::View;

/// `(I - A)(I + A)^{-1}` for a skew-symmetric `r x r` matrix.
///
/// # Errors
/// If `a` is not square, not finite, or not skew-symmetric to its precision.
pub fn cayley<T: Real>(a: View<'_>) -> Result<Panel<T>> {
    let r = a.rows();
    if r != a.cols() {
        return invalid(format!("a must be square and skew-symmetric, got shape ({r}, {})", a.cols()));
    }
    a.scan("a", Par::Seq)?;
    let skew = skew_part("a", &Panel::<T>::from_rows(r, r, a.copied(0, Par::Seq)))?;
    let mut shifted = skew.clone();
    (0..r).for_each(|i| shifted[(i, i)] += 1.0);
    // A commutes with Z, so the solve can act on -2 A directly.
    let mut transform = shifted.partial_piv_lu().solve(faer::Scale(-2.0) * &skew);
    (0..r).for_each(|i| transform[(i, i)] += 1.0);
    Ok(Panel::from_mat(transform.as_ref()))
}

/// The skew part in f64 of a matrix that is skew to its precision.
pub(crate) fn skew_part<T: Real>(name: &str, a: &Panel<T>) -> Result<Mat<f64>> {
    let r = a.rows;
    let largest = a.data.iter().map(|x| x.f64().abs()).fold(0.0, f64::max);
    let mut worst = 0.0f64;
    let skew = Mat::from_fn(r, r, |i, j| {
        let (x, y) = (a.at(i, j).f64(), a.at(j, i).f64());
        worst = worst.max((x + y).abs());
        (x - y) / 2.0
    });
    if worst > 16.0 * T::EPS * largest {
        return invalid(format!(
            "{name} must be skew-symmetric ({name}^T = -{name}); its largest entry of {name} + {name}^T is {worst:.3e}"
        ));
    }
    Ok(skew)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{gaussian_panel, norm_2};

    fn skew(r: usize, norm: f64) -> Panel<f64> {
        let a = gaussian_panel::<f64>(r, r, 9);
        let skew = Mat::from_fn(r, r, |i, j| a.at(i, j) - a.at(j, i));
        Panel::from_mat((&skew * faer::Scale(norm / norm_2(&skew))).as_ref())
    }

    fn defect<T: Real>(a: &Panel<T>) -> f64 {
        let t = cayley::<T>(View::row_major(&a.data, a.rows, a.cols)).unwrap().cast::<f64>();
        norm_2(&(t.mat().transpose() * t.mat() - Mat::<f64>::identity(a.rows, a.rows)))
    }

    /// An fp64 solve rounded to fp32 stays below 8e-8 at r = 64.
    #[test]
    fn orthogonal_for_every_rank_and_norm() {
        for r in [2, 3, 8, 64, 352] {
            for norm in [1e-6, 0.1, 1.0, 10.0, 100.0] {
                let a = skew(r, norm);
                assert!(defect(&a) < 1e-13 * norm.max(1.0), "r={r} {norm}: {:e}", defect(&a));
                let most = if r <= 64 { 8e-8 } else { 2e-7 };
                assert!(defect(&a.cast::<f32>()) <= most, "r={r} {norm}: {:e}", defect(&a.cast::<f32>()));
            }
        }
    }

    #[test]
    fn known_values() {
        let t = cayley::<f64>(View::row_major(&[0.0, 1.0, -1.0, 0.0], 2, 2)).unwrap();
        assert!((t.at(0, 0).abs() + t.at(1, 1).abs()) < 1e-15 && (t.at(0, 1) + 1.0).abs() < 1e-15);
        assert_eq!(cayley::<f32>(View::row_major(&[0f32], 1, 1)).unwrap().data, [1.0]);
    }

    #[test]
    fn refusals() {
        let message =
            |data: &[f64], rows, cols| cayley::<f64>(View::row_major(data, rows, cols)).unwrap_err().to_string();
        assert!(message(&[0.0; 6], 2, 3).contains("square"));
        assert!(message(&[0.0, 1.0, 1.0, 0.0], 2, 2).contains("skew-symmetric"));
        assert!(message(&[0.0, f64::NAN, 1.0, 0.0], 2, 2).contains("NaN"));
    }
}
