"""The run-level settings: one typed tree, the only source of their defaults. Unknown keys are errors.

Component settings (`model`, `data`, ...) hang under `Any` here; their types come from the registries by name.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass, field
from typing import Any

from trivium.errors import ConfigError

TRAINING_PHASES = ("pretrain", "sft", "preference", "reward", "rlhf", "distill")
PHASES = (
    *(
        "tokenizer",
        *TRAINING_PHASES,
        "evaluate",
        "generate",
        "chat",
        "serve",
        "search",
        "export",
        "feedback",
        "promote",
    ),
)
DATA_PHASES = ("tokenizer", "evaluate", "search", *TRAINING_PHASES)
"""Those that cannot do without data."""
PRECISIONS = ("auto", "fp32", "bf16", "bf16_true", "fp16")
LAUNCHERS = ("here", "slurm", "local")
STRATEGIES = ("auto", "ddp", "fsdp")
POLICIES = ("stop", "skip", "rollback", "off")
FORMATS = ("hf", "gguf")
CHANGING = ("unicode", "whitespace", "pii")
"""Cleaning steps that change texts and remove nothing."""
QUANTIZE = ("f32", "f16", "q8_0")
POOLINGS = ("mean", "cls", "max", "lasttoken")
INDEXES = ("exact", "hnsw")
FULL = ("error", "drop_oldest", "summarise")
WANDB_MODES = ("offline", "online", "disabled")


def _positive(group: str, owner: object, *names: str) -> None:
    for name in names:
        if getattr(owner, name) <= 0:
            raise ConfigError(f"{group}.{name}={getattr(owner, name)} must be greater than 0")


def _not_negative(group: str, owner: object, *names: str) -> None:
    for name in names:
        if getattr(owner, name) < 0:
            raise ConfigError(f"{group}.{name}={getattr(owner, name)} must not be negative (0 is off)")


@dataclass(frozen=True)
class BatchConfig:
    """One optimizer step = `size` rows of `length` tokens, run `micro_size` rows at a time."""

    size: int = 16  # rows a step, over all devices; more is steadier and slower a step (rlhf: see rollout)
    micro_size: int = 16  # rows held in memory at once; changes speed and memory, never the result
    length: int = 256  # tokens a row; at most the model's context
    tokens: int = 0  # tokens a step, in place of size: size becomes tokens / length; 0 leaves size as it is
    auto: bool = False  # find the largest micro_size that fits in memory by trying; size stays as it is

    def __post_init__(self) -> None:
        _positive("batch", self, "size", "micro_size", "length")
        _not_negative("batch", self, "tokens")
        if self.tokens % self.length:
            raise ConfigError(f"batch.tokens={self.tokens} must be a multiple of batch.length={self.length}")
        if self.tokens:
            object.__setattr__(self, "size", self.tokens // self.length)
        if self.auto:  # found once there is a model
            object.__setattr__(self, "micro_size", 1)
        if self.length < 2:
            raise ConfigError("batch.length=1 leaves no token to predict; 2 is the least")
        if self.size % self.micro_size:
            raise ConfigError(f"batch.size={self.size} must be a multiple of batch.micro_size={self.micro_size}")


@dataclass(frozen=True)
class TrainerConfig:
    """How long and on what."""

    max_steps: int = 1000  # optimizer steps, counting those before a resume
    accelerator: str = "auto"  # auto | cpu | gpu | mps, as Lightning names them
    grad_clip: float = 1.0  # largest global gradient norm; 0 is off
    compile: bool = False  # torch.compile of the model's blocks: slower to start, faster to run
    recompute: int = 0  # every n-th block keeps no activations and makes them again in the backward pass; 0 is off
    step_in_backward: bool = False  # step each parameter as its gradient comes and let go of it: less memory
    average: float = 0.0  # decay of a running average of the weights, such as 0.999, for others to get; 0 is off
    threads: int = 0  # CPU threads of a process; 0 leaves torch's choice, or shares the cores among several processes
    workers: int = 0  # processes that make batches beside training; never changes them; 0 makes them in between steps
    prefetch: int = 2  # steps each worker makes ahead; more rides out slow ones and takes memory
    loader_timeout: float = 300.0  # seconds to wait for a worker's batch before the run ends
    devices: int = 1  # processes on each machine, a GPU each; batch.size is of all together
    nodes: int = 1  # machines; more than one needs torchrun, srun or launcher.kind=slurm
    strategy: str = "auto"  # auto | ddp, every process holds the whole model | fsdp, each holds its share
    tensor_parallel: int = 1  # with fsdp: so many processes compute each block together, on the same rows

    @property
    def processes(self) -> int:
        """How many train together."""
        return self.devices * self.nodes

    @property
    def shares(self) -> int:
        """How many processes, or groups of them, share a step's rows."""
        return self.processes // self.tensor_parallel

    def __post_init__(self) -> None:
        _positive("trainer", self, "max_steps", "prefetch", "loader_timeout", "devices", "nodes", "tensor_parallel")
        if self.tensor_parallel > 1 and (self.strategy != "fsdp" or self.devices % self.tensor_parallel):
            raise ConfigError(
                f"trainer.tensor_parallel={self.tensor_parallel} needs trainer.strategy=fsdp (it is {self.strategy}) "
                f"and trainer.devices a multiple of it (it is {self.devices}): a group stays on one machine"
            )
        if self.strategy not in STRATEGIES:
            raise ConfigError(f"trainer.strategy={self.strategy!r} is not one of {', '.join(STRATEGIES)}")
        _not_negative("trainer", self, "grad_clip", "threads", "recompute", "workers")
        if not 0 <= self.average < 1:
            raise ConfigError(f"trainer.average={self.average} must be at least 0 (off) and less than 1")


