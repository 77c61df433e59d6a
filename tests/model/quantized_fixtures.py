"""Quantized checkpoints made by hand, number by number, and the weights that their formats say they have.

Nothing here is shared with the code that reads them: codes are packed by loops over Python's integers.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Tensors = dict[str, Tensor]
Encode = Callable[[str, Tensor], tuple[Tensors, Tensor]]
"""Name of a layer and its weight → the tensors of the checkpoint, and the weight that they stand for."""


@dataclass(frozen=True)
class Case:
    """A format: its config, and how a weight is stored."""

    config: dict[str, Any]
    encode: Encode
    file: str = ""
    """File that has the config instead of config.json."""


def pack_rows(codes: Tensor, bits: int) -> Tensor:
    """``[rows, n]`` → int32 ``[rows, n * bits / 32]``, the lowest bits first."""
    per = 32 // bits
    rows = []
    for row in codes.tolist():
        row = row + [0] * (-len(row) % per)
        words = [
            sum(int(code) << (bits * i) for i, code in enumerate(row[first : first + per]))
            for first in range(0, len(row), per)
        ]
        rows.append(words)
    return torch.from_numpy(np.array(rows, dtype=np.uint32).view(np.int32))


def rounded(weight: Tensor, bits: int, size: int, *, sym: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Codes ``[out, in]``, float16 scales and zeros ``[out, groups]``."""
    top, (outputs, inputs) = (1 << bits) - 1, weight.shape
    groups = weight.reshape(outputs, inputs // size, size)
    if sym:
        scales = (groups.abs().amax(2) / (top / 2)).half().float()
        zeros = torch.full_like(scales, (top + 1) // 2)
    else:
        low, high = groups.amin(2).clamp(max=0), groups.amax(2).clamp(min=0)
        scales = ((high - low) / top).half().float()
        zeros = (-low / scales).round().clamp(0, top)
    codes = (groups / scales[..., None]).round() + zeros[..., None]
    return codes.clamp(0, top).reshape(outputs, inputs), scales, zeros


def restored(codes: Tensor, scales: Tensor, zeros: Tensor, size: int) -> Tensor:
    outputs, inputs = codes.shape
    each = (codes.reshape(outputs, -1, size) - zeros[..., None]) * scales[..., None]
    return each.reshape(outputs, inputs).float()


def gptq(
    bits: int = 4, size: int = 32, *, sym: bool = True, act_order: bool = False, v2: bool = False
) -> Encode:
    def encode(name: str, weight: Tensor) -> tuple[Tensors, Tensor]:
        inputs = weight.shape[1]
        order = torch.arange(inputs)
        if act_order:  # groups are of inputs in another order than the layer's
            order = torch.randperm(inputs, generator=torch.Generator().manual_seed(3))
        codes, scales, zeros = rounded(weight[:, order], bits, size, sym=sym)
        values = torch.empty_like(weight)
        values[:, order] = restored(codes, scales, zeros, size)
        in_order = torch.empty_like(codes)
        in_order[:, order] = codes
        index = torch.empty(inputs, dtype=torch.int32)
        index[order] = (torch.arange(inputs) // size).int()
        stored = zeros if v2 else (zeros - 1) % (1 << bits)
        return {
            f"{name}.qweight": pack_rows(in_order, bits).T.contiguous(),
            f"{name}.qzeros": pack_rows(stored.T, bits),
            f"{name}.scales": scales.T.half().contiguous(),
            f"{name}.g_idx": index,
        }, values

    return encode


def awq(size: int = 32) -> Encode:
    def pack(codes: Tensor) -> Tensor:
        """``[rows, out]``: of eight outputs, the i-th lowest bits hold number ORDER[i]."""
        order = [0, 2, 4, 6, 1, 3, 5, 7]
        columns = [first + i for first in range(0, codes.shape[1], 8) for i in order]
        return pack_rows(codes[:, columns], 4)

    def encode(name: str, weight: Tensor) -> tuple[Tensors, Tensor]:
        codes, scales, zeros = rounded(weight, 4, size, sym=False)
        return {
            f"{name}.qweight": pack(codes.T),
            f"{name}.qzeros": pack(zeros.T),
            f"{name}.scales": scales.T.half().contiguous(),
        }, restored(codes, scales, zeros, size)

    return encode


def packed(bits: int = 4, size: int = 32, *, sym: bool = True, dtype: torch.dtype = torch.float16) -> Encode:
    """compressed-tensors, pack-quantized."""

    def encode(name: str, weight: Tensor) -> tuple[Tensors, Tensor]:
        codes, scales, zeros = rounded(weight, bits, size or weight.shape[1], sym=sym)
        scales = scales.to(dtype).float()
        tensors = {
            f"{name}.weight_packed": pack_rows(codes, bits),
            f"{name}.weight_scale": scales.to(dtype),
            f"{name}.weight_shape": torch.tensor(weight.shape),
        }
        if not sym:
            tensors[f"{name}.weight_zero_point"] = pack_rows(zeros.T, bits).T.contiguous()
        return tensors, restored(codes, scales, zeros, size or weight.shape[1])

    return encode


def int8(name: str, weight: Tensor) -> tuple[Tensors, Tensor]:
    """compressed-tensors, int-quantized, one scale per output in bfloat16."""
    scales = (weight.abs().amax(1, keepdim=True) / 127).bfloat16()
    codes = (weight / scales.float()).round().clamp(-128, 127).to(torch.int8)
    tensors = {f"{name}.weight": codes, f"{name}.weight_scale": scales}
    return tensors, codes.float() * scales.float()


def int8_asymmetric(name: str, weight: Tensor) -> tuple[Tensors, Tensor]:
    low, high = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    scales = (high - low) / 255
    zeros = (-128 - low / scales).round().clamp(-128, 127)
    codes = (weight / scales + zeros).round().clamp(-128, 127)
    tensors = {
        f"{name}.weight": codes.to(torch.int8),
        f"{name}.weight_scale": scales,
        f"{name}.weight_zero_point": zeros.to(torch.int8),
    }
    return tensors, (codes - zeros) * scales


def fp8_blocks(name: str, weight: Tensor) -> tuple[Tensors, Tensor]:
    """DeepSeek's: blocks of 16 outputs and 32 inputs, the last ones incomplete."""
    outputs, inputs = weight.shape
    scales = torch.empty(-(-outputs // 48), -(-inputs // 40))
    codes, values = torch.empty_like(weight, dtype=torch.float8_e4m3fn), torch.empty_like(weight)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            place = slice(48 * i, 48 * i + 48), slice(40 * j, 40 * j + 40)
            scales[i, j] = weight[place].abs().max() / 448
            codes[place] = (weight[place] / scales[i, j]).to(torch.float8_e4m3fn)
            values[place] = codes[place].float() * scales[i, j]
    return {f"{name}.weight": codes, f"{name}.weight_scale_inv": scales}, values


def fp8(per: str, dtype: torch.dtype = torch.float8_e4m3fn) -> Encode:
    def encode(name: str, weight: Tensor) -> tuple[Tensors, Tensor]:
        scale = weight.abs().amax() / 448 if per == "tensor" else weight.abs().amax(1, keepdim=True) / 448
        codes = (weight / scale).to(dtype)
        tensors = {
            f"{name}.weight": codes,
            f"{name}.weight_scale": scale,
            f"{name}.input_scale": torch.ones(()),
        }
        return tensors, codes.float() * scale

    return encode


def torchao(bits: int = 8, size: int = 0, *, sym: bool = True, dtype: torch.dtype | None = None) -> Encode:
    """torchao's Int8Tensor, IntxUnpackedToInt8Tensor or, with a dtype, Float8Tensor."""

    def encode(name: str, weight: Tensor) -> tuple[Tensors, Tensor]:
        if dtype is not None:
            scale = weight.abs().amax(1, keepdim=True) / 448
            codes = (weight / scale).to(dtype)
            return {f"{name}._weight_qdata": codes, f"{name}._weight_scale": scale}, codes.float() * scale
        codes, scales, zeros = rounded(weight, bits, size or weight.shape[1], sym=sym)
        half = 1 << (bits - 1)
        tensors = {
            f"{name}._weight_qdata": (codes - half).to(torch.int8),
            f"{name}._weight_scale": scales,
            f"{name}._weight_zero_point": (zeros - half).to(torch.int8),
        }
        return tensors, restored(codes, scales, zeros, size or weight.shape[1])

    return encode


def torchao_config(kind: str, **data: Any) -> dict[str, Any]:
    """A config as transformers saves it, but for keys that change nothing here."""
    return {"quant_method": "torchao", "quant_type": {"default": {"_type": kind, "_data": data}}}


INT4 = {"weight_dtype": {"_type": "torch.dtype", "_data": "int4"}}
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]


def mxfp4(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Bytes ``[out, in / 2]``, scales ``[out, in / 32]``, values."""
    outputs, inputs = weight.shape
    groups = weight.reshape(outputs, -1, 32)
    powers = (groups.abs().amax(2) / 6).log2().ceil()
    scaled = groups / 2 ** powers[..., None]
    table = torch.tensor(E2M1)
    codes = (scaled[..., None] - table).abs().argmin(-1).reshape(outputs, inputs)
    values = (table[codes].reshape(groups.shape) * 2 ** powers[..., None]).reshape(outputs, inputs)
    packed_codes = (codes[:, 0::2] + 16 * codes[:, 1::2]).to(torch.uint8)
    return packed_codes, (powers + 127).to(torch.uint8), values


def mxfp4_linear(name: str, weight: Tensor) -> tuple[Tensors, Tensor]:
    codes, scales, values = mxfp4(weight)
    return {f"{name}.weight_packed": codes, f"{name}.weight_scale": scales}, values


NF4 = [
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941),
    *(0.7229568362236023, 1.0),
]
"""The numbers of NF4 (QLoRA, appendix E)."""


def bnb4(kind: str, *, nested: bool) -> Encode:
    numbers = torch.tensor(NF4) if kind == "nf4" else torch.tensor(E2M1) / 6

    def encode(name: str, weight: Tensor) -> tuple[Tensors, Tensor]:
        blocks = weight.reshape(-1, 64)
        absmax = blocks.abs().amax(1)
        state = {"quant_type": kind, "blocksize": 64, "dtype": "float32", "shape": list(weight.shape)}
        tensors: Tensors = {}
        if nested:
            table = torch.linspace(-1, 1, 256)
            offset = absmax.mean()
            outer = (absmax - offset).reshape(-1, 16).abs().amax(1)
            scaled = (absmax - offset).reshape(-1, 16) / outer[:, None]
            codes = (scaled[..., None] - table).abs().argmin(-1)
            absmax = (table[codes] * outer[:, None]).flatten() + offset
            tensors = {
                f"{name}.weight.absmax": codes.flatten().to(torch.uint8),
                f"{name}.weight.nested_absmax": outer,
                f"{name}.weight.nested_quant_map": table.clone(),
            }
            state |= {"nested_blocksize": 16, "nested_dtype": "float32", "nested_offset": offset.item()}
        else:
            tensors[f"{name}.weight.absmax"] = absmax
        found = (blocks[..., None] / absmax[:, None, None] - numbers).abs().argmin(-1).flatten()
        values = (numbers[found].reshape(blocks.shape) * absmax[:, None]).reshape(weight.shape)
        tensors[f"{name}.weight"] = (16 * found[0::2] + found[1::2]).to(torch.uint8)[:, None]
        tensors[f"{name}.weight.quant_map"] = numbers.clone()
        text = json.dumps(state).encode()
        key = f"{name}.weight.quant_state.bitsandbytes__{kind}"
        tensors[key] = torch.tensor(list(text), dtype=torch.uint8)
        return tensors, values

    return encode


def bnb8(name: str, weight: Tensor) -> tuple[Tensors, Tensor]:
    largest = weight.abs().amax(1)
    codes = (weight / largest[:, None] * 127).round().to(torch.int8)
    tensors = {
        f"{name}.weight": codes,
        f"{name}.SCB": largest,
        f"{name}.weight_format": torch.tensor(0, dtype=torch.uint8),
    }
    return tensors, codes.float() * largest[:, None] / 127


def compressed(form: str, **weights: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": {"type": "int", **weights}, "input_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "quantization_status": "compressed",
    }


def gptq_config(bits: int = 4, size: int = 32, **more: Any) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": bits, "group_size": size, "desc_act": False, "sym": True, **more}


AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
BNB4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}

CASES: dict[str, Case] = {
    "gptq": Case(gptq_config(), gptq()),
    "gptq-asymmetric": Case(gptq_config(sym=False), gptq(sym=False)),
    "gptq-act-order": Case(gptq_config(desc_act=True), gptq(act_order=True)),
    "gptq-8": Case(gptq_config(8), gptq(8)),
    "gptq-2-groups-of-16": Case(gptq_config(2, 16), gptq(2, 16)),
    "gptq-v2": Case(gptq_config(checkpoint_format="gptq_v2", sym=False), gptq(sym=False, v2=True)),
    "gptq-of-a-file": Case({"bits": 4, "group_size": 32, "desc_act": False}, gptq(), "quantize_config.json"),
    "awq": Case(AWQ, awq()),
    "awq-of-a-file": Case(
        {"w_bit": 4, "q_group_size": 32, "zero_point": True, "version": "GEMM"}, awq(), "quant_config.json"
    ),
    "w4a16": Case(compressed("pack-quantized", num_bits=4), packed()),
    "w4a16-asymmetric": Case(compressed("pack-quantized", num_bits=4), packed(sym=False)),
    "w4a16-channel": Case(compressed("pack-quantized", num_bits=4), packed(size=0, dtype=torch.bfloat16)),
    "w8a16": Case(compressed("pack-quantized", num_bits=8), packed(8)),
    "w2a16": Case(compressed("pack-quantized", num_bits=2), packed(2)),
    "w8a8": Case(compressed("int-quantized", num_bits=8), int8),
    "w8-asymmetric": Case(compressed("int-quantized", num_bits=8), int8_asymmetric),
    "fp8-blocks": Case({**FP8, "weight_block_size": [48, 40]}, fp8_blocks),
    "fp8-tensor": Case(FP8, fp8("tensor")),
    "fp8-e5m2": Case(FP8, fp8("channel", torch.float8_e5m2)),
    "fp8-channel": Case(compressed("float-quantized", num_bits=8), fp8("channel")),
    "fp8-modelopt": Case(
        {
            "producer": {"name": "modelopt"},
            "quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": None},
        },
        fp8("tensor"),
        "hf_quant_config.json",
    ),
    "mxfp4": Case(compressed("mxfp4-pack-quantized", num_bits=4), mxfp4_linear),
    "nf4": Case(BNB4, bnb4("nf4", nested=False)),
    "nf4-nested": Case(BNB4, bnb4("nf4", nested=True)),
    "fp4": Case(BNB4, bnb4("fp4", nested=False)),
    "ao-8": Case(torchao_config("Int8WeightOnlyConfig"), torchao()),
    "ao-8-groups": Case(torchao_config("Int8DynamicActivationInt8WeightConfig"), torchao(size=32)),
    "ao-int4": Case(torchao_config("IntxWeightOnlyConfig", **INT4), torchao(4, 32)),
    "ao-int4-asymmetric": Case(torchao_config("IntxWeightOnlyConfig", **INT4), torchao(4, 32, sym=False)),
    "ao-8-asymmetric": Case(torchao_config("IntxWeightOnlyConfig"), torchao(8, 32, sym=False)),
    "ao-fp8": Case(torchao_config("Float8WeightOnlyConfig"), torchao(dtype=torch.float8_e4m3fn)),
    "bnb-8": Case({"quant_method": "bitsandbytes", "load_in_8bit": True}, bnb8),
}
"""Every variant that is read."""


def quantize_checkpoint(folder: Path, model: Any, case: Case) -> None:
    """Replace a saved model's linear layers by quantized ones, and the model's own by what they stand for."""
    tensors = load_file(folder / "model.safetensors")
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            del tensors[f"{name}.weight"]
            made, values = case.encode(name, module.weight.detach().clone())
            tensors |= {key: tensor.contiguous() for key, tensor in made.items()}
            with torch.no_grad():
                module.weight.copy_(values)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    add_config(folder, case)


def add_config(folder: Path, case: Case) -> None:
    if case.file:
        (folder / case.file).write_text(json.dumps(case.config))
        return
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": case.config}))
