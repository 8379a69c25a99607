"""A bad number never reaches the weights: planted in the loss, in one gradient, in one micro-batch; and what follows.

All through Lightning's real loop, and the rollbacks through the whole of `fit`, with checkpoints on disk.
"""

import json
import math
import multiprocessing
import os
import signal

import numpy as np
import pytest
import torch
from helpers import curve, curve_of, run_through, tiny_job, tiny_llama
from rich.console import Console

from trivium.data.config import BPEConfig
from trivium.data.datamodule import Steps
from trivium.data.tokenizer import train_bpe
from trivium.errors import TrainingError
from trivium.objectives.config import NextTokenConfig
from trivium.objectives.next_token import NextToken
from trivium.schema import GuardConfig
from trivium.training.callbacks import Record, Show
from trivium.training.config import AdamWConfig
from trivium.training.guard import Guard, RollBack
from trivium.training.objective_module import ObjectiveModule, StepSettings
from trivium.training.optim import adamw, optimizer_tensors
from trivium.training.trainer import fit
from trivium.types import LossOutput, TokenBatch

VOCAB, LENGTH = 61, 12
KINDS = {"nan": math.nan, "+inf": math.inf, "-inf": -math.inf, "1e30": 1e30}
PLACES = ("loss", "gradient", "micro-batch")
QUIET = Console(quiet=True)


def item(number, micro_batches=2):
    """Item `number` of the data, whose first token tells it: micro-batches of 2 rows."""
    generator = torch.Generator().manual_seed(number)
    found = []
    for _ in range(micro_batches):
        tokens = torch.randint(VOCAB, (2, LENGTH), generator=generator)
        tokens[:, 0] = number
        labels = tokens.clone()
        labels[:, 0] = -100
        found.append(TokenBatch(tokens, labels, torch.arange(LENGTH).expand(2, -1)))
    return found


class Planted(NextToken):
    """Next token, with `value` planted in the items `bad`; notes the items it has seen. after: called for each item."""

    def __init__(self, value=math.nan, place="loss", bad=(), after=lambda number: None):
        super().__init__(NextTokenConfig())
        self.value, self.place, self.bad, self.after = value, place, set(bad), after
        self.seen, self.calls, self.hook = [], 0, None

    def __call__(self, forward, batch):
        output, number = super().__call__(forward, batch), int(batch.tokens[0, 0])
        self.calls += 1
        first = self.calls % 2 == 1
        if self.hook is not None:
            self.hook.remove()
        if first:
            self.seen.append(number)
            self.after(number)
        if number not in self.bad:
            return output
        if self.place == "loss":
            return LossOutput(output.loss_sum + self.value, output.metrics)
        if self.place == "micro-batch":
            return LossOutput(output.loss_sum * (1.0 if first else self.value), output.metrics)

        def plant(gradient):
            gradient = gradient.clone()
            gradient[3, 5] = self.value
            return gradient

        if first:
            self.hook = forward.blocks[0].attn.q.weight.register_hook(plant)
        return output


def module_of(objective, policy="stop", lr=1e-2, dropout=0.2, **guard):
    settings = StepSettings(grad_clip=1.0, seed=0, guard=GuardConfig(policy=policy, **guard))
    make = lambda m: adamw(AdamWConfig(lr=lr), m)  # noqa: E731
    model = tiny_llama(VOCAB, layers=2, dropout=dropout, tied=False)
    return ObjectiveModule(model, objective, make, lambda step: 1.0, settings)


class Watch(Record):
    """Reads figures one step late, as every run does, and keeps weights, states and gradients of each step."""

    def __init__(self):
        super().__init__([], Show(QUIET, 99))
        self.states, self.gradients = [], []

    def on_train_start(self, trainer, pl_module):
        super().on_train_start(trainer, pl_module)
        self.note(pl_module)
        named = dict(pl_module.model.named_parameters())
        pl_module.optimizer.register_step_pre_hook(
            lambda *_: self.gradients.append({n: p.grad.double() for n, p in named.items()})
        )

    def note(self, module):
        weights = {n: p.detach().clone() for n, p in module.model.named_parameters()}
        self.states.append((weights, {k: v.clone() for k, v in optimizer_tensors(module.optimizer).items()}))

    def after(self, trainer, module):
        self.note(module)
        super().after(trainer, module)


