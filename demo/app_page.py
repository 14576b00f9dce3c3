"""Where everything stands on the page, and which answer of demo.app_answers belongs to what."""

import random
from pathlib import Path

import gradio as gr

from demo.app_answers import EMPTY, FIRST, NO_PHOTO, Page, told, told_on_the_way
from demo.app_drawing import MOST_IMAGES
from demo.app_models import Library
from demo.app_reconstruction import MOST_PIXELS
from demo.app_style import CSS, theme
from models.sampler import CFG_SCHEDULES, ORDERS
from util.args import MAX_BITS

TITLE = "TokenBridge"
LARGEST_PHOTO = 64 * 2**20  # bytes
PRIVATE = dict(api_visibility="private")  # a page for people, not a service for programs
EVENT = PRIVATE | dict(concurrency_limit=1, concurrency_id="model")  # one computes at a time
WEIGHTS = [("averaged (EMA)", "ema"), ("raw", "model")]


def make_page(library: Library, seed: int, files: Path) -> gr.Blocks:
    """files: the folder for what can be downloaded."""
    page = Page(library, files)
    with gr.Blocks(title=TITLE, analytics_enabled=False, fill_width=True) as blocks:
        gr.HTML(
            f'<h1 class="tb-title">{TITLE}</h1><p class="tb-lead">Draw with a model, and see what '
            "its tokenizer keeps of a photo.</p>"
        )
        with gr.Row(elem_classes="tb-choice"):
            checkpoint = gr.Dropdown(
                label="Checkpoint",
                allow_custom_value=library.typed,
                info="or type the path of another one" if library.typed else None,
                elem_id="checkpoint",
                scale=3,
            )
            weights = gr.Radio(WEIGHTS, value="ema", label="Weights", elem_id="weights", scale=1)
        facts = gr.HTML(elem_id="facts")
        with gr.Tab("Generate"):
            drawing = generate_tab(page, checkpoint, weights, seed)
        with gr.Tab("Reconstruct"):
            photo = reconstruct_tab(page, checkpoint, weights)
        opened = told(page.opened), [checkpoint, weights], [facts, *drawing, *photo]
        gr.on([checkpoint.input, weights.input], *opened, **EVENT)
        found = blocks.load(page.choices, None, checkpoint, show_progress="hidden", **PRIVATE)
        found.then(*opened, **EVENT)
    return blocks


def slider(low: float, high: float, value: float, step: float, label: str, name: str, info=None):
    return gr.Slider(low, high, value=value, step=step, label=label, info=info, elem_id=name)


def generate_tab(page: Page, checkpoint, weights, seed_value: int) -> list:
    """The settings that a checkpoint brings with it."""
    with gr.Row(elem_classes="tb-columns"):
        with gr.Column(elem_classes="tb-ask"):
            classes = gr.Dropdown(
                label="Classes",
                info="by name or number; several are drawn in turn",
                multiselect=True,
                allow_custom_value=True,
                elem_id="classes",
            )
            images = slider(1, MOST_IMAGES, FIRST, 1, "Images", "images")
            with gr.Row(elem_classes="tb-buttons"):
                start = gr.Button("Generate", variant="primary", elem_id="generate", min_width=100)
                halt = gr.Button("Stop", elem_id="stop", min_width=70)
        with gr.Column(elem_classes="tb-show"):
            shown = gr.HTML(EMPTY, elem_id="stage")
            download = gr.DownloadButton(
                "Download PNG", size="sm", interactive=False, elem_id="download"
            )
        with gr.Column(elem_classes="tb-more"):
            settings = [*sampling_settings(), *seed_settings(seed_value)]
    cfg, temperature, num_iter, order, seed, schedule, watch = settings
    start.click(
        told_on_the_way(page.generate),
        [checkpoint, weights, classes, images, watch]
        + [cfg, schedule, temperature, num_iter, order, seed],
        [shown, download],
        show_progress="hidden",
        trigger_mode="always_last",  # pressed while it draws: once more afterwards
        **EVENT,
    )
    halt.click(page.stop, None, None, queue=False, **PRIVATE)
    return [classes, cfg, num_iter, temperature, schedule]


