"""`jaxslm bench peers`: the same rows, weights and machine through transformers and torch, turn by turn with ours."""

import json
import os
import shutil
import subprocess
import tempfile
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from jaxslm.bench.ablations import reference_logits
from jaxslm.bench.device import Ceilings, floor, measure_ceilings
from jaxslm.bench.score import Runner, default_options, figures, print_floor, timed
from jaxslm.bench.workloads import model_named, random_requests, workload_named
from jaxslm.config import RankerConfig
from jaxslm.convert.export import classifier_tensors, hf_config, hf_tensors, write_hf_model
from jaxslm.errors import InputError
from jaxslm.model.decoder import Params
from jaxslm.progress import console
from jaxslm.score.compiled import compute_dtype
from jaxslm.score.forward import PackRequest


@dataclass(frozen=True)
class Setting:
    """One way to call the peer: see `peer_worker`."""

    attention: str
    keep: int
    batch: int
    compile: bool = False
    cross_encoder: bool = False

    def __str__(self) -> str:
        if self.cross_encoder:
            return f"sentence-transformers CrossEncoder (with tokenisation), batch {self.batch}"
        call = "logits_to_keep=1" if self.keep else "default call (all logits)"
        return f"transformers {self.attention}{', torch.compile' if self.compile else ''}, {call}, batch {self.batch}"


