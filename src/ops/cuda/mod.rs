//! CUDA kernels of this crate (`kernels.cu`, `decode.cu`), and the functions by which operations launch them.
//!
//! An operation asks [`kernels`] for them and calls one. `false` means that nothing was done, for a kind or shape that
//! the kernels do not take, and that libtorch's operations have to compute. The source is compiled at the first
//! operation on a device. If that fails, a warning says so and libtorch computes everything. Tests beside the
//! operations run the same source on threads of the host.

use super::{
    cross_entropy::{GradientFactors, TargetRows},
    rope::Rotated,
    row_layout::RowLayout,
};
use crate::device::{
    self, DeviceError,
    kernels::{Launch, Program},
};
use std::{
    ffi::c_void,
    ptr::{from_mut, null_mut},
    sync::OnceLock,
};
use tch::{Device, Kind, Tensor};

/// The kernels' source.
pub const SOURCE: &str = concat!(include_str!("kernels.cu"), include_str!("decode.cu"));

/// Columns that a thread loads at once, see `kernels.cu`. Rows are whole packs.
const PACK: usize = 8;

const WARP: u32 = 32;

/// Threads of a block.
const THREADS: u32 = 256;

/// Names of kernels: those for bf16 and fp32, then those of one kind.
macro_rules! named {
    ($($name:literal),*; $($whole:literal),*) => { [$(concat!($name, "_bf16"), concat!($name, "_f32"),)* $($whole),*] };
}

const NAMES: [&str; 29] = named!(
    "norm_forward",
    "norm_recompute",
    "norm_backward",
    "rope",
    "swiglu_forward",
    "swiglu_backward",
    "gather_rows",
    "combine_rows",
    "exponentials",
    "head_gradient",
    "adamw",
    "decode_nf4",
    "decode_block_fp8",
    "decode_nvfp4";
    "head_gradient_wide_bf16"
);

/// The kernels of this rank's device.
pub struct Kernels(Box<dyn Launch>);

/// The kernels of the device of `tensor`, if it has any.
pub fn kernels(tensor: &Tensor) -> Option<&'static Kernels> {
    static KERNELS: OnceLock<Option<Kernels>> = OnceLock::new();
    if !matches!(tensor.device(), Device::Cuda(_)) {
        return None;
    }
    let driver = device::current()?;
    let load = || match Program::load(driver, SOURCE, &NAMES) {
        Ok(program) => Some(Kernels(Box::new(program))),
        Err(error) => {
            tracing::warn!("no kernels of our own, libtorch's operations are slower: {error}");
            None
        }
    };
    KERNELS.get_or_init(load).as_ref()
}

/// `Rows` of `kernels.cu`.
#[repr(C)]
#[derive(Clone, Copy)]
struct RawRows {
    first: *mut c_void,
    stride: i64,
    inner: i64,
    outer_stride: i64,
}

/// The rows of a tensor as kernels take them.
#[derive(Clone, Copy)]
struct Rows {
    raw: RawRows,
    kind: Kind,
    rows: i64,
    columns: i32,
}

impl Rows {
    /// `None` where rows are not whole packs at multiples of 16 bytes.
    fn of(tensor: &Tensor) -> Option<Self> {
        let layout = RowLayout::of(&tensor.size(), &tensor.stride())?;
        let RowLayout { rows, columns, stride, inner, outer_stride } = layout;
        let first = tensor.data_ptr();
        let whole = [columns, stride, outer_stride].iter().all(|n| n % PACK == 0);
        let (stride, inner, outer_stride) = (stride as i64, inner as i64, outer_stride as i64);
        let raw = RawRows { first, stride, inner, outer_stride };
        let rows = Self { raw, kind: tensor.kind(), rows: rows as i64, columns: columns.try_into().ok()? };
        (whole && first.addr().is_multiple_of(16)).then_some(rows)
    }

    /// The rows of `tensor`, of the same kind and number, with `columns` columns.
    fn beside(&self, tensor: &Tensor, columns: i32) -> Option<RawRows> {
        let other = Self::of(tensor)?;
        let fits = (other.kind, other.rows, other.columns) == (self.kind, self.rows, columns);
        fits.then_some(other.raw)
    }

    /// The rows of `tensor`, of the same kind and columns, in any number.
    fn any(&self, tensor: &Tensor) -> Option<RawRows> {
        let other = Self::of(tensor)?;
        ((other.kind, other.columns) == (self.kind, self.columns)).then_some(other.raw)
    }

