"""The atlas's own style, after the reports' (jaxgrad/report/page.py), and its icons."""

# A shape a verdict, so that none is told by its color alone.
ICONS = """<svg width="0" height="0" style="position:absolute" aria-hidden="true">
<symbol id="icon-holds" viewBox="0 0 16 16"><path d="M2.5 8.5l3.6 3.7 7.4-8.4"/></symbol>
<symbol id="icon-holds-if" viewBox="0 0 16 16"><circle cx="8" cy="8" r="5.6"/>
<path class="solid" d="M8 2.4a5.6 5.6 0 0 1 0 11.2z"/></symbol>
<symbol id="icon-false" viewBox="0 0 16 16"><path d="M3.2 3.2l9.6 9.6M12.8 3.2l-9.6 9.6"/></symbol>
<symbol id="icon-not-run-yet" viewBox="0 0 16 16"><circle cx="8" cy="8" r="5.6" stroke-dasharray="2 3.9"/></symbol>
<symbol id="icon-older-config" viewBox="0 0 16 16"><circle cx="8" cy="8" r="5.6"/>
<path d="M8 4.6V8l2.4 1.6"/></symbol>
<symbol id="icon-not-judged" viewBox="0 0 16 16"><path d="M8 2v7.4M8 13.4v.1"/></symbol>
</svg>"""