@dataclass(frozen=True)
class LauncherConfig:
    """Who starts a training run's processes, and what a cluster is asked for."""

    kind: str = "here"  # here | slurm | local, submitit's processes on this machine
    partition: str = ""
    account: str = ""
    qos: str = ""
    constraint: str = ""
    minutes: int = 60  # until the cluster ends the job
    grace: int = 120  # seconds before that at which it is told to save and stop
    cpus: int = 4  # cores of each process
    memory: int = 0  # GB of each machine; 0 is the cluster's default
    setup: list[str] = field(default_factory=list)  # shell lines before it starts, such as module load
    wait: bool = False  # stay until the job has ended, and return its exit code

    def __post_init__(self) -> None:
        if self.kind not in LAUNCHERS:
            raise ConfigError(f"launcher.kind={self.kind!r} is not one of {', '.join(LAUNCHERS)}")
        _positive("launcher", self, "minutes", "cpus")
        _not_negative("launcher", self, "grace", "memory")


@dataclass(frozen=True)
class GuardConfig:
    """What happens to a step whose loss or gradient is not finite, or a spike. It never reaches the weights."""

    policy: str = "stop"  # stop | skip the step | rollback to the last checkpoint, on behind the bad data | off
    spike_sigma: float = 0.0  # a loss or gradient norm so many standard deviations above its mean is bad too; 0 is off
    window: int = 100  # steps that mean and deviation look back on; before so many nothing is a spike
    patience: int = 10  # bad steps in a row, or rollbacks to one checkpoint, before the run stops after all

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise ConfigError(f"guard.policy={self.policy!r} is not one of {', '.join(POLICIES)}")
        _positive("guard", self, "window", "patience")
        _not_negative("guard", self, "spike_sigma")


@dataclass(frozen=True)
class CheckpointConfig:
    """When to save and what to keep."""

    every_steps: int = 100  # a kill loses at most this many steps; the last step is always saved
    keep: int = 2  # newest checkpoints kept; at least 2, since the newest may turn out to be damaged
    keep_best: str = ""  # val/loss keeps the checkpoint with the lowest besides, for init_from to find
    async_save: bool = False  # write beside training: a step waits for a copy only, which takes memory as large as it
    fallback: bool = False  # continue from the checkpoint before a damaged one, which is set aside; false refuses

    def __post_init__(self) -> None:
        _positive("checkpoint", self, "every_steps", "keep")
        if self.keep < 2:
            raise ConfigError(
                f"checkpoint.keep={self.keep} leaves nothing if the newest turns out to be damaged; 2 is the least"
            )
        if self.keep_best not in ("", "val/loss"):
            raise ConfigError(f"checkpoint.keep_best={self.keep_best!r} is not known; val/loss is, or empty for none")


