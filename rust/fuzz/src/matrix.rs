//! Bytes to matrices. The entries are raw bytes (so NaN, Inf and denormals too) or drawn from a recipe with a seed; the
//! memory is exactly as large as the strides need, so that the address sanitizer sees every read outside it.

use std::fmt;

use half::{bf16, f16};
use libfuzzer_sys::arbitrary::{Result, Unstructured};
use loft_core::{Dtype, View};

/// A matrix in memory of its own; strides in bytes, and anything: negative, zero, overlapping, unaligned.
#[derive(Clone)]
pub struct Matrix {
    pub rows: usize,
    pub cols: usize,
    pub dtype: Dtype,
    strides: (isize, isize),
    start: usize,
    bytes: Vec<u8>,
}

/// Mostly up to 40 x 40; sometimes thin and long, sometimes wide enough for a Krylov space.
pub fn shape(u: &mut Unstructured<'_>) -> Result<(usize, usize)> {
    Ok(match u.int_in_range(0..=31u8)? {
        0 => (u.int_in_range(1..=12)?, u.int_in_range(41..=1000)?),
        1 => (u.int_in_range(41..=1000)?, u.int_in_range(1..=12)?),
        2 => (u.int_in_range(150..=420)?, u.int_in_range(150..=420)?),
        3 => (u.int_in_range(0..=1)?, u.int_in_range(0..=40)?),
        _ => (u.int_in_range(1..=40)?, u.int_in_range(1..=40)?),
    })
}

/// `None`, a tolerance, or rarely something that must be refused.
pub fn tolerance(u: &mut Unstructured<'_>) -> Result<Option<f64>> {
    const SOME: [f64; 12] = [0.5, 1e-2, 1e-3, 1e-4, 1e-6, 1e-9, 1e-14, 5e-324, 0.0, 1.0, -1.0, f64::NAN];
    let choice = u.int_in_range(0..=31usize)?;
    Ok(SOME.get(choice).copied())
}

/// splitmix64.
struct Draw(u64);

impl Draw {
    fn word(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// Nearly normal: a sum of uniforms.
    fn normal(&mut self) -> f64 {
        (0..6).map(|_| (self.word() >> 11) as f64 / (1u64 << 52) as f64 - 1.0).sum::<f64>() * 0.7
    }

    fn normals(&mut self, count: usize) -> Vec<f64> {
        (0..count).map(|_| self.normal()).collect()
    }
}

fn power(exponent: i32) -> f64 {
    // In two factors, so that the denormal end of the range is reached.
    10f64.powi(exponent / 2) * 10f64.powi(exponent - exponent / 2)
}

/// Entries of a known kind, row after row, at unit scale.
fn recipe(u: &mut Unstructured<'_>, rows: usize, cols: usize) -> Result<Vec<f64>> {
    let kind = u.int_in_range(0..=9u8)?;
    let mut draw = Draw(u.arbitrary()?);
    let few: usize = u.int_in_range(1..=6)?;
    let fall = f64::from(u.int_in_range(0..=40u8)?);
    let each = |mut f: Box<dyn FnMut(usize, usize) -> f64>| -> Vec<f64> {
        (0..rows * cols).map(|k| f(k / cols.max(1), k % cols.max(1))).collect()
    };
    Ok(match kind {
        0 => draw.normals(rows * cols),
        1 | 2 => {
            let (left, right) = (draw.normals(rows * few), draw.normals(cols * few));
            let noise = if kind == 1 { 0.0 } else { power(-(fall as i32) / 2) };
            let entry = move |i: usize, j: usize| {
                (0..few).map(|q| left[i * few + q] * right[j * few + q]).sum::<f64>() + noise * draw.normal()
            };
            each(Box::new(entry))
        }
        3 => {
            let base = draw.normals(rows * few);
            each(Box::new(move |i, j| base[i * few + j % few]))
        }
        4 => each(Box::new(move |_, j| draw.normal() * 10f64.powf(-fall * j as f64 / cols as f64))),
        5 => each(Box::new(move |i, _| draw.normal() * 10f64.powf(-fall * i as f64 / rows as f64))),
        6 => each(Box::new(move |_, _| if draw.word() % 16 < few as u64 { draw.normal() } else { 0.0 })),
        7 => each(Box::new(move |_, _| 1.0)),
        8 => each(Box::new(
            move |i, j| {
                if i == j { 1.0 + (i % few) as f64 } else { draw.normal() * power(-(fall as i32)) }
            },
        )),
        _ => each(Box::new(move |i, j| f64::from(u8::from(i == few && j == few)))),
    })
}

impl Matrix {
    /// Any matrix of this shape.
    pub fn decode(u: &mut Unstructured<'_>, rows: usize, cols: usize) -> Result<Self> {
        let dtype = *u.choose(&[Dtype::F32, Dtype::F32, Dtype::F64, Dtype::Bf16, Dtype::F16])?;
        if u.int_in_range(0..=3u8)? == 0 {
            let mut matrix = Self::laid_out(u, dtype, rows, cols)?;
            let length = matrix.bytes.len();
            let raw = u.bytes(length.min(u.len()))?.to_vec();
            matrix.bytes.iter_mut().zip(raw.iter().cycle()).for_each(|(to, from)| *to = *from);
            return Ok(matrix);
        }
        let mut entries = recipe(u, rows, cols)?;
        let reach = match dtype {
            Dtype::F64 => 320,
            Dtype::F32 | Dtype::Bf16 => 46,
            Dtype::F16 => 8,
        };
        let exponent = if u.arbitrary()? { 0 } else { u.int_in_range(-reach..=reach)?.min(reach - 8) };
        entries.iter_mut().for_each(|x| *x *= power(exponent));
        Self::holding(u, dtype, rows, cols, &entries)
    }

