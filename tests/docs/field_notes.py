"""Meanings of fields of requests and answers, where neither a docstring nor a sampling parameter has them."""

from __future__ import annotations

from collections.abc import Mapping

Place = tuple[str, str]
"""Name of a schema, or empty for all that have the field, and name of the field."""

NOTES: Mapping[Place, str] = {
    ("", "model"): "The served name, as in `/v1/models`; may be left out. Another name is answered with 404",
    ("", "timeout"): "Seconds from the arrival of the request after which it ends with what it has and "
    '`finish_reason: "timeout"`; the header `X-Request-Timeout` means the same',
    ("", "add_special_tokens"): "Add the tokenizer's special tokens to a text; default: true",
    ("", "add_generation_prompt"): "Have the chat template begin the assistant's turn; default: true",
    ("", "chat_template_kwargs"): "Further variables for the chat template",
    ("", "continue_final_message"): "Leave the last message open, and go on in it; default: false",
    ("", "documents"): "Documents for the chat template",
    ("", "chat_template"): "A Jinja template that replaces the model's own; needs "
    "`--trust-request-chat-template`",
    ("", "messages"): "The conversation; roles are system, developer, user, assistant and tool, content is a "
    "text or a list of text parts",
    ("", "tools"): "Functions that the chat template describes to the model; calls are not parsed out of "
    "its answer",
    ("", "skip_special_tokens"): "Leave special tokens out of the text; default: true",
    ("TokenizeRequest", "prompt"): "A text; either this or `messages`",
    ("TokenizeRequest", "messages"): "A conversation; either this or `prompt`",
    ("TokenizeRequest", "return_token_strs"): "Also return each token as text",
    ("DetokenizeRequest", "tokens"): "Token ids",
    ("DetokenizeRequest", "skip_special_tokens"): "Leave special tokens out of the text; default: false",
    ("InferenceRequest", "prompt"): "A text",
    ("InferenceRequest", "max_new_tokens"): "Maximum number of tokens to generate; default: 128, and never "
    "beyond the end of the context",
    ("InferenceRequest", "max_tokens"): "Another name of `max_new_tokens`",
    ("InferenceRequest", "max_completion_tokens"): "Another name of `max_new_tokens`, which wins",
    ("ReloadRequest", "model"): "Another folder, file or hub id, with the same tokenizer; default: the same",
    ("ReloadRequest", "revision"): "Another revision of a hub model; default: the same",
    (
        "FaultsRequest",
        "plan",
    ): "A plan of faults, as in [fault injection](../how-to/fault-injection.md#plans)",
    ("Usage", "prompt_tokens"): "Tokens of the prompts; a prompt counts once, whatever `n` is",
    ("Usage", "completion_tokens"): "Tokens generated for all choices",
    ("Usage", "total_tokens"): "The sum of both",
    ("Usage", "prompt_tokens_details"): "`cached_tokens`: prompt tokens that were in the prefix cache",
    ("Liveness", "status"): "`live` or `dead`, `ready` or `not ready`",
    ("Liveness", "state"): "As in [Health](#health)",
    ("Health", "replicas"): "One entry per replica",
    ("Health", "sleep"): "Whether the engine sleeps, and takes requests",
    ("ReplicaHealth", "replica"): "Its number, from 0; a reload counts on",
    ("ReplicaHealth", "worker_pids"): "Process numbers of its workers, one per rank",
    ("ReloadReport", "revision"): "The revision that was loaded, if one was asked for",
    ("ReloadReport", "replicas"): "Numbers of the replicas that serve now",
    ("Sleeping", "is_sleeping"): "Whether it is anything but awake; true also while it falls asleep or wakes",
    ("Sleeping", "level"): "Of the sleep; null while awake",
    ("BackendInfo", "model"): "The served name",
    ("BackendInfo", "state"): "As in [Health](#health)",
    ("BackendInfo", "transport"): "What a worker is: process, thread or ray",
    ("BackendInfo", "replicas"): "How many",
    ("BackendInfo", "tp_size"): "Ranks that share each layer of a replica",
    ("BackendInfo", "pp_size"): "Stages that a replica's layers are in; it has as many times `tp_size` ranks",
    ("Tokenized", "tokens"): "Token ids",
    ("Tokenized", "count"): "How many",
    ("Tokenized", "max_model_len"): "Tokens of prompt and output together that fit into the context",
    ("Tokenized", "token_strs"): "Each token as text, if asked for",
    ("Detokenized", "prompt"): "The text",
    ("Inference", "text"): "The generated text",
    ("Inference", "finish_reason"): "`stop`, `length`, `abort` or `timeout`",
    ("Inference", "num_prompt_tokens"): "Tokens of the prompt",
    ("Inference", "num_generated_tokens"): "Tokens generated",
    ("Stopping", "state"): "`draining`",
    ("Stopping", "timeout"): "Seconds until the process has ended at the latest",
    ("Tree", "state"): "As in [Health](#health)",
    ("Tree", "children"): "In order of start",
    ("TreeNode", "name"): "Its id, unique beside its siblings",
    ("TreeNode", "restart"): "`permanent`, `transient` or `temporary`",
    ("TreeNode", "children"): "Of a supervisor, in order of start",
    ("ErrorDetail", "message"): "One line, for people",
    ("ErrorDetail", "type"): "The kind of error, as OpenAI names it",
    ("ErrorDetail", "code"): "The error itself, for programs; see [errors](errors.md)",
}
