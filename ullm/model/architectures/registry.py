"""Build and load the model of a checkpoint, so that it is ready to run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import torch

from ullm.config import EngineConfig, ModelConfig
from ullm.errors import (
    ModelError,
    ModelFileBroken,
    ModelUnsupported,
    OutOfMemory,
    ResourceUnavailable,
    one_line,
)
from ullm.logs import get_logger
from ullm.machine import available_memory
from ullm.model.architectures.decoder import Decoder
from ullm.model.architectures.decoder_config import DecoderConfig
from ullm.model.architectures.gemma import Gemma2ForCausalLM, Gemma3ForCausalLM
from ullm.model.architectures.granite import GraniteForCausalLM
from ullm.model.architectures.llama import LlamaForCausalLM, MistralForCausalLM
from ullm.model.architectures.mixtral import MixtralForCausalLM
from ullm.model.architectures.olmo import Olmo2ForCausalLM, Olmo3ForCausalLM
from ullm.model.architectures.phi3 import Phi3ForCausalLM
from ullm.model.architectures.qwen2 import Qwen2ForCausalLM
from ullm.model.architectures.qwen3 import Qwen3ForCausalLM
from ullm.model.architectures.qwen_moe import Qwen2MoeForCausalLM, Qwen3MoeForCausalLM
from ullm.model.architectures.smollm3 import SmolLM3ForCausalLM
from ullm.model.attention.batch import CausalModel
from ullm.model.kernels.cpu.build import library_path, why_no_library
from ullm.model.kernels.cpu.kernels import NAMES, CpuKernels, load_kernels
from ullm.model.layers.parallel import ParallelContext
from ullm.model.layers.quantization import Scheme
from ullm.model.layers.rope import cache_bytes
from ullm.model.loading.checkpoint import Checkpoint, knows_model_type
from ullm.model.loading.config_keys import ReadKeys
from ullm.model.loading.dummy import fill_dummy
from ullm.model.loading.packed import PackedFile, packed_file
from ullm.model.loading.sources import names_with_codes, weight_files
from ullm.model.loading.weights import check_shapes, has_own_head, lacks_prefix, load_weights, stored_dtypes
from ullm.model.memory.kv_pool import mib

log = get_logger(__name__)

NATIVE: dict[str, type[Decoder]] = {
    "LlamaForCausalLM": LlamaForCausalLM,
    "MistralForCausalLM": MistralForCausalLM,
    "Qwen2ForCausalLM": Qwen2ForCausalLM,
    "Qwen3ForCausalLM": Qwen3ForCausalLM,
    "Gemma2ForCausalLM": Gemma2ForCausalLM,
    "Gemma3ForCausalLM": Gemma3ForCausalLM,
    "GraniteForCausalLM": GraniteForCausalLM,
    "MixtralForCausalLM": MixtralForCausalLM,
    "Olmo2ForCausalLM": Olmo2ForCausalLM,
    "Olmo3ForCausalLM": Olmo3ForCausalLM,
    "Phi3ForCausalLM": Phi3ForCausalLM,
    "Qwen2MoeForCausalLM": Qwen2MoeForCausalLM,
    "Qwen3MoeForCausalLM": Qwen3MoeForCausalLM,
    "SmolLM3ForCausalLM": SmolLM3ForCausalLM,
}
"""Architecture, as named in config.json, → class."""
MODEL_TYPES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Gemma2ForCausalLM": "gemma2",
    "Gemma3ForCausalLM": "gemma3_text",
    "GraniteForCausalLM": "granite",
    "MixtralForCausalLM": "mixtral",
    "Olmo2ForCausalLM": "olmo2",
    "Olmo3ForCausalLM": "olmo3",
    "Phi3ForCausalLM": "phi3",
    "Qwen2MoeForCausalLM": "qwen2_moe",
    "Qwen3MoeForCausalLM": "qwen3_moe",
    "SmolLM3ForCausalLM": "smollm3",
}
"""Architecture → the ``model_type`` by which transformers knows it."""
NOT_IN_WEIGHTS = frozenset(
    {
        *("model", "revision", "tokenizer", "served_model_name", "chat_template"),
        *("generation_config", "verify", "lora"),
        *("context_len", "enforce_eager", "gpu_kernels", "cpu_calibration", "runner"),
    }
)
"""Options of a model that its packed weights do not depend on."""


def load_model(
    checkpoint: Checkpoint,
    config: EngineConfig,
    device: torch.device,
    parallel: ParallelContext,
    progress: Callable[[], None],
) -> CausalModel:
    """Build the model and load its weights, natively or else through transformers.

    Args:
        progress: called now and then while the weights load.

    Raises:
        ModelError: the model cannot be loaded; one line says why.
    """
    native = native_class(checkpoint, parallel.world_size)
    if isinstance(native, str):
        choose_scheme(checkpoint, config, None)
        return load_with_transformers(checkpoint, config, device, parallel, why=native)
    model = build(native, checkpoint, parallel)
    if model.config.experts is not None and device.type == "cuda" and not config.enforce_eager:
        # Ours are chosen on the host, which the capture of a CUDA graph cannot wait for.
        if checkpoint.path.suffix == ".gguf":
            raise ModelUnsupported(
                f"{checkpoint.path}: experts of a GGUF file run on CUDA with --enforce-eager"
            )
        choose_scheme(checkpoint, config, None)
        return load_with_transformers(checkpoint, config, device, parallel, why="its experts, on CUDA")
    use_kernels = config.cpu_kernels and device.type == "cpu" and model.suits_kernels()
    packed = find_packed(checkpoint, config, parallel) if use_kernels else None
    kernels = load_kernels(checkpoint.dtype, progress) if use_kernels else None
    if kernels is None:
        packed = None  # only the kernels can read it, and PyTorch's own packed weights cannot be written
    if packed is not None and kernels is not None and restore(model, packed, kernels, checkpoint.dtype):
        return model
    scheme = choose_scheme(checkpoint, config, kernels)
    if scheme is not None:
        of_codes = scheme == "stored" and checkpoint.stored_format
        model.quantize(scheme, names_with_codes(checkpoint.path) if of_codes else None)
    if config.load_format != "dummy":
        check_shapes(model, checkpoint.path)
    stored = stored_dtypes(model, checkpoint.path) if keeps_stored(checkpoint, config, kernels) else None
    allocate(model, checkpoint.dtype, device, stored)
    if config.load_format == "dummy":
        fill_dummy(model, seed=parallel.rank + parallel.stage * parallel.world_size)
    else:
        load_weights(model, checkpoint.path, progress, model.is_elsewhere)
    model.prepare(device, kernels, fuse=config.gpu_kernels)
    if packed is not None and kernels is not None and packed.write(model.packed_weights(), progress):
        restore(model, packed, kernels, checkpoint.dtype)  # shared with others, and the unmapped are freed
    return model


def native_class(checkpoint: Checkpoint, ranks: int = 1) -> type[Decoder] | str:
    """Return the native class that computes a checkpoint, or why only transformers' code may be able to.

    Like transformers, it goes by the config's ``model_type``, if there is a class for it.

    Args:
        ranks: number of ranks that share each layer.

    Raises:
        ModelFileBroken: a file of the checkpoint cannot be read.
    """
    native = NATIVE.get(checkpoint.architecture)
    if native is None:
        return f"{checkpoint.architecture} is not native"
    kind = checkpoint.hf.get("model_type")
    if kind is not None and kind != MODEL_TYPES[checkpoint.architecture]:
        if kind in MODEL_TYPES.values():
            native = next(NATIVE[name] for name, each in MODEL_TYPES.items() if each == kind)
        elif knows_model_type(kind):
            return f"its model_type is {kind!r}"
    try:
        shape = native.read_config(checkpoint.hf, checkpoint.context_len)
    except ModelUnsupported as error:  # what it refuses, transformers may run
        return str(error)
    except (KeyError, TypeError, ValueError, ArithmeticError):
        return native  # `build` says what is wrong
    if shape.norm_all_heads and ranks > 1 and checkpoint.path.suffix != ".gguf":
        return "its queries are normalised over all heads"
    if lacks_prefix(checkpoint.path):
        return "the names of its tensors do not begin with 'model.'"
    return native


def choose_scheme(checkpoint: Checkpoint, config: EngineConfig, kernels: CpuKernels | None) -> Scheme | None:
    """Return how to quantize the weights; None: not at all.

    Args:
        kernels: the CPU kernels; None if something else computes the model, which cannot use such weights.

    Raises:
        ConfigError: quantization is wanted but not possible.
    """
    wanted = config.quantization
    if wanted in ("int8", "int4") and kernels is None:
        if config.cpu_kernels and checkpoint.architecture in NATIVE and (reason := why_no_library()):
            raise ResourceUnavailable(
                f"--quantization {wanted} needs compiled kernels, and {reason}; or use --quantization none"
            )
        raise ResourceUnavailable(
            f"--quantization {wanted} needs ullm's own kernels, which run on CPUs, for {', '.join(NATIVE)}, "
            "with --cpu-kernels; use --quantization none"
        )
    if wanted == "auto" and kernels is not None and checkpoint.stored_format:
        return "stored" if names_with_codes(checkpoint.path) else None
    if wanted == "auto" and kernels is not None and checkpoint.path.suffix == ".gguf":
        from ullm.model.loading.gguf import is_quantized  # its libraries take long to import

        return "stored" if is_quantized(checkpoint.path) else None
    return wanted if wanted in ("int8", "int4") else None


def keeps_stored(checkpoint: Checkpoint, config: EngineConfig, kernels: CpuKernels | None) -> bool:
    """Return True if weights stay in the checkpoint's dtypes, which the kernels for float32 widen exactly."""
    return kernels is not None and checkpoint.dtype == torch.float32 and config.load_format != "dummy"


