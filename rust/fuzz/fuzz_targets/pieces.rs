//! The small public operations: skew products and planes, orthonormalisation, blind supports, Cayley, reflections.
#![no_main]

use std::fmt;

use libfuzzer_sys::arbitrary::{Arbitrary, Result, Unstructured};
use libfuzzer_sys::fuzz_target;
use loft_core::basis::{coordinate_indices, orthonormal, random_basis, skew_planes};
use loft_core::cayley::cayley;
use loft_core::householder::householder_wy;
use loft_core::select::Side;
use loft_core::skew::skew_project;
use loft_core::{Dtype, Error, Free, Panel, Par, Real};
use loft_fuzz::{Matrix, ROUNDINGS, Unit, check_orthonormal, check_values, eigenvalues, shape, skew, top};

enum Case {
    Project(Matrix, Matrix, Side),
    Planes(Matrix, usize),
    Orthonormal(Matrix),
    Random(usize, usize, u64),
    Coordinate(usize, usize, u64),
    Cayley(Matrix),
    Reflections(Matrix),
}

impl<'a> Arbitrary<'a> for Case {
    fn arbitrary(u: &mut Unstructured<'a>) -> Result<Self> {
        let kind = u.int_in_range(0..=6u8)?;
        let (rows, cols) = shape(u)?;
        Ok(match kind {
            0 => {
                let other = if u.ratio(1, 32)? { cols + 1 } else { cols };
                let side = *u.choose(&[Side::Input, Side::Output])?;
                Self::Project(Matrix::decode(u, rows, cols)?, Matrix::decode(u, rows, other)?, side)
            }
            1 => Self::Planes(skewed(u, rows.min(cols))?, u.int_in_range(0..=rows.min(cols) + 1)?),
            2 => Self::Orthonormal(Matrix::decode(u, rows, cols)?),
            3 => Self::Random(rows, u.int_in_range(0..=rows.min(40) + 1)?, u.arbitrary()?),
            4 => Self::Coordinate(rows, u.int_in_range(0..=rows + 1)?, u.arbitrary()?),
            5 => Self::Cayley(skewed(u, rows.min(cols))?),
            _ => Self::Reflections(Matrix::decode(u, rows, cols.min(60))?),
        })
    }
}

/// Mostly `A - A^T`, which every dtype rounds to a skew matrix; sometimes any matrix.
fn skewed(u: &mut Unstructured<'_>, size: usize) -> Result<Matrix> {
    let any = Matrix::decode(u, size, size)?;
    if u.ratio(1, 16)? {
        return Ok(any);
    }
    let a = any.entries();
    let entries: Vec<f64> = (0..size * size).map(|k| a[k] - a[k % size * size + k / size]).collect();
    // Row after row: where entries share memory, the rounded matrix would not be skew.
    let mut matrix = any.contiguous();
    matrix.fill(&entries);
    Ok(matrix)
}

impl fmt::Debug for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "#[test]\nfn found_by_fuzzing() {{")?;
        match self {
            Self::Project(w, g, side) => {
                writeln!(f, "    skew_project({w:?}, {g:?}, Side::{side:?}, &Free, Par::Seq)")?
            }
            Self::Planes(s, rank) => writeln!(f, "    skew_planes({s:?}, {rank})")?,
            Self::Orthonormal(a) => writeln!(f, "    orthonormal({a:?}, Par::Seq)")?,
            Self::Random(n, rank, seed) => writeln!(f, "    random_basis({n}, {rank}, {seed})")?,
            Self::Coordinate(n, rank, seed) => writeln!(f, "    coordinate_indices({n}, {rank}, {seed})")?,
            Self::Cayley(a) => writeln!(f, "    cayley({a:?})")?,
            Self::Reflections(u) => writeln!(f, "    householder_wy({u:?})")?,
        }
        writeln!(f, "}}")
    }
}

