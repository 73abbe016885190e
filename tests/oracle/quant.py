"""Packs matrices with bitsandbytes, torch and torchao on the CPU: quant.py FOLDER writes what goes in and comes out.

cases.safetensors has of each case NAME: NAME.values [rows, columns] fp32, and by tool NAME.nf4.*, NAME.fp8.*,
NAME.nvfp4.*. Beside it lie checkpoints as transformers, ModelOpt and compressed-tensors write them, each a folder with
the values of its matrices in expected.safetensors.
"""

import json
import pathlib
import sys

import bitsandbytes
import bitsandbytes.functional as bnb
import torch
from compressed_tensors.compressors.nvfp4.base import NVFP4PackedCompressor
from compressed_tensors.quantization import preset_name_to_scheme
from dequantized import decode
from safetensors.torch import load_file, save_file
from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, nvfp4_quantize, per_tensor_amax_to_scale
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig

BLOCK = 128


def nf4(out: dict, name: str, values: torch.Tensor) -> None:
    """Codes, absmax and values that bitsandbytes decodes, plain and with double quantization."""
    for kind, nested in (("nf4", False), ("nested", True)):
        codes, state = bnb.quantize_4bit(values, blocksize=64, quant_type="nf4", compress_statistics=nested)
        out[f"{name}.{kind}.codes"] = codes.flatten()
        out[f"{name}.{kind}.absmax"] = state.absmax
        scales = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset if nested else state.absmax
        decoded = decode(codes, state.code, scales, values)
        if values.shape[1] % 64 == 0:
            assert torch.equal(decoded, bnb.dequantize_4bit(codes, state).float()), f"{name} {kind}"
        out[f"{name}.{kind}.decoded"] = decoded
        out[f"{name}.{kind}.decoded_bf16"] = decoded.to(torch.bfloat16)
        if nested:
            out[f"{name}.nested.nested_absmax"] = state.state2.absmax
            out[f"{name}.nested.map"] = state.state2.code.clone()
            out[f"{name}.nested.offset"] = state.offset.reshape(1)
    out["table"] = bnb.get_4bit_type("nf4", device="cpu")