def differences(one, other):
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(one[name], other[name])]


@pytest.mark.parametrize("policy", ["stop", "skip", "rollback"])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_planted_number_never_reaches_weights_or_optimizer(kind, place, policy):
    """Step 2 of 4 is planted; what is not finite changes no bit, and neither does a gradient of 1e30, whose norm is no
    number in fp32. A loss that is 1e30 too high but has a sound gradient is a step as any other (but for spike_sigma).
    """
    module, watch = module_of(Planted(KINDS[kind], place, [1]), policy), Watch()
    sound = kind == "1e30" and place == "loss"
    if policy == "skip" or sound:
        run_through(module, [item(i) for i in range(4)], [watch])
        assert module.step == 4 and ("skipped" in module.last) is False
    elif policy == "stop":
        with pytest.raises(TrainingError, match=r"step 2: loss .*, gradient norm .*\. The step was not taken"):
            run_through(module, [item(i) for i in range(4)], [watch])
    else:
        with pytest.raises(RollBack) as error:
            run_through(module, [item(i) for i in range(4)], [watch])
        assert error.value.step == 2
    if policy != "skip" and not sound:
        assert module.step == 3  # figures are read one step late
    for weights, states in watch.states:
        assert all(torch.isfinite(t).all() for t in (*weights.values(), *states.values()))
    changed = [differences(watch.states[1][i], watch.states[2][i]) for i in (0, 1)]
    assert all(changed) if sound else changed == [[], []]
    before, after, gradients = watch.states[2], watch.states[3], watch.gradients[2]
    names = [n for n, _ in module.model.named_parameters()]
    order = [p for group in module.optimizer.param_groups for p in group["params"]]
    by_id = {id(p): n for n, p in module.model.named_parameters()}
    assert len(names) == len(order)
    for parameter in order:  # AdamW by hand, in fp64: t counts steps that were taken
        name = by_id[id(parameter)]
        taken = 3 if sound else 2
        m = 0.9 * before[1][f"{name}.exp_avg"].double() + 0.1 * gradients[name]
        v = 0.95 * before[1][f"{name}.exp_avg_sq"].double() + 0.05 * gradients[name] ** 2
        assert after[1][f"{name}.step"].item() == taken
        step = m / (1 - 0.9**taken) / ((v / (1 - 0.95**taken)).sqrt() + 1e-8)
        decay = 0.1 if parameter.dim() > 1 else 0.0
        expected = before[0][name].double() * (1 - 1e-2 * decay) - 1e-2 * step
        torch.testing.assert_close(after[0][name].double(), expected, rtol=0, atol=1e-6)


def test_without_the_guard_one_number_would_ruin_all():
    """The same optimizer told that all is well: not one weight is left, so the test above can fail."""
    module = module_of(Planted(math.nan, "micro-batch", [1]), "skip")
    module.guard.judge = lambda loss, norm: torch.zeros(())
    run_through(module, [item(i) for i in range(3)])
    assert all(torch.isnan(p).all() for p in module.model.parameters())


def test_skipping_ends_by_patience():
    """Steps 3 to 8 are bad; three in a row are let pass, the fourth ends the run."""
    module = module_of(Planted(bad=range(2, 8)), "skip", patience=3)
    with pytest.raises(TrainingError, match=r"step 6: loss nan.*the 4 steps up to here were all skipped.*patience=3"):
        run_through(module, [item(i) for i in range(9)], [Watch()])
    module = module_of(Planted(bad=[2, 3, 4, 6, 7, 8]), "skip", patience=3)
    run_through(module, [item(i) for i in range(9)], [Watch()])
    assert [f.read()[1] for f in module._unread] == []  # all were read, none too many in a row


