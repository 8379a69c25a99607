"""Learning from the policy's own samples, through the real engine: what is drawn is what is learned from."""

import copy
import itertools
import math

import lightning as L
import pytest
import torch
from helpers import curve, curve_of, run_through, tiny_job
from torch import nn

from trivium.data.config import BPEConfig, SourceConfig
from trivium.data.datamodule import PromptDataset
from trivium.data.source import Source
from trivium.data.tokenizer import train_bpe
from trivium.errors import TrainingError
from trivium.inference.config import NativeConfig
from trivium.inference.native.engine import NativeBackend
from trivium.models.config import LlamaConfig
from trivium.models.llama import Llama
from trivium.objectives.config import GRPOConfig
from trivium.objectives.policy_gradient import GRPO
from trivium.schema import GuardConfig
from trivium.training import trainer
from trivium.training.objective_module import StepSettings
from trivium.training.rollout_module import MISMATCH, RolloutModule, RolloutSettings
from trivium.types import IGNORE, Score

SAMPLES, MAX_TOKENS, LENGTH, TEMPERATURE = 4, 6, 64, 0.9
QUESTIONS = ["the river?", "and the stone?", "the river?", "so"]
"""The first and the third are one text, asked by two examples."""


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(BPEConfig(vocab_size=300), ["the river and the stone"] * 3)


def worth(example, text):
    """A reward that depends on the example and on the very letters; example 2 thinks all answers equally good."""
    return 0.1 if example["id"] == "q2" else len(example["id"]) + sum(map(ord, text)) % 7 - 3.0


class Questions(Source):
    """Four examples; remembers what it was asked to judge."""

    def __init__(self):
        super().__init__(SourceConfig())
        self.judged = []

    def __len__(self):
        return len(QUESTIONS)

    def __getitem__(self, index):
        turns = [("user", QUESTIONS[index]), ("assistant", "stone")]
        messages = [{"role": role, "content": content} for role, content in turns]
        return {"id": f"q{index}", "messages": messages, "answer": "stone", "task": "t"}

    def score(self, example, completion):
        self.judged.append((example["id"], completion))
        return Score(worth(example, completion), False)


class Recording(NativeBackend):
    """Remembers the events of each request."""

    def generate(self, requests):
        self.asked = list(requests)
        self.events = {r.id: [] for r in requests}
        for event in super().generate(requests):
            self.events[event.request_id].append(event)
            yield event


def policy(tokenizer, seed=0, dropout=0.0):
    """A bias towards the end of a turn, so that some answers end and some are cut."""
    config = LlamaConfig(
        dim=16, layers=1, heads=2, kv_heads=1, ffn_dim=24, context=LENGTH, init_std=0.3, dropout=dropout, tied=False
    )
    model = Llama(config, tokenizer.vocab_size)
    model.head = nn.Linear(16, tokenizer.vocab_size)
    model.init_weights(seed=seed)
    with torch.no_grad():
        model.head.bias.zero_()
        model.head.bias[tokenizer.eot_id] = 4.0
    return model


def module_of(tokenizer, *, updates=1, samples=SAMPLES, seed=0, sampling_seed=0, sampler=None, config=None, lr=0.0,
              micro_size=2, dropout=0.0, objective=None, guard="stop"):  # fmt: skip
    model = policy(tokenizer, dropout=dropout)
    objective = objective or GRPO(config or GRPOConfig(kl_weight=0.0))
    settings = RolloutSettings(samples, updates, MAX_TOKENS, TEMPERATURE, sampling_seed, micro_size, LENGTH)
    return RolloutModule(
        model,
        objective,
        lambda m: torch.optim.SGD(m.parameters(), lr=lr),
        lambda step: 1.0,
        StepSettings(grad_clip=0.0, seed=seed, guard=GuardConfig(policy=guard)),
        {name: policy(tokenizer, seed=1) for name in objective.companions},
        backend=Recording(NativeConfig(max_batch=5), sampler(model) if sampler else model, tokenizer),
        source=Questions(),
        tokenizer=tokenizer,
        rollouts=settings,
    )


