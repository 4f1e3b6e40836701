"""Widths by layer: the least sum of errors for as many neurons in all."""

from itertools import product
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxslm.errors import InputError
from jaxslm.prune.allocate import least_sum, widths_by_layer
from jaxslm.prune.model import PruneSettings, check_target, prune_model, removes_anything
from tests.prune.made import PROMPT, requests_calibration
from tests.tiny import tiny_config, tiny_params, tiny_ranker_config

CONFIG = tiny_config(num_layers=3, mlp_width=48)


@settings(max_examples=50, deadline=None)
@given(data=st.data(), lengths=st.lists(st.integers(1, 4), min_size=1, max_size=4))
def test_no_other_choice_costs_less(data: st.DataObject, lengths: list[int]) -> None:
    """Costs need not fall with what is taken: the choice is the best of all of them."""
    costs = [np.array(data.draw(st.lists(st.floats(0, 9), min_size=each, max_size=each))) for each in lengths]
    units = data.draw(st.integers(len(lengths), sum(lengths)))
    chosen = least_sum(costs, units)
    assert sum(chosen) == units

    def cost(taken: tuple[int, ...]) -> float:
        return float(sum(row[each - 1] for row, each in zip(costs, taken, strict=True)))

    trials = [taken for taken in product(*(range(1, each + 1) for each in lengths)) if sum(taken) == units]
    assert cost(tuple(chosen)) == pytest.approx(min(map(cost, trials)))


def test_a_layer_that_needs_few_neurons_leaves_them_to_the_others(tmp_path: Path) -> None:
    """Layer 1 works with eight neurons alone: it keeps these, and the model errs less than under an even cut."""
    params, calibration = tiny_params(CONFIG), requests_calibration(tmp_path)
    down = params["layers_1"]["mlp"]["down"]
    params["layers_1"]["mlp"]["down"] = jnp.where(jnp.arange(48)[:, None] < 8, down, 0)
    assert (widths := widths_by_layer(CONFIG, params, calibration, 24, 8))[1] == 8
    assert sum(widths) == 3 * 24

    ranker = tiny_ranker_config(CONFIG, **PROMPT)
    shared, even = (
        prune_model(ranker, params, calibration, PruneSettings(mlp_keep=24, width_multiple=8, by_layer=by_layer))
        for by_layer in (True, False)
    )
    assert shared.config.mlp_width == widths
    assert [report.neurons for report in shared.layers] == list(widths)
    assert shared.masks.keep_neurons.sum(axis=1).tolist() == list(widths)
    assert sum(each.mlp_error or 0 for each in shared.layers) < 0.95 * sum(each.mlp_error or 0 for each in even.layers)
    assert shared.layers[1].mlp_error == pytest.approx(0, abs=1e-6)


def test_a_budget_of_everything_keeps_everything(tmp_path: Path) -> None:
    assert widths_by_layer(CONFIG, tiny_params(CONFIG), requests_calibration(tmp_path), 48, 16) == (48, 48, 48)


def test_layers_of_other_widths_keep_what_they_have_at_most(tmp_path: Path) -> None:
    config = tiny_config(num_layers=2, mlp_width=(56, 16))
    assert widths_by_layer(config, tiny_params(config), requests_calibration(tmp_path), 32, 16) == (48, 16)


@pytest.mark.parametrize("changes", [{"criterion": "wanda", "mlp_keep": 24}, {"drop_layers": 1}])
def test_only_osscars_losses_share_out_neurons(changes: dict[str, object]) -> None:
    with pytest.raises(InputError, match="--by-layer: shares out the neurons of --mlp-keep"):
        check_target(CONFIG, PruneSettings.model_validate({"by_layer": True, "width_multiple": 8, **changes}))


def test_what_was_shared_out_can_be_shared_out_again() -> None:
    """A gradual schedule prunes layers that differ already: their sum counts, not the narrowest."""
    config = tiny_config(num_layers=3, mlp_width=(48, 8, 40))
    by_layer = PruneSettings(mlp_keep=32, width_multiple=8, by_layer=True)
    check_target(config, by_layer)
    assert not removes_anything(config, by_layer)
    assert removes_anything(config, by_layer.model_copy(update={"mlp_keep": 24}))
    for target, message in (
        (by_layer.model_copy(update={"mlp_keep": 40}), "--mlp-keep 40: is above the 32"),
        (by_layer.model_copy(update={"by_layer": False}), "--mlp-keep 32: is above the 8"),
        (by_layer.model_copy(update={"mlp_keep": 16, "width_multiple": 16}), "a layer of 8 neurons is below"),
    ):
        with pytest.raises(InputError, match=message):
            check_target(config, target)


def test_layers_that_go_take_their_neurons_with_them(tmp_path: Path) -> None:
    config = tiny_ranker_config(tiny_config(num_layers=3, mlp_width=(16, 48, 16)), **PROMPT)
    settings = PruneSettings(mlp_keep=24, width_multiple=8, by_layer=True, drop_layers=1)
    check_target(config.model, settings)
    with pytest.raises(InputError, match="--mlp-keep 24: is above the 16"):
        prune_model(config, tiny_params(config.model), requests_calibration(tmp_path), settings)