@dataclass(frozen=True)
class ValidationConfig:
    """Held-out loss while training."""

    every_steps: int = 0  # 0 is off
    max_rows: int = 64  # rows of batch.length tokens; more is steadier and slower

    def __post_init__(self) -> None:
        _positive("validation", self, "max_rows")
        _not_negative("validation", self, "every_steps")


@dataclass(frozen=True)
class StopConfig:
    """Early stopping on the validation loss, and how long a signal waits."""

    patience: int = 0  # validations without improvement before stopping; 0 is off
    min_delta: float = 0.0  # smallest fall that counts as improvement
    deadline: float = 60.0  # seconds from a signal to the end of the process, whatever it is doing; more is safer

    def __post_init__(self) -> None:
        _positive("stop", self, "deadline")
        _not_negative("stop", self, "patience", "min_delta")


@dataclass(frozen=True)
class DoctorConfig:
    """What is looked at before a run trains; `python launch.py doctor` shows it all."""

    preflight: bool = True  # look before training, and stop at what is wrong
    examples: int = 200  # looked at before training; more finds rarer faults and takes longer
    ignore: list[str] = field(default_factory=list)  # rules whose findings are warnings

    def __post_init__(self) -> None:
        _positive("doctor", self, "examples")


@dataclass(frozen=True)
class SamplesConfig:
    """Completions written while training, to look at."""

    every_steps: int = 0  # 0 is off
    prompts: list[str] = field(default_factory=list)
    max_tokens: int = 40

    def __post_init__(self) -> None:
        _positive("samples", self, "max_tokens")
        _not_negative("samples", self, "every_steps")


@dataclass(frozen=True)
class LoggerConfig:
    """Besides metrics.jsonl and metrics.csv, which are always written."""

    tensorboard: bool = False
    wandb: bool = False
    wandb_project: str = "trivium"
    wandb_mode: str = "offline"  # offline | online | disabled; offline needs no account

    def __post_init__(self) -> None:
        if self.wandb_mode not in WANDB_MODES:
            raise ConfigError(f"logger.wandb_mode={self.wandb_mode!r} is not one of {', '.join(WANDB_MODES)}")


@dataclass(frozen=True)
class ProfilerConfig:
    """A trace of a few steps, to open in a browser."""

    torch: bool = False
    first_step: int = 3  # counted from the start of this process; the first ones compile and fill caches
    steps: int = 4  # more make a larger trace

    def __post_init__(self) -> None:
        _positive("profiler", self, "steps")
        if self.first_step < 2:
            raise ConfigError(f"profiler.first_step={self.first_step} must be at least 2: the profiler warms up first")


@dataclass(frozen=True)
class CompanionConfig:
    """A frozen model beside the one that is trained; its architecture is its checkpoint's own."""

    init_from: str = ""  # a run or one of its checkpoints
    base: str = ""  # the model that it stands on, if it is an adapter and that is not where it says


@dataclass(frozen=True)
class RolloutConfig:
    """What a policy is asked before it learns from its own answers (phase=rlhf); how is inference.sampling."""

    prompts: int = 16  # asked together; more is steadier and slower
    samples: int = 8  # answers for each, which are compared with one another; at least 2
    updates: int = 1  # optimizer steps a rollout serves; more is faster and leaves the policy that drew it

    def __post_init__(self) -> None:
        _positive("rollout", self, "prompts", "samples", "updates")
        if self.samples < 2:
            raise ConfigError("rollout.samples=1 leaves nothing to compare an answer with; 2 is the least")
        if self.prompts % self.updates:
            raise ConfigError(f"rollout.prompts={self.prompts} must be a multiple of rollout.updates={self.updates}")


@dataclass(frozen=True)
class SessionsConfig:
    """Conversations that are kept, each turn with its exact tokens (phases chat and serve)."""

    keep: bool = True  # false keeps them in memory only
    path: str = ""  # the file, which several runs may share; empty is sessions.sqlite in the run's folder
    open: str = ""  # the conversation to go on in, by name or id; one that is not there is begun (phase=chat)
    full: str = "error"  # when one fills the context: error | drop_oldest questions and answers | summarise those

    def __post_init__(self) -> None:
        if self.full not in FULL:
            raise ConfigError(f"sessions.full={self.full!r} is not one of {', '.join(FULL)}")
        if not self.keep and (self.path or self.open):
            raise ConfigError("sessions.keep=false keeps nothing, so there is no sessions.path or sessions.open")


