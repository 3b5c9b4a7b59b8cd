//! `randomized_svd` in f32 and f64: errors exactly for what is wrong, and triplets that are what they say.
#![no_main]

use std::fmt;

use libfuzzer_sys::arbitrary::{Arbitrary, Result, Unstructured};
use libfuzzer_sys::fuzz_target;
use loft_core::svd::randomized_svd;
use loft_core::{Call, Dtype, Error, Free, Par, Params, Real};
use loft_fuzz::{
    Matrix, ROOTS, SMALL, Unit, check_fraction, check_orthonormal, check_values, eigenvalues, shape, tolerance, top,
};

struct Case {
    a: Matrix,
    rank: usize,
    params: Params,
}

impl<'a> Arbitrary<'a> for Case {
    fn arbitrary(u: &mut Unstructured<'a>) -> Result<Self> {
        let params = Params { tol: tolerance(u)?, seed: u.arbitrary()?, left: !u.ratio(1, 8)? };
        let (rows, cols) = shape(u)?;
        let most = rows.min(cols);
        let rank = u.int_in_range(0..=if most > SMALL { 24 } else { most + 1 })?.max(usize::from(!u.ratio(1, 16)?));
        Ok(Self { a: Matrix::decode(u, rows, cols)?, rank, params })
    }
}

/// As a test of `svd.rs`.
impl fmt::Debug for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let real = if self.a.dtype == Dtype::F64 { "f64" } else { "f32" };
        let tol = format!("{:?}", self.params.tol).replace("NaN", "f64::NAN");
        writeln!(f, "#[test]\nfn found_by_fuzzing() {{\n    let a = {:?};", self.a)?;
        let Params { seed, left, .. } = self.params;
        writeln!(f, "    let params = Params {{ tol: {tol}, seed: {seed}, left: {left} }};")?;
        let call = format!("Call {{ rank: {}, params, control: &Free, par: Par::Seq }}", self.rank);
        writeln!(f, "    let found = randomized_svd::<{real}>(a, {call}).unwrap();\n}}")
    }
}

impl Case {
    fn wrong(&self) -> bool {
        self.params.tol.is_some_and(|tol| !(tol > 0.0 && tol < 1.0))
            || !(1..=self.a.rows.min(self.a.cols)).contains(&self.rank)
            || !self.a.finite()
    }

    fn check<T: Real>(&self) {
        let call = Call { rank: self.rank, params: self.params, control: &Free, par: Par::Seq };
        let outcome = randomized_svd::<T>(self.a.view(), call);
        if self.wrong() {
            let error = outcome.expect_err("wrong input was taken");
            return assert!(!matches!(error, Error::Interrupted | Error::NoConvergence(_)), "{error}");
        }
        let found = outcome.expect("right input was refused");
        let a = Unit::of(&self.a);
        let triplets = &found.triplets;
        check_orthonormal("the right basis", &triplets.right, a.cols, self.rank);
        check_values(&triplets.values, self.rank, a.exponent < 1000);
        assert!(triplets.residuals.len() == self.rank && triplets.work.passes > 0);
        assert!(found.gap.is_nan() || (0.0..=1.0).contains(&found.gap), "gap {}", found.gap);
        let right = Unit::from(&triplets.right);
        let image = a.times(&right);
        let total = a.square();
        let whole = if total > 0.0 { image.square() / total } else { 1.0 };
        check_fraction(found.energy, whole, 1e-4);
        if a.rows.min(a.cols) <= SMALL {
            let best = top(&eigenvalues(a.gram()), self.rank);
            let missing = self.params.tol.unwrap_or(1e-3) + 1e-5;
            assert!(image.square() >= (1.0 - missing) * best, "{} of {best}", image.square());
        }
        assert_eq!(triplets.left.is_some(), self.params.left);
        let Some(left) = &triplets.left else { return };
        check_orthonormal("the left basis", left, a.rows, self.rank);
        let left = Unit::from(left);
        let back = a.transposed().times(&left);
        for j in (0..self.rank).filter(|_| Unit::holds(a.exponent)) {
            let value = Unit::scaled(triplets.values[j], a.exponent);
            let residual = Unit::scaled(triplets.residuals[j], a.exponent);
            let miss = |one: &Unit, other: &Unit| {
                let pairs = one.column(j).zip(other.column(j));
                pairs.map(|(x, y)| (x - value * y).powi(2)).sum::<f64>().sqrt()
            };
            let rounding = 1e3 * T::EPS * total.sqrt() + a.rows as f64 * Unit::denormal(a.exponent);
            let loose = ROOTS * (T::EPS * total).sqrt();
            assert!(miss(&image, &left) <= rounding + loose, "||A v - s u|| of {j} is {:e}", miss(&image, &left));
            let truth = miss(&back, &right);
            assert!(truth <= residual + rounding, "residual {j}: {residual:e}, but it is {truth:e}");
            assert!(residual <= truth + rounding + loose, "residual {j}: {residual:e}, but it is only {truth:e}");
        }
    }
}

fuzz_target!(|case: Case| if case.a.dtype == Dtype::F64 { case.check::<f64>() } else { case.check::<f32>() });
