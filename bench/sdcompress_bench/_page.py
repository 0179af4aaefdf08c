"""The page the report is poured into: its layout and its colours, light and dark."""

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
<header><h1>{headline}</h1><p>{subline}</p></header>
{table}
{body}
<footer>sdcompress bench · {created}</footer>
</main>
</body>
</html>
"""

STYLE = """
:root { --page: #fbfaf8; --card: #ffffff; --ink: #1c1b19; --soft: #6d6a64; --rule: #e4e1da; --torch: #b3ada1; --onnxruntime: #3f6fb5; --tensorrt: #4c8a3a; --compile: #c2703a; --aot: #8a5aa8;
  --s0: #3f6fb5; --s1: #c2703a; --s2: #4c8a3a; --s3: #8a5aa8; --s4: #b3473f; --s5: #7b766b; }
@media (prefers-color-scheme: dark) { :root { --page: #161615; --card: #1e1e1c; --ink: #eceae5; --soft: #a09c93; --rule: #34332f; --torch: #7d786e; --onnxruntime: #7ba5e3;
  --tensorrt: #84bd70; --compile: #dd9a68; --aot: #bb95d4; --s0: #7ba5e3; --s1: #dd9a68; --s2: #84bd70; --s3: #bb95d4; --s4: #df8078; --s5: #a8a397; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; -webkit-text-size-adjust: 100%; }
main { max-width: 1080px; margin: 0 auto; padding: 56px 24px 40px; }
h1 { font-size: clamp(26px, 4.4vw, 42px); line-height: 1.14; letter-spacing: -0.022em; font-weight: 650; margin: 0 0 14px; text-wrap: balance; max-width: 24em; overflow-wrap: anywhere; }
header p { color: var(--soft); font-size: 17px; margin: 0 0 34px; max-width: 46em; overflow-wrap: anywhere; }
h2 { font-size: 20px; letter-spacing: -0.01em; margin: 0 0 18px; font-weight: 620; }
h3 { font-size: 14px; color: var(--soft); font-weight: 500; margin: 26px 0 8px; }
section { margin-top: 56px; }
section p { max-width: 46em; color: var(--soft); margin: 0 0 12px; font-size: 15px; }
table { width: 100%; border-collapse: collapse; font-size: 14.5px; font-variant-numeric: tabular-nums; }
th { text-align: right; font-weight: 500; font-size: 13px; color: var(--soft); padding: 0 0 8px 14px; vertical-align: bottom; }
td { text-align: right; padding: 10px 0 10px 14px; border-top: 1px solid var(--rule); overflow-wrap: break-word; } td i { font-style: normal; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 0; } td:first-child { overflow-wrap: anywhere; }
.answer td:nth-child(4), .answer th:nth-child(4) { text-align: left; padding-left: 26px; }
.answer td:first-child, .answer td:nth-child(7) { font-weight: 620; }
.answer td:nth-child(4)::before { content: ""; display: inline-block; width: 9px; height: 9px; border-radius: 2px; margin-right: 8px; background: var(--s5); }
.answer .on-torch td:nth-child(4)::before { background: var(--torch); }
.answer .on-onnxruntime td:nth-child(4)::before { background: var(--onnxruntime); }
.answer .on-tensorrt td:nth-child(4)::before { background: var(--tensorrt); }
.answer .on-compile td:nth-child(4)::before { background: var(--compile); }
.answer .on-aot td:nth-child(4)::before { background: var(--aot); }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr)); gap: 32px 44px; }
figure { margin: 0; min-width: 0; }
figcaption { font-size: 14px; color: var(--soft); margin-bottom: 14px; }
svg { display: block; overflow: visible; font: 12px system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; font-variant-numeric: tabular-nums; }
svg text { fill: var(--ink); } svg .tick { fill: var(--soft); font-size: 11.5px; } svg .label { font-size: 13px; } svg .small { font-size: 12px; } svg .value { font-weight: 600; font-size: 13px; }
svg .rule { stroke: var(--rule); } svg .whisker { stroke: var(--ink); stroke-width: 1.4; } svg .faint { opacity: .35; } svg .level { stroke: var(--soft); stroke-dasharray: 3 4; }
svg .torch { fill: var(--torch); } svg .onnxruntime { fill: var(--onnxruntime); } svg .tensorrt { fill: var(--tensorrt); } svg .compile { fill: var(--compile); } svg .aot { fill: var(--aot); }
svg .curve { fill: none; stroke-width: 2; vector-effect: non-scaling-stroke; stroke-linejoin: round; }
.curve.s0 { stroke: var(--s0); } .curve.s1 { stroke: var(--s1); } .curve.s2 { stroke: var(--s2); } .curve.s3 { stroke: var(--s3); } .curve.s4 { stroke: var(--s4); } .curve.s5 { stroke: var(--s5); }
.legend { display: flex; flex-wrap: wrap; gap: 4px 18px; font-size: 13px; color: var(--soft); margin-top: 6px; }
.legend i { display: inline-block; width: 14px; height: 3px; border-radius: 2px; margin-right: 7px; vertical-align: middle; }
.legend .s0 { background: var(--s0); } .legend .s1 { background: var(--s1); } .legend .s2 { background: var(--s2); } .legend .s3 { background: var(--s3); } .legend .s4 { background: var(--s4); } .legend .s5 { background: var(--s5); }
.scroll { overflow-x: auto; }
.pictures .row { display: grid; grid-template-columns: repeat(var(--columns), minmax(104px, 1fr)); gap: 8px; }
.pictures b { font-size: 13px; font-weight: 600; line-height: 1.3; align-self: end; } .pictures small, .caption small { font-weight: 400; color: var(--soft); font-size: 12px; }
.pictures .caption { margin: 16px 0 6px; font-size: 13px; color: var(--soft); position: sticky; left: 0; width: fit-content; max-width: min(100%, 340px); }
.cell { position: relative; display: block; isolation: isolate; border-radius: 6px; overflow: hidden; border: 1px solid var(--rule); background: var(--card); }
.cell img { width: 100%; aspect-ratio: 1; display: block; }
.switch { display: block; font-size: 14px; color: var(--soft); margin: 0 0 14px; cursor: pointer; } .switch input { accent-color: var(--s0); margin: 0 6px 0 0; }
section:has(.switch input:checked) .cell::after { content: ""; position: absolute; inset: 0; background: var(--first) center / 100% 100%; mix-blend-mode: difference; }
section:has(.switch input:checked) .cell:not(:first-child) { filter: brightness(8); } section:has(.switch input:checked) .cell:first-child::after { display: none; }
details { margin-top: 28px; } summary { cursor: pointer; font-size: 14px; color: var(--soft); margin-bottom: 14px; }
ul { padding-left: 20px; margin: 0; font-size: 15px; } li { margin-bottom: 6px; overflow-wrap: anywhere; }
dl { display: grid; grid-template-columns: minmax(120px, max-content) 1fr; gap: 5px 24px; font-size: 14px; margin: 0; } dt { color: var(--soft); overflow-wrap: anywhere; } dd { margin: 0; overflow-wrap: anywhere; }
pre { background: var(--card); border: 1px solid var(--rule); border-radius: 8px; padding: 14px 16px; font: 13.5px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; }
footer { margin-top: 64px; font-size: 13px; color: var(--soft); }
@media (max-width: 720px) {
  main { padding: 32px 18px 28px; } section { margin-top: 44px; }
  thead { display: none; } table, tbody { display: block; }
  tr { display: grid; gap: 2px 20px; padding: 14px 0; border-top: 1px solid var(--rule); } .answer tr { grid-template-columns: 1fr 1fr; }
  td, th { display: flex; justify-content: space-between; align-items: baseline; gap: 12px; padding: 1px 0; border: 0; }
  td::before { content: attr(data-name); color: var(--soft); font-size: 12.5px; font-weight: 400; text-align: left; flex: none; max-width: 60%; overflow-wrap: normal; }
  td:first-child { font-weight: 620; font-size: 16px; } td:first-child::before { display: none; }
  .answer td:first-child, .answer td:nth-child(4) { grid-column: 1 / -1; justify-content: start; padding-left: 0; } .answer td:first-child { order: -2; } .answer td:nth-child(4) { order: -1; gap: 0; }
  dl { grid-template-columns: 1fr; gap: 0; } dd { margin-bottom: 8px; }
}
@media print { body { background: #fff; } section { break-inside: avoid; } }
"""
