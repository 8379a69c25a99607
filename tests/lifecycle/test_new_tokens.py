"""Tokens and templates that a trained model learns later: its vocabulary grows, and what it knew stays."""

import json

import pytest
import torch
from safetensors.torch import load_file

from trivium.build import load_artifact
from trivium.data.chat import Chat

MORE = "tokenizer.add_tokens=['<|think|>','<|tool|>']"


@pytest.fixture
def tuning_on(tuned, tuning):
    def overrides(runs, name, *changes):
        own = ("data.tasks=[count]", f"init_from={tuned}", "trainer.max_steps=2", "batch.length=128")
        return [o for o in tuning(runs, name, *own, *changes) if not o.startswith("model")]

    return overrides


def test_a_model_grows_with_its_tokenizer(main, tuned, tuning_on, tmp_path):
    """Two rows more, the mean of all others at the start; saved, resumed, loaded, exported, and not added twice."""
    before = load_artifact(str(tuned))
    done = main(*tuning_on(tmp_path, "run", MORE, "optim.lr=1e-30", "optim.weight_decay=0"))
    assert done.code == 0 and "2 new tokens, whose embeddings start as the mean" in done.out, done.err
    after = load_artifact(str(tmp_path / "run"))
    assert after.tokenizer.vocab_size == before.tokenizer.vocab_size + 2
    old, new = before.tensors()["embed.weight"], after.tensors()["embed.weight"]
    assert new[:-2].equal(old)
    torch.testing.assert_close(new[-2:], old.mean(0, keepdim=True).expand(2, -1))
    again = main(*tuning_on(tmp_path, "run", MORE, "optim.lr=1e-30", "optim.weight_decay=0", "trainer.max_steps=3"))
    assert again.code == 0 and "continues from" in again.out, again.err
    more = main(*tuning_on(tmp_path, "more", MORE, f"init_from={tmp_path / 'run'}"))
    assert more.code == 0 and "new tokens" not in more.out, more.err
    model, record = load_artifact(str(tmp_path / "more")).model(None)
    assert model.vocab_size == record["vocab_size"] == len(new)
    pytest.importorskip("transformers")
    out = main("phase=export", f"init_from={tmp_path / 'more'}", f"runs={tmp_path}", "name=out")
    assert out.code == 0, out.err
    assert load_file(tmp_path / "out/hf/model.safetensors")["model.embed_tokens.weight"].shape == new.shape


def test_a_base_model_learns_to_talk_by_another_template(main, tuned, tuning_on, tmp_path):
    """ChatML: its two tokens are added, a turn ends with the second, and a conversation is written with them."""
    done = main(*tuning_on(tmp_path, "run", "tokenizer.chat_template=chatml"))
    assert done.code == 0, done.err
    tokenizer = load_artifact(str(tmp_path / "run")).tokenizer
    start, end = tokenizer.vocab_size - 2, tokenizer.vocab_size - 1
    assert tokenizer.eot_id == end and end in tokenizer.stop_ids
    ids = Chat(tokenizer).prompt_ids([{"role": "user", "content": "hi"}])
    assert (ids.count(start), ids.count(end)) == (2, 1)
    assert tokenizer.decode(ids, special=True) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    said = main("phase=chat", f"init_from={tmp_path / 'run'}", "prompts=[How many]", f"runs={tmp_path}", "name=said")
    assert said.code == 0, said.err


def test_new_tokens_reach_every_way_to_a_tokenizer(main, distilling, pretraining, tmp_path):
    """Trained alone, then taken by a model that starts anew; a teacher that does not know them is refused."""
    corpus = [o for o in pretraining(tmp_path, "tok") if o.startswith(("domain", "data", "runs", "name", "tokenizer"))]
    done = main("phase=tokenizer", *corpus, MORE)
    assert done.code == 0, done.err
    alone = load_artifact(str(tmp_path / "tok")).tokenizer
    assert alone.vocab_size == 322 and alone.decode([320, 321], special=True) == "<|think|><|tool|>"
    one = "tokenizer.add_tokens=['<|more|>']"
    done = main(*pretraining(tmp_path, "run", f"init_from={tmp_path / 'tok'}", one, "trainer.max_steps=1"))
    assert done.code == 0, done.err
    assert load_artifact(str(tmp_path / "run")).model(None)[0].vocab_size == 323
    refused = main(*distilling(tmp_path, "student", MORE))
    assert refused.code == 2 and "has another tokenizer than this run" in refused.err


def test_a_template_of_ones_own(main, tuning_on, tmp_path):
    path = tmp_path / "mine.jinja"
    path.write_text(
        "{% for m in messages %}[{{ m.role }}] {{ m.content }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    done = main(*tuning_on(tmp_path, "run", f"tokenizer.chat_template={path}"))
    assert done.code == 0, done.err
    tokenizer = load_artifact(str(tmp_path / "run")).tokenizer
    ids = Chat(tokenizer).prompt_ids([{"role": "user", "content": "hi"}])
    assert tokenizer.decode(ids, special=True) == "[user] hi<|end|>[assistant] "
    kept = json.loads((tmp_path / "run/checkpoints/step-2/tokenizer/tokenizer_config.json").read_text())
    assert kept["chat_template"] == path.read_text()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            ("tokenizer.chat_template=nowhere.jinja",),
            "tokenizer.chat_template=nowhere.jinja is neither chatml nor a file",
        ),
        (("tokenizer.add_tokens=['a']",), "each must be new, and ['a'] is not"),
        (
            (MORE, "adapter=lora"),
            "2 new tokens need rows of their own in the embedding, which an adapter leaves as it is",
        ),
    ],
)
def test_what_cannot_be_is_refused(changes, told, main, tuning_on, tmp_path):
    done = main(*tuning_on(tmp_path, "run", *changes))
    assert done.code in (1, 2) and told in " ".join(done.err.split()), done.err
