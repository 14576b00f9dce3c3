"""The page: what its functions say, and what a browser shows when somebody clicks through it."""

import json
import math
import os
import re
import shutil
import socket
import sys
from pathlib import Path
from threading import Event

import numpy as np
import pytest
import torch
from PIL import Image

import reconstruction
from demo import app, app_models
from demo.app_drawing import draw, labels_of, parse_seed, save
from demo.app_models import Library, class_labels, class_names
from demo.app_pictures import (
    CONFIDENCE,
    ORDER,
    colour,
    confidence_map,
    filled_only,
    histogram,
    order_map,
    text,
)
from demo.app_reconstruction import gaussian_shares, level_edges, quantizer_for, read_photo
from demo.app_reconstruction import reconstruct as reconstruct_photo
from models.generate import generate
from models.hub import Origin
from models.quantizer import CalibratedQuantizer, GaussianQuantizer
from models.sampler import SamplingOptions
from models.tokenbridge import tokenbridge_tiny
from models.tokenizers.kl16 import AutoencoderKL
from tests.conftest import tiny_model
from tests.runs import call, refused
from util.errors import UserError
from util.evaluation.settings import find_class
from util.vae_files import save_vae, vae_digest

CLASSES = ("ant", "bee", "red <b>cat</b> ${x}")
USUAL = {"preview_iter": 6, "cfg": [2.0], "temperature": 0.5}


def make_place(folder: Path) -> Path:
    """run/checkpoint-last.pth of a tiny model, exported/, their vae.ckpt, and two photos."""
    model = tiny_model()
    vae = AutoencoderKL(6, (1, 1, 1), ch=32, num_res_blocks=1)
    save_vae(folder / "vae.ckpt", vae)
    (folder / "run").mkdir()
    state = model.published_state_dict()
    averaged = {name: parameter.detach() for name, parameter in model.published_parameters()}
    raw = state | {"mask_token": state["mask_token"] + 1}
    saved = {"model": raw, "model_ema": averaged, "config": model.config.to_dict(), "step": 7}
    saved |= {"vae_sha256": vae_digest(folder / "vae.ckpt"), "classes": list(CLASSES)}
    torch.save(saved | {"args": USUAL}, folder / "run" / "checkpoint-last.pth")
    model.origin = Origin("ema", classes=CLASSES, vae_sha256=saved["vae_sha256"])
    model.save_pretrained(folder / "exported")
    pixels = np.random.default_rng(0).integers(0, 256, (24, 30, 3), np.uint8)
    Image.fromarray(pixels).resize((120, 96)).save(folder / "photo.png")
    (folder / "damaged.png").write_bytes((folder / "photo.png").read_bytes()[:500])
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return make_place(tmp_path_factory.mktemp("page"))


def library(*flags, typed: bool = True) -> Library:
    args = app.make_parser().parse([str(flag) for flag in flags])
    return Library(args, torch.device("cpu"), typed)


@pytest.fixture(scope="module")
def loaded(place):
    return library("--resume", place / "run").load(str(place / "run"), "ema")


# --- checkpoints


def test_checkpoints_of_the_usual_places_are_found(place, tmp_path, monkeypatch):
    shutil.copytree(place / "run", tmp_path / "output" / "demo" / "model")
    shutil.copytree(place / "exported", tmp_path / "output" / "demo" / "exported")
    (tmp_path / "output_dir").mkdir()
    monkeypatch.chdir(tmp_path)
    found = library().choices()
    assert found == ["output/demo/model/checkpoint-last.pth", "output/demo/exported"]
    assert library("--resume", place / "run").choices() == [
        str(place / "run" / "checkpoint-last.pth")
    ]


