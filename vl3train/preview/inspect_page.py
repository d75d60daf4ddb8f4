"""One step as an HTML file that needs no other file."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from vl3train.preview.step_samples import ShownPack, ShownSample, ShownStep, TextPiece
from vl3train.report.html import STYLE

PAGE_STYLE = """
details { margin: 12px 0; } summary { cursor: pointer; font-weight: 600; padding: 4px 0; }
.bar { display: inline-block; vertical-align: middle; width: 160px; height: 8px; background: var(--line);
  border-radius: 4px; overflow: hidden; } .bar i { display: block; height: 100%; background: #1f6feb; }
.step-sample { margin: 10px 0; }
.step-sample h3 { font-size: 14px; margin: 0 0 4px; overflow-wrap: anywhere; }
.frames { display: flex; flex-wrap: wrap; gap: 4px; margin: 6px 0; }
.frames img { max-height: 150px; max-width: 100%; border-radius: 4px; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: 6px 0 0; font: 13px/1.5 ui-monospace, monospace; }
mark { background: var(--good-back); color: var(--good); border-radius: 3px; }
.visual { color: #1f6feb; } .why { color: var(--bad); font-weight: 600; }
"""


def step_page(step: ShownStep) -> str:
    """The whole page."""
    title, facts, packs = step.title, step.facts, step.packs
    body = [f"<h1>{escape(title)}</h1>", *(f"<p>{escape(fact)}</p>" for fact in facts)]
    body.append(
        "<p><mark>Green</mark> words are supervised: the model is asked for them. "
        "Pictures are what the encoder sees; dark squares are pruned tokens, which the language model does not see.</p>"
    )
    body += [_table(packs), *(_pack(pack) for pack in packs)]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}{PAGE_STYLE}</style></head>"
        f"<body><main>{''.join(body)}</main></body></html>\n"
    )


def _table(packs: Sequence[ShownPack]) -> str:
    rows = "".join(
        f"<tr><td>rank {shown.place.rank}, micro-batch {shown.place.micro_batch}</td>"
        f"<td>{len(shown.place.pack.samples)}</td><td>{shown.place.pack.num_tokens:,} {_bar(shown.token_fill)}</td>"
        f"<td>{shown.place.pack.num_patches:,} {_bar(shown.patch_fill)}</td>"
        f"<td>{shown.place.pack.num_supervised_tokens:,}</td><td>{shown.work:.3f}</td></tr>"
        for shown in packs
    )
    head = "".join(
        f"<th>{name}</th>" for name in ("pack", "samples", "tokens", "patches", "supervised", "work / mean")
    )
    return f'<div class="card"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def _bar(share: float) -> str:
    return f'<span class="bar"><i style="width:{min(share, 1):.1%}"></i></span>'


def _pack(shown: ShownPack) -> str:
    place = shown.place
    left = len(place.pack.samples) - len(shown.samples)
    rest = f"<p>{left} more samples; --samples N shows more of them.</p>" if left else ""
    name = f"rank {place.rank}, micro-batch {place.micro_batch}: {len(place.pack.samples)} samples"
    cards = "".join(_sample(sample) for sample in shown.samples)
    return f"<details open><summary>{name}</summary>{cards}{rest}</details>"


def _sample(sample: ShownSample) -> str:
    frames = "".join(
        '<div class="frames">' + "".join(f'<img alt="" src="{address}">' for address in item) + "</div>"
        for item in sample.pictures
    )
    text = "".join(_piece(piece) for piece in sample.text)
    why = f'<p class="why">cannot be used: {escape(sample.fault)}</p>' if sample.fault else ""
    if sample.loss is not None:
        bad = "" if sample.loss.is_finite else ' class="why"'
        why = f"<p{bad}>{escape(str(sample.loss))}</p>{why}"
    return (
        f'<div class="card step-sample"><h3>{escape(sample.key)}</h3><span class="source">{escape(sample.about)}</span>'
        f"{why}{frames}<pre>{text}</pre></div>"
    )


def _piece(piece: TextPiece) -> str:
    if piece.count:
        return f'<span class="visual">[{piece.count} visual tokens]</span>'
    return f"<mark>{escape(piece.text)}</mark>" if piece.supervised else escape(piece.text)
