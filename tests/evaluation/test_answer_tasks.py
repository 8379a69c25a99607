"""Asking the model: it sees the question and never the answer."""

import pytest
import torch

from trivium.data.chat import Chat
from trivium.data.config import BPEConfig, SourceConfig
from trivium.data.source import Source
from trivium.data.tokenizer import train_bpe
from trivium.evaluation.generation import complete
from trivium.evaluation.probes import answer_tasks
from trivium.inference.config import NativeConfig
from trivium.inference.native.engine import NativeBackend
from trivium.models.config import LlamaConfig
from trivium.models.llama import Llama
from trivium.types import Request, SamplingParams, Score

SECRET = "98765"


def example(number, question, answer=SECRET, system=None):
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    if system:
        turns = [{"role": "system", "content": system}, *turns]
    return {"id": str(number), "messages": turns, "answer": answer, "task": "t"}


class Tasks(Source):
    """Right if the completion is as long as the example's own answer; notes what it judged."""

    def __init__(self, examples):
        super().__init__(SourceConfig())
        self.examples, self.judged = examples, []

    def __len__(self):
        return len(self.examples)

    def __getitem__(self, index):
        return self.examples[index]

    def score(self, example, completion):
        self.judged.append((example["id"], completion))
        return Score(float(len(completion)), len(completion) == len(example["answer"]))


class Recording(NativeBackend):
    """The real engine; it notes what it is asked."""

    def generate(self, requests):
        self.asked = list(requests)
        return super().generate(requests)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(BPEConfig(vocab_size=300), ["what is this and that"] * 3)


@pytest.fixture
def backend(tokenizer):
    config = LlamaConfig(dim=32, layers=1, heads=2, kv_heads=1, ffn_dim=48, context=64, tied=False, init_std=0.3)
    model = Llama(config, tokenizer.vocab_size)
    model.init_weights(seed=0)
    return Recording(NativeConfig(max_batch=2), model, tokenizer)


QUESTIONS = ["1+2", "what is this", "4"]


def test_answer_tasks_never_shows_the_answer(backend, tokenizer):
    """The secret is in no prompt, and another answer changes no prompt and no completion."""
    source = Tasks([example(i, q, system="be brief" if i == 1 else None) for i, q in enumerate(QUESTIONS)])
    found = answer_tasks(backend, tokenizer, source, source.examples, max_tokens=5)
    prompts = [r.prompt_ids for r in backend.asked]
    for prompt, question in zip(prompts, QUESTIONS, strict=True):
        text = tokenizer.decode(prompt, special=True)
        assert SECRET not in text and question in text
        assert text.endswith(f"<|user|>{question}<|end|><|assistant|>")
    other = Tasks([example(i, q, "4", "be brief" if i == 1 else None) for i, q in enumerate(QUESTIONS)])
    again = answer_tasks(backend, tokenizer, other, other.examples, max_tokens=5)
    assert [r.prompt_ids for r in backend.asked] == prompts
    assert [a.completion for a in again] == [a.completion for a in found]


def test_answer_tasks_judges_each_completion_with_its_own_example(backend, tokenizer):
    """Completions in the order of the examples, equal to the engine's greedy text of each question alone."""
    source = Tasks([example(i, q) for i, q in enumerate(QUESTIONS)])
    found = answer_tasks(backend, tokenizer, source, source.examples, max_tokens=5)
    assert [(a.example["id"], a.completion) for a in found] == source.judged
    assert [a.score.value for a in found] == [float(len(a.completion)) for a in found]
    stops = (tokenizer.eot_id, tokenizer.eos_id)
    alone = [
        complete(
            backend,
            tokenizer,
            [Chat(tokenizer).prompt_ids([{"role": "user", "content": q}])],
            SamplingParams(max_tokens=5, stop_ids=stops),
        )[0]
        for q in QUESTIONS
    ]
    assert [a.completion for a in found] == alone
    assert len(set(alone)) == 3
    params = backend.asked[0].params
    assert (params.temperature, params.max_tokens, params.stop_ids) == (0.0, 5, stops)


def test_complete_leaves_out_the_stop_token(backend, tokenizer):
    """The first token that is new after the first is the stop: the text is what came before it."""
    prompt = tokenizer.encode("what is")
    ids = [e.token_id for e in backend.generate([Request("x", tuple(prompt), SamplingParams(max_tokens=6))])]
    stop = next(i for i in range(1, 6) if ids[i] not in ids[:i])
    text = complete(backend, tokenizer, [prompt], SamplingParams(max_tokens=6, stop_ids=(ids[stop],)))
    assert text == [tokenizer.decode(ids[:stop])]
    assert complete(backend, tokenizer, [prompt], SamplingParams(max_tokens=6)) == [tokenizer.decode(ids)]
