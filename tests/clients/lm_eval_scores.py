"""lm-eval's loglikelihoods through the server; `test_lm_eval.py` runs this in another environment."""
# mypy: ignore-errors

from __future__ import annotations

import json
import sys


def main() -> None:
    """Read pairs of texts, context and continuation; write tokens of both, the score, and the verdict."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    url = sys.argv[1]
    model = LocalCompletionsAPI(
        model="SmolLM2-135M-Instruct", base_url=f"{url}/completions", tokenizer_backend="remote"
    )
    pairs = json.load(sys.stdin)
    requests = [
        Instance(request_type="loglikelihood", doc={}, arguments=tuple(pair), idx=index)
        for index, pair in enumerate(pairs)
    ]
    found = model.loglikelihood(requests, disable_tqdm=True)
    results = [
        [*map(list, model._encode_pair(*pair)), score, bool(greedy)]
        for pair, (score, greedy) in zip(pairs, found, strict=True)
    ]
    sys.stdout.write(json.dumps(results) + "\n")


if __name__ == "__main__":
    main()
