"""Our own parts, through the kit that plugin authors get."""

import json

import pytest
import torch

from trivium.data.config import FilesConfig
from trivium.data.files import Files
from trivium.inference.config import NativeConfig
from trivium.inference.native.engine import NativeBackend
from trivium.models.config import LlamaConfig
from trivium.models.llama import Llama
from trivium.objectives.config import NextTokenConfig, SFTConfig
from trivium.objectives.next_token import SFT, NextToken
from trivium.testing import BackendContract, ModelContract, ObjectiveContract, SourceContract
from trivium.types import IGNORE, TokenBatch
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


class TestNative(BackendContract):
    def make(self):
        return NativeBackend(NativeConfig(max_batch=2), tiny_llama(), pad_id=0), 40