    /// The values of a dense tensor of `kind` with `each` values a row.
    fn values(&self, tensor: &Tensor, kind: Kind, each: i64) -> Option<*mut c_void> {
        (tensor.numel() as i64 == self.rows * each).then(|| values(tensor, kind))?
    }

    /// An fp32 value for each row; null where there is no tensor.
    fn floats<'a>(&self, tensor: impl Into<Option<&'a Tensor>>) -> Option<*mut c_void> {
        tensor.into().map_or(Some(null_mut()), |tensor| self.values(tensor, Kind::Float, 1))
    }

    /// An fp32 value for each column.
    fn weights(&self, tensor: &Tensor) -> Option<*mut c_void> {
        (tensor.numel() == self.columns as usize).then(|| values(tensor, Kind::Float))?
    }
}

/// The values of a dense tensor of `kind`.
fn values(tensor: &Tensor, kind: Kind) -> Option<*mut c_void> {
    (tensor.kind() == kind && tensor.is_contiguous()).then(|| tensor.data_ptr())
}

/// The `n` values of a dense tensor of `kind`, where they are whole packs.
fn flat(tensor: &Tensor, kind: Kind, n: usize) -> Option<*mut c_void> {
    let values = values(tensor, kind).filter(|values| values.addr().is_multiple_of(16))?;
    (tensor.numel() == n && n.is_multiple_of(PACK)).then_some(values)
}

/// Blocks that give each row a warp.
fn warps(rows: i64) -> i64 {
    (rows as u64).div_ceil(u64::from(THREADS / WARP)) as i64
}

/// Launches the kernel `$name` for tensors of `$kind` over `$blocks`. The arguments have its parameters' types.
macro_rules! start {
    ($kernels:expr, $name:literal, $kind:expr, $blocks:expr, $($argument:expr),* $(,)?) => {{
        let kernel = match $kind {
            Kind::BFloat16 => concat!($name, "_bf16"),
            Kind::Float => concat!($name, "_f32"),
            _ => return None,
        };
        $kernels.start(kernel, $blocks, &mut arguments!($($argument),*))
    }};
}

/// The addresses of a kernel's arguments.
macro_rules! arguments {
    ($($argument:expr),*) => { [$(from_mut(&mut { $argument }).cast::<c_void>()),*] };
}

// Behind the macros that it uses.
mod decode;

impl Kernels {
    /// Launches a kernel, unless there is nothing to do. Panics on failure, as libtorch's operations do.
    fn start(&self, kernel: &'static str, blocks: i64, arguments: &mut [*mut c_void]) -> Option<()> {
        let blocks = u32::try_from(blocks).ok()?;
        if blocks > 0 {
            // SAFETY: the methods below pass as many arguments as the kernel of that name has, of its types, and check
            // that the tensors have the rows and columns that it goes through. The tensors outlive the call, and
            // libtorch reuses freed memory in the order of its stream, which is the kernel's.
            let started = unsafe { self.0.launch(kernel, blocks, THREADS, arguments) };
            started.unwrap_or_else(|error: DeviceError| panic!("{kernel}: {error}"));
        }
        Some(())
    }

    /// See [`super::norm::forward_into`].
    pub fn norm_forward(&self, x: &Tensor, weight: &Tensor, eps: f64, y: &Tensor, r: &Tensor) -> bool {
        let run = || {
            let all @ Rows { raw, kind, rows, columns } = Rows::of(x)?;
            let (w, y, r) = (all.weights(weight)?, all.beside(y, columns)?, all.floats(r)?);
            start!(self, "norm_forward", kind, warps(rows), raw, w, y, r, rows, columns, eps as f32)
        };
        run().is_some()
    }

    /// See [`super::norm::recompute`].
    pub fn norm_recompute(&self, x: &Tensor, weight: &Tensor, r: &Tensor, y: &Tensor) -> bool {
        let run = || {
            let all @ Rows { raw, kind, rows, columns } = Rows::of(x)?;
            let (w, y, r) = (all.weights(weight)?, all.beside(y, columns)?, all.floats(r)?);
            start!(self, "norm_recompute", kind, warps(rows), raw, w, y, r, rows, columns)
        };
        run().is_some()
    }

