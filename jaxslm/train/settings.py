"""Settings of a training run: one frozen model per `jaxslm train` verb. Paths are relative to the working directory."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from jaxslm.config import Positive, PromptConfig, Settings
from jaxslm.train.data_settings import DataSettings, NonNegative, PairSettings

PositiveFloat = Annotated[float, Field(gt=0)]
Weight = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class OptimiserSettings(Settings):
    """AdamW with linear warm-up and cosine decay.

    Attributes:
        learning_rate: the highest, reached after `warmup_steps` updates.
        final_fraction: share of it that is left at the last update.
        label_head_factor: times that for the two rows of the vocabulary head that are the labels (they are parameters
            of their own when embeddings are frozen; otherwise this must stay 1).
        weight_decay: decoupled, on matrices of layers only.
        clip_norm: largest global norm of a gradient.
        accumulate: micro-batches per update and device.
    """

    learning_rate: PositiveFloat
    warmup_steps: NonNegative = 0
    final_fraction: Fraction = 0.1
    label_head_factor: PositiveFloat = 1.0
    weight_decay: Weight = 0.01
    clip_norm: PositiveFloat = 1.0
    accumulate: Positive = 1


class EvaluationSettings(Settings):
    """Held-back queries that choose the best checkpoint.

    Attributes:
        items, queries: files, or `hf://owner/name/split`. limit: queries taken, chosen by hash. k: length of the BM25
            candidate list.
        every: updates between evaluations; the last update is always evaluated.
    """

    items: str
    queries: str
    limit: Positive = 200
    k: NonNegative = 50
    every: Positive


class TrainingSettings(Settings):
    """What both kinds of training share.

    Attributes:
        model: the checkpoint to start from.
        layers: keep its first n layers; all if None.
        prompt: replaces the checkpoint's prompt; the result carries it.
        steps: updates in all.
        save_every: updates between saves; a killed run loses no more than these.
        freeze_embeddings: train everything but the embedding table and the vocabulary head; a ranker's two label rows
            are trained all the same.
        train_layers: train only the last n layers (with the final norm and the label rows): up to three times as many
            updates in a given time. All if None; needs `freeze_embeddings`.
        dtype: compute dtype, "auto" is bfloat16 on GPU and TPU, float32 on CPU. Parameters are float32 always.
        remat: compute each layer's activations again in the backward pass: less memory, a third more work.
        tensorboard: write the log's numbers as TensorBoard events too.
    """

    model: str
    layers: Positive | None = None
    prompt: PromptConfig | None = None
    steps: Positive
    save_every: Positive
    freeze_embeddings: bool = False
    train_layers: Positive | None = None
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    remat: bool = False
    tensorboard: bool = False
    optimiser: OptimiserSettings
    evaluation: EvaluationSettings | None = None

    @model_validator(mode="after")
    def _frozen_from_below(self) -> "TrainingSettings":
        if self.train_layers is not None and not self.freeze_embeddings:
            raise ValueError("train_layers needs freeze_embeddings = true")
        return self

    @model_validator(mode="after")
    def _label_head_is_its_own_parameter(self) -> "TrainingSettings":
        if self.optimiser.label_head_factor != 1 and not self.freeze_embeddings:
            raise ValueError("optimiser.label_head_factor needs freeze_embeddings = true")
        return self


class EncoderTraining(TrainingSettings):
    """`jaxslm train encoder`: contrastive warm start.

    Attributes:
        temperature: of the softmax over in-batch cosines.
        roles: weight of the term by which tokens of query and item can be told apart.
    """

    data: PairSettings
    temperature: PositiveFloat = 0.05
    roles: Weight = 2.0


class LossWeights(Settings):
    """Weights of the terms of a ranker's loss (`jaxslm.train.losses`); terms of weight 0 are not computed.

    Attributes:
        mean_state: the sum of the label terms once more, with log-odds read from the mean of an item's states by the
            same label rows. It brings the signal to every token while the last one knows nothing yet; scoring does not
            change.
        distillation, list_distillation: label KL and list KL to the teacher. hidden: cosine of the last states.
        distillation_temperature: of both KLs.
    """

    binary_cross_entropy: Weight = 1.0
    list_softmax: Weight = 0.0
    pairwise_logistic: Weight = 0.0
    regression_compatible: Weight = 0.0
    mean_state: Weight = 0.0
    distillation: Weight = 0.0
    list_distillation: Weight = 0.0
    hidden: Weight = 0.0
    distillation_temperature: PositiveFloat = 1.0

    @property
    def of_labels(self) -> dict[str, float]:
        """The terms that compare with labels, by name of the loss, without those of weight 0."""
        names = ("binary_cross_entropy", "list_softmax", "pairwise_logistic", "regression_compatible")
        return {name: weight for name in names if (weight := getattr(self, name))}

    @property
    def needs_teacher(self) -> bool:
        """Whether a term compares with a teacher's logits."""
        return bool(self.distillation or self.list_distillation)


class RankerLosses(LossWeights):
    """Weights of the terms of `jaxslm train ranker`.

    Attributes:
        every_state: cosine of the final states of every token to the teacher's: a target per token where `hidden` has
            one per item, which is what a pruned model recovers by in few updates.
    """

    every_state: Weight = 0.0

    @property
    def compares_states(self) -> bool:
        """Whether a term compares hidden states with the teacher's."""
        return bool(self.hidden or self.every_state)


class TeacherSettings(Settings):
    """A teacher that scores every batch on the fly. Stored scores are `data.teacher_scores` instead.

    Attributes:
        checkpoint: a ranker with the student's tokenizer and prompt.
    """

    checkpoint: str


class RankerTraining(TrainingSettings):
    """`jaxslm train ranker`: fine-tuning, distillation, and the recovery of pruned models.

    Attributes:
        comparison_layer: put one layer on top that starts by scoring as a contrastive stage does
            (`jaxslm.train.comparison`); for a `model` of the Llama family from `jaxslm train encoder`: it needs
            attention without q/k norm, so Qwen3 is refused.
    """

    comparison_layer: bool = False
    data: DataSettings
    losses: RankerLosses = RankerLosses()
    teacher: TeacherSettings | None = None

    @model_validator(mode="after")
    def _losses_have_what_they_compare_with(self) -> "RankerTraining":
        weights = self.losses
        if not (weights.of_labels or weights.needs_teacher or weights.compares_states):
            raise ValueError("losses: every weight is 0")
        stored = self.data.teacher_scores is not None
        if stored and self.teacher:
            raise ValueError("teacher and data.teacher_scores exclude one another")
        if weights.needs_teacher and not (stored or self.teacher):
            raise ValueError("losses: distillation needs [teacher] checkpoint or data.teacher_scores")
        if weights.compares_states and not self.teacher:
            raise ValueError("losses: hidden and every_state need [teacher] checkpoint")
        if (stored or self.teacher) and not (weights.needs_teacher or weights.compares_states):
            raise ValueError("losses: a teacher is given, but every weight that uses it is 0")
        return self
