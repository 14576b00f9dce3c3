"""What the page of demo/app.py computes, and how it and its command answer, in a browser too."""

import io
import json
import shutil
import socket
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from demo import app, app_page
from demo.app_model import Library, class_names, draw, editing, reconstruct
from models.generate import edit, generate
from models.sampler import SamplingOptions
from models.tokenbridge import TokenBridge, tokenbridge_tiny
from models.tokenizers.kl16 import AutoencoderKL
from tests.conftest import ROOT, chromium, tiny_model
from tests.faults.harness import Job
from tests.runs import call, free_port, refused, use
from util import export
from util.data.images import center_crop
from util.errors import UserError
from util.vae import load_vae, save_vae, vae_digest

CLASSES = ("ant", "bee", "red <b>cat</b> ${x}")
TRAINED_WITH = {"preview_iter": 6, "cfg": [2.0], "temperature": 0.5}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """run/checkpoint-last.pth of a tiny model, exported/, their vae.ckpt, and two photos."""
    folder, model = tmp_path_factory.mktemp("page"), tiny_model()
    save_vae(folder / "vae.ckpt", AutoencoderKL(6, (1, 1, 1), ch=32, num_res_blocks=1))
    (folder / "run").mkdir()
    state = model.published_state_dict()
    saved = {"model": state | {"mask_token": state["mask_token"] + 1}, "step": 7}
    saved |= {"model_ema": dict(model.published_parameters()), "config": model.config.to_dict()}
    saved |= {"vae_sha256": vae_digest(folder / "vae.ckpt"), "classes": list(CLASSES)}
    torch.save(saved | {"args": TRAINED_WITH}, folder / "run" / "checkpoint-last.pth")
    call(export.main, "--resume", str(folder / "run"), "--output_dir", str(folder / "exported"))
    pixels = np.random.default_rng(0).integers(0, 256, (24, 30, 3), np.uint8)
    Image.fromarray(pixels).resize((120, 96)).save(folder / "photo.png")
    (folder / "damaged.png").write_bytes((folder / "photo.png").read_bytes()[:500])
    return folder


def library(*paths: Path, vae_path: Path | None = None) -> Library:
    flags = app.make_parser().parse([])
    flags.resume, flags.vae_path = [*map(str, paths)], vae_path and str(vae_path)
    return Library(flags, torch.device("cpu"))


def load(shelf: Library, weights: str = "ema"):
    return shelf.load(shelf.choices()[0], weights)


@pytest.fixture(scope="module")
def loaded(place):
    return load(library(place / "run"))


def test_checkpoints_of_the_usual_folders_are_found(place, tmp_path, monkeypatch):
    """And where nothing was trained, the gallery's generator, which comes with the code."""
    (tmp_path / "demo").symlink_to(ROOT / "demo")
    monkeypatch.chdir(tmp_path)
    assert "demo/emoji_vae.ckpt" in load(library()).facts
    shutil.copytree(place / "run", tmp_path / "output" / "demo" / "model")
    shutil.copytree(place / "exported", tmp_path / "output" / "demo" / "exported")
    (tmp_path / "output_dir").mkdir()
    found = library().choices()
    ours = ["output/demo/model/checkpoint-last.pth", "output/demo/exported"]
    assert found == [*ours, "demo/gallery"]
    with pytest.raises(UserError, match="not in the list"):
        library(place / "run").load(found[0], "ema")


def test_a_checkpoint_brings_all_that_belongs_to_it_and_is_read_again(loaded, place, tmp_path):
    assert loaded.classes == CLASSES == load(library(place / "exported")).classes
    assert loaded.settings == {"num_iter": 6, "cfg": 2.0, "temperature": 0.5}
    assert load(library(place / "exported")).settings == loaded.settings
    assert str(place / "vae.ckpt") in loaded.facts and "4 × 4 positions of 6 × 8" in loaded.facts

    shelf = library(shutil.copytree(place, tmp_path / "copy") / "run")
    ema, raw = (load(shelf, kind) for kind in ("ema", "model"))
    assert torch.equal(raw.model.backbone.mask_token, ema.model.backbone.mask_token + 1)
    assert load(shelf) is ema
    path = Path(shelf.choices()[0])
    torch.save(torch.load(path, weights_only=True) | {"step": 8}, path)
    assert "step 7" in ema.facts and "step 8" in load(shelf).facts


