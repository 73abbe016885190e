//! Decoding of packed matrices on a device: our kernel, or libtorch's operations, which give the same bits. Neither
//! waits for the device.

use super::PackedMatrices;
use crate::{
    ops::cuda,
    quant::{Format, nf4},
};
use std::{cell::OnceCell, ops::Range};
use tch::{Device, Kind, Tensor};

/// Codes of a tile of four-bit codes, in bytes.
const CODES: i64 = 512;

/// Writes the matrices of `bases` to `out` `[bases, rows, columns]`.
pub(super) fn decode(packed: &PackedMatrices, bases: &Range<usize>, out: &Tensor) {
    let _span = crate::trace::operation("linear.decode");
    if !cuda::kernels(out).is_some_and(|kernels| kernels.decode(packed, bases, out)) {
        with_torch(packed, bases, out);
    }
}

/// The same by libtorch's operations, leaf by leaf.
fn with_torch(packed: &PackedMatrices, bases: &Range<usize>, out: &Tensor) {
    let PackedMatrices { format, widths, columns, .. } = packed;
    let [first, count] = [bases.start, bases.len()].map(|bases| (bases * packed.tiles_of_base()) as i64);
    let bases_of =
        |tensor: &Tensor, each: &[i64]| tensor.view([&[bases.len() as i64], each].concat().as_slice());
    let tiles = packed.tiles.narrow(0, first, count);
    let tiles = bases_of(&tiles, &[packed.tiles_of_base() as i64, format.tile().bytes as i64]);
    // Of each base and leaf.
    let scales = packed.scales.as_ref().map(|scales| {
        let [first, count] = [bases.start, bases.len()].map(|bases| (bases * widths.len()) as i64);
        bases_of(&scales.narrow(0, first, count), &[widths.len() as i64, 1, 1])
    });
    let (mut tile, mut row) = (0, 0);
    for (leaf, &rows) in widths.iter().enumerate() {
        let grid = packed.grid(rows);
        let count = grid.tiles() as i64;
        let own = tiles.narrow(1, tile, count);
        let (rows, columns) = (rows as i64, *columns as i64);
        let flat = |values: Tensor, columns: i64| {
            bases_of(&bases_of(&values, &[-1]).narrow(1, 0, rows * columns), &[rows, columns])
        };
        let numbers = match format {
            Format::Nf4 => {
                let [low, high] = nibbles(&own);
                let codes = Tensor::stack(&[high, low], -1);
                let values = nf4_values(&codes.view([-1])).view([-1, 64]);
                let absmax = own.narrow(2, CODES, 64).contiguous().view_dtype(Kind::Float);
                flat(values * absmax.view([-1, 1]), columns)
            }
            Format::NvFp4 => {
                let [low, high] = nibbles(&own);
                let values = e2m1(&Tensor::stack(&[low, high], -1));
                let stored = e4m3(&own.narrow(2, CODES, 64));
                let scale = match &scales {
                    Some(scales) => stored * scales.select(1, leaf as i64),
                    None => stored,
                };
                let group = format.group() as i64;
                let padded = (columns + group - 1) / group * group;
                flat(values.view([-1, group]) * scale.view([-1, 1]), padded).narrow(2, 0, columns)
            }
            Format::BlockFp8 => {
                let side = format.group() as i64;
                let [down, across] = [rows, columns].map(|length| (length + side - 1) / side);
                let values = e4m3(&own.narrow(2, 0, side * side));
                let scale = own.narrow(2, side * side, 4).contiguous().view_dtype(Kind::Float);
                let blocks = bases_of(&(values * scale), &[down, across, side, side]);
                let all =
                    bases_of(&blocks.permute([0, 1, 3, 2, 4]).contiguous(), &[down * side, across * side]);
                all.narrow(1, 0, rows).narrow(2, 0, columns)
            }
        };
        out.narrow(1, row, rows).copy_(&numbers);
        (tile, row) = (tile + count, row + rows);
    }
}

/// Low and high halves of the bytes of codes of `tiles` `[bases, tiles, bytes]`.
fn nibbles(tiles: &Tensor) -> [Tensor; 2] {
    let codes = tiles.narrow(2, 0, CODES);
    [codes.bitwise_and(15), codes.bitwise_right_shift_tensor_scalar(4)]
}