@dataclass(frozen=True)
class EvaluationConfig:
    """How much held-out data an evaluation reads."""

    max_texts: int = 100  # documents for bits per byte; more is steadier and slower
    max_tasks: int = 480  # verifiable examples, for accuracy and reward
    reward: bool = False  # answer them once more, drawn at temperature 1, for the mean score: what phase=rlhf raises
    max_pairs: int = 300  # preference pairs, for chosen over rejected
    max_chats: int = 200  # conversations, for the bits of their answers and the KL to teacher.init_from (else of texts)
    stride: int = 0  # tokens scored a window after the first; 0 is half the window
    confidence: float = 0.95  # of the bootstrap intervals
    resamples: int = 1000

    def __post_init__(self) -> None:
        _positive("evaluation", self, "max_texts", "max_tasks", "max_pairs", "max_chats", "resamples")
        _not_negative("evaluation", self, "stride")
        if not 0 < self.confidence < 1:
            raise ConfigError(f"evaluation.confidence={self.confidence} must be more than 0 and less than 1")


@dataclass(frozen=True)
class ServerConfig:
    """Where phase=serve listens, and how much it takes from those who ask."""

    host: str = "127.0.0.1"  # an address that others can reach needs server.key
    port: int = 8000  # 0 takes one that is free
    key: str = ""  # what clients must send on every path but /health; empty asks for none
    keys: list[str] = field(default_factory=list)  # NAME:KEY of others, whose conversations and feedback are their own
    model: str = ""  # what the model is called; empty is the run's name
    feedback: bool = False  # keep answers, and what people say of them, to learn from later
    feedback_path: str = ""  # the file for it; empty is feedback.sqlite in the run's folder
    max_requests: int = 256  # answers made or waited for at once; beyond them 429 with Retry-After
    max_connections: int = 1024  # more are turned away at once
    max_body: int = 2_000_000  # bytes of a request
    max_headers: int = 32_768  # bytes of its head
    max_prompt: int = 0  # tokens; 0 is what the model's context holds
    max_tokens: int = 0  # of an answer; 0 is what the model's context holds
    max_choices: int = 64  # answers to one request: its prompts times n
    max_stops: int = 4  # stop strings of a request
    max_schema_depth: int = 32  # how deep a JSON schema may be
    max_unread: int = 4096  # tokens made that a reader has not taken, before its request is given up
    max_kept: int = 1000  # responses of a key that previous_response_id can name; the oldest are forgotten
    header_seconds: float = 10.0  # for a request's head to arrive, before the connection is cut
    body_seconds: float = 30.0  # for its body
    write_seconds: float = 30.0  # for a reader to take anything
    drain_seconds: float = 30.0  # from a signal to the end of what is still being answered
    stale_seconds: float = 60.0  # without a step of the engine until /health fails; more for slow models

    def __post_init__(self) -> None:
        _positive("server", self, "max_requests", "max_connections", "max_body", "max_headers", "max_choices")
        _positive("server", self, "max_stops", "max_schema_depth", "max_unread", "max_kept", "header_seconds")
        _positive("server", self, "body_seconds", "write_seconds", "drain_seconds", "stale_seconds")
        if self.max_prompt < 0 or self.max_tokens < 0:
            raise ConfigError(
                f"server.max_prompt={self.max_prompt} and server.max_tokens={self.max_tokens} must not be negative (0 "
                "is the model's context)"
            )
        if not 0 <= self.port < 65536:
            raise ConfigError(f"server.port={self.port} is no port; 0 to 65535 are")
        if self.stale_seconds < 1:
            raise ConfigError(f"server.stale_seconds={self.stale_seconds} must be at least 1")
        keys = [self.key, *self.owners]
        if any(not key.isascii() or key != key.strip() or not key.isprintable() for key in keys):
            raise ConfigError("server.key must be printable ASCII without spaces around it: a header carries it")
        names = {name for name in self.owners.values() if re.fullmatch(r"[\w.-]{1,64}", name, re.ASCII)}
        if not len(names | {""} if self.key else names) == len(self.owners) == bool(self.key) + len(self.keys):
            raise ConfigError(
                "server.keys must be NAME:KEY each, NAME of letters, digits, _ . and -, no NAME or KEY twice"
            )
        if not self.is_local and not self.owners:
            raise ConfigError(
                f"server.host={self.host} can be reached by others: set server.key= to what they must send, or "
                "server.host=127.0.0.1"
            )

    @property
    def owners(self) -> dict[str, str]:
        """Each key, and the name of who has it: "" for server.key."""
        named = [entry.partition(":")[::2] for entry in self.keys]
        return {**({self.key: ""} if self.key else {}), **{key: name for name, key in named if key}}

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach it."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"


