"""The model that is served, and the precision that it computes in."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal

from ullm.config.options import option
from ullm.errors import ConfigError

DEFAULT_MODEL = "SmolLM2-135M-Instruct"
"""The embedded default model; see `ullm.hub`."""
DEFAULT_RUNNER = "ullm.model.execution.runner:ModelRunner"


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The model, and the precision it computes in."""

    model: str = option(
        DEFAULT_MODEL, "Model to serve: a hub id, a local folder or a .gguf file; the default is embedded."
    )
    revision: str | None = option(
        None, "Branch, tag or commit of a hub model; default: the main branch, or what is cached."
    )
    tokenizer: str | None = option(None, "Folder or hub id of the tokenizer; default: the model's own.")
    served_model_name: str | tuple[str, ...] | None = option(
        None,
        "Names by which the API serves the model; the first one is shown in responses. Default: the last "
        "part of the model's name, and the whole of it.",
    )
    chat_template: str | None = option(
        None, "File with a Jinja chat template that replaces the model's; default: the model's own."
    )
    special_tokens_in_text: bool = option(
        True,
        "Let special tokens that users' and tools' messages spell out be those tokens, as transformers does; "
        "if not, they are text, and no message can forge another turn.",
    )
    generation_config: Literal["auto", "vllm"] = option(
        "auto",
        "Sampling parameters of requests that name none; auto: those of the model's generation_config.json, "
        "vllm: the API's defaults.",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto",
        "Dtype of arithmetic and KV; auto: on a GPU the checkpoint's, on a CPU bfloat16 if fast there, else "
        "float32. The CPU kernels widen weights of 16 bits to float32 as they multiply.",
    )
    quantization: Literal["auto", "none", "int8", "int4"] = option(
        "auto",
        "Precision of the weights on a CPU: int8 and int4 quantize them while loading, none dequantizes "
        "them; auto: as stored in the checkpoint.",
    )
    verify: bool = option(
        False,
        "Compare a native model with transformers' code on 16 tokens when it is loaded, unless it is large "
        "or a GGUF file, and refuse it if they differ. ullm doctor MODEL does so, too.",
    )
    lora: tuple[str, ...] = option(
        (),
        "LoRA adapters, each as NAME=FOLDER: served under that name beside the model. Several: separate them "
        "by commas, or repeat the option.",
        aliases=("--lora-modules",),
    )
    context_len: int | None = option(
        None,
        "Maximum number of tokens of a prompt and its output together; default: the model's own. The limit "
        "is that, too, or what linear, dynamic or YaRN scaling of its rotary embedding extends it to.",
        aliases=("--max-model-len",),
    )
    load_format: Literal["auto", "dummy"] = option(
        "auto",
        "Source of the weights; auto: the checkpoint's files, dummy: random weights of the same shapes.",
    )
    trust_remote_code: bool = option(False, "Run Python code that comes with the model.")
    enforce_eager: bool = option(False, "Do not capture CUDA graphs.")
    cpu_kernels: bool = option(True, "Compile fused kernels for the CPU where a C++ compiler is found.")
    cpu_calibration: bool = option(
        True,
        "Use what was measured for the CPU kernels on this machine; if nothing was, measure it beside the "
        "first start of a process that serves.",
    )
    gpu_kernels: bool = option(
        True, "Compile fused kernels for CUDA where Triton works and agrees with PyTorch."
    )
    runner: str = option(
        DEFAULT_RUNNER,
        "Class that workers run, as module:class; for tests and experiments.",
    )

    @property
    def calibrates_kernels(self) -> bool:
        """Whether measurements of the CPU kernels are of use; other runners have none."""
        return self.cpu_kernels and self.cpu_calibration and self.runner == DEFAULT_RUNNER

    @property
    def model_names(self) -> tuple[str, ...]:
        """The names by which the API serves the model, at least one."""
        names = self.served_model_name
        if isinstance(names, str):
            names = (names,)
        if names:
            return names
        return tuple(dict.fromkeys((os.path.basename(self.model.rstrip("/")) or self.model, self.model)))

    @property
    def lora_paths(self) -> dict[str, str]:
        """The adapters to start with: name → folder.

        Raises:
            ConfigError: an entry is not NAME=FOLDER, or a name is taken.
        """
        paths = dict[str, str]()
        for entry in self.lora:
            name, _, path = entry.partition("=")
            if not name or not path:
                raise ConfigError(f"--lora {entry!r} must be NAME=FOLDER")
            if name in paths or name in self.model_names:
                other = "another adapter" if name in paths else "the model itself"
                raise ConfigError(f"--lora {entry!r}: {name!r} is the name of {other}; choose a new one")
            paths[name] = path
        return paths

    @property
    def model_name(self) -> str:
        """The name that responses and logs show."""
        return self.model_names[0]