class Peer:
    """A worker process in another interpreter."""

    def __init__(self, python: str, setup: dict[str, Any]) -> None:
        script = Path(__file__).with_name("peer_worker.py")
        environment = os.environ | {"HF_HUB_OFFLINE": "1"}
        self._process = subprocess.Popen(
            [python, str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        if self._process.stdin is None or self._process.stdout is None:
            raise RuntimeError("the process was started without pipes")
        self._requests, self._answers = self._process.stdin, self._process.stdout
        try:
            self.about = self._ask(setup)
        except InputError:
            self.close()
            raise

    def run(self, setting: Setting, save: Path | None = None) -> float | str:
        """Returns the seconds that the setting takes for all rows, or why it does not run."""
        answer = self._ask(asdict(setting) | {"save": None if save is None else str(save)})
        return float(answer["seconds"]) if "seconds" in answer else str(answer["error"])

    def close(self) -> None:
        """Ends the process."""
        with suppress(BrokenPipeError):
            self._requests.close()
        self._answers.close()
        self._process.wait()

    def _ask(self, message: dict[str, Any]) -> dict[str, Any]:
        with suppress(BrokenPipeError):
            self._requests.write(json.dumps(message) + "\n")
            self._requests.flush()
        line = self._answers.readline()
        if not line:
            raise InputError(
                "--peer-python: that interpreter cannot import torch and transformers, or it ran out of memory"
            )
        found: dict[str, Any] = json.loads(line)
        return found


def bench_peers(
    workload: str,
    model: str,
    peer_python: str,
    *,
    dtype: str | None = None,
    repeats: int = 5,
    items: int | None = None,
    batches: tuple[int, ...] = (1, 5, 10, 25, 50),
    threads: int | None = None,
    torch_compile: bool = True,
    ceilings: Ceilings | None = None,
) -> dict[str, Any]:
    """Prints the floor, measures ours and transformers in turns; returns the JSON object of the command line.

    First every way of calling transformers, and the CrossEncoder of sentence-transformers, runs once at each batch
    size, which warms it up and picks its best batch.
    Then ours and each way at its best batch run in turns, `repeats` times, so that a busy machine is busy for all.

    Args:
        workload, model: as `bench_score`; a workload without vectors. peer_python: an interpreter with torch.
        dtype: "float32" or "bfloat16", of ours and the peers; by default the platform's.
        threads: torch's threads; its own default if None.
        ceilings: of this device and dtype; measured if None.

    Raises:
        InputError: an unknown name, a workload with vectors, or no interpreter with torch and transformers.
    """
    shape = workload_named(workload)
    shape = replace(shape, items=items or shape.items)
    if shape.vectors_per_item:
        raise InputError(f"--workload {workload}: peers read text; choose one without vectors")
    check_python(peer_python)
    used = jnp.dtype(dtype or compute_dtype())
    config, params = model_named(model, used)
    ceilings = ceilings or measure_ceilings(used)
    print_floor(shape, config, ceilings)
    (request,) = random_requests(shape, config.model, 1)
    ours = Runner(config, params, [request], default_options())
    logits = ours()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        setup = _write_setup(folder, config, params, request) | {"threads": threads, "dtype": used.name}
        peer = Peer(peer_python, setup)
        try:
            best, failed = _best_batches(peer, shape.items, batches, torch_compile=torch_compile)
            seconds, lost = _in_turns(ours, peer, best, repeats)
            agreement = _agreement(peer, best, folder, logits)
        finally:
            peer.close()
    reference = reference_logits(config, params, request)
    rates = shape.items / seconds["jaxslm"]
    return {
        "workload": workload,
        "model": model,
        **figures(rates, floor(shape, config.model, ceilings), shape.items, ceilings, ours.shape()),
        "max_abs_diff": float(np.abs(logits[: len(reference)] - reference).max()),
        "rows": _rows(shape.items, seconds, agreement),
        "not_measured": failed | lost,
        "versions": peer.about["versions"] | {"jax": jax.__version__},
        "peer_device": peer.about["device"],
    }


def check_python(python: str) -> None:
    """Raises InputError unless `python` is an interpreter that finds torch and transformers; imports neither."""
    if shutil.which(python) is None:
        raise InputError(f"--peer-python {python}: no program that can be run")
    missing = "import importlib.util as u, sys; sys.exit(None in map(u.find_spec, ('torch', 'transformers')))"
    try:
        found = subprocess.run([python, "-c", missing], capture_output=True, check=False, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        raise InputError(f"--peer-python {python}: is no Python interpreter") from None
    if found.returncode:
        raise InputError(f"--peer-python {python}: that interpreter cannot import torch and transformers")


def _write_setup(folder: Path, config: RankerConfig, params: Params, request: PackRequest) -> dict[str, Any]:
    """Writes the request's rows and the models for them; returns what tells the peer's worker of them."""
    rows = np.array([[*request.prefix_ids, *item] for item in request.item_ids], np.int64)
    _write_models(folder, config, params, rows)
    np.save(folder / "rows.npy", rows)
    return {
        "rows": str(folder / "rows.npy"),
        "prefix": len(request.prefix_ids),
        "labels": list(config.label_token_ids),
        "folder": str(folder / "model"),
        "classifier": str(folder / "classifier"),
    }


def _write_models(folder: Path, config: RankerConfig, params: Params, rows: np.ndarray) -> None:
    """Writes `model`, and `classifier` for the CrossEncoder: one label, and a tokenizer that reads `<7>` as token 7."""
    tensors = hf_tensors(params)
    (folder / "model").mkdir()
    write_hf_model(folder / "model", hf_config(config.model), tensors)
    (folder / "classifier").mkdir()
    padding = int(np.setdiff1d(np.arange(config.model.vocab_size), rows)[0])  # the peer looks for the last token but it
    described = hf_config(config.model, classifier=True) | {"pad_token_id": padding}
    write_hf_model(folder / "classifier", described, classifier_tensors(tensors, params, config.label_token_ids))
    words = {f"<{number}>": number for number in range(config.model.vocab_size)}
    tokenizer = Tokenizer(WordLevel(words, unk_token=f"<{padding}>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.save(str(folder / "classifier" / "tokenizer.json"))
    (folder / "classifier" / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "pad_token": f"<{padding}>",
                "model_max_length": rows.shape[1],
                "model_input_names": ["input_ids", "attention_mask"],
            }
        )
    )


def _best_batches(
    peer: Peer, items: int, batches: tuple[int, ...], *, torch_compile: bool
) -> tuple[list[Setting], dict[str, str]]:
    """Returns each way of calling at its fastest batch size, and what did not run, with the reason."""
    sizes = sorted({min(batch, items) for batch in batches})
    ways = [Setting(attention, keep, 1) for keep in (1, 0) for attention in ("sdpa", "eager")]
    if torch_compile:
        ways.append(Setting("sdpa", 1, 1, compile=True))
    ways.append(Setting("sdpa", 1, 1, cross_encoder=True))
    best, failed = [], {}
    for way in ways:
        found: list[tuple[float, Setting]] = []
        for batch in sizes if not way.compile else sizes[-1:]:
            setting = replace(way, batch=batch)
            first = peer.run(setting)
            if isinstance(first, str):
                failed[str(setting)] = first
                continue
            second = peer.run(setting)
            found.append((min(first, second) if not isinstance(second, str) else first, setting))
            console().print(f"{items / found[-1][0]:8.2f} items/s  {setting}", soft_wrap=True)
        if found:
            best.append(min(found, key=lambda pair: pair[0])[1])
    return best, failed


def _in_turns(
    ours: Runner, peer: Peer, settings: list[Setting], repeats: int
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Returns the seconds of each round, NaN where a setting failed, and why those that failed in all of them did."""
    seconds = {name: np.full(repeats, np.nan) for name in ("jaxslm", *map(str, settings))}
    reasons: dict[str, str] = {}
    for number in range(repeats):
        seconds["jaxslm"][number] = timed(ours)
        for setting in settings:
            took = peer.run(setting)
            if isinstance(took, str):
                reasons[str(setting)] = took
            else:
                seconds[str(setting)][number] = took
    lost = {name: why for name, why in reasons.items() if np.isnan(seconds[name]).all()}
    for name, why in lost.items():
        del seconds[name]
        console().print(f"left out, as it failed in every round: {name}: {why}", soft_wrap=True)
    return seconds, lost


def _agreement(peer: Peer, settings: list[Setting], folder: Path, logits: np.ndarray) -> dict[str, float]:
    """Returns the largest difference between our logits of (no, yes), or log-odds, and each setting's."""
    found = {}
    for number, setting in enumerate(settings):
        file = folder / f"{number}.npy"
        if not isinstance(peer.run(setting, save=file), str):
            ours = logits[:, 1] - logits[:, 0] if setting.cross_encoder else logits
            found[str(setting)] = float(np.abs(np.load(file) - ours).max())
    return found


def _rows(items: int, seconds: dict[str, np.ndarray], agreement: dict[str, float]) -> list[dict[str, Any]]:
    """Prints and returns the figures of ours and of each setting, of the rounds that it did not fail in."""
    rows = []
    for name, taken in seconds.items():
        ran = ~np.isnan(taken)
        rates = items / taken[ran]
        # Turn by turn: each of our timings against the peer's in the same round.
        ratios = (taken / seconds["jaxslm"])[ran]
        rows.append(
            {
                "name": name,
                "items_per_s": float(np.median(rates)),
                "items_per_s_p5": float(np.quantile(rates, 0.05)),
                "items_per_s_p95": float(np.quantile(rates, 0.95)),
                "ours_is_faster_by": float(np.median(ratios)),
                "max_abs_diff": agreement.get(name, 0.0),
            }
        )
        console().print(
            f"{rows[-1]['items_per_s']:8.2f} items/s, ours is {rows[-1]['ours_is_faster_by']:.2f} times that,"
            f" logits differ by {rows[-1]['max_abs_diff']:.1e}: {name}",
            soft_wrap=True,
        )
    return rows
