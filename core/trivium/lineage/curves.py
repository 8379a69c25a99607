"""Training curves as inline SVG, in colours that follow the page's light and dark mode."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from io import StringIO
from itertools import accumulate
from typing import Any

from trivium.lineage.runs import Stage

MAX_POINTS = 800  # of a curve: more than a screen can show, and few enough for a small page

# The curves are drawn in these colours, then each is exchanged for a CSS variable.
AXIS, TRAIN, VALIDATION, SPEED = "#7f8791", "#3b6fd5", "#cf6a21", "#2f8f83"
CSS_COLOURS = {AXIS: "--axis", TRAIN: "--train", VALIDATION: "--val", SPEED: "--speed"}

Points = list[tuple[int, float]]


@dataclass(frozen=True)
class Drawing:
    """A stage's curves. text: what they show, for those who cannot see them."""

    stage: Stage
    title: str
    text: str
    svg: str


@dataclass(frozen=True)
class Panel:
    """One metric over the steps. window: share of the curve that is smoothed over; 0 draws the steps alone."""

    key: str
    label: str
    window: float = 1 / 20


LOSS = Panel("train/loss", "loss")
REWARD = Panel("rollout/reward", "reward", 1 / 8)  # a sample of few answers: noisier than any loss
# what stands below the main panel: the first that was measured
BELOW_LOSS = (Panel("train/accuracy", "accuracy"), Panel("tokens_per_second", "tokens/s", 0))
BELOW_REWARD = (Panel("rollout/length", "length"),)


def smooth(values: Sequence[float], window: float = 1 / 20) -> list[float]:
    """Mean over a window, a share of the curve, centred so that a falling loss is not shown late.

    At the ends the window shrinks on both sides alike, so there the mean leans to neither.

    >>> smooth([8.0] * 39 + [3.0, 1.0])[-3:]
    [6.333333333333333, 4.0, 1.0]
    """
    sums = [0.0, *accumulate(values)]
    last, reach = len(values) - 1, int(len(values) * window / 2)
    sides = (min(reach, i, last - i) for i in range(len(values)))
    return [(sums[i + side + 1] - sums[i - side]) / (2 * side + 1) for i, side in enumerate(sides)]


def draw_curves(stage: Stage) -> Drawing | None:
    """What a stage learnt by, and below it a second metric; None when it has neither losses nor rewards.

    Where a model learns from its own answers that is their reward: the loss of a policy gradient says nothing.
    """
    main, others = (REWARD, BELOW_REWARD) if stage.curve(REWARD.key) else (LOSS, BELOW_LOSS)
    points = stage.curve(main.key)
    if not points:
        return None
    panels = [main, *[panel for panel in others if stage.curve(panel.key)][:1]]
    title = " and ".join(panel.label for panel in panels) + (" of its answers" if main is REWARD else "")
    smoothed = smooth([value for _, value in points], main.window)
    ends = [f"{smoothed[i]:.3f} at step {points[i][0]}" for i in (0, -1)]
    text = f"{main.label} of {stage.name}: {ends[0]}, {ends[1]}"
    return Drawing(stage, title, text, _svg(stage, panels))


def _svg(stage: Stage, panels: Sequence[Panel]) -> str:
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, PercentFormatter

    formats = {"train/accuracy": PercentFormatter(1, decimals=0), "tokens_per_second": EngFormatter(sep="")}
    # text stays text (small, and in the page's font); the salt makes equal curves give equal bytes
    text: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": stage.name, "font.size": 10.5}
    colours = dict.fromkeys(("axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "text.color"), AXIS)
    with rc_context({**text, **colours}):
        figure = Figure(figsize=(4.3, 3.5 if len(panels) > 1 else 2.6), layout="constrained")
        heights = {"height_ratios": (3, 1.2)} if len(panels) > 1 else {}
        all_axes = figure.subplots(len(panels), sharex=True, squeeze=False, gridspec_kw=heights)[:, 0]
        for panel, ax, colour in zip(panels, all_axes, (TRAIN, SPEED), strict=False):
            _draw(ax, stage.curve(panel.key), colour, panel.window)
            ax.set_ylabel(panel.label)
            ax.spines[["top", "right"]].set_visible(False)
            ax.grid(axis="y", color=AXIS, alpha=0.25, linewidth=0.6)
            ax.locator_params(axis="y", nbins=5 if ax is all_axes[0] else 2)
            if panel.key in formats:
                ax.yaxis.set_major_formatter(formats[panel.key])
            if ax is not all_axes[0]:
                ax.set_ylim(bottom=0, top=1 if panel.key == "train/accuracy" else None)
        validation = stage.curve("val/loss") if panels[0] is LOSS else []
        if validation:
            style = {"linewidth": 1.2, "marker": "o", "markersize": 4, "label": "validation"}
            _line(all_axes[0], validation, color=VALIDATION, **style)
            all_axes[0].legend(frameon=False)
        all_axes[-1].set_xlabel("step")
        all_axes[0].xaxis.get_major_locator().set_params(integer=True)
        return _inline_svg(figure)


def _draw(ax: Any, points: Points, colour: str, window: float) -> None:
    if not window:
        return _line(ax, points, color=colour, linewidth=1)
    smoothed = list(zip((step for step, _ in points), smooth([value for _, value in points], window), strict=True))
    _line(ax, points, color=colour, linewidth=0.7, alpha=0.35)
    _line(ax, smoothed, color=colour, linewidth=1.8, label="train")


def _line(ax: Any, points: Points, **style: Any) -> None:
    stride = math.ceil(len(points) / MAX_POINTS)
    ax.plot(*zip(*[*points[:-1:stride], points[-1]], strict=True), **style)


def _inline_svg(figure: Any) -> str:
    buffer = StringIO()
    empty = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=empty)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]  # the XML declaration and DOCTYPE have no place inside HTML
    for colour, variable in CSS_COLOURS.items():
        svg = svg.replace(colour, f"var({variable}, {colour})")
    return svg
