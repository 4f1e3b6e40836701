"""Settings of `jaxslm train compressor`."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from jaxslm.config import NonEmpty, Pooling, Positive, Settings
from jaxslm.train.data_settings import DataSettings, NonNegative
from jaxslm.train.settings import (
    Fraction,
    LossWeights,
    OptimiserSettings,
    PositiveFloat,
    TeacherSettings,
    TrainingSettings,
    Weight,
)


class CompressorSettings(Settings):
    """What the compressor is and what it starts from.

    Attributes:
        encoder: a checkpoint whose decoder becomes the encoder; the run's `model` if None. layers: its first n layers,
            all if None.
        start: a checkpoint whose whole compressor is trained further; its encoder, pooling and tokenizer stay.
        ks: how many vectors an item may become; one is drawn for each update.
        pooling: "mean" of segments, or the "last" states as in MixLM.
        projector: "random", with vectors of the token embeddings' size, or "pass_through", which hands the encoder's
            states on (`jaxslm.compress.projector`); for a ranker that has grown from the encoder.
        max_item_tokens: how much of an item the encoder reads.
        behind_prompt: it reads items behind its checkpoint's prompt without a query, as `jaxslm train encoder` taught
            it (`Prompt.item_prefix_ids`).
        answer_tokens: how many of the prompt's last tokens stand behind the vectors.
        text_fields, max_text_tokens: fields of items that stay text beside the vectors, and the most tokens of them.
    """

    encoder: str | None = None
    layers: Positive | None = None
    start: str | None = None
    ks: Annotated[tuple[Positive, ...], Field(min_length=1, strict=False)] = (1, 2, 4, 8, 16)
    pooling: Pooling = "mean"
    projector: Literal["random", "pass_through"] = "random"
    max_item_tokens: Positive
    behind_prompt: bool = False
    answer_tokens: Positive = 1
    text_fields: Annotated[tuple[NonEmpty, ...], Field(strict=False)] = ()
    max_text_tokens: NonNegative = 0

    @model_validator(mode="after")
    def _fields_agree(self) -> "CompressorSettings":
        if self.start is not None and (self.encoder is not None or self.layers is not None):
            raise ValueError("start excludes encoder and layers: the compressor comes from there")
        if self.start is not None and self.behind_prompt:
            raise ValueError("start excludes behind_prompt: what stands before an item comes from there")
        if sorted(set(self.ks)) != list(self.ks):
            raise ValueError(f"ks {self.ks}: must ascend")
        if bool(self.text_fields) != bool(self.max_text_tokens):
            raise ValueError("text_fields and max_text_tokens belong together")
        return self


class CompressorOptimiser(OptimiserSettings):
    """AdamW with a rate for each part; the schedule begins after `curriculum.projector_steps`.

    Attributes:
        learning_rate: of the projector.
        encoder_factor, ranker_factor: times that for the encoder and for the ranker; 0 leaves a part as it is. Of a
            frozen encoder the pooled states of all items are computed once, and an update costs little more than the
            ranker's few tokens; they take 4 * sum(ks) * width bytes an item of host memory.
    """

    encoder_factor: Weight = 1.0
    ranker_factor: Weight = 1.0


class CompressorLosses(LossWeights):
    """Weights of the terms: those of a ranker, on compressed items, and the alignment with the same ranker on text.

    Attributes:
        alignment: KL from the log-odds on text to those on vectors. hidden_alignment: cosine of the last states. No
            gradient flows into the text side.
    """

    alignment: Weight = 0.0
    hidden_alignment: Weight = 0.0

    @property
    def aligns(self) -> bool:
        """Whether a term compares with the ranker on text."""
        return bool(self.alignment or self.hidden_alignment)

    @property
    def uses_teacher(self) -> bool:
        """Whether a term compares with a teacher."""
        return bool(self.needs_teacher or self.hidden)


class Curriculum(Settings):
    """What changes from update to update.

    Attributes:
        projector_steps: first updates, in which only the projector is trained, at `projector_rate` and the largest k.
        first_phase: share of the later updates in which the terms of the teacher are multiplied by `quiet`; in the
            others those of alignment are (MixLM, 2512.07846: align, then task).
        text_share: share of the updates after `projector_steps` that train the ranker on full text.
        noise_share: last share of all updates, in which vectors are rounded as int8 records round them.
    """

    projector_steps: NonNegative = 0
    projector_rate: PositiveFloat = 1e-3
    first_phase: Fraction = 0.5
    quiet: Fraction = 0.2
    text_share: Fraction = 0.25
    noise_share: Fraction = 0.1


class CompressorTraining(TrainingSettings):
    """`jaxslm train compressor`: encoder, projector and ranker together. `layers` are the ranker's.

    Attributes:
        teacher: reads full text; the ranker as it starts if None and `losses` need one that is not stored in
            `data.teacher_scores`.
        evaluation_ks: the best checkpoint has the highest mean nDCG@10 over these; the largest of `ks` if empty.
    """

    compressor: CompressorSettings
    data: DataSettings
    losses: CompressorLosses = CompressorLosses()
    optimiser: CompressorOptimiser
    curriculum: Curriculum = Curriculum()
    teacher: TeacherSettings | None = None
    evaluation_ks: Annotated[tuple[Positive, ...], Field(strict=False)] = ()

    @model_validator(mode="after")
    def _parts_fit(self) -> "CompressorTraining":
        weights, curriculum = self.losses, self.curriculum
        if not (weights.of_labels or weights.uses_teacher or weights.aligns):
            raise ValueError("losses: every weight is 0")
        stored = self.data.teacher_scores is not None
        if stored and self.teacher:
            raise ValueError("teacher and data.teacher_scores exclude one another")
        if stored and weights.hidden:
            raise ValueError("losses: hidden needs a teacher's states, not stored scores")
        if (stored or self.teacher) and not weights.uses_teacher:
            raise ValueError("losses: a teacher is given, but every weight that uses it is 0")
        if curriculum.projector_steps >= self.steps:
            raise ValueError(f"curriculum.projector_steps {curriculum.projector_steps}: must be less than steps")
        if curriculum.text_share and not (weights.of_labels or weights.uses_teacher):
            raise ValueError("curriculum.text_share: updates on text need labels or a teacher")
        if curriculum.text_share and not self.optimiser.ranker_factor:
            raise ValueError("curriculum.text_share: a frozen ranker learns nothing from text, set it to 0")
        if unknown := set(self.evaluation_ks) - set(self.compressor.ks):
            raise ValueError(f"evaluation_ks: {sorted(unknown)[0]} is none of compressor.ks")
        return self

    @property
    def chosen_ks(self) -> tuple[int, ...]:
        """`evaluation_ks`, or the largest of `ks`."""
        return self.evaluation_ks or self.compressor.ks[-1:]
