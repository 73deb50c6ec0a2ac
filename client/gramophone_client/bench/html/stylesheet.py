"""The style sheet of the HTML page, and the part of it that a standalone chart needs."""

from __future__ import annotations

__all__ = ["CHART_STYLE", "STYLE"]

# c0 to c6 are categorical colours; o1 to o5 are shades of one hue for ordered values; quiet is a muted grey.
PALETTE = """
:root {
  color-scheme: light dark;
  --page: #f6f5f2; --card: #fffefb; --ink: #1c1b19; --soft: #6a6862; --rule: #e3e1da;
  --good: #0b7a4b; --bad: #c23030;
  --c0: #2a78d6; --c1: #199e70; --c2: #d94040; --c3: #e2702f; --c4: #c98a00; --c5: #7a4fc4; --c6: #c9568c;
  --o1: #9cc3f2; --o2: #6ba3e8; --o3: #2a78d6; --o4: #1c5cab; --o5: #103f7c; --quiet: #a9a69d;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #151513; --card: #1e1e1b; --ink: #f3f1ea; --soft: #a3a096; --rule: #34332e;
    --good: #3ecf8e; --bad: #ff7b72;
    --c0: #4a94ec; --c1: #25b585; --c2: #ee5f5b; --c3: #ee8446; --c4: #dba11c; --c5: #a585e6; --c6: #e07fae;
    --o1: #27589a; --o2: #2f6fc4; --o3: #4a94ec; --o4: #84b6f3; --o5: #c4dcfa; --quiet: #6f6c64;
  }
}
"""

MARKS = """
.label { fill: var(--soft); font-size: 12px; font-variant-numeric: tabular-nums; }
.middle { text-anchor: middle; } .end { text-anchor: end; }
.grid { stroke: var(--rule); stroke-width: 1; } .axis { stroke: var(--quiet); stroke-width: 1; }
.mark { stroke: var(--soft); stroke-width: 1; stroke-dasharray: 2 4; }
.line { fill: none; stroke-width: 2.25; stroke-linejoin: round; stroke-linecap: round; }
.dot { stroke: var(--card); stroke-width: 2; } .target { fill: transparent; } .target:hover { fill: var(--rule); }
rect:hover { opacity: 0.75; }
""" + "".join(
    f".line.{name} {{ stroke: var(--{name}); }} .dot.{name}, rect.{name} {{ fill: var(--{name}); }} "
    f"i.{name} {{ background: var(--{name}); }}\n"
    for name in ("c0", "c1", "c2", "c3", "c4", "c5", "c6", "o1", "o2", "o3", "o4", "o5", "quiet")
)

STYLE = (
    PALETTE
    + """
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1240px; margin: 0 auto; padding: 32px 20px 64px; }
h1 { font-size: 28px; margin: 0 0 6px; letter-spacing: -0.01em; }
h2 { font-size: 17px; margin: 28px 0 8px; }
header p { margin: 0; color: var(--soft); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(190px, 1fr)); gap: 14px; margin: 24px 0 14px; }
.tiles div, figure, .table { background: var(--card); border: 1px solid var(--rule); border-radius: 10px; }
.tiles div { padding: 14px 18px; }
.tiles b { font-size: 32px; font-weight: 650; letter-spacing: -0.02em; font-variant-numeric: tabular-nums; }
.tiles span, .tiles p, th span { color: var(--soft); font-weight: 400; }
.tiles p { margin: 0; font-size: 13px; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(460px, 100%), 1fr)); gap: 14px; }
figure { margin: 0; padding: 16px 18px 10px; min-width: 0; }
.charts figure:last-child:nth-child(odd) { grid-column: 1 / -1; }
.charts figure svg { max-height: 400px; }
main > figure { margin-top: 14px; }
figcaption { font-weight: 600; }
.legend { margin: 4px 0 6px; display: flex; flex-wrap: wrap; gap: 2px 16px; color: var(--soft); font-size: 13px; }
.legend i { display: inline-block; width: 11px; height: 11px; border-radius: 3px; margin-right: 6px; }
.legend i.dashed { width: 18px; mask: linear-gradient(90deg, #000 7px, #0000 7px 11px, #000 11px); }
svg { width: 100%; height: auto; display: block; }
p.quiet { color: var(--soft); }
.table { overflow-x: auto; margin-top: 14px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 7px 18px; text-align: right; border-bottom: 1px solid var(--rule); white-space: nowrap; }
th:first-child { text-align: left; } tbody th { font-weight: 500; } tbody tr:last-child > * { border-bottom: 0; }
.better { color: var(--good); font-weight: 600; } .worse { color: var(--bad); font-weight: 600; }
.better::after { content: " better"; font-weight: 400; } .worse::after { content: " worse"; font-weight: 400; }
details { margin-top: 24px; color: var(--soft); } pre { overflow-x: auto; font-size: 13px; }
"""
    + MARKS
)

CHART_STYLE = (
    PALETTE
    + MARKS
    + """
svg { font-family: system-ui, sans-serif; } rect.sheet { fill: var(--card); opacity: 1; }
.title { fill: var(--ink); font-size: 17px; font-weight: 600; } .caption { fill: var(--ink); font-size: 14px; }
"""
)
