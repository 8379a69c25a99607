"""What travels over HTTP, in the forms of OpenAI's API: requests, checked; answers, streams and errors.

Nothing that is asked is passed over: an unknown parameter, or one that this server cannot honour, is an error. `null`
is unset. Parameters that are not OpenAI's are vLLM's: top_k, min_p, repetition_penalty, min_tokens, stop_token_ids.
Source: https://platform.openai.com/docs/api-reference.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import from_json

from trivium.errors import TriviumError
from trivium.inference.choice import Choice, Piece
from trivium.inference.config import SamplingConfig
from trivium.inference.constrain import how_to_hold
from trivium.inference.protocol import Capabilities
from trivium.inference.text import TokenTexts
from trivium.schema import ServerConfig
from trivium.types import SamplingParams, TokenEvent

STOP_LENGTH = 256
"""Characters of a stop string at most."""
SCHEMA_LENGTH = 65_536
"""Characters of a JSON schema at most."""
MOST_INPUTS = 2048
"""Texts of one request for embeddings, as OpenAI has it; of one to rerank, query and documents."""
TOO_LONG = "context_length_exceeded"
CANNOT_HOLD = "this server's engine cannot hold answers"
INVALID = "invalid_request_error"
W = TypeVar("W", bound="Wire")


class WireError(TriviumError):
    """A request that is answered with an error. status: of HTTP. kind, param, code: as OpenAI's errors have them."""

    def __init__(
        self, message: str, status: int = 400, kind: str = INVALID, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.kind, self.param, self.code = status, kind, param, code

    @property
    def body(self) -> dict[str, Any]:
        """What is sent."""
        return {"error": {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}}


# ---- requests


class Wire(BaseModel):
    """A form of JSON: no key too many, and no text for a number."""

    model_config = ConfigDict(strict=True, extra="forbid", protected_namespaces=())


NAME = r"^[a-zA-Z0-9_-]{1,64}$"


class Sampling(Wire):
    """How tokens are drawn; what is unset is as inference.sampling says."""

    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[str, float] | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    top_k: int | None = Field(None, ge=0, lt=2**31)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)
    min_tokens: int | None = Field(None, ge=0, lt=2**31)
    stop_token_ids: list[int] | None = Field(None, max_length=64)


class Common(Wire):
    """What changes no answer, or says whose it is."""

    model: str | None = Field(None, max_length=512)
    user: str | None = Field(None, max_length=200)
    metadata: dict[str, str] | None = Field(None, max_length=16)
    service_tier: Literal["auto", "default"] | None = None
    safety_identifier: str | None = Field(None, max_length=200)
    prompt_cache_key: str | None = Field(None, max_length=200)


class StreamOptions(Wire):
    """include_usage: one more chunk, with the counts."""

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class TextPart(Wire):
    """Part of a message's content; models here read text only."""

    type: Literal["text", "input_text", "output_text"]
    text: str
    annotations: list[Any] | None = Field(None, max_length=0)
    logprobs: list[Any] | None = None


class FunctionCall(Wire):
    """arguments: JSON text."""

    name: str = Field(pattern=NAME)
    arguments: str


class ToolCall(Wire):
    """A call that the assistant made."""

    id: str = Field(max_length=200)
    type: Literal["function"]
    function: FunctionCall
    index: int | None = None


class Message(Wire):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    tool_calls: list[ToolCall] | None = Field(None, max_length=128)
    tool_call_id: str | None = Field(None, max_length=200)
    reasoning_content: str | None = None
    annotations: list[Any] | None = Field(None, max_length=0)


class FunctionForm(Wire):
    """A function that may be called; parameters: a JSON schema."""

    name: str = Field(pattern=NAME)
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: Literal[False] | None = None


class Tool(Wire):
    """Something that the model may use."""

    type: Literal["function"]
    function: FunctionForm


class NamedFunction(Wire):
    """A function by its name."""

    name: str = Field(pattern=NAME)


class NamedTool(Wire):
    """The one function that must be called."""

    type: Literal["function"]
    function: NamedFunction


