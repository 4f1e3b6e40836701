"""`jaxslm.json` in an exported folder: what makes its model a ranker, which no file of Hugging Face's says."""

import json
from pathlib import Path

from jaxslm.config import Calibration, PromptConfig, Settings, validate
from jaxslm.errors import InputError

RANKER_FILE = "jaxslm.json"


class RankerFile(Settings):
    """Content of `jaxslm.json`.

    Attributes:
        prompt: what the ranker reads, its labels among it.
        calibration: of its probabilities, None if it has none; good for `params_sha256`, the exported parameters, and
            `template_sha256`, the whole prompt, alone.
    """

    prompt: PromptConfig
    calibration: Calibration | None
    params_sha256: str
    template_sha256: str


def read_ranker_file(folder: Path) -> RankerFile | None:
    """Returns what an export says of its ranker, None if the folder is of another origin.

    Raises:
        InputError: broken JSON, or a field against its rule.
    """
    file = folder / RANKER_FILE
    if not file.is_file():
        return None
    try:
        tree = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file}: broken JSON ({error})") from None
    return validate(RankerFile, tree, str(file))
