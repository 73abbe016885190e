use super::{super::*, *};
use ::safetensors::{Dtype, tensor::TensorView};
use proptest::prelude::*;
use serde_json::{Value, json};
use std::path::Path;

fn scheme(config: Value) -> Result<Option<Scheme>, String> {
    let Value::Object(config) = json!({ "quantization_config": config }) else { panic!() };
    Scheme::in_config(Path::new("config.json"), &config).map_err(|error| error.to_string())
}

#[test]
fn tools_are_known_by_their_settings() {
    let bnb = json!({"quant_method": "bitsandbytes", "load_in_4bit": true, "bnb_4bit_quant_type": "nf4"});
    assert_eq!(scheme(bnb), Ok(Some(Scheme::BitsAndBytes)));
    let fp8 =
        json!({"quant_method": "fp8", "weight_block_size": [128, 128], "scale_fmt": "ue8m0", "fmt": "e4m3"});
    assert_eq!(scheme(fp8), Ok(Some(Scheme::Fp8)));
    assert_eq!(
        scheme(json!({"quant_method": "modelopt", "quant_algo": "NVFP4"})),
        Ok(Some(Scheme::ModelOpt))
    );
    let compressed = json!({"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"});
    assert_eq!(scheme(compressed), Ok(Some(Scheme::CompressedTensors)));
    assert_eq!(scheme(Value::Null), Ok(None));
}

#[test]
fn what_is_not_built_is_refused_by_name() {
    for method in ["gptq", "awq", "mxfp4", "hqq", "torchao", "quark", "eetq", "fbgemm_fp8"] {
        let message = scheme(json!({"quant_method": method, "bits": 4})).unwrap_err();
        let begin =
            format!("config.json: quantization_config.quant_method is {method}; these can be read: nf4 of");
        assert!(message.starts_with(&begin), "{message}");
    }
    let bnb = |field: &str, value: Value| {
        let mut config =
            json!({"quant_method": "bitsandbytes", "load_in_4bit": true, "bnb_4bit_quant_type": "nf4"});
        config[field] = value;
        config
    };
    let fp8 = |field: &str, value: Value| {
        let mut config = json!({"quant_method": "fp8", "weight_block_size": [128, 128]});
        config[field] = value;
        config
    };
    let weights = json!({"num_bits": 8, "type": "int", "group_size": 16, "strategy": "tensor_group"});
    for (config, words) in [
        (bnb("load_in_8bit", json!(true)), "load_in_8bit is true; null or false can be read"),
        (bnb("bnb_4bit_quant_type", json!("fp4")), "bnb_4bit_quant_type is \"fp4\"; \"nf4\" can be read"),
        (bnb("new_setting", json!(1)), "new_setting is 1; this setting is not known"),
        (fp8("weight_block_size", json!([1, 128])), "weight_block_size is [1,128]; [128,128] can be read"),
        (fp8("weight_block_size", Value::Null), "weight_block_size is null"),
        (fp8("expert_dtype", json!("fp4")), "expert_dtype is \"fp4\""),
        (fp8("scale_fmt", json!("odd")), "scale_fmt is \"odd\""),
        (json!({"quant_method": "modelopt", "quant_algo": "FP8"}), "quant_algo is \"FP8\""),
        (
            json!({"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION"}),
            "quant_algo is \"MIXED_PRECISION\"",
        ),
        (
            json!({"quant_method": "compressed-tensors", "format": "pack-quantized"}),
            "format is \"pack-quantized\"",
        ),
        (
            json!({"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized",
                   "config_groups": {"group_0": {"weights": weights}}}),
            "config_groups.group_0.weights.num_bits is 8; 4 can be read",
        ),
        (json!({"bits": 4}), "quantization_config is {\"bits\":4}; these can be read"),
    ] {
        let message = scheme(config).unwrap_err();
        assert!(
            message.starts_with("config.json: quantization_config") && message.contains(words),
            "{message}"
        );
    }
}

