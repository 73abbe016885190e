//! Packed formats give the bytes of the tools that made them: bitsandbytes' nf4, torch's float8_e4m3fn, torchao's
//! nvfp4. Checkpoints that these tools write are read as they read them, and handed out packed without another
//! rounding.

use crate::common::python;
use half::bf16;
use safetensors::SafeTensors;
use std::{collections::BTreeSet, path::Path, process::Command};
use xorl_dist::{
    dtype::DType,
    quant::{Format, Grid, Packed, amax, nested, nf4, nvfp4},
    weights::{SafetensorsSource, WeightSource},
};

/// Runs `tests/oracle/SCRIPT` with `target`.
fn oracle(script: &str, target: &Path) {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/oracle").join(script);
    let output = Command::new(python())
        .arg(&script)
        .arg(target)
        .env("OMP_NUM_THREADS", "1")
        .env("TRANSFORMERS_VERBOSITY", "error")
        .output()
        .expect("no Python");
    assert!(output.status.success(), "{}: {}", script.display(), String::from_utf8_lossy(&output.stderr));
}

/// Tensors of a file by name.
struct Tensors<'a>(SafeTensors<'a>);

impl Tensors<'_> {
    fn bytes(&self, name: &str) -> &[u8] {
        self.0.tensor(name).unwrap_or_else(|error| panic!("{name}: {error}")).data()
    }

    fn floats(&self, name: &str) -> Vec<f32> {
        self.bytes(name).chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
    }

    fn shape(&self, name: &str) -> Vec<usize> {
        self.0.tensor(name).unwrap().shape().to_vec()
    }
}

/// Asserts that `found` is `expected`, or says where they part.
#[track_caller]
fn equal<T: PartialEq + std::fmt::Debug>(what: &str, found: &[T], expected: &[T]) {
    assert_eq!(found.len(), expected.len(), "{what}: lengths");
    if let Some(at) = found.iter().zip(expected).position(|(a, b)| a != b) {
        let wrong = found.iter().zip(expected).filter(|(a, b)| a != b).count();
        panic!(
            "{what}: {wrong} of {} differ, first {at}: {:?}, expected {:?}",
            found.len(),
            found[at],
            expected[at]
        );
    }
}

/// ‖a − b‖ / ‖b‖
fn error(a: &[f32], b: &[f32]) -> f64 {
    let sum = |f: &dyn Fn(f64, f64) -> f64| -> f64 {
        a.iter().zip(b).map(|(&a, &b)| f(f64::from(a), f64::from(b))).sum()
    };
    (sum(&|a, b| (a - b) * (a - b)) / sum(&|_, b| b * b).max(f64::MIN_POSITIVE)).sqrt()
}

fn packed(grid: Grid, values: &[f32]) -> (Vec<u8>, f32) {
    let global = grid.format.global(amax(values).unwrap());
    let mut bytes = vec![1; grid.bytes()];
    grid.pack(0..grid.tiles(), values, global, &mut bytes).unwrap();
    (bytes, global)
}