def prompts_of(tokenizer, numbers=(0, 1, 2, 3)):
    asked = PromptDataset(Questions(), tokenizer, size=1, updates=1, seed=0).prompts
    return [asked[i] for i in numbers]


def fit(module, items):
    run_through(module, items)
    list(module.rows())
    return module


def documents(batches):
    """Of each packed answer: ids, labels, advantage, old, whichever row and batch it is in."""
    found = []
    for batch in batches:
        segments = torch.ones_like(batch.tokens) if batch.segments is None else batch.segments
        for row in range(len(batch.tokens)):
            for s in range(1, int(segments[row].max()) + 1):
                here = segments[row] == s
                old = None if batch.old is None else batch.old[row, here]
                found.append(
                    (batch.tokens[row, here].tolist(), batch.labels[row, here], batch.advantage[row, s - 1].item(), old)
                )
    return found


def drawn_answers(module):
    """(prompt ids, drawn ids) of every request, in the order of the requests."""
    events = module.backend.events
    return [(list(r.prompt_ids), [e.token_id for e in events[r.id]]) for r in module.backend.asked]


def logps(model, prompt, answer, temperature=TEMPERATURE):
    """Log-probability of each drawn token, the answer alone in a row."""
    ids = torch.tensor([prompt + answer])
    with torch.no_grad():
        logits = model.head(model(ids, torch.arange(ids.shape[1])[None]))[0] / temperature
    return logits.log_softmax(-1)[len(prompt) - 1 : -1].gather(1, ids[0, len(prompt) :, None])[:, 0]


def hand_advantages(rewards):
    """(r - mean) / (std + 1e-4) of one group, and 0 where all are equal."""
    mean = sum(rewards) / len(rewards)
    std = math.sqrt(sum((r - mean) ** 2 for r in rewards) / (len(rewards) - 1))
    return [0.0 if len(set(rewards)) == 1 else (r - mean) / (std + 1e-4) for r in rewards]


def test_a_group_is_no_copies(tokenizer):
    """Every sample draws its own random numbers, also for two examples that ask the same."""
    module = module_of(tokenizer)
    module.roll_out(prompts_of(tokenizer))
    answers = [tuple(ids) for _, ids in drawn_answers(module)]
    groups = [answers[i : i + SAMPLES] for i in range(0, len(answers), SAMPLES)]
    assert len(answers) == 16 and all(len(set(g)) >= 3 for g in groups)
    assert groups[0] != groups[2]


def test_ids_are_those_that_were_drawn(tokenizer):
    """Tokens, and labels of the answer, equal the sampler's ids, which text could not bring back."""
    module = module_of(tokenizer)
    (batches,) = module.roll_out(prompts_of(tokenizer))
    answers = drawn_answers(module)
    found = documents(batches)
    assert sorted(ids for ids, *_ in found) == sorted(p + a for p, a in answers)
    for prompt, answer in answers:
        (labels, *_), *_ = [d[1:] for d in found if d[0] == prompt + answer]
        assert labels.tolist() == [IGNORE] * len(prompt) + answer
    assert any(tokenizer.encode(tokenizer.decode(a)) != [i for i in a if i != tokenizer.eot_id] for _, a in answers)


def test_judge_reads_the_text_without_its_end(tokenizer):
    """Once for each sample, in order; special tokens have no text."""
    module = module_of(tokenizer)
    module.roll_out(prompts_of(tokenizer))
    expected = [
        (f"q{i // SAMPLES}", tokenizer.decode([t for t in ids if t != tokenizer.eot_id]))
        for i, (_, ids) in enumerate(drawn_answers(module))
    ]
    assert module.source.judged == expected


