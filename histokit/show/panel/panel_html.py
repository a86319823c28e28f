"""Small parts of a panel: what it says as HTML, and the part of it that runs in the browser."""

import html
from pathlib import Path

HERE = Path(__file__).parent
STYLE = f"<style>\n{(HERE / 'panel.css').read_text(encoding='utf-8')}</style>"
DIFF = {"+": "hk-plus", "-": "hk-minus"}


def keys():
    """The part in the browser: Escape becomes a message, the pointer over a picture wipes to what lies under it."""
    import anywidget

    class Keys(anywidget.AnyWidget):
        _esm = HERE / "panel.js"

    return Keys()


def line(text, kind="hk-faint"):
    return f"<div class='hk-line {kind}'>{html.escape(text)}</div>"


def difference(text):
    """A unified difference in colours, without its head."""
    rows = [row for row in text.splitlines() if row[:3] not in ("---", "+++") and row[:2] != "@@"]
    body = "\n".join(f"<span class='{DIFF.get(row[:1], '')}'>{html.escape(row)}</span>" for row in rows)
    return f"<pre class='hk-diff'>{body}</pre>" if text else ""


def reading(found, remark=""):
    """What `widgets.tuner` calls a reading: None while it is not there, an exception where there is none."""
    if found is None:
        return "<div class='hk-reading hk-faint'>reading ...</div>"
    if isinstance(found, Exception):
        return f"<div class='hk-reading hk-faint'>No reading. {html.escape(str(found))}</div>"
    said = f"<div class='{'hk-good' if found.good else 'hk-bad'}'>{html.escape(found.said)}</div>"
    cells = [(html.escape(name), html.escape(value), html.escape(asked)) for name, value, asked in found.rows]
    rows = "".join(f"<tr><td>{name}</td><td>{value}</td><td class='hk-faint'>{asked}</td></tr>" for name, value, asked in cells)
    more = f"<div class='hk-faint'>{html.escape(remark)}</div>" if remark else ""
    return f"<div class='hk-reading'>{said}<table>{rows}</table>{more}</div>"


def words(name):
    return name.removeprefix("num_").replace("_", " ")


def decimals(step):
    """How many decimals a slider of this step shows."""
    return min((n for n in range(6) if abs(step * 10**n - round(step * 10**n)) <= 1e-9 * max(1, step * 10**n)), default=6)