class SchemaForm(Wire):
    """A JSON schema with its name."""

    name: str = Field(pattern=NAME)
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Wire):
    """What the answer's text must be."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: SchemaForm | None = None


class ChatRequest(Common, Sampling):
    """POST /v1/chat/completions. session: a kept conversation, to which `messages` are added behind the turn `parent`
    ("" for its beginning, unset for its newest)."""

    messages: list[Message] = Field(min_length=1, max_length=10_000)
    max_tokens: int | None = Field(None, ge=1, lt=2**31)
    max_completion_tokens: int | None = Field(None, ge=1, lt=2**31)
    n: int | None = Field(None, ge=1, lt=2**31)
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: list[Tool] | None = Field(None, max_length=128)
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    modalities: list[Literal["text"]] | None = Field(None, min_length=1, max_length=1)
    store: Literal[False] | None = None
    session: str | None = Field(None, min_length=1, max_length=200)
    parent: str | None = Field(None, max_length=200)


class CompletionRequest(Common, Sampling):
    """POST /v1/completions."""

    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: int | None = Field(None, ge=1, lt=2**31)
    n: int | None = Field(None, ge=1, lt=2**31)
    best_of: int | None = Field(None, ge=1, lt=2**31)
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: bool | None = None
    suffix: Literal[""] | None = None


class InputMessage(Wire):
    """A message of a response's input."""

    type: Literal["message"] | None = None
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    id: str | None = Field(None, max_length=200)
    status: Literal["in_progress", "completed", "incomplete"] | None = None


class CallItem(Wire):
    """A call that the assistant made, in a response's input. arguments: JSON text."""

    type: Literal["function_call"]
    call_id: str = Field(max_length=200)
    name: str = Field(pattern=NAME)
    arguments: str
    id: str | None = Field(None, max_length=200)
    status: Literal["in_progress", "completed", "incomplete"] | None = None


class ResultItem(Wire):
    """What a call came to, in a response's input."""

    type: Literal["function_call_output"]
    call_id: str = Field(max_length=200)
    output: str | list[TextPart]
    id: str | None = Field(None, max_length=200)
    status: Literal["in_progress", "completed", "incomplete"] | None = None


class ResponseTool(FunctionForm):
    """Something that the model may use, as responses write it."""

    type: Literal["function"]


class ChosenTool(NamedFunction):
    """The one function that must be called, as responses write it."""

    type: Literal["function"]


class TextFormat(Wire):
    """What the answer's text must be, as responses write it."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = Field(None, pattern=NAME)
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class TextSettings(Wire):
    """Of a response's text."""

    format: TextFormat | None = None


class ResponseRequest(Common, Sampling):
    """POST /v1/responses."""

    input: str | list[InputMessage | CallItem | ResultItem]
    instructions: str | None = None
    previous_response_id: str | None = Field(None, max_length=200)
    store: bool | None = None
    max_output_tokens: int | None = Field(None, ge=1, lt=2**31)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    text: TextSettings | None = None
    tools: list[ResponseTool] | None = Field(None, max_length=128)
    tool_choice: Literal["none", "auto", "required"] | ChosenTool | None = None
    parallel_tool_calls: bool | None = None
    truncation: Literal["disabled"] | None = None
    background: Literal[False] | None = None
    include: list[Any] | None = Field(None, max_length=0)
    top_logprobs: Literal[0] | None = None


class EmbeddingRequest(Common):
    """POST /v1/embeddings."""

    input: str | list[str] | list[int] | list[list[int]]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = Field(None, ge=1, lt=2**31)


class Document(Wire):
    """What may be relevant."""

    text: str


class RerankRequest(Common):
    """POST /v1/rerank, as Jina and Cohere have it."""

    query: str
    documents: list[str | Document] = Field(min_length=1, max_length=MOST_INPUTS - 1)
    top_n: int | None = Field(None, ge=1, lt=2**31)
    return_documents: bool | None = None


def parsed(form: type[W], body: bytes) -> W:
    """A request of this form. Raises WireError for whatever else the bytes are."""
    given = parsed_object(body)
    given = {key: value for key, value in given.items() if value is not None}
    for name in ("messages", "input", "stream_options", "text"):
        if name in given:
            given[name] = _without_null(given[name])
    try:
        return form.model_validate(given)
    except ValidationError as error:
        raise _refusal(error, given) from error


def parsed_object(body: bytes) -> dict[str, Any]:
    """A JSON object. Nesting is limited (200), numbers are finite, text is Unicode. Raises WireError."""
    try:
        given = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise WireError(f"the body is not JSON: {error}"[:300], code="invalid_json") from error
    if not isinstance(given, dict):
        raise WireError("the body must be a JSON object", code="invalid_json")
    return given


def _without_null(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_null(inner) for key, inner in value.items() if inner is not None}
    return [_without_null(inner) for inner in value] if isinstance(value, list) else value


