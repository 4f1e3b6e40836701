"""jaxslm: train, prune, compress and serve decoder-only small language models as relevance rankers.

Names load on first use, so that `import jaxslm` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxslm.config import ModelConfig as ModelConfig
    from jaxslm.config import PromptConfig as PromptConfig
    from jaxslm.config import RankerConfig as RankerConfig
    from jaxslm.data_files import Item as Item
    from jaxslm.errors import InputError as InputError
    from jaxslm.score.scorer import Ranker as Ranker
    from jaxslm.score.scorer import Scores as Scores
    from jaxslm.score.scorer import load as load
    from jaxslm.score.scorer import make_score_fn as make_score_fn

_HOMES = {
    "InputError": "jaxslm.errors",
    "Item": "jaxslm.data_files",
    "ModelConfig": "jaxslm.config",
    "PromptConfig": "jaxslm.config",
    "Ranker": "jaxslm.score.scorer",
    "RankerConfig": "jaxslm.config",
    "Scores": "jaxslm.score.scorer",
    "load": "jaxslm.score.scorer",
    "make_score_fn": "jaxslm.score.scorer",
}
__all__ = [
    "InputError",
    "Item",
    "ModelConfig",
    "PromptConfig",
    "Ranker",
    "RankerConfig",
    "Scores",
    "load",
    "make_score_fn",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'jaxslm' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