/// A tensor to write: name, dtype, shape, bytes.
type Stored = (&'static str, Dtype, Vec<usize>, Vec<u8>);

fn open(config: &Value, tensors: &[Stored]) -> Result<SafetensorsSource, SourceError> {
    let folder = tempfile::tempdir().unwrap();
    let views = tensors
        .iter()
        .map(|(name, dtype, shape, data)| (*name, TensorView::new(*dtype, shape.clone(), data).unwrap()));
    std::fs::write(folder.path().join("model.safetensors"), ::safetensors::serialize(views, None).unwrap())
        .unwrap();
    std::fs::write(folder.path().join("config.json"), json!({ "quantization_config": config }).to_string())
        .unwrap();
    SafetensorsSource::open(folder.path())
}

fn ones(count: usize) -> Vec<u8> {
    1f32.to_le_bytes().repeat(count)
}

fn fp8_tensors() -> (Value, Vec<Stored>) {
    let config = json!({"quant_method": "fp8", "weight_block_size": [128, 128]});
    let tensors = vec![
        ("a.weight", Dtype::F8_E4M3, vec![130, 20], vec![0x38; 2600]),
        ("a.weight_scale_inv", Dtype::F32, vec![2, 1], ones(2)),
        ("norm.weight", Dtype::F32, vec![3], ones(3)),
    ];
    (config, tensors)
}

fn nvfp4_tensors() -> (Value, Vec<Stored>) {
    let config = json!({"quant_method": "modelopt", "quant_algo": "NVFP4"});
    let tensors = vec![
        ("a.weight", Dtype::U8, vec![3, 16], vec![0x22; 48]),
        ("a.weight_scale", Dtype::F8_E4M3, vec![3, 2], vec![0x38; 6]),
        ("a.weight_scale_2", Dtype::F32, vec![], ones(1)),
    ];
    (config, tensors)
}

fn nf4_tensors() -> (Value, Vec<Stored>) {
    let config = json!({"quant_method": "bitsandbytes", "load_in_4bit": true, "bnb_4bit_quant_type": "nf4"});
    let state = br#"{"quant_type": "nf4", "blocksize": 64, "dtype": "float16", "shape": [3, 33]}"#.to_vec();
    let table = bytemuck::cast_slice(&crate::quant::nf4::TABLE).to_vec();
    let tensors = vec![
        ("a.weight", Dtype::U8, vec![50, 1], vec![0xf0; 50]),
        ("a.weight.absmax", Dtype::F32, vec![2], ones(2)),
        ("a.weight.quant_map", Dtype::F32, vec![16], table),
        ("a.weight.quant_state.bitsandbytes__nf4", Dtype::U8, vec![state.len()], state),
    ];
    (config, tensors)
}

#[test]
fn matrices_have_the_names_shapes_and_values_that_they_stand_for() {
    for ((config, tensors), shape, expected) in [
        (fp8_tensors(), vec![130, 20], [1.0, 1.0]),
        (nvfp4_tensors(), vec![3, 32], [1.0, 1.0]),
        (nf4_tensors(), vec![3, 33], [1.0, -1.0]),
    ] {
        let mut source = open(&config, &tensors).unwrap();
        let names =
            if tensors[2].0 == "norm.weight" { vec!["a.weight", "norm.weight"] } else { vec!["a.weight"] };
        assert_eq!(source.names(), names);
        assert_eq!(source.meta("a.weight").unwrap().shape, shape);
        let mut values = [0f32; 2];
        source.read("a.weight", 0..2, DType::F32, bytemuck::cast_slice_mut(&mut values)).unwrap();
        assert_eq!(values, expected);
        source.rename(|name| format!("model.{name}")).unwrap();
        assert!(source.packed("model.a.weight").is_some() && source.packed("a.weight").is_none());
    }
}

#[test]
fn tensors_that_do_not_belong_together_are_refused_by_name() {
    type Make = fn() -> (Value, Vec<Stored>);
    type Change = fn(&mut Vec<Stored>);
    let cases: [(Make, Change, &str); 9] = [
        (
            fp8_tensors,
            |t| t[1].2 = vec![1, 2],
            "tensor a.weight_scale_inv: is F32 [1, 2], expected F32 [2, 1]",
        ),
        (fp8_tensors, |t| drop(t.remove(0)), "missing: a.weight"),
        (fp8_tensors, |t| drop(t.remove(1)), "tensor a.weight is F8_E4M3"),
        (nvfp4_tensors, |t| drop(t.remove(1)), "missing: a.weight_scale"),
        (
            nvfp4_tensors,
            |t| t[2].3 = vec![0; 4],
            "tensor a.weight_scale_2: is [0.0], expected one positive scale",
        ),
        (nf4_tensors, |t| t[2].3[0] = 1, "tensor a.weight.quant_map: is not the table of nf4"),
        (nf4_tensors, |t| drop(t.remove(3)), "missing: a.weight.quant_state.bitsandbytes__nf4"),
        (
            nf4_tensors,
            |t| (t[0].2, t[0].3) = (vec![49, 1], vec![0; 49]),
            "tensor a.weight: has 49 bytes of codes, which are not those of [3, 33]",
        ),
        (
            nf4_tensors,
            |t| {
                let state =
                    br#"{"quant_type": "nf4", "blocksize": 128, "dtype": "float16", "shape": [3, 33]}"#;
                (t[3].2, t[3].3) = (vec![state.len()], state.to_vec());
            },
            "tensor a.weight: is nf4 in blocks of 128; nf4 in blocks of 64 can be read",
        ),
    ];
    for (make, change, words) in cases {
        let (config, mut tensors) = make();
        change(&mut tensors);
        let message = open(&config, &tensors).map(|_| ()).unwrap_err().to_string();
        assert!(message.contains(words), "{message}, expected {words}");
    }
}

#[test]
fn scales_and_codes_that_are_no_numbers_are_errors() {
    let (config, mut tensors) = fp8_tensors();
    tensors[0].3[2599] = 0x7f;
    let source = open(&config, &tensors).unwrap();
    let mut room = vec![0; 2 * 16448];
    let error = source.read_packed("a.weight", Format::BlockFp8, 1.0, 0..2, &mut room).unwrap_err();
    assert_eq!(error.to_string(), "tensor a.weight: one of its e4m3 values is NaN");
    let (config, mut tensors) = nf4_tensors();
    tensors[1].3[..4].copy_from_slice(&f32::NAN.to_le_bytes());
    let source = open(&config, &tensors).unwrap();
    let error = source.read("a.weight", 0..4, DType::F32, &mut [0; 16]).unwrap_err();
    assert_eq!(error.to_string(), "tensor a.weight: one of its scales is NaN");
}

proptest! {
    /// Broken tensors are errors or values, never a panic.
    #[test]
    fn broken_tensors_do_not_panic(
        format in 0usize..3, tensor in 0usize..4, at in 0usize..200, value in any::<u8>(), shape in 0usize..70,
    ) {
        type Make = fn() -> (Value, Vec<Stored>);
        let make: [Make; 3] = [fp8_tensors, nvfp4_tensors, nf4_tensors];
        let (config, mut tensors) = make[format]();
        let count = tensors.len();
        let tensor = &mut tensors[tensor % count];
        let length = tensor.3.len();
        tensor.3[at % length] = value;
        if tensor.1 == Dtype::U8 && shape > 50 {
            (tensor.2, tensor.3) = (vec![shape], vec![value; shape]);
        }
        if let Ok(source) = open(&config, &tensors) {
            for name in source.names() {
                let elements: usize = source.meta(&name).unwrap().shape.iter().product();
                let mut out = vec![0; elements * 4];
                let _ = source.read(&name, 0..elements, DType::F32, &mut out);
            }
        }
    }
}