def _refusal(error: ValidationError, given: Mapping[str, Any]) -> WireError:
    """The deepest of pydantic's complaints, in one sentence: of a union's members the one that came furthest."""
    told = error.errors(include_url=False, include_input=False, include_context=False)
    first = told[0]["loc"][:1]
    one = max((e for e in told if e["loc"][:1] == first), key=lambda e: len(e["loc"]))
    places = [str(p) for p in one["loc"] if isinstance(p, int) or p in _KEYS or one["type"] == "extra_forbidden"]
    param = ".".join(places)[:200]
    if one["type"] == "missing":
        return WireError(f"{param} is required", param=param, code="missing_required_parameter")
    if one["type"] == "extra_forbidden":
        return WireError(f"{param} is not supported by this server", param=param, code="unknown_parameter")
    kind = "invalid_type" if one["type"].endswith("_type") else "invalid_value"
    return WireError(f"{param}: {one['msg'][:1].lower()}{one['msg'][1:300]}", param=param, code=kind)


def _keys(*forms: type[BaseModel]) -> set[str]:
    return {field.alias or name for form in forms for name, field in form.model_fields.items()}


_KEYS = _keys(
    ChatRequest, CompletionRequest, ResponseRequest, EmbeddingRequest, RerankRequest, Message, TextPart, ToolCall, Tool,
    FunctionCall, FunctionForm, SchemaForm, ResponseFormat, StreamOptions, InputMessage, CallItem, ResultItem,
    ResponseTool, TextFormat, TextSettings,
)  # fmt: skip


# ---- what is asked, as the engine knows it


def messages_of(messages: Sequence[Message | InputMessage]) -> list[dict[str, Any]]:
    """Messages as chat templates read them. Raises WireError."""
    found = []
    for number, message in enumerate(messages):
        calls = message.tool_calls if isinstance(message, Message) else None
        at = f"messages.{number}"
        if message.content is None and not (calls and message.role == "assistant"):
            raise WireError(f"{at}.content is required", param=f"{at}.content", code="missing_required_parameter")
        role = "system" if message.role == "developer" else message.role
        one: dict[str, Any] = {"role": role, "content": _text_of(message.content or "")}
        if isinstance(message, Message):
            for key, role in (
                ("tool_calls", "assistant"),
                ("tool_call_id", "tool"),
                ("reasoning_content", "assistant"),
            ):
                if getattr(message, key) is not None and message.role != role:
                    raise WireError(f"{at}.{key} is for role={role}", param=f"{at}.{key}", code="invalid_value")
            if calls:
                one["tool_calls"] = [
                    _call_of(call.id, call.function.name, call.function.arguments, f"{at}.tool_calls.{i}.function")
                    for i, call in enumerate(calls)
                ]
            if message.tool_call_id is not None:
                one["tool_call_id"] = message.tool_call_id
            if message.reasoning_content is not None:
                one["reasoning_content"] = message.reasoning_content
        found.append(one)
    return found


def input_of(given: str | Sequence[InputMessage | CallItem | ResultItem]) -> list[dict[str, Any]]:
    """What a response's input says, as chat templates read it: calls are part of the message before them. Raises
    WireError."""
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    found: list[dict[str, Any]] = []
    for number, item in enumerate(given):
        if isinstance(item, InputMessage):
            found += messages_of([item])
        elif isinstance(item, ResultItem):
            found.append({"role": "tool", "content": _text_of(item.output), "tool_call_id": item.call_id})
        else:
            if not found or found[-1]["role"] != "assistant":
                found.append({"role": "assistant", "content": ""})
            call = _call_of(item.call_id, item.name, item.arguments, f"input.{number}")
            found[-1].setdefault("tool_calls", []).append(call)
    return found


def _text_of(content: str | Sequence[TextPart]) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)


def _call_of(id: str, name: str, text: str, at: str) -> dict[str, Any]:
    """Templates read the arguments as an object, not as text."""
    try:
        arguments = from_json(text or "{}", allow_inf_nan=False)
    except ValueError:
        arguments = None
    if not isinstance(arguments, dict):
        raise WireError(f"{at}.arguments must be the text of a JSON object", param=at, code="invalid_value")
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


