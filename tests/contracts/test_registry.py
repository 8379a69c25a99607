"""A registry is a small, loud dictionary."""

import sys

import pytest

from trivium.errors import ConfigError, PluginError
from trivium.plugin import Plugin, register
from trivium.registry import MODELS, Entry, Registry, extra, near_misses, registries


@pytest.fixture
def animals():
    animals = Registry("animal")
    for name in ("heron", "otter", "badger"):
        animals.add(name, Entry("math:pi", owner="zoo"))
    return animals


def test_names_are_listed_in_order(animals):
    assert list(animals) == ["badger", "heron", "otter"] and len(animals) == 3
    assert "heron" in animals and "herring" not in animals
    assert [(name, e.owner) for name, e in animals.items()] == [("badger", "zoo"), ("heron", "zoo"), ("otter", "zoo")]


def test_unknown_name_has_near_misses_and_the_list(animals):
    with pytest.raises(ConfigError) as told:
        animals.resolve("otters")
    assert str(told.value) == "unknown animal 'otters'. Did you mean otter? Available: badger, heron, otter"
    with pytest.raises(ConfigError, match="unknown animal 'zebra'. Available: badger, heron, otter"):
        animals.load("zebra")
    with pytest.raises(ConfigError, match=r"Available: \(none\)"):
        Registry("plant").config("oak")


def test_near_misses_say_nothing_when_nothing_is_near():
    assert near_misses("xyz", ["adamw", "cosine"]) == ""
    assert near_misses("adam", ["adamw", "cosine"]) == " Did you mean adamw?"


def test_same_owner_twice_is_refused_and_the_first_stays(animals):
    with pytest.raises(PluginError, match="zoo registers the animal 'heron' twice"):
        animals.add("heron", Entry("math:e", owner="zoo"))
    assert animals.resolve("heron").target == "math:pi"


def test_two_owners_clash_until_one_is_named(animals):
    """Neither wins silently; the error holds the two spellings that work."""
    animals.add("heron", Entry("math:e", owner="pond"))
    with pytest.raises(PluginError) as told:
        animals.resolve("heron")
    assert str(told.value) == "the animal 'heron' comes from 2 packages; write zoo:heron or pond:heron"
    assert animals.load("pond:heron") == pytest.approx(2.718281828)
    assert animals.load("zoo:heron") == pytest.approx(3.141592653)
    assert [e.owner for name, e in animals.items() if name == "heron"] == ["zoo", "pond"]


def test_qualified_name_of_another_owner_is_unknown(animals):
    assert animals.resolve("zoo:otter").target == "math:pi"
    with pytest.raises(ConfigError, match="unknown animal 'pond:otter'. Did you mean otter"):
        animals.resolve("pond:otter")


def test_owner_can_be_taken_back(animals):
    animals.add("heron", Entry("math:e", owner="pond"))
    animals.remove_owner("zoo")
    assert list(animals) == ["heron"] and animals.resolve("heron").owner == "pond"


def test_registering_imports_nothing(animals, plugin_folder, monkeypatch):
    """Only loading does, and only what was asked for."""
    site = plugin_folder("lazybird", {"__init__.py": "", "nest.py": "class Nest:\n    class Config: ...\nEGG = 7\n"})
    monkeypatch.syspath_prepend(str(site))
    animals.add("lazy", Entry("lazybird.nest:EGG", owner="lazybird"))
    animals.add("nest", Entry("lazybird.nest:Nest", owner="lazybird"))
    assert animals.resolve("lazy").owner == "lazybird" and "lazy" in list(animals)
    assert not [m for m in sys.modules if m.startswith("lazybird")]
    assert animals.load("lazy") == 7
    assert "lazybird.nest" in sys.modules
    assert animals.config("nest").__qualname__ == "Nest.Config", "without a config in the entry, the class's own"


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("lostbird.nowhere:X", "ModuleNotFoundError"),
        ("math:no_such_name", "AttributeError"),
        ("badbird.broken:X", "ZeroDivisionError: division by zero"),
        ("badbird.wrong:X", "SyntaxError"),
    ],
)
def test_broken_import_is_a_plugin_error_with_its_owner(animals, target, reason, plugin_folder, monkeypatch):
    files = {"__init__.py": "", "broken.py": "1 / 0\n", "wrong.py": "def\n"}
    monkeypatch.syspath_prepend(str(plugin_folder("badbird", files)))
    animals.add("broken", Entry(target, owner="aviary"))
    with pytest.raises(PluginError) as told:
        animals.load("broken")
    assert str(told.value).startswith(f"aviary: '{target}' cannot be imported ({reason}")


def test_plugin_is_registered_whole_or_not_at_all():
    """The extras are no mapping, so the model before them is taken back too."""
    extra("optimizers")
    before = {kind: list(registry) for kind, registry in registries().items()}
    half = Plugin(name="half", models={"a_first": "m:A"}, extras={"optimizers": ["b_second"]})  # type: ignore[dict-item]
    with pytest.raises(AttributeError):
        register(half, "half")
    assert {kind: list(registry) for kind, registry in registries().items()} == before
    assert "a_first" not in MODELS


def test_other_api_level_is_refused_in_one_sentence():
    with pytest.raises(PluginError) as told:
        register(Plugin(name="future", api=7, models={"f": "m:F"}), "future")
    assert str(told.value) == (
        "plugin 'future' is written for API level 7; this trivium speaks 1. "
        "Install a release of future for this version."
    )
    assert "f" not in MODELS
