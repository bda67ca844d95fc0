"""The command line: presets, typed flags, and one clear line for what cannot be."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reat_fast.cli.command import flag
from reat_fast.cli.radius import fraction
from reat_fast.config import PRESETS, SHARES, Config, in_proportion, parse
from reat_fast.storage.config_file import changes, from_json, to_json


def test_the_first_word_chooses_the_preset_and_flags_change_it() -> None:
    name, config = parse(["quickstart", "--epochs", "3", "--no-fused", "--eps", "4/255"], "reat")
    assert name == "quickstart"
    assert (config.epochs, config.fused, config.eps) == (3, False, 4 / 255)
    shorter = in_proportion(PRESETS["quickstart"], 3)
    assert config == dataclasses.replace(shorter, fused=False, eps=4 / 255)


@pytest.mark.parametrize(
    ("arguments", "changed"),
    [
        ("at-bsl --epochs 200", {"milestones": (150, 180)}),
        ("at-bsl --epochs=10", {"milestones": (7, 9)}),
        ("at-bsl --epochs 1", {"milestones": (1, 1)}),
        ("at-bsl --epochs 10 --milestones 3", {"milestones": (3,)}),
        ("taet --epochs 10", {"milestones": (7, 9), "second_stage": 4}),
        (
            "reat-plus --epochs 100",
            {"milestones": (93, 97), "attack_from": 93, "awp_from": 93},
        ),
        (
            "reat-plus --epochs 40 --attack_from=0 --awp-from 30",
            {"milestones": (37, 39), "attack_from": 0, "awp_from": 30},
        ),
    ],
)
def test_a_preset_of_another_length_keeps_the_shares_of_its_epochs(
    arguments: str, changed: dict[str, Any]
) -> None:
    name, config = parse(arguments.split(), "reat")
    found = {field: getattr(config, field) for field in (*SHARES, "epochs")}
    kept = {"second_stage": 40 * config.epochs // PRESETS[name].epochs, "epochs": config.epochs}
    assert found == {"attack_from": 0, "awp_from": 0, **kept, **changed}


def test_a_preset_of_its_own_length_is_as_it_stands() -> None:
    for name, preset in PRESETS.items():
        assert in_proportion(preset, preset.epochs) == preset == parse([name], "reat")[1]


def test_a_run_that_is_gone_on_with_keeps_its_epochs() -> None:
    saved = dataclasses.replace(PRESETS["reat"], epochs=100, milestones=(60, 75))
    assert parse(["--quiet"], "reat", saved)[1] == dataclasses.replace(saved, quiet=True)


def test_without_a_preset_the_default_one_is_taken() -> None:
    assert parse(["--fused"], "quickstart") == ("quickstart", PRESETS["quickstart"])


def test_the_preset_reat_is_the_official_recipe() -> None:
    config = PRESETS["reat"]
    assert (config.epochs, config.batch_size, config.lr, config.momentum) == (80, 128, 0.1, 0.9)
    assert (config.weight_decay, config.nesterov, config.milestones) == (5e-4, False, (60, 75))
    assert (config.eps, config.step_size, config.steps) == (8 / 255, 2 / 255, 10)
    assert (config.imbalance, config.seed, config.tail) == (0.02, 0, "official")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["reatt"], "unknown preset 'reatt'; did you mean reat? (presets: reat, quickstart"),
        (["reat", "--epss", "1"], "--epss, 1; did you mean --eps?"),
        (["--imbalance", "0"], "--imbalance 0.0: must lie in (0, 1]"),
        (["--imbalance", "1.5"], "--imbalance 1.5: must lie in (0, 1]"),
        (["--eps", "-1/255"], "--eps -0.0039"),
        (["--eps", "nan"], "--eps nan"),
        (["--eps", "8/0"], "'8/0' is neither a number nor a fraction"),
        (["--largest", "many"], "--largest: 'many' is no INT (--help"),
        (["--eps", "eight"], "'eight' is neither a number nor a fraction"),
        (["--steps", "-1"], "--steps -1: must be 0 or more"),
        (["--epochs", "0"], "--epochs 0: must be at least 1"),
        (["--epochs", "ten"], "--epochs"),
        (["--schedule", "step"], "'--schedule'. Expected one of ('multistep'"),
        (["--lr", "inf"], "--lr inf: must be a finite number"),
        (["--momentum", "1"], "--momentum 1.0: must lie in [0, 1)"),
        (["--momentum", "0", "--nesterov"], "--nesterov True: needs --momentum above 0"),
        (["--no-fused", "--precision", "bf16"], "--precision bf16: the reference"),
        (["--no-fused", "--graph", "on"], "--graph on: the reference"),
        (["--no-fused", "--attack-form", "cudnn"], "--attack-form cudnn: is one of the folded"),
        (["reat-batchnorm", "--attack-form", "cpu"], "--attack-form cpu: is one of the folded"),
        (["--attack", "free", "--attack-form", "triton"], "--attack-form triton: is one of the"),
        (["--attack", "free", "--attack-from", "2"], "--attack-from 2: goes with an attack that"),
        (["--ema", "1"], "--ema 1.0: must lie in [0, 1)"),
        (["--label-smoothing", "2"], "--label-smoothing 2.0: must lie in [0, 1]"),
        (
            ["mart", "--label-smoothing", "0.1"],
            "--label-smoothing 0.1: goes with --objective bsl, ce and trades",
        ),
        (["--clip-norm", "-1"], "--clip-norm -1.0: must be a finite number"),
        (["--limit-batches", "0"], "--limit-batches 0: must be at least 1"),
        (["--milestones", "-3"], "--milestones (-3,): must be numbers of epochs, 1 or more"),
    ],
)
def test_bad_input_is_one_line_that_names_the_flag(arguments: list[str], named: str) -> None:
    with pytest.raises(ValueError) as refused:
        parse(arguments, "reat")
    assert named in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("arguments", "cure"),
    [
        (["robustlt"], "--radius same --attack-batchnorm eval"),
        (["at-bsl", "--radius", "class"], "--radius same"),
        (["reat-offsets"], "--attack-loss auto"),
        (["reat-batchnorm"], "--attack-batchnorm eval --attack-loss auto"),
        (["trades"], "--attack-loss auto"),
        (["robal"], "--attack-loss auto"),
        (["reat", "--attack-loss", "bsl"], "--attack-loss auto"),
    ],
)
def test_free_training_refuses_what_it_has_no_use_for_with_the_flags_that_mend_it(
    arguments: list[str], cure: str
) -> None:
    asked = [*arguments, "--attack", "free"]
    with pytest.raises(ValueError, match="--attack free: has one radius") as refused:
        parse(asked, "reat")
    assert str(refused.value).endswith(f"; add {cure}")
    _, config = parse([*asked, *cure.split()], "reat")
    assert config.attack == "free"


@pytest.mark.parametrize("preset", ["reat", "quickstart", "at", "mart", "at-bsl", "taet"])
def test_free_training_takes_presets_that_differ_in_start_and_steps(preset: str) -> None:
    _, config = parse([preset, "--attack", "free", "--attack-loss", "ce"], "reat")
    assert (config.attack, config.start) == ("free", PRESETS[preset].start)


def test_every_field_has_help_and_every_preset_parses(capsys: pytest.CaptureFixture[str]) -> None:
    for preset, config in PRESETS.items():
        assert parse([preset], "reat") == (preset, config)
    with pytest.raises(SystemExit) as ended:
        parse(["--help"], "reat")
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    for field in dataclasses.fields(Config):
        assert flag(field.name) in shown
    assert "8/255" in shown


@settings(max_examples=30, deadline=None)
@given(
    eps=st.floats(0, 1),
    lr=st.floats(0, 10),
    milestones=st.lists(st.integers(1, 200), max_size=4).map(tuple),
    limit=st.none() | st.integers(1, 9),
)
def test_json_gives_the_same_configuration_back(
    eps: float, lr: float, milestones: tuple[int, ...], limit: int | None
) -> None:
    config = Config(eps=eps, lr=lr, milestones=milestones, limit_batches=limit)
    assert from_json(to_json(config)) == config
    assert from_json("{}") == Config()
    assert from_json('{"attack_form": "trial"}').attack_form == "triton"  # of older versions


@pytest.mark.parametrize("text", ["", "[]", "{", '{"epochs": 0}', '{"epoch": 3}', '{"eps": "x"}'])
def test_a_damaged_config_file_is_named(text: str) -> None:
    with pytest.raises(ValueError, match="here.json: not a configuration"):
        from_json(text, "here.json")


def test_fractions_are_read_exactly() -> None:
    assert fraction("8/255") == 8 / 255
    assert fraction("0.03") == 0.03


def test_evaluations_that_were_always_that_far_apart_are_no_change() -> None:
    held_out, official = Config(), Config(evaluation="official")
    assert (held_out.evaluated_every, official.evaluated_every) == (5, 1)
    assert not [*changes(Config(eval_every=5), held_out)]
    assert not [*changes(Config(evaluation="official", eval_every=1), official)]
    assert [*changes(held_out, Config(eval_every=3))] == [("--eval-every", 5, 3)]


def test_a_set_taken_as_it_is_has_every_image_whatever_the_preset_says() -> None:
    as_is = ["quickstart", "--imbalance-profile", "as-is"]
    assert parse(as_is, "reat")[1].largest is None
    assert parse(["quickstart"], "reat")[1].largest == 2000
    for largest in (["--largest", "30"], ["--largest=30"]):
        assert parse([*as_is, *largest], "reat")[1].largest == 30  # which the data then refuses


def test_a_value_that_is_named_as_a_flag_is_no_flag() -> None:
    shorter = parse(["reat", "--epochs", "40", "--data", "milestones"], "reat")[1]
    assert shorter.milestones == (30, 37)
    as_is = ["quickstart", "--imbalance-profile", "as-is", "--data", "largest"]
    assert parse(as_is, "reat")[1].largest is None


def test_what_changes_no_figure_may_be_another_on_resume() -> None:
    """A run that ends for want of memory in an evaluation can go on."""
    assert not [*changes(Config(), Config(eval_batch_size=50))]
