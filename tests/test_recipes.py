"""Settings: one source for flags, defaults, help and the comparison at --resume."""
import copy

import pytest

import train
from helpers import complaint, run
from lib import recipes
from lib.console import UserError, run_command

EVERY_RECIPE = [(model, recipe) for model, of_model in recipes.RECIPES.items() for recipe in of_model]
REQUIRED = {"var": ("--vae", "x"), "infinity": ("--vae", "x"), "llamagen": ("--vae", "x")}
VQ = ("vq", "--size", 16, "--batch-size", 4, "--device", "cpu", "--workers", 0, "--log-every", 1, "--val-every", 0,
      "--sample-every", 0)


def another(value):
    """Another value of the same kind."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + 1
    if isinstance(value, dict):
        return value | {"cfg": 99.0}
    if isinstance(value, (tuple, list)):
        return (*value, 9)
    return "another" if value is None else f"{value}x"


@pytest.mark.parametrize("model, recipe", EVERY_RECIPE)
def test_every_setting_is_compared_at_resume(model, recipe):
    """Whatever a recipe sets is refused when it has changed, except for the settings that may differ."""
    args = train.parse_args([model, "--recipe", recipe, *REQUIRED.get(model, ())])
    names = recipes.RECIPES[model][recipe]
    assert set(vars(args)) == {*names, "recipe", "model_name"}
    for name in [*names, "recipe"]:
        changed = copy.copy(args)
        setattr(changed, name, another(getattr(args, name)))
        then, now = recipes.compared(args), recipes.compared(changed)
        if name in recipes.MAY_DIFFER:
            train.refuse_other_settings("state", then, now)
        else:
            with pytest.raises(UserError, match=f"is of another run .*{name} was"):
                train.refuse_other_settings("state", then, now)


@pytest.mark.parametrize("model", recipes.RECIPES)
def test_settings_have_flags_with_help_and_a_type(model, capsys):
    """All recipes of a model have the same settings, and the value of a flag has the type of its default."""
    of_model = list(recipes.RECIPES[model].values())
    assert all(set(recipe) == set(of_model[0]) for recipe in of_model)
    with pytest.raises(SystemExit):
        train.parse_args([model, "--help"])
    text = capsys.readouterr().out
    for name, setting in of_model[0].items():
        if setting.help:
            assert (setting.flags or (f"--{name.replace('_', '-')}",))[0] in text
            takes_value = "action" not in setting.options and "choices" not in setting.options
            assert not takes_value or setting.type or setting.default is not None, f"{name} needs a type"
    known = {name for of_model in recipes.RECIPES.values() for recipe in of_model.values() for name in recipe}
    assert recipes.MAY_DIFFER <= known


def test_a_continued_run_refuses_a_setting_without_a_flag(tiny_configs, pictures, tmp_path, capsys, monkeypatch):
    """`restart_until` has no flag: only another recipe changes it."""
    argv = (*VQ, "--data", pictures, "--steps", 3, "--out", tmp_path / "a")
    run(train, *argv, "--stop-after", 1)
    recipe = recipes.derive(recipes.RECIPES["vq"]["emoji"], restart_until=0.1)
    monkeypatch.setitem(recipes.RECIPES["vq"], "emoji", recipe)
    said = complaint(capsys, train, *argv, "--resume", "auto")
    assert "is of another run (restart_until was 0.7, now 0.1); give the same flags" in said


def test_arguments_do_not_change_after_parsing(tiny_configs, pictures, files, tmp_path):
    for argv in ((*VQ, "--data", pictures, "--epochs", 1, "--warm-steps", 2),
                 (*VQ, "--data", pictures, "--steps", 1, "--init", files[1]),
                 ("var", "--size", 16, "--vae", files[1], "--epochs", 1, "--batch-size", 1024, "--device", "cpu",
                  "--sample-every", 0)):
        args = train.parse_args([str(a) for a in (*argv, "--out", tmp_path / str(len(list(tmp_path.iterdir()))))])
        before = copy.deepcopy(vars(args))
        run_command(train.main, args)
        assert vars(args) == before


def test_flags_override_the_recipe_and_out_of_range_values_are_refused(capsys):
    args = train.parse_args(["vq", "--lr", "0.5", "--no-checkpointing"])
    assert args.lr == 0.5 and args.checkpointing is False and args.steps == 19000 and args.out == "runs/vq"
    args = train.parse_args(["vq", "--epochs", "2"])
    assert (args.steps, args.epochs) == (0, 2)                              # the recipe's steps do not count then
    for flag, value in (("--lr", "nan"), ("--l1", "-1"), ("--warmup", "2"), ("--batch-size", "0"), ("--keep", "0")):
        said = complaint(capsys, train, "vq", flag, value)
        assert said.startswith(f"error: {flag} ") and ": expected " in said