def test_a_checkpoint_brings_its_vae_classes_and_settings(loaded, place):
    assert loaded.classes == CLASSES
    assert (loaded.defaults.num_iter, loaded.defaults.cfg, loaded.defaults.temperature) == (
        6,
        2.0,
        0.5,
    )
    facts = " ".join(loaded.facts)
    assert str(place / "vae.ckpt") in facts and "4 × 4 positions of 6 × 3 bits" in facts
    exported = library("--resume", place / "exported").load(str(place / "exported"), "ema")
    assert exported.classes == CLASSES


def test_averaged_and_raw_weights_are_different_ones(place):
    shelf = library("--resume", place / "run")
    ema, raw = (shelf.load(str(place / "run"), kind) for kind in ("ema", "model"))
    token = ema.model.backbone.mask_token
    assert torch.equal(raw.model.backbone.mask_token, token + 1)
    assert shelf.load(str(place / "run"), "ema") is ema  # read once


def test_a_checkpoint_that_was_replaced_is_read_again(place, tmp_path):
    folder = shutil.copytree(place, tmp_path / "copy") / "run"
    shelf = library("--resume", folder)
    first = shelf.load(str(folder), "ema")
    saved = torch.load(folder / "checkpoint-last.pth", weights_only=True)
    torch.save(saved | {"step": 8}, folder / "checkpoint-last.pth")
    assert "step 7" in first.facts and "step 8" in shelf.load(str(folder), "ema").facts


@pytest.mark.parametrize(
    ("name", "weights", "fragments"),
    [
        ("", "ema", ["no checkpoint", "make demo"]),
        ("/nowhere", "ema", ["/nowhere", "does not exist"]),
        ("auto", "ema", ["auto", "does not exist"]),
        ("a\0b", "ema", ["does not exist"]),
        ("x" * 9999, "ema", ["does not exist"]),
        ("vae.ckpt", "ema", ["vae.ckpt", "unknown model settings"]),
        ("run", "both", ["'both'"]),
        ("exported", "model", ["exported", "ema"]),
        ("damaged.png", "ema", ["damaged.png", "damaged"]),
    ],
)
def test_what_is_no_checkpoint_is_told_in_one_line(place, monkeypatch, name, weights, fragments):
    monkeypatch.chdir(place)
    with pytest.raises(UserError) as caught:
        library("--resume", "run").load(name, weights)
    line = str(caught.value)
    assert "\n" not in line and all(fragment in line for fragment in fragments), line


def test_a_pickle_that_runs_code_is_refused(place, tmp_path):
    class Harm:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "harm"),)

    torch.save({"model": Harm()}, tmp_path / "evil.pth")
    with pytest.raises(UserError, match="evil.pth"):
        library("--resume", tmp_path).load(str(tmp_path / "evil.pth"), "ema")
    assert not (tmp_path / "harm").exists()


def test_visitors_from_elsewhere_read_no_files_but_those_listed(place):
    shelf = library("--resume", place / "run", typed=False)
    shelf.load(str(place / "run" / "checkpoint-last.pth"), "ema")
    with pytest.raises(UserError, match="not in the list"):
        shelf.load(str(place / "exported"), "ema")


def test_the_vae_is_known_by_its_checksum(place, tmp_path):
    """Another one is used where it is named, with a warning; nothing is taken silently."""
    folder = shutil.copytree(place / "run", tmp_path / "run")
    with pytest.raises(UserError, match="--vae_path"):
        library("--resume", folder).load(str(folder), "ema")
    vae = AutoencoderKL(6, (1, 1, 1), ch=32, num_res_blocks=1)
    save_vae(tmp_path / "vae.ckpt", vae)
    with pytest.raises(UserError, match="--vae_path"):
        library("--resume", folder).load(str(folder), "ema")
    shelf = library("--resume", folder, "--vae_path", tmp_path / "vae.ckpt")
    assert "not the VAE" in shelf.load(str(folder), "ema").warnings[0]


