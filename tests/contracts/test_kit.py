"""Our own parts, through the kit that plugin authors get."""

import json
import re
from pathlib import Path

import pytest
import torch

from trivium.data.config import FilesConfig
from trivium.data.files import Files
from trivium.inference.config import NativeConfig
from trivium.inference.native.engine import NativeBackend
from trivium.models.config import LlamaConfig, MixtralConfig
from trivium.models.llama import Llama
from trivium.models.mixtral import Mixtral
from trivium.objectives.config import (
    DistillConfig,
    GRPOConfig,
    NextTokenConfig,
    PreferenceConfig,
    RewardConfig,
    SFTConfig,
    UnpairedConfig,
)
from trivium.objectives.distill import Distill
from trivium.objectives.next_token import SFT, NextToken
from trivium.objectives.policy_gradient import GRPO
from trivium.objectives.preference import Preference
from trivium.objectives.reward import Reward
from trivium.objectives.unpaired import KTO
from trivium.testing import BackendContract, ModelContract, ObjectiveContract, SourceContract
from trivium.types import IGNORE, DistillBatch, PreferenceBatch, RolloutBatch, TokenBatch, UnpairedBatch
from trivium_plugins.primer.config import PrimerConfig
from trivium_plugins.primer.source import Primer


def tiny_llama(**changes):
    config = LlamaConfig(**{"dim": 32, "layers": 2, "heads": 4, "kv_heads": 2, "ffn_dim": 48, "context": 64, **changes})
    model = Llama(config, 40)
    model.init_weights(0)
    return model


class TestPrimerBooks(SourceContract):
    def make(self):
        return Primer(PrimerConfig(parts=["books"], split="validation"))


class TestPrimerTasks(SourceContract):
    def make(self):
        return Primer(PrimerConfig(parts=["tasks", "chats"], num_tasks=60, num_chats=20))


class TestFiles(SourceContract):
    @pytest.fixture(autouse=True)
    def _file(self, tmp_path, monkeypatch):
        monkeypatch.setenv("TRIVIUM_CACHE", str(tmp_path / "cache"))
        self.path = tmp_path / "pairs.jsonl"
        rows = [{"prompt": f"question {i}", "completion": f" answer {i}"} for i in range(20)]
        self.path.write_text("".join(json.dumps(r) + "\n" for r in rows))

    def make(self):
        return Files(FilesConfig(path=str(self.path)))


class TestLlama(ModelContract):
    def make(self):
        return tiny_llama()


class TestLlamaUntied(ModelContract):
    def make(self):
        return tiny_llama(tied=False, kv_heads=4)


class TestMixtral(ModelContract):
    def make(self):
        sizes = {"dim": 32, "layers": 2, "heads": 4, "kv_heads": 2, "ffn_dim": 24, "context": 64}
        model = Mixtral(MixtralConfig(**sizes, experts=4, active=2), 40)
        model.init_weights(0)
        return model


class TestNextToken(ObjectiveContract):
    def make(self):
        tokens = torch.arange(24).view(3, 8)
        labels = tokens.clone()
        labels[:, 0] = IGNORE
        labels[1, 4:] = IGNORE
        batch = TokenBatch(tokens, labels, torch.arange(8).expand(3, -1))
        return NextToken(NextTokenConfig(z_loss=1e-3, label_smoothing=0.1)), tiny_llama(), batch


class TestSFT(TestNextToken):
    def make(self):
        _, model, batch = super().make()
        return SFT(SFTConfig(dft=True)), model, batch


def packed(batch=TokenBatch, **facts):
    """Three rows of two documents, four and three tokens and a pad; of the first two are trained, of the second one."""
    tokens = torch.arange(24).view(3, 8)
    labels = tokens.clone()
    labels[:, [0, 1, 4, 5, 7]] = IGNORE
    positions = torch.tensor([0, 1, 2, 3, 0, 1, 2, 0]).expand(3, -1)
    segments = torch.tensor([1, 1, 1, 1, 2, 2, 2, 0]).expand(3, -1)
    return batch(tokens, labels, positions, segments, **facts)


def another_llama():
    model = tiny_llama()
    model.init_weights(1)
    return model


class TestPreference(ObjectiveContract):
    def companions(self):
        return {"reference": another_llama()}

    def make(self):
        return Preference(PreferenceConfig(sft_weight=0.1)), tiny_llama(), packed(PreferenceBatch)


class TestKTO(TestPreference):
    def make(self):
        verdicts = torch.tensor([[1.0, 1.0], [0.0, 0.0], [1.0, 1.0]])
        return KTO(UnpairedConfig(desirable_weight=2.0)), tiny_llama(), packed(UnpairedBatch, desirable=verdicts)


class TestReward(ObjectiveContract):
    def make(self):
        model = tiny_llama()
        model.add_score_head()
        torch.nn.init.normal_(model.score.weight, std=0.1)
        return Reward(RewardConfig(centering=0.01)), model, packed(PreferenceBatch)


class TestGRPO(TestPreference):
    def make(self):
        advantage = torch.tensor([[1.0, -1.0], [0.5, -0.5], [0.0, 2.0]])
        return GRPO(GRPOConfig()), tiny_llama(), packed(RolloutBatch, advantage=advantage)


class TestDistill(ObjectiveContract):
    def companions(self):
        return {"teacher": another_llama()}

    def make(self):
        return Distill(DistillConfig(beta=0.3, ce_weight=0.2)), tiny_llama(), packed(DistillBatch)


class TestNative(BackendContract):
    def make(self):
        return NativeBackend(NativeConfig(max_batch=2), tiny_llama()), 40


def test_backend_of_the_plugin_page_keeps_what_the_page_says():
    """The code in docs/plugins.md, run: it refuses what it does not declare, ends for a reason, and is idle then."""
    page = (Path(__file__).parents[2] / "docs/plugins.md").read_text()
    found: dict = {}
    exec(re.search(r"```python\n(# my_engine/backend.py\n.*?)```", page, flags=re.S)[1], found)  # noqa: S102

    class Kept(BackendContract):
        def make(self):
            return found["Repeats"](None, tiny_llama(), None), 40

    kept = Kept()
    kept.test_refuses_what_cannot_fit_before_the_first_token()
    kept.test_stops_with_a_reason()
    kept.test_what_it_does_not_declare_is_refused_by_name()
    kept.test_abort_frees_what_was_held()
    kept.test_embeddings_where_they_are_declared()
    kept.test_weights_do_not_change_under_a_request()
