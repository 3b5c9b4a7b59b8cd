//! `select`: errors exactly for what is wrong, and a support that is what it says. Another layout, or another job beside
//! it, must not change a bit of the basis.
#![no_main]

use std::fmt;

use libfuzzer_sys::arbitrary::{Arbitrary, Result, Unstructured};
use libfuzzer_sys::fuzz_target;
use loft_core::select::{Job, Method, Options, Selection, Side, select};
use loft_core::{Dtype, Error, Free, Par};
use loft_fuzz::{
    Matrix, ROUNDINGS, SMALL, Unit, check_fraction, check_orthonormal, check_values, eigenvalues, shape, skew,
    tolerance, top,
};

struct Case {
    grad: Option<Matrix>,
    weight: Option<Matrix>,
    rank: usize,
    options: Options,
    twice: bool,
}

impl<'a> Arbitrary<'a> for Case {
    fn arbitrary(u: &mut Unstructured<'a>) -> Result<Self> {
        let method = *u.choose(&[Method::GradSvd, Method::Principal, Method::SkewGrad, Method::SkewGrad])?;
        let side = *u.choose(&[Side::Input, Side::Output])?;
        let options = Options { method, side, tol: tolerance(u)?, seed: u.arbitrary()? };
        let (rows, cols) = shape(u)?;
        let most = rows.min(cols);
        let most = if most > SMALL { 24 } else { most + 1 };
        let rank = u.int_in_range(0..=most)?.max(usize::from(!u.ratio(1, 16)?));
        let twice = u.ratio(1, 4)? && rows * cols <= 1600;
        let oddity = u.int_in_range(0..=63u8)?;
        let wanted = [method != Method::Principal, method != Method::GradSvd];
        let [mut grad, mut weight] = [None, None];
        if wanted[1] != (oddity == 1) {
            weight = Some(Matrix::decode(u, rows, cols)?);
        }
        if wanted[0] != (oddity == 2) {
            let cols = if oddity == 3 { cols + 1 } else { cols };
            grad = Some(match (&weight, oddity) {
                // Skew(W^T G) of no size, or hardly any: G = c W + noise.
                (Some(weight), 4..=15) => nearly(u, weight)?,
                _ => Matrix::decode(u, rows, cols)?,
            });
        }
        Ok(Self { grad, weight, rank, options, twice })
    }
}

fn nearly(u: &mut Unstructured<'_>, weight: &Matrix) -> Result<Matrix> {
    let factor = f64::from(u.int_in_range(-3..=3i8)?);
    let noise = 10f64.powi(-u.int_in_range(2..=20)?);
    let other = Matrix::decode(u, weight.rows, weight.cols)?;
    let (w, n) = (Unit::of(weight), Unit::of(&other));
    let entries: Vec<f64> = w.data.iter().zip(&n.data).map(|(w, n)| factor * w + noise * n).collect();
    Matrix::holding(u, weight.dtype, weight.rows, weight.cols, &entries)
}

/// As a test of `select.rs`.
impl fmt::Debug for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Options { method, side, tol, seed } = self.options;
        let tol = format!("{tol:?}").replace("NaN", "f64::NAN");
        writeln!(f, "#[test]\nfn found_by_fuzzing() {{")?;
        for (name, matrix) in [("grad", &self.grad), ("weight", &self.weight)] {
            match matrix {
                Some(matrix) => writeln!(f, "    let {name} = Some({matrix:?});")?,
                None => writeln!(f, "    let {name} = None;")?,
            }
        }
        writeln!(f, "    let jobs = [job(\"\", grad, weight, {})];", self.rank)?;
        writeln!(
            f,
            "    let options = Options {{ method: Method::{method:?}, side: Side::{side:?}, tol: {tol}, seed: {seed} }};"
        )?;
        writeln!(f, "    let found = select(&jobs, options, &Free, Par::Seq).unwrap().remove(0);\n}}")
    }
}

impl Case {
    fn given(&self) -> impl Iterator<Item = &Matrix> {
        [&self.grad, &self.weight].into_iter().flatten()
    }

    fn job<'a>(&self, grad: &'a Option<Matrix>, weight: &'a Option<Matrix>) -> Job<'a> {
        let view = |matrix: &'a Option<Matrix>| matrix.as_ref().map(Matrix::view);
        Job { name: "layer".into(), grad: view(grad), weight: view(weight), rank: self.rank }
    }

    /// Whether the call must be refused.
    fn wrong(&self) -> bool {
        let Options { method, tol, .. } = self.options;
        let shapes: Vec<_> = self.given().map(|a| (a.rows, a.cols)).collect();
        let most = shapes.first().map_or(0, |shape| shape.0.min(shape.1));
        tol.is_some_and(|tol| !(tol > 0.0 && tol < 1.0))
            || self.grad.is_some() != (method != Method::Principal)
            || self.weight.is_some() != (method != Method::GradSvd)
            || shapes.windows(2).any(|w| w[0] != w[1])
            || !(1..=most).contains(&self.rank)
            || self.given().any(|a| !a.finite() || a.zero())
    }

    fn check(&self) {
        let outcome = select(&[self.job(&self.grad, &self.weight)], self.options, &Free, Par::Seq);
        if self.wrong() {
            let error = outcome.expect_err("wrong input was taken");
            assert!(!matches!(error, Error::Interrupted | Error::NoConvergence(_)), "{error}");
            assert!(error.to_string().len() > 10);
            return;
        }
        if self.options.method == Method::SkewGrad {
            self.check_skew(&outcome);
        } else {
            self.check_vectors(&outcome.as_ref().expect("right input was refused")[0]);
        }
        if self.twice {
            self.check_copy(&outcome);
        }
    }

