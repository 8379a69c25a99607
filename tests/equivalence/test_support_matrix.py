"""What each family can do, tried cell by cell; docs/models.md has the outcome as a table.

A cell says yes, and it works here, or no, and the program refuses it in one sentence. To accept a change:
UPDATE_MATRIX=1 python -m pytest tests/equivalence/test_support_matrix.py, and look at the diff.
"""

import json
import os
import re
from functools import cache
from pathlib import Path

import pytest
import torch
from equivalence.test_hf import settings

from trivium.build import load_artifact, model_record
from trivium.compose import component
from trivium.errors import TriviumError
from trivium.models import adapters
from trivium.models.config import LoraConfig
from trivium.models.quantised import quantiser
from trivium.plugin import discover
from trivium.registry import MODELS

transformers = pytest.importorskip("transformers")
discover()
PAGE = Path(__file__).parents[2] / "docs/models.md"
COLUMNS = ("train", "cache", "LoRA", "QLoRA", "compile", "FSDP2", "HF in", "HF out", "GGUF in", "GGUF out")
FAMILIES = list(MODELS)
SMALL = {"dim": 32, "layers": 2, "heads": 4, "kv_heads": 2, "ffn_dim": 48, "context": 128, "head_dim": 8, "window": 16}
LENGTH = 24


def made(family, vocab_size, **more):
    kind = MODELS.config(family)
    sizes = {k: v for k, v in (SMALL | more).items() if k in kind.__dataclass_fields__}
    chosen = component("model", {"name": family, **sizes, **({"settings": settings("phi3")} if family == "hf" else {})})
    model = MODELS.load(family)(chosen.config, vocab_size)
    model.init_weights(0)
    return model, model_record(chosen, vocab_size)


def tokens_of(model):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(model.vocab_size, (2, LENGTH), generator=generator), torch.arange(LENGTH).expand(2, -1)


def said(model):
    return model.head(model(*tokens_of(model)))


def learns(model, least=0.1):
    """Six steps on the same two rows: the loss falls by that share at least."""
    tokens, places = tokens_of(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    found = []
    for _ in range(6):
        logits = model.head(model(tokens, places))[:, :-1].flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits, tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    assert found[-1] < (1 - least) * found[0], found


def train(family, tools):
    learns(made(family, 97)[0])


@torch.no_grad()
def cached(family, tools):
    """Token by token through the cache, as in one pass."""
    model = made(family, 97)[0].eval()
    tokens, places = tokens_of(model)
    kept = model.new_cache(2, LENGTH)
    steps = [model(tokens[:, [i]], places[:, [i]], cache=kept) for i in range(LENGTH)]
    torch.testing.assert_close(model.head(torch.cat(steps, 1)), said(model), rtol=0, atol=1e-5)


def lora(family, tools, bits=None):
    """It learns, and says the same when it is merged."""
    model = made(family, 97)[0]
    if bits:
        adapters.quantise(model, quantiser(bits, True))
    adapters.attach(LoraConfig(rank=8), model)
    learns(model, least=0.03)  # beside random weights that stay as they are
    model.eval()
    with torch.no_grad():
        wanted = said(model)
        adapters.dequantise(model)
        adapters.merge(model)
        torch.testing.assert_close(said(model), wanted, rtol=0, atol=1e-4)


def qlora(family, tools):
    lora(family, tools, "nf4")


def compiled(family, tools):
    """Traced whole but for what a family leaves out; the kernels themselves are compiled in tests/training."""
    model = made(family, 97)[0]
    wanted = said(model)
    tools["monkeypatch"].setattr(torch, "compile", lambda block: torch._dynamo.optimize("aot_eager")(block))
    model.compile_blocks()
    torch.testing.assert_close(said(model), wanted, rtol=0, atol=1e-5)
    learns(model)


def sharded(family, tools):
    """Proven elsewhere, by two processes that must equal one: a run of that family must be among those."""
    text = (Path(__file__).parents[1] / "training/ranks.py").read_text()
    named = re.search(r"\nFAMILIES = \((.*?)\)", text)[1]
    if family not in ("llama", "mixtral") and f'"{family}"' not in named:
        raise TriviumError("not tried")


def folder(family, tools):
    """A Hugging Face folder of the family with random weights, as the program itself writes it."""
    from trivium.phases.export import write_folder

    gguf = {"window": 128, "query_scale": 8} if tools["gguf"] else {}  # llama.cpp knows no others
    model, _ = made(family, tools["tokenizer"].vocab_size, **gguf)
    path = tools["path"] / "model"
    path.mkdir(exist_ok=True)
    write_folder(model.eval(), family, tools["tokenizer"], path)
    return path


def hf_in(family, tools):
    """transformers writes, we read: the same logits."""
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder(family, tools)).eval()
    theirs.save_pretrained(tools["path"] / "theirs")
    tools["tokenizer"].save(tools["path"] / "theirs")
    ours = load_artifact(str(tools["path"] / "theirs"), family=family).model(None)[0].eval()
    with torch.no_grad():
        torch.testing.assert_close(said(ours), theirs(tokens_of(ours)[0]).logits, rtol=0, atol=1e-4)