    /// See [`super::norm::backward`].
    pub fn norm_backward(
        &self,
        d: &Tensor,
        x: &Tensor,
        weight: &Tensor,
        r: &Tensor,
        add: Option<&Tensor>,
    ) -> bool {
        let run = || {
            let all @ Rows { raw, kind, rows, columns } = Rows::of(x)?;
            let (d, w, r) = (all.beside(d, columns)?, all.weights(weight)?, all.floats(r)?);
            let (has_add, add) = (i32::from(add.is_some()), all.beside(add.unwrap_or(x), columns)?);
            start!(self, "norm_backward", kind, warps(rows), d, raw, w, r, add, has_add, rows, columns)
        };
        run().is_some()
    }

    /// See [`super::rope::forward`]; `direction` is 1 or −1.
    pub fn rope(&self, x: &Tensor, rotated: Rotated, cos: &Tensor, sin: &Tensor, direction: f64) -> bool {
        let Rotated { heads, dim } = rotated;
        let run = || {
            let all @ Rows { raw, kind, rows, columns } = Rows::of(x)?;
            let half = *cos.size().last()?;
            if half % PACK as i64 != 0 || dim % PACK as i64 != 0 || heads * dim > i64::from(columns) {
                return None;
            }
            let packs = rows * heads * half / PACK as i64;
            let blocks = (packs as u64).div_ceil(u64::from(THREADS)) as i64;
            let table = |table| all.values(table, Kind::Float, half);
            let (cos, sin) = (table(cos)?, table(sin)?);
            let (heads, dim, half) = (heads as i32, dim as i32, half as i32);
            start!(self, "rope", kind, blocks, raw, cos, sin, direction as f32, rows, heads, dim, half)
        };
        run().is_some()
    }

    /// See [`super::swiglu::forward`].
    pub fn swiglu_forward(&self, gate_up: &Tensor, scale: Option<&Tensor>, y: &Tensor) -> bool {
        let run = || {
            let all @ Rows { raw, kind, rows, columns } = Rows::of(y)?;
            let (gate_up, scale) = (all.beside(gate_up, 2 * columns)?, all.floats(scale)?);
            start!(self, "swiglu_forward", kind, warps(rows), gate_up, scale, raw, rows, columns)
        };
        run().is_some()
    }

    /// See [`super::swiglu::backward`]; with `scales` c and dc.
    pub fn swiglu_backward(&self, d: &Tensor, gate_up: &Tensor, scales: Option<(&Tensor, &Tensor)>) -> bool {
        let run = || {
            let all @ Rows { raw, kind, rows, columns } = Rows::of(d)?;
            let (scale, d_scale) = scales.unzip();
            let gate_up = all.beside(gate_up, 2 * columns)?;
            let (scale, d_scale) = (all.floats(scale)?, all.floats(d_scale)?);
            start!(self, "swiglu_backward", kind, warps(rows), raw, gate_up, scale, d_scale, rows, columns)
        };
        run().is_some()
    }

    /// `out` [rows, n] from x [any, n]: row i is row `at[i]`, or zeros where `at[i]` is negative.
    pub fn gather_rows(&self, x: &Tensor, at: &Tensor, out: &Tensor) -> bool {
        let run = || {
            let all @ Rows { raw, kind, rows, columns } = Rows::of(out)?;
            let (x, at) = (all.any(x)?, all.values(at, Kind::Int64, 1)?);
            start!(self, "gather_rows", kind, warps(rows), x, at, raw, rows, columns)
        };
        run().is_some()
    }

    /// `out` [rows, n] from x [any, n]: row i is the sum of the k rows `at[i]` (`at` [rows, k]) and of row i of `add`.
    pub fn combine_rows(&self, x: &Tensor, at: &Tensor, add: Option<&Tensor>, out: &Tensor) -> bool {
        let run = || {
            let all @ Rows { raw, kind, rows, columns } = Rows::of(out)?;
            let k = *at.size().get(1)?;
            let (x, at, k) = (all.any(x)?, all.values(at, Kind::Int64, k)?, k as i32);
            let (has_add, add) = (i32::from(add.is_some()), all.beside(add.unwrap_or(out), columns)?);
            start!(self, "combine_rows", kind, warps(rows), x, at, k, add, has_add, raw, rows, columns)
        };
        run().is_some()
    }

