"""The command line: human text on stderr, one JSON object as the last line of stdout.

Exit codes: 0 done, 2 wrong usage or bad input (one clear line on stderr), 1 anything else (one clear line too where an
item store cannot be reached), 130 and 143 after Ctrl-C and SIGTERM, with nothing half-written. Verbs import what they
need when they run, so that `--help` is instant.
"""

import json
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Annotated, Literal

import typer

from jaxslm.bench.commands import bench
from jaxslm.config import TemplateName
from jaxslm.errors import InputError
from jaxslm.evaluate.commands import measuring
from jaxslm.items.store import StoreUnavailable
from jaxslm.options import Checkpoint, NewPath, ScoringDtype
from jaxslm.progress import answer

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Train, prune, compress and serve small language models as relevance rankers.",
)
app.add_typer(measuring)  # eval, compare, calibrate, report
app.add_typer(bench, name="bench")


def main() -> None:
    """Runs the command line and exits with its code."""
    former = signal.signal(signal.SIGTERM, _end)  # training and serving have handlers of their own
    try:
        code = app(sys.argv[1:] or ["--help"], prog_name="jaxslm", standalone_mode=False) or 0
    except InputError as error:
        code = _fail(str(error))
    except StoreUnavailable as error:
        code = _fail(str(error), 1)
    except typer.TyperException as error:
        code = _fail(getattr(error, "format_message", error.__str__)())
    except ModuleNotFoundError as error:
        code = _fail(f"this verb needs the package {error.name!r}: pip install 'jaxslm[train]'")
    finally:
        signal.signal(signal.SIGTERM, former)
    sys.exit(code)


def _end(number: int, frame: FrameType | None) -> None:
    """Ends the process as Ctrl-C does: what is half-written is removed."""
    sys.exit(128 + number)


def _fail(message: str, code: int = 2) -> int:
    print("jaxslm: error:", " ".join(message.split()), file=sys.stderr)
    return code


@app.command("fetch-demo")
def fetch_demo(
    out: Annotated[Path, typer.Option("--out", help="Folder to fill, or to complete.")],
) -> None:
    """Download a real model and real job data (about 300 MB), checked by sha256.

    Example: jaxslm fetch-demo --out demo
    """
    from jaxslm.demo import fetch_demo as run

    answer(run(out))


@app.command()
def convert(
    source: Annotated[str, typer.Option("--from", help="Hugging Face folder, hub id (owner/name) or .gguf file.")],
    out: NewPath,
    prompt: Annotated[
        TemplateName | None,
        typer.Option(
            help="Prompt template; by default an export's own, or qwen3-reranker for the qwen3 family, else yes-no."
        ),
    ] = None,
    instruction: Annotated[str | None, typer.Option(help="What relevance means, in a sentence.")] = None,
    max_tokens: Annotated[
        int | None, typer.Option(help="Longest row, at most the model's; item bodies are cut to keep it.")
    ] = None,
    max_item_tokens: Annotated[int | None, typer.Option(help="Most tokens of an item, behind any query.")] = None,
    labels: Annotated[
        tuple[str, str] | None, typer.Option(metavar="NO YES", help="Answer words, one token each; by default no, yes.")
    ] = None,
) -> None:
    """Make a checkpoint from a Hugging Face folder, a hub id or a .gguf file. Tokenizers must be byte-level BPE.

    A folder that `jaxslm export` made keeps its prompt, where no option says otherwise, and its calibration.

    Example: jaxslm convert --from demo/model/SmolLM2-135M-Instruct.Q4_1.gguf --out smollm2
    """
    from jaxslm.convert import convert as run

    manifest = run(
        source,
        out,
        template=prompt,
        instruction=instruction,
        max_tokens=max_tokens,
        max_item_tokens=max_item_tokens,
        labels=labels,
    )
    answer({"checkpoint": str(out), "source": manifest.source, "params_sha256": manifest.params_sha256})


@app.command()
def export(
    model: Checkpoint,
    out: NewPath,
    file_format: Annotated[Literal["hf"], typer.Option("--format", help="hf: a folder for transformers.")] = "hf",
    classifier: Annotated[
        bool, typer.Option("--classifier", help="One score (z_yes - z_no) per row, in place of the vocabulary head.")
    ] = False,
) -> None:
    """Write a checkpoint as a folder that `transformers` loads, with the tokenizer and the prompt in its card.

    Example: jaxslm export --model smollm2 --format hf --out smollm2-hf
    """
    from jaxslm.convert.export import export_hf

    del file_format  # there is one
    answer(export_hf(model, out, classifier=classifier))


@app.command()
def inspect(checkpoint: Annotated[Path, typer.Argument(help="A checkpoint folder.")]) -> None:
    """Show a checkpoint's shape, parameters, cost per token and lineage.

    Example: jaxslm inspect smollm2
    """
    from jaxslm.inspect import describe, print_card

    card = describe(checkpoint)
    print_card(card)
    answer(card)


