"""Models as folders and repositories: written, pushed, read again, and what is refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, load_file, save

from models.hub import CONFIG, WEIGHTS, Origin
from models.tokenbridge import TokenBridge
from tests.conftest import tiny_model
from tests.hub import in_place_of_the_hub
from tests.runs import assert_same_training


@pytest.fixture(scope="module")
def model() -> TokenBridge:
    return tiny_model(head_input="published", latent_scale=0.7, quant_min=-4.0)


@pytest.fixture
def folder(model, tmp_path) -> Path:
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def hub(monkeypatch):
    with in_place_of_the_hub(monkeypatch) as hub:
        yield hub


def assert_same(found: TokenBridge, expected: TokenBridge) -> None:
    assert found.config == expected.config and found.origin == expected.origin
    assert_same_training(found.state_dict(), expected.state_dict())


def test_a_folder_gives_the_same_model_and_equal_models_equal_files(tmp_path):
    model = tiny_model(quantizer="calibrated")
    with pytest.raises(ValueError, match="has no levels"):
        model.save_pretrained(tmp_path)
    assert list(tmp_path.iterdir()) == []
    edges = torch.linspace(-2, 2, 9) * torch.rand(6, 1).add(0.5)
    model.quantizer.set_levels(edges, (edges[:, 1:] + edges[:, :-1]) / 2)
    model.origin = Origin("ema", 12, 3, ("ant", "bee", "cat"), "ab" * 32)
    model.save_pretrained(tmp_path / "model")
    modes = {path.stat().st_mode for path in (tmp_path / "model").iterdir()}
    assert len(modes) == 1  # who may read the settings may read the weights
    state = load_file(tmp_path / "model" / WEIGHTS)
    assert state.keys() == model.published_state_dict().keys()
    assert json.loads((tmp_path / "model" / CONFIG).read_text()) == model.config.to_dict()
    found = TokenBridge.from_pretrained(tmp_path / "model")
    assert_same(found, model)
    assert found.quantizer.fitted and not found.training and not found.head.training
    found.save_pretrained(tmp_path / "again")
    for path in (tmp_path / "model").iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()
    assert tiny_model().origin == Origin()  # nothing known, and nothing shared between models


def test_settings_of_use_can_be_changed_and_settings_of_shape_cannot(folder):
    found = TokenBridge.from_pretrained(folder, head_input="trained", grad_checkpointing=True)
    assert found.config.head_input == "trained" and found.head.grad_checkpointing
    with pytest.raises(ValueError, match="do not match.*fake_latent|do not match.*class_emb"):
        TokenBridge.from_pretrained(folder, class_num=4)


def test_a_disk_that_fails_leaves_the_weights_that_were_there(folder, monkeypatch):
    def fail(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    before = (folder / WEIGHTS).read_bytes()
    monkeypatch.setattr("models.hub.save_file", fail)
    with pytest.raises(OSError, match="No space"):
        tiny_model(class_num=5).save_pretrained(folder)
    assert (folder / WEIGHTS).read_bytes() == before
    assert {path.name for path in folder.iterdir()} <= {"README.md", CONFIG, WEIGHTS}


def test_push_to_hub_sends_the_files_and_from_pretrained_reads_them(model, hub, tmp_path):
    model.push_to_hub("me/digits")
    assert set(hub.repos["me/digits"]) == {"README.md", CONFIG, WEIGHTS}
    hub.repos["me/digits"]["pytorch_model.bin"] = b"a pickle, which nobody asks for"
    assert_same(TokenBridge.from_pretrained("me/digits", cache_dir=tmp_path), model)
    assert not any(".bin" in path for _, path, _ in hub.requests)
    asked = len(hub.requests)
    again = TokenBridge.from_pretrained("me/digits", cache_dir=tmp_path, local_files_only=True)
    assert_same(again, model)
    assert len(hub.requests) == asked


def test_what_is_nowhere_and_a_missing_file_are_named(folder, hub, tmp_path):
    with pytest.raises(FileNotFoundError, match="^no/where: no such folder, nor on the hub"):
        TokenBridge.from_pretrained("no/where", cache_dir=tmp_path)
    (folder / WEIGHTS).unlink()
    hub.repos["a/b"] = {path.name: path.read_bytes() for path in folder.iterdir()}
    for source in (folder, "a/b"):
        with pytest.raises(FileNotFoundError, match=f"{source}.*/{WEIGHTS}"):
            TokenBridge.from_pretrained(source, cache_dir=tmp_path)


def test_what_is_damaged_is_refused_in_one_line(folder):
    """Which tensors do not match is said as for a checkpoint: test_tokenbridge.py."""
    settings, weights = (folder / CONFIG).read_text(), (folder / WEIGHTS).read_bytes()
    changes = dict(encoder_depth=3, encoder_embed_dim=64, channel_order=5, img_size="16")
    changed = [json.dumps(json.loads(settings) | {k: v}).encode() for k, v in changes.items()]
    damaged = [(CONFIG, x) for x in (b"", b"[1, 2]", b"\xff\xfe", b"[" * 100_000, *changed)]
    other = save({name: t for name, t in load(weights).items() if name != "mask_token"})
    damaged += [(WEIGHTS, x) for x in (b"", weights[:100], weights[:-1], other)]
    for name, content in damaged:
        (folder / CONFIG).write_text(settings)
        (folder / WEIGHTS).write_bytes(weights)
        (folder / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{folder}: ") as error:
            TokenBridge.from_pretrained(folder)
        assert "\n" not in str(error.value) and len(str(error.value)) < 600
