"""Several ranks of a model of transformers: split by its class's plan, by transformers' own code.

Each rank reads its part of the weights only. The plan says which layers are split by outputs, which by
inputs, and what is summed or gathered; attention layers have a rank's share of the heads, and the head's
logits are gathered on every rank.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ullm.errors import ModelUnsupported, ResourceUnavailable

if TYPE_CHECKING:
    from ullm.config import ModelConfig
    from ullm.model.loading.checkpoint import Checkpoint

TRIED = frozenset(
    """
    afmoe apertus apertus1p5_text arcee aria_text axk1 codegen cohere cohere2 cohere2_moe
    cohere_compass_text cwm deepseek_v2 deepseek_v3 dots1 ernie4_5 ernie4_5_moe exaone exaone4
    exaone_moe flex_olmo flint gemma gemma2 gemma3 gemma3_text gemma4_text gemma4_unified_text glm
    glm4 glm4_moe glm4_moe_lite got_ocr2 gpt_neox gpt_oss gptj granite granite_swa granitemoe
    granitemoe_swa granitemoeshared helium hunyuan_v1_dense hunyuan_v1_moe hy_v3 hyperclovax
    internlm3 iquestcoder jais2 kolibri1 laguna llama longcat_flash mellum mimo_v2_flash minicpm3
    minimax_m2 minimax_m3_vl_text ministral ministral3 mistral mixtral moss_transcribe_diarize
    nanochat olmo olmo2 olmo3 olmoe phi phi3 phi4_multimodal phimoe qwen2 qwen2_moe qwen3 qwen3_moe
    sarvam_mla seed_oss smollm3 solar_open starcoder2 vaultgemma
    """.split()
)
"""Model types whose plans give the logits of one rank: tried with tiny models by
tests/model/architectures/test_split_architectures.py. Some plans give others, without a word."""
OF_HEADS = ("q_proj", "k_proj", "qkv_proj", "query_key_value")
"""Layers whose outputs are heads."""


def check_plan(
    empty: Any, checkpoint: Checkpoint, config: ModelConfig, device: torch.device, ranks: int
) -> None:
    """Refuse a model that transformers cannot split over so many ranks.

    Args:
        empty: the model without weights, on the meta device.

    Raises:
        ModelUnsupported: there is no plan that is known to be right, or the heads do not divide; one line
            says what to use.
    """
    path, name = checkpoint.path, type(empty).__name__
    if importlib.util.find_spec("accelerate") is None:
        raise ModelUnsupported(
            f"{path}: {name} is split over ranks by transformers, which needs accelerate: "
            "pip install 'ullm-engine[accelerate]'; or use --tp-size 1"
        )
    if not empty.supports_tp_plan:
        raise ModelUnsupported(
            f"{path}: transformers ships no plan to split {name} over ranks; use --tp-size 1"
        )
    if checkpoint.hf.get("model_type") not in TRIED:
        raise ModelUnsupported(
            f"{path}: transformers' plan to split {name} over ranks is not known to give the same results; "
            "use --tp-size 1"
        )
    if (
        device.type == "cuda" and not config.enforce_eager
    ):  # whether its collectives can be captured is not known
        raise ModelUnsupported(
            f"{path}: {name} runs on several GPUs with --enforce-eager, or with --tp-size 1"
        )
    if config.load_format == "dummy":
        raise ModelUnsupported(f"{path}: random weights of {name} run on one rank only; use --tp-size 1")
    if checkpoint.stored_format:
        raise ModelUnsupported(
            f"{path}: {name} with weights in {checkpoint.stored_format} runs on one rank only; "
            "use --tp-size 1"
        )
    rules = {rule.rsplit(".", 1)[-1]: style for rule, style in empty.tp_plan.items()}
    text = empty.config.get_text_config()
    for key in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(text, key, None)
        if (
            isinstance(heads, int)
            and heads % ranks
            and any(rules.get(each) == "colwise" for each in OF_HEADS)
        ):
            raise ModelUnsupported(
                f"{path}: {key} {heads} does not divide by --tp-size {ranks}, as transformers' plan for "
                f"{name} wants; use a number of ranks that it divides by"
            )


@contextlib.contextmanager
def split_over(ranks: int, device: torch.device) -> Iterator[dict[str, Any]]:
    """Yield the arguments with which transformers loads this rank's part; none for one rank.

    The ranks must be connected: transformers takes PyTorch's default group, and makes others of its own in
    it, which end with it.

    Raises:
        ResourceUnavailable: the ranks would compute on another kind of device than transformers chooses.
    """
    if ranks == 1:
        yield {}
        return
    from transformers.distributed.configuration_utils import DistributedConfig

    chosen = torch.accelerator.current_accelerator()
    if (chosen.type if chosen is not None else "cpu") != device.type:
        raise ResourceUnavailable(
            f"transformers splits models over {chosen} devices here, not over --device {device.type}; "
            "hide them with CUDA_VISIBLE_DEVICES= or use --tp-size 1"
        )
    with _local_rank(device.index or 0):
        yield {"distributed_config": DistributedConfig(tp_size=ranks)}


@contextlib.contextmanager
def _local_rank(index: int) -> Iterator[None]:
    """Tell transformers the rank's device, which it reads from the environment."""
    before = os.environ.get("LOCAL_RANK")
    os.environ["LOCAL_RANK"] = str(index)
    try:
        yield
    finally:
        if before is None:
            del os.environ["LOCAL_RANK"]
        else:
            os.environ["LOCAL_RANK"] = before


def own_part(tensor: Tensor) -> Tensor:
    """Return what this rank has of a tensor that may be split, without a copy."""
    if isinstance(tensor, DTensor):
        with torch.no_grad():
            return tensor.to_local()
    return tensor
