"""The page: what its buttons do. Only building the page itself needs gradio."""
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import sample
from helpers import complaint, run
from lib import app, background
from lib.console import UserError


@pytest.fixture(scope="module")
def page():
    return app.Page(sample.parse_args(["app", "--device", "cpu"]))


def last(generator):
    """(number of what a click shows, the last of it)."""
    shown = list(generator)
    return len(shown), shown[-1]


def test_pictures_grow_and_end_as_those_of_the_command_line(page, tmp_path):
    classes, first = page.class_names("var")
    assert classes[first][1] == first
    name = classes[first][0]
    settings = page.load("var").metadata["sampling"]
    steps, picture = last(app.draw_var(page, first, 2, settings["cfg"], settings["top_p"], 7))
    assert steps == len(page.load("var").model.config.patch_nums)
    run(sample, "var", "--classes", name, "-n", 2, "--seed", 7, "--steps-grid", "--device", "cpu", "--out",
        tmp_path / "a.png")
    assert np.array_equal(picture, np.array(Image.open(tmp_path / "a.png")))
    rows, picture = last(app.draw_llamagen(page, 0, 3, 1.5, 0.8, 0))
    assert rows == 8 and picture.shape == (128, 3 * 130 - 2, 3)
    rows, other = last(app.draw_text(page, "red heart", 3, 1.5, 0.8, 0))
    assert rows == 8 and not np.array_equal(picture, other)
    steps, picture = last(app.draw_infinity(page, "red heart", "blue", 1, 1, 3.0, 0.5, 0))
    _, other = last(app.draw_infinity(page, "red heart", "", 1, 1, 3.0, 0.5, 0))
    assert steps == 5 and not np.array_equal(picture, other)


def test_redrawing_and_reconstructing_an_upload(page, tmp_path):
    Image.new("RGB", (50, 40), "red").save(tmp_path / "a.png")
    options = (0.25, 0.25, 0.75, 0.75, 0, 1, 1.5, 0.5, 0)
    drawn = [last(app.edit_var(page, tmp_path / "a.png", edit, *options))[1] for edit in app.EDITS]
    assert len({picture.tobytes() for picture in drawn}) == 3
    _, picture = last(app.reconstruct(page, tmp_path / "a.png", "emoji_bsq"))
    assert picture.shape[1] == 6 * 130 - 2                                  # the original and five scales


@pytest.mark.parametrize("click, message", [
    (lambda page, path: app.reconstruct(page, None, "emoji_vq"), "no picture"),
    (lambda page, path: app.reconstruct(page, path, "emoji_vq"), "not a readable picture"),
    (lambda page, path: app.edit_var(page, path, app.EDITS[0], 0.5, 0, 0.5, 1, 0, 1, 1, 1, 0), "top and left must be"),
    (lambda page, path: app.draw_infinity(page, " ", "", 1, 1, 3, 0.5, 0), "an empty prompt"),
    (lambda page, path: app.draw_infinity(page, "cat", "", 2, 1, 3, 0.5, 0), "squares only"),
    (lambda page, path: app.draw_var(page, 0, 1, 1.5, 0.5, -1), "seed -1: expected"),
    (lambda page, path: app.dub(page, path, None, False), "only one file"),
])
def test_errors_take_one_line(page, tmp_path, click, message):
    (tmp_path / "bad.png").write_text("not a picture")
    with pytest.raises(UserError, match=message):
        list(click(page, tmp_path / "bad.png"))


def test_wrong_flags(capsys):
    pytest.importorskip("gradio")
    assert "expected NAME=FILE" in complaint(capsys, sample, "app", "--ckpt", "var_d16.pth")
    assert "--port 0: expected" in complaint(capsys, sample, "app", "--port", 0)


def test_without_gradio_one_line_says_so(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert "pip install gradio" in complaint(capsys, sample, "app")


def test_the_page_can_be_built(page):
    gradio = pytest.importorskip("gradio")
    labels = {block.label for block in app.build(page, gradio).blocks.values() if isinstance(block, gradio.Tab)}
    assert labels == {"VAR", "VAR redraws", "LlamaGen", "LlamaGen, text", "Infinity", "Tokenizers", "LatentSync",
                      "SyncNet"}


def test_work_ends_with_whoever_watches(page):
    ended = []

    def work(push):
        try:
            for i in range(10**6):
                push(i)
        except background.Closed:
            ended.append(True)
            raise
    things = background.streamed(work)
    assert next(things) == 0
    things.close()
    assert ended

    def broken(push):
        push(0)
        raise ValueError("what went wrong")
    with pytest.raises(ValueError, match="what went wrong"):
        list(background.streamed(broken))


def test_a_command_in_a_process_of_its_own(tmp_path, monkeypatch):
    script = tmp_path / "command.py"
    monkeypatch.setattr(background, "SAMPLE", script)
    script.write_text("import sys\nprint('first')\nfor i in (50, 100): print(f'dub: {i:3d}%|###', file=sys.stderr, "
                      "end='\\r', flush=True)\nprint('\\nflags', *sys.argv[1:])")
    states = list(background.run_sample("x", {"video": "a b", "audio": None, "aligned": True}))
    assert states[-1] == (1.0, ["first", "flags x --video a b --aligned"])
    script.write_text("import sys; print('error: no such file'); sys.exit(2)")
    with pytest.raises(UserError, match="^no such file$"):
        list(background.run_sample("x", {}))
    script.write_text("import time; print('started', flush=True); time.sleep(60)")
    states = background.run_sample("x", {})
    next(states)
    assert next(states) == (0.0, ["started"])
    states.close()                                                          # does not wait for a minute


def test_an_error_does_not_say_where_the_server_keeps_uploads(page, tmp_path):
    """The page shows the name of a file only. gradio is stood in for by a namespace with its one exception."""
    class Shown(Exception):
        def __init__(self, message, print_exception):
            super().__init__(message)
    path = tmp_path / "bad.mp4"
    path.write_bytes(b"junk")

    def click(video):
        raise UserError(f"{video}: not a video")
        yield
    with pytest.raises(Shown, match="^bad.mp4: not a video$"):
        list(app.shown(click, SimpleNamespace(Error=Shown))(str(path)))
