//! A borrowed matrix of any strides and of four dtypes, read in tiles.
//!
//! Half precision is never multiplied: a tile is widened to the computing precision first. `scan` is
//! the one pass that every input gets: it refuses NaN and Inf and returns
//! `2^-2e ||A||_F^2` in f64 with `e` the exponent of the largest entry, so that no scale of the
//! input over- or underflows anything that follows.

use std::marker::PhantomData;
use std::ops::Range;

use faer::MatRef;
use half::f16;
use half::slice::HalfFloatSliceExt;

use crate::error::{Error, Result};
use crate::par::Par;
use crate::scalar::{Real, pow2};

pub use crate::scalar::Dtype;

/// A read-only `rows x cols` matrix that someone else owns; strides are in bytes and may be
/// negative, zero or unaligned.
#[derive(Debug, Clone, Copy)]
pub struct View<'a> {
    ptr: *const u8,
    dtype: Dtype,
    rows: usize,
    cols: usize,
    row_stride: isize,
    col_stride: isize,
    owner: PhantomData<&'a [u8]>,
}

// SAFETY: a View only ever reads memory that its constructor's caller promised to leave unchanged for 'a.
unsafe impl Send for View<'_> {}
// SAFETY: as above.
unsafe impl Sync for View<'_> {}

/// What one pass over a matrix finds out.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Scan {
    /// Smallest `e` with every `|a_ij| < 2^e`; 0 for a zero matrix.
    pub exponent: i32,
    /// `2^-2e ||A||_F^2`.
    pub square: f64,
}

const TILE_ROWS: usize = 64;
const TILE_COLS: usize = 512;

impl<'a> View<'a> {
    /// A row-major matrix in a slice.
    ///
    /// # Panics
    /// If `data` has other than `rows * cols` entries.
    pub fn row_major<T: Real>(data: &'a [T], rows: usize, cols: usize) -> Self {
        assert_eq!(data.len(), rows * cols);
        let size = size_of::<T>() as isize;
        // SAFETY: the slice holds rows * cols entries, row after row.
        unsafe { Self::from_raw(data.as_ptr().cast(), T::DTYPE, rows, cols, cols as isize * size, size) }
    }

    /// # Safety
    /// `ptr + i * row_stride + j * col_stride` must be readable as `dtype`, and unchanged, for all
    /// `i < rows`, `j < cols` during `'a`.
    pub unsafe fn from_raw(
        ptr: *const u8,
        dtype: Dtype,
        rows: usize,
        cols: usize,
        row_stride: isize,
        col_stride: isize,
    ) -> Self {
        Self { ptr, dtype, rows, cols, row_stride, col_stride, owner: PhantomData }
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of columns.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Element type.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// The transposed matrix, at no cost.
    pub fn transpose(self) -> Self {
        Self { rows: self.cols, cols: self.rows, row_stride: self.col_stride, col_stride: self.row_stride, ..self }
    }

    /// Some of the rows.
    pub(crate) fn part(self, rows: Range<usize>) -> Self {
        debug_assert!(rows.end <= self.rows);
        Self { ptr: self.at(rows.start, 0), rows: rows.len(), ..self }
    }

    /// The matrix itself, where the kernels can read it without a copy: the same type, aligned, one
    /// unit stride.
    pub(crate) fn direct<T: Real>(&self) -> Option<MatRef<'a, T>> {
        let size = size_of::<T>() as isize;
        let unit = |stride: isize, other: isize, len: usize| {
            stride == size && other >= len as isize * size && other % size == 0
        };
        let strided =
            unit(self.col_stride, self.row_stride, self.cols) || unit(self.row_stride, self.col_stride, self.rows);
        if self.dtype != T::DTYPE || !strided || !(self.ptr as usize).is_multiple_of(size as usize) {
            return None;
        }
        // SAFETY: same dtype, aligned, strides whole multiples of the size; readable by `from_raw`'s promise.
        Some(unsafe {
            MatRef::from_raw_parts(
                self.ptr.cast(),
                self.rows,
                self.cols,
                self.row_stride / size,
                self.col_stride / size,
            )
        })
    }

    /// Copies a tile, row-major, into `out`, widened (or rounded, from f64 to f32) to `T`.
    pub(crate) fn tile<T: Real>(&self, rows: Range<usize>, cols: Range<usize>, out: &mut [T]) {
        debug_assert!(rows.end <= self.rows && cols.end <= self.cols);
        let width = cols.len();
        if !self.by_column() {
            return self.rows_into(rows, cols, width, out);
        }
        let mut column = vec![T::default(); rows.len()];
        for (c, j) in cols.enumerate() {
            self.transpose().row_into(j, rows.start, &mut column);
            column.iter().enumerate().for_each(|(r, x)| out[r * width + c] = *x);
        }
    }

