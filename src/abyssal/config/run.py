"""A whole run: model, data, objective, optimizer and schedules, as one frozen object."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from abyssal.config.frozen import Frozen
from abyssal.config.model import ModelConfig
from abyssal.config.parallel import ParallelConfig
from abyssal.config.schedule import ValueSchedule
from abyssal.errors import nearest


class TokenizerConfig(Frozen):
    """Where token ids come from: an existing tokenizer.json, or one trained on the corpus."""

    path: str | None = Field(default=None, description="an existing tokenizer.json; none: train one on the corpus")
    train_bytes: PositiveInt = Field(default=64_000_000, description="at most this much text trains the tokenizer")


class SourceConfig(Frozen):
    """A part of the corpus of which a share of the training sequences is taken."""

    name: str = Field(pattern=r"^[A-Za-z0-9_-]+$")
    paths: tuple[str, ...] = Field(min_length=1, description="as the entries of data.corpus")
    weight: PositiveFloat = Field(default=1.0, description="its share is this over the sum of all")


class DataConfig(Frozen):
    """Which documents, and which of them are never trained on.

    A document goes to the held-out set where sha256(relative path) mod `split_modulus` is 0, to validation where it
    is 1, and to training otherwise.
    """

    corpus: tuple[str, ...] = Field(default=(), description="folders, text files, .jsonl, .parquet or hf: data sets")
    sources: tuple[SourceConfig, ...] = Field(default=(), description="in place of corpus: a mixture of named parts")
    weights: dict[str, PositiveFloat] = Field(default={}, description="replace those of the sources of these names")
    suffixes: tuple[str, ...] = Field(default=(".py", ".md", ".txt", ".rst"), description="file names read in folders")
    exclude: tuple[str, ...] = Field(default=(), description="folder names left out, wherever they stand")
    text_field: str = Field(default="text", description="the field of a .jsonl line that holds the document")
    folder: str | None = Field(default=None, description="prepared shards to use or make; none: the run's own folder")
    split_modulus: int = Field(default=20, ge=3)
    on_undecodable: Literal["fail", "skip"] = Field(default="fail", description="a file that is not UTF-8")
    duplicates: Literal["keep", "exact", "near"] = Field(
        default="keep", description="which training documents go because of an earlier one"
    )
    near_threshold: float = Field(default=0.8, gt=0, le=1, description="likeness from which documents are near")
    min_characters: NonNegativeInt = Field(default=0, description="shorter training documents are left out")
    max_line_characters: PositiveInt | None = Field(
        default=None, description="training documents with a longer line are left out"
    )
    max_repeated_lines: float = Field(
        default=1.0, ge=0, le=1, description="largest share of a training document's lines that repeat an earlier one"
    )
    fim_rate: float = Field(default=0.0, ge=0, le=1, description="share of training documents learnt middle last")
    split_merged_rate: float = Field(
        default=0.0, ge=0, le=1, description="share of tokens of punctuation and line ends taken apart in training"
    )
    mask_documents: bool = Field(default=False, description="whether attention stays inside a document")

    @model_validator(mode="after")
    def _check(self) -> Self:
        names = [source.name for source in self.sources]
        if self.sources and self.corpus:
            raise ValueError(
                f"corpus={list(self.corpus)}: must be empty beside data.sources; "
                'a recipe takes an inherited one away with unset = ["data.corpus"]'
            )
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"sources: two are named {name!r}; each must have a name of its own")
        for name in self.weights:
            if name not in names:
                known = ", ".join(names) or "none, since data.sources is empty"
                raise ValueError(f"weights.{name}: no such source{nearest(name, names)}; there are: {known}")
        return self

    @property
    def mixture(self) -> dict[str, float]:
        """The weight of each named source."""
        return {source.name: self.weights.get(source.name, source.weight) for source in self.sources}

    @property
    def entries(self) -> list[tuple[str, str]]:
        """Every entry of the corpus with the name of its source, "" where sources have none."""
        return [("", entry) for entry in self.corpus] or [(s.name, path) for s in self.sources for path in s.paths]


class TrainConfig(Frozen):
    """How long and in what portions."""

    tokens: PositiveInt = Field(description="length of the run")
    time_budget_s: PositiveFloat | None = Field(
        default=None, description="replaces tokens by what a measurement at the start says this machine can do"
    )
    sequence_length: int = Field(ge=8)
    micro_batch_size: PositiveInt = Field(description="sequences a forward and backward pass")
    batch_multiple: PositiveInt = Field(
        default=1, description="the batch ramp is rounded to the nearest multiple of this"
    )
    compute_dtype: Literal["auto", "float32", "bfloat16", "float64"] = "auto"
    threads: NonNegativeInt = Field(default=0, description="0: as many as there are cores")
    log_every_steps: PositiveInt = 10


class OptimizerConfig(Frozen):
    """AdamW with fp32 master weights, or Muon for the hidden matrices beside it. Paper: §4.2; eps is not published."""

    name: Literal["adamw", "muon"] = "adamw"
    betas: tuple[float, float] = (0.9, 0.95)
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.1
    max_grad_norm: PositiveFloat = 1.0
    muon_momentum: float = Field(default=0.95, ge=0.0, lt=1.0)
    muon_lr_scale: PositiveFloat = Field(default=1.0, description="Muon's learning rate over the schedule's")
    beside_muon_lr_scale: PositiveFloat = Field(
        default=1.0, description="with Muon: AdamW's learning rate over the schedule's"
    )


class ObjectiveConfig(Frozen):
    """Constants of the training objective that do not change. Paper: §2.1.2 eq. 17."""

    balance_alpha: NonNegativeFloat = 1e-4


class ScheduleConfig(Frozen):
    """What changes with the tokens seen. Paper: §4.2."""

    learning_rate: ValueSchedule
    batch_size: ValueSchedule = Field(description="sequences a step")
    bias_update_speed: ValueSchedule = Field(description="gamma of the auxiliary-loss-free balancing")
    mtp_weight: ValueSchedule = Field(description="lambda of eq. 25")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.batch_size.lowest < 1:
            raise ValueError(f"batch_size: {self.batch_size.lowest:g} sequences a step: must be at least 1")
        return self


class CheckpointConfig(Frozen):
    """When the training state is written."""

    every_steps: PositiveInt = 500
    keep: PositiveInt = Field(default=2, description="the newest this many stay")
    keep_every: NonNegativeInt = Field(default=0, description="every state of so many stays for good; 0: none")
    export_every_steps: NonNegativeInt = Field(default=0, description="a model directory so often; 0: only at the end")


class GuardConfig(Frozen):
    """Which updates are refused: a loss or gradient norm above median + sigmas * sigma of the accepted steps before."""

    sigmas: PositiveFloat = 10.0
    window_steps: PositiveInt = Field(default=128, description="the median is that of so many accepted steps")
    min_steps: PositiveInt = Field(default=32, description="before so many, only what is not finite is refused")
    rollback_refusals: PositiveInt = Field(default=3, description="so many refused batches ...")
    rollback_steps: PositiveInt = Field(default=20, description="... within so many steps, and the run goes back")
    max_rollbacks: NonNegativeInt = Field(default=3, description="after so many the run ends")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.min_steps > self.window_steps:
            raise ValueError(f"min_steps={self.min_steps}: must be at most window_steps={self.window_steps}")
        return self


class EmaConfig(Frozen):
    """An exponential moving average of the weights, beside them."""

    decay: float = Field(default=0.0, ge=0.0, lt=1.0, description="0: none is kept")


class EvaluationConfig(Frozen):
    """When the validation documents are scored."""

    every_steps: PositiveInt = 200
    max_bytes: PositiveInt | None = Field(default=None, description="score at most this many bytes; none: all")


class RunConfig(Frozen):
    """One run, validated and resolved: what a recipe becomes."""

    name: str = Field(min_length=1, pattern=r"^[A-Za-z0-9_.-]+$")
    description: str = ""
    seed: NonNegativeInt = 0
    init_from: str | None = Field(default=None, description="a model directory to continue from")
    model: ModelConfig
    tokenizer: TokenizerConfig = TokenizerConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig
    objective: ObjectiveConfig = ObjectiveConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    guard: GuardConfig = GuardConfig()
    ema: EmaConfig = EmaConfig()
    parallel: ParallelConfig = ParallelConfig()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.train.sequence_length > self.model.max_position_embeddings:
            raise ValueError(
                f"train.sequence_length={self.train.sequence_length}: must be at most "
                f"model.max_position_embeddings={self.model.max_position_embeddings}"
            )
        if self.train.sequence_length <= self.model.num_nextn_predict_layers:
            raise ValueError(
                f"train.sequence_length={self.train.sequence_length}: must be larger than "
                f"model.num_nextn_predict_layers={self.model.num_nextn_predict_layers}"
            )
        return self

    def batch_size_at(self, tokens: float) -> int:
        """Return the sequences of the step that starts after `tokens`: the ramp's nearest multiple, at least one."""
        multiple = self.train.batch_multiple
        # not rounded down: half a multiple less at every step would be 2% more steps in the published warm-up
        return max(1, int(self.schedule.batch_size.at(tokens, self.train.tokens) / multiple + 0.5)) * multiple