def test_the_vae_is_known_by_its_checksum(place, tmp_path):
    """Another one is used where it is named, and said; nothing is taken silently."""
    folder = shutil.copytree(place / "run", tmp_path / "run")
    save_vae(tmp_path / "vae.ckpt", AutoencoderKL(6, (1, 1, 1), ch=32, num_res_blocks=1))
    with pytest.raises(UserError, match="--vae_path"):
        load(library(folder))
    facts = load(library(folder, vae_path=tmp_path / "vae.ckpt")).facts
    assert "not the one it was trained with" in facts
    shutil.copy(place / "vae.ckpt", tmp_path / "emoji_vae.ckpt")
    assert f"VAE `{tmp_path / 'emoji_vae.ckpt'}`" in load(library(folder)).facts


def test_a_published_checkpoint_needs_no_settings(tmp_path):
    """It holds tensors alone: the flags' defaults, its size by its tensors, ImageNet's names."""
    model = tokenbridge_tiny()
    saved = {"model": model.published_state_dict(), "model_ema": dict(model.published_parameters())}
    torch.save(saved, tmp_path / "checkpoint-last.pth")
    save_vae(tmp_path / "vae.ckpt", AutoencoderKL(16, (1, 1, 1, 1, 1), ch=32, num_res_blocks=1))
    found = load(library(tmp_path))
    assert found.classes[207] == "golden retriever" and found.settings["cfg"] == 3.1
    assert found.model.config.head_input == "published"
    assert class_names(1000, tuple(f"n{i:08d}" for i in range(1000))) == found.classes
    assert class_names(3, None) == ("0", "1", "2")


@pytest.mark.parametrize("order", ["random", "confidence"])
def test_the_last_step_is_what_generate_makes(loaded, order):
    settings = dict(num_iter=5, cfg=2.0, temperature=0.7, order=order, seed=3)
    *_, (step, steps, pixels, _) = draw(loaded, [0, 2], SamplingOptions(**settings))
    assert step == steps == 5
    expected = generate(loaded.model, loaded.tokenizer, [0, 2], **settings)
    assert np.array_equal(pixels, expected)


def test_steps_only_ever_add_positions(loaded):
    """More iterations than positions: those that fill nothing are none."""
    before = np.full((4, 4), np.nan)
    for number, steps, _, (orders, sure) in draw(loaded, [1], SamplingOptions(40), seconds=1):
        old = np.isfinite(before)
        assert (orders[0][old] == before[old]).all() and np.nanmax(orders) == number <= steps
        assert (np.isfinite(orders) == np.isfinite(sure)).all()
        before = orders[0]
    assert set(before.flat) == set(range(1, steps + 1)) and steps <= 16 and (sure <= 0).all()


def test_a_picture_is_reconstructed_as_reconstruction_py_does(loaded, place, tmp_path):
    (tmp_path / "data" / "a").mkdir(parents=True)
    shutil.copy(place / "photo.png", tmp_path / "data" / "a" / "photo.png")
    settings = dict(bits=[-1, 2, 3], latent_scale=loaded.tokenizer.latent_scale, img_size=32)
    settings |= dict(image_dir=tmp_path / "data", output_dir=tmp_path / "out")
    use("reconstruct", place, **settings)
    vae, *quantized = json.loads((tmp_path / "out" / "results.json").read_text())["results"]
    pixels, captions = reconstruct(loaded, str(place / "photo.png"), 32, [2, 3])
    expected = [f"{r['bits']} bits, {r['entropy_bits']:.2f} used" for r in quantized]
    psnr = [f"{r['psnr']:.2f} dB" for r in (vae, *quantized)]
    names = ["Continuous VAE", *expected]
    for size in (18, 2048):
        with pytest.raises(UserError, match=f"{size} px: choose a multiple of 4"):
            reconstruct(loaded, str(place / "photo.png"), size, [2])
    assert captions == ["Original", *(f"{n}: {p}" for n, p in zip(names, psnr, strict=True))]
    assert pixels.shape == (4, 32, 32, 3)


