"""Weights as quantised formats hold them, by bitsandbytes and torch: the numbers that a quantised base computes with."""
import bitsandbytes
import torch

E4M3_MAX, E2M1_MAX = 448.0, 6.0


def padded(weight, rows, columns):
    """With zeros up to whole blocks, as [blocks down, rows, blocks across, columns]."""
    height, width = weight.shape
    full = torch.nn.functional.pad(weight, (0, -width % columns, 0, -height % rows))
    return full.view(full.shape[0] // rows, rows, full.shape[1] // columns, columns)


def decode(codes, table, absmax, like):
    """code · absmax of blocks of 64, the even element in the high nibble. bitsandbytes 0.50.2 decodes rows whose length is even and
    no multiple of 64 wrongly on CPUs with AVX-512."""
    codes = codes.flatten()
    each = torch.stack([codes >> 4, codes & 15], 1).flatten()[:like.numel()]
    return (table[each.long()] * absmax.repeat_interleave(64)[:like.numel()]).reshape(like.shape)


def nf4(weight):
    codes, state = bitsandbytes.functional.quantize_4bit(weight.contiguous(), blocksize=64, quant_type='nf4')
    return decode(codes, state.code, state.absmax, weight)


def block_fp8(weight):
    blocks = padded(weight, 128, 128)
    scale = blocks.abs().amax((1, 3), keepdim=True) / E4M3_MAX
    found = (blocks / scale).to(torch.float8_e4m3fn).float() * scale
    return found.reshape(-1, found.shape[2] * 128)[:weight.shape[0], :weight.shape[1]]


def e2m1(x):
    """The nearest of 0, 0.5, 1, 1.5, 2, 3, 4, 6, ties to even codes."""
    size = x.abs().clamp(max=E2M1_MAX)
    step = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0))
    return (size / step).round() * step * x.sign()


def nvfp4(weight):
    blocks = padded(weight, 1, 16)
    of_matrix = weight.abs().max() / (E2M1_MAX * E4M3_MAX)
    scale = blocks.abs().amax(3, keepdim=True) / E2M1_MAX / of_matrix
    scale = scale.clamp(2**-6, E4M3_MAX).to(torch.float8_e4m3fn).float()
    found = e2m1(blocks * (1 / of_matrix / scale)) * (of_matrix * scale)
    return found.reshape(weight.shape[0], -1)[:, :weight.shape[1]]


FORMATS = dict(nf4=nf4, block_fp8=block_fp8, nvfp4=nvfp4)


@torch.no_grad()
def requantize(weight, how, name):
    """Puts the numbers of format `how` in the place of a matrix, or of each expert's gate, up and down in the parameter `name`."""
    if weight.dim() == 2:
        weight.copy_(FORMATS[how](weight))
        return
    for expert in weight:
        for matrix in expert.chunk(2 if 'gate_up' in name else 1):
            matrix.copy_(FORMATS[how](matrix.clone()))


def dequantize(model, how):
    """Puts the numbers of format `how` in the place of a model's linear layers, also below PEFT's."""
    for name, parameter in model.named_parameters():
        if name.replace('.base_layer', '').endswith(('_proj.weight', 'experts.gate_up_proj', 'experts.down_proj')):
            requantize(parameter, how, name)