/// The result of a call that must be refused exactly if `wrong`.
fn expect<R>(outcome: loft_core::Result<R>, wrong: bool) -> Option<R> {
    match outcome {
        Err(error) => {
            assert!(wrong, "right input was refused: {error}");
            assert!(!matches!(error, Error::Interrupted | Error::NoConvergence(_)), "{error}");
            None
        }
        Ok(_) if wrong => panic!("wrong input was taken"),
        Ok(found) => Some(found),
    }
}

impl Case {
    fn dtype(&self) -> Dtype {
        match self {
            Self::Project(w, g, _) if w.dtype == Dtype::F64 || g.dtype == Dtype::F64 => Dtype::F64,
            Self::Planes(a, _) | Self::Orthonormal(a) | Self::Cayley(a) | Self::Reflections(a) => a.dtype,
            _ => Dtype::F32,
        }
    }

    fn check<T: Real>(&self) {
        match self {
            Self::Project(w, g, side) => check_project::<T>(w, g, *side),
            Self::Planes(s, rank) => check_planes::<T>(s, *rank),
            Self::Orthonormal(a) => {
                let wrong = a.cols == 0 || a.cols > a.rows || !a.finite();
                if let Some(q) = expect(orthonormal::<T>(a.view(), Par::Seq), wrong) {
                    check_span(a, &q);
                }
            }
            Self::Random(n, rank, seed) => {
                if let Some(q) = expect(random_basis(*n, *rank, *seed), !(1..=*n).contains(rank)) {
                    check_orthonormal("a random basis", &q, *n, *rank);
                }
            }
            Self::Coordinate(n, rank, seed) => {
                if let Some(chosen) = expect(coordinate_indices(*n, *rank, *seed), !(1..=*n).contains(rank)) {
                    assert!(chosen.len() == *rank && chosen.windows(2).all(|w| w[0] < w[1]) && chosen[rank - 1] < *n);
                }
            }
            Self::Cayley(a) => check_cayley::<T>(a),
            Self::Reflections(u) => check_reflections::<T>(u),
        }
    }
}

fn check_project<T: Real>(w: &Matrix, g: &Matrix, side: Side) {
    let empty = w.rows == 0 || w.cols == 0;
    let wrong = empty || (w.rows, w.cols) != (g.rows, g.cols) || !w.finite() || !g.finite();
    let Some(found) = expect(skew_project::<T>(w.view(), g.view(), side, &Free, Par::Seq), wrong) else { return };
    let (w, g) = (Unit::of(w), Unit::of(g));
    // Skew(G W^T) = Skew((G^T)^T W^T).
    let truth = if side == Side::Input { skew(&w, &g) } else { skew(&g.transposed(), &w.transposed()) };
    assert_eq!((found.rows(), found.cols()), (truth.rows, truth.cols));
    let exponent = w.exponent + g.exponent;
    let slack = ROUNDINGS * T::EPS * (w.square() * g.square()).sqrt();
    let n = truth.rows;
    for (k, want) in truth.data.iter().enumerate() {
        let (got, mirrored) = (found.data()[k].f64(), found.at(k % n, k / n).f64());
        let largest = if T::EPS > 1e-10 { 120 } else { 1000 };
        // Outside this range of exponents the entries themselves over- or underflow.
        if (-largest..largest).contains(&exponent) {
            assert!(got == -mirrored, "entry {k} is not skew");
            assert!(
                (Unit::scaled(got, exponent) - want).abs() <= slack + 2f64.powi(-largest - exponent),
                "entry {k}: {got}"
            );
        }
    }
}