    /// A tile copied into `room` in the order in which it is stored, so that nothing is transposed on the way.
    pub(crate) fn stored_tile<'b, T: Real>(
        &self,
        rows: Range<usize>,
        cols: Range<usize>,
        room: &'b mut Vec<T>,
    ) -> MatRef<'b, T> {
        if self.by_column() {
            return self.transpose().stored_tile(cols, rows, room).transpose();
        }
        let (height, width) = (rows.len(), cols.len());
        // A stride that is no power of two, so that neighbouring rows do not evict each other from the cache.
        let stride = width.next_multiple_of(8) + 8;
        room.resize(height * stride, T::default());
        self.rows_into(rows, cols, stride, room);
        MatRef::from_row_major_slice_with_stride(&*room, height, width, stride)
    }

    /// Whole rows times `2^-exponent`, `stride` entries apart.
    pub(crate) fn scaled_rows<T: Real>(&self, rows: Range<usize>, exponent: i32, stride: usize, out: &mut [T]) {
        self.rows_into(rows, 0..self.cols, stride, out);
        scale(out, exponent);
    }

    fn rows_into<T: Real>(&self, rows: Range<usize>, cols: Range<usize>, stride: usize, out: &mut [T]) {
        for (i, line) in rows.zip(out.chunks_mut(stride.max(1))) {
            self.row_into(i, cols.start, &mut line[..cols.len()]);
        }
    }

    /// Whether neighbours in memory are neighbours in a column.
    pub(crate) fn by_column(&self) -> bool {
        self.row_stride.unsigned_abs() < self.col_stride.unsigned_abs()
    }

    fn at(&self, i: usize, j: usize) -> *const u8 {
        self.ptr.wrapping_offset(i as isize * self.row_stride).wrapping_offset(j as isize * self.col_stride)
    }

    fn row_into<T: Real>(&self, i: usize, j: usize, out: &mut [T]) {
        let (start, stride) = (self.at(i, j), self.col_stride);
        if stride == 2 && self.contiguous_halves_into(start, out) {
            return;
        }
        // SAFETY: out.len() entries of this dtype lie from `start` on, `stride` apart, by `from_raw`'s promise.
        unsafe {
            match self.dtype {
                Dtype::F32 => gather(start, stride, out, |x: f32| T::of(f64::from(x))),
                Dtype::F64 => gather(start, stride, out, T::of),
                Dtype::Bf16 => {
                    gather(start, stride, out, |x: u16| T::of(f64::from(f32::from_bits(u32::from(x) << 16))))
                }
                Dtype::F16 => gather(start, stride, out, |x: u16| T::of(f64::from(f16::from_bits(x).to_f32()))),
            }
        }
    }

    /// Unit-stride f16 goes through the converter that uses the CPU's own instructions.
    fn contiguous_halves_into<T: Real>(&self, at: *const u8, out: &mut [T]) -> bool {
        if self.dtype != Dtype::F16 || !(at as usize).is_multiple_of(2) {
            return false;
        }
        // SAFETY: out.len() aligned halves lie from `at` on, by `from_raw`'s promise and the unit stride.
        let halves: &[f16] = unsafe { std::slice::from_raw_parts(at.cast(), out.len()) };
        let mut wide = [0f32; 64];
        for (from, to) in halves.chunks(64).zip(out.chunks_mut(64)) {
            let wide = &mut wide[..from.len()];
            from.convert_to_f32_slice(wide);
            to.iter_mut().zip(wide).for_each(|(t, w)| *t = T::of(f64::from(*w)));
        }
        true
    }

    /// A row-major copy times `2^-e`.
    pub(crate) fn copied<T: Real>(&self, exponent: i32, par: Par) -> Vec<T> {
        let mut out = vec![T::default(); self.rows * self.cols];
        par.chunks(&mut out, TILE_ROWS * self.cols.max(1), |block, chunk| {
            let start = block * TILE_ROWS;
            let rows = chunk.len() / self.cols.max(1);
            self.tile(start..start + rows, 0..self.cols, chunk);
            scale(chunk, exponent);
        });
        out
    }

    /// The one pass that checks an input: finite, how large, which Frobenius norm.
    ///
    /// # Errors
    /// [`Error::NonFinite`] with `argument` as its name and the entry's place.
    pub fn scan(&self, argument: &str, par: Par) -> Result<Scan> {
        let stored = if self.by_column() { self.transpose() } else { *self };
        let parts = par.map(stored.rows.div_ceil(TILE_ROWS), |block| {
            let rows = block * TILE_ROWS..((block + 1) * TILE_ROWS).min(stored.rows);
            if self.dtype == Dtype::F64 {
                stored.scan_rows(rows, scan_wide)
            } else {
                stored.scan_rows(rows, scan_narrow)
            }
        });
        let Some(parts) = parts.into_iter().collect::<Option<Vec<Scan>>>() else {
            let (row, column) = self.first_bad();
            return Err(Error::NonFinite { argument: argument.to_owned(), row, column });
        };
        let parts: Vec<Scan> = parts.into_iter().filter(|part| part.square > 0.0).collect();
        let exponent = parts.iter().map(|part| part.exponent).max().unwrap_or(0);
        let square = parts.iter().map(|part| part.square * pow2(2 * (part.exponent - exponent))).sum();
        Ok(Scan { exponent, square })
    }

    fn scan_rows<T: Real>(&self, rows: Range<usize>, scan: impl Fn(&[T]) -> Option<Scan>) -> Option<Scan> {
        let mut line = [T::default(); TILE_COLS];
        let mut total = Scan { exponent: 0, square: 0.0 };
        for i in rows {
            for j in (0..self.cols).step_by(TILE_COLS) {
                let line = &mut line[..TILE_COLS.min(self.cols - j)];
                self.row_into(i, j, line);
                total = total.with(scan(line)?);
            }
        }
        Some(total)
    }

    fn first_bad(&self) -> (usize, usize) {
        let mut line = vec![0f64; self.cols];
        for i in 0..self.rows {
            self.row_into(i, 0, &mut line);
            if let Some(j) = line.iter().position(|x| !x.is_finite()) {
                return (i, j);
            }
        }
        (0, 0)
    }
}