def test_a_picture_is_drawn_anew_where_it_is_painted(loaded, place, tmp_path):
    """As `edit` does with the same centre square and mask; with nothing painted it says so."""
    layer = np.zeros((96, 120, 4), np.uint8)
    Image.fromarray(layer).save(tmp_path / "nothing.png")
    layer[40:50, 60:70, 3] = 255  # black on a transparent ground
    Image.fromarray(layer).save(tmp_path / "layer.png")
    painted = [str(place / "photo.png"), str(tmp_path / "layer.png")]
    settings = dict(num_iter=3, cfg=2.0, seed=4)
    given = editing(loaded, painted, 2)
    *_, (_, steps, pixels, _) = draw(loaded, [0, 2], SamplingOptions(**settings), given=given)
    image = center_crop(Image.open(place / "photo.png"), 16)
    square = Image.fromarray(layer[..., 3]).convert("RGB")
    mask = np.array(center_crop(square, 16))[..., 0] > 0
    expected = edit(loaded.model, loaded.tokenizer, image, mask, [0, 2], **settings)
    assert np.array_equal(pixels, expected) and steps <= 3
    assert 0 < (~given.known_mask[0]).sum() < 16
    unpainted = [painted[0], str(tmp_path / "nothing.png")]
    for files, told in (([""], "no picture"), (unpainted, "nothing is")):
        with pytest.raises(UserError, match=told):
            editing(loaded, files, 1)


def test_wrong_calls_are_told_before_the_page_opens_and_wrong_settings_in_it(
    place, capsys, monkeypatch
):
    assert app.make_parser().parse([]).host == "127.0.0.1"
    assert "--resume /nowhere does not exist" in refused(capsys, app.main, "--resume", "/nowhere")
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        taken = str(other.getsockname()[1])
        line = refused(capsys, app.main, "--device", "cpu", "--port", taken)
        assert f"--port {taken}: " in line
    shelf = library(place / "run")
    for classes, cfg, fragment in (
        (["bea"], 1, "class 'bea' is unknown"),
        ([], 1, "no class"),
        (["bee"], -1, "cfg -1"),
    ):
        settings = (6, cfg, "linear", 1.0, "random", 0, 0)
        with pytest.raises(app_page.gr.Error, match=fragment):
            asked = [None, classes, 1, 0, *settings]
            next(app_page.generate(shelf, shelf.choices()[0], "ema", *asked))
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "demo.app_page")
    assert "pip install -c requirements.lock -e '.[app]'" in refused(capsys, app.main)


# --- the page, in a browser


@pytest.fixture(scope="module")
def server(place):
    """The address of the page; in the end it stops when asked to, and has met no error."""
    port, nowhere = free_port(), "http://127.0.0.1:9"
    argv = ["--resume", place / "run", place / "exported", "--port", port, "--device", "cpu"]
    proxies = dict(http_proxy=nowhere, https_proxy=nowhere)
    job = Job("demo/app.py", *argv, "--seed", 3, log=place / "page.log", **proxies)
    try:
        assert job.wait_for(lambda said: "open http" in said), job.printed()
        yield f"http://127.0.0.1:{port}/"
        job.process.terminate()
        assert job.end(30) == 0
    finally:
        job.kill()
    assert "Traceback" not in job.printed(), job.printed()


