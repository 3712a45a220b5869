"""The page's frame and style, apart from what it says."""

import html

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<title>{title}</title>
<style>{style}</style>
</head>
<body><main>
{body}
</main></body>
</html>
"""

# Blue and vermilion of Okabe and Ito: told apart by every kind of color vision; lighter in the dark.
STYLE = """
:root {
  --page: #fbfaf7; --card: #ffffff; --ink: #1b1d22; --faint: #666b75; --grid: #dcdad3;
  --first: #0072b2; --last: #c84c00; --alarm: #b3123f; --calm: #00704e; --tint: #eef4f8;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #14161a; --card: #1c1f25; --ink: #e9e7e1; --faint: #a0a4ad; --grid: #363a43;
    --first: #64b5e8; --last: #ee9a4d; --alarm: #ff7d95; --calm: #5cc9a0; --tint: #20303b;
  }
}
@media print {
  :root {
    --page: #fff; --card: #fff; --ink: #000; --faint: #444; --grid: #ccc;
    --first: #0072b2; --last: #c84c00; --alarm: #a00030; --calm: #00604a; --tint: #eee;
  }
  section, figure, article, tr { break-inside: avoid; }
  details::details-content { content-visibility: visible; block-size: auto; }
  summary::before { content: ""; }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif;
}
main { max-width: 1180px; margin: 0 auto; padding: 2.2rem 1.4rem 4rem; }
h1 { font-size: clamp(1.5rem, 4vw, 2.2rem); line-height: 1.2; margin: 0 0 .5rem; letter-spacing: -.01em; }
h2 { font-size: 1.15rem; margin: 0 0 .8rem; }
h3 { font-size: 1rem; margin: 0 0 .3rem; }
.kicker { margin: 0 0 .3rem; color: var(--first); font-weight: 600; font-size: .85rem; }
.lead { max-width: 46rem; color: var(--faint); margin: 0 0 1.2rem; font-size: 1.05rem; }
section { margin-top: 2.4rem; }
.verdicts { list-style: none; margin: 0 0 1.2rem; padding: 0; display: grid; gap: .5rem; }
.verdicts li {
  background: var(--card); border: 1px solid var(--grid); border-left: 5px solid var(--calm);
  border-radius: 6px; padding: .6rem .9rem; display: flex; gap: .2rem 1rem; flex-wrap: wrap;
}
.verdicts li.alarm { border-left-color: var(--alarm); }
.verdicts b { min-width: 9rem; color: var(--faint); font-weight: 500; }
.verdicts span { font-weight: 600; }
.facts { display: flex; flex-wrap: wrap; gap: .7rem 2rem; margin: 0; }
.facts div { min-width: 6rem; }
.facts dt { color: var(--faint); font-size: .8rem; }
.facts dd { margin: 0; font-weight: 600; font-variant-numeric: tabular-nums; }
.grid { display: grid; gap: 1rem; }
.three { grid-template-columns: repeat(auto-fit, minmax(min(100%, 310px), 1fr)); }
.two { grid-template-columns: minmax(0, 1.4fr) minmax(0, 1fr); align-items: start; }
@media (max-width: 760px) { .two { grid-template-columns: minmax(0, 1fr); } main { padding: 1.3rem .9rem 3rem; } }
figure {
  margin: 0; background: var(--card); border: 1px solid var(--grid); border-radius: 8px; padding: .7rem;
}
figure.wide { overflow-x: auto; }
figure.wide svg { min-width: 500px; }
figure svg { display: block; width: 100%; height: auto; }
details { background: var(--card); border: 1px solid var(--grid); border-radius: 8px; }
summary { cursor: pointer; padding: .7rem .9rem; display: flex; gap: .8rem; align-items: baseline; }
summary::before { content: "+"; color: var(--faint); width: .8em; font-weight: 700; }
details[open] > summary::before { content: "\\2212"; }
summary h2 { margin: 0; }
summary span { color: var(--faint); font-size: .85rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .86rem; font-variant-numeric: tabular-nums; }
th, td { padding: .32rem .7rem; text-align: right; border-top: 1px solid var(--grid); white-space: nowrap; }
thead th { color: var(--faint); font-weight: 500; font-size: .8rem; vertical-align: bottom; }
th[scope=row], thead th:nth-child(2), td.bar, th.bar { text-align: left; }
th[scope=row] { position: sticky; left: 0; background: var(--card); font-weight: 500; font-family: ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
td:first-child { color: var(--faint); }
td.bar, th.bar { min-width: 11rem; width: 24%; }
td.bar i { display: block; height: .72em; min-width: 1px; background: var(--first); border-radius: 2px; }
td.bar em { font-style: normal; font-weight: 600; color: var(--faint); }
tr.broken td, tr.broken th, tr.broken em { color: var(--alarm); }
tr.silent td, tr.silent th { color: var(--faint); }
tbody tr:hover { background: var(--tint); }
.finding {
  background: var(--card); border: 1px solid var(--grid); border-left: 5px solid var(--faint);
  border-radius: 6px; padding: .8rem 1rem; margin-bottom: .7rem;
}
.finding.error { border-left-color: var(--alarm); }
.finding.warning { border-left-color: var(--last); }
.finding p { margin: .2rem 0; }
.where { color: var(--faint); font-weight: 400; margin-left: .6rem; }
.fix b { color: var(--calm); margin-right: .4rem; }
.reading { color: var(--faint); max-width: 46rem; font-size: .93rem; }
.reading h2, .reading h3, .reading b { color: var(--ink); }
code { font-family: ui-monospace, "SF Mono", Menlo, Consolas, monospace; font-size: .92em; }
.cards { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 430px), 1fr)); }
.card {
  display: block; color: inherit; text-decoration: none; background: var(--card);
  border: 1px solid var(--grid); border-top: 5px solid var(--calm); border-radius: 8px; padding: 1rem 1.1rem;
}
.card.alarm { border-top-color: var(--alarm); }
.card:hover, .card:focus-visible { outline: 2px solid var(--first); }
.card p { margin: .5rem 0 0; }
.small { font-size: .85rem; color: var(--faint); }
.card .scale { margin-top: .2rem; }
.spark { width: 100%; height: 64px; display: block; }
.spark rect { fill: var(--first); }
.spark rect.broken { fill: var(--alarm); }
"""


def escaped(value: object) -> str:
    """Any text from outside, safe within the page."""
    return html.escape(str(value), quote=True)