/// Reads `out.len()` entries that lie `stride` bytes apart.
///
/// # Safety
/// They must be readable as `K` at any alignment.
unsafe fn gather<K: Copy, T>(start: *const u8, stride: isize, out: &mut [T], widen: impl Fn(K) -> T) {
    let read = |k: usize, stride: isize| {
        // SAFETY: the caller's promise.
        widen(unsafe { start.wrapping_offset(k as isize * stride).cast::<K>().read_unaligned() })
    };
    // The same loop twice: with a constant stride it vectorises.
    if stride == size_of::<K>() as isize {
        out.iter_mut().enumerate().for_each(|(k, x)| *x = read(k, size_of::<K>() as isize));
    } else {
        out.iter_mut().enumerate().for_each(|(k, x)| *x = read(k, stride));
    }
}

/// Multiplies by `2^-exponent`, in two factors since it may itself lie outside the range of `T`.
fn scale<T: Real>(values: &mut [T], exponent: i32) {
    if exponent != 0 {
        let (half, rest) = (T::of(pow2(-(exponent / 2))), T::of(pow2(-(exponent - exponent / 2))));
        values.iter_mut().for_each(|x| *x = *x * half * rest);
    }
}

impl Scan {
    fn with(self, other: Self) -> Self {
        if other.square == 0.0 {
            return self;
        }
        if self.square == 0.0 {
            return other;
        }
        let exponent = self.exponent.max(other.exponent);
        let scaled = |part: Self| part.square * pow2(2 * (part.exponent - exponent));
        Self { exponent, square: scaled(self) + scaled(other) }
    }
}

const LANES: usize = 16;

/// `None` if an entry is not finite. f64 holds the squares of all narrower types.
fn scan_narrow(line: &[f32]) -> Option<Scan> {
    let (mut largest, mut sums) = ([0f32; LANES], [0f64; LANES]);
    lanes(line, |k, x| {
        largest[k] = if x.abs() > largest[k] { x.abs() } else { largest[k] };
        sums[k] += f64::from(x) * f64::from(x);
    });
    let square: f64 = sums.iter().sum();
    let exponent = libm::frexp(f64::from(largest.into_iter().fold(0.0, f32::max))).1;
    square.is_finite().then(|| Scan { exponent, square: square * pow2(-2 * exponent) })
}

/// The same for f64 entries: the largest first, then the squares at its scale.
fn scan_wide(line: &[f64]) -> Option<Scan> {
    let (mut largest, mut poison) = ([0f64; LANES], [0f64; LANES]);
    lanes(line, |k, x| {
        largest[k] = if x.abs() > largest[k] { x.abs() } else { largest[k] };
        poison[k] += x * 0.0;
    });
    if poison.iter().any(|x| *x != 0.0) {
        return None;
    }
    let exponent = libm::frexp(largest.into_iter().fold(0.0, f64::max)).1;
    let (half, rest) = (pow2(-(exponent / 2)), pow2(-(exponent - exponent / 2)));
    let mut sums = [0f64; LANES];
    lanes(line, |k, x| {
        let y = x * half * rest;
        sums[k] += y * y;
    });
    Some(Scan { exponent, square: sums.iter().sum() })
}

