//! The four types in which a matrix may be given, and the two precisions in which anything is
//! computed: f32 (also for half inputs) and f64.

use std::ops::{Add, AddAssign, Div, Mul, MulAssign, Neg, Sub, SubAssign};

/// The element type of a matrix that is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dtype {
    /// IEEE single.
    F32,
    /// IEEE double.
    F64,
    /// bfloat16.
    Bf16,
    /// IEEE half.
    F16,
}

/// f32 or f64.
pub trait Real:
    faer::traits::RealField
    + Copy
    + Send
    + Sync
    + 'static
    + PartialOrd
    + Default
    + Add<Output = Self>
    + Sub<Output = Self>
    + Mul<Output = Self>
    + Div<Output = Self>
    + Neg<Output = Self>
    + AddAssign
    + MulAssign
    + SubAssign
{
    /// Unit roundoff times two, as `f64`.
    const EPS: f64;
    /// The tag of a matrix that holds this type.
    const DTYPE: Dtype;
    /// Rounds to this type.
    fn of(x: f64) -> Self;
    /// Widens to f64, exactly.
    fn f64(self) -> f64;
}

impl Real for f32 {
    const EPS: f64 = f32::EPSILON as f64;
    const DTYPE: Dtype = Dtype::F32;
    #[inline(always)]
    fn of(x: f64) -> Self {
        x as Self
    }
    #[inline(always)]
    fn f64(self) -> f64 {
        f64::from(self)
    }
}

impl Real for f64 {
    const EPS: f64 = f64::EPSILON;
    const DTYPE: Dtype = Dtype::F64;
    #[inline(always)]
    fn of(x: f64) -> Self {
        x
    }
    #[inline(always)]
    fn f64(self) -> f64 {
        self
    }
}

/// `2^e`, saturating outside the range of f64.
pub(crate) fn pow2(e: i32) -> f64 {
    libm::ldexp(1.0, e)
}
