use super::*;
use crate::rng::Stream;
use half::bf16;
use proptest::prelude::*;

fn values(name: &str, count: usize) -> Vec<f32> {
    let stream = Stream::new(3, name);
    (0..count as u64).map(|i| stream.normal(i) * 0.02).collect()
}

fn whole(grid: Grid, values: &[f32]) -> (Vec<u8>, f32) {
    let global = grid.format.global(amax(values).unwrap());
    let mut packed = vec![0xa5; grid.bytes()];
    grid.pack(0..grid.tiles(), values, global, &mut packed).unwrap();
    (packed, global)
}

#[test]
fn tiles_are_whole_cache_lines() {
    for format in Format::ALL {
        assert_eq!(format.tile().bytes % 64, 0, "{format}");
        assert_eq!(format.name().parse::<Format>().unwrap(), format);
    }
    assert_eq!(Format::ALL.map(|format| format.tile().bytes), [576, 16448, 576]);
    assert_eq!(Format::ALL.map(Format::group), [64, 128, 16]);
    let refused = "int8".parse::<Format>().unwrap_err();
    assert_eq!(refused.to_string(), "int8 is no packed format; nf4, block_fp8 and nvfp4 are");
}

#[test]
fn a_matrix_of_zeros_is_zeros() {
    for format in Format::ALL {
        let grid = Grid { format, rows: 5, columns: 70 };
        let (packed, global) = whole(grid, &[0.0; 350]);
        let mut back = vec![1f32; 350];
        grid.unpack(0..grid.tiles(), &packed, global, &mut back).unwrap();
        assert_eq!(back, vec![0.0; 350], "{format}");
        if format == Format::Nf4 {
            assert!(packed[..512].iter().all(|&byte| byte == 0x77));
        }
    }
}

#[test]
fn weights_that_are_not_finite_are_errors_with_their_place() {
    for format in Format::ALL {
        let grid = Grid { format, rows: 130, columns: 33 };
        for (index, value) in [(0, f32::NAN), (129 * 33 + 32, f32::INFINITY), (2000, f32::NEG_INFINITY)] {
            let mut values = values("w", 130 * 33);
            values[index] = value;
            let mut packed = vec![0; grid.bytes()];
            let error = grid.pack(0..grid.tiles(), &values, 1.0, &mut packed).unwrap_err();
            let QuantError::NonFinite { index: found, value: bad } = error else { panic!("{error}") };
            assert_eq!((found, bad.to_bits()), (index, value.to_bits()), "{format}");
        }
    }
}

#[test]
fn wrong_lengths_are_errors() {
    for format in Format::ALL {
        let grid = Grid { format, rows: 10, columns: 20 };
        let (mut packed, values) = (vec![0; grid.bytes()], vec![0f32; 200]);
        let mut out = vec![0f32; 200];
        let is_length = |result: Result<(), QuantError>| matches!(result, Err(QuantError::Length { .. }));
        assert!(is_length(grid.pack(0..1, &values[1..], 1.0, &mut packed)));
        assert!(is_length(grid.pack(0..1, &values, 1.0, &mut packed[1..])));
        assert!(is_length(grid.unpack(0..1, &packed[1..], 1.0, &mut out)));
        assert!(is_length(grid.unpack(0..1, &packed, 1.0, &mut out[1..])));
        let whole = Packed { grid, bytes: &packed, global: 1.0 };
        assert!(is_length(whole.rectangle(0..11, 0..20, &mut [0f32; 220])));
        assert!(is_length(whole.rectangle(0..10, 0..21, &mut [0f32; 210])));
        assert!(is_length(whole.rectangle(0..10, 0..20, &mut [0f32; 1])));
    }
    assert!(nf4::from_blocks(&[0; 33], &[0.0], &mut [0; 576]).is_err());
    assert!(nvfp4::from_groups(&[0; 7], &[0], &mut [0; 576]).is_err());
    assert!(nested::decode(&[0; 257], &nested::map(), &[1.0], 0.0).is_err());
}

#[test]
fn bytes_of_bitsandbytes_are_tiles_and_back() {
    let grid = Grid { format: Format::Nf4, rows: 37, columns: 45 };
    let (packed, _) = whole(grid, &values("w", 37 * 45));
    let (codes, absmax) = nf4::to_blocks(&packed, 37 * 45).unwrap();
    assert_eq!((codes.len(), absmax.len()), (833, 27));
    let mut back = vec![0; grid.bytes()];
    nf4::from_blocks(&codes, &absmax, &mut back).unwrap();
    assert_eq!(back, packed);
    // The last byte has one element, and code 7.
    assert_eq!(codes[832] & 15, 7);
}

