"""A page in HTML that needs nothing but itself."""

from __future__ import annotations

import base64
import io
from html import escape
from itertools import count
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from PIL import Image

from tokenfuse.pictures._draw import caption, label

if TYPE_CHECKING:
    from tokenfuse.pictures.token_map import TokenMap

_numbers = count()

STYLE = """\
.tf{font:14px/1.45 system-ui,sans-serif;color:#1c1c1c;background:#fff;padding:16px}
.tf h1{font-size:1.15em;margin:0 0 .4em}.tf p{margin:.2em 0 .8em}
.tf .frames{display:flex;flex-wrap:wrap;gap:14px}
.tf figure{margin:0;width:232px}.tf figcaption{display:flex;justify-content:space-between}
.tf figcaption b{color:#1864ab;font-weight:600}
.tf .pic{position:relative;line-height:0}.tf .pic.anchor{outline:3px solid #1864ab}
.tf img{width:100%;image-rendering:auto}.tf svg{position:absolute;inset:0;width:100%;height:100%}
.tf rect{fill:transparent;stroke:#d9480f;stroke-width:1;vector-effect:non-scaling-stroke}
.tf rect.gone{fill:#fff;fill-opacity:.68;stroke:none}
.tf rect.into{stroke:#1864ab;stroke-width:4}.tf rect:hover{stroke:#1c1c1c;stroke-width:2}
.tf .said{min-height:1.5em;font-variant-numeric:tabular-nums}"""

# Which step is shown, and where the token under the pointer went.
SCRIPT = """\
(function(root){
  var said=root.querySelector('.said'),lit=null;
  function show(step){
    root.querySelectorAll('rect').forEach(function(r){
      r.classList.toggle('gone',+r.dataset.until<step)});
    root.querySelectorAll('[data-counts]').forEach(function(s){
      s.textContent=s.dataset.counts.split('|')[step]});
    root.querySelector('.step').textContent=root.querySelector('.step').dataset.titles.split('|')[step];
  }
  root.querySelectorAll('input').forEach(function(i){
    i.addEventListener('change',function(){show(+i.value)})});
  root.addEventListener('mouseover',function(e){
    if(lit){lit.classList.remove('into');lit=null}
    if(e.target.tagName!=='rect')return;
    said.textContent=e.target.dataset.said;
    lit=root.querySelector('[data-n="'+e.target.dataset.into+'"]');
    if(lit)lit.classList.add('into')});
})(document.getElementById('ID'));"""


def page(tokens: TokenMap, most: int | None) -> str:
    """The whole page."""
    title = escape(tokens.title or "tokenfuse")
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1"></head>'
        f'<body style="margin:0">{fragment(tokens, most)}</body></html>\n'
    )


def fragment(tokens: TokenMap, most: int | None) -> str:
    """What the page shows, for a page of others."""
    name = f"tokenfuse-{next(_numbers)}"
    chosen = tokens.chosen(most)
    last = len(tokens.steps) - 1
    captions = [caption(tokens, number) for number in range(last + 1)]
    choice = "".join(
        f'<label><input type="radio" name="{name}" value="{number}"'
        f"{' checked' if number == last else ''}> {escape(step.title)}</label> "
        for number, step in enumerate(tokens.steps)
    )
    missing = tokens.grid[0] - len(chosen)
    more = f"<p>… {missing} more frame{'s' if missing > 1 else ''}</p>" if missing else ""
    figures = "".join(_figure(tokens, frame, last) for frame in chosen)
    return (
        f'<div class="tf" id="{name}"><style>{STYLE}</style>'
        f"<h1>{escape(tokens.title)}</h1>"
        f'<p class="step" data-titles="{escape("|".join(captions))}">{escape(captions[-1])}</p>'
        f"{f'<p>{choice}</p>' if last else ''}"
        '<p class="said">Point at a token to see where it went.</p>'
        f'<div class="frames">{figures}</div>{more}'
        f"<script>{SCRIPT.replace('ID', name)}</script></div>"
    )


def _figure(tokens: TokenMap, frame: int, last: int) -> str:
    _, rows, columns = tokens.grid
    labels = [label(tokens, number, frame)[0] for number in range(last + 1)]
    anchor = label(tokens, last, frame)[1]
    places = range(frame * rows * columns, (frame + 1) * rows * columns)
    rects = "".join(_rect(tokens, place, last) for place in places)
    return (
        f'<figure><figcaption><span data-counts="{escape("|".join(labels))}">'
        f"{escape(labels[-1])}</span><b>{escape(anchor)}</b></figcaption>"
        f'<div class="pic{" anchor" if anchor else ""}">'
        f'<img alt="frame {frame}" src="{_source(tokens.frames[frame])}">'
        f'<svg viewBox="0 0 {columns} {rows}" preserveAspectRatio="none">{rects}</svg>'
        "</div></figure>"
    )


def _rect(tokens: TokenMap, place: int, last: int) -> str:
    """A token: until which step it is left, and what is said of it."""
    _, rows, columns = tokens.grid
    alive = [bool(step.kept[place]) for step in tokens.steps]
    until = sum(alive) - 1
    x, y = place % columns, place // columns % rows
    into = int(tokens.target[place])
    said = f"{_where(tokens, place)} {_fate(tokens, place, into, until, last)}"
    gone = ' class="gone"' if until < last else ""
    return (
        f'<rect x="{x}" y="{y}" width="1" height="1"{gone} data-n="{place}" data-into="{into}" '
        f'data-until="{until}" data-said="{escape(said)}"></rect>'
    )


def _fate(tokens: TokenMap, place: int, into: int, until: int, last: int) -> str:
    if into < 0:
        return "was dropped"
    if into != place:
        cosine = np.nan if tokens.similarity is None else float(tokens.similarity[place])
        alike = "" if np.isnan(cosine) else f", cosine {cosine:.3f}"
        return f"went into {_where(tokens, into)}{alike}"
    others = int((tokens.target == place).sum()) - 1
    words = f"stands for itself and {others} more" if others else "stands for itself"
    if until < last:
        words += f"; it goes {tokens.steps[until + 1].title}"
    return words


def _where(tokens: TokenMap, place: int) -> str:
    _, rows, columns = tokens.grid
    frame, inside = divmod(place, rows * columns)
    return f"frame {frame}, row {inside // columns}, column {inside % columns}"


def _source(frame: npt.NDArray[np.uint8]) -> str:
    """A frame as a data URL: small ones without loss, larger ones as JPEG."""
    picture = Image.fromarray(frame)
    held = io.BytesIO()
    small = picture.width <= 128
    if small:
        size = (picture.width * 2, picture.height * 2)
        picture = picture.resize(size, Image.Resampling.NEAREST)
    kind = "png" if small else "jpeg"
    picture.save(held, kind, **({} if small else {"quality": 85}))
    return f"data:image/{kind};base64,{base64.b64encode(held.getvalue()).decode()}"
