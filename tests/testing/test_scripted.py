"""The scripted runner: the same tokens however the work is cut, and no mistake of a plan unseen."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ullm.config import EngineConfig
from ullm.errors import ModelFileBroken
from ullm.protocol.messages import NewSequence, RankSpec, ScheduledSequence, Start, Step
from ullm.sampling import SamplingParams
from ullm.testing import ScriptedRunner, ScriptedSettings, ScriptViolation, scripted_tokens

GREEDY = SamplingParams(temperature=0)
SEEDED = SamplingParams(temperature=1.0, seed=11)
PROMPT = list(range(10, 50))


def load(settings="", **config):
    runner = ScriptedRunner()
    start = Start(
        EngineConfig(**{"num_blocks": 16, "block_size": 4, **config}), RankSpec(), f"scripted:{settings}"
    )
    runner.load(start, lambda progress: None)
    return runner


def step(runner, *rows, new=(), forget=()):
    return runner.submit(Step(0, list(rows), list(new), list(forget))).result()


def generate(runner, prompt, params, count, chunk, known=(), seq_id=1):
    """Run one sequence alone, its prompt in chunks; the pool is large enough."""
    tokens = [*prompt, *known]
    blocks = list(range(-(-(len(prompt) + count) // 4)))
    new = [NewSequence(seq_id, tokens, len(prompt), params, blocks)]
    start, generated = 0, list(known)
    while len(generated) < count:
        total = len(prompt) + len(generated)
        size = min(chunk, total - start)
        result = step(runner, ScheduledSequence(seq_id, start, size, start + size == total), new=new)
        start, new = start + size, []
        generated += [token for sampled in result.sampled for token in sampled.token_ids]
    return generated


@given(chunk=st.integers(1, 50), resumed_at=st.integers(0, 9), params=st.sampled_from([GREEDY, SEEDED]))
def test_tokens_do_not_depend_on_chunks_nor_on_a_resumption(chunk, resumed_at, params):
    expected = scripted_tokens(PROMPT, params, 10)
    assert len(set(expected)) > 5
    known = expected[:resumed_at]
    assert generate(load(), PROMPT, params, 10, chunk, known) == expected


def test_seeds_and_prompts_matter():
    texts = {tuple(scripted_tokens(PROMPT, SamplingParams(seed=seed), 8)) for seed in range(5)}
    texts.add(tuple(scripted_tokens(PROMPT[1:], GREEDY, 8)))
    texts.add(tuple(scripted_tokens(PROMPT, GREEDY, 8)))
    assert len(texts) == 7


def test_end_of_sequence():
    settings = ScriptedSettings(eos_after=3)
    tokens = scripted_tokens(PROMPT, GREEDY, 10, settings)
    assert len(tokens) == 4
    assert tokens[-1] == settings.eos_token_id
    assert settings.eos_token_id not in tokens[:-1]
    ignoring = SamplingParams(temperature=0, ignore_eos=True)
    assert len(scripted_tokens(PROMPT, ignoring, 10, settings)) == 10


def test_next_step_may_be_submitted_before_the_token_is_known():
    runner = load("asynchronous=true,step_seconds=0.01")
    new = NewSequence(1, PROMPT[:3], 3, GREEDY, [0])
    first = runner.submit(Step(0, [ScheduledSequence(1, 0, 3, True)], [new]))
    second = runner.submit(Step(1, [ScheduledSequence(1, 3, 1, True)]))
    assert not second.done()
    tokens = first.result().sampled[0].token_ids + second.result().sampled[0].token_ids
    assert second.done()
    assert tokens == scripted_tokens(PROMPT[:3], GREEDY, 2)


def test_prefix_from_the_cache_is_accepted_and_checked():
    runner = load()
    step(runner, ScheduledSequence(1, 0, 8, False), new=[NewSequence(1, PROMPT[:9], 9, GREEDY, [0, 1, 2])])
    cached = NewSequence(2, [*PROMPT[:8], 7], 9, GREEDY, [0, 1, 3], num_cached_tokens=8)
    step(runner, ScheduledSequence(2, 8, 1, True), new=[cached])
    other = NewSequence(3, [*PROMPT[1:9], 7], 9, GREEDY, [0, 1, 4], num_cached_tokens=8)
    with pytest.raises(ScriptViolation, match="not what its block has cached"):
        step(runner, new=[other])


def test_log_probabilities_are_shaped_as_asked():
    runner = load()
    params = SamplingParams(temperature=0, logprobs=3, prompt_logprobs=2)
    (first,) = step(
        runner, ScheduledSequence(1, 0, 3, False), new=[NewSequence(1, PROMPT[:5], 5, params, [0, 1])]
    ).sampled
    (second,) = step(runner, ScheduledSequence(1, 3, 2, True)).sampled
    assert [p.token_id for p in first.prompt_logprobs + second.prompt_logprobs] == PROMPT[1:5]
    assert all(len(p.top) == 2 for p in first.prompt_logprobs)
    assert first.token_ids == []
    assert second.logprobs[0].token_id == second.token_ids[0]
    assert len(second.logprobs[0].top) == 3


NEW = NewSequence(1, PROMPT[:6], 6, GREEDY, [0, 1])


@pytest.mark.parametrize("params", [GREEDY, SEEDED])
def test_drafts_are_accepted_as_far_as_they_are_right(params):
    text = scripted_tokens(PROMPT[:6], params, 8)
    runner = load()
    new = NewSequence(1, PROMPT[:6], 6, params, [0, 1, 2, 3])
    assert step(runner, ScheduledSequence(1, 0, 6, True), new=[new]).sampled[0].token_ids == text[:1]
    draft = [*text[1:3], (text[3] + 1) % 1000, text[4]]
    assert step(runner, ScheduledSequence(1, 6, 5, True, [], draft)).sampled[0].token_ids == text[1:4]
    with pytest.raises(ScriptViolation, match="only 9 positions are computed"):
        step(runner, ScheduledSequence(1, 10, 1, False))
    assert step(runner, ScheduledSequence(1, 9, 3, True, [], text[4:6])).sampled[0].token_ids == text[4:7]


def test_kv_of_a_wrong_guess_is_not_taken_for_another():
    runner = load()
    step(runner, ScheduledSequence(1, 0, 6, True), new=[NEW])
    step(runner, ScheduledSequence(1, 6, 2, True, [], [3]))
    token = scripted_tokens(PROMPT[:6], GREEDY, 2)
    cached = NewSequence(2, [*PROMPT[:6], *token, 9], 6, GREEDY, [0, 1, 2], num_cached_tokens=8)
    with pytest.raises(ScriptViolation, match="not what its block has cached"):
        step(runner, new=[cached])


def test_a_repetitive_script_repeats():
    tokens = scripted_tokens(PROMPT, GREEDY, 200, ScriptedSettings(repeat=5))
    known = [*PROMPT, *tokens]
    repeated = sum(known[i] == known[i - 5] for i in range(len(PROMPT), len(known)))
    assert 150 < repeated < 200


@pytest.mark.parametrize(
    ("row", "params", "message"),
    [
        (ScheduledSequence(1, 6, 3, True, [], [5]), GREEDY, "only 7 tokens are known"),
        (ScheduledSequence(1, 5, 3, True, [], [5]), GREEDY, "not after its last token alone"),
        (ScheduledSequence(1, 6, 2, False, [], [5]), GREEDY, "not after its last token alone"),
        (ScheduledSequence(1, 6, 1, True, [], [5]), GREEDY, "empty"),
        (ScheduledSequence(1, 6, 3, True, [], [5, 6]), GREEDY, "only 2 blocks"),
        (ScheduledSequence(1, 6, 2, True, [], [1000]), GREEDY, "outside of the vocabulary"),
        (ScheduledSequence(1, 6, 2, True, [], [5]), SamplingParams(presence_penalty=1.0), "cannot have one"),
    ],
)
def test_drafts_that_cannot_be_verified(row, params, message):
    runner = load()
    step(runner, ScheduledSequence(1, 0, 6, True), new=[NewSequence(1, PROMPT[:6], 6, params, [0, 1])])
    with pytest.raises(ScriptViolation, match=message):
        step(runner, row)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (Step(0, [ScheduledSequence(9, 0, 1, False)]), "sequence 9 is not known"),
        (Step(0, [], [NEW, NEW]), "sequence 1 is new, but known"),
        (Step(0, [ScheduledSequence(1, 2, 1, False)], [NEW]), "only 0 positions are computed"),
        (Step(0, [ScheduledSequence(1, 0, 7, False)], [NEW]), "only 6 tokens are known"),
        (Step(0, [ScheduledSequence(1, 0, 0, False)], [NEW]), "empty"),
        (Step(0, [ScheduledSequence(1, 0, 5, True)], [NEW]), "samples before its last token"),
        (Step(0, [ScheduledSequence(1, 0, 1, False, [16])], [NEW]), "block 16 does not exist"),
        (Step(0, [ScheduledSequence(1, 0, 1, False, [1])], [NEW]), "block 1 is there twice"),
        (Step(0, [], [NewSequence(1, [1000], 1, GREEDY, [0])]), "outside of the vocabulary"),
        (
            Step(0, [ScheduledSequence(1, 0, 6, False)], [NewSequence(1, PROMPT[:6], 6, GREEDY, [0])]),
            "only 1 blocks",
        ),
    ],
)
def test_plans_that_cannot_be_followed(plan, message):
    runner = load()
    with pytest.raises(ScriptViolation, match=message):
        runner.submit(plan)


def test_block_in_use_is_not_written_over():
    runner = load()
    step(runner, ScheduledSequence(1, 0, 6, True), new=[NEW])
    intruder = NewSequence(2, PROMPT[10:14], 4, GREEDY, [0])
    with pytest.raises(ScriptViolation, match="writes position 0 into block 0 over sequence 1's"):
        step(runner, ScheduledSequence(2, 0, 4, True), new=[intruder])


def test_block_of_a_forgotten_sequence_may_be_written_over():
    runner = load()
    step(runner, ScheduledSequence(1, 0, 6, True), new=[NEW])
    successor = NewSequence(2, PROMPT[10:14], 4, GREEDY, [0])
    assert step(runner, ScheduledSequence(2, 0, 4, True), new=[successor], forget=[1]).sampled


def test_equal_content_may_be_computed_twice_into_a_shared_block():
    runner = load()
    step(runner, ScheduledSequence(1, 0, 6, True), new=[NEW])
    twin = NewSequence(2, PROMPT[:6], 6, GREEDY, [0, 2], num_cached_tokens=3)
    assert step(runner, ScheduledSequence(2, 3, 3, True), new=[twin]).sampled


@pytest.mark.parametrize("level", [1, 2])
def test_asleep_it_has_nothing_and_computes_nothing(level):
    runner = load()
    expected = generate(runner, PROMPT[:6], GREEDY, 4, 100)
    given_back = runner.sleep(level)
    assert given_back["kv_cache"] == 8 * 16 * 4
    assert ("weights" in given_back) == (level == 2)
    with pytest.raises(ScriptViolation, match="step 0 came while asleep"):
        step(runner, ScheduledSequence(1, 6, 1, True))
    assert runner.wake(lambda progress: None).num_blocks == 16
    with pytest.raises(ScriptViolation, match="sequence 1 is not known here"):
        step(runner, ScheduledSequence(1, 6, 1, True))
    assert generate(runner, PROMPT[:6], GREEDY, 4, 100) == expected


def test_what_was_cached_before_a_sleep_is_gone():
    runner = load()
    step(runner, ScheduledSequence(1, 0, 6, True), new=[NEW])
    runner.sleep(1)
    runner.wake(lambda progress: None)
    cached = NewSequence(2, PROMPT[:6], 6, GREEDY, [0, 1], num_cached_tokens=4)
    with pytest.raises(ScriptViolation, match="position 0 is not what its block has cached"):
        step(runner, ScheduledSequence(2, 4, 2, True), new=[cached])


def test_awake_it_is_not_woken():
    with pytest.raises(ScriptViolation, match="not asleep"):
        load().wake(lambda progress: None)


def test_close_may_come_at_any_time_and_twice():
    runner = ScriptedRunner()
    assert runner.close() == runner.close()
    assert load().close() == runner.close()


def test_settings_from_path_file_and_environment(tmp_path):
    path = "scripted:vocab_size=77,asynchronous=true"
    assert ScriptedSettings.read(path, {}) == ScriptedSettings(vocab_size=77, asynchronous=True)
    environ = {"ULLM_SCRIPTED_VOCAB_SIZE": "78", "ULLM_SCRIPTED_STEP_SECONDS": "0.5", "ULLM_PORT": "1"}
    assert ScriptedSettings.read(path, environ).vocab_size == 78
    assert ScriptedSettings.read(path, environ).step_seconds == 0.5
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 300, "scripted": {"eos_after": 5}}))
    assert ScriptedSettings.read(str(tmp_path), {}) == ScriptedSettings(vocab_size=300, eos_after=5)
    with pytest.raises(ModelFileBroken, match="Expected `int`"):
        ScriptedSettings.read("scripted:vocab_size=many", {})
