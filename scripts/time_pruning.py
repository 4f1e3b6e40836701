"""How long pruning takes: a named shape with random weights, random prompts; the time of all layers and the memory.

    python scripts/time_pruning.py --model qwen3-0.6b --mlp-keep 1536 --drop-layers 8
    python scripts/time_pruning.py --model qwen3-0.6b --mlp-keep 1536 --layers 2      # an extrapolation is times 14

Prints one JSON object last.
"""

import argparse
import json
import resource
import time
from dataclasses import replace

from jaxslm.bench.workloads import MODELS, model_named, random_requests, workload_named
from jaxslm.errors import exit_on_input_error
from jaxslm.prompt import EncodedRequest
from jaxslm.prune.calibrate import pack_calibration
from jaxslm.prune.model import PruneSettings, prune_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=sorted(MODELS), required=True)
    parser.add_argument("--layers", type=int, help="make the model this deep instead")
    parser.add_argument("--mlp-keep", type=int)
    parser.add_argument("--kv-groups-keep", type=int)
    parser.add_argument("--drop-layers", type=int, default=0)
    parser.add_argument("--calibration-tokens", type=int, default=65_536)
    options = parser.parse_args()
    config = MODELS[options.model]
    if options.layers:
        MODELS[options.model] = config.model_copy(update={"num_layers": options.layers})
    ranker, params = model_named(options.model)
    workload = replace(workload_named("text_300"), items=8)
    made = random_requests(workload, ranker.model, -(-options.calibration_tokens // workload.tokens))
    calibration = pack_calibration(
        [EncodedRequest(list(each.prefix_ids), [list(ids) for ids in each.item_ids], []) for each in made]
    )
    settings = PruneSettings(
        mlp_keep=options.mlp_keep, kv_groups_keep=options.kv_groups_keep, drop_layers=options.drop_layers
    )
    start = time.perf_counter()
    pruned = prune_model(ranker, params, calibration, settings)
    seconds = time.perf_counter() - start
    result = {
        "model": options.model,
        "layers": ranker.model.num_layers,
        "layers_left": pruned.config.num_layers,
        "mlp_width": pruned.config.mlp_width,
        "calibration_tokens": calibration.tokens,
        "seconds": round(seconds, 1),
        "seconds_per_layer": round(seconds / pruned.config.num_layers, 1),
        "peak_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    with exit_on_input_error("time_pruning"):
        main()