/// Calls `add(lane, x)` on every entry, in independent lanes so that the loop vectorises.
#[inline(always)]
fn lanes<T: Copy>(line: &[T], mut add: impl FnMut(usize, T)) {
    let whole = line.chunks_exact(LANES);
    whole.remainder().iter().enumerate().for_each(|(k, x)| add(k, *x));
    whole.for_each(|part| (0..LANES).for_each(|k| add(k, part[k])));
}

#[cfg(test)]
mod tests {
    use super::*;
    use half::bf16;
    use proptest::prelude::*;

    fn raw(data: &[f32], offset: usize, shape: (usize, usize), strides: (isize, isize)) -> View<'_> {
        // SAFETY: every test keeps its strides inside `data`.
        unsafe {
            View::from_raw(data[offset..].as_ptr().cast(), Dtype::F32, shape.0, shape.1, 4 * strides.0, 4 * strides.1)
        }
    }

    proptest! {
        #[test]
        fn every_stride_reads_the_same(rows in 1usize..9, cols in 1usize..9, seed in 0u32..99) {
            let data: Vec<f32> = (0..rows * cols).map(|i| (i as u32 * 37 + seed) as f32).collect();
            let plain = View::row_major(&data, rows, cols);
            let by_column = plain.transpose().copied::<f32>(0, Par::Seq);
            let turned = View::row_major(&by_column, cols, rows).transpose();
            let reversed: Vec<f32> = data.iter().rev().copied().collect();
            let backwards = raw(&reversed, rows * cols - 1, (rows, cols), (-(cols as isize), -1));
            for other in [turned, backwards] {
                prop_assert_eq!(other.copied::<f32>(0, Par::Seq), data.clone());
                prop_assert_eq!(other.scan("a", Par::Seq).unwrap(), plain.scan("a", Par::Seq).unwrap());
            }
        }

        #[test]
        fn half_types_widen_exactly(bits in prop::collection::vec(any::<u16>(), 12)) {
            let view = |dtype| {
                // SAFETY: 12 contiguous entries of two bytes.
                unsafe { View::from_raw(bits.as_ptr().cast(), dtype, 3, 4, 8, 2) }
            };
            let same = |got: Vec<f64>, want: &dyn Fn(u16) -> f64| {
                got.iter().zip(&bits).all(|(g, b)| g.to_bits() == want(*b).to_bits() || (g.is_nan() && want(*b).is_nan()))
            };
            let brain = view(Dtype::Bf16).copied::<f64>(0, Par::Seq);
            prop_assert!(same(brain, &|b| bf16::from_bits(b).to_f64()));
            let half = view(Dtype::F16).copied::<f64>(0, Par::Seq);
            prop_assert!(same(half, &|b| f16::from_bits(b).to_f64()));
        }
    }

    #[test]
    fn zero_strides_repeat() {
        let data = [1.0f32, 2.0];
        assert_eq!(raw(&data, 0, (3, 2), (0, 1)).copied::<f64>(0, Par::Seq), [1.0, 2.0, 1.0, 2.0, 1.0, 2.0]);
    }

    #[test]
    fn the_first_bad_entry_is_named() {
        for bad in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
            let mut data = vec![1e300; 200 * 700];
            data[150 * 700 + 613] = bad;
            let view = View::row_major(&data, 200, 700);
            let place = |row, column| Err(Error::NonFinite { argument: "a".into(), row, column });
            assert_eq!(view.scan("a", Par::Seq), place(150, 613));
            assert_eq!(view.transpose().scan("a", Par::Seq), place(613, 150));
        }
    }

    #[test]
    fn norms_at_the_ends_of_the_range() {
        for (x, exponent) in [(1e300f64, 997), (1e-300, -996), (5e-324, -1073)] {
            let data = vec![x; 40];
            let scan = View::row_major(&data, 5, 8).scan("a", Par::Seq).unwrap();
            let unit = x * pow2(-scan.exponent / 2) * pow2(-(scan.exponent - scan.exponent / 2));
            assert_eq!(scan.exponent, exponent);
            assert!((scan.square - 40.0 * unit * unit).abs() < 1e-13 * scan.square);
        }
        assert_eq!(View::row_major(&[0f32; 6], 2, 3).scan("a", Par::Seq).unwrap().square, 0.0);
    }
}
