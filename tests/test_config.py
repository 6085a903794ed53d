import json
import re

import pytest

from trsp_fast.config import PRESETS, TRSPConfig, checked_layers, parse_setting
from trsp_fast.errors import UserError


@pytest.mark.parametrize(("ratio", "total", "count"), [(0.25, 32, 8), (0.25, 12, 3), (0.125, 12, 2), (0.5, 5, 3)])
def test_ratio_rounds_half_up(ratio, total, count):
    assert TRSPConfig(ratio=ratio).layer_count(total) == count


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"ratio": 0.25, "layers": [1]}, "ratio and layers were both given"),
        ({"ratio": 0.25, "num_layers": 1}, "ratio and num_layers were both given"),
        ({"ratio": 0}, "ratio is 0"),
        ({"ratio": 1.0}, "ratio is 1.0"),
        ({"ratio": -0.5}, "ratio is -0.5"),
        ({"ratio": "many"}, "ratio is 'many'; it must be a number"),
        ({"num_layers": True}, "num_layers is True; it must be a whole number"),
        ({"select": {"speed": 1}}, "select.speed is not a field"),
        ({"nonsense": 1}, "nonsense is not a field"),
        ({"select": 3}, "select is 3; it is a group"),
        ({"select": {"lr": "fast"}}, "select.lr is 'fast'; it must be a number"),
        ({"select": {"lr": -1}}, "select.lr is -1.0; it must be at least 0"),
        ({"select": {"lr": float("nan")}}, "select.lr is nan"),
        ({"transfer": {"hold": 2}}, "transfer.hold is 2.0; it must be between 0 and 1"),
        ({"transfer": {"norm": "l3"}}, "transfer.norm is 'l3'; it must be one of l1, l2, frobenius"),
        ({"select": {"train_weights": "yes"}}, "select.train_weights is 'yes'; it must be true or false"),
        ({"layers": ["a"]}, "layers is ('a',); it must be a list of layer indices"),
        ({"preset": "best"}, "preset is 'best'; it must be one of"),
    ],
)
def test_bad_values_name_field_value_and_way_out(values, message):
    with pytest.raises(UserError, match=re.escape(message)):
        TRSPConfig.from_dict(values)


@pytest.mark.parametrize(
    ("values", "amount"), [({"ratio": 0.01}, "none"), ({"ratio": 0.99}, "all"), ({"num_layers": 9}, "all")]
)
def test_amounts_that_round_to_none_or_all_are_refused(values, amount):
    with pytest.raises(UserError, match=f"comes to {amount}"):
        TRSPConfig(**values).layer_count(5)


def test_nothing_to_remove_is_refused():
    with pytest.raises(UserError, match="nothing says how much"):
        TRSPConfig().layer_count(5)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([7], "layer 7 does not exist"),
        ([-1], "layer -1 does not exist"),
        ([1, 1], "named 2 times"),
        ([], "0 of 5"),
        (range(5), "5 of 5"),
    ],
)
def test_bad_layers_are_refused(layers, message):
    with pytest.raises(UserError, match=message):
        checked_layers(layers, 5)


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_round_trip_through_json(preset):
    config = TRSPConfig.from_preset(preset, ratio=0.25, layers=None)
    assert TRSPConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_presets_differ_in_what_they_are_named_for():
    assert TRSPConfig.from_preset("paper").select.gate_mode == "output"
    assert TRSPConfig.from_preset("authors-code").transfer.norm == "frobenius"
    assert TRSPConfig.from_preset("cut-first").transfer.hold == 1
    assert [name for name in PRESETS if TRSPConfig.from_preset(name).transfer.replaced] == ["default"]
    assert TRSPConfig.from_preset("paper", transfer={"lambda2": 0.5}).transfer.lambda2 == 0.5


def test_file_and_settings_merge(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("ratio: 0.5\ntransfer:\n  lr: 1e-4\n  norm: l1\n")
    config = TRSPConfig.from_file(path, parse_setting("transfer.norm=frobenius"))
    assert (config.ratio, config.transfer.lr, config.transfer.norm) == (0.5, 1e-4, "frobenius")


@pytest.mark.parametrize(
    ("text", "message"), [("a: [", "is not YAML"), ("- 1", "holds a list"), (None, "cannot be read")]
)
def test_unreadable_files_are_refused(tmp_path, text, message):
    path = tmp_path / "run.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=message):
        TRSPConfig.from_file(path)


def test_setting_without_value_is_refused():
    with pytest.raises(UserError, match="has no value"):
        parse_setting("transfer.norm")


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_judges_layers_by_their_fold_only_where_stage_2_folds(name):
    config = TRSPConfig.from_dict({"preset": name})
    assert (config.select.judge == "fold" and config.select.shortlist > 1) == config.transfer.folds
