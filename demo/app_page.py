"""The page of demo/app.py: its components, and what happens when one is touched."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path

import matplotlib
import numpy as np
import torch

from demo.app_model import Library, draw, editing, reconstruct
from models.sampler import CFG_SCHEDULES, NOTHING, ORDERS, SamplingOptions
from util.args import MAX_BITS
from util.errors import UserError, as_user_error
from util.evaluation.settings import find_class

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
import gradio as gr

VIRIDIS = matplotlib.colormaps["viridis"]  # dark to bright, transparent where there is no number
SMALLEST = 256  # pixels of a side: smaller pictures are shown with larger pixels
EVENT = dict(api_visibility="private", concurrency_id="model", show_progress="minimal")


@contextmanager
def errors_in_the_page() -> Iterator[None]:
    """What a user can mend is shown as one line, and the page goes on."""
    try:
        yield
    except (UserError, TypeError, torch.OutOfMemoryError) as error:  # TypeError: an empty field
        raise gr.Error(str(error), title="Not possible", print_exception=False) from error


@errors_in_the_page()
def opened(library: Library, name: str | None, weights: str):
    """Facts, classes and settings of the checkpoint that was chosen."""
    if not name:
        return "No checkpoint found. `make demo` trains one in 5 minutes.", *[gr.skip()] * 6
    loaded = library.load(name, weights)
    labels = [f"{label} ({i})" for i, label in enumerate(loaded.classes)]
    config = loaded.model.config
    bits = sorted({2, 4, (config.quant_levels - 1).bit_length()})
    some = gr.Dropdown(choices=labels, value=labels[:: -(-len(labels) // 4)])
    return loaded.facts, some, *loaded.settings.values(), bits, config.img_size


def generate(library: Library, name, weights, painted, classes, *settings):
    """After every iteration: status, images, order, confidence and the call from Python.

    painted: None, or files of a picture and of what is painted on it, to be drawn anew.
    """
    count, seconds, *options = settings
    with errors_in_the_page():
        loaded = library.load(name, weights)
        if not classes:
            raise UserError("no class is chosen: pick at least one")
        chosen = [find_class(text, loaded.classes) for text in classes]
        labels = [chosen[i % len(chosen)] for i in range(count)]
        names = [loaded.classes[label] for label in labels]
        with as_user_error("settings"):
            options = SamplingOptions(*options[:-1], token_cache=options[-1])
        known = [f"{k}={v!r}" for k, v in asdict(options).items() if v is not None]
        given = editing(loaded, painted, len(labels)) if painted else NOTHING
        function = "edit(model, vae, image, mask" if painted else "generate(model, vae"
        call = f"{function}, {labels}, {', '.join(known)})"
        guess = -np.log(loaded.model.config.quant_levels)
        began = time.monotonic()
        for step, steps, pixels, (orders, sure) in draw(loaded, labels, options, seconds, given):
            filled = np.isfinite(orders)
            filled |= False if given.known_mask is None else given.known_mask.numpy()
            factor = pixels.shape[1] // filled.shape[1]
            shown = filled.repeat(factor, axis=1).repeat(factor, axis=2)[..., None]
            yield (
                f"{'Iteration' if step < steps else 'Done:'} {step} of {steps}, {filled[0].sum()} "
                f"of {filled[0].size} positions filled, {time.monotonic() - began:.1f} s",
                gallery(np.where(shown, pixels, np.uint8(190)), names),
                gallery(VIRIDIS((orders - 1) / max(steps - 1, 1), bytes=True), names),
                gallery(VIRIDIS(1 - sure / guess, bytes=True), names),
                call,
            )


@errors_in_the_page()
def reconstructed(library: Library, name, weights, picture, bits, size):
    if not picture:
        return gr.skip()
    return gallery(*reconstruct(library.load(name, weights), picture, int(size), sorted(bits)))


def gallery(pixels: np.ndarray, captions: list[str]) -> list[tuple[np.ndarray, str]]:
    """uint8 [B, S, S, C] as gradio takes it; pixels are repeated where they are few."""
    factor = max(1, SMALLEST // pixels.shape[1])
    return list(zip(pixels.repeat(factor, 1).repeat(factor, 2), captions, strict=True))


def make_page(library: Library, seed: int, photos: list[str]) -> gr.Blocks:
    with gr.Blocks(title="TokenBridge", analytics_enabled=False, delete_cache=(60, 600)) as blocks:
        gr.Markdown("# TokenBridge")
        with gr.Row():
            checkpoint = gr.Dropdown(label="Checkpoint", elem_id="checkpoint", scale=3)
            weights = gr.Radio(["ema", "model"], value="ema", label="Weights: averaged or raw")
        facts = gr.Markdown(elem_id="facts")
        with gr.Tab("Generate"), gr.Row():
            drawing, settings = generate_tab(library, [checkpoint, weights], seed)
        with gr.Tab("Edit"), gr.Row():
            edit_tab(library, [checkpoint, weights], drawing[0], settings)
        with gr.Tab("Reconstruct"), gr.Row():
            drawing += reconstruct_tab(library, [checkpoint, weights], photos)
        show = partial(opened, library), [checkpoint, weights], [facts, *drawing]
        gr.on([checkpoint.input, weights.input], *show, **EVENT)

        def choices():  # as the folders are now
            found = library.choices()
            return gr.Dropdown(choices=found, value=found[0] if found else None)

        blocks.load(choices, None, checkpoint, **EVENT).then(*show, **EVENT)
    return blocks


def generate_tab(library: Library, model: list, seed_value: int) -> list:
    """The components whose values a checkpoint brings with it."""
    with gr.Column(scale=1, min_width=280):
        classes = gr.Dropdown(label="Classes", multiselect=True, allow_custom_value=True)
        count = gr.Slider(1, 16, 4, step=1, label="Images")
        with gr.Row():
            start = gr.Button("Generate", variant="primary", elem_id="generate", min_width=100)
            halt = gr.Button("Stop", elem_id="stop", min_width=70)
        num_iter = gr.Slider(1, 1024, 64, step=1, label="Iterations")
        cfg = gr.Slider(0, 10, 3.1, step=0.05, label="Guidance (1: none)")
        temperature = gr.Slider(0, 2, 1, step=0.01, label="Temperature")
        seed = gr.Number(seed_value, label="Seed", precision=0, minimum=0)
        with gr.Accordion("More", open=False):
            order = gr.Radio(ORDERS, value=ORDERS[0], label="Positions to fill first")
            schedule = gr.Radio(CFG_SCHEDULES, value=CFG_SCHEDULES[0], label="Guidance schedule")
            cache = gr.Slider(0, 16, 0, step=1, label="Token cache (0: none)")
            seconds = gr.Slider(0, 20, 2, step=0.5, label="Seconds to take, to watch")
    outputs = results("Choose classes and press **Generate**.", "")
    settings = [count, seconds, num_iter, cfg, schedule, temperature, order, seed, cache]
    inputs = [*model, gr.State(), classes, *settings]
    drawing = start.click(partial(generate, library), inputs, outputs, **EVENT)
    status = outputs[0]
    halt.click(lambda now: f"Stopped. {now}", status, status, cancels=drawing, queue=False)
    return [classes, num_iter, cfg, temperature], settings


def results(advice: str, prefix: str) -> list:
    """The components that show what `generate` yields. prefix: of their names in the page."""
    with gr.Column(scale=4):
        status, shown = gr.Markdown(advice, elem_id=f"{prefix}status"), []
        for note in ("Images", "Order (dark: first)", "Confidence (dark: a guess)"):
            with gr.Tab(note, elem_id=prefix + note[:5]):
                shown.append(gr.Gallery(show_label=False, format="png", columns=4))
        call = gr.Code(language="python", lines=2, wrap_lines=True, elem_id=f"{prefix}call")
    return [status, *shown, call]


def edit_tab(library: Library, model: list, classes: gr.Dropdown, settings: list) -> None:
    """A picture is painted on; there it is drawn anew, as the settings of Generate say."""
    with gr.Column(scale=2, min_width=320):
        brush = gr.Brush(colors=["#000000"], color_mode="fixed")
        tools = dict(brush=brush, layers=False, transforms=(), format="png")
        sources = ["upload", "clipboard"]
        editor = gr.ImageEditor(label="Picture", sources=sources, elem_id="editor", **tools)
        editor.preprocess = painted_files
        chosen = gr.Dropdown(label="Classes", multiselect=True, allow_custom_value=True)
        start = gr.Button("Draw what is painted over", variant="primary", elem_id="edit")
    outputs = results("Drop a picture, paint over what shall change, choose classes.", "edited-")
    classes.change(lambda same: same, classes, chosen, queue=False, show_progress="hidden")
    inputs = [*model, editor, chosen, *settings]
    start.click(partial(generate, library), inputs, outputs, **EVENT)


def painted_files(payload) -> list[str]:
    """In the place of gradio's own reading, which opens any format: the picture's file and those of
    what is painted on it, for the project's.
    """
    if payload is None or payload.background is None:
        return [""]
    return [part.path for part in (payload.background, *payload.layers)]


def reconstruct_tab(library: Library, model: list, photos: list[str]) -> list:
    with gr.Column(scale=1, min_width=280):
        picture = gr.Image(label="Picture", sources=["upload", "clipboard"], elem_id="picture")
        # The project's own reader opens it: no other formats, one line for a damaged file.
        picture.preprocess = lambda payload: payload.path if payload else None
        named = [(Path(path).stem, path) for path in photos]
        photo = gr.Radio(named, label="Or a photograph", elem_id="photos", visible=bool(photos))
        photo.input(lambda path: path, photo, picture, **EVENT)
        gr.on([picture.clear, picture.upload], lambda: None, None, photo, **EVENT)
        widths = list(range(1, MAX_BITS + 1))
        bits = gr.CheckboxGroup(widths, label="Bits a scalar", elem_id="bits")
        size = gr.Number(256, label="Pixels a side, of the centre", precision=0)
    with gr.Column(scale=4):
        shown = gr.Gallery(show_label=False, format="png", columns=4, elem_id="pictures")
    inputs = [picture, bits, size]
    show = partial(reconstructed, library), [*model, *inputs], shown
    gr.on([part.change for part in inputs], *show, **EVENT)
    return [bits, size]