#[test]
fn floats_of_eight_bits_are_their_own_nearest() {
    for code in (0..=255u8).filter(|&code| !minifloat::is_e4m3_nan(code)) {
        assert_eq!(minifloat::to_e4m3(minifloat::from_e4m3(code)), code);
    }
    assert_eq!([500.0, 1e30, -1e30].map(minifloat::to_e4m3), [0x7e, 0x7e, 0xfe]);
    for code in 0..16 {
        assert_eq!(minifloat::to_e2m1(minifloat::E2M1[usize::from(code)]), code);
    }
    assert_eq!(minifloat::from_e8m0(127), Some(1.0));
    assert_eq!(minifloat::from_e8m0(0), Some(2f32.powi(-127)));
    assert_eq!(minifloat::from_e8m0(255), None);
}

/// Bound of the distance between a value and its decoded code, if no magnitude is above `amax`.
fn worst_step(format: Format, amax: f32) -> f32 {
    match format {
        Format::Nf4 => 0.16 * amax,
        Format::BlockFp8 => 0.0358 * amax,
        Format::NvFp4 => 0.19 * amax,
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Tiles packed in any pieces are the tiles of the whole, and every way of decoding gives the same values.
    #[test]
    fn pieces_are_pieces_of_the_whole(
        rows in 1usize..300, columns in 1usize..300, format in 0usize..3, cut in 0.0f64..1.0, seed in 0u32..1000,
    ) {
        let grid = Grid { format: Format::ALL[format], rows, columns };
        let values = values(&seed.to_string(), rows * columns);
        let (packed, global) = whole(grid, &values);
        let (tiles, bytes) = (grid.tiles(), grid.format.tile().bytes);
        let mut decoded = vec![f32::NAN; values.len()];
        grid.unpack(0..tiles, &packed, global, &mut decoded).unwrap();
        let most = amax(&values).unwrap();
        for (found, value) in decoded.iter().zip(&values) {
            prop_assert!((found - value).abs() <= worst_step(grid.format, most), "{found} {value}");
        }
        let border = (cut * tiles as f64) as usize;
        for piece in [0..border, border..tiles] {
            let of = grid.elements(piece.clone());
            let mut out = vec![0; piece.len() * bytes];
            grid.pack(piece.clone(), &values[of.clone()], global, &mut out).unwrap();
            prop_assert_eq!(&out, &packed[piece.start * bytes..piece.end * bytes]);
            // Runs hold all tiles of the piece, in order.
            let runs: Vec<_> = grid.runs(piece.clone()).flatten().collect();
            prop_assert_eq!(runs, piece.clone().collect::<Vec<_>>());
            let mut part = vec![f32::NAN; of.len()];
            grid.unpack(piece, &out, global, &mut part).unwrap();
            for (i, value) in part.iter().enumerate().filter(|(_, value)| !value.is_nan()) {
                prop_assert_eq!(*value, decoded[of.start + i]);
            }
        }
        let rows = (cut * rows as f64) as usize..rows;
        let columns = (cut * columns as f64 / 2.0) as usize..columns;
        let whole = Packed { grid, bytes: &packed, global };
        let mut wide = vec![0f32; rows.len() * columns.len()];
        let mut narrow = vec![bf16::ZERO; wide.len()];
        whole.rectangle(rows.clone(), columns.clone(), &mut wide).unwrap();
        whole.rectangle(rows.clone(), columns.clone(), &mut narrow).unwrap();
        for (i, row) in rows.enumerate() {
            for (j, column) in columns.clone().enumerate() {
                let expected = decoded[row * grid.columns + column];
                prop_assert_eq!(wide[i * columns.len() + j], expected);
                prop_assert_eq!(narrow[i * columns.len() + j], bf16::from_f32(expected));
            }
        }
    }

    /// Any bytes decode without a panic.
    #[test]
    fn any_bytes_decode(bytes in prop::collection::vec(any::<u8>(), 576), format in 0usize..3) {
        let grid = Grid { format: Format::ALL[format], rows: 7, columns: 40 };
        let packed: Vec<u8> = bytes.iter().copied().cycle().take(grid.bytes()).collect();
        let mut out = vec![0f32; 280];
        grid.unpack(0..grid.tiles(), &packed, 0.5, &mut out).unwrap();
    }

    #[test]
    fn e4m3_is_the_nearest(value in -460f32..460.0) {
        let found = minifloat::from_e4m3(minifloat::to_e4m3(value));
        let codes = (0..=255u8).filter(|&code| !minifloat::is_e4m3_nan(code)).map(minifloat::from_e4m3);
        let nearest = codes.map(|code| (code - value).abs()).fold(f32::INFINITY, f32::min);
        prop_assert_eq!((found - value).abs(), nearest);
    }
}