fn check_planes<T: Real>(s: &Matrix, rank: usize) {
    let unit = Unit::of(s);
    let n = s.rows;
    let finite = s.finite();
    let skewed = finite && (0..n * n).all(|k| unit.data[k] == -unit.data[k % n * n + k / n]);
    let right = skewed && (1..=n).contains(&rank);
    let outcome = skew_planes::<T>(s.view(), rank);
    // Something between exactly skew and far from it may go either way.
    if finite && !skewed && outcome.is_ok() {
        return;
    }
    let Some((vectors, values)) = expect(outcome, !right) else { return };
    check_orthonormal("the planes", &vectors, n, rank);
    check_values(&values, rank, unit.exponent < 1000);
    let v = Unit::from(&vectors);
    let projected = v.transposed().times(&unit.times(&v));
    for j in (0..rank - 1).step_by(2).filter(|_| Unit::holds(unit.exponent)) {
        let (value, truth) = (Unit::scaled(values[j], unit.exponent), projected.data[j * rank + j + 1]);
        let slack = 1e3 * T::EPS * unit.square().sqrt() + Unit::denormal(unit.exponent);
        assert!((value - truth).abs() <= slack, "plane {j}: {value}, but v1^T S v2 is {truth}");
    }
    if n <= 40 {
        let best = top(&eigenvalues(unit.gram()), rank / 2 * 2);
        assert!(projected.square() >= (1.0 - 1e-5) * best, "{} of {best}", projected.square());
    }
}

fn check_span<T: Real>(a: &Matrix, q: &Panel<T>) {
    check_orthonormal("Q", q, a.rows, a.cols);
    let (a, q) = (Unit::of(a), Unit::from(q));
    let inside = q.times(&q.transposed().times(&a));
    let miss: f64 = inside.data.iter().zip(&a.data).map(|(x, y)| (x - y).powi(2)).sum();
    // A column whose remainder is below 16 m eps ||A|| is replaced: faer's QR takes it for rounding.
    let slack = (10.0 + 16.0 * (a.cols as f64).sqrt()) * a.rows as f64 * T::EPS * a.square().sqrt();
    assert!(miss.sqrt() <= slack, "outside the span: {:e}", miss.sqrt());
}

fn check_cayley<T: Real>(a: &Matrix) {
    let unit = Unit::of(a);
    let n = a.rows;
    let finite = a.finite();
    let skewed = finite && (0..n * n).all(|k| unit.data[k] == -unit.data[k % n * n + k / n]);
    let outcome = cayley::<T>(a.view());
    if finite && !skewed && outcome.is_ok() {
        return;
    }
    let Some(t) = expect(outcome, !skewed) else { return };
    let t = Unit::from(&t);
    let gram = t.transposed().times(&t);
    // loft.md's bound for the solve in f64, which serves entries up to 2^8, and the rounding of the result.
    let norm = unit.square().sqrt() * 2f64.powi(unit.exponent);
    let slack = 50.0 * T::EPS + 1e-13 * norm.clamp(1.0, 256.0 * n as f64);
    for k in 0..n * n {
        let miss = (gram.data[k] - f64::from(u8::from(k / n == k % n))).abs();
        assert!(miss <= slack, "T^T T - I has {miss:e} with ||A|| = {norm:e}");
    }
}

fn check_reflections<T: Real>(u: &Matrix) {
    // By the entries themselves: at unit scale a column far below the largest entry underflows, but it has a direction.
    let entries = u.entries();
    let zero = u.finite() && (0..u.cols).any(|j| (0..u.rows).all(|i| entries[i * u.cols + j] == 0.0));
    let Some((y, t)) = expect(householder_wy::<T>(u.view()), zero || !u.finite()) else { return };
    let (y, t) = (Unit::from(&y), Unit::from(&t));
    let product = y.times(&t.times(&y.transposed()));
    // H = I - Y T Y^T is orthogonal: H^T H - I = K^T K - K - K^T with K = Y T Y^T.
    let square = product.transposed().times(&product);
    let size = t.square().sqrt().max(1.0);
    for k in 0..u.rows * u.rows {
        let miss = square.data[k] - product.data[k] - product.data[k % u.rows * u.rows + k / u.rows];
        assert!(miss.abs() <= 1e3 * T::EPS * size * size, "H^T H - I has {miss:e}, ||T|| = {size:e}");
    }
}

fuzz_target!(|case: Case| if case.dtype() == Dtype::F64 { case.check::<f64>() } else { case.check::<f32>() });