def fp8(out: dict, name: str, values: torch.Tensor) -> None:
    """Codes by torch's cast, a scale a block, edges filled with zeros."""
    rows, columns = values.shape
    full = torch.nn.functional.pad(values, (0, -columns % BLOCK, 0, -rows % BLOCK))
    blocks = full.reshape(full.shape[0] // BLOCK, BLOCK, full.shape[1] // BLOCK, BLOCK).transpose(1, 2)
    scales = blocks.abs().amax((2, 3)) / 448
    codes = (blocks / torch.where(scales > 0, scales, 1)[..., None, None]).clamp(-448, 448).to(torch.float8_e4m3fn)
    decoded = (codes.float() * scales[..., None, None]).transpose(1, 2).reshape(full.shape)[:rows, :columns]
    codes = codes.transpose(1, 2).reshape(full.shape)[:rows, :columns]
    out[f"{name}.fp8.codes"] = codes.contiguous().view(torch.uint8)
    out[f"{name}.fp8.scales"] = scales.contiguous()
    out[f"{name}.fp8.decoded"] = decoded.contiguous()


def nvfp4(out: dict, name: str, values: torch.Tensor) -> None:
    """Codes and scales by torchao, rows filled with zeros to whole groups."""
    full = torch.nn.functional.pad(values, (0, -values.shape[1] % 16)).contiguous()
    scale = per_tensor_amax_to_scale(full.abs().max())
    scales, codes = nvfp4_quantize(full, 16, scale)
    out[f"{name}.nvfp4.codes"] = codes.flatten().contiguous()
    out[f"{name}.nvfp4.scales"] = scales.view(torch.uint8).flatten().contiguous()
    out[f"{name}.nvfp4.global"] = scale.reshape(1)


def write(folder: pathlib.Path, quantization: dict, tensors: dict, expected: dict) -> None:
    """A checkpoint by hand: config.json, its tensors, and what they stand for."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": quantization}))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    save_file({name: tensor.contiguous() for name, tensor in expected.items()}, folder / "expected.safetensors")


def by_bitsandbytes(folder: pathlib.Path, plain: pathlib.Path) -> None:
    """nf4 with and without double quantization, as transformers saves it."""
    for name, nested in (("bnb", False), ("bnb_nested", True)):
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=nested)
        model = AutoModelForCausalLM.from_pretrained(
            plain, quantization_config=config, device_map="cpu", dtype=torch.float32
        )
        model.save_pretrained(folder / name)
        expected = {
            f"{path}.weight": bnb.dequantize_4bit(module.weight.data, module.weight.quant_state).float()
            for path, module in model.named_modules()
            if isinstance(module, bitsandbytes.nn.Linear4bit)
        }
        save_file(expected, folder / name / "expected.safetensors")


def by_transformers_fp8(folder: pathlib.Path, plain: pathlib.Path) -> None:
    """Blocks of fp8, read by transformers, which decodes them on the CPU."""
    out: dict[str, torch.Tensor] = {}
    tensors = load_file(plain / "model.safetensors")
    names = [name for name in tensors if ".layers." in name and "norm" not in name]
    for name in names:
        fp8(out, name, tensors[name].float())
        tensors[name] = out[f"{name}.fp8.codes"].view(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = out[f"{name}.fp8.scales"]
    config = json.loads((plain / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
        "modules_to_not_convert": ["lm_head"],
    }
    (folder / "fp8").mkdir()
    (folder / "fp8/config.json").write_text(json.dumps(config))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "fp8/model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(folder / "fp8", dtype=torch.float32)
    state = model.state_dict()
    save_file({name: state[name].float().contiguous() for name in names}, folder / "fp8/expected.safetensors")


def by_formula_fp8(folder: pathlib.Path) -> None:
    """Ragged edges, and scales that are powers of two in one byte."""
    values = torch.randn(200, 333) * 0.05
    out: dict[str, torch.Tensor] = {}
    fp8(out, "w", values)
    codes = out["w.fp8.codes"].view(torch.float8_e4m3fn)
    for name, scales in (
        ("fp8_ragged", out["w.fp8.scales"]),
        ("fp8_bf16", out["w.fp8.scales"].bfloat16()),
        ("fp8_ue8m0", out["w.fp8.scales"].log2().ceil().exp2().to(torch.float8_e8m0fnu)),
    ):
        wide = scales.float().repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)[:200, :333]
        quantization = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
        if name == "fp8_ue8m0":
            quantization |= {"scale_fmt": "ue8m0", "ignored_layers": ["lm_head"]}
        expected = {"model.layers.0.a.weight": codes.float() * wide}
        tensors = {"model.layers.0.a.weight": codes, "model.layers.0.a.weight_scale_inv": scales, "norm": torch.ones(3)}
        write(folder / name, quantization, tensors, expected)


def by_nvidia(folder: pathlib.Path) -> None:
    """NVFP4 by torchao under ModelOpt's names, and by compressed-tensors."""
    values = torch.randn(72, 208) * 0.05
    scale = per_tensor_amax_to_scale(values.abs().max())
    scales, codes = nvfp4_quantize(values, 16, scale)
    decoded = NVFP4Tensor.to_nvfp4(values, 16, scale).dequantize(torch.float32)
    tensors = {
        "model.layers.0.a.weight": codes,
        "model.layers.0.a.weight_scale": scales.view(torch.float8_e4m3fn).reshape(72, 13),
        "model.layers.0.a.weight_scale_2": scale,
        "model.layers.0.a.input_scale": torch.tensor(0.5),
        "model.layers.0.a.bias": torch.ones(72),
    }
    quantization = {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head"], "producer": {"name": "modelopt"}}
    write(folder / "modelopt", quantization, tensors, {"model.layers.0.a.weight": decoded})
    # The file of older versions, and no field in config.json.
    older = folder / "modelopt_file"
    write(older, {}, tensors, {"model.layers.0.a.weight": decoded})
    (older / "config.json").write_text("{}")
    settings = {"quant_algo": "NVFP4", "kv_cache_quant_algo": None, "group_size": 16, "exclude_modules": ["lm_head"]}
    (older / "hf_quant_config.json").write_text(json.dumps({"producer": {"name": "modelopt"}, "quantization": settings}))

    scheme = preset_name_to_scheme("NVFP4A16", ["Linear"])
    divisor = 1 / scale
    state = {"weight": values, "weight_scale": scales.float().reshape(72, 13), "weight_global_scale": divisor.reshape(1)}
    state = NVFP4PackedCompressor.compress(state, scheme)
    decoded = NVFP4PackedCompressor.decompress(dict(state), scheme)["weight"].float()
    quantization = {
        "quant_method": "compressed-tensors",
        "format": "nvfp4-pack-quantized",
        "config_groups": {"group_0": json.loads(scheme.model_dump_json())},
        "ignore": ["lm_head"],
        "quantization_status": "compressed",
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }
    tensors = {f"model.layers.0.a.{name}": tensor for name, tensor in state.items()}
    tensors["model.layers.0.a.input_global_scale"] = torch.ones(1)
    write(folder / "compressed", quantization, tensors, {"model.layers.0.a.weight": decoded})


def main() -> None:
    torch.manual_seed(7)
    cases = {
        "square": torch.randn(256, 256) * 0.02,
        "long": torch.randn(384, 2048) * 0.02,
        "ragged": torch.randn(200, 333) * 0.1,
        "odd": torch.randn(7, 9),
        "one": torch.randn(1, 1),
        "short": torch.randn(3, 64),
        "tiny": torch.randn(130, 48) * 1e-20,
        "large": torch.randn(130, 48) * 1e20,
        "uneven": torch.randn(64, 512) * torch.logspace(-6, 3, 512),
        "coarse": (torch.randn(128, 256) * 4).round() / 4,
        "bf16": (torch.randn(96, 160) * 0.02).bfloat16().float(),
        "fp16": (torch.randn(96, 160) * 0.02).half().float(),
    }
    zeros = torch.randn(40, 128)
    zeros[3] = 0
    zeros[17, :64] = -0.0
    zeros[-1] = 0
    cases["zeros"] = zeros
    # Halves between the values of e2m1 and between the midpoints of nf4.
    ties = torch.tensor([0.0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0, -0.25, -0.75, -1.25, -1.75, -2.5, -3.5, -5.0])
    cases["ties"] = ties.repeat(16, 4)
    table = bnb.get_4bit_type("nf4", device="cpu")
    midpoints = (table[:-1] + table[1:]) / 2
    near = [midpoints, midpoints.nextafter(torch.tensor(2.0)), midpoints.nextafter(torch.tensor(-2.0))]
    cases["midpoints"] = torch.cat([*near, torch.ones(19)]).reshape(1, 64).repeat(4, 1) * torch.tensor([[1.0], [0.3], [7.1], [1e-3]])
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    finite = codes[codes.isfinite()]
    between = (finite.sort().values[1:] + finite.sort().values[:-1]) / 2
    cases["e4m3"] = torch.cat([finite, between, torch.zeros(16384 - 2 * len(finite) + 1)]).reshape(128, 128)
    out: dict[str, torch.Tensor] = {}
    for name, values in cases.items():
        out[f"{name}.values"] = values.contiguous()
        for pack in (nf4, fp8, nvfp4):
            pack(out, name, values.contiguous())
    folder = pathlib.Path(sys.argv[1])
    save_file({name: tensor.contiguous() for name, tensor in out.items()}, folder / "cases.safetensors")
    config = LlamaConfig(
        hidden_size=256, intermediate_size=384, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64, max_position_embeddings=64,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "plain")
    by_bitsandbytes(folder, folder / "plain")
    by_transformers_fp8(folder, folder / "plain")
    by_formula_fp8(folder)
    by_nvidia(folder)


if __name__ == "__main__":
    main()
