"""What the pipeline does beside the recipe of `configs/`, and how much it measures."""

from typing import Annotated

from pydantic import Field

from jaxslm.config import Positive, Settings
from jaxslm.prune.depth import DepthCriterion

Overrides = Annotated[tuple[str, ...], Field(strict=False)]
"""`a.b=value`, as `--set` takes them."""


class RecipeSettings(Settings):
    """Files of `configs/`, without suffix, that the stages read."""

    encoder: str = "cpu-encoder"
    ranker: str = "cpu"
    recover: str = "cpu-recover"
    compressor: str = "cpu-compressor"


class MeasureSettings(Settings):
    """How much is measured.

    Attributes:
        queries, candidates: held-out queries, and the length of the BM25 list of each; judged items are added.
        speed_requests, speed_items: requests that are scored together, and the items of each. repeats: timed ones.
    """

    queries: Positive = 40
    candidates: Positive = 20
    speed_requests: Positive = 2
    speed_items: Positive = 50
    repeats: Positive = 3


class QuickstartSettings(Settings):
    """Settings of a run.

    Attributes:
        recipe: the configs. encoder, ranker, recover, compressor: `a.b=value` overrides of them. The defaults shorten
            them to what fits into minutes: few updates, and for the compressor two ks and no reading of text beside
            its vectors but the teacher's.
        mlp_keep, by_layer, drop_layers, depth_criterion, width_multiple, calibration_tokens: of `jaxslm prune`.
    """

    recipe: RecipeSettings = RecipeSettings()
    encoder: Overrides = ("steps=56",)
    ranker: Overrides = ("steps=15", "save_every=15")
    recover: Overrides = (
        "steps=6",
        "save_every=6",
        "optimiser.learning_rate=3e-5",
        "optimiser.warmup_steps=2",
    )
    compressor: Overrides = (
        "steps=40",
        "save_every=20",
        "evaluation_ks=[]",
        "compressor.ks=[1, 8]",
        "curriculum.text_share=0.0",
        "losses.alignment=0.0",
        "losses.hidden_alignment=0.0",
        "optimiser.warmup_steps=5",
    )
    mlp_keep: Positive = 1024
    by_layer: bool = True
    drop_layers: Annotated[int, Field(ge=0)] = 0
    depth_criterion: DepthCriterion = "keep-last-1"
    width_multiple: Positive = 128
    calibration_tokens: Positive = 24_576
    measure: MeasureSettings = MeasureSettings()
