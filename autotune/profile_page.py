"""A profile as one HTML page that needs nothing else: a roofline a stage, and a table with the largest loss first."""

from __future__ import annotations

from html import escape

from autotune.profile import Profile, Row, StageProfile
from autotune.profile_table import table_html
from autotune.roofline_plot import COLOURS, Point, roofline_svg

_STYLE = """
:root { color-scheme: light dark; --paper: #fdfdfb; --ink: #1c1f24; --dim: #62676f; --line: #d9dbd6; --roof: #1c1f24; --loss: #d9480f40; --wash: #f1f2ee; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #14161a; --ink: #e8e9ea; --dim: #9aa0a8; --line: #33373d; --roof: #e8e9ea; --loss: #ff8a5c59; --wash: #1d2025; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1320px; padding: 28px 20px 60px; background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 25px; margin: 0 0 4px; } h2 { font-size: 19px; margin: 40px 0 2px; }
p { margin: 4px 0; } .dim { color: var(--dim); } .warning { border-left: 3px solid #d9480f; padding-left: 10px; }
.figures { display: flex; flex-wrap: wrap; gap: 10px 34px; margin: 12px 0; }
.figures div { font-size: 22px; font-variant-numeric: tabular-nums; } .figures small { display: block; font-size: 13px; color: var(--dim); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 13.5px; font-variant-numeric: tabular-nums; white-space: nowrap; }
th { text-align: right; font-weight: 600; color: var(--dim); border-bottom: 1px solid var(--line); padding: 5px 8px; vertical-align: bottom; }
td { text-align: right; padding: 4px 8px; border-bottom: 1px solid var(--line); }
th.left, td.left { text-align: left; } tbody tr:hover { background: var(--wash); } tfoot td { font-weight: 600; border-bottom: 0; }
td.loss { background: linear-gradient(to left, var(--loss) var(--part), transparent var(--part)); }
td.where { text-align: left; white-space: normal; min-width: 300px; } td.where small { display: block; line-height: 1.35; overflow-wrap: anywhere; }
td.bar { min-width: 120px; } td.bar div { display: flex; height: 11px; } td.bar i { background: var(--k); } td.bar b { background: var(--loss); }
td small { color: var(--dim); } .failed { color: #d9480f; }
svg.roofline { width: 100%; height: auto; margin: 8px 0 4px; } svg text { font: 12px system-ui, sans-serif; fill: var(--ink); } svg text.dim { fill: var(--dim); }
svg .grid { stroke: var(--line); stroke-width: 1; } svg .roof { fill: none; stroke: var(--roof); stroke-width: 2; }
svg circle { fill: var(--k); fill-opacity: .75; stroke: var(--paper); stroke-width: 1.2; } svg .hollow circle { fill: var(--paper); fill-opacity: .6; stroke: var(--k); stroke-width: 2; }
svg g:hover circle { stroke: var(--ink); fill-opacity: .9; } svg text.over { paint-order: stroke; stroke: var(--paper); stroke-width: 4px; }
svg text.number { font-size: 10px; font-weight: 600; fill: #fff; pointer-events: none; } svg .hollow text.number { fill: var(--ink); }
.key { display: inline-block; width: 11px; height: 11px; border-radius: 50%; background: var(--k); margin-right: 6px; }
"""
_HUES = (212, 24, 145, 285, 352, 178, 48, 248, 100, 320, 8, 196)
"""A colour a kernel, of a lightness that is readable under white figures and on both grounds."""


def as_page(profiled: Profile) -> str:
    """The page's HTML."""
    colours = _colours(profiled)
    gpu = profiled.gpu
    rates = f"{gpu.read_bytes_per_s / 1e12:.2f} TB/s read, {gpu.bf16_flops / 1e12:.0f} TFLOP/s in bf16"
    source = (
        f"measured: {profiled.ceilings.read_by}; {profiled.ceilings.product_by}"
        if profiled.ceilings
        else "its datasheet's rates; nothing was measured"
    )
    title = f"Gemma 3 {profiled.model}, {profiled.dtype}, on {gpu.name}"
    hues = "\n".join(f".k{i} {{ --k: hsl({hue} 62% 44%); }}" for i, hue in enumerate(_HUES))
    warnings = "\n".join(f'<p class="warning">{escape(warning)}</p>' for warning in profiled.warnings)
    stages = "\n".join(_section(profiled, stage, colours) for stage in profiled.stages)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{_STYLE}{hues}