@dataclass(frozen=True)
class EncoderSettings:
    """Which encoder makes vectors of texts, and what it does with those that are too long."""

    path: str = "minilm"  # a folder as sentence-transformers writes it, or a name to fetch: minilm
    pooling: str = ""  # mean | cls | max | lasttoken: of a folder without modules.json, which else says
    normalize: str = ""  # unit, at length 1 | none, as they are: of a folder without modules.json
    max_length: int = 0  # tokens of a text; 0 is what the folder says. Fewer is faster and sees less of it
    too_long: str = "refuse"  # a longer text: refuse | cut, which is counted
    query_prompt: str = ""  # put before queries; empty is what the folder says, often nothing
    passage_prompt: str = ""  # put before passages and documents, likewise
    batch: int = 32  # texts computed together; more is faster on GPUs and takes memory

    def __post_init__(self) -> None:
        if self.pooling and self.pooling not in POOLINGS:
            raise ConfigError(f"pooling={self.pooling!r} is not one of {', '.join(POOLINGS)}")
        if self.normalize not in ("", "unit", "none"):
            raise ConfigError(f"normalize={self.normalize!r} is not unit or none")
        if self.too_long not in ("refuse", "cut"):
            raise ConfigError(f"too_long={self.too_long!r} is not refuse or cut")
        if not self.path:
            raise ConfigError("the encoder's path is empty; name a folder, or minilm")
        if self.max_length < 0 or self.batch <= 0:
            raise ConfigError(
                f"max_length={self.max_length} must not be negative (0 is the encoder's own), and batch={self.batch} "
                "must be greater than 0"
            )


@dataclass(frozen=True)
class SearchConfig:
    """How phase=search cuts, indexes and answers."""

    encoder: EncoderSettings = field(default_factory=EncoderSettings)
    tokens: int = 0  # of a passage at most; 0 is as many as the encoder reads. Fewer finds places more exactly
    index: str = (
        "exact"  # exact compares with every passage | hnsw follows a graph: faster from 100,000 on, misses some
    )
    top: int = 5  # passages shown, and given to the model that answers

    def __post_init__(self) -> None:
        _positive("search", self, "top")
        _not_negative("search", self, "tokens")
        if self.index not in INDEXES:
            raise ConfigError(f"search.index={self.index!r} is not one of {', '.join(INDEXES)}")


@dataclass(frozen=True)
class FeedbackConfig:
    """How phase=feedback makes training data of what people said of answers."""

    path: str = ""  # the store of a server or a chat: a file, or the run whose folder has feedback.sqlite
    model: str = ""  # only answers of the model whose SHA-256 begins so; empty takes those of all
    clean: list[str] = field(default_factory=list)  # unicode, whitespace, pii: as data.clean does it, in this order
    per_user: int = 200  # rows of one user in each file, the newest; 0 is no limit
    validation_share: float = 0.1  # of users
    test_share: float = 0.2  # of users; on these a new model is compared with the old
    min_rows: int = 20  # a pipeline leaves out a stage that would train on fewer

    def __post_init__(self) -> None:
        _not_negative("feedback", self, "per_user", "validation_share", "test_share")
        _positive("feedback", self, "min_rows")
        if self.validation_share + self.test_share >= 1:
            raise ConfigError(
                f"feedback.validation_share={self.validation_share} and feedback.test_share={self.test_share} leave "
                "nobody to learn from; together they must be less than 1"
            )
        for step in self.clean:
            if step not in CHANGING:
                raise ConfigError(
                    f"feedback.clean={list(self.clean)} has {step!r}, which is not one of {', '.join(CHANGING)}"
                )


