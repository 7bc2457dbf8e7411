"""The demo's pictures: what is held out, what captions say; --evaluate, and the judge of drawings."""
import json

import numpy as np
import pytest
import torch
from PIL import Image

import sample
import train
from helpers import ROOT, complaint, run, same, weights
from lib.emoji import STYLES, Emoji, captions_of, class_of, pictures, rows, split, tile
from lib.judge import Judge, another_style


def test_every_picture_is_in_one_part():
    parts = split()
    assert sorted(sum(parts, [])) == list(range(9020)) and [len(part) for part in parts] == [7896, 860, 264]
    training, pairs, things = parts
    names = lambda part: {rows()[i]["name"] for i in part}
    assert not names(things) & names(training + pairs)
    assert names(pairs) <= names(training)
    assert {rows()[i]["style"] for i in pairs} == {row["style"] for row in rows()} == set(STYLES)
    assert {class_of(rows()[i]) for i in training} == {class_of(row) for row in rows()}     # no class is unseen
    assert ("fluent", "mouse face") in {(rows()[i]["style"], rows()[i]["name"]) for i in pairs}


def test_pictures_are_where_the_table_says():
    """The last picture of each sheet is no blank one, and heart and broccoli have the colors that all styles give them.
    """
    last = {row["style"]: row for row in rows()}
    assert all(np.asarray(tile(row)).std() > 10 for row in last.values())
    for name, channel in (("red heart", 0), ("blue heart", 2), ("broccoli", 1)):
        found = [np.asarray(tile(row, 32), float)[8:24, 8:24] for row in rows() if row["name"] == name]
        assert len(found) >= 4 and all(picture.mean((0, 1)).argmax() == channel for picture in found)
    assert pictures(16).shape == (9020, 3, 16, 16)


def test_captions():
    data = Emoji(16, "training", captions=True)
    usual, *others = data.captions(0)
    assert usual == "noto style, grinning face"
    assert others[:3] == ["grinning face, noto style", "grinning face", "cheerful, cheery, face, noto style"]
    assert data.caption(0, None) == usual
    drawn = [data.caption(0, (0, epoch, 0)) for epoch in range(400)]
    assert set(drawn) == {usual, *others} and 150 < drawn.count(usual) < 250
    assert max(len(caption.encode()) for row in rows() for caption in captions_of(row)) < 64     # the text encoder's
    classes = Emoji(16, "things")
    assert classes.classes[classes.conditions([(0, None)])] == class_of(classes.rows[0])


def test_the_judge():
    judge = Judge(16)
    pairs = split()[1]
    true = judge.scores(judge.pictures[pairs], pairs)
    assert true["thing"] > 99 and true["style"] > 99 and true["class"] > 99     # some pictures are equal
    copied = judge.scores(judge.pictures[[another_style(row) for row in pairs]], pairs)
    assert copied["style"] < 1 and 10 < copied["thing"] < 50
    noise = torch.randint(256, (len(pairs), 3, 16, 16), generator=torch.Generator().manual_seed(0)).byte()
    assert judge.scores(noise, pairs)["thing"] < 3


@pytest.mark.parametrize("model", ["vq", "var", "llamagen", "text", "infinity"])
def test_evaluation(model, nets, tmp_path, monkeypatch, capsys, tiny_configs):
    training, pairs, things = split()
    for module in ("lib.judge", "lib.emoji"):
        monkeypatch.setattr(f"{module}.split", lambda: (training, pairs[::20], things[::20]))
    name = {"text": "llamagen"}.get(model, model)
    common = (name, "--size", 16, "--device", "cpu", "--out", tmp_path)
    tokenizer = {"var": "emoji_vq", "infinity": "emoji_bsq"}.get(model, "single")
    if model != "vq":
        common += ("--vae", nets / f"{tokenizer}.safetensors")
    if model == "text":
        common += ("--recipe", "emoji_text")
    path = nets / "emoji_vq.safetensors"
    if model != "vq":
        path = tmp_path / "model.safetensors"
        run(train, *common, "--steps", 1)
        capsys.readouterr()
    run(train, *common, "--evaluate", path, "--json", tmp_path / "e.json")
    said = capsys.readouterr().out
    result = json.loads((tmp_path / "e.json").read_text())
    assert f"{path}: cpu" in said
    assert "unseen pairs of thing and style (43): " in said and "unseen things (14): " in said
    assert result["all"]["bits per picture"] > 10
    if model == "vq":
        assert -0.1 < result["all"]["SSIM"] < 1 and result["all"]["PSNR"] > 5
        return
    assert result["all"]["loss"] == pytest.approx((43 * result["pairs"]["loss"] + 14 * result["things"]["loss"]) / 57)
    drawn = result["drawings"]
    assert set(drawn["drawn"]) == ({"class"} if model in ("var", "llamagen") else {"thing", "style", "class"})
    assert drawn["copied from another style"]["style"] < 5
    assert Image.open(tmp_path / "nearest.png").size == (16 * 130 - 2, 4 * 130 - 2)
    assert (tmp_path / "combinations.png").exists() == (model in ("text", "infinity"))


def test_mistakes_of_evaluation(nets, files, tmp_path, capsys, tiny_configs):
    say = lambda *argv: complaint(capsys, train, *argv, "--device", "cpu", "--out", tmp_path)
    vae = ("--vae", nets / "emoji_vq.safetensors")
    assert "no such file" in say("vq", "--size", 16, "--evaluate", tmp_path / "none.safetensors")
    demo = ROOT / "demo" / "emoji_vq.safetensors"
    assert f"--size 16: {demo} takes pictures of 32 pixels" in say("vq", "--size", 16, "--evaluate", demo)
    other = say("var", "--size", 16, *vae, "--evaluate", files[2])
    assert "is not a model of recipe emoji (class_embed.weight is (6, 64), expected (576, 64)); give the" in other
    assert "--bench, --evaluate: each of these runs instead" in say("var", *vae, "--bench", "--evaluate", files[2])
    recipe = say("var", "--recipe", "d16", "--data", tmp_path)
    assert "--vae: give the trained tokenizer" in recipe


def test_a_recipe_gives_the_same_bits_again(nets, tmp_path, tiny_configs):
    """Its draws depend on the seed alone."""
    argv = ("infinity", "--size", 16, "--vae", nets / "emoji_bsq.safetensors", "--device", "cpu", "--steps", 3)
    for name in "ab":
        run(train, *argv, "--out", tmp_path / name)
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    run(sample, "infinity", "--ckpt", tmp_path / "a" / "model.safetensors", "--vae", nets / "emoji_bsq.safetensors",
        "--prompt", "noto style, red heart", "--device", "cpu", "--out", tmp_path / "a.png")
