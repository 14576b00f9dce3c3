"""How the page looks: the colours of the project's reports, system fonts, light and dark."""

import gradio as gr

FONTS = ("system-ui", "-apple-system", "Segoe UI", "sans-serif")
MONOSPACE = ("ui-monospace", "SFMono-Regular", "monospace")
TEAL = gr.themes.Color(
    *("#eef6f8", "#d9ebf0", "#b5d8e2", "#86bfcf", "#4f9fb5", "#2b8099"),
    *("#1f6f8b", "#1b5b72", "#194b5d", "#163e4d", "#0e2933"),
    name="teal",
)


def theme() -> gr.themes.Base:
    """Fonts of the system: the page loads none."""
    return gr.themes.Base(
        primary_hue=TEAL,
        neutral_hue="slate",
        font=[gr.themes.Font(name) for name in FONTS],
        font_mono=[gr.themes.Font(name) for name in MONOSPACE],
        radius_size="md",
    ).set(
        body_background_fill="#fbfbf9",
        body_background_fill_dark="#14171c",
        body_text_color_subdued="#5c6675",
        body_text_color_subdued_dark="#9aa3b0",
        block_info_text_color="#5c6675",
        block_info_text_color_dark="#9aa3b0",
        block_background_fill_dark="#1b1f26",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        button_primary_text_color="white",
    )


CSS = """
.gradio-container { width: 100% !important; max-width: 84rem !important;
  margin: 0 auto !important; }
.tb-title { margin: .4rem 0 0; font-size: 1.9rem; line-height: 1.2; font-weight: 700;
  letter-spacing: -.02em; }
.tb-lead, .tb-facts { margin: .1rem 0; color: var(--body-text-color-subdued); }
.tb-facts { font-size: .9rem; overflow-wrap: anywhere; }
.tb-seed { align-items: end; }
.tb-columns { display: grid !important; gap: 1rem 1.4rem; align-items: start;
  grid-template: "ask show" auto "more show" 1fr / 18.5rem minmax(0, 1fr); }
.tb-columns > * { min-width: 0 !important; width: auto !important; }
#download { width: auto; justify-self: end; align-self: flex-end; flex-grow: 0; }
#checkpoint input { padding-right: 1.8rem; text-overflow: ellipsis; }
.tb-ask { grid-area: ask; }
.tb-show { grid-area: show; }
.tb-more { grid-area: more; }
#stage .html-container, #comparison .html-container, #facts .html-container { padding: 0; }
#facts { padding: 0 .2rem; }
@media (max-width: 860px) {
  .tb-columns { grid-template: "ask" auto "show" auto "more" auto / minmax(0, 1fr); }
  .tb-choice { flex-direction: column; }
  .tb-stage { padding: .8rem .9rem 1rem; }
  .tb-empty { min-height: 9rem; }
}
.tb-stage { padding: 1rem 1.2rem 1.2rem; border: 1px solid var(--border-color-primary);
  border-radius: .7rem; background: var(--block-background-fill); }
.tb-empty { min-height: 22rem; display: grid; place-items: center; text-align: center; }
.tb-empty p { max-width: 26rem; color: var(--body-text-color-subdued); }
.tb-status { margin: 0 0 .5rem; font-variant-numeric: tabular-nums; }
.tb-bar { height: 4px; margin-bottom: 1.1rem; border-radius: 2px; overflow: hidden;
  background: var(--border-color-primary); }
.tb-bar i { display: block; height: 100%; background: var(--primary-600); }
.tb-panels { display: grid; gap: 1.2rem; }
@media (min-width: 560px) { .tb-panels { grid-template-columns: repeat(3, minmax(0, 1fr)); } }
.tb-stage figure { margin: 0; min-width: 0; }
.tb-stage figcaption { margin-bottom: .4rem; font-weight: 600; }
.tb-stage figure p { margin: .3rem 0 0; font-size: .85rem;
  color: var(--body-text-color-subdued); }
.tb-stage figure p b { color: var(--body-text-color); font-weight: 600; }
.tb-tiles { display: grid; gap: .5rem; }
.tb-tile { min-width: 0; }
.tb-tile > div { aspect-ratio: 1; border-radius: .35rem; overflow: hidden;
  background: repeating-linear-gradient(45deg, #8a94a222 0 4px, #8a94a244 4px 8px); }
.tb-tile img, .tb-tile svg { display: block; width: 100%; height: 100%; object-fit: contain; }
.tb-tile img.tb-small { image-rendering: pixelated; }
.tb-tile text { font-size: .3px; text-anchor: middle; dominant-baseline: central;
  font-variant-numeric: tabular-nums; pointer-events: none; }
.tb-tile > span { display: block; margin-top: .15rem; font-size: .8rem; text-align: center;
  color: var(--body-text-color-subdued); white-space: nowrap; overflow: hidden;
  text-overflow: ellipsis; }
.tb-legend { display: flex; align-items: center; gap: .5rem; margin-top: .6rem;
  font-size: .8rem; font-variant-numeric: tabular-nums; white-space: nowrap; }
.tb-legend i { flex: 1; height: .6rem; border-radius: .3rem; }
.tb-recipe { margin-top: .7rem; font-size: .85rem; }
.tb-recipe summary { cursor: pointer; color: var(--primary-600); }
.tb-recipe code { display: block; margin-top: .4rem; padding: .6rem .8rem; border-radius: .4rem;
  background: var(--background-fill-secondary); overflow-wrap: anywhere; }
.tb-histogram { margin-top: 1.2rem !important; }
.tb-histogram svg { display: block; width: 100%; height: 170px; overflow: visible;
  border-bottom: 1px solid var(--border-color-primary); }
.tb-histogram rect { fill: var(--primary-500); }
.tb-histogram rect.tb-over { fill: transparent; }
.tb-histogram g:hover rect.tb-over { fill: #8a94a222; }
.tb-histogram polyline { fill: none; stroke: #d0702a; stroke-width: 2; stroke-linejoin: round;
  vector-effect: non-scaling-stroke; pointer-events: none; }
.tb-key { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; font-size: .85rem; }
.tb-key span { display: flex; align-items: center; gap: .4rem; }
.tb-key i { width: .9rem; height: .7rem; border-radius: 2px; background: var(--primary-500); }
.tb-key i.tb-line { height: 2px; background: #d0702a; }
.tb-top { margin-top: .3rem; font-size: .75rem; color: var(--body-text-color-subdued); }
.tb-ticks { display: flex; justify-content: space-between; font-size: .75rem;
  color: var(--body-text-color-subdued); font-variant-numeric: tabular-nums; }
"""