    /// These entries, rounded to `dtype`, in any layout; where entries share memory the last one is kept.
    pub fn holding(u: &mut Unstructured<'_>, dtype: Dtype, rows: usize, cols: usize, entries: &[f64]) -> Result<Self> {
        let mut matrix = Self::laid_out(u, dtype, rows, cols)?;
        matrix.fill(entries);
        Ok(matrix)
    }

    /// The same matrix, row after row.
    pub fn contiguous(&self) -> Self {
        let size = self.size() as isize;
        let mut matrix = Self::with_strides(self.dtype, self.rows, self.cols, (size * self.cols as isize, size), 0);
        matrix.fill(&self.entries());
        matrix
    }

    fn size(&self) -> usize {
        match self.dtype {
            Dtype::F64 => 8,
            Dtype::F32 => 4,
            Dtype::Bf16 | Dtype::F16 => 2,
        }
    }

    fn laid_out(u: &mut Unstructured<'_>, dtype: Dtype, rows: usize, cols: usize) -> Result<Self> {
        let size = match dtype {
            Dtype::F64 => 8,
            Dtype::F32 => 4,
            Dtype::Bf16 | Dtype::F16 => 2,
        };
        let (m, n) = (rows as isize, cols as isize);
        let (strides, shift) = match u.int_in_range(0..=15u8)? {
            0 | 1 => ((size, m * size), 0),
            2 => (((n + 3) * size, size), 0),
            3 => ((-n * size, size), 0),
            4 => ((n * size, -size), 0),
            5 => ((-size, -m * size), 0),
            6 => ((0, size), 0),
            7 => ((size, 0), 0),
            8 => ((n * size, size), 1),
            9 => ((n * (size + 1) + 1, size + 1), 3),
            10 => ((size, size), 0),
            11 => ((2 * n * size, 2 * size), 0),
            _ => ((n * size, size), 0),
        };
        Ok(Self::with_strides(dtype, rows, cols, strides, shift))
    }