def sampling_settings() -> tuple:
    """Guidance, temperature, iterations, order."""
    order = "Positions to fill first"
    return (
        slider(0, 10, 3.1, 0.05, "Guidance", "cfg", "1 is none"),
        slider(0, 2, 1, 0.01, "Temperature", "temperature", "0: the most likely level"),
        slider(1, 256, 64, 1, "Iterations", "num_iter"),
        gr.Radio(list(ORDERS), value=ORDERS[0], label=order, elem_id="order"),
    )


def seed_settings(value: int) -> tuple:
    """Seed; schedule and pace, folded away."""
    with gr.Row(elem_classes="tb-seed"):
        seed = gr.Textbox(str(value), label="Seed", max_lines=1, elem_id="seed", min_width=120)
        another = gr.Button("Another seed", size="sm", min_width=100, elem_id="another")
    with gr.Accordion("More", open=False):
        schedule = gr.Radio(
            list(CFG_SCHEDULES),
            value=CFG_SCHEDULES[0],
            label="Guidance schedule",
            info="linear: grows with the share that is filled",
            elem_id="schedule",
        )
        info = "a small model is slowed down, so that one can watch; 0: it is not"
        watch = slider(0, 20, 2, 0.5, "Take at least (seconds)", "watch", info)
    new = {"show_progress": "hidden"} | PRIVATE
    another.click(lambda: str(random.randrange(10**6)), None, seed, **new)
    return seed, schedule, watch


def reconstruct_tab(page: Page, checkpoint, weights) -> list:
    """The settings that a checkpoint brings with it."""
    with gr.Row(elem_classes="tb-columns"):
        with gr.Column(elem_classes="tb-ask"):
            photo = gr.Image(
                label="Photo",
                type="filepath",
                sources=["upload", "clipboard"],
                image_mode=None,
                height=260,
                elem_id="photo",
            )
            # The project's own reader opens it: no other formats, one line for a damaged file.
            photo.preprocess = lambda payload: payload.path if payload else None
            start = gr.Button("Reconstruct", variant="primary", elem_id="reconstruct")
        with gr.Column(elem_classes="tb-show"):
            shown = gr.HTML(NO_PHOTO, elem_id="comparison")
        with gr.Column(elem_classes="tb-more"):
            bits = slider(1, MAX_BITS, 6, 1, "Bits a scalar", "bits")
            size = gr.Dropdown(
                ["256"],
                value="256",
                label="Pixels a side",
                info=f"the centre square at this size; up to {MOST_PIXELS}",
                allow_custom_value=True,
                elem_id="size",
            )
            kinds = [("sample, as in training", "sample"), ("mean", "mode")]
            posterior = gr.Radio(kinds, value="sample", label="Latent", elem_id="posterior")
    inputs = [checkpoint, weights, photo, bits, size, posterior]
    start.click(told(page.reconstruct), inputs, shown, **EVENT)
    gr.on(
        [photo.change, bits.release, size.change, posterior.change],
        told(page.reconstruct_if_any),
        inputs,
        shown,
        trigger_mode="always_last",
        **EVENT,
    )
    return [bits, size]


def serve(blocks: gr.Blocks, host: str, port: int) -> str:
    """Start answering in the background; the address. Raises OSError if the port is taken."""
    blocks.queue(api_open=False, max_size=20)
    _, address, _ = blocks.launch(
        server_name=host,
        server_port=port,
        share=False,
        inbrowser=False,
        quiet=True,
        prevent_thread_lock=True,
        ssr_mode=False,
        mcp_server=False,
        enable_monitoring=False,
        run_history=False,
        footer_links=[],
        max_file_size=LARGEST_PHOTO,
        show_error=False,
        theme=theme(),
        css=CSS,
    )
    return address
