"""How well a model predicts held-out text, or what is said in held-out conversations, in bits per byte: comparable
across tokenizers.

bits per byte = sum of nats over all tokens / (ln 2 * bytes). Windows overlap so that every token but the first few has
at least `context - stride` tokens before it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from trivium.data.packing import encode_examples
from trivium.data.source import Example
from trivium.data.tokenizer import Tokenizer
from trivium.errors import ConfigError
from trivium.evaluation.intervals import Estimate, ratio_interval
from trivium.evaluation.pairs import packed
from trivium.models.protocol import CausalLM
from trivium.objectives.logprobs import sequence_logprobs
from trivium.types import TokenBatch

ROWS = 16


@torch.no_grad()
def document_nats(model: CausalLM, documents: Sequence[Sequence[int]], stride: int = 0) -> list[float]:
    """Total negative log-likelihood of each document's tokens after its first, in nats."""
    context, device = model.context, next(model.parameters()).device
    stride = stride or context // 2
    if not 0 < stride < context:  # a window's first token is not scored, so windows share one at least
        raise ConfigError(f"evaluation.stride={stride} must be greater than 0 and less than the context of {context}")
    windows = []  # (document, tokens, how many leading targets were scored by the window before)
    for d, ids in enumerate(documents):
        start, scored = 0, 1
        while scored < len(ids):
            piece = ids[start : start + context]
            windows.append((d, piece, scored - start))
            scored = start + len(piece)
            start += stride
    windows.sort(key=lambda w: len(w[1]))  # rows of like length waste little padding
    totals = [0.0] * len(documents)
    model.eval()
    for i in range(0, len(windows), ROWS):
        part = windows[i : i + ROWS]
        longest = max(len(w[1]) for w in part)
        tokens = torch.zeros(len(part), longest, dtype=torch.long)
        for row, (_, piece, _) in enumerate(part):
            tokens[row, : len(piece)] = torch.tensor(piece)
        tokens = tokens.to(device)
        positions = torch.arange(longest, device=device).expand(len(part), -1)
        logits = model.head(model(tokens, positions)[:, :-1]).float()
        nats = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none").view(len(part), -1)
        for row, (d, piece, first) in enumerate(part):
            totals[d] += nats[row, first - 1 : len(piece) - 1].sum().item()
    return totals


def bits_per_byte(
    model: CausalLM, tokenizer: Tokenizer, texts: Sequence[str], *, stride: int, resamples: int, confidence: float
) -> Estimate:
    """Bits per byte of `texts`, every byte counted, with a bootstrap interval over documents.

    Where documents have no beginning token, the end of another text stands before each, so that its first token counts.
    """
    before = tokenizer.start or [tokenizer.eos_id]
    documents = [[*before, *ids] for ids in tokenizer.encode_batch(texts)]
    nats = document_nats(model, documents, stride)
    bits = [n / math.log(2) for n in nats]
    return ratio_interval(bits, [len(t.encode()) for t in texts], resamples=resamples, confidence=confidence)


def whole(chats: Sequence[Example], tokenizer: Tokenizer, context: int) -> list[Example]:
    """Those conversations that fit the context uncut and in which the assistant writes text and calls no tools."""
    texts = [c for c in chats if not any(message.get("tool_calls") for message in c.get("messages", ()))]
    encoded = encode_examples(texts, tokenizer, "assistant")
    return [chat for chat, document in zip(texts, encoded, strict=True) if len(document.ids) <= context]


@torch.no_grad()
def answer_bits_per_byte(
    model: CausalLM, tokenizer: Tokenizer, chats: Sequence[Example], *, resamples: int, confidence: float
) -> Estimate:
    """Bits per byte of what the assistant says in conversations that are `whole`, with an interval over conversations.

    Every turn of the assistant counts, given what was said before it. The end of a turn costs bits and has no bytes.
    """
    model.eval()
    steps = packed(chats, tokenizer, model.context, "chat", TokenBatch)
    device = next(model.parameters()).device
    nats = -steps.per_document(lambda batch: sequence_logprobs(model, batch), device)
    said = {
        chat["id"]: [m["content"] for m in chat["messages"] if m["role"] == "assistant"]
        if "messages" in chat
        else [chat["completion"]]
        for chat in chats
    }
    num_bytes = [sum(len(text.encode()) for text in said[name]) for name in steps.table.ids]
    return ratio_interval((nats / math.log(2)).tolist(), num_bytes, resamples=resamples, confidence=confidence)