    fn with_strides(dtype: Dtype, rows: usize, cols: usize, strides: (isize, isize), shift: usize) -> Self {
        let mut matrix = Self { rows, cols, dtype, strides, start: 0, bytes: Vec::new() };
        if rows * cols > 0 {
            let ends = [strides.0 * (rows as isize - 1), strides.1 * (cols as isize - 1)];
            let (low, high): (isize, isize) =
                (ends.iter().map(|x| x.min(&0)).sum(), ends.iter().map(|x| x.max(&0)).sum());
            matrix.start = shift + low.unsigned_abs();
            matrix.bytes = vec![0; shift + (high - low) as usize + matrix.size()];
        }
        matrix
    }

    fn place(&self, i: usize, j: usize) -> usize {
        (self.start as isize + i as isize * self.strides.0 + j as isize * self.strides.1) as usize
    }

    /// Writes these entries, rounded to the dtype.
    pub fn fill(&mut self, entries: &[f64]) {
        for (k, x) in entries.iter().enumerate() {
            let (x, at) = (*x, self.place(k / self.cols, k % self.cols));
            match self.dtype {
                Dtype::F64 => self.bytes[at..at + 8].copy_from_slice(&x.to_ne_bytes()),
                Dtype::F32 => self.bytes[at..at + 4].copy_from_slice(&(x as f32).to_ne_bytes()),
                Dtype::Bf16 => self.bytes[at..at + 2].copy_from_slice(&bf16::from_f64(x).to_ne_bytes()),
                Dtype::F16 => self.bytes[at..at + 2].copy_from_slice(&f16::from_f64(x).to_ne_bytes()),
            }
        }
    }

    /// The entries, row after row, read without the core.
    pub fn entries(&self) -> Vec<f64> {
        let read = |k: usize| {
            let at = &self.bytes[self.place(k / self.cols, k % self.cols)..];
            match self.dtype {
                Dtype::F64 => f64::from_ne_bytes(at[..8].try_into().unwrap()),
                Dtype::F32 => f64::from(f32::from_ne_bytes(at[..4].try_into().unwrap())),
                Dtype::Bf16 => bf16::from_ne_bytes(at[..2].try_into().unwrap()).to_f64(),
                Dtype::F16 => f16::from_ne_bytes(at[..2].try_into().unwrap()).to_f64(),
            }
        };
        (0..self.rows * self.cols).map(read).collect()
    }

    pub fn view(&self) -> View<'_> {
        let first = self.bytes.as_ptr().wrapping_add(self.start);
        // SAFETY: `bytes` was made as large as the shape and the strides need.
        unsafe { View::from_raw(first, self.dtype, self.rows, self.cols, self.strides.0, self.strides.1) }
    }

    pub fn finite(&self) -> bool {
        self.entries().iter().all(|x| x.is_finite())
    }

    pub fn zero(&self) -> bool {
        self.entries().iter().all(|x| *x == 0.0)
    }
}

/// Rust that makes the same numbers, for a test.
impl fmt::Debug for Matrix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let real = if self.dtype == Dtype::F64 { "f64" } else { "f32" };
        let (rows, cols, strides) = (self.rows, self.cols, self.strides);
        writeln!(f, "/* {:?}, strides {strides:?} bytes from byte {} */", self.dtype, self.start)?;
        if rows * cols > 4096 {
            return write!(f, "/* {rows} x {cols}: too many entries to print; run the target on the input itself */");
        }
        let write_one = |x: f64| match x {
            x if x.is_nan() => format!("{real}::NAN"),
            x if x.is_infinite() => format!("{}{real}::INFINITY", if x < 0.0 { "-" } else { "" }),
            x if real == "f32" => format!("{:?}", x as f32),
            x => format!("{x:?}"),
        };
        let entries: Vec<String> = self.entries().into_iter().map(write_one).collect();
        write!(f, "View::row_major::<{real}>(&[{}], {rows}, {cols})", entries.join(", "))
    }
}