def map_model(checkpoint: Checkpoint, config: EngineConfig, parallel: ParallelContext) -> Decoder | None:
    """Return the model with weights that `load_model` has left in the cache; None if there are none."""
    native = native_class(checkpoint, parallel.world_size) if config.cpu_kernels else ""
    model = None if isinstance(native, str) else build(native, checkpoint, parallel)
    packed = find_packed(checkpoint, config, parallel) if model is not None else None
    if model is None or packed is None or not packed.path.exists():
        return None
    kernels = load_kernels(checkpoint.dtype)
    return model if kernels is not None and restore(model, packed, kernels, checkpoint.dtype) else None


def find_packed(checkpoint: Checkpoint, config: EngineConfig, parallel: ParallelContext) -> PackedFile | None:
    """Return the file of this rank's packed weights, which may not exist; None if they cannot be kept."""
    library = library_path() if checkpoint.dtype in NAMES and config.load_format != "dummy" else None
    if library is None:
        return None
    options = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(ModelConfig)
        if field.name not in NOT_IN_WEIGHTS
    }
    place = [parallel.rank, parallel.world_size, parallel.stage, parallel.num_stages]
    made = [checkpoint.hf, options, str(checkpoint.dtype), library.name, *place]
    try:
        return packed_file(weight_files(checkpoint.path), made)
    except (OSError, ModelError):
        return None  # loading raises the error


