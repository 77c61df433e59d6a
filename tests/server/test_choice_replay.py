"""A choice made again from its tokens says what it said when it was made, however its tokens came."""

from __future__ import annotations

import random

import pytest
from fake_engine import ByteTokenizer

from ullm.engine.output import ChoiceReader, Output
from ullm.engine.replay import ChoiceEnd, ChoiceReplay
from ullm.sampling import SamplingParams
from ullm.scheduling.request import RequestRecord
from ullm.tokenization.detokenizer import TextAssembler

EOS, STOP_TOKEN = 1, 0
TEXT = "Grüße 🎉 aus Paris, aus Rom"
PROMPT = [5, 6, 7]


def live(params: SamplingParams, tokens: list[int], reason: str, random_: random.Random) -> list[Output]:
    """Return the outputs of a reader that gets the tokens in pieces of random sizes."""
    tokenizer = ByteTokenizer()
    record = RequestRecord(0, "r", PROMPT, params, 10**6, 0, lambda now: None)
    decoder = tokenizer.detokenizer(prompt_token_ids=PROMPT, skip_special_tokens=params.skip_special_tokens)
    text = TextAssembler(
        decoder,
        params.stop_strings,
        include_stop=params.include_stop_str_in_output,
        min_tokens=params.min_tokens,
    )
    reader = ChoiceReader(0, record, text, {})
    outputs = []
    while tokens and not reader.finished:
        count = random_.randint(1, 4)
        record.token_ids += tokens[:count]
        del tokens[:count]
        if not tokens and reason != "timeout":
            record.finish_reason = reason  # type: ignore[assignment]
            record.stop_reason = STOP_TOKEN if record.token_ids[-1] == STOP_TOKEN else None
        output, _ = reader.next()
        assert output is not None
        outputs.append(output)
    if not reader.finished:
        record.finish("timeout")
        output, _ = reader.next()
        assert output is not None
        outputs.append(output)
    return outputs


def replayed(params: SamplingParams, outputs: list[Output]) -> list[Output]:
    tokens = [token for output in outputs for token in output.token_ids]
    last = outputs[-1]
    assert last.finish_reason is not None
    end = ChoiceEnd(last.finish_reason, last.stop_reason, bool(last.token_ids))
    replay = ChoiceReplay(0, PROMPT, params, ByteTokenizer())
    before = tokens[:-1] if end.with_token else tokens
    return [*map(replay.token, before), replay.end(tokens[len(before) :], end)]


@pytest.mark.parametrize("stop", [(), (" aus", "Rom"), ("🎉 a",), ("nowhere",), ("Rom",)])
@pytest.mark.parametrize("fields", [{}, {"include_stop_str_in_output": True}, {"min_tokens": 22}])
@pytest.mark.parametrize("ending", ["eos", "stop token", "length", "cut", "timeout"])
def test_it_says_the_same(stop: tuple[str, ...], fields: dict[str, object], ending: str) -> None:
    tokens = ByteTokenizer().plain(TEXT)
    tokens = tokens[:-23] if ending == "cut" else tokens  # within a character
    tokens += {"eos": [EOS], "stop token": [STOP_TOKEN]}.get(ending, [])
    params = SamplingParams(stop=stop, stop_token_ids=[STOP_TOKEN], **fields)  # type: ignore[arg-type]
    reason = {"length": "length", "cut": "length", "timeout": "timeout"}.get(ending, "stop")
    for seed in range(5):
        made = live(params, list(tokens), reason, random.Random(seed))
        again = replayed(params, made)
        assert "".join(each.text for each in again) == "".join(each.text for each in made)
        assert again[-1].stop_reason == made[-1].stop_reason
        assert again[-1].num_generated_tokens == made[-1].num_generated_tokens
        assert [each.finish_reason for each in again[:-1]] == [None] * (len(again) - 1)
