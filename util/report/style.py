"""How a report looks and what it does under a pointer: template, style sheet and script."""

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>$style</style>
</head>
<body>
<header><h1>$title</h1>$lead$cards</header>
<nav>$links</nav>
<main>$body</main>
<footer>$foot</footer>
<script>$script</script>
</body>
</html>
"""

STYLE = """
:root { color-scheme: light dark; --text: #1d2430; --soft: #5c6675; --page: #fbfbf9; --card: #fff;
  --line: #e2e5e9; --mark: #1f6f8b; --warm: #fff6e6; --edge: #e8c98a;
  --s0: #1f6f8b; --s1: #d0702a; --s2: #5a8f3c; --s3: #8a5bb0; --s4: #c0446a; --s5: #7a7f87; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e6e8ec; --soft: #9aa3b0; --page: #14171c; --card: #1b1f26; --line: #2c323c;
    --mark: #66bcd8; --warm: #2b2415; --edge: #6d5726;
    --s0: #5fb6d3; --s1: #f0985a; --s2: #92c973; --s3: #b995dd; --s4: #ec7c9f; --s5: #9aa3b0; } }
* { box-sizing: border-box; }
html { scroll-behavior: smooth; scroll-padding-top: 3.2rem; -webkit-text-size-adjust: 100%; }
body { margin: 0 auto; padding: 2.2rem 1.25rem 3rem; max-width: 68rem; color: var(--text);
  background: var(--page); font: 16px/1.55 system-ui, -apple-system, "Segoe UI", sans-serif; }
h1 { margin: 0 0 .3rem; font-size: 1.9rem; line-height: 1.2; letter-spacing: -.02em;
  overflow-wrap: anywhere; }
h2 { margin: 2.8rem 0 .7rem; font-size: 1.3rem; letter-spacing: -.01em; }
h3 { margin: 1.8rem 0 .5rem; font-size: 1rem; }
p { margin: .5rem 0; max-width: 46rem; }
p, figcaption, .soft { color: var(--soft); }
a { color: var(--mark); }
code { font-size: .9em; overflow-wrap: anywhere; }
nav { position: sticky; top: 0; z-index: 2; display: flex; gap: .3rem 1.1rem; overflow-x: auto;
  margin: 1.2rem -1.25rem 0; padding: .6rem 1.25rem; border-bottom: 1px solid var(--line);
  background: var(--page); scrollbar-width: none; }
nav a { color: var(--soft); font-size: .9rem; text-decoration: none; white-space: nowrap; }
nav a:hover { color: var(--mark); }
.cards { display: grid; gap: .8rem; margin: 1.5rem 0 0;
  grid-template-columns: repeat(auto-fit, minmax(10rem, 1fr)); }
.cards div { padding: .85rem 1.1rem; border: 1px solid var(--line); border-radius: .7rem;
  background: var(--card); }
.cards strong { display: block; color: var(--mark); font-size: 1.6rem; line-height: 1.25;
  font-variant-numeric: tabular-nums; }
.cards span { display: block; color: var(--soft); font-size: .85rem; line-height: 1.35; }
.wide { overflow-x: auto; margin: .6rem 0; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; }
th { color: var(--soft); font-weight: 600; font-size: .82rem; text-align: left; }
th, td { padding: .34rem 1.1rem .34rem 0; border-bottom: 1px solid var(--line);
  white-space: nowrap; }
.facts th { font-weight: 400; font-size: .88rem; }
.facts td { white-space: normal; overflow-wrap: anywhere; min-width: 9rem; }
tr.best td { color: var(--mark); font-weight: 600; }
td img { display: block; height: 38px; width: auto; border-radius: 4px; }
.note { padding: .6rem .9rem; border: 1px solid var(--edge); border-radius: .5rem;
  color: var(--text);
  background: var(--warm); font-size: .92rem; }
.small { font-size: .85rem; }
details { margin: .7rem 0; }
summary { color: var(--mark); cursor: pointer; font-size: .92rem; }
img { max-width: 100%; height: auto; }
.figures { display: flex; flex-wrap: wrap; gap: .7rem; }
.figures figure { margin: 0; text-align: center; font-size: .8rem; }
.figures img { display: block; width: 48px; border-radius: 4px; }
.grid { display: grid; gap: 1rem 1.6rem;
  grid-template-columns: repeat(auto-fit, minmax(19rem, 1fr)); }
.picture { display: block; border-radius: .5rem; border: 1px solid var(--line);
  background: #fff; }
.chart { position: relative; margin: .9rem 0; min-width: 0; }
.chart figcaption { font-size: .9rem; color: var(--text); font-weight: 600; }
.legend { display: flex; flex-wrap: wrap; gap: .1rem .9rem; min-height: .4rem;
  margin: .1rem 0 .5rem; }
.legend button { display: flex; align-items: center; gap: .4rem; padding: .1rem 0; border: 0;
  color: var(--soft); background: none; font: inherit; font-size: .82rem; cursor: pointer; }
.legend button.off { opacity: .4; text-decoration: line-through; }
.legend i { width: .85rem; height: .28rem; border-radius: 1rem; }
.axes { display: grid; grid-template: 190px 1.3rem / 3.4rem 1fr; }
.tall .axes { grid-template-rows: 290px 1.3rem; }
.ys, .xs { position: relative; color: var(--soft); font-size: .75rem;
  font-variant-numeric: tabular-nums; }
.ys span { position: absolute; right: .55rem; transform: translateY(-50%); white-space: nowrap; }
.xs { grid-column: 2; }
.xs span { position: absolute; top: .2rem; transform: translateX(-50%); white-space: nowrap; }
.x-name { color: var(--soft); font-size: .75rem; text-align: right; }
.plot { position: relative; touch-action: pan-y; }
.plot svg { display: block; width: 100%; height: 100%; overflow: visible; }
.plot svg * { vector-effect: non-scaling-stroke; }
svg .rule { stroke: var(--line); stroke-width: 1; }
svg polyline { fill: none; stroke: var(--c); stroke-width: 1.8; stroke-linejoin: round; }
svg .band, svg .area { fill: var(--c); opacity: .16; stroke: none; }
svg .error { stroke: var(--c); stroke-width: 1.2; opacity: .7; }
svg .dots { stroke: var(--c); stroke-width: 7; stroke-linecap: round; fill: none; }
svg g.off { display: none; }
.cross { position: absolute; top: 0; bottom: 0; width: 1px; background: var(--soft); opacity: .6;
  pointer-events: none; }
.tip { position: absolute; z-index: 1; padding: .45rem .65rem; border: 1px solid var(--line);
  border-radius: .45rem; background: var(--card); box-shadow: 0 4px 14px #0003; font-size: .8rem;
  line-height: 1.45; pointer-events: none; font-variant-numeric: tabular-nums;
  white-space: nowrap; }
.tip i { display: inline-block; width: .6rem; height: .6rem; margin-right: .4rem;
  border-radius: 50%; }
.tip b { margin-left: .7rem; float: right; }
[hidden] { display: none !important; }
.tabs { display: flex; flex-wrap: wrap; gap: 0 .3rem; }
.tabs > input { position: absolute; opacity: 0; }
.tabs > label { order: 0; padding: .2rem .75rem; border: 1px solid var(--line);
  border-radius: 1rem;
  color: var(--soft); font-size: .85rem; cursor: pointer; }
.tabs > input:checked + label { border-color: var(--mark); color: var(--mark); }
.tabs > input:focus-visible + label { outline: 2px solid var(--mark); }
.tabs > .tab { order: 1; display: none; width: 100%; min-width: 0; }
.tabs > input:checked + label + .tab { display: block; }
.viewer input { display: block; width: 100%; max-width: 30rem; margin: .7rem 0;
  accent-color: var(--mark); }
.viewer .now { margin: .4rem 0; color: var(--text); font-weight: 600; font-size: .92rem; }
footer { margin-top: 3.5rem; padding-top: 1rem; border-top: 1px solid var(--line);
  color: var(--soft); font-size: .85rem; }
@media (max-width: 34rem) { body { padding: 1.4rem 1rem 2rem; } h1 { font-size: 1.5rem; }
  nav { margin: 1rem -1rem 0; padding: .6rem 1rem; } .axes, .tall .axes {
  grid-template: 200px 1.3rem / 2.9rem 1fr; } .cards { gap: .5rem;
  grid-template-columns: repeat(auto-fit, minmax(8.6rem, 1fr)); } .cards strong {
  font-size: 1.25rem; }
  .cards div { padding: .6rem .8rem; } .grid { grid-template-columns: 1fr; } }
@media print { nav { position: static; } }
"""

SCRIPT = """
const shown = v => Math.abs(v) >= 1e5 || (v && Math.abs(v) < 1e-3) ? v.toExponential(2)
  : String(Number(v.toPrecision(5)));
for (const chart of document.querySelectorAll('.chart')) {
  const source = chart.querySelector('script');
  if (!source) continue;
  const data = JSON.parse(source.textContent), [x0, x1] = data.x, off = new Set();
  const plot = chart.querySelector('.plot'), cross = chart.querySelector('.cross');
  const tip = chart.querySelector('.tip');
  const nearest = (points, x) =>
    points.reduce((a, b) => Math.abs(b[0] - x) < Math.abs(a[0] - x) ? b : a);
  const hide = () => { tip.hidden = cross.hidden = true; };
  const show = event => {
    const box = plot.getBoundingClientRect(), frame = chart.getBoundingClientRect();
    const at = x0 + (x1 - x0) * Math.min(1, Math.max(0, (event.clientX - box.left) / box.width));
    const found = data.series.map((s, i) => ({ s, i, p: nearest(s.points, at) }))
      .filter(f => !off.has(f.i));
    if (!found.length) return hide();
    const x = nearest(found.map(f => f.p), at)[0];
    const head = document.createElement('div');
    head.textContent = data.xName + ' ' + (data.names.length ? data.names[x] : shown(x));
    tip.replaceChildren(head);
    const reach = points => (x1 - x0) / Math.min(60, 1.6 * points.length);
    for (const f of found.filter(f => Math.abs(f.p[0] - x) <= reach(f.s.points))
        .sort((a, b) => b.p[1] - a.p[1]).slice(0, 17)) {
      const row = document.createElement('div'), dot = document.createElement('i');
      const value = document.createElement('b');
      dot.style.background = f.s.colour; value.textContent = shown(f.p[1]);
      const own = f.p[0] === x ? '' : ' at ' + shown(f.p[0]);
      row.append(dot, f.s.name + own, value); tip.append(row);
    }
    tip.hidden = cross.hidden = false;
    const px = box.width * (x - x0) / (x1 - x0), left = box.left - frame.left + px;
    cross.style.left = px + 'px';
    tip.style.top = (box.top - frame.top + 6) + 'px';
    tip.style.left = Math.max(0, left + 14 + tip.offsetWidth > frame.width
      ? left - 14 - tip.offsetWidth : left + 14) + 'px';
  };
  plot.addEventListener('pointermove', show);
  plot.addEventListener('pointerdown', show);
  plot.addEventListener('pointerleave', hide);
  for (const button of chart.querySelectorAll('.legend button'))
    button.addEventListener('click', () => {
      const i = Number(button.dataset.series);
      off.has(i) ? off.delete(i) : off.add(i);
      button.classList.toggle('off', off.has(i));
      chart.querySelector(`svg g[data-series="${i}"]`).classList.toggle('off', off.has(i));
    });
}
for (const viewer of document.querySelectorAll('.viewer')) {
  const frames = [...viewer.querySelectorAll('.frame')], slider = viewer.querySelector('input');
  slider?.addEventListener('input', () => {
    frames.forEach((frame, i) => { frame.hidden = i !== Number(slider.value); });
    viewer.querySelector('.now').textContent = frames[slider.value].dataset.label;
  });
}
"""