@dataclass(frozen=True)
class PromoteConfig:
    """When a new model takes the place of the incumbent (phase=promote)."""

    pointer: str = ""  # the file that names the incumbent; empty is RUNS/incumbent.json
    feedback: str = ""  # a run of phase=feedback: its held-out rows, which neither model was trained on
    evaluations: list[str] = field(default_factory=list)  # runs of phase=evaluate: the incumbent's, the new model's
    min_rows: int = 20  # held-out rows; with fewer nobody is promoted

    def __post_init__(self) -> None:
        _positive("promote", self, "min_rows")
        if len(self.evaluations) not in (0, 2):
            raise ConfigError(
                f"promote.evaluations={list(self.evaluations)} must be two runs: the incumbent's and the new model's"
            )


@dataclass  # not frozen: OmegaConf makes the stages of a YAML file one by one and must be able to fill them
class StageConfig:
    """One stage of a pipeline: a phase with its overrides. init_from, teacher, versus and data name earlier stages."""

    phase: str = ""
    name: str = ""  # empty is the phase
    init_from: str = ""  # empty is the newest stage that made a language model (or tokenizer); for distill, none
    teacher: str = ""  # whom phase=distill learns from, and whom the stage's evaluation measures the KL to
    versus: str = ""  # the stage that the report compares with; empty is the one it continues
    data: str = ""  # an earlier stage of phase=feedback: train, or judge, on what it made
    overrides: list[str] = field(default_factory=list)  # as on the command line, which beats them


@dataclass(frozen=True)
class PipelineConfig:
    """Stages in order; `after` are the phases that follow every training stage, on what it made."""

    name: str = ""
    stages: list[StageConfig] = field(default_factory=list)
    after: list[str] = field(default_factory=list)
    result: str = ""  # the stage whose model stands for the whole; empty is the last trained one
    skip: list[str] = field(default_factory=list)  # stages to leave out, by name