@app.command()
def train(
    kind: Annotated[
        Literal["encoder", "ranker", "compressor"],
        typer.Argument(help="encoder: contrastive start; ranker: lists; compressor: items as embedding tokens."),
    ],
    config: Annotated[Path, typer.Option("--config", help="Settings as TOML; see configs/.")],
    out: Annotated[Path, typer.Option("--out", help="Checkpoint to write; a run that was stopped goes on.")],
    overrides: Annotated[list[str] | None, typer.Option("--set", help="a.b=value, instead of the file's.")] = None,
) -> None:
    """Train a model to rank, or teach it from another one. Stopped by Ctrl-C it exits with 130 and can go on.

    Example: jaxslm train ranker --config configs/cpu.toml --set steps=200 --out ranker
    """
    from jaxslm.config import load_toml

    chosen = tuple(overrides or ())
    if kind == "encoder":
        from jaxslm.train.encoder import train_encoder
        from jaxslm.train.settings import EncoderTraining

        result = train_encoder(load_toml(config, EncoderTraining, chosen), out)
    elif kind == "compressor":
        from jaxslm.train.compressor import train_compressor
        from jaxslm.train.compressor_settings import CompressorTraining

        result = train_compressor(load_toml(config, CompressorTraining, chosen), out)
    else:
        from jaxslm.train.ranker import train_ranker
        from jaxslm.train.settings import RankerTraining

        result = train_ranker(load_toml(config, RankerTraining, chosen), out)
    answer(result.to_json())
    if not result.finished:
        raise typer.Exit(130)


@app.command("teacher-requests")
def teacher_requests(
    config: Annotated[Path, typer.Option("--config", help="Settings of `train ranker` as TOML.")],
    out: NewPath,
    overrides: Annotated[list[str] | None, typer.Option("--set", help="a.b=value, instead of the file's.")] = None,
) -> None:
    """Write the pairs that a teacher is to score: what `score` makes of them is `data.teacher_scores`.

    Example: jaxslm teacher-requests --config configs/cpu.toml --out requests.jsonl
    """
    from jaxslm.config import load_toml
    from jaxslm.train.settings import RankerTraining
    from jaxslm.train.teacher_requests import write_teacher_requests

    answer(write_teacher_requests(load_toml(config, RankerTraining, tuple(overrides or ())).data, out))


@app.command()
def prune(
    model: Checkpoint,
    calibration: Annotated[Path, typer.Option(help="Requests as `score` reads them; with --items, queries.")],
    out: NewPath,
    items: Annotated[Path | None, typer.Option(help="Items that the queries of --calibration judge.")] = None,
    mlp_keep: Annotated[int | None, typer.Option(help="Neurons to keep in every layer.")] = None,
    by_layer: Annotated[
        bool, typer.Option(help="As many in all, more where a layer would lose more (osscar).")
    ] = False,
    drop_layers: Annotated[int, typer.Option(min=0, help="Layers to drop.")] = 0,
    kv_groups_keep: Annotated[int | None, typer.Option(help="KV groups to keep in every layer.")] = None,
    vocab_keep: Annotated[Path | None, typer.Option(help="Items whose tokens are the vocabulary to keep.")] = None,
    criterion: Annotated[
        Literal["osscar", "flap", "wanda", "activation", "magnitude", "random"],
        typer.Option(help="Which neurons and groups stay."),
    ] = "osscar",
    refit: Annotated[bool, typer.Option(help="Fit what stays to the dense outputs by least squares.")] = True,
    swaps: Annotated[int, typer.Option(min=0, help="Then exchange so many kept and removed ones (osscar).")] = 0,
    depth_criterion: Annotated[
        Literal["last", "keep-last-1", "keep-last-2", "block-influence", "greedy"],
        typer.Option(help="Which layers go; greedy measures nDCG@10 and needs --items."),
    ] = "keep-last-1",
    calibration_tokens: Annotated[int, typer.Option(min=1, help="Tokens of prompts to read.")] = 65_536,
    width_multiple: Annotated[int, typer.Option(min=1, help="--mlp-keep must be a multiple of it.")] = 128,
    seed: Annotated[int, typer.Option(min=0, help="Of the prompts' choice and of --criterion random.")] = 0,
) -> None:
    """Drop layers, neurons and KV groups, and fit what stays to the dense model's outputs.

    Example: jaxslm prune --model ranker --calibration requests.jsonl --mlp-keep 768 --drop-layers 10 --out pruned
    """
    from jaxslm.prune.checkpoints import prune_checkpoint
    from jaxslm.prune.model import PruneSettings, refuse_idle
    from jaxslm.score.warmup import keep_compiled_programs

    keep_compiled_programs()
    settings = PruneSettings(
        mlp_keep=mlp_keep,
        by_layer=by_layer,
        kv_groups_keep=kv_groups_keep,
        drop_layers=drop_layers,
        criterion=criterion,
        refit=refit,
        swaps=swaps,
        depth_criterion=depth_criterion,
        calibration_tokens=calibration_tokens,
        width_multiple=width_multiple,
        seed=seed,
    )
    refuse_idle(settings)
    answer(prune_checkpoint(model, calibration, out, settings, items=items, vocab_keep=vocab_keep))