    fn check_common(&self, found: &Selection, width: usize, exponent: i32) {
        check_orthonormal("the basis", &found.basis, width, self.rank);
        check_values(&found.values, self.rank, exponent < 1000);
        assert_eq!(found.residuals.len(), self.rank);
        assert!(found.residuals.iter().all(|x| *x >= 0.0), "residuals {:?}", found.residuals);
        assert!(found.energy_stderr >= 0.0 && found.energy_stderr.is_finite());
        assert!(found.gap.is_nan() || (0.0..=1.0).contains(&found.gap), "gap {}", found.gap);
        assert!(found.work.passes > 0);
    }

    /// How much of the optimum may be missing where the space is small.
    fn missing(&self) -> f64 {
        self.options.tol.unwrap_or(1e-3) + 1e-5
    }

    fn check_vectors(&self, found: &Selection) {
        let a = Unit::of(self.given().next().unwrap());
        let a = if self.options.side == Side::Input { a } else { a.transposed() };
        self.check_common(found, a.cols, a.exponent);
        let image = a.times(&Unit::from(&found.basis));
        let total = a.square();
        check_fraction(found.energy, image.square() / total, 1e-4);
        assert_eq!(found.energy_stderr, 0.0);
        assert_eq!(found.gap.is_nan(), self.rank == a.rows.min(a.cols));
        for j in (0..self.rank).filter(|_| Unit::holds(a.exponent)) {
            let [value, residual] = [found.values[j], found.residuals[j]].map(|x| Unit::scaled(x, a.exponent));
            let norm = image.column(j).map(|x| x * x).sum::<f64>().sqrt();
            let slack = residual + 1e3 * f64::from(f32::EPSILON) * total.sqrt() + Unit::denormal(a.exponent);
            assert!((norm - value).abs() <= slack, "value {j}: {value} +- {residual:e}, but ||A p|| is {norm}");
        }
        if a.rows.min(a.cols) <= SMALL {
            let best = top(&eigenvalues(a.gram()), self.rank);
            let kept = image.square();
            assert!(kept >= (1.0 - self.missing()) * best, "{kept} of {best}");
        }
    }

    fn check_skew(&self, outcome: &loft_core::Result<Vec<Selection>>) {
        let turned = |a: &Option<Matrix>| {
            let a = Unit::of(a.as_ref().unwrap());
            if self.options.side == Side::Input { a } else { a.transposed() }
        };
        let (w, g) = (turned(&self.weight), turned(&self.grad));
        let s = skew(&w, &g);
        let double = self.given().any(|a| a.dtype == Dtype::F64);
        let eps = f64::from(f32::EPSILON) * f64::from(u8::from(!double)) + f64::EPSILON;
        let (size, product) = (s.square().sqrt(), (w.square() * g.square()).sqrt());
        // What rounding W^T G - G^T W may do to S, relative to S.
        let noise = ROUNDINGS * eps * product / size;
        let found = match outcome {
            Err(Error::NoRotation(_)) => return assert!(noise > 0.1, "||S|| is {size}, of {product}"),
            other => &other.as_ref().expect("right input was refused")[0],
        };
        let exponent = w.exponent + g.exponent;
        self.check_common(found, w.cols, exponent);
        let p = Unit::from(&found.basis);
        let projected = p.transposed().times(&s.times(&p));
        check_fraction(found.energy, projected.square() / s.square(), 1e-4 + 5.0 * found.energy_stderr + noise);
        for j in (0..self.rank - 1).step_by(2).filter(|_| Unit::holds(exponent)) {
            let (value, truth) = (Unit::scaled(found.values[j], exponent), projected.data[j * self.rank + j + 1]);
            assert_eq!(found.values[j].to_bits(), found.values[j + 1].to_bits());
            let slack = (1e-4 + noise) * size + Unit::denormal(exponent);
            assert!((value - truth).abs() <= slack, "plane {j}: {value}, but p1^T S p2 is {truth}");
        }
        if s.rows <= SMALL {
            let best = top(&eigenvalues(s.gram()), self.rank / 2 * 2);
            let kept = projected.square();
            assert!(kept >= (1.0 - self.missing() - noise) * best - noise * s.square(), "{kept} of {best}");
        }
    }

    /// The same entries in another layout, as the second of two jobs: the same bits.
    fn check_copy(&self, outcome: &loft_core::Result<Vec<Selection>>) {
        let [grad, weight] = [&self.grad, &self.weight].map(|a| a.as_ref().map(Matrix::contiguous));
        let jobs = [self.job(&self.grad, &self.weight), self.job(&grad, &weight)];
        match (outcome, select(&jobs, self.options, &Free, Par::Seq)) {
            (Ok(alone), Ok(both)) => {
                for each in &both {
                    assert!(each.basis == alone[0].basis && each.values == alone[0].values, "other bits");
                    assert!((each.energy - alone[0].energy).abs() <= 1e-12, "another energy");
                }
            }
            (Err(alone), Err(both)) => assert_eq!(alone, &both),
            (alone, both) => panic!("alone {}, twice {}", alone.is_ok(), both.is_ok()),
        }
    }
}

fuzz_target!(|case: Case| case.check());