def restore(model: Decoder, packed: PackedFile, kernels: CpuKernels, dtype: torch.dtype) -> bool:
    """Map the weights instead of loading them; return False if that is not possible."""
    weights = packed.read()
    if weights is None or sum(tensor.nbytes for tensor in weights.values()) > available_memory():
        return False  # mapped weights that do not fit into memory would be read again and again
    model.restore(weights, kernels, dtype)
    return True


def build(native: type[Decoder], checkpoint: Checkpoint, parallel: ParallelContext) -> Decoder:
    """Build the model on the meta device, without memory for its weights.

    Raises:
        ModelFileBroken: the config makes no model.
        ModelUnsupported: the config asks for something that the decoder cannot do.
    """
    file = checkpoint.path if checkpoint.path.suffix == ".gguf" else checkpoint.path / "config.json"
    keys = ReadKeys(checkpoint.hf)
    try:
        shape = native.read_config(keys, checkpoint.context_len)
        shape.check()
    except KeyError as error:
        raise ModelFileBroken(file, f"has no {error}") from None
    except (TypeError, ValueError, ArithmeticError) as error:
        raise ModelFileBroken(file, f"makes no {checkpoint.architecture}: {one_line(error)}") from None
    if file.suffix != ".gguf" and (unread := keys.unread()):  # ours, of a GGUF file's metadata, are all known
        log.warning(f"{file}: keys that have no effect here: {', '.join(unread)}")
    if shape.tie_word_embeddings and has_own_head(checkpoint.path):
        log.warning("the checkpoint has a head of its own, which is used", tie_word_embeddings=True)
        shape = dataclasses.replace(shape, tie_word_embeddings=False)
    if shape.num_layers < 1:
        raise ModelFileBroken(file, f"says that the model has {shape.num_layers} layers")
    try:
        with torch.device("meta"):
            return native(shape, parallel)
    except (TypeError, ValueError, IndexError, RuntimeError, ZeroDivisionError) as error:
        raise ModelFileBroken(file, f"makes no {checkpoint.architecture}: {one_line(error)}") from None


