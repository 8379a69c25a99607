"""Leave as a GGUF file: read again here, and by llama.cpp, before it is called good."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch

from trivium.build import load_artifact
from trivium.data.tokenizer import Tokenizer
from trivium.errors import CheckpointError
from trivium.evaluation.perplexity import document_nats
from trivium.models.gguf_write import write_gguf
from trivium.models.protocol import CausalLM
from trivium.models.weights import hf_tensors, weights_of
from trivium.phases.llamacpp import Asked, Told, ask
from trivium.phases.probe import ANSWER, PROBE, chat_prompt, greedy, logits_of

TEXTS = (PROBE, "'real' words don't\t(tab) I'LL\r\n\n  café 漢字かな 😀 [x]==y;\n\n\n1234567, 3.14 \u00a0 done  ")
"""What is tokenised on both sides: quotes, tabs, line ends, runs of spaces and digits, scripts."""
TOLERANCE = {"F32": 1e-4, "F16": 5e-3, "Q8_0": 5e-2}
"""Of log-probabilities, of the largest where that is above 1. Our side computes in fp32 with what the file holds;
llama.cpp rounds what it multiplies with a matrix to the matrix's own type, and takes GELU from a table in fp16.
Measured on SmolLM2: 4e-6, 6e-4 and 1.5e-2. What rounding the weights does is held to the same."""
DOCUMENTS, TOKENS = 4, 512
"""Of Python's own documentation, on which the cost of rounding is measured."""


def export_gguf(
    model: CausalLM, config: Mapping[str, Any], tokenizer: Tokenizer, file: Path, quantize: str
) -> tuple[dict[str, Any], str]:
    """Write and verify; returns what was found, and that in a sentence. config: as config.json has it."""
    kind = quantize.upper()
    file.unlink(missing_ok=True)
    write_gguf(file, config, hf_tensors(model), tokenizer.gguf_keys(model.vocab_size), kind)
    found = verify_gguf(model, tokenizer, file, kind)
    same = "are the same" if kind == "F32" else "are, to within that, the most probable here"
    told = (
        f"{file} ({found['bytes']:,} bytes, {kind}): {found['llama.cpp']} reads it; log-probabilities differ by at "
        f"most {found['logprobs']:.1e} of {found['of']:.0f}, ids of text and prompt are the same, and its "
        f"{found['greedy']} greedy tokens {same}"
    )
    if "perplexity" in found:
        before, after = found["perplexity"]["before"], found["perplexity"]["after"]
        told += f"; perplexity of {found['perplexity']['tokens']:,} tokens of Python's documentation {before:.3f} "
        told += f"before and {after:.3f} in {kind} ({after / before - 1:+.2%})"
    return found, told


@torch.no_grad()
def verify_gguf(model: CausalLM, tokenizer: Tokenizer, file: Path, kind: str) -> dict[str, Any]:
    """Read `file` here and with llama.cpp and compare: weights, ids of texts and of a rendered prompt, what comes next
    (log-probabilities), a greedy answer, its ends. Raises CheckpointError naming what differs.
    """
    artifact = load_artifact(str(file))
    again, _ = artifact.model(None)
    again.eval()
    if kind == "F32":
        _same_weights(model, again, file)
    _same_tokenizer(tokenizer, artifact.tokenizer, file)
    prompt = chat_prompt(tokenizer) or [*tokenizer.start, *tokenizer.encode(PROBE)]
    prompt, room = prompt[: model.context - 1], min(model.context, len(prompt) + ANSWER)
    message, ends = PROBE if tokenizer.has_template else "", tokenizer.stop_ids
    _same_model(model, again, prompt, TOLERANCE[kind], file)
    told = ask(file, Asked(TEXTS, message, prompt, room - len(prompt), ends, model.vocab_size))
    _same_ids(tokenizer, told, file)
    if missing := sorted(set(ends) - set(told.ends)):
        raise CheckpointError(f"{file}: llama.cpp does not stop at {tokenizer.decode(missing, special=True)}")
    apart, largest = _apart(again, prompt, told)
    if not apart <= (allowed := TOLERANCE[kind] * max(1.0, largest)):
        raise CheckpointError(
            f"{file}: log-probabilities of llama.cpp differ by {apart:.2e}, more than {allowed:.2e} for {kind}"
        )
    if kind == "F32" and (answer := _answer(again, prompt, room, told)) != told.answer:
        raise CheckpointError(f"{file}: llama.cpp answers {told.answer[:8]}..., not {answer[:8]}...")
    facts = {
        "llama.cpp": told.version, "type": kind, "bytes": file.stat().st_size, "logprobs": apart, "of": largest,
        "greedy": len(told.answer), "ends": told.ends,
    }  # fmt: skip
    return facts if kind == "F32" else {**facts, "perplexity": _cost(model, again, tokenizer)}