def test_a_published_checkpoint_needs_no_settings(tmp_path):
    """It holds tensors alone: the flags' defaults, its size by its tensors, ImageNet's names."""
    model = tokenbridge_tiny()
    averaged = {name: parameter.detach() for name, parameter in model.published_parameters()}
    saved = {"model": model.published_state_dict(), "model_ema": averaged}
    torch.save(saved, tmp_path / "checkpoint-last.pth")
    vae = AutoencoderKL(16, (1, 1, 1, 1, 1), ch=32, num_res_blocks=1)
    save_vae(tmp_path / "kl16.ckpt", vae)
    shelf = library("--vae_path", tmp_path / "kl16.ckpt")
    loaded = shelf.load(str(tmp_path), "ema")
    assert loaded.classes[207] == "golden retriever" and loaded.defaults.cfg == 3.1
    assert loaded.model.config.head_input == "published" and not loaded.warnings


def test_size_of_a_published_checkpoint_is_that_of_its_classes(tmp_path):
    def checkpoint(width):
        return app_models.Checkpoint(
            tmp_path, {"model": {"class_emb.weight": torch.empty(9, width)}}
        )

    assert app_models.size_of(checkpoint(1024)) == "tokenbridge_large"
    assert app_models.size_of(checkpoint(1280)) == "tokenbridge_huge"
    with pytest.raises(UserError, match="none of the sizes"):
        app_models.size_of(checkpoint(7))


# --- classes and settings


def test_imagenet_s_classes_have_names_and_others_keep_theirs():
    synsets = tuple(f"n{i:08d}" for i in range(1000))
    for known in (None, synsets):
        names = class_names(1000, known)
        assert (names[0], names[207], names[999]) == ("tench", "golden retriever", "toilet tissue")
    assert class_names(3, None) == ("0", "1", "2")
    assert class_names(3, ("a", "b")) == ("a", "b")  # the third was never trained
    assert class_names(2, synsets[:2]) == synsets[:2]


def test_a_class_is_understood_as_label_name_or_number():
    names = ("Tench", "crane", "crane", "10", "4")
    assert [find_class(label, names) for label in class_labels(names)] == list(range(5))
    assert find_class(" tench ", names) == 0
    assert find_class("2", names) == 2
    assert find_class("10", names) == 3  # a name comes before a number
    for wrong, told in (("crane", "may be"), ("tenhc", "did you mean tench"), ("5", "from 0 to 4")):
        with pytest.raises(UserError, match=told):
            find_class(wrong, names)
    with pytest.raises(UserError):
        find_class("", names)
    with pytest.raises(UserError):
        find_class("٣", names)


@pytest.mark.parametrize("seed", ["", "abc", "-1", "1.5", "1e3", str(2**63)])
def test_what_is_no_seed_is_told(seed):
    with pytest.raises(UserError, match="not a whole number"):
        parse_seed(seed)
    assert parse_seed(" 12 ") == 12


def test_images_take_the_classes_in_turn():
    assert labels_of([4, 2], 5) == [4, 2, 4, 2, 4]
    for chosen, images in (([], 1), ([1], 0), ([1], 17)):
        with pytest.raises(UserError):
            labels_of(chosen, images)


# --- drawing


@pytest.mark.parametrize("order", ["random", "confidence", "raster"])
def test_the_last_frame_is_what_generate_makes(loaded, order):
    settings = dict(num_iter=5, cfg=2.0, temperature=0.7, order=order, seed=3)
    frames = list(draw(loaded, [0, 2], SamplingOptions(**settings), watch=1e-9))
    expected = generate(loaded.model, loaded.tokenizer, [0, 2], **settings)
    assert np.array_equal(frames[-1].pixels, expected)
    assert [frame.step for frame in frames][-1] == frames[-1].steps == 5 and frames[-1].done
    if order == "raster":
        assert (np.diff(frames[-1].order, axis=1) >= 0).all()