# ---- spikes


def test_mean_and_variance_by_numpy():
    """window 8. Up to then of all steps (numpy's, population variance), then x moves them by 1/8: mean + (x - mean) / 8
    and 7/8 (variance + (x - mean)^2 / 8), worked out here in fp64. fp32: 1e-5 relative."""
    guard, draw = Guard(GuardConfig(policy="skip", spike_sigma=50.0, window=8)), np.random.default_rng(0)
    figures = draw.normal([3.0, 0.5], [0.4, 0.05], (30, 2))
    mean = variance = np.zeros(2)
    for n, (loss, norm) in enumerate(figures, 1):
        assert guard.judge(torch.tensor(loss), torch.tensor(norm)).item() == 0.0
        if n <= 8:
            mean, variance = figures[:n].mean(0), figures[:n].var(0)
        else:
            off = figures[n - 1] - mean
            mean, variance = mean + off / 8, 7 / 8 * (variance + off**2 / 8)
        assert guard.seen.tolist() == pytest.approx([n, *mean, *variance], rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("of", ["loss", "norm"])
def test_a_spike_is_flagged_after_the_window_and_not_learned_from(of):
    """Standard deviation 1 around 10; 10 sigma up is 20. Before 20 good steps nothing is flagged, however high. A fall
    is no spike. 5.9 sigma above the mean so far is let pass, 6.1 is not: sigma is 6."""
    config = GuardConfig(policy="skip", spike_sigma=6.0, window=20)

    def judged(guard, value):
        pair = (value, 10.0) if of == "loss" else (10.0, value)
        return guard.judge(*(torch.tensor(x) for x in pair)).item()

    early = Guard(config)
    assert [judged(early, x) for x in (10.0, 10.0, 500.0, 1e6)] == [0.0] * 4
    guard = Guard(config)
    for i in range(20):
        assert judged(guard, 9.0 + 2 * (i % 2)) == 0.0  # mean 10, variance 1
    place = 1 if of == "loss" else 2
    assert guard.seen[place].item() == pytest.approx(10, abs=1e-5)
    assert guard.seen[place + 2].item() == pytest.approx(1, abs=1e-5)
    known = guard.seen.clone()
    for bad in (20.0, 16.1, math.nan, math.inf, 1e30):
        assert judged(guard, bad) == 1.0 and torch.equal(guard.seen, known)
    kept = guard.state()
    assert judged(guard, 15.9) == 0.0 and judged(guard, -1000.0) == 0.0
    other = Guard(config)
    other.restore(json.loads(json.dumps(kept)))
    assert torch.equal(other.seen, known)
    for value in (15.9, 12.0, 9.0, 30.0, 11.0):  # from there on the same, bit by bit
        again = Guard(config)
        again.restore(json.loads(json.dumps(other.state())))
        assert judged(other, value) == judged(again, value) and torch.equal(other.seen, again.seen)


def test_spikes_are_off_unless_asked_for():
    guard = Guard(GuardConfig(policy="skip", window=1))
    assert [guard.judge(torch.tensor(x), torch.tensor(1.0)).item() for x in (1.0, 1.0, 1e30)] == [0.0] * 3
    assert not guard.seen.any()


def test_a_level_shift_under_skip_ends_by_patience_and_says_what_to_set():
    """The loss is 100 a token higher from step 31 on: not one of those is taken, and the run does not skip for ever."""
    module = module_of(Planted(100.0 * 44, bad=range(30, 50)), "skip", lr=1e-4, spike_sigma=8.0, window=20, patience=5)
    watch = Watch()
    with pytest.raises(TrainingError) as error:
        run_through(module, [item(i) for i in range(50)], [watch])
    said = str(error.value)
    assert said.startswith("step 36: loss ") and "guard.spike_sigma=8" in said
    assert "the 6 steps up to here were all skipped (guard.patience=5)" in said
    assert "raise guard.spike_sigma if this is the level from here on" in said
    assert differences(watch.states[30][0], watch.states[-1][0]) == []
    assert int(module.guard.seen[0]) == 30


# ---- rollback


class Items(Steps):
    """Item k of the data is `item(k)`."""

    def __getitem__(self, step):
        return item(step)

    def sample_id(self, step):
        return f"item {step}"


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(BPEConfig(vocab_size=300), ["the river"])


def job_of(folder, tokenizer, objective, **guard):
    """12 steps, a checkpoint every 4."""
    settings = {"policy": "rollback", **guard}
    module = module_of(objective, **settings)
    return tiny_job(folder, tokenizer, module, Items(), max_steps=12, every_steps=4, guard=GuardConfig(**settings))


def by_hand(numbers):
    """The curve of a run on items in this very order."""
    module = module_of(Planted())
    return curve_of(module, [item(i) for i in numbers]), module


def final_weights(module):
    return {n: p.detach() for n, p in module.model.named_parameters()}


def test_a_rollback_goes_on_behind_the_bad_data(tmp_path, tokenizer):
    """Checkpoints at 4 and 8; item 5 (step 6) is bad, known while step 7 is made: back to step 4, and on with item 6.

    Item 4 was read, found good, and is given up with the step that it led to. Later item 10 is bad too: that is step 9,
    the first after checkpoint 8, and so nothing but it is lost. Curve and weights equal a run on the order below.
    """
    order = [0, 1, 2, 3, 6, 7, 8, 9, 11, 12, 13, 14]
    objective = Planted(bad=[5, 10])
    job = job_of(tmp_path / "run", tokenizer, objective)
    fitted = fit(job)
    assert fitted.steps == 12 and fitted.signal is None
    assert objective.seen == [0, 1, 2, 3, 4, 5, 6, *order[4:8], 10, 11, *order[8:]]
    expected, module = by_hand(order)
    assert curve(tmp_path / "run") == expected
    assert differences(final_weights(job.module), final_weights(module)) == []
    assert fitted.tokens == 12 * 4 * LENGTH
    said = job.console.export_text()
    assert "step 6: loss nan, gradient norm" in said and "back to step-4, and on with the data after that step" in said
    assert "step 9: loss nan" in said and "back to step-8" in said
    assert json.loads((tmp_path / "run/checkpoints/step-12/state.json").read_text())["next_sample"] == "item 15"


def test_a_bad_step_that_is_due_to_be_saved_or_the_last_is_rolled_back_first(tmp_path, tokenizer):
    """Steps 4, 8 and 12 are saved and have bad data: no checkpoint holds them as done."""
    objective = Planted(bad=[7, 14])
    job = job_of(tmp_path / "run", tokenizer, objective)
    assert fit(job).steps == 12
    order = [0, 1, 2, 3, 8, 9, 10, 11, 15, 16, 17, 18]
    assert curve(tmp_path / "run") == by_hand(order)[0]


def test_bad_data_right_after_bad_data_takes_a_rollback_each(tmp_path, tokenizer):
    """Items 5, 6 and 7: patience 3 is enough, patience 2 is not; every message names step and checkpoint."""
    objective = Planted(bad=[5, 6, 7])
    fit(job_of(tmp_path / "run", tokenizer, objective, patience=3))
    assert curve(tmp_path / "run") == by_hand([0, 1, 2, 3, *range(8, 16)])[0]
    with pytest.raises(TrainingError, match=r"step 5: loss nan.* after 2 times \(guard.patience\) back to step-4"):
        fit(job_of(tmp_path / "other", tokenizer, Planted(bad=[5, 6, 7]), patience=2))


def test_without_a_checkpoint_there_is_nothing_to_roll_back_to(tmp_path, tokenizer):
    with pytest.raises(TrainingError, match="step 2: loss nan.*there is no checkpoint yet to roll back to"):
        fit(job_of(tmp_path / "run", tokenizer, Planted(bad=[1])))


def test_spikes_roll_back_and_what_is_usual_with_them(tmp_path, tokenizer):
    """The loss of item 9 is 50 a token too high: 10 sigma after 6 steps. Back at step 8, mean and variance are as then,
    and those at the end are those of a run that never saw it."""
    guard = {"spike_sigma": 10.0, "window": 6}
    job = job_of(tmp_path / "run", tokenizer, Planted(50.0 * 22, bad=[9]), **guard)
    fit(job)
    order = [*range(8), *range(10, 14)]
    assert curve(tmp_path / "run") == by_hand(order)[0]
    other = module_of(Planted(), **guard)
    run_through(other, [item(i) for i in order])
    assert torch.equal(job.module.guard.seen, other.guard.seen)


def killed(run):
    """Runs in a process of its own, which must die by SIGKILL."""
    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL


def test_a_kill_between_a_rollback_and_the_next_save_changes_nothing(tmp_path, tokenizer):
    """Item 5 is bad; killed at item 7, after the rollback to 4 and before 8 is saved. And once more after 8 was saved,
    at item 11: there the checkpoint itself must know that the data has moved on by 2."""
    objective = Planted(bad=[5])
    fit(job_of(tmp_path / "whole", tokenizer, objective))
    for after in (7, 11):
        folder = tmp_path / f"killed-{after}"

        def die(number, after=after):
            if number == after:
                os.kill(os.getpid(), signal.SIGKILL)

        killed(lambda: fit(job_of(folder, tokenizer, Planted(bad=[5], after=die))))  # noqa: B023
        kept = {p.name for p in (folder / "checkpoints").iterdir() if p.is_dir()}
        assert kept == ({"step-4"} if after == 7 else {"step-4", "step-8"})
        again = Planted(bad=[5])
        fitted = fit(job_of(folder, tokenizer, again))
        assert fitted.resumed_from == (4 if after == 7 else 8)
        assert again.seen == ([4, 5, 6, *range(6, 14)] if after == 7 else [*range(10, 14)])
        assert curve(folder) == curve(tmp_path / "whole")


def test_a_signal_during_a_rollback_is_not_lost(tmp_path, tokenizer):
    """SIGTERM comes while the step after the bad one is made. The story: the handler went with the abandoned trainer,
    and the run went on until it was killed."""

    def stop(number):
        if number == 6:
            os.kill(os.getpid(), signal.SIGTERM)

    job = job_of(tmp_path / "run", tokenizer, Planted(bad=[5], after=stop))
    fitted = fit(job)
    assert (fitted.signal, fitted.steps) == (signal.SIGTERM, 4)
    fit(job_of(tmp_path / "run", tokenizer, Planted(bad=[5])))
    assert curve(tmp_path / "run") == by_hand([0, 1, 2, 3, *range(6, 14)])[0]


def test_rollback_reads_reference_values_for_what_it_reads_on_to(fork, main, preferring, tmp_path, monkeypatch):
    """DPO, 6 steps of 4 rows, so the reference was asked about 24 rows; step 5 is bad, and the data after it runs on to
    rows that no one asked about. The story: their values were NaN, and so was every loss from there on."""
    from trivium.objectives.preference import Preference

    plain, calls = Preference.__call__, []

    def planted(self, forward, batch):
        output = plain(self, forward, batch)
        if forward.training:
            calls.append(batch)
            if len(calls) == 5:
                return LossOutput(output.loss_sum * math.nan, output.metrics)
        return output

    monkeypatch.setattr(Preference, "__call__", planted)
    run = main(*preferring(tmp_path, "dpo", "guard.policy=rollback", "checkpoint.every_steps=2", "debug=true"))
    assert run.code == 0, run.err
    assert "step 5: loss nan" in run.out + run.err and len(calls) == 8  # 1-6 with a rollback to 4, then 5 and 6 again
    rows = [json.loads(line) for line in (tmp_path / "dpo/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert all(math.isfinite(row["train/loss"]) for row in rows)
    assert all(torch.isfinite(batch.reference).all() for batch in calls)