def _same_weights(model: CausalLM, again: CausalLM, file: Path) -> None:
    """Bit for bit; of Gemma's norms the file holds 1 more, rounded."""
    ours, theirs = weights_of(model), weights_of(again)
    for name, tensor in ours.items():
        exact = [tensor, tensor + 1 - 1] if tensor.dim() == 1 else [tensor]
        if not any(t.float().equal(theirs[name]) for t in exact):
            raise CheckpointError(f"{file}: {name} is not read as it was written")


def _same_model(model: CausalLM, again: CausalLM, prompt: list[int], tolerance: float, file: Path) -> None:
    """Settings, too, must come back: by what is computed with them."""
    wanted, found = (logits_of(m, prompt).log_softmax(-1) for m in (model, again))
    apart, allowed = (found - wanted).abs().max().item(), tolerance * max(1.0, wanted.abs().max().item())
    if not apart <= allowed:
        raise CheckpointError(
            f"{file}: read again, it computes otherwise: log-probabilities differ by {apart:.2e}, more than "
            f"{allowed:.2e}"
        )


def _same_tokenizer(ours: Tokenizer, read: Tokenizer, file: Path) -> None:
    same = all(ours.encode(text) == read.encode(text) for text in TEXTS)
    if not same or ours.start != read.start or set(ours.stop_ids) != set(read.stop_ids):
        raise CheckpointError(f"{file}: its tokenizer is not read as it was written")
    if ours.config.get("chat_template", "") != read.config.get("chat_template", ""):
        raise CheckpointError(f"{file}: its chat template is not read as it was written")


def _same_ids(tokenizer: Tokenizer, told: Told, file: Path) -> None:
    wanted = [[*tokenizer.start, *tokenizer.encode(text)] for text in TEXTS]
    for ids, found in zip([*wanted, chat_prompt(tokenizer) or []], [*told.ids, told.chat], strict=True):
        if found != ids:
            at = next((i for i, (a, b) in enumerate(zip(ids, found, strict=False)) if a != b), len(found))
            raise CheckpointError(
                f"{file}: llama.cpp reads other tokens: {found[at : at + 6]}, not {ids[at : at + 6]} "
                f"({tokenizer.decode(ids[at : at + 6], special=True)!r})"
            )
    if tokenizer.has_template and told.template != tokenizer.template:
        raise CheckpointError(f"{file}: llama.cpp finds another chat template")


def _apart(again: CausalLM, prompt: list[int], told: Told) -> tuple[float, float]:
    """The greatest difference of log-probabilities, and the largest of ours: of all tokens to begin the answer, and of
    the most probable ones of its every step. A chosen one that is not our most probable counts with half of what it is
    behind: each of the two may be off."""
    ours = logits_of(again, prompt + told.answer)[len(prompt) - 1 :].log_softmax(-1)
    pairs = [(ours[0], told.first), *zip(ours, told.steps, strict=False)]
    apart = max(abs(row[id].item() - said) for row, step in pairs for id, said in step.items())
    behind = [row.max() - row[id] for row, id in zip(ours, told.answer, strict=False)]
    return max(apart, *(gap.item() / 2 for gap in behind)), ours[0].abs().max().item()


def _answer(again: CausalLM, prompt: list[int], room: int, told: Told) -> list[int]:
    """Ours; llama.cpp may know further ends by their names."""
    return greedy(again, prompt, room, {*told.ends, *told.answer[-1:]} if told.ended else set(told.ends))


def _cost(model: CausalLM, again: CausalLM, tokenizer: Tokenizer) -> dict[str, Any]:
    """Perplexity with the weights as they were and as the file has them, on the same tokens."""
    texts = sorted(topics.values(), key=len, reverse=True)[:DOCUMENTS]
    documents = [[*(tokenizer.start or [tokenizer.eos_id]), *tokenizer.encode(text)][: TOKENS + 1] for text in texts]
    count = sum(len(ids) - 1 for ids in documents)
    nats = [sum(sum(document_nats(m, [ids])) for ids in documents) for m in (model, again)]
    before, after = (torch.tensor(n / count, dtype=torch.float64).exp().item() for n in nats)
    return {"before": before, "after": after, "tokens": count}
