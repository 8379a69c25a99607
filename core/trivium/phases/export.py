"""Leave with a checkpoint, in a form that an independent loader has read, compared and made to speak: a Hugging Face
folder, checked with transformers, or a GGUF file, checked with llama.cpp (export_gguf.py).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from trivium.build import device_of, write_folder
from trivium.data.tokenizer import Tokenizer
from trivium.disk import make_folder, sweep
from trivium.errors import CheckpointError, ConfigError
from trivium.models.protocol import CausalLM
from trivium.phases import llamacpp
from trivium.phases.average import average_into
from trivium.phases.export_gguf import export_gguf
from trivium.phases.probe import ANSWER, PROBE, chat_prompt, greedy
from trivium.phases.push import push, ready
from trivium.phases.run import Run
from trivium.phases.verified import VERIFIED, note_verified

TOLERANCE = 1e-4  # of logits in fp32, of the largest where that is above 1: the two sum in other orders


def run_export(this: Run) -> int:
    """Write, then the gate: nothing is called good that an independent loader has not confirmed."""
    config, parent = this.config, this.needs_parent()
    if config.push:
        ready(config.push)  # before the work
    transformers = _transformers() if config.format == "hf" else llamacpp.installed()
    model, record = parent.merged(config.model)
    if model.score is not None:
        raise CheckpointError(f"{parent.path} is a reward model, which has no form of its own there")
    if this.averaged:
        average_into(model, parent, this.averaged)
        this.say(f"the mean of {1 + len(this.averaged)} models' weights")
    model.eval()
    folder = make_folder(this.folder / config.format)
    sweep(folder)  # what a killed export left
    (folder / VERIFIED).unlink(missing_ok=True)  # until the gate has passed again
    this.begin(model={"name": record["name"], "parameters": model.num_parameters})
    if config.format == "hf":
        written = write_folder(model, record["name"], parent.tokenizer, folder)
        found = verify_folder(model, parent.tokenizer, folder, transformers)
        told = (
            f"{folder}: transformers {found['transformers']} reads it; logits differ by at most "
            f"{found['logits']:.1e}, prompt ids and {found['greedy']} greedy tokens are the same"
        )
    else:
        config_json = {"model_type": record["name"], **model.hf_config()}
        written = ["model.gguf"]
        found, told = export_gguf(model, config_json, parent.tokenizer, folder / written[0], config.quantize)
    note_verified(folder, found, written)
    this.manifest.update(results=found)
    this.say(told)
    if config.push:
        this.say(f"pushed to {push(folder, [*written, VERIFIED], config.push, public=config.push_public)}")
    return 0


@torch.no_grad()
def verify_folder(model: CausalLM, tokenizer: Tokenizer, folder: Path, transformers: Any) -> dict[str, Any]:
    """Read `folder` with transformers and compare: logits, ids of text and of a rendered prompt, a greedy answer.

    Raises CheckpointError naming what differs.
    """
    device = device_of("cpu")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).eval()
    reader = transformers.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer.encode(PROBE)
    if (found := reader(PROBE, add_special_tokens=False)["input_ids"]) != ids:
        raise CheckpointError(f"{folder}: transformers reads {PROBE[:20]!r}... as {found[:8]}, not as {ids[:8]}")
    prompt = [*tokenizer.start, *ids]
    if tokenizer.has_template:
        messages = [{"role": "user", "content": PROBE}]
        prompt = chat_prompt(tokenizer)
        rendered = reader.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
        if rendered != prompt:
            raise CheckpointError(f"{folder}: transformers renders a prompt as {rendered[:8]}..., not {prompt[:8]}...")
    room = min(model.context, len(prompt) + ANSWER)
    tokens = torch.tensor([prompt[: room - 1]])
    wanted = model.head(model(tokens, torch.arange(tokens.shape[1])[None])).float()
    apart = (theirs(tokens).logits.float() - wanted).abs().max().item()
    if not apart <= TOLERANCE * max(1.0, wanted.abs().max().item()):
        raise CheckpointError(
            f"{folder}: logits of transformers differ by {apart:.2e}, more than {TOLERANCE:g} of the largest"
        )
    ends = set(tokenizer.stop_ids)
    answer = greedy(model, tokens[0].tolist(), room, ends)
    spoken = theirs.generate(tokens, attention_mask=torch.ones_like(tokens), do_sample=False, max_length=room)
    if (said := spoken[0, tokens.shape[1] :].tolist()) != answer:
        raise CheckpointError(f"{folder}: transformers answers {said[:8]}..., not {answer[:8]}...")
    if set(theirs.generation_config.eos_token_id) != ends:
        raise CheckpointError(f"{folder}: transformers stops at {theirs.generation_config.eos_token_id}, not {ends}")
    return {"transformers": transformers.__version__, "logits": apart, "greedy": len(answer), "ends": sorted(ends)}


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ConfigError(
            "phase=export checks what it wrote with transformers, which is not installed: pip install trivium-llm[hf]"
        ) from error
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers
