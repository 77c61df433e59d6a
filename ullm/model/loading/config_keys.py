"""Which keys of a config.json were acted on, so that none is left unread by accident."""

from __future__ import annotations

from typing import Any, Self

USED_ELSEWHERE = frozenset(
    {
        *(
            "architectures",
            "model_type",
            "auto_map",
            "dtype",
            "torch_dtype",
            "rope_scaling",
            "rope_parameters",
        ),
        *("rope_theta", "eos_token_id", "quantization_config", "compression_config", "quantization"),
        *("max_position_embeddings", "partial_rotary_factor"),
    }
)
"""Keys that are read before a class reads its own, or that are another's older or newer name."""
WITHOUT_EFFECT = frozenset(
    {
        # of training
        *("attention_dropout", "embd_pdrop", "resid_pdrop", "initializer_range", "router_aux_loss_coef"),
        *(
            "router_jitter_noise",
            "output_router_logits",
            "pretraining_tp",
            "use_cache",
            "gradient_checkpointing",
        ),
        # of other tasks, and of what is returned beside the logits
        *("id2label", "label2id", "problem_type", "num_labels", "chunk_size_feed_forward", "return_dict"),
        *("output_attentions", "output_hidden_states", "is_encoder_decoder", "is_decoder", "tokenizer_class"),
        # of the front end, which has them from the tokenizer
        *("bos_token_id", "pad_token_id", "unk_token_id", "sep_token_id", "task_specific_params"),
        # of implementations
        *(
            "transformers_version",
            "_name_or_path",
            "_attn_implementation",
            "attn_implementation",
            "use_bfloat16",
        ),
        *("_attn_implementation_autoset", "cache_implementation", "unsloth_version", "unsloth_fixed"),
    }
)
"""Keys that change no logit."""
OF_OTHER_CLASSES = frozenset(
    {
        *("attn_logit_softcapping", "sliding_window", "max_window_layers", "_sliding_window_pattern"),
        *("sliding_window_pattern", "layer_types", "use_sliding_window", "rope_local_base_freq"),
        *("original_max_position_embeddings", "num_experts", "num_local_experts", "model_max_length"),
    }
)
"""Keys that change something only where a class reads them; transformers has them for some that do not."""


class ReadKeys(dict[str, Any]):
    """A configuration that remembers which of its keys were asked for; so do those made of it with ``|``."""

    def __init__(self, content: dict[str, Any], asked: set[str] | None = None) -> None:
        super().__init__(content)
        self.asked = set[str]() if asked is None else asked

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        """Return a value and remember its key."""
        self.asked.add(key)
        return super().get(key, default)

    def __or__(self, other: dict[str, Any]) -> Self:  # type: ignore[override]
        return type(self)({**self, **other}, self.asked)

    def unread(self) -> list[str]:
        """Return the keys that nobody asked for and that may have a meaning: their value is not empty."""
        known = self.asked | USED_ELSEWHERE | WITHOUT_EFFECT | OF_OTHER_CLASSES
        return sorted(key for key, value in self.items() if key not in known and value not in (None, False))