</style>
</head>
<body>
<h1>{escape(title)}</h1>
<p class="dim">{escape(rates)} ({escape(source)}) · {escape(profiled.when)}</p>
{warnings}
{stages}
</body>
</html>
"""


def _colours(profiled: Profile) -> dict[str, int]:
    names = dict.fromkeys(row.kernel for stage in profiled.stages for row in stage.rows)
    return {name: number % COLOURS for number, name in enumerate(names)}


def _section(profiled: Profile, stage: StageProfile, colours: dict[str, int]) -> str:
    rows = stage.by_lost_time()
    points = [_point(number, stage, row, colours) for number, row in enumerate(rows, start=1)]
    plot = roofline_svg(
        points,
        read_bytes_per_s=profiled.gpu.read_bytes_per_s,
        peak_flops=profiled.gpu.bf16_flops,
        label=f"Roofline of {stage.stage}: operations a byte against TFLOP/s",
    )
    kernels = dict.fromkeys(row.kernel for row in rows)
    legend = " &nbsp; ".join(f'<span class="key k{colours[name]}"></span>{escape(name)}' for name in kernels)
    hint = "A circle grows with its share of the step; its number is the row below."
    if any(row.time_us is None for row in rows):
        hint += " Hollow circles are not measured and stand on the roof."
    return f"""<h2>{escape(heading(stage))}</h2>
<div class="figures">{_figures(stage)}</div>
{plot}
<p class="dim">{legend}</p>
<p class="dim">{hint}</p>
<div class="wide">{table_html(stage, rows, colours)}</div>"""


def heading(stage: StageProfile) -> str:
    """What the step of a stage is."""
    if stage.stage == "vision":
        return f"vision: {stage.batch} image{'s' if stage.batch > 1 else ''}"
    if stage.stage == "prefill":
        return f"prefill: {stage.context} tokens, batch {stage.batch}"
    return f"decode: one token after {stage.context}, batch {stage.batch}"


def _figures(stage: StageProfile) -> str:
    figures = [(_ms(stage.floor_us), "the step's floor"), (_per_s(stage, stage.rate_at_floor), "at the floor")]
    if stage.roofline is not None:
        figures.append((f"{stage.roofline:.0%}", "of the floor reached"))
    if stage.rate is not None:
        figures.insert(0, (_per_s(stage, stage.rate), "measured"))
    if stage.time_us is not None:
        missing = "" if stage.complete else f", {len(stage.rows) - len(stage.measured)} missing"
        figures.insert(0, (_ms(stage.time_us), f"sum of the kernels{missing}"))
    return "".join(f"<div>{escape(value)}<small>{escape(label)}</small></div>" for value, label in figures)


def _point(number: int, stage: StageProfile, row: Row, colours: dict[str, int]) -> Point:
    gb_s, tflop_s = row.rates()
    reached = "not measured" if row.roofline is None else f"{row.time_us:.2f} µs, {row.roofline:.0%} of the floor"
    return Point(
        number=number,
        colour=colours[row.kernel],
        intensity=row.intensity,
        flops=tflop_s * 1e12,
        share=stage.share(row) or 0.0,
        hollow=row.time_us is None,
        title=f"{number}. {row.use.name} ({row.kernel})\n{row.use.case}\n{row.use.count} × {reached}\n"
        f"floor {row.floor_us:.2f} µs, {gb_s:.0f} GB/s, {tflop_s:.1f} TFLOP/s\n{row.choice.config}",
    )


def _ms(time_us: float) -> str:
    return f"{time_us / 1e3:.2f} ms" if time_us >= 1e3 else f"{time_us:.1f} µs"


def _per_s(stage: StageProfile, rate: float) -> str:
    return f"{rate:,.0f} {stage.unit}/s" if rate >= 100 else f"{rate:.1f} {stage.unit}/s"