#[test]
fn python_packed_bytes_and_checkpoints_equal_bitsandbytes_torch_torchao_and_compressed_tensors() {
    let folder = tempfile::tempdir().unwrap();
    oracle("quant.py", folder.path());
    let bytes = std::fs::read(folder.path().join("cases.safetensors")).unwrap();
    let theirs = Tensors(SafeTensors::deserialize(&bytes).unwrap());
    equal("the table of nf4", &nf4::TABLE, &theirs.floats("table"));
    let cases: BTreeSet<String> =
        theirs.0.names().iter().filter_map(|name| Some(name.split_once('.')?.0.to_owned())).collect();
    assert_eq!(cases.len(), 16);
    println!(
        "{:<10} {:>14} {:>10} {:>10} {:>10}   ‖decoded − w‖ / ‖w‖",
        "case", "shape", "nf4", "block_fp8", "nvfp4"
    );
    for case in &cases {
        let of = |part: &str| format!("{case}.{part}");
        let values = theirs.floats(&of("values"));
        let shape = theirs.shape(&of("values"));
        let grid = |format| Grid { format, rows: shape[0], columns: shape[1] };
        let mut errors = Vec::new();
        for format in Format::ALL {
            let grid = grid(format);
            let (bytes, global) = packed(grid, &values);
            let mut decoded = vec![0f32; values.len()];
            grid.unpack(0..grid.tiles(), &bytes, global, &mut decoded).unwrap();
            errors.push(error(&decoded, &values));
            match format {
                Format::Nf4 => {
                    let (codes, absmax) = nf4::to_blocks(&bytes, values.len()).unwrap();
                    equal(&of("nf4.codes"), &codes, theirs.bytes(&of("nf4.codes")));
                    equal(&of("nf4.absmax"), &absmax, &theirs.floats(&of("nf4.absmax")));
                    equal(&of("nf4.decoded"), &decoded, &theirs.floats(&of("nf4.decoded")));
                    let mut narrow = vec![bf16::ZERO; values.len()];
                    grid.unpack(0..grid.tiles(), &bytes, global, &mut narrow).unwrap();
                    let theirs_narrow: Vec<bf16> = theirs
                        .bytes(&of("nf4.decoded_bf16"))
                        .chunks_exact(2)
                        .map(|b| bf16::from_le_bytes([b[0], b[1]]))
                        .collect();
                    equal(&of("nf4.decoded_bf16"), &narrow, &theirs_narrow);
                    double(&theirs, case, &absmax);
                }
                Format::BlockFp8 => {
                    let (codes, scales) = grid.to_blocks(0..grid.tiles(), &bytes).unwrap();
                    equal(&of("fp8.scales"), &scales, &theirs.floats(&of("fp8.scales")));
                    equal(&of("fp8.codes"), &codes, theirs.bytes(&of("fp8.codes")));
                    equal(&of("fp8.decoded"), &decoded, &theirs.floats(&of("fp8.decoded")));
                }
                Format::NvFp4 => {
                    let groups = shape[0] * shape[1].div_ceil(16);
                    let (codes, scales) = nvfp4::to_groups(&bytes, groups).unwrap();
                    equal(&of("nvfp4.global"), &[global], &theirs.floats(&of("nvfp4.global")));
                    equal(&of("nvfp4.scales"), &scales, theirs.bytes(&of("nvfp4.scales")));
                    equal(&of("nvfp4.codes"), &codes, theirs.bytes(&of("nvfp4.codes")));
                }
            }
            let whole = Packed { grid, bytes: &bytes, global };
            let mut rectangle = vec![0f32; values.len()];
            whole.rectangle(0..shape[0], 0..shape[1], &mut rectangle).unwrap();
            equal(&format!("{case} {format} by rows"), &rectangle, &decoded);
        }
        println!("{case:<10} {shape:>14?} {:>10.5} {:>10.5} {:>10.5}", errors[0], errors[1], errors[2]);
    }
    for (name, format, matrices, tolerance) in [
        ("bnb", Format::Nf4, 7, 0.0),
        ("bnb_nested", Format::Nf4, 7, 0.0),
        ("fp8", Format::BlockFp8, 7, 0.0),
        ("fp8_ragged", Format::BlockFp8, 1, 0.0),
        ("fp8_bf16", Format::BlockFp8, 1, 0.0),
        ("fp8_ue8m0", Format::BlockFp8, 1, 0.0),
        ("modelopt", Format::NvFp4, 1, 0.0),
        ("modelopt_file", Format::NvFp4, 1, 0.0),
        // It computes in bf16.
        ("compressed", Format::NvFp4, 1, 1.0 / 128.0),
    ] {
        checkpoint(&folder.path().join(name), format, matrices, tolerance);
    }
}

