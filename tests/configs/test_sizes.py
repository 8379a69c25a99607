"""Published models by name have their published number of parameters; `model.size` makes one of about that number."""

import re
from pathlib import Path

import pytest
import torch

from trivium.build import sized_for
from trivium.compose import component, compose, run_config
from trivium.errors import ConfigError
from trivium.models.sizes import parameters_of
from trivium.plugin import discover
from trivium.registry import MODELS

discover()
PRESETS = {p.stem: p.read_text() for p in (Path(__file__).parents[2] / "conf/model").glob("*.yaml")}
PUBLISHED = {
    n: m.groups() for n, t in PRESETS.items() if (m := re.search(r": ([\d,]+)[a-z ]* with[a-z ]* ([\d,]+)\n", t))
}
BY_HAND = {
    "gpt2_124m": 124_439_808,
    "llama3_8b": 8_030_261_248,
    "qwen2_5_7b": 7_615_616_512,
    "gemma2_9b": 9_241_705_984,
}
"""As their model cards have them: the numbers in the files must not be of our own making."""


def made(name, config, vocab_size):
    with torch.device("meta"):
        return MODELS.load(name)(config, vocab_size)


@pytest.mark.parametrize("preset", PUBLISHED)
def test_a_preset_has_the_published_number_of_parameters(preset):
    said, vocabulary = (int(text.replace(",", "")) for text in PUBLISHED[preset])
    chosen = run_config(compose([f"model={preset}"])).model
    assert made(chosen.name, chosen.config, vocabulary).num_parameters == said == BY_HAND.get(preset, said)


def test_all_presets_say_their_size():
    """All but the project's own and the one that is fetched."""
    assert set(PRESETS) - set(PUBLISHED) == {"primer", "primer_half", "smollm2_135m"} and len(PUBLISHED) >= 19


@pytest.mark.parametrize("family", [name for name in MODELS if name != "hf"])
@pytest.mark.parametrize("vocabulary", [2048, 49152])
@pytest.mark.parametrize("size", ["5m", "30m", "135m", "1b", "7b"])
def test_a_size_is_met_within_six_percent(family, vocabulary, size):
    chosen = sized_for(component("model", {"name": family, "size": size}), vocabulary)
    model = made(family, chosen.config, vocabulary)
    assert model.num_parameters == pytest.approx(parameters_of(size), rel=0.06)
    assert chosen.config.size == "" and chosen.config.layers >= 1
    if vocabulary == 2048 and size != "5m" and family in ("llama", "gpt2"):
        assert 32 <= chosen.config.dim / chosen.config.layers <= 128


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"size": "big"}, "model.size='big' is no size; write a number of parameters, such as 500k, 30m or 1.2b"),
        ({"size": "0m"}, "is no size"),
        (
            {"size": "30m", "layers": 3},
            "model.size=30m makes dim, layers, heads, kv_heads, ffn_dim; leave model.layers=3",
        ),
        ({"size": "100k"}, "no shape has so few or many; the nearest has"),
    ],
)
def test_what_is_no_size_is_refused(settings, told):
    with pytest.raises(ConfigError, match=told):
        sized_for(component("model", {"name": "llama", **settings}), 49152)


def test_a_model_of_a_size_is_trained_and_loaded_again(main, pretraining, tmp_path):
    """Its checkpoint has the sizes, so it needs no `size`; naming the same one again fits, another does not."""
    changes = [o for o in pretraining(tmp_path, "run", "model.size=100k") if not re.match(r"model\.(?!size)", o)]
    done = main(*changes, "model=llama", "model.context=64", "trainer.max_steps=2")
    assert done.code == 0 and "model.size=100k: dim=" in done.out, done.err
    ask = ("phase=generate", f"init_from={tmp_path / 'run'}", "prompt=abc", f"runs={tmp_path}", "model.context=64")
    assert main(*ask, "name=a", "model=llama", "model.size=100k").code == 0
    wrong = main(*ask, "name=b", "model=llama", "model.size=200k")
    assert wrong.code == 1 and "is of another architecture" in wrong.err


def test_sizes_that_contradict_one_another_are_refused_early(main, tmp_path):
    done = main("phase=pretrain", "model=primer", "model.size=30m", f"runs={tmp_path}", "name=run")
    with pytest.raises(ConfigError, match="model.size=30m makes dim"):
        sized_for(run_config(compose(["model=primer", "model.size=30m"])).model, 4096)
    assert done.code == 2 and "leave model.dim=192 away, or choose a family that sets none (model=llama)" in done.err