def test_frames_only_ever_add_positions(loaded):
    """More iterations than positions: those that fill nothing are none."""
    frames = list(draw(loaded, [1], SamplingOptions(40), watch=1e-9))
    steps = frames[-1].steps
    assert steps <= 16 and sorted(frames[-1].order[0]) != [0] * 16
    assert set(frames[-1].order[0]) == set(range(1, steps + 1))
    before = np.zeros(16, int)
    for frame in frames:
        old = before > 0
        assert (frame.order[0][old] == before[old]).all()
        assert ((frame.order[0] > 0) == np.isfinite(frame.confidence[0])).all()
        before = frame.order[0]
    sure = frames[-1].confidence
    assert (sure <= 0).all() and len(np.unique(sure)) > 8


def test_a_drawing_that_is_stopped_ends_before_the_next_iteration(loaded):
    stop = Event()
    frames = draw(loaded, [1], SamplingOptions(8), watch=1e-9, stop=stop)
    assert next(frames).step == 1
    stop.set()
    assert list(frames) == []


def test_unfilled_positions_are_transparent():
    pixels = np.full((8, 8, 3), 7, np.uint8)
    shown = filled_only(pixels, np.array([True, False, False, True]))
    assert shown[:4, :4, 3].all() and shown[4:, 4:, 3].all()
    assert not shown[:4, 4:, 3].any() and not shown[4:, :4, 3].any()
    assert (shown[..., :3] == 7).all()


def test_maps_put_every_position_in_its_place():
    svg = order_map(np.array([0, 1, 3, 2]), 3, "cat")
    cells = re.findall(r'<rect x="(\d)" y="(\d)"[^>]*fill="(#\w+)"><title>([^<]*)', svg)
    assert [cell[:2] for cell in cells] == [("1", "0"), ("0", "1"), ("1", "1")]
    assert cells[0][2] == ORDER[0] and cells[1][2] == ORDER[-1]
    assert cells[1][3] == "row 2, column 1: filled in iteration 3 of 3"
    assert re.findall(r">(\d)</text>", svg) == ["1", "3", "2"]
    assert "</text>" not in order_map(np.array([0, 1, 3, 2]), 3, "cat", columns=7)
    svg = confidence_map(np.array([math.nan, 0.0, -math.log(8), -9.0]), 8, "cat")
    fills = re.findall(r'<rect [^>]*fill="(#\w+)"', svg)
    assert fills == [CONFIDENCE[-1], CONFIDENCE[0], CONFIDENCE[0]]  # certain, guess, below


def test_colours_lie_between_the_stops():
    assert [colour(("#000000", "#0a1464"), t) for t in (-1, 0, 0.5, 1, 2)] == [
        *("#000000", "#000000", "#050a32", "#0a1464", "#0a1464"),
    ]


def test_names_can_not_become_markup_or_templates():
    assert text("<b>${x}`{{y}}") == "&lt;b&gt;&#36;&#123;x&#125;&#96;&#123;&#123;y&#125;&#125;"


def test_one_image_is_saved_as_it_is_and_several_as_a_sheet(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), np.uint8)
    save(pixels[:1], tmp_path / "one.png")
    assert np.array_equal(np.asarray(Image.open(tmp_path / "one.png")), pixels[0])
    save(pixels, tmp_path / "three.png")
    sheet = np.asarray(Image.open(tmp_path / "three.png"))
    assert np.array_equal(sheet[2:10, 12:20], pixels[1])


# --- reconstruction


@pytest.mark.parametrize("quantizer", [GaussianQuantizer(16), GaussianQuantizer(5, -2.0, 4.0)])
def test_expected_shares_are_those_of_gaussian_numbers(quantizer):
    """Brute force: a million of them through the quantizer."""
    edges, values = level_edges(quantizer)
    x = torch.randn(1_000_000)
    found = torch.bincount(quantizer.encode(x), minlength=quantizer.levels) / len(x)
    expected = gaussian_shares(edges)[0]
    assert torch.allclose(found.double(), expected, atol=2e-3) and expected.sum() == pytest.approx(
        1
    )
    assert torch.equal(values[0], quantizer.decode(torch.arange(quantizer.levels)))


