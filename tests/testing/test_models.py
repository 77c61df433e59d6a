"""Models written for tests load like any others."""

import subprocess
import sys

import pytest

from ullm import hub
from ullm.config import EngineConfig
from ullm.protocol.messages import RankSpec, Start
from ullm.testing import ScriptedRunner, local_model, tiny_tokenizer, write_scripted_model, write_tiny_model
from ullm.testing.models import FIRST_WORD


def test_tokenizer_is_the_same_each_time(tmp_path):
    assert tiny_tokenizer(tmp_path / "a") == tiny_tokenizer(tmp_path / "b") == 512
    first, second = (tmp_path / name / "tokenizer.json" for name in "ab")
    assert first.read_bytes() == second.read_bytes()


def test_scripted_model_speaks_in_words(tmp_path):
    folder = write_scripted_model(tmp_path, context_len=99, eos_after=7)
    info = ScriptedRunner().load(Start(EngineConfig(), RankSpec(), str(folder)), lambda progress: None)
    assert (info.vocab_size, info.context_len, info.eos_token_ids) == (512, 99, (2,))
    local = local_model(folder)
    assert local.config["scripted"]["first_token"] == FIRST_WORD
    assert local.config["scripted"]["eos_after"] == 7


def test_local_model_is_what_the_hub_says(tmp_path):
    folder = write_scripted_model(tmp_path)
    assert hub.resolve(EngineConfig(model=str(folder), served_model_name="tiny")) == local_model(folder)


def test_scripted_model_needs_neither_torch_nor_transformers(tmp_path):
    program = (
        "import sys; from ullm.testing import write_scripted_model; "
        f"write_scripted_model({str(tmp_path)!r}); "
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, env={"PYTHONPATH": ":".join(sys.path)})


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "gpt_neox"])
def test_tiny_model_loads_in_transformers_with_the_weights_of_its_seed(tmp_path, architecture):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    first = write_tiny_model(tmp_path / "first", architecture, num_hidden_layers=1)
    again = write_tiny_model(tmp_path / "again", architecture, num_hidden_layers=1)
    other = write_tiny_model(tmp_path / "other", architecture, num_hidden_layers=1, seed=1)
    ids = transformers.AutoTokenizer.from_pretrained(first)("Paris is", return_tensors="pt").input_ids

    def logits(folder):
        model = transformers.AutoModelForCausalLM.from_pretrained(folder)
        assert model.config.num_hidden_layers == 1
        with torch.inference_mode():
            return model(ids).logits

    assert torch.equal(logits(first), logits(again))
    assert not torch.equal(logits(first), logits(other))