@pytest.mark.parametrize("updates", [1, 2])
def test_advantages_land_on_their_own_samples(tokenizer, updates):
    """Rewards written anew from what the judge was shown, groups by position; example q2's are equal: exactly 0.

    q0 and q2 ask the same text. Were they one group, q2's advantages would not be 0, nor would q0's sum to 0.
    """
    module = module_of(tokenizer, updates=updates)
    steps = module.roll_out(prompts_of(tokenizer))
    rewards = [worth({"id": i}, text) for i, text in module.source.judged]
    advantages = [a for g in range(4) for a in hand_advantages(rewards[g * SAMPLES : (g + 1) * SAMPLES])]
    expected, numbers = {}, {}
    for i, (prompt, answer) in enumerate(drawn_answers(module)):
        expected.setdefault(tuple(prompt + answer), []).append(advantages[i])
        numbers.setdefault(tuple(prompt + answer), set()).add(i // SAMPLES)
    assert len(set(advantages)) > 6
    found = {}
    for u, batches in enumerate(steps):
        for ids, _, advantage, _ in documents(batches):
            found.setdefault(tuple(ids), []).append(advantage)
            assert u in {g % updates for g in numbers[tuple(ids)]}  # whole groups: prompts u, u + updates, ...
    assert found.keys() == expected.keys()
    for ids, values in expected.items():
        assert sorted(found[ids]) == pytest.approx(sorted(values), abs=1e-5)
    q2 = [d for d in drawn_answers(module)[2 * SAMPLES : 3 * SAMPLES]]
    assert all(0.0 in found[tuple(p + a)] for p, a in q2)
    idle = module._figures["rollout/idle_groups"]
    assert idle == 0.25 and module._figures["rollout/reward"] == pytest.approx(sum(rewards) / 16, abs=1e-6)


def test_one_example_asked_twice_makes_two_groups(tokenizer):
    """A rollout across the end of an epoch may hold an example twice: two groups, each with a mean of its own."""
    module = module_of(tokenizer)
    (batches,) = module.roll_out(prompts_of(tokenizer, [1, 1]))
    answers = [a for _, a in drawn_answers(module)]
    assert answers[:SAMPLES] != answers[SAMPLES:]
    rewards = [worth({"id": i}, text) for i, text in module.source.judged]
    expected = hand_advantages(rewards[:SAMPLES]) + hand_advantages(rewards[SAMPLES:])
    assert sorted(a for _, _, a, _ in documents(batches)) == pytest.approx(sorted(expected), abs=1e-5)
    assert sorted(hand_advantages(rewards)) != pytest.approx(sorted(expected), abs=1e-2)


def test_truncated_answers_are_in_the_loss_and_in_the_denominator(tokenizer):
    """At ratio 1 the loss is -sum of A times length / sum of lengths, the answers that were cut among them."""
    module = module_of(tokenizer)
    items = [prompts_of(tokenizer)]
    fit(module, items)
    ends = [events[-1].finish_reason for events in module.backend.events.values()]
    assert {"length", "stop"} == set(ends)
    rewards = [worth({"id": i}, text) for i, text in module.source.judged]
    advantages = [a for g in range(4) for a in hand_advantages(rewards[g * SAMPLES : (g + 1) * SAMPLES])]
    lengths = [len(a) for _, a in drawn_answers(module)]
    expected = -sum(a * n for a, n in zip(advantages, lengths, strict=True)) / sum(lengths)
    assert abs(expected) > 1e-3
    assert module.last["train/loss"] == pytest.approx(expected, abs=1e-5)
    assert module.last["rollout/truncated"] == ends.count("length") / 16
    assert module.last["rollout/length"] == pytest.approx(sum(lengths) / 16)
    (batches,) = module.roll_out(items[0])
    assert sum(module.objective.count(b).item() for b in batches) == sum(len(a) for _, a in drawn_answers(module))
    for kind in ("length", "stop"):  # leaving out either would show
        assert abs(sum(a * n for a, n, e in zip(advantages, lengths, ends, strict=True) if e == kind)) > 1e-3


def test_old_logprobs_are_those_of_the_rollout_even_for_the_second_update(tokenizer):
    """updates=2 at a high rate: the second update's ratios are measured from the weights that drew, not from the
    first update's. Dropout in the config: old values are of eval mode. fp32, 1e-5."""
    seen = []

    class Watched(GRPO):
        def __call__(self, forward, batch):
            seen.append((module.step, copy.deepcopy(batch)))
            return super().__call__(forward, batch)

    module = module_of(tokenizer, updates=2, lr=1.0, dropout=0.2, objective=Watched(GRPOConfig()))
    drew = copy.deepcopy(module.model).eval()
    prompts = prompts_of(tokenizer)
    fit(module, [prompts, prompts])
    assert module.step == 2 and {step for step, _ in seen} == {0, 1}
    now, reference, moved = module.model.eval(), module.companions["reference"], 0.0
    for step in (0, 1):
        found = documents([b for s, b in seen if s == step])
        assert len(found) == 8
        for ids, labels, _, old in found:
            n = int((labels != IGNORE).sum())
            prompt, answer = ids[:-n], ids[-n:]
            expected = logps(drew, prompt, answer)
            torch.testing.assert_close(old[-n:], expected, rtol=0, atol=1e-5)
            assert not old[:-n].any()
            moved = max(moved, (logps(now, prompt, answer) - expected).abs().max().item())
    assert moved > 0.01  # otherwise the second update's would look right whatever they are
    for _, batch in seen:
        for row in range(len(batch.tokens)):
            for s in range(1, int(batch.segments[row].max()) + 1):
                here = batch.segments[row] == s
                n = int((batch.labels[row, here] != IGNORE).sum())
                ids = batch.tokens[row, here].tolist()
                expected = logps(reference, ids[:-n], ids[-n:])
                torch.testing.assert_close(batch.reference[row, here][-n:], expected, rtol=0, atol=1e-5)
    assert module.last["train/ratio"] != pytest.approx(1.0, abs=1e-4)


def test_between_items_only_where_a_rollout_is_used_up(tokenizer):
    """A checkpoint in the midst of a rollout would lose the other half of its samples."""
    module, seen = module_of(tokenizer, updates=2), []

    class Note(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            seen.append((pl_module.step, pl_module.between_items, len(pl_module.source.judged)))

    assert module.between_items
    run_through(module, [prompts_of(tokenizer)] * 4, [Note()])
    list(module.rows())
    assert seen == [(1, False, 16), (2, True, 16), (3, False, 32), (4, True, 32)]


def test_rollouts_follow_from_their_seeds(tokenizer):
    """The same seeds give the same rollouts, at any time; another run's seed, sampling seed or step gives others."""

    def rolled(step=0, **seeds):
        module = module_of(tokenizer, **seeds)
        module.step = step
        torch.manual_seed(step + 17)  # not of the sampler's concern
        (batches,) = module.roll_out(prompts_of(tokenizer))
        return [d[0] for d in documents(batches)], [a for _, a in drawn_answers(module)]

    first = rolled()
    assert rolled() == first
    others = [rolled(seed=1), rolled(sampling_seed=1), rolled(step=1)]
    for one, other in itertools.combinations([first, *others], 2):
        assert sum(a == b for a, b in zip(one[1], other[1], strict=True)) < 8


def test_every_rollout_draws_anew(tokenizer):
    """Two rollouts of one run, the same prompts: other samples. The backend is told of each change of the weights."""
    module = module_of(tokenizer)
    fit(module, [prompts_of(tokenizer)])
    first, version = drawn_answers(module), module.backend.stats().weight_version
    module.roll_out(prompts_of(tokenizer))
    assert drawn_answers(module) != first
    assert (version, module.backend.stats().weight_version) == (0, 1)


@pytest.mark.parametrize("bad", [5, 6])
def test_a_rollback_goes_on_behind_the_whole_rollout(tokenizer, tmp_path, bad):
    """Two updates a rollout, checkpoints at 4 and 8. Step 5 or 6, the first or second on the third rollout, is bad.

    Back at 4, the fourth rollout follows, drawn anew by the weights of step 4, and the curve is that of a run that was
    never asked the third's prompts. The story: the data went on by `bad` steps, in the midst of the third rollout, or
    what was left of the fourth, drawn by weights that were given up, was trained on.
    """

    done = []

    class Planted(GRPO):
        def __call__(self, forward, batch):
            output = super().__call__(forward, batch)
            if module.step + 1 == bad and not done:
                done.append(batch)
                output.loss_sum = output.loss_sum * math.nan
            return output

    def fresh(objective):
        how = {"updates": 2, "dropout": 0.2, "micro_size": 9, "guard": "rollback"}
        module = module_of(tokenizer, objective=objective, **how)
        module.optimizer = torch.optim.AdamW(module.model.parameters(), lr=0.02)
        return module

    steps = PromptDataset(Questions(), tokenizer, size=2, updates=2, seed=0)
    module = fresh(Planted(GRPOConfig(kl_weight=0.0)))
    guard = GuardConfig(policy="rollback")
    job = tiny_job(tmp_path / "run", tokenizer, module, steps, max_steps=8, every_steps=4, guard=guard)
    assert trainer.fit(job).steps == 8 and len(done) == 1
    other = fresh(GRPO(GRPOConfig(kl_weight=0.0)))
    assert curve(tmp_path / "run") == curve_of(other, [steps[i] for i in (0, 1, 2, 3, 6, 7, 8, 9)])


# ---- the sampler and the trainer


def moved(model, by):
    """A copy that is some way behind the weights being trained."""
    stale = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in stale.parameters():
            p += by * torch.randn(p.shape, generator=generator)
    return stale


def test_mismatch_is_the_mean_distance_of_logprobs(tokenizer):
    """|trainer - sampler| a token at temperature 1, computed here from the sampler's own weights and the trainer's."""
    module = module_of(tokenizer, sampler=lambda m: moved(m, 0.01))
    module.roll_out(prompts_of(tokenizer))
    answers = drawn_answers(module)
    apart = [
        (logps(module.model.eval(), p, a, 1.0) - logps(module.backend.model.eval(), p, a, 1.0)).abs()
        for p, a in answers
    ]
    assert module._figures["rollout/mismatch"] == pytest.approx(torch.cat(apart).mean().item(), abs=1e-5)
    assert 1e-3 < module._figures["rollout/mismatch"] < MISMATCH


def test_a_sampler_on_shared_weights_agrees_to_rounding(tokenizer):
    module = module_of(tokenizer, dropout=0.3)
    module.model.train()
    module.roll_out(prompts_of(tokenizer))
    assert module._figures["rollout/mismatch"] < 1e-5
    assert module.model.training


def test_a_sampler_on_stale_weights_stops_the_run(tokenizer):
    """The backend holds a copy; a step is taken, and the copy is not told: the next rollout is refused.

    The class of bug: weights not synced, and a loss that falls nevertheless.
    """
    module = module_of(tokenizer, sampler=copy.deepcopy)
    fit(module, [prompts_of(tokenizer)])
    assert module.last["rollout/mismatch"] < 1e-5
    with torch.no_grad():
        module.model.head.weight += torch.randn(module.model.head.weight.shape)
    with pytest.raises(TrainingError, match="step 1: .* does not sample from the weights being trained"):
        module.roll_out(prompts_of(tokenizer))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_reward_that_is_no_number_is_refused(tokenizer, value):
    module = module_of(tokenizer)
    module.source.score = lambda example, completion: Score(value, False)
    with pytest.raises(TrainingError, match="the score of example q0 is"):
        module.roll_out(prompts_of(tokenizer))