def exported(family, tools, form):
    choice = ["model=hf"] if family == "hf" else []
    path = folder(family, tools)
    done = tools["main"](
        "phase=export", f"format={form}", f"init_from={path}", *choice, f"runs={tools['path']}", f"name={form}"
    )
    if done.code:
        raise TriviumError(done.err)
    assert json.loads((tools["path"] / form / form / "VERIFIED.json").read_text())
    return tools["path"] / form / form


def hf_out(family, tools):
    exported(family, tools, "hf")


def gguf_out(family, tools):
    exported(family, tools, "gguf")


def gguf_in(family, tools):
    """What another program's rules make of the file is in test_gguf.py; here it must come back as it left."""
    before = load_artifact(str(folder(family, tools)), family=family).model(None)[0].eval()
    after = load_artifact(str(exported(family, tools, "gguf") / "model.gguf")).model(None)[0].eval()
    with torch.no_grad():
        torch.testing.assert_close(said(after), said(before), rtol=0, atol=1e-5)


TRIED = dict(
    zip(COLUMNS, (train, cached, lora, qlora, compiled, sharded, hf_in, hf_out, gguf_in, gguf_out), strict=True)
)


def table_in_docs():
    """Family -> column -> what the page says."""
    rows = re.findall(r"^\| `(\w+)` \|((?: (?:yes|no) \|){10})$", PAGE.read_text(), flags=re.M)
    return {family: dict(zip(COLUMNS, re.findall("yes|no", cells), strict=True)) for family, cells in rows}


@cache
def known():
    return table_in_docs()


@pytest.fixture
def tools(column, trained, main, monkeypatch, tmp_path):
    tokenizer = load_artifact(str(trained)).tokenizer
    return {
        "tokenizer": tokenizer,
        "main": main,
        "monkeypatch": monkeypatch,
        "path": tmp_path,
        "gguf": "GGUF" in column,
    }


@pytest.mark.parametrize("column", COLUMNS)
@pytest.mark.parametrize("family", FAMILIES)
def test_cell_is_what_the_page_says(family, column, tools):
    if column.startswith("GGUF"):
        pytest.importorskip("xllamacpp", reason="NO LLAMA.CPP: GGUF IS NOT TESTED HERE")
    try:
        TRIED[column](family, tools)
        found = "yes"
    except TriviumError as refused:
        found = "no"
        assert str(refused)
    if os.environ.get("UPDATE_MATRIX"):
        rewrite(family, column, found)
    else:
        assert known()[family][column] == found


def rewrite(family, column, found):
    table = table_in_docs()
    table.setdefault(family, dict.fromkeys(COLUMNS, "no"))[column] = found
    lines = [f"| `{name}` | {' | '.join(table[name][c] for c in COLUMNS)} |" for name in sorted(table)]
    head = f"| | {' | '.join(COLUMNS)} |\n| --- |{' --- |' * len(COLUMNS)}\n"
    text = PAGE.read_text()
    here = re.search(r"<!-- matrix -->\n.*?<!-- end -->", text, flags=re.S)
    PAGE.write_text(text.replace(here[0], "<!-- matrix -->\n" + head + "\n".join(lines) + "\n<!-- end -->"))


def test_the_page_has_every_family():
    assert sorted(known()) == FAMILIES