@dataclass(frozen=True)
class RunConfig:
    """Everything one run is told."""

    phase: str = "pretrain"
    domain: str = "primer"
    name: str = ""  # folder under `runs`; empty is PHASE-DOMAIN
    runs: str = "runs"
    seed: int = 0  # of weights, order and dropout
    init_from: str = ""  # a run, one of its checkpoints, or a folder with model.safetensors
    base: str = ""  # the model that an adapter in init_from stands on, where it is not where the adapter says
    keep_layers: int = 0  # start from so many of init_from's layers, evenly spread: a smaller model; 0 keeps all
    stretch_context: int = 0  # start from init_from with its context made so long, by RoPE scaling; 0 leaves it
    stretch_by: str = "yarn"  # yarn | llama3 | dynamic | linear; none makes it longer with frequencies as they are
    precision: str = "auto"  # auto | fp32 | bf16 | bf16_true | fp16; auto is bf16 where the hardware computes in it
    prompt: str = ""  # what to answer (phase=generate)
    prompts: list[str] = field(default_factory=list)  # several at once (phase=generate)
    query: str = ""  # what to look for (phase=search); empty asks in the terminal
    prompt_format: str = "auto"  # auto | chat | text; auto is chat once the model was tuned on conversations
    system: str = ""  # system message (phases generate, chat and serve: there, of conversations without one)
    format: str = "hf"  # what phase=export writes: hf, a Hugging Face folder | gguf, a file for llama.cpp
    quantize: str = "f32"  # how format=gguf holds matrices: f32 | f16, half the size | q8_0, about a quarter
    average: list[str] = field(default_factory=list)  # runs whose weights phase=export averages with init_from's
    push: str = ""  # owner/name on the Hugging Face hub that phase=export uploads to once its gate has passed
    push_public: bool = False  # a repository that push= makes is private, unless this is true
    debug: bool = False  # stack traces
    model: Any = None
    data: Any = None
    tokenizer: Any = None
    adapter: Any = None
    objective: Any = None
    optim: Any = None
    schedule: Any = None
    inference: Any = None
    batch: BatchConfig = field(default_factory=BatchConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    launcher: LauncherConfig = field(default_factory=LauncherConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    stop: StopConfig = field(default_factory=StopConfig)
    samples: SamplesConfig = field(default_factory=SamplesConfig)
    doctor: DoctorConfig = field(default_factory=DoctorConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    profiler: ProfilerConfig = field(default_factory=ProfilerConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    server: ServerConfig = field(default_factory=ServerConfig)
    sessions: SessionsConfig = field(default_factory=SessionsConfig)
    reference: CompanionConfig = field(default_factory=CompanionConfig)
    teacher: CompanionConfig = field(default_factory=CompanionConfig)
    search: SearchConfig = field(default_factory=SearchConfig)
    feedback: FeedbackConfig = field(default_factory=FeedbackConfig)
    promote: PromoteConfig = field(default_factory=PromoteConfig)
    pipeline: PipelineConfig = field(default_factory=PipelineConfig)

    def __post_init__(self) -> None:
        if self.phase not in PHASES:
            raise ConfigError(f"phase={self.phase!r} is not one of {', '.join(PHASES)}")
        if self.keep_layers and self.phase not in TRAINING_PHASES:
            raise ConfigError(f"keep_layers={self.keep_layers} is for phases that train, not for phase={self.phase}")
        if self.keep_layers < 0 or (self.keep_layers and not self.init_from):
            raise ConfigError(f"keep_layers={self.keep_layers} takes layers of a trained model; name it in init_from=")
        if self.stretch_context:
            self._check_stretch()
        if self.adapter is not None:
            self._check_adapter()
        if self.precision not in PRECISIONS:
            raise ConfigError(f"precision={self.precision!r} is not one of {', '.join(PRECISIONS)}")
        if self.format not in FORMATS:
            raise ConfigError(f"format={self.format!r} is not one of {', '.join(FORMATS)}")
        if self.average and self.phase != "export":
            raise ConfigError(f"average={list(self.average)} is for phase=export, not for phase={self.phase}")
        if self.push and self.phase != "export":
            raise ConfigError(f"push={self.push} is for phase=export, not for phase={self.phase}")
        if self.push and not re.fullmatch(r"[\w.-]+/[\w.-]+", self.push):
            raise ConfigError(f"push={self.push!r} names no repository of the hub; write push=owner/name")
        if self.push_public and not self.push:
            raise ConfigError("push_public=true is for push=owner/name, which is not set")
        if self.quantize not in QUANTIZE:
            raise ConfigError(f"quantize={self.quantize!r} is not one of {', '.join(QUANTIZE)}")
        if self.quantize != "f32" and self.format != "gguf":
            raise ConfigError(
                f"quantize={self.quantize} is for format=gguf; format={self.format} keeps weights as they are"
            )
        if self.prompt_format not in ("auto", "chat", "text"):
            raise ConfigError(f"prompt_format={self.prompt_format!r} is not one of auto, chat, text")
        for name in ("checkpoint.keep_best", "stop.patience"):
            group, _, field_name = name.partition(".")
            if getattr(getattr(self, group), field_name) and not self.validation.every_steps:
                raise ConfigError(f"{name} needs validation.every_steps greater than 0")
        if self.trainer.processes > 1 and self.phase in TRAINING_PHASES:
            self._check_processes()
        if self.trainer.step_in_backward and self.phase in TRAINING_PHASES:
            self._check_step_in_backward()
        if self.batch.auto and (self.phase == "rlhf" or self.trainer.strategy == "fsdp"):
            where = "phase=rlhf" if self.phase == "rlhf" else "trainer.strategy=fsdp"
            raise ConfigError(f"batch.auto cannot try what fits with {where}; set batch.micro_size")
        if self.phase == "rlhf":
            self._check_rlhf()
        if self.phase == "evaluate" and self.inference is not None:
            sampling = self.inference.config.sampling
            if self.system or sampling != type(sampling)(max_tokens=sampling.max_tokens):
                raise ConfigError(
                    "phase=evaluate answers greedily and without a system message; only max_tokens may be set"
                )
        if self.data is None and self.phase in DATA_PHASES:
            raise ConfigError(f"phase={self.phase} needs data, and domain={self.domain} has none for it")

    def _check_stretch(self) -> None:
        said = f"stretch_context={self.stretch_context}"
        if self.phase not in TRAINING_PHASES:
            raise ConfigError(f"{said} is for phases that train, not for phase={self.phase}")
        if self.stretch_context < 0 or not self.init_from:
            raise ConfigError(f"{said} makes the context of a trained model longer; name it in init_from=")
        if self.adapter is not None:
            raise ConfigError(
                f"{said} changes the base that adapter={self.adapter.name} stands on; train without adapter= first"
            )

    def _check_adapter(self) -> None:
        said = f"adapter={self.adapter.name}"
        if self.phase not in TRAINING_PHASES:
            raise ConfigError(
                f"{said} is for phases that train; phase={self.phase} takes the adapter that init_from= names"
            )
        if not self.init_from:
            raise ConfigError(f"{said} stands on a trained model, which stays as it is; name it in init_from=")
        if self.keep_layers:
            raise ConfigError(
                f"{said} stands on a whole model; train the one with keep_layers={self.keep_layers} first"
            )
        if self.trainer.tensor_parallel > 1:
            raise ConfigError(
                f"{said} cannot be had with trainer.tensor_parallel={self.trainer.tensor_parallel}; set 1"
            )
        if self.trainer.strategy == "fsdp" and self.adapter.name.rpartition(":")[2] == "qlora":
            raise ConfigError(
                f"{said} is not proven with trainer.strategy=fsdp, which cuts weights; set trainer.strategy=ddp"
            )

    def _check_processes(self) -> None:
        count, batch, rollout = self.trainer.shares, self.batch, self.rollout
        what = "processes" if self.trainer.tensor_parallel == 1 else "groups of processes"
        if self.phase != "rlhf" and batch.size % (batch.micro_size * count):
            even = batch.size // count if batch.size % count == 0 else 0
            raise ConfigError(
                f"batch.size={batch.size} must be a multiple of batch.micro_size={batch.micro_size} x {count} {what}"
                f"; set batch.{f'micro_size={even}' if even else f'size={batch.micro_size * count}'}"
            )
        if self.phase == "rlhf" and rollout.prompts % (rollout.updates * count):
            raise ConfigError(
                f"rollout.prompts={rollout.prompts} must be a multiple of rollout.updates={rollout.updates} x {count} "
                "processes"
            )

    def _check_step_in_backward(self) -> None:
        wanted = {
            "trainer.grad_clip": (self.trainer.grad_clip, 0),
            "guard.policy": (self.guard.policy, "off"),
            "batch.micro_size": (self.batch.micro_size, self.batch.size),
            "batch.auto": (self.batch.auto, False),
            "trainer.devices": (self.trainer.processes, 1),
        }
        for name, (value, needed) in wanted.items():
            if value != needed:
                raise ConfigError(
                    f"trainer.step_in_backward=true lets go of each gradient at once, so there is no clipping, no "
                    f"accumulation, no guard and one process: {name}={value} must be {needed}"
                )
        if self.phase == "rlhf" or self.precision == "fp16":
            what = "phase=rlhf" if self.phase == "rlhf" else "precision=fp16"
            raise ConfigError(f"trainer.step_in_backward=true cannot be had with {what}")

    def _check_rlhf(self) -> None:
        if self.validation.every_steps:
            raise ConfigError("phase=rlhf has no held-out loss: set validation.every_steps=0, and phase=evaluate")
        if self.trainer.workers:
            raise ConfigError(
                f"trainer.workers={self.trainer.workers} has nothing to do in phase=rlhf, whose prompts are tokenised "
                "before it starts; set it to 0"
            )
        if self.trainer.max_steps % self.rollout.updates:
            raise ConfigError(
                f"trainer.max_steps={self.trainer.max_steps} must be a multiple of "
                f"rollout.updates={self.rollout.updates}"
            )
        sampling = self.inference.config.sampling if self.inference is not None else None
        if sampling is not None and (sampling.temperature <= 0 or sampling.top_k or sampling.top_p < 1):
            raise ConfigError(
                "phase=rlhf learns from samples of the policy itself, so inference.sampling.temperature="
                f"{sampling.temperature} must be greater than 0, and top_k={sampling.top_k} and top_p={sampling.top_p} "
                "off (0 and 1), or the ratios would be of another distribution"
            )
