"""Makes tests/golden: what `transformers` computes on tiny random models and on the demo's SmolLM2-135M.

    python -m pip install torch accelerate     # beside jaxslm[dev]; the golden files were made in the floor lane
    python -m scripts.make_golden [--demo DIR]

Weights are drawn by `tests.tiny.tiny_params` and not stored; their hash is. The SmolLM2 prompts hold excerpts of job
postings by the U.S. Department of Labor (O*NET, CC BY 4.0; attribution in the README that `jaxslm fetch-demo` writes).
"""

import argparse
import json
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from jaxslm.checkpoint import params_sha256
from jaxslm.config import ModelConfig, PromptConfig
from jaxslm.convert.gguf import GGUF
from jaxslm.data_files import read_items, read_queries
from jaxslm.prompt import Prompt
from tests.demo_data import GGUF_NAME
from tests.tiny import TINY_CONFIGS, tiny_params, write_hf_folder

GOLDEN = Path(__file__).parents[1] / "tests" / "golden"
PARITY_CONFIGS = {name: config for name, config in TINY_CONFIGS.items() if isinstance(config.mlp_width, int)}
"""Those that Hugging Face can express."""
TOLERANCES = {"norm": 1e-5, "rope": 1e-4, "attention": 1e-5, "mlp": 1e-5, "layer": 1e-5, "logits": 1e-5}
"""Largest absolute difference. At position 2047 one unit in the last place of a frequency turns by up to 1e-4."""
POSITIONS = np.array([0, 1, 2, 5, 17, 130, 700, 2047], np.int32)


def inputs(config: ModelConfig) -> dict[str, np.ndarray]:
    """Returns the inputs of all parts: token ids [2, 8], hidden states [2, 8, D], query heads [2, 8, N, H]."""
    generator = np.random.default_rng(1)
    heads = config.kv_heads_by_layer[0] * config.queries_per_kv
    return {
        "tokens": generator.integers(0, config.vocab_size, (2, 8), np.int32),
        "x": generator.standard_normal((2, 8, config.width), np.float32),
        "q": generator.standard_normal((2, 8, heads, config.head_dim), np.float32),
    }


def reference(config: ModelConfig, given: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns what `transformers` computes in float32, per part of the first layer and as logits of all tokens."""
    import torch
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        source = write_hf_folder(Path(folder) / "hf", config)
        model: Any = AutoModelForCausalLM.from_pretrained(source, dtype="float32", attn_implementation="eager").eval()
    if config.family == "qwen3":
        from transformers.models.qwen3.modeling_qwen3 import apply_rotary_pos_emb
    else:
        from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
    tokens, x, q = (torch.from_numpy(given[name]) for name in ("tokens", "x", "q"))
    T = tokens.shape[1]
    layer, rotary = model.model.layers[0], model.model.rotary_emb
    causal = torch.full((1, 1, T, T), torch.finfo(torch.float32).min).triu(1)
    angles = rotary(x, torch.arange(T)[None])
    options = {"position_embeddings": angles, "attention_mask": causal}
    with torch.no_grad():
        far = rotary(x, torch.from_numpy(POSITIONS)[None])
        outputs = {
            "norm": layer.input_layernorm(x),
            "rope": apply_rotary_pos_emb(q, q, *far, unsqueeze_dim=2)[0],
            "attention": layer.self_attn(hidden_states=x, **options)[0],
            "mlp": layer.mlp(x),
            "layer": layer(x, **options),
            "logits": model(tokens.long()).logits,
        }
    return {name: output.numpy() for name, output in outputs.items()}


def smollm2_prompts(demo: Path) -> tuple[Prompt, list[list[int]]]:
    """Returns 20 rows of real queries and postings: 16 cut to 128 tokens, three to 256 and one to 512."""
    tokenizer_json = GGUF(demo / "model" / GGUF_NAME).read_tokenizer_files()["tokenizer.json"].decode()
    items = list(read_items(demo / "jobs" / "items.jsonl").values())
    queries = read_queries(demo / "jobs" / "bls.jsonl")[::80][:20]
    rows = []
    for number, query in enumerate(queries):
        max_tokens = 128 if number < 16 else 256 if number < 19 else 512
        prompt = Prompt(tokenizer_json, PromptConfig(template="yes-no", max_tokens=max_tokens))
        # Every second item is relevant.
        item = next(item for item in items if item.id == query.items[0].id) if number % 2 else items[37 * number]
        built = prompt.encode(query.query, [item])
        rows.append(built.prefix_ids + built.item_ids[0])
    return prompt, rows


def smollm2(demo: Path) -> dict[str, np.ndarray]:
    """Returns rows of token ids, laid end to end, and the logits of (no, yes) by `transformers`' load of the GGUF."""
    import torch
    from transformers import AutoModelForCausalLM

    prompt, rows = smollm2_prompts(demo)
    # Not through jaxslm: Hugging Face's own reading of the file.
    model: Any = AutoModelForCausalLM.from_pretrained(demo / "model", gguf_file=GGUF_NAME, dtype="float32").eval()
    with torch.no_grad():
        last = [model(torch.tensor([row]), logits_to_keep=1).logits[0, -1].numpy() for row in rows]
    return {
        "tokens": np.concatenate(rows).astype(np.int32),
        "lengths": np.array([len(row) for row in rows], np.int32),
        "label_token_ids": np.array(prompt.label_token_ids, np.int32),
        "label_logits": np.stack(last)[:, list(prompt.label_token_ids)].astype(np.float32),
    }


def write(name: str, arrays: dict[str, np.ndarray], **facts: Any) -> None:
    """Writes one golden file: the arrays, and `facts` with the versions as JSON."""
    versions = {package: version(package) for package in ("torch", "transformers", "numpy")}
    np.savez_compressed(GOLDEN / f"{name}.npz", **arrays, facts=np.array(json.dumps(facts | {"versions": versions})))  # type: ignore[arg-type]
    print(f"{name}.npz: {(GOLDEN / f'{name}.npz').stat().st_size:,} bytes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--demo", type=Path, help="folder of `jaxslm fetch-demo`; without it SmolLM2's file is left alone"
    )
    demo = parser.parse_args().demo
    GOLDEN.mkdir(exist_ok=True)
    for name, config in PARITY_CONFIGS.items():
        given = inputs(config)
        facts = {"config": config.model_dump(mode="json"), "params_sha256": params_sha256(tiny_params(config))}
        write(name, given | reference(config, given), **facts, tolerances=TOLERANCES)
    if demo:
        write("smollm2-135m", smollm2(demo), tolerances={"label_logits": 1e-4}, source=GGUF_NAME)


if __name__ == "__main__":
    main()