def test_calibrated_levels_have_shares_of_their_own():
    quantizer = CalibratedQuantizer(2, 2)
    quantizer.set_levels(
        torch.tensor([[-9.0, 0.0, 9.0], [-9.0, 1.0, 9.0]]), torch.tensor([[-1.0, 1.0]] * 2)
    )
    shares = gaussian_shares(level_edges(quantizer)[0])
    assert shares[0].tolist() == [0.5, 0.5] and shares[1, 0] == pytest.approx(0.8413, abs=1e-4)


def test_a_photo_is_reconstructed_as_reconstruction_py_does(loaded, place, tmp_path):
    (tmp_path / "data" / "a").mkdir(parents=True)
    shutil.copy(place / "photo.png", tmp_path / "data" / "a" / "photo.png")
    argv = ["--image_dir", tmp_path / "data", "--vae_path", place / "vae.ckpt", "--bits", -1, 3]
    argv += ["--latent_scale", loaded.tokenizer.latent_scale, "--img_size", 32, "--no_metrics"]
    argv += ["--num_workers", 0, "--output_dir", tmp_path / "out", "--device", "cpu"]
    call(reconstruction.main, *map(str, argv))
    expected = json.loads((tmp_path / "out" / "results.json").read_text())["results"]
    photo = read_photo(str(place / "photo.png"))
    found = reconstruct_photo(photo, loaded.tokenizer, quantizer_for(loaded, 3), 32)
    assert found.psnr_continuous == pytest.approx(expected[0]["psnr"], abs=1e-6)
    assert found.psnr_quantized == pytest.approx(expected[1]["psnr"], abs=1e-6)
    assert found.entropy_bits == pytest.approx(expected[1]["entropy_bits"], abs=1e-6)
    assert found.shares.sum() == pytest.approx(1) and found.expected.sum() == pytest.approx(1)


def test_histogram_draws_every_level():
    svg = histogram(np.array([0.5, 0.25, 0.25, 0.0]), np.full(4, 0.25), np.array([-2, -1, 1, 2.0]))
    heights = re.findall(r'height="([\d.]+)"/></g>', svg)
    assert [float(height) for height in heights] == [100, 50, 50, 0]
    assert "level 4 of 4, 2.00: 0.00%, Gaussian 25.00%" in svg and ">−2.0<" in svg


@pytest.mark.parametrize("size", [3, 18, 2048])
def test_a_size_that_the_vae_cannot_take_is_told(loaded, place, size):
    with pytest.raises(UserError, match=f"{size} px: choose a multiple of 4"):
        photo = read_photo(str(place / "photo.png"))
        reconstruct_photo(photo, loaded.tokenizer, quantizer_for(loaded, 3), size)


def test_a_photo_that_is_none_is_told_by_its_name(place):
    for path, told in (("", "no photo yet"), (str(place / "damaged.png"), "damaged.png cannot")):
        with pytest.raises(UserError, match=told):
            read_photo(path)


# --- the command


def test_without_gradio_the_command_to_install_it_is_told(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    line = refused(capsys, app.main)
    assert "gradio" in line and "pip install" in line and ".[app]" in line


def test_a_checkpoint_that_is_not_there_is_told_before_the_page_opens(capsys):
    line = refused(capsys, app.main, "--resume", "/nowhere")
    assert "--resume /nowhere does not exist" in line


def test_an_address_that_is_taken_or_another_machine_s_is_told(capsys):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        taken = str(other.getsockname()[1])
        assert f"--port {taken}: cannot answer there" in refused(capsys, app.main, "--port", taken)
    assert "--host 192.0.2.1 --port" in refused(capsys, app.main, "--host", "192.0.2.1")


def test_only_this_machine_is_answered_unless_told_otherwise():
    assert app.make_parser().parse([]).host == "127.0.0.1"
    assert [app.is_loopback(h) for h in ("127.0.0.1", "::1", "localhost", "0.0.0.0", "a.b")] == [
        *(True, True, True, False, False)
    ]
