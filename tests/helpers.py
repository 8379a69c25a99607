"""What tests of numbers share: a small model, Lightning's real loop without its noise, numbers worked out densely."""

import io
import json
from functools import cache
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from rich.console import Console
from torch.utils.data import DataLoader

from trivium.data.config import SourceConfig
from trivium.data.fetch import fetch
from trivium.data.source import Source
from trivium.errors import DataError
from trivium.models.config import LlamaConfig
from trivium.models.gguf import read_gguf
from trivium.models.llama import Llama
from trivium.schema import CheckpointConfig, GuardConfig, RunConfig, TrainerConfig, ValidationConfig
from trivium.training.callbacks import Record, Show
from trivium.training.trainer import Job

TINY = {"dim": 16, "layers": 1, "heads": 2, "kv_heads": 1, "ffn_dim": 24, "context": 16, "init_std": 0.3}


def tiny_llama(vocab_size, seed=1, dtype=torch.float32, **changes):
    """A Llama of one layer and width 16, but for `changes`."""
    model = Llama(LlamaConfig(**(TINY | changes)), vocab_size)
    model.init_weights(seed=seed)
    return model.to(dtype)


def run_through(module, items, callbacks=()):
    """Run loader items through Lightning; returns the module. Figures are left unread."""
    trainer = L.Trainer(
        accelerator="cpu", devices=1, max_epochs=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
        callbacks=list(callbacks),
    )  # fmt: skip
    trainer.fit(module, DataLoader(items, batch_size=None))
    return module


def tiny_job(folder, tokenizer, module, steps, *, max_steps, every_steps, guard=None, validation=(), **trainer):
    """What `fit` needs to run `module` on `steps`, with checkpoints in `folder`."""
    config = RunConfig(
        data=object(),
        trainer=TrainerConfig(max_steps=max_steps, accelerator="cpu", **trainer),
        checkpoint=CheckpointConfig(every_steps=every_steps),
        validation=ValidationConfig(every_steps=every_steps if validation else 0),
        guard=guard or GuardConfig(),
    )
    said = Console(record=True, file=io.StringIO(), width=200)
    return Job(config, folder, module, steps, list(validation), tokenizer, {}, {}, "text", list,
               lambda: folder.mkdir(exist_ok=True), said)  # fmt: skip


def _hex(rows):
    return [(row["step"], row["train/loss"].hex(), row["grad_norm"].hex()) for row in rows]


def curve(folder):
    """Step, loss and gradient norm of each row of a run's metrics.jsonl, to the last bit."""
    return _hex(map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()))


def curve_of(module, items):
    """The same of a run through these very items, without `fit` and its checkpoints."""
    rows = []
    logger = SimpleNamespace(log_metrics=lambda row, step: rows.append(row))
    run_through(module, items, [Record([logger], Show(Console(quiet=True), 99))])
    return _hex(rows)


def dense_logprobs(model, document, temperature=1.0):
    """Log-probability of each trained token of a document that is alone in a row: no packing, no chunks; fp64."""
    tokens = torch.tensor([document.ids])
    logits = model.head(model(tokens, torch.arange(len(document.ids))[None]))[0, :-1].double()
    logps = (logits / temperature).log_softmax(-1).gather(1, tokens[0, 1:, None])[:, 0]
    return logps[torch.tensor(document.trained[1:])]


class Listed(Source):
    """A source of the examples it is given."""

    def __init__(self, examples):
        super().__init__(SourceConfig())
        self.examples = examples

    def __len__(self):
        return len(self.examples)

    def __getitem__(self, index):
        return self.examples[index]


@cache
def smollm2_path():
    """The real SmolLM2-135M-Instruct (GGUF, 98 MB); tests that need it skip, and say why, where it cannot be had."""
    try:
        return fetch("smollm2_135m", print)
    except DataError as error:
        pytest.skip(f"NOT TESTED ON THE REAL MODEL: {error}")


def smollm2():
    """What `read_gguf` makes of it."""
    return read_gguf(smollm2_path())


COMMON = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32, "max_position_embeddings": 128}
LIKE_LLAMA = {**COMMON, "num_key_value_heads": 2, "intermediate_size": 48, "rms_norm_eps": 1e-5}
FAMILIES = {
    "llama": {**LIKE_LLAMA, "tie_word_embeddings": True},
    "mistral": {**LIKE_LLAMA, "sliding_window": 9, "head_dim": 8},
    "qwen2": LIKE_LLAMA,
    "qwen3": {**LIKE_LLAMA, "head_dim": 16},
    "gemma2": {**LIKE_LLAMA, "head_dim": 16, "sliding_window": 9},
    "gpt2": {"n_layer": 2, "n_head": 4, "n_embd": 32, "n_positions": 128},
    "mixtral": {**LIKE_LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.02},
    "qwen3_moe": {
        **LIKE_LLAMA,
        "head_dim": 16,
        "num_experts": 6,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 24,
        "norm_topk_prob": True,
    },
}


def folder_of(family, tokenizer, where, settings=None, **more):
    """A folder as transformers itself writes it, with random weights. more: of save_pretrained."""
    import transformers

    torch.manual_seed(0)
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
    sizes = {"vocab_size": tokenizer.num_tokens, **ids, **FAMILIES[family], **(settings or {})}
    config = transformers.AutoConfig.for_model(family, **sizes)
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(where, **more)
    tokenizer.save(where)
    return model