@pytest.fixture
def page(server):
    """The page, opened; fails in the end if it fetched anything elsewhere or met an error."""
    with chromium() as browser:
        wrong, page = [], browser.new_page(viewport={"width": 1280, "height": 900})
        own = (server, "data:", "blob:")
        page.on("request", lambda request: request.url.startswith(own) or wrong.append(request.url))
        page.on("console", lambda said: said.type != "error" or wrong.append(said.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.set_default_timeout(60_000)
        page.goto(server)
        page.locator("#facts", has_text="parameters").wait_for()
        page.get_by_text("ant (0)").wait_for()
        yield page
        assert wrong == []


def message(page) -> str:
    """What pops up; it is closed."""
    toast = page.locator(".toast-body").first
    toast.wait_for()
    text = toast.inner_text()
    toast.locator(".toast-close").click()
    return text


def test_images_appear_step_by_step_and_are_those_of_the_call_that_is_shown(page, place):
    status = page.locator("#status")
    page.locator("#generate").click()
    for text in ("Iteration", "Done: 6 of 6, 16 of 16 positions filled"):
        status.get_by_text(text).wait_for()
    model, vae = TokenBridge.from_pretrained(place / "exported"), load_vae(place / "vae.ckpt")
    call = page.locator("#call .cm-content").inner_text().replace("\n", "")
    expected = eval(call, {"generate": generate, "model": model, "vae": vae})
    images = page.locator("#Image .grid-container img")
    page.wait_for_function("() => document.querySelectorAll('#Image img').length == 4")
    captions = page.locator("#Image .caption-label").all_inner_texts()
    assert [caption.strip() for caption in captions] == [*CLASSES, CLASSES[0]]
    png = page.request.get(images.nth(1).get_attribute("src")).body()
    shown = np.asarray(Image.open(io.BytesIO(png)))
    assert np.array_equal(shown[::16, ::16], expected[1])


def test_drawing_can_be_stopped(page):
    page.get_by_text("More", exact=True).click()
    page.get_by_label("number input for Seconds to take, to watch").fill("20")
    page.keyboard.press("Tab")
    page.locator("#generate").click()
    page.locator("#status").get_by_text("Iteration").wait_for()
    page.locator("#stop").click()
    page.locator("#status").get_by_text("Stopped. Iteration").wait_for()
    page.set_viewport_size({"width": 360, "height": 800})  # a phone does not scroll sideways
    assert page.evaluate("document.documentElement.scrollWidth") <= 360


def test_a_picture_is_painted_over_and_drawn_anew_there(page, place):
    page.get_by_role("tab", name="Edit").click()
    page.locator("#edit").click()
    assert "no picture" in message(page)
    page.locator("#editor input[type=file]").first.set_input_files(place / "photo.png")
    page.locator("#editor").get_by_label("Brush", exact=True).wait_for()
    page.wait_for_timeout(1000)  # until the picture is on the canvas
    box = page.locator("#editor canvas").first.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + 30, y + 10, steps=8)
    page.mouse.up()
    page.wait_for_timeout(1000)  # until the page has sent it
    page.locator("#edit").click()
    page.locator("#edited-status").get_by_text("Done:").wait_for()
    call = page.locator("#edited-call").inner_text()
    assert "edit(model, vae, image, mask, [0, 1, 2, 0], " in call


def test_a_picture_is_taken_apart_and_what_is_none_is_told(page, place):
    page.get_by_role("tab", name="Reconstruct").click()
    remove = page.locator("#picture button[aria-label*=emove], #picture button[aria-label=Clear]")
    page.locator("#photos").get_by_text("china").click()
    page.locator("#pictures").get_by_text("Original").first.wait_for()
    remove.click()
    page.locator("#picture input[type=file]").set_input_files(place / "photo.png")
    for text in ("Original", "Continuous VAE: ", "2 bits, ", "3 bits, ", "4 bits, "):
        page.locator("#pictures").get_by_text(text).first.wait_for()
    remove.click()
    page.locator("#picture input[type=file]").set_input_files(place / "damaged.png")
    assert "damaged.png" in message(page)