def stops_of(stop: str | list[str] | None, limits: ServerConfig) -> list[str]:
    """Stop strings. Raises WireError for too many, empty ones and long ones."""
    stops = [stop] if isinstance(stop, str) else stop or []
    if len(stops) > limits.max_stops:
        raise WireError(f"stop has {len(stops)} strings; {limits.max_stops} are taken", param="stop", code="too_many")
    if any(not 0 < len(text) <= STOP_LENGTH for text in stops):
        raise WireError(f"each stop must have 1 to {STOP_LENGTH} characters", param="stop", code="invalid_value")
    return stops


def schema_of(format: ResponseFormat | TextFormat | None, has: Capabilities, limits: ServerConfig) -> str:
    """The JSON schema that an answer is held to, as text; empty for none. Raises WireError."""
    if format is None or format.type == "text":
        return ""
    if "json_schema" not in has.sampling:
        raise WireError(f"{CANNOT_HOLD} to type={format.type}{how_to_hold()}", param="response_format")
    if format.type == "json_object":
        return '{"type": "object"}'
    schema = format.json_schema.schema_ if isinstance(format, ResponseFormat) and format.json_schema else None
    schema = format.schema_ if isinstance(format, TextFormat) else schema
    if schema is None:
        raise WireError("type=json_schema needs a schema", param="response_format", code="missing_required_parameter")
    return checked_schema(schema, limits)


def checked_schema(schema: dict[str, Any], limits: ServerConfig) -> str:
    """A JSON schema's text. Raises WireError for one that is too long or too deep."""
    text = json.dumps(schema, ensure_ascii=False)
    if len(text) > SCHEMA_LENGTH or _depth(schema) > limits.max_schema_depth:
        raise WireError(
            f"a JSON schema may have {SCHEMA_LENGTH:,} characters and {limits.max_schema_depth} levels",
            param="response_format", code="invalid_value",
        )  # fmt: skip
    return text


def _depth(value: Any) -> int:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if inner is None else 1 + max(map(_depth, inner), default=0)


def params_of(
    asked: Sampling, defaults: SamplingConfig, stop_ids: Sequence[int], wanted: int | None, room: int, most: int
) -> SamplingParams:
    """How to draw. wanted: max_tokens of the request; room: tokens that the context has left; most: what the server
    allows, 0 is all. Raises WireError; BackendError for what no backend can do."""
    if wanted is not None and most and wanted > most:
        raise WireError(f"max_tokens={wanted} is more than this server's {most}", param="max_tokens", code="too_many")
    if wanted is not None and wanted > room:
        raise WireError(
            f"max_tokens={wanted} is more than the {room} that the model's context has left behind this prompt",
            param="max_tokens", code=TOO_LONG,
        )  # fmt: skip
    limit = min(x for x in (defaults.max_tokens, room, most) if x) if wanted is None else wanted
    min_tokens = _or(asked.min_tokens, 0)
    if min_tokens > limit:
        raise WireError(f"min_tokens={min_tokens} is more than max_tokens={limit}", param="min_tokens")
    return SamplingParams(
        max_tokens=limit,
        temperature=_or(asked.temperature, defaults.temperature),
        top_k=_or(asked.top_k, defaults.top_k),
        top_p=_or(asked.top_p, defaults.top_p),
        seed=_or(asked.seed, defaults.seed),
        stop_ids=tuple(dict.fromkeys([*stop_ids, *(asked.stop_token_ids or ())])),
        min_p=_or(asked.min_p, 0.0),
        repetition_penalty=_or(asked.repetition_penalty, 1.0),
        presence_penalty=_or(asked.presence_penalty, 0.0),
        frequency_penalty=_or(asked.frequency_penalty, 0.0),
        logit_bias=_bias_of(asked.logit_bias),
        min_tokens=min_tokens,
    )


def _or(value: Any, default: Any) -> Any:
    """0 is a value; only None is unset."""
    return default if value is None else value


def _bias_of(bias: dict[str, float] | None) -> tuple[tuple[int, float], ...]:
    for token, value in (bias or {}).items():
        if not re.fullmatch("[0-9]{1,9}", token) or not -100 <= value <= 100:
            raise WireError(
                f"logit_bias has {token[:40]!r}: {value}; it maps token ids to -100 to 100", param="logit_bias",
                code="invalid_value",
            )  # fmt: skip
    if bias and len(bias) > 1024:
        raise WireError("logit_bias has more than 1,024 tokens", param="logit_bias", code="too_many")
    return tuple((int(token), value) for token, value in (bias or {}).items())


# ---- answers


