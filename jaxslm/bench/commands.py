"""The verbs of `jaxslm bench`; like all verbs they import what they need when they run (`jaxslm.cli`)."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from jaxslm.config import ComputeDtype
from jaxslm.options import NewPath
from jaxslm.progress import answer

bench = typer.Typer(help="Measure scoring on this device.")


@bench.command("score")
def bench_score(
    workload: Annotated[str, typer.Option(help="full_text, text_300, summary, latent_8 or latent_1.")],
    model: Annotated[str, typer.Option(help="qwen3-0.6b, qwen3-0.6b-pruned, smollm2-135m, or a checkpoint folder.")],
    dtype: Annotated[ComputeDtype | None, typer.Option(help="By default the device's.")] = None,
    repeats: Annotated[int, typer.Option(min=1)] = 5,
    items: Annotated[int | None, typer.Option(min=1, help="Items of a request, instead of the workload's.")] = None,
    prefix: Annotated[int | None, typer.Option(min=0, help="Shared tokens, instead of the workload's.")] = None,
    item_tokens: Annotated[int | None, typer.Option(min=1, help="Tokens of an item, likewise.")] = None,
    requests: Annotated[int, typer.Option(min=1, help="Requests that are scored together.")] = 1,
    sharing: Annotated[bool, typer.Option(help="Compute a query once for its items.")] = True,
    padded: Annotated[bool, typer.Option("--padded", help="Plain rows, padded to a power of two.")] = False,
    cuts: Annotated[Literal["all", "head", "none"], typer.Option(help="Which exact savings to keep.")] = "all",
    implementation: Annotated[
        Literal["xla", "mosaic_gpu"] | None,
        typer.Option(help="Of ops that have kernels; by default the fastest known."),
    ] = None,
) -> None:
    """Measure a scoring workload on this device beside its floor, with random weights and inputs.

    Example: jaxslm bench score --workload summary --model smollm2-135m
    """
    from dataclasses import replace

    from jaxslm.bench.score import bench_score as run
    from jaxslm.bench.score import default_options

    options = replace(
        default_options(),
        requests=requests,
        sharing=sharing,
        padded=padded,
        cuts=cuts,
        implementation=implementation,
    )
    answer(
        run(
            workload,
            model,
            dtype=dtype,
            repeats=repeats,
            items=items,
            prefix=prefix,
            item_tokens=item_tokens,
            options=options,
        )
    )


@bench.command("growth")
def bench_growth(
    model: Annotated[str, typer.Option(help="A model's name or a checkpoint folder.")],
    out: NewPath,
    layers: Annotated[int | None, typer.Option(min=1, help="Only the model's first layers: quicker.")] = None,
    dtype: Annotated[ComputeDtype | None, typer.Option(help="By default the device's.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Timings of a point, fewer of slow ones.")] = 5,
) -> None:
    """Measure items/s against items per request, prefix length and item length; writes JSON and plots.

    Example: jaxslm bench growth --model smollm2-135m --layers 6 --out growth
    """
    from jaxslm.bench.growth import bench_growth as run
    from jaxslm.score.warmup import keep_compiled_programs

    keep_compiled_programs()
    answer(run(model, out, layers=layers, dtype=dtype, repeats=repeats))


@bench.command("serve")
def bench_serve(
    url: Annotated[str, typer.Option(help="A running server: jaxslm serve.")] = "http://127.0.0.1:8000",
    workload: Annotated[
        list[str] | None, typer.Option(help="full_text, text_300, summary or stored (by id); by default text_300.")
    ] = None,
    items: Annotated[Path | None, typer.Option("--items", help="What the server's store holds; for stored.")] = None,
    api_key: Annotated[str | None, typer.Option(envvar="JAXSLM_API_KEY", help="If the server wants one.")] = None,
    clients: Annotated[int, typer.Option(min=1, help="Processes that send.")] = 2,
    seconds: Annotated[float, typer.Option(min=1.0, help="That each rate is kept.")] = 15.0,
    start_rate: Annotated[float | None, typer.Option(min=0.01, help="First requests per second.")] = None,
    target_ms: Annotated[float, typer.Option(min=1.0, help="Within which 99 % must be answered.")] = 500.0,
) -> None:
    """Raise the load on a running server until more than 1 % of answers take over the target; items/s below that.

    Example: jaxslm bench serve --url http://127.0.0.1:8000 --workload text_300
    """
    from jaxslm.bench.client import Target
    from jaxslm.bench.server import LoadOptions
    from jaxslm.bench.server import bench_serve as run

    options = LoadOptions(clients=clients, seconds=seconds, start_rate=start_rate, target_ms=target_ms)
    answer(run(Target(url.rstrip("/"), api_key), workload or ["text_300"], items, options))


@bench.command("peers")
def bench_peers(
    workload: Annotated[str, typer.Option(help="A workload of text: full_text, text_300 or summary.")],
    model: Annotated[str, typer.Option(help="A model's name or a checkpoint folder.")],
    peer_python: Annotated[str, typer.Option(help="A Python that has torch and transformers.")],
    repeats: Annotated[int, typer.Option(min=1)] = 5,
    items: Annotated[int | None, typer.Option(min=1, help="Items of a request, instead of the workload's.")] = None,
    batch: Annotated[list[int] | None, typer.Option(min=1, help="Peers' batch sizes; by default 1 to 50.")] = None,
    torch_compile: Annotated[bool, typer.Option(help="Measure torch.compile too.")] = True,
    dtype: Annotated[ComputeDtype | None, typer.Option(help="By default the device's.")] = None,
) -> None:
    """Measure the same workload and weights through transformers and torch, in turns with ours.

    Example: jaxslm bench peers --workload summary --model smollm2-135m --peer-python python3
    """
    from jaxslm.bench.peers import bench_peers as run

    batches = tuple(batch or (1, 5, 10, 25, 50))
    answer(
        run(
            workload,
            model,
            peer_python,
            dtype=dtype,
            repeats=repeats,
            items=items,
            batches=batches,
            torch_compile=torch_compile,
        )
    )


@bench.command("kernels")
def bench_kernels(
    op: Annotated[list[str] | None, typer.Option("--op", help="A kernel: gated_mlp, ...; all by default.")] = None,
    repeats: Annotated[int, typer.Option(min=1)] = 5,
) -> None:
    """Time each GPU kernel beside XLA and other libraries' (cuDNN, tokamax where it is installed).

    Example: jaxslm bench kernels --op gated_mlp
    """
    from jaxslm.bench.kernels import bench_kernels as run

    answer(run(op, repeats))


@bench.command("fit-buckets")
def bench_fit_buckets(
    model: Annotated[Path, typer.Option("--model", help="A checkpoint folder.")],
    traffic: Annotated[Path, typer.Option("--input", help="Requests as `jaxslm score` reads them.")],
    out: NewPath,
    count: Annotated[int, typer.Option(min=1, help="Most shapes for the sample; a few more take longer texts.")] = 8,
    max_tokens: Annotated[int, typer.Option(min=64, help="Most tokens of a forward pass.")] = 1024,
) -> None:
    """Fit the compiled shapes to 50 requests spread over a file; what is longer than these still has a shape.

    Example: jaxslm bench fit-buckets --model smollm2 --input requests.jsonl --out buckets.toml
    """
    from jaxslm.bench.buckets import fit_buckets_to_file

    answer(fit_buckets_to_file(model, traffic, out, count=count, max_tokens=max_tokens))
