"""The sampling parameters that a model itself recommends, for requests that name none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from ullm.config import ModelConfig
from ullm.errors import InvalidParameter, ModelFileBroken
from ullm.hub import LocalModel
from ullm.logs import get_logger
from ullm.sampling import SamplingParams

_NAMES = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}
"""Key of a generation_config.json → parameter. They are those that vLLM reads; like it, ``do_sample`` is not
looked at, because requests say by their temperature whether they are sampled."""

NOT_APPLIED: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("min_length", "min_new_tokens", "no_repeat_ngram_size", "epsilon_cutoff"), (0,)),
    **dict.fromkeys(("eta_cutoff", "penalty_alpha", "diversity_penalty"), (0,)),
    **dict.fromkeys(("encoder_no_repeat_ngram_size",), (0,)),
    **dict.fromkeys(("typical_p", "encoder_repetition_penalty", "guidance_scale"), (1,)),
    **dict.fromkeys(("num_beams", "num_return_sequences", "num_beam_groups"), (1,)),
    **dict.fromkeys(("top_h", "stop_strings", "bad_words_ids", "force_words_ids", "constraints"), ()),
    **dict.fromkeys(("forced_bos_token_id", "forced_eos_token_id", "suppress_tokens"), ()),
    **dict.fromkeys(("begin_suppress_tokens", "sequence_bias", "watermarking_config"), ()),
    **dict.fromkeys(("exponential_decay_length_penalty", "dola_layers", "token_healing"), ()),
    **dict.fromkeys(("decoder_start_token_id",), ()),
}
"""Keys of a generation_config.json that change transformers' text and are not applied here → values that
change nothing, beside none and false."""
WITHOUT_EFFECT = frozenset(
    {
        *(
            "do_sample",
            "max_length",
            "max_time",
            "early_stopping",
            "length_penalty",
        ),  # of beams, or of a call
        *("use_mtp", "use_cache", "cache_implementation", "cache_config", "max_cache_len", "is_assistant"),
        *("renormalize_logits", "remove_invalid_values", "output_attentions", "output_hidden_states"),
        *("output_scores", "output_logits", "return_dict_in_generate", "pad_token_id", "bos_token_id"),
        *("eos_token_id", "num_assistant_tokens", "num_assistant_tokens_schedule", "low_memory"),
        *("assistant_confidence_threshold", "prompt_lookup_num_tokens", "max_matching_ngram_size"),
        *("assistant_early_exit", "assistant_lookbehind", "target_lookbehind", "assistant_ensemble_weight"),
        *("speculation_type", "compile_config", "disable_compile", "continuous_batching_config"),
        *("prefill_chunk_size", "_from_model_config", "transformers_version", "chat_format"),
    }
)
"""Keys that are read elsewhere, or are about how transformers computes."""
log = get_logger(__name__)


class SamplingDefaults(msgspec.Struct, frozen=True, omit_defaults=True):
    """Defaults of a model, which a request's own values override; None: `SamplingParams` has the default.

    Args:
        max_tokens: tokens of an answer whose request names no number, if the context has room for them.
    """

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    max_tokens: int | None = None

    def params(self, **given: Any) -> SamplingParams:
        """Return sampling parameters: those given, and the model's for the rest.

        ``max_tokens`` stays out: it depends on the prompt's length, so it counts when a request is admitted.

        Raises:
            InvalidParameter: a value is out of range; names the field.
        """
        own = msgspec.structs.asdict(self) | {"max_tokens": None}
        return SamplingParams(**{name: value for name, value in own.items() if value is not None} | given)


def read_sampling_defaults(config: ModelConfig, local: LocalModel) -> SamplingDefaults:
    """Return what a model's generation_config.json, or its GGUF file, recommends; nothing unless wanted.

    Raises:
        ModelFileBroken: a value is not one of a request; names it, and how to do without.
    """
    if config.generation_config == "vllm":
        return SamplingDefaults()
    if ignored := not_applied(local.generation_config):
        names = ", ".join(ignored)
        log.warning(f"generation_config.json of {config.model} has keys that have no effect here: {names}")
    found = {_NAMES[key]: local.generation_config.get(key) for key in _NAMES}
    values: dict[str, Any] = {name: value for name, value in found.items() if value is not None}
    try:
        checked = SamplingParams(**values)
    except InvalidParameter as error:
        file = local.path if local.path.suffix == ".gguf" else Path(local.path, "generation_config.json")
        raise ModelFileBroken(file, f"{error}; use --generation-config vllm to ignore its values") from None
    return SamplingDefaults(**{name: getattr(checked, name) for name in values})


def not_applied(content: dict[str, Any]) -> list[str]:
    """Return the keys of a generation_config.json that are not applied though they may change a text."""
    known = _NAMES.keys() | NOT_APPLIED.keys() | WITHOUT_EFFECT
    kept = (key for key, value in content.items() if value not in (None, False, [], {}))
    return sorted(
        key for key in kept if key not in known or content[key] not in NOT_APPLIED.get(key, (content[key],))
    )