/// Reads the checkpoint in `folder`, which has `matrices` in `format`, as values and as tiles, and compares both with
/// those of its own tool.
fn checkpoint(folder: &Path, format: Format, matrices: usize, tolerance: f32) {
    let source = SafetensorsSource::open(folder).unwrap();
    let bytes = std::fs::read(folder.join("expected.safetensors")).unwrap();
    let theirs = Tensors(SafeTensors::deserialize(&bytes).unwrap());
    let packed: Vec<String> =
        source.names().into_iter().filter(|name| source.packed(name).is_some()).collect();
    assert_eq!(packed.len(), matrices, "{}: {packed:?}", folder.display());
    assert!(source.names().len() > matrices || source.names() == packed, "{:?}", source.names());
    for name in packed {
        let what = format!("{}: {name}", folder.display());
        let expected = theirs.floats(&name);
        let shape = theirs.shape(&name);
        assert_eq!(source.meta(&name).unwrap().shape, shape, "{what}");
        let close = |found: &[f32]| match tolerance {
            0.0 => equal(&what, found, &expected),
            _ => assert!(
                found.iter().zip(&expected).all(|(a, b)| (a - b).abs() <= tolerance * b.abs()),
                "{what}"
            ),
        };
        let read = |range: std::ops::Range<usize>| {
            let mut values = vec![0f32; range.len()];
            source.read(&name, range, DType::F32, bytemuck::cast_slice_mut(&mut values)).unwrap();
            values
        };
        let all = read(0..expected.len());
        close(&all);
        let mut rng = 1usize;
        for _ in 0..20 {
            rng = rng.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let start = (rng >> 20) % all.len();
            let end = start + (rng >> 40) % (all.len() - start) + 1;
            equal(&what, &read(start..end), &all[start..end]);
        }
        let form = source.packed(&name).unwrap();
        assert_eq!(form.format, format, "{what}");
        let grid = Grid { format, rows: shape[0], columns: shape[1] };
        let mut tiles = vec![1; grid.bytes()];
        source.read_packed(&name, format, form.global, 0..grid.tiles(), &mut tiles).unwrap();
        let mut decoded = vec![0f32; expected.len()];
        grid.unpack(0..grid.tiles(), &tiles, form.global, &mut decoded).unwrap();
        equal(&what, &decoded, &all);
        // A piece is a piece of the whole.
        let (middle, size) = (grid.tiles() / 2, format.tile().bytes);
        let mut piece = vec![1; (grid.tiles() - middle) * size];
        source.read_packed(&name, format, form.global, middle..grid.tiles(), &mut piece).unwrap();
        equal(&what, &piece, &tiles[middle * size..]);
        // Another format is packed from the values.
        let other = if format == Format::Nf4 { Format::BlockFp8 } else { Format::Nf4 };
        let grid = Grid { format: other, ..grid };
        let mut anew = vec![1; grid.bytes()];
        source.read_packed(&name, other, 1.0, 0..grid.tiles(), &mut anew).unwrap();
        let mut expected_tiles = vec![2; grid.bytes()];
        grid.pack(0..grid.tiles(), &all, 1.0, &mut expected_tiles).unwrap();
        equal(&what, &anew, &expected_tiles);
    }
}

/// Compares double quantization of `absmax` with bitsandbytes'.
fn double(theirs: &Tensors, case: &str, absmax: &[f32]) {
    let of = |part: &str| format!("{case}.nested.{part}");
    let (map, offset) = (theirs.floats(&of("map")), theirs.floats(&of("offset"))[0]);
    equal(&of("map"), &nested::map(), &map);
    let own = nested::offset(absmax);
    assert!((own - offset).abs() <= 1e-6 * offset.abs(), "{case}: offset {own}, expected {offset}");
    let nested = nested::encode(absmax, offset).unwrap();
    equal(&of("nested_absmax"), &nested.absmax, &theirs.floats(&of("nested_absmax")));
    equal(&of("absmax"), &nested.codes, theirs.bytes(&of("absmax")));
    // The values that bitsandbytes decodes, from its own tensors.
    let back = nested::decode(&nested.codes, &map, &nested.absmax, offset).unwrap();
    let values = theirs.floats(&of("decoded"));
    let shape = theirs.shape(&format!("{case}.values"));
    let grid = Grid { format: Format::Nf4, rows: shape[0], columns: shape[1] };
    let mut tiles = vec![0; grid.bytes()];
    nf4::from_blocks(theirs.bytes(&of("codes")), &back, &mut tiles).unwrap();
    let mut decoded = vec![0f32; values.len()];
    grid.unpack(0..grid.tiles(), &tiles, 1.0, &mut decoded).unwrap();
    equal(&of("decoded"), &decoded, &values);
}