ATLAS_STYLE = """
/* the figures' colors, with a contrast of at least 3 to the page */
:root {
  --series-0: #0072b2; --series-1: #d55e00; --series-2: #009e73; --series-3: #cc79a7;
  --series-4: #c78300; --series-5: #3399d1; --series-6: #7f7f7f; --series-7: #968a00;
  --partly: #8a5a00;
}
@media (prefers-color-scheme: dark) {
  :root {
    --series-0: #4da3dc; --series-1: #f08236; --series-2: #2fc195; --series-3: #e39dc4;
    --series-4: #f2b632; --series-5: #86cbf2; --series-6: #a3a3a3; --series-7: #d6c62e;
    --partly: #f0b849;
  }
}
@media print {
  :root {
    --series-0: #0072b2; --series-1: #d55e00; --series-2: #009e73; --series-3: #cc79a7;
    --series-4: #c78300; --series-5: #3399d1; --series-6: #7f7f7f; --series-7: #968a00;
    --partly: #7a5000;
  }
}
html { scroll-padding-top: 6.2rem; }
a { color: var(--first); text-underline-offset: .15em; text-decoration-thickness: .06em; }
h2 { font-size: 1.35rem; letter-spacing: -.01em; }
h3 { font-size: 1.12rem; line-height: 1.35; max-width: 46rem; margin-bottom: .8rem; }
sup { line-height: 0; font-size: .75em; }
:target { outline: 2px solid var(--first); outline-offset: 3px; }
:focus-visible { outline: 2px solid var(--first); outline-offset: 2px; }

/* contents and tally */
.bar {
  position: sticky; top: 0; z-index: 2; background: var(--page); margin: 1.6rem 0 0;
  padding: .5rem 0; border-bottom: 1px solid var(--grid);
}
.bar nav { display: flex; flex-wrap: wrap; gap: .1rem 1.3rem; margin-bottom: .45rem; font-size: .9rem; }
.tiles { position: relative; border: 0; margin: 0; padding: 0; display: flex; flex-wrap: wrap; gap: .35rem; min-width: 0; }
.tiles legend, .tiles input { position: absolute; opacity: 0; width: 1px; height: 1px; overflow: hidden; }
.tile {
  border: 1px solid var(--grid); border-radius: 999px; background: var(--card); padding: .1rem .7rem;
  font-size: .85rem; white-space: nowrap; cursor: pointer; font-variant-numeric: tabular-nums;
}
.tile b { color: var(--ink); }
input:checked + .tile { border-color: currentColor; box-shadow: inset 0 0 0 1px currentColor; }
input:focus-visible + .tile { outline: 2px solid var(--first); outline-offset: 2px; }

/* verdicts */
.icon {
  width: .95em; height: .95em; margin-right: .35em; vertical-align: -.1em; fill: none;
  stroke: currentColor; stroke-width: 2.2; stroke-linecap: round; stroke-linejoin: round;
}
.icon .solid, symbol .solid { fill: currentColor; stroke: none; }
.badge {
  display: inline-block; border: 1.5px solid currentColor; border-radius: 999px; padding: 0 .6em;
  font-size: .82rem; font-weight: 600; line-height: 1.55; white-space: nowrap; background: var(--card);
}
.badge.holds, .tile.holds { color: var(--calm); }
.badge.holds-if, .tile.holds-if { color: var(--partly); }
.badge.false, .tile.false { color: var(--alarm); }
.badge.not-run-yet, .badge.older-config { color: var(--faint); border-style: dashed; }
.tile.not-run-yet, .tile.older-config { color: var(--faint); }
.badge.not-judged, .tile.not-judged { color: var(--alarm); border-style: dashed; }
.condition { font-weight: 500; font-size: .88rem; color: var(--partly); }

/* the statements at a glance */
.glance { table-layout: fixed; font-size: .92rem; background: var(--card); border: 1px solid var(--grid); border-radius: 8px; border-collapse: separate; border-spacing: 0; }
.glance :is(th, td) { text-align: left; white-space: normal; vertical-align: top; padding: .45rem .7rem; position: static; }
.glance th[scope=row] { font-family: inherit; font-weight: 500; }
:is(.glance th[scope=row], .ranks p) a:first-of-type { color: var(--ink); text-decoration-color: var(--faint); }
.glance th[scope=row] .condition { display: block; }
.glance thead th { border-top: 0; }
.glance thead th:nth-child(1) { width: 8.8rem; }
.glance thead th:nth-child(3) { width: 36%; }
.glance thead th:nth-child(4) { width: 7rem; }
.glance .group th { background: var(--tint); color: var(--ink); font-size: .88rem; padding: .35rem .7rem; }
.glance .group a { font-weight: 600; color: var(--ink); text-decoration: none; margin-right: .8rem; }
.glance .group .small { font-weight: 400; }
.glance .group .small a { margin: 0; font-weight: 400; color: var(--first); text-decoration: underline; }
.glance .measured { color: var(--faint); font-size: .84rem; }
.glance .measured span { display: -webkit-box; -webkit-line-clamp: 2; -webkit-box-orient: vertical; overflow: hidden; overflow-wrap: anywhere; }
.glance .off { font-variant-numeric: tabular-nums; }

/* ranks */
.ranks { list-style: none; margin: 0; padding: 0; }
.ranks li { display: grid; grid-template-columns: 13.5rem minmax(0, 1fr); gap: .15rem 1rem; padding: .55rem 0; border-top: 1px solid var(--grid); }
.ranks .value { grid-row: span 2; font-size: .85rem; color: var(--faint); font-variant-numeric: tabular-nums; }
.ranks .value b { display: block; color: var(--ink); font-size: 1.2rem; line-height: 1.3; }
.ranks p { margin: 0; }
.ranks .badge { margin-right: .3rem; }
.gauge { display: block; align-self: center; background: var(--grid); border-radius: 3px; height: .45rem; }
.gauge i { display: block; height: 100%; min-width: 2px; background: var(--last); border-radius: 3px; }
#divergence details { margin-top: .6rem; }
#divergence details .ranks { padding: 0 .9rem; }

/* what to take from it */
.practice { columns: 2 24rem; column-gap: 2.5rem; }
.practice div { break-inside: avoid-column; padding-bottom: .9rem; }
.practice h3 { margin: 0 0 .2rem; font-size: 1rem; }
.practice ul { margin: 0; padding-left: 1.1rem; }
.practice li { margin-bottom: .45rem; }
.practice .small { white-space: nowrap; font-weight: 400; }
.practice li .small { color: var(--faint); }

/* the evidence */
#evidence { margin-bottom: -1rem; }
.chapter { border-top: 3px solid var(--ink); padding-top: .8rem; margin-top: 2.6rem; }
.evidence { display: grid; gap: 1.2rem 1.6rem; align-items: start; }
.evidence.beside { grid-template-columns: minmax(0, 1fr) minmax(0, 1.15fr); }
.evidence.beside .pictures { order: 2; position: sticky; top: 6.4rem; }
.pictures { display: grid; grid-template-columns: minmax(0, 1fr); gap: 1rem; }
.evidence.above .claims { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 30rem), 1fr)); gap: 0 1.6rem; align-items: start; }
figure.atlas .scroll { overflow-x: auto; }
figure.atlas svg { margin: 0 auto; }
figure.atlas image { image-rendering: pixelated; }
figcaption { font-size: .85rem; color: var(--faint); margin-top: .4rem; }
figcaption b { color: var(--ink); }
.claim { background: var(--card); border: 1px solid var(--grid); border-left: 5px solid var(--faint); border-radius: 6px; padding: .8rem 1rem; margin-bottom: 1rem; }
.claim.holds { border-left-color: var(--calm); }
.claim.holds-if { border-left-color: var(--partly); }
.claim:is(.false, .not-judged) { border-left-color: var(--alarm); }
.claim .verdict { margin: 0 0 .35rem; }
.claim h4 { font-size: 1rem; margin: 0 0 .6rem; line-height: 1.35; }
.claim dl { display: grid; grid-template-columns: 5.6rem minmax(0, 1fr); gap: .3rem .8rem; margin: 0; font-size: .9rem; }
.claim dt { color: var(--faint); font-size: .82rem; padding-top: .08rem; }
.claim dd { margin: 0; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
.claim dd ul { list-style: none; margin: 0; padding: 0; }
.claim dd .many { columns: 2 10rem; }
.claim dd li { padding-left: .9em; text-indent: -.9em; }
.intuition { margin: .7rem 0 0; padding: .5rem .8rem; background: var(--tint); border-radius: 6px; font-size: .93rem; }
.intuition b { display: block; font-size: .8rem; color: var(--first); }
.note { border-left: 4px solid var(--partly); background: var(--card); padding: .4rem .8rem; font-size: .9rem; overflow-wrap: anywhere; }
.note.fault { border-color: var(--alarm); color: var(--alarm); }
details.made { background: none; border: 0; margin-top: .4rem; }
details.made summary { padding: .3rem 0; }
details.made .facts { padding: .3rem 0 .6rem; gap: .4rem 1.4rem; }
details.made dd { font-weight: 400; overflow-wrap: anywhere; }
p.made { color: var(--faint); }
code { overflow-wrap: anywhere; }

@media (max-width: 900px) {
  .evidence.beside { grid-template-columns: minmax(0, 1fr); }
  .evidence.beside .pictures { order: 0; position: static; }
}
@media (max-width: 640px) {
  html { scroll-padding-top: 5.4rem; }
  .bar { margin-left: -.9rem; margin-right: -.9rem; padding: .4rem .9rem; }
  .bar nav, .tiles { flex-wrap: nowrap; overflow-x: auto; white-space: nowrap; scrollbar-width: none; }
  .glance, .glance tbody { display: block; }
  .glance thead { position: absolute; opacity: 0; pointer-events: none; }
  .glance tr { display: grid; grid-template-columns: auto 1fr; border-top: 1px solid var(--grid); padding: .5rem .7rem; gap: .2rem .6rem; }
  .glance .group { padding: 0; display: block; border: 0; }
  .glance .group th { display: block; }
  .glance :is(td, th[scope=row]) { border: 0; padding: 0; }
  .glance th[scope=row] { grid-column: 1 / -1; grid-row: 2; background: none; }
  .glance .measured { display: none; }
  .glance .off { grid-column: 2; grid-row: 1; text-align: right; color: var(--faint); font-size: .85rem; align-self: center; }
  .glance .off:not(:empty)::before { content: "off by "; }
  .ranks li { grid-template-columns: minmax(0, 1fr); }
  .ranks .value { grid-row: auto; }
  .ranks .value b { display: inline; margin-right: .4rem; }
  .claim dl { grid-template-columns: minmax(0, 1fr); gap: 0; }
  .claim dd { margin-bottom: .45rem; }
  details.made summary { display: block; }
  details.made summary::before { display: inline-block; }
}
@media print {
  html { font-size: 12px; }
  main { max-width: none; padding: 0; }
  body { font-size: 1rem; }
  .gauge, .gauge i, .intuition, .glance .group th { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  .bar { position: static; }
  .bar nav, input:not(:checked) + .tile.all { display: none; }
  section, tbody, .ranks { break-inside: auto; }
  .claim, .ranks li, .glance tr, .practice li { break-inside: avoid; }
  h2, h3, .kicker, .glance .group { break-after: avoid; }
  .evidence.beside { grid-template-columns: minmax(0, 1fr); }
  .evidence.beside .pictures { order: 0; position: static; }
  figure.atlas svg { min-width: 0 !important; max-height: 11cm; }
  .glance .measured span { -webkit-line-clamp: 4; }
  details.made .facts { display: none; }
  a { color: inherit; text-decoration: none; }
}
"""
