"""The HTML page of ``kubeai bench``: one self-contained file without scripts.

It loads nothing, follows the light or dark colour scheme, and prints. Callers escape external text
with `text`.
"""

from __future__ import annotations

import html

from kubeai.loadtest.reports.compare import printable

COLOURS = 6  # Okabe and Ito's colour-blind-safe palette; a seventh run reuses the first colour


def text(value: str) -> str:
    """External text (names, settings, errors) for HTML."""
    return html.escape(printable(value))


def key(at: int) -> str:
    """A run's colour swatch."""
    return f'<i class="key c{at % COLOURS}"></i>'


def page(title: str, body: str) -> str:
    """A page with this title and body, both HTML."""
    return _PAGE.format(title=title, style=_STYLE, body=body)


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}
</body>
</html>
"""

_STYLE = """
:root {
  color-scheme: light dark;
  --paper: #fff; --ink: #1c2024; --faint: #5f6873; --rule: #dde1e6; --mark: #e3f1e8;
  --warn: #fff3d1; --edge: #d18f00;
  --c0: #0072b2; --c1: #d55e00; --c2: #009e73; --c3: #cc79a7; --c4: #e69f00; --c5: #56b4e9;
}
@media screen and (prefers-color-scheme: dark) {
  :root {
    --paper: #15181c; --ink: #e4e7ea; --faint: #9aa4af; --rule: #323941; --mark: #1d3a2b;
    --warn: #3a2f12; --edge: #e69f00;
    --c0: #4aa3e0; --c1: #ec7a2c; --c2: #22b98c; --c3: #dc97bd; --c4: #f0c04a; --c5: #9bd6fb;
  }
}
* { box-sizing: border-box; }
body {
  max-width: 75rem; margin: 0 auto; padding: 1.5rem 1rem 3rem;
  background: var(--paper); color: var(--ink); font: 15px/1.45 system-ui, sans-serif;
}
h1 { font-size: 1.5rem; line-height: 1.25; overflow-wrap: anywhere; margin: 0 0 1rem; }
h2 { font-size: 1.1rem; margin: 2rem 0 .6rem; }
p { color: var(--faint); margin: 0 0 .6rem; }
p b, td b { background: var(--mark); color: var(--ink); padding: .1em .35em; border-radius: .25em; }
td b { margin-right: -.35em; }
.warnings {
  margin: 0; padding: .7rem 1rem .7rem 2rem; background: var(--warn);
  border-left: 4px solid var(--edge); overflow-wrap: anywhere;
}
.verdict { font-size: 1.15rem; line-height: 1.4; margin: 0 0 1rem; overflow-wrap: anywhere; }
.verdict p { color: var(--ink); margin: 0 0 .3rem; }
.tiles {
  display: grid; gap: .8rem; margin: 1rem 0;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 11rem), 1fr));
}
.tile { border: 1px solid var(--rule); border-radius: .5rem; padding: .6rem .8rem; }
.tile b { display: block; font-size: 1.5rem; line-height: 1.3; font-weight: 600; }
.tile small { color: var(--faint); display: block; overflow-wrap: anywhere; }
details { border-top: 1px solid var(--rule); margin-top: 1rem; padding-top: .6rem; }
summary { cursor: pointer; font-weight: bold; font-size: 1.1rem; }
details > :nth-child(2) { margin-top: .6rem; }
.wide { overflow-x: auto; }
.key {
  display: inline-block; width: .8em; height: .8em; margin-right: .4em;
  border-radius: .2em; background: currentColor;
}
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem 0 .2rem 1.4rem; text-align: right; vertical-align: top; }
thead th { min-width: 8rem; max-width: 14rem; overflow-wrap: anywhere; vertical-align: bottom; }
thead .key { display: block; width: 1.4rem; height: .3rem; margin: 0 0 .3rem auto; }
.settings .key { margin-left: 0; }
tr > :first-child {
  position: sticky; left: 0; padding-left: 0; text-align: left; background: var(--paper);
}
tbody th { font-weight: normal; }
tbody tr { border-top: 1px solid var(--rule); }
.group { font-weight: bold; padding-top: .9rem; }
td small { display: inline-block; min-width: 4.2em; color: var(--faint); }
td:nth-child(2) small { min-width: 0; }
.settings { font-size: .9rem; }
.settings td, .settings thead th { text-align: left; overflow-wrap: anywhere; }
.c0 { color: var(--c0); } .c1 { color: var(--c1); } .c2 { color: var(--c2); }
.c3 { color: var(--c3); } .c4 { color: var(--c4); } .c5 { color: var(--c5); }
.plots {
  display: grid; gap: 1.8rem 2.5rem; align-items: start;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr));
}
figure { margin: 0; max-width: 36rem; break-inside: avoid; }
.legend { display: flex; flex-wrap: wrap; gap: 0 1rem; font-size: .9rem; overflow-wrap: anywhere; }
svg { display: block; width: 100%; margin-top: .4rem; font-size: 11px; }
svg text { fill: currentColor; }
svg path { stroke: var(--rule); stroke-width: 1; }
svg polyline {
  fill: none; stroke: currentColor; stroke-width: 1.5;
  stroke-linejoin: round; stroke-linecap: round;
}
svg rect { fill: currentColor; }
svg .area { fill: none; }
svg .limit { stroke: var(--edge); stroke-width: 1.5; stroke-dasharray: 5 4; }
@media (max-width: 40rem) {
  body { font-size: 14px; padding: 1rem .8rem 2rem; }
  th, td { padding-left: .9rem; }
  thead th { min-width: 6rem; font-size: .85em; }
  td b { margin-right: 0; }
  td small { display: block; }
}
@media print {
  body { max-width: none; font-size: 10pt; padding: 0; }
  * { print-color-adjust: exact; }
  .wide { overflow: visible; }
  tr > :first-child { position: static; background: none; }
  .figures tbody, tr { break-inside: avoid; }
  h2, p { break-after: avoid; }
  .plots { grid-template-columns: 1fr 1fr; }
}
"""