@app.command()
def encode(
    model: Checkpoint,
    items: Annotated[Path, typer.Option("--items", help="Items to encode: .jsonl or .parquet.")],
    store: Annotated[str, typer.Option("--store", metavar="URL", help="A folder, lmdb:///FOLDER, or redis://HOST.")],
    k: Annotated[
        int | None, typer.Option("--k", min=1, help="Embedding tokens per item; by default the most, up to 8.")
    ] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "int8", "float8_e4m3"], typer.Option(help="How the values are stored.")
    ] = "int8",
) -> None:
    """Encode items into embedding tokens and keep them in a store; what has not changed since is skipped.

    Example: jaxslm encode --model compressed --items demo/jobs/items.jsonl --store store
    """
    from jaxslm.compress.catalogue import encode_file
    from jaxslm.score.warmup import keep_compiled_programs

    keep_compiled_programs()
    answer(encode_file(model, items, store if k is None else {k: store}, dtype=dtype))


@app.command()
def score(
    model: Checkpoint,
    input_file: Annotated[Path, typer.Option("--input", help='JSON Lines: {"query": ..., "items": [{"text": ...}]}')],
    output: Annotated[Path, typer.Option("--output", help="JSON Lines to write; must not exist.")],
    buckets: Annotated[Path | None, typer.Option(help="Shapes to compile, from `jaxslm bench fit-buckets`.")] = None,
    calibrated: Annotated[
        bool, typer.Option("--calibrated", help="Add P(yes) by the checkpoint's calibration.")
    ] = False,
    mode: Annotated[
        Literal["text", "compressed"],
        typer.Option(help="compressed: items by id, from --store, with what `text_fields` keep as text, if any."),
    ] = "text",
    store: Annotated[str | None, typer.Option("--store", metavar="URL", help="What `jaxslm encode` filled.")] = None,
    dtype: ScoringDtype = None,
) -> None:
    """Score items against queries: P(yes) and log-odds per item, in input order.

    Example: jaxslm score --model smollm2 --input requests.jsonl --output scores.jsonl
    """
    from jaxslm.score.files import score_file
    from jaxslm.score.warmup import keep_compiled_programs

    if (mode == "compressed") != (store is not None):
        raise InputError("--mode compressed and --store belong together")
    keep_compiled_programs()
    answer(score_file(model, input_file, output, buckets, calibrated=calibrated, store=store, dtype=dtype))


@app.command()
def serve(
    model: Annotated[
        Path | None, typer.Option("--model", help="A checkpoint folder; needed here or in --config.")
    ] = None,
    store: Annotated[str | None, typer.Option(metavar="URL", help="Item store: a folder or redis://HOST.")] = None,
    items: Annotated[Path | None, typer.Option("--items", help="Postings for the page at /: .jsonl, .parquet.")] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on; 127.0.0.1 by default.")] = None,
    port: Annotated[int | None, typer.Option(help="8000 by default; 0 takes a free one.")] = None,
    config: Annotated[Path | None, typer.Option(help="Settings as TOML: jaxslm/serve/settings.py lists them.")] = None,
    overrides: Annotated[list[str] | None, typer.Option("--set", help="a.b=value, instead of the file's.")] = None,
) -> None:
    """Serve scores over HTTP until SIGTERM or Ctrl-C. API keys: JAXSLM_API_KEYS, JAXSLM_ADMIN_KEY or a keys_file.

    Example: jaxslm serve --model ranker --port 8000 --set deadline_ms=500.0
    """
    from jaxslm.config import load_toml
    from jaxslm.score.warmup import keep_compiled_programs
    from jaxslm.serve.run import serve as run
    from jaxslm.serve.settings import ServeSettings

    options = {"model": model and str(model), "store": store, "items": items and str(items), "host": host, "port": port}
    given = tuple(f"{name}={json.dumps(value)}" for name, value in options.items() if value is not None)
    settings = load_toml(config, ServeSettings, (*given, *(overrides or ())))
    keep_compiled_programs()
    answer(run(settings))


@app.command()
def quickstart(
    out: Annotated[Path, typer.Option("--out", help="Working folder; what is done is reused.")] = Path("quickstart"),
    serve: Annotated[bool, typer.Option(help="Stay with the server at the end until Ctrl-C.")] = True,
) -> None:
    """Train, prune, compress, measure and serve a ranker on real data: 10 to 20 minutes on two cores.

    Example: jaxslm quickstart --out quickstart --no-serve
    """
    from jaxslm.quickstart import run
    from jaxslm.score.warmup import keep_compiled_programs

    keep_compiled_programs()
    result = run(out, serve=serve)
    answer(result)
    if not result["finished"]:
        raise typer.Exit(130)


if __name__ == "__main__":
    main()
