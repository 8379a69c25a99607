"""Who wins: command line > experiment > recipe > domain > phase > config, with a plugin that sets one key in each."""

import pytest
import yaml

SOURCE = """\
from dataclasses import dataclass
from trivium import Entry, Plugin
plugin = Plugin(name="lab", conf="pkg://lab.conf")
"""


def layer(lr, more=""):
    return f"# @package _global_\n{more}optim: {{lr: {lr}}}\n"


@pytest.fixture
def lab(plugin_folder):
    """A plugin with a phase, a domain, a recipe and an experiment, each with its own optim.lr."""
    return plugin_folder(
        "lab",
        {
            "__init__.py": SOURCE,
            "conf/__init__.py": "",
            "conf/phase/mine.yaml": layer(0.2, "defaults: [pretrain]\n"),
            "conf/domain/plain.yaml": "# @package _global_\ndomain: plain\n",
            "conf/domain/lab.yaml": layer(0.3, "domain: lab\n"),
            "conf/domain/full.yaml": layer(0.3, "domain: full\n"),
            "conf/recipe/full/mine.yaml": layer(0.4),
            "conf/data/full/mine.yaml": "# @package data\ndefaults: ['/data/primer@_here_']\nnum_tasks: 7\n",
            "conf/experiment/best.yaml": layer(0.5, "trainer: {max_steps: 77}\n"),
            "conf/experiment/whole.yaml": "# @package _global_\ndefaults: [{override /schedule: wsd}]\nname: whole\n",
        },
    )


@pytest.mark.parametrize(
    ("overrides", "lr"),
    [
        (["phase=pretrain", "domain=plain"], 1e-3),  # the dataclass's own
        (["phase=mine", "domain=plain"], 0.2),
        (["phase=mine", "domain=lab"], 0.3),
        (["phase=mine", "domain=full"], 0.4),
        (["phase=mine", "domain=full", "experiment=best"], 0.5),
        (["optim.lr=0.6", "phase=mine", "domain=full", "experiment=best"], 0.6),
    ],
)
def test_later_layers_win(overrides, lr, lab, launch):
    shown = launch("--cfg", "job", *overrides, path=[lab])
    assert shown.returncode == 0, shown.stderr
    tree = yaml.safe_load(shown.stdout)
    assert float(tree["optim"]["lr"]) == lr
    if "experiment=best" in overrides:
        assert tree["trainer"]["max_steps"] == 77
    if "domain=full" in overrides:
        assert tree["data"]["num_tasks"] == 7, "the domain's data for the phase is chosen with it"


def test_experiment_may_choose_components_and_the_command_line_others(lab, launch):
    shown = launch("--cfg", "job", "phase=pretrain", "experiment=whole", path=[lab])
    tree = yaml.safe_load(shown.stdout)
    assert (tree["schedule"]["name"], tree["name"]) == ("wsd", "whole"), shown.stderr
    shown = launch("--cfg", "job", "phase=pretrain", "experiment=whole", "schedule=linear", "name=x", path=[lab])
    tree = yaml.safe_load(shown.stdout)
    assert (tree["schedule"]["name"], tree["name"]) == ("linear", "x"), shown.stderr


def test_explain_names_every_layer_in_order_the_winner_last(lab, launch):
    command = ["explain", "optim.lr", "phase=mine", "domain=full", "experiment=best", "optim.lr=0.6"]
    told = launch(*command, path=[lab])
    assert told.returncode == 0, told.stderr
    assert told.stdout.splitlines()[0] == "optim.lr = 0.6"
    layers = [line.split("set by")[1].strip() for line in told.stdout.splitlines() if "set by" in line]
    ends = ["phase/mine.yaml", "domain/full.yaml", "recipe/full/mine.yaml", "experiment/best.yaml"]
    assert [f.endswith(e) for f, e in zip(layers, ends, strict=False)] == [True] * 4, layers
    assert layers[4:] == ["the command line: optim.lr=0.6"]
    assert "default  0.001" in told.stdout and "peak learning rate" in told.stdout