def now() -> int:
    """Seconds since 1970."""
    return int(time.time())


def usage_of(prompts: int, completions: int, cached: int) -> dict[str, Any]:
    """Counts of tokens. cached: of the prompts', those that were not computed again."""
    return {
        "prompt_tokens": prompts,
        "completion_tokens": completions,
        "total_tokens": prompts + completions,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def chat_logprobs(piece: Piece, texts: TokenTexts) -> dict[str, Any]:
    """Log-probabilities of a piece's tokens, as chats have them."""
    return {"content": [_chat_token(event, texts) for _, event in piece.tokens], "refusal": None}


def _chat_token(event: TokenEvent, texts: TokenTexts) -> dict[str, Any]:
    def told(token: int, logprob: float) -> dict[str, Any]:
        text, bytes_ = texts(token)
        return {"token": text, "logprob": max(logprob, -9999.0), "bytes": bytes_}

    return {**told(event.token_id, event.logprob), "top_logprobs": [told(*one) for one in event.top]}


def text_logprobs(piece: Piece, texts: TokenTexts, offset: int, count: int) -> dict[str, Any]:
    """The same as completions have them. offset: where the answer begins in the text. count: of top_logprobs."""
    events = [event for _, event in piece.tokens]
    tops = [{texts(token)[0]: max(logprob, -9999.0) for token, logprob in event.top} for event in events]
    return {
        "tokens": [texts(event.token_id)[0] for event in events],
        "token_logprobs": [max(event.logprob, -9999.0) for event in events],
        "top_logprobs": tops if count else None,
        "text_offset": [offset + place for place, _ in piece.tokens],
    }


def joined(pieces: Sequence[Piece]) -> Piece:
    """Pieces as one."""
    return Piece("".join(p.text for p in pieces), [token for p in pieces for token in p.tokens])


def chat_message(text: str, calls: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What the assistant said."""
    said: dict[str, Any] = {"role": "assistant", "content": text or (None if calls else ""), "refusal": None}
    return {**said, "tool_calls": list(calls)} if calls else said


def reason_of(choice: Choice, calls: Sequence[Any]) -> str | None:
    """Why an answer ended, as chats say it."""
    return "tool_calls" if calls and choice.finish_reason == "stop" else choice.finish_reason


def response_body(
    asked: ResponseRequest, id: str, created: int, model: str, params: SamplingParams, *, status: str,
    output: list[dict[str, Any]], usage: dict[str, Any] | None, error: dict[str, Any] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """A response, on its way or done."""
    format = asked.text.format if asked.text else None
    shown = {"type": "text"} if format is None else format.model_dump(by_alias=True, exclude_none=True)
    choice, tools = asked.tool_choice or "auto", asked.tools or []
    return {
        "id": id, "object": "response", "created_at": created, "status": status, "background": False, "error": error,
        "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
        "instructions": asked.instructions, "max_output_tokens": asked.max_output_tokens, "model": model,
        "output": output, "parallel_tool_calls": _or(asked.parallel_tool_calls, True),
        "previous_response_id": asked.previous_response_id, "reasoning": {"effort": None, "summary": None},
        "service_tier": "default", "store": asked.store is not False, "temperature": params.temperature,
        "text": {"format": shown}, "top_p": params.top_p,
        "tool_choice": choice if isinstance(choice, str) else choice.model_dump(),
        "tools": [{"parameters": None, "strict": False, **tool.model_dump(exclude_none=True)} for tool in tools],
        "truncation": "disabled", "usage": usage, "user": asked.user, "metadata": asked.metadata or {},
    }  # fmt: skip


def output_message(id: str, text: str, status: str) -> dict[str, Any]:
    """What the assistant said, as an item of a response's output."""
    part = {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
    return {"id": id, "type": "message", "status": status, "role": "assistant", "content": [part]}


def output_call(call: dict[str, Any]) -> dict[str, Any]:
    """A call of a function, as an item of a response's output."""
    function = call["function"]
    item = {"id": f"fc_{call['id'].removeprefix('call_')}", "type": "function_call", "status": "completed"}
    return {**item, "call_id": call["id"], "name": function["name"], "arguments": function["arguments"]}


def response_usage(prompts: int, completions: int, cached: int) -> dict[str, Any]:
    """`usage_of` in the words of responses."""
    return {
        "input_tokens": prompts,
        "input_tokens_details": {"cached_tokens": cached},
        "output_tokens": completions,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": prompts + completions,
    }
