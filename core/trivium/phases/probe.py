"""What the export gates ask of both sides: texts, and a greedy answer."""

from __future__ import annotations

import torch

from trivium.data.chat import Chat
from trivium.data.tokenizer import Tokenizer
from trivium.models.protocol import CausalLM

PROBE = "The quick brown fox jumps over 13 lazy dogs.\n\n  What is 2 + 2?"
ANSWER = 24  # tokens of the greedy answer that are compared


def chat_prompt(tokenizer: Tokenizer) -> list[int]:
    """Ids of the probe as a user's turn; none where there is no chat template."""
    return Chat(tokenizer).prompt_ids([{"role": "user", "content": PROBE}]) if tokenizer.has_template else []


@torch.no_grad()
def logits_of(model: CausalLM, ids: list[int]) -> torch.Tensor:
    """(T, V) in fp32."""
    tokens = torch.tensor([ids])
    return model.head(model(tokens, torch.arange(len(ids))[None]))[0].float()


def greedy(model: CausalLM, ids: list[int], room: int, ends: set[int]) -> list[int]:
    """The most probable answer to `ids`, up to and including the first of `ends`, `room` tokens in all."""
    answer: list[int] = []
    while len(ids) + len(answer) < room and not (answer and answer[-1] in ends):
        answer.append(int(logits_of(model, ids + answer)[-1].argmax()))
    return answer