def check_context(shape: DecoderConfig) -> None:
    """Refuse a context whose rotary embeddings do not fit into memory.

    Raises:
        OutOfMemory: names the context's length.
    """
    ropes = (shape.rope,) if shape.local_rope is None else (shape.rope, shape.local_rope)
    need = sum(cache_bytes(rope, shape.head_dim, shape.context_len) for rope in ropes)
    if need > (free := available_memory()):
        raise OutOfMemory(
            f"a context of {shape.context_len} tokens needs {mib(need)} for its rotary embeddings, and "
            f"{mib(free)} are free; use a smaller --context-len"
        )


def allocate(
    model: Decoder, dtype: torch.dtype, device: torch.device, stored: Mapping[str, torch.dtype] | None = None
) -> None:
    """Allocate the weights as `Decoder.materialize` does.

    Raises:
        OutOfMemory: the device has too little free memory.
    """
    need = 0
    for prefix, module in model.named_modules():
        kept = dtype if stored is None else stored.get(prefix, dtype)
        need += sum(each.numel() for each in module.parameters(recurse=False)) * kept.itemsize
    free = available_memory() if device.type == "cpu" else torch.cuda.mem_get_info(device)[0]
    if need > free:
        raise OutOfMemory(
            f"the weights need {mib(need)}, the {device.type} has {mib(free)} free; use a smaller model"
        )
    check_context(model.config)
    model.materialize(dtype, device, stored)


def load_with_transformers(
    checkpoint: Checkpoint, config: EngineConfig, device: torch.device, parallel: ParallelContext, *, why: str
) -> CausalModel:
    """Load any other causal language model through transformers' code.

    Args:
        why: why no native class computes it.

    Raises:
        ModelUnsupported: several stages, a GGUF file, or a model that paged attention cannot run.
    """
    if parallel.num_stages > 1:
        raise ModelUnsupported(
            f"{checkpoint.path}: runs through transformers' code ({why}), "
            "which has no stages; use --pp-size 1"
        )
    refuse_gguf(checkpoint, why)
    if checkpoint.architecture in NATIVE:
        log.info("the model runs through transformers' code", why=why)
    # transformers takes seconds to import
    from ullm.model.architectures.transformers_model import TransformersModel

    return TransformersModel.load(checkpoint, config, device, parallel.world_size)


def refuse_gguf(checkpoint: Checkpoint, why: str) -> None:
    """Refuse a GGUF file that no native class computes.

    Raises:
        ModelUnsupported: so it is.
    """
    if checkpoint.path.suffix == ".gguf":
        raise ModelUnsupported(f"{checkpoint.path}: this GGUF file cannot be run: {why}")


def choose_device(config: EngineConfig, device_index: int | None) -> torch.device:
    """Return the device of this rank.

    Raises:
        ConfigError: ``--device cuda``, but PyTorch sees no CUDA device.
    """
    kind = config.device
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cuda" and not torch.cuda.is_available():
        raise ResourceUnavailable("--device is cuda, but PyTorch sees no CUDA device; use --device cpu")
    return torch.device("cuda", device_index or 0) if kind == "cuda" else torch.device("cpu")