    /// See [`super::cross_entropy::Sums::exponentials`]; `sums` are m, s, l_t and r.
    pub fn exponentials(&self, logits: &Tensor, targets: &Tensor, sums: [&Tensor; 4]) -> bool {
        let run = || {
            let all @ Rows { raw, kind, rows, columns } = Rows::of(logits)?;
            let [m, s, target_logits, rescale] = sums;
            let width = *targets.size().get(1)?;
            let (m, s, rescale) = (all.floats(m)?, all.floats(s)?, all.floats(rescale)?);
            let target_logits = all.values(target_logits, Kind::Float, width)?;
            let (targets, width) = (all.values(targets, Kind::Int64, width)?, width as i32);
            start!(
                self,
                "exponentials",
                kind,
                rows,
                raw,
                targets,
                width,
                m,
                s,
                target_logits,
                rescale,
                columns
            )
        };
        run().is_some()
    }

    /// See [`super::cross_entropy::Sums::gradient`].
    pub fn head_gradient(&self, a: &Tensor, targets: TargetRows, factors: &GradientFactors) -> bool {
        let run = || {
            let all @ Rows { raw, kind, rows, columns } = Rows::of(a)?;
            let weight = Rows::of(targets.weight).filter(|weight| weight.columns == columns)?;
            let offsets = values(targets.offsets, Kind::Int64)?;
            let width = *factors.target.size().get(1)?;
            let target = all.values(&factors.target, Kind::Float, width)?;
            let (row, width) = (all.values(&factors.row, Kind::Float, 2)?, width as i32);
            let (blocks, w) = (warps(rows), weight.raw);
            let name = match (kind, weight.kind) {
                (Kind::BFloat16, Kind::BFloat16) => "head_gradient_bf16",
                (Kind::Float, Kind::Float) => "head_gradient_f32",
                (Kind::Float, Kind::BFloat16) => "head_gradient_wide_bf16",
                _ => return None,
            };
            self.start(name, blocks, &mut arguments!(raw, w, offsets, target, width, row, rows, columns))
        };
        run().is_some()
    }

    /// See [`super::adamw::Update::apply`]: g, p, m and v, then p in compute dtype, and `Factors` of `kernels.cu`.
    pub fn adamw(&self, pieces: [&Tensor; 4], compute: &Tensor, factors: [f32; 9]) -> bool {
        let n = pieces[0].numel();
        let run = || {
            let [g, p, m, v] = pieces.map(|piece| flat(piece, Kind::Float, n));
            let (g, p, m, v, out) = (g?, p?, m?, v?, flat(compute, compute.kind(), n)?);
            let packs = (n / PACK) as u64;
            let blocks = packs.div_ceil(u64::from(THREADS)) as i64;
            start!(self, "adamw", compute.kind(), blocks, g, p, m, v, out, factors, n as i64)
        };
        run().is_some()
    }
}

#[cfg(test)]
pub(crate) mod on_host {
    //! Kernels on threads of the host, see `tests/kernels_on_host.cpp`.

    use super::*;
    use libloading::Library;
    use std::{
        ffi::{CString, c_char, c_int},
        path::Path,
        process::Command,
    };

    struct Host(Library);

    impl Launch for Host {
        unsafe fn launch(
            &self,
            kernel: &'static str,
            blocks: u32,
            threads: u32,
            arguments: &mut [*mut c_void],
        ) -> Result<(), DeviceError> {
            type Entry = unsafe extern "C" fn(*const c_char, u32, u32, *mut *mut c_void) -> c_int;
            let name = CString::new(kernel).unwrap();
            // SAFETY: tests/kernels_on_host.cpp defines `launch` with this signature; the caller promises arguments
            // that the kernel takes, as `Launch::launch` demands.
            let code = unsafe {
                let launch = self.0.get::<Entry>(b"launch\0").unwrap();
                launch(name.as_ptr(), blocks, threads, arguments.as_mut_ptr())
            };
            assert_eq!(code, 0, "no kernel {kernel}");
            Ok(())
        }
    }

    /// Compiles the kernels anew, which takes a second and is never stale.
    pub fn kernels() -> Kernels {
        let folder = tempfile::tempdir().unwrap();
        let library = folder.path().join("kernels.so");
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/kernels_on_host.cpp");
        let mut compiler = Command::new("c++");
        compiler.args(["-std=c++20", "-O1", "-shared", "-fPIC", "-pthread"]);
        // What a GPU loads or stores at once is aligned to its size: a breach ends the process.
        compiler.args(["-fsanitize=alignment", "-fsanitize-undefined-trap-on-error"]);
        assert!(compiler.arg(source).arg("-o").arg(&library).status().unwrap().success());
        // SAFETY: the library was just built from a source of this repository; its initialisers fill a table of
        // kernels.
        Kernels(Box::new(Host(unsafe { Library::new(library) }.unwrap())))
    }
}