/// Values of nf4 `codes`. The table is sent to the device once.
fn nf4_values(codes: &Tensor) -> Tensor {
    thread_local! {
        static TABLE: OnceCell<(Device, Tensor)> = const { OnceCell::new() };
    }
    let table = |device: Device| Tensor::from_slice(&nf4::TABLE).to_device(device);
    let codes = codes.to_kind(Kind::Int);
    TABLE.with(|known| {
        let (device, known) = known.get_or_init(|| (codes.device(), table(codes.device())));
        let known = if *device == codes.device() { known.shallow_clone() } else { table(codes.device()) };
        known.index_select(0, &codes)
    })
}

/// Values of e4m3 `codes`: exponent and mantissa are those of an fp32 number that is 2^120 times smaller.
fn e4m3(codes: &Tensor) -> Tensor {
    floats(codes, 0x80, 24, 0x7f, 20) * 120f64.exp2()
}

/// Values of e2m1 `codes`, likewise 2^126 times.
fn e2m1(codes: &Tensor) -> Tensor {
    floats(codes, 8, 28, 7, 22) * 126f64.exp2()
}

/// fp32 numbers with the sign bit of `codes`, and their other bits.
fn floats(codes: &Tensor, sign: i64, to_sign: i64, rest: i64, to_rest: i64) -> Tensor {
    let codes = codes.to_kind(Kind::Int);
    let moved = |mask: i64, by: i64| codes.bitwise_and(mask).bitwise_left_shift_tensor_scalar(by);
    moved(sign, to_sign).bitwise_or_tensor(&moved(rest, to_rest)).view_dtype(Kind::Float)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        device::{self, DeviceChoice, RankDevice},
        ops::linear::Weight,
        rng::Stream,
    };

    fn formats_and_kinds() -> impl Iterator<Item = (Format, Kind)> {
        Format::ALL.into_iter().flat_map(|format| [(format, Kind::Float), (format, Kind::BFloat16)])
    }

    /// Any codes, e4m3's NaNs among them, in `bases` bases of `widths` rows; every fifth block has scale 0.
    fn any(format: Format, bases: usize, widths: &[usize], columns: usize, kind: Kind) -> PackedMatrices {
        let stream = Stream::new(7, "any tiles");
        let scale = |i: u64| if i.is_multiple_of(5) { 0.0 } else { stream.uniform(i) - 0.4 };
        let mut packed = PackedMatrices {
            format,
            tiles: Tensor::new(),
            scales: None,
            widths: widths.to_vec(),
            columns,
            kind,
        };
        let (tiles, bytes) = (bases * packed.tiles_of_base(), format.tile().bytes);
        let mut all: Vec<u8> = (0..(tiles * bytes) as u64).map(|i| stream.below(i, 256) as u8).collect();
        for (i, tile) in all.chunks_exact_mut(bytes).enumerate() {
            let scales: &mut [u8] = match format {
                Format::Nf4 => &mut tile[CODES as usize..],
                Format::BlockFp8 => &mut tile[128 * 128..][..4],
                Format::NvFp4 => &mut [],
            };
            for (k, to) in scales.chunks_exact_mut(4).enumerate() {
                to.copy_from_slice(&scale((i * 16 + k) as u64).to_le_bytes());
            }
        }
        packed.tiles = Tensor::from_slice(&all).view([-1, bytes as i64]);
        let globals: Vec<f32> = (0..bases * widths.len()).map(|i| scale(i as u64)).collect();
        packed.scales = format.has_global().then(|| Tensor::from_slice(&globals));
        packed
    }

    fn bits(tensor: &Tensor) -> Tensor {
        tensor.view_dtype(if tensor.kind() == Kind::Float { Kind::Int } else { Kind::Int16 })
    }

    #[test]
    fn kernels_and_libtorch_give_the_bits_of_the_host() {
        let kernels = cuda::on_host::kernels();
        let shapes: [(&[usize], usize); 4] =
            [(&[1, 128], 256), (&[3, 130], 200), (&[3, 2], 1003), (&[1, 2, 3, 4, 5, 6, 7, 8], 40)];
        for (format, kind) in formats_and_kinds() {
            for (widths, columns) in shapes {
                let packed = any(format, 2, widths, columns, kind);
                let (rows, columns) = (packed.rows() as i64, columns as i64);
                let weight = Weight::Packed(packed);
                let expected = weight.all().tensor().shallow_clone();
                let Weight::Packed(packed) = &weight else { unreachable!() };
                // At an element that begins no 16 bytes, too. What lies beside stays as it is.
                for (bases, before) in [(0..2, 8), (1..2, 1)] {
                    let expected = expected.narrow(0, bases.start as i64, bases.len() as i64);
                    let memory =
                        || Tensor::full([before + 2 * rows * columns + 1], 77.0, (kind, Device::Cpu));
                    for by_kernel in [true, false] {
                        let memory = memory();
                        let own = memory.narrow(0, before, expected.numel() as i64);
                        let out = own.view([bases.len() as i64, rows, columns]);
                        if by_kernel {
                            assert!(kernels.decode(packed, &bases, &out));
                        } else {
                            with_torch(packed, &bases, &out);
                        }
                        let same = bits(&out).equal(&bits(&expected.contiguous()));
                        assert!(same, "{format} {kind:?} {widths:?} {columns} {bases:?} {by_kernel}");
                        let outside = memory.numel() - expected.numel();
                        let _ = own.shallow_clone().fill_(77.0);
                        assert!(memory.eq(77.0).all().int64_value(&[]) == 1 && outside > 0);
                    }
                }
            }
        }
    }

    /// On a GPU, with the rate of each kernel (bytes read and written).
    #[test]
    #[ignore = "needs a GPU: tests/gpu.sh runs it"]
    fn gpu_gives_the_bits_of_the_host() {
        const TIMES: usize = 50;
        device::torch::load_cuda().unwrap();
        let device = RankDevice::open(DeviceChoice::Cuda, 0).unwrap().tensors();
        let kernels = cuda::kernels(&Tensor::zeros([1], (Kind::Float, device))).unwrap();
        let shapes: [(usize, &[usize], usize); 4] =
            [(3, &[3, 130, 1], 200), (3, &[17, 2], 1003), (8, &[768, 768], 2048), (1, &[8192], 8192)];
        for (format, kind) in formats_and_kinds() {
            for (bases, widths, columns) in shapes {
                let packed = any(format, bases, widths, columns, kind);
                let weight = Weight::Packed(packed);
                let expected = bits(&weight.all().tensor().contiguous());
                let Weight::Packed(packed) = weight else { unreachable!() };
                let tiles = packed.tiles.to_device(device);
                let scales = packed.scales.as_ref().map(|scales| scales.to_device(device));
                let packed = PackedMatrices { tiles, scales, ..packed };
                let shape = [bases as i64, packed.rows() as i64, columns as i64];
                let out = || Tensor::zeros(shape, (kind, device));
                let (by_kernel, by_torch) = (out(), out());
                assert!(kernels.decode(&packed, &(0..bases), &by_kernel));
                with_torch(&packed, &(0..bases), &by_torch);
                for found in [&by_kernel, &by_torch] {
                    let found = bits(&found.to_device(Device::Cpu)).view_as(&expected);
                    assert!(found.equal(&expected), "{format} {kind:?} {widths:?} {columns}");
                }
                if columns == 8192 {
                    let begin = std::time::Instant::now();
                    (0..TIMES).for_each(|_| assert!(kernels.decode(&packed, &(0..bases), &by_kernel)));
                    // Reading a number waits for the device.
                    by_kernel.view([-1]).double_value(&[0]);
                    let seconds = begin.elapsed().as_secs_f64() / TIMES as f64;
                    let bytes = packed.tiles.numel() + by_kernel.numel() * kind.elt_size_in_bytes();
                    println!("{format} to {kind:?}: {:.0} GB/s", bytes as f64 / seconds / 1e9);
                }
            }
        }
    }

    #[test]
    fn what_the_kernels_do_not_take_is_refused_untouched() {
        let kernels = cuda::on_host::kernels();
        let refused = |packed: &PackedMatrices, bases: Range<usize>, kind: Kind| {
            let shape = [bases.len() as i64, packed.rows() as i64, packed.columns as i64];
            let out = Tensor::full(shape, 7.0, (kind, Device::Cpu));
            !kernels.decode(packed, &bases, &out) && out.eq(7.0).all().int64_value(&[]) == 1
        };
        let packed = any(Format::NvFp4, 2, &[3, 4], 40, Kind::Float);
        assert!(!refused(&packed, 0..2, Kind::Float));
        assert!(refused(&packed, 0..2, Kind::Double) && refused(&packed, 1..3, Kind::Float));
        assert!(refused(&any(Format::Nf4, 1, &[1; 9], 40, Kind::Float), 0..1, Kind::Float));
        assert!(refused(&PackedMatrices { scales: None, ..packed }, 0..2, Kind::Float));
    }
}
