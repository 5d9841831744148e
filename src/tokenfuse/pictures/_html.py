"""What notebooks show of reports, plans and tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING

from tokenfuse.costs import flops, size

if TYPE_CHECKING:
    from tokenfuse.plan import FusionPlan
    from tokenfuse.report import Report
    from tokenfuse.tokens import VisualTokens

MOST = 16
"""Frames of which a bar is drawn, evenly chosen."""
CELLS = 2048
"""Tokens of a plan that are drawn one by one; of more, each cell is several."""
KEPT, GONE = "#d9480f", "#dee2e6"


def report_html(report: Report) -> str:
    """Before and after, and a bar for each frame."""
    before, after = sum(report.prompt_before), sum(report.prompt_after)
    rows = [
        ("visual tokens", report.tokens_before, report.tokens_after),
        ("prompt tokens", before, after),
        ("prefill", flops(report.prefill_flops_before), flops(report.prefill_flops_after)),
        ("KV cache", size(report.kv_cache_bytes_before), size(report.kv_cache_bytes_after)),
    ]
    title = f"{report.strategy['strategy']} on {report.adapter}: {report.reduction:.1%} removed"
    parts = [f"<p><b>{escape(title)}</b></p>", _table(("", "before", "after"), rows)]
    for number, item in enumerate(report.items):
        words = f"{item.modality} {number}: {item.tokens_before} to {item.tokens_after} tokens"
        reason = f" ({item.reason})" if item.reason else ""
        parts.append(f"<p>{escape(words + reason)}</p>")
        parts.append(_bars(item.frame_tokens_after, item.frame_tokens_before))
    if report.reason:
        parts.append(f"<p>not compressed: {escape(report.reason)}</p>")
    return f"<div>{''.join(parts)}</div>"


def plan_html(plan: FusionPlan) -> str:
    """How many are kept, and where they are in the order of the source."""
    marks = plan.keep_mask.float()
    count = min(CELLS, len(marks))
    shares = [float(part.mean()) for part in marks.tensor_split(count)]
    wide = 128
    cells = "".join(
        f'<rect x="{i % wide}" y="{i // wide}" width="1" height="1" fill="{KEPT}" '
        f'fill-opacity="{share:.2f}"/>'
        for i, share in enumerate(shares)
        if share
    )
    rows = -(-count // wide)
    words = f"{plan.num_kept} of {plan.num_source} tokens kept, {plan.keep_ratio:.1%}"
    return (
        f"<div><p><b>{type(plan).__name__}</b>: {words}, in the order of the source</p>"
        f'<svg viewBox="0 0 {wide} {rows}" width="640" style="background:{GONE}">{cells}</svg>'
        "</div>"
    )


def tokens_html(tokens: VisualTokens) -> str:
    """Shapes, dtype and device."""
    rows = [
        ("grid", " × ".join(map(str, tokens.grid))),
        ("features", f"{tuple(tokens.features.shape)} {tokens.features.dtype}"),
        ("device", tokens.features.device),
        ("saliency", "no" if tokens.saliency is None else "yes"),
        ("text", "no" if tokens.text is None else tuple(tokens.text.shape)),
    ]
    return f"<div><p><b>VisualTokens</b></p>{_table(None, rows)}</div>"


def _bars(counts: Sequence[int], most: int) -> str:
    """A bar for each frame; evenly chosen ones of many."""
    step = max(1, -(-len(counts) // MOST))
    rows = [
        f'<tr><td style="text-align:right">{frame}</td><td style="width:240px;padding:2px">'
        f'<div style="background:{GONE}"><div style="background:{KEPT};height:.8em;'
        f'width:{count / most:.1%}"></div></div></td><td>{count}/{most}</td></tr>'
        for frame, count in list(enumerate(counts))[::step]
    ]
    missing = len(counts) - len(rows)
    more = f"<p>… {missing} more frames</p>" if missing else ""
    return f"<table>{''.join(rows)}</table>{more}"


def _table(head: Sequence[str] | None, rows: Iterable[Sequence[object]]) -> str:
    top = "" if head is None else f"<tr>{''.join(f'<th>{escape(x)}</th>' for x in head)}</tr>"
    body = "".join(f"<tr>{''.join(f'<td>{escape(str(x))}</td>' for x in row)}</tr>" for row in rows)
    return f"<table>{top}{body}</table>"
