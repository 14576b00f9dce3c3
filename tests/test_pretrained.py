"""Models as folders and repositories: written, pushed, read again, and what is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.hub import CONFIG, HEADER, WEIGHTS, Origin
from models.sampler import sample_latents
from models.tokenbridge import TokenBridge
from tests.conftest import tiny_model
from tests.hub import TOKEN, in_place_of_the_hub


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
    """Settings, every tensor, and therefore what they draw."""
    assert found.config == expected.config
    tensors, others = found.state_dict(), expected.state_dict()
    assert list(tensors) == list(others)
    assert [name for name in others if not torch.equal(tensors[name], others[name])] == []
    sampling = dict(num_iter=3, cfg=2.0, seed=1)
    labels = torch.tensor([0, 2])
    latents = sample_latents(found, labels, **sampling)
    assert torch.equal(latents, sample_latents(expected, labels, **sampling))


def test_a_folder_holds_the_published_names_and_the_settings(model, folder):
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", CONFIG, WEIGHTS]
    state = load_file(folder / WEIGHTS)
    assert {k: v.shape for k, v in state.items()} == {
        k: v.shape for k, v in model.published_state_dict().items()
    }
    assert json.loads((folder / CONFIG).read_text()) == model.config.to_dict()
    assert "library_name: tokenbridge" in (folder / "README.md").read_text()


def test_a_folder_gives_the_same_model_in_evaluation_mode(model, folder):
    found = TokenBridge.from_pretrained(folder)
    assert_same(found, model)
    assert not found.training and not found.head.training


def test_equal_models_give_equal_files(model, folder, tmp_path):
    TokenBridge.from_pretrained(folder).save_pretrained(tmp_path / "again")
    for path in folder.iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()


def test_calibrated_levels_travel_along(tmp_path):
    model = tiny_model(quantizer="calibrated")
    with pytest.raises(ValueError, match="has no levels yet"):
        model.save_pretrained(tmp_path / "early")
    assert not (tmp_path / "early" / WEIGHTS).exists()
    edges = torch.linspace(-2, 2, 9) * torch.rand(6, 1).add(0.5)
    model.quantizer.set_levels(edges, (edges[:, 1:] + edges[:, :-1]) / 2)
    model.save_pretrained(tmp_path / "model")
    found = TokenBridge.from_pretrained(tmp_path / "model")
    assert found.fitted and torch.equal(found.quantizer.boundaries, edges)
    assert_same(found, model)


def test_the_origin_travels_along(tmp_path):
    model = tiny_model()
    model.origin = Origin("ema", 12, 3, ("ant", "bee", "cat"), "ab" * 32)
    model.save_pretrained(tmp_path)
    found = TokenBridge.from_pretrained(tmp_path)
    assert found.origin == model.origin
    found.save_pretrained(tmp_path / "again")
    assert TokenBridge.from_pretrained(tmp_path / "again").origin == model.origin
    assert tiny_model().origin == Origin()  # nothing known, and nothing shared between models


def test_settings_of_use_can_be_changed_and_settings_of_shape_cannot(folder):
    found = TokenBridge.from_pretrained(folder, head_input="trained", grad_checkpointing=True)
    assert found.config.head_input == "trained" and found.head.grad_checkpointing
    with pytest.raises(ValueError, match="do not match.*fake_latent|do not match.*class_emb"):
        TokenBridge.from_pretrained(folder, class_num=4)
    with pytest.raises(ValueError, match="unknown model settings.*colour"):
        TokenBridge.from_pretrained(folder, colour="red")


def test_saving_again_replaces_weights_and_keeps_a_card(model, folder):
    (folder / "README.md").write_text("mine")
    other = tiny_model(class_num=5)
    other.save_pretrained(folder)
    assert_same(TokenBridge.from_pretrained(folder), other)
    assert (folder / "README.md").read_text() == "mine"
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", CONFIG, WEIGHTS]


def test_a_disk_that_fails_leaves_no_half_of_a_file(model, tmp_path, monkeypatch):
    def fail(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("models.hub.save_file", fail)
    with pytest.raises(OSError, match="No space"):
        model.save_pretrained(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_push_to_hub_lands_the_files_and_from_pretrained_reads_them(model, hub, tmp_path):
    page = model.push_to_hub("me/digits", token=TOKEN)
    assert page.startswith(f"{hub.url}/me/digits/commit/")
    assert set(hub.repos["me/digits"]) == {"README.md", CONFIG, WEIGHTS}
    found = TokenBridge.from_pretrained("me/digits", cache_dir=tmp_path)
    assert_same(found, model)
    asked = len(hub.requests)
    again = TokenBridge.from_pretrained("me/digits", cache_dir=tmp_path, local_files_only=True)
    assert_same(again, model)
    assert len(hub.requests) == asked


def test_pushing_needs_a_token(model, hub):
    with pytest.raises(OSError, match="401"):
        model.push_to_hub("me/digits", token="wrong")
    assert hub.repos == {}


def test_only_two_files_of_a_repository_are_fetched(model, folder, hub, tmp_path):
    """A pickle beside them is never asked for, and does not stand in for missing weights."""
    hub.repos["a/b"] = {path.name: path.read_bytes() for path in folder.iterdir()}
    hub.repos["a/b"]["pytorch_model.bin"] = b"evil"
    TokenBridge.from_pretrained("a/b", cache_dir=tmp_path)
    del hub.repos["a/b"][WEIGHTS]
    with pytest.raises(FileNotFoundError, match=f"a/b: .* no {WEIGHTS}"):
        TokenBridge.from_pretrained("a/b", cache_dir=tmp_path / "new")
    assert not any(".bin" in path for _, path, _ in hub.requests)


@pytest.mark.parametrize(
    ("name", "fragment"),
    [
        ("no/where", "no such repository"),
        ("../no/such/folder", "no such folder, and no name of a repository"),
    ],
)
def test_what_is_nowhere_is_told(hub, tmp_path, name, fragment):
    with pytest.raises(FileNotFoundError, match=f"{name}: .*{fragment}"):
        TokenBridge.from_pretrained(name, cache_dir=tmp_path)


def test_without_a_network_a_repository_is_told_to_be_out_of_reach(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder, and not fetched from the hub"):
        TokenBridge.from_pretrained("a/b", cache_dir=tmp_path, local_files_only=True)


def test_a_folder_of_something_else_is_told_with_the_remedy(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="has no config.json.*util.export"):
        TokenBridge.from_pretrained(tmp_path)
    (folder / WEIGHTS).unlink()
    with pytest.raises(FileNotFoundError, match="has no model.safetensors.*util.export"):
        TokenBridge.from_pretrained(folder)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"[1, 2]",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"hidden_size": 768, "model_type": "bert"}',
        b'{"img_size": "16"}',
        b'{"encoder_depth": 1000000000}',
        b'{"encoder_embed_dim": 1000000000000}',
        b'{"channel_order": 5}',
        b" " * 2_000_000,
    ],
)
def test_settings_that_are_none_are_refused_in_one_line(folder, text):
    """Before memory is taken for what they claim."""
    if text.startswith(b'{"') and b"hidden" not in text:
        text = json.dumps(json.loads((folder / CONFIG).read_text()) | json.loads(text)).encode()
    (folder / CONFIG).write_bytes(text)
    with pytest.raises(ValueError, match=f"{folder}: ") as error:
        TokenBridge.from_pretrained(folder)
    assert "\n" not in str(error.value) and len(str(error.value)) < 600


def test_weights_that_are_none_are_refused_in_one_line(model, folder):
    whole = (folder / WEIGHTS).read_bytes()
    for damaged in (b"", whole[:100], whole[:-1], b"\xff" * 8 + whole[8:], b"PK\x03\x04" + whole):
        (folder / WEIGHTS).write_bytes(damaged)
        with pytest.raises(ValueError, match=f"{WEIGHTS}: ") as error:
            TokenBridge.from_pretrained(folder)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("change", ["missing", "shape", "foreign", "header", "levels"])
def test_tensors_that_do_not_match_are_named(model, folder, change):
    state = {name: t.clone() for name, t in model.published_state_dict().items()}
    metadata = {}
    if change == "missing":
        del state["mask_token"]
    elif change == "shape":
        state["mask_token"] = torch.zeros(3)
    elif change == "foreign":
        state = {"bert.embeddings": torch.zeros(3)}
    elif change == "header":
        metadata = {HEADER: '{"classes": "ant"}'}
    else:
        state["reconstruction_values"] += 0.1
    save_file(state, folder / WEIGHTS, metadata)
    expected = {
        "missing": "missing .first: mask_token",
        "shape": "mask_token is .3,.",
        "foreign": "missing.*unexpected .first: bert.embeddings|blocks",
        "header": "classes",
        "levels": "reconstruction_values",
    }
    with pytest.raises(ValueError, match=expected[change]):
        TokenBridge.from_pretrained(folder)


def test_a_copy_of_a_folder_is_read_as_well(model, folder, tmp_path):
    assert_same(TokenBridge.from_pretrained(shutil.copytree(folder, tmp_path / "copy")), model)
