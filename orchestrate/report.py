"""What a run shows: `report.png` and the self-contained `report.html`, made from the run folder alone."""

from __future__ import annotations

import base64
import html
import json
import math
from io import BytesIO
from pathlib import Path
from typing import Any

from zerokl.orchestrate import metrics
from zerokl.orchestrate.errors import UserError
from zerokl.orchestrate.files import write_text

CONTROL = "control.json"
_SIDES = ["", "this run, all steps", "stock kernels, first step"]

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1b1b1b }
table { border-collapse: collapse; margin: 1rem 0 } td, th { padding: .25rem .8rem; border-bottom: 1px solid #ddd }
td:not(:first-child), th:not(:first-child) { text-align: right } th:first-child, td:first-child { text-align: left }
img { max-width: 100% } pre { background: #f5f5f5; padding: 1rem; overflow-x: auto } .zero { color: #0a7d32 }
"""


def write(folder: Path) -> tuple[Path, Path]:
    """Write report.png and report.html into the run folder; returns both paths. Raises UserError without any step."""
    steps = metrics.read(folder)
    if not steps:
        raise UserError(f"{folder} has no finished step to report", "let the run finish a step")
    control = _control(folder)
    image = _draw(steps, control)
    png, page = folder / "report.png", folder / "report.html"
    png.write_bytes(image)
    write_text(page, _page(folder, steps, control, image))
    return page, png


def quarters(values: list[float]) -> tuple[float, float]:
    """Means of the first and the last quarter (at least one step each)."""
    n = max(1, len(values) // 4)
    return sum(values[:n]) / n, sum(values[-n:]) / n


def totals(steps: list[dict[str, Any]]) -> dict[str, Any]:
    """The run's difference between rollout and training over all steps; None where a step was not finite."""

    def worst(key: str) -> float | None:
        values = [step[key] for step in steps]
        return None if any(v is None for v in values) else max(values, key=abs)

    tokens = sum(s["tokens"] for s in steps)
    k3 = [s["kl_k3"] for s in steps]
    mean_k3 = (
        None if any(v is None for v in k3) else sum(v * s["tokens"] for v, s in zip(k3, steps, strict=True)) / tokens
    )
    return {
        "tokens": tokens,
        "mismatched_tokens": sum(s["mismatched_tokens"] for s in steps),
        "max_abs_diff": worst("max_abs_diff"),
        "kl_k1": worst("kl_k1"),
        "kl_k3": mean_k3,
    }


def _control(folder: Path) -> dict[str, Any] | None:
    path = folder / CONTROL
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is damaged: {error}", "remove it, or run the control again") from error


def _draw(steps: list[dict[str, Any]], control: dict[str, Any] | None) -> bytes:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    _draw_reward(left, steps)
    _draw_kl(middle, steps, control)
    _draw_time(right, steps)
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()


def _draw_reward(axes: Any, steps: list[dict[str, Any]]) -> None:
    x, reward = [s["step"] for s in steps], [s["reward_mean"] for s in steps]
    first, last = quarters(reward)
    n = max(1, len(steps) // 4)
    axes.plot(x, reward, marker="o", markersize=3, linewidth=1, color="#3465a4")
    axes.hlines(first, x[0], x[n - 1], color="#888", linewidth=2)
    axes.hlines(last, x[-n], x[-1], color="#0a7d32", linewidth=2)
    axes.set(title=f"mean reward: {first:.3f} → {last:.3f} (quarters)", xlabel="step", ylim=(0, 1.02))
    axes.grid(alpha=0.3)


def _draw_kl(axes: Any, steps: list[dict[str, Any]], control: dict[str, Any] | None) -> None:
    ours = [math.nan if s["kl_k3"] is None else s["kl_k3"] for s in steps]
    largest = max((value for value in ours if not math.isnan(value)), default=math.nan)
    axes.plot([s["step"] for s in steps], ours, color="#0a7d32", linewidth=2, label=f"this run: {largest:.3g}")
    stock = control["kl"]["k3"] if control else None
    if stock:
        axes.axhline(stock, color="#c0392b", linestyle="--", label=f"stock kernels, step 1: {stock:.2e}")
        axes.set_yscale("symlog", linthresh=stock / 100)  # the one logarithmic axis that has a zero
        axes.set_ylim(-stock / 200, 10 * max(stock, *(value for value in ours if not math.isnan(value))))
    axes.set(title="KL between rollout and training (k3)", xlabel="step")
    axes.legend()
    axes.grid(alpha=0.3)


def _draw_time(axes: Any, steps: list[dict[str, Any]]) -> None:
    x = [s["step"] for s in steps]
    parts = ("rollout_s", "reward_s", "train_s", "sync_s")
    axes.stackplot(x, *[[s[part] for s in steps] for part in parts], labels=[p.removesuffix("_s") for p in parts])
    axes.set(title="seconds per step", xlabel="step")
    axes.legend(loc="upper right", fontsize=8)


def _page(folder: Path, steps: list[dict[str, Any]], control: dict[str, Any] | None, image: bytes) -> str:
    first, last = quarters([s["reward_mean"] for s in steps])
    total, seconds = totals(steps), sum(s["step_s"] for s in steps)
    zero = total["mismatched_tokens"] == 0 and total["max_abs_diff"] == 0
    summary = [
        ("steps", f"{len(steps)}"),
        ("mean reward, first quarter", f"{first:.4f}"),
        ("mean reward, last quarter", f"{last:.4f} ({last - first:+.4f})"),
        ("sampled tokens", f"{total['tokens']:,}"),
        ("samples dropped", f"{sum(s['dropped'] for s in steps)}"),
        ("sampled tokens per second of a step", f"{total['tokens'] / seconds:.1f}"),
        ("weight synchronisation, mean", f"{sum(s['sync_s'] for s in steps) / len(steps):.2f} s"),
        ("training time", f"{seconds:.0f} s"),
    ]
    config = folder / "config.toml"
    recipe = config.read_text(encoding="utf-8") if config.exists() else "(no config.toml in this folder)"
    verdict = "every log-probability equal, bit for bit" if zero else "NOT equal"
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>zerokl: {html.escape(folder.name)}</title><style>{_STYLE}</style>
<h1>{html.escape(folder.name)}</h1>
<p>Rollout against training: <b class="{"zero" if zero else ""}">{verdict}</b>
({total["mismatched_tokens"]} of {total["tokens"]:,} tokens differ).</p>
<img alt="reward, KL and time per step" src="data:image/png;base64,{base64.b64encode(image).decode()}">
<h2>Summary</h2>{_table(["", ""], summary)}
<h2>Rollout against training</h2>{_table(_SIDES, _beside(total, control))}
{_far_apart(control)}<h2>Recipe</h2><pre>{html.escape(recipe)}</pre>
</html>
"""


def _beside(total: dict[str, Any], control: dict[str, Any] | None) -> list[tuple[str, ...]]:
    def show(value: Any) -> str:
        return "not finite" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.3g}"

    kl = control["kl"] if control else {}
    names = (("tokens", "tokens"), ("mismatched_tokens", "mismatched tokens"),
             ("max_abs_diff", "largest difference of a log-probability"))  # fmt: skip
    rows: list[tuple[str, ...]] = [
        (label, show(total[key]), show(control[key]) if control else "not measured") for key, label in names
    ]
    rows += [
        (f"KL, {k} estimator", show(total[f"kl_{k}"]), show(kl[k]) if control else "not measured") for k in ("k1", "k3")
    ]
    return rows


def _far_apart(control: dict[str, Any] | None) -> str:
    """The control's tokens with the largest differences."""
    if not control:
        return ""
    names = ("sample", "position", "token", "rollout", "trainer")
    rows = [["not finite" if token[n] is None else token[n] for n in names] for token in control["gap"]["extremes"]]
    return "<h2>Stock kernels: the tokens furthest apart</h2>" + _table(
        ["response", "token", "id", "log-probability in the rollout", "in training"], rows
    )


def _table(head: list[str], rows: list[Any]) -> str:
    def cells(row: Any, tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in row) + "</tr>"

    return "<table>" + cells(head, "th") + "".join(cells(row, "td") for row in rows) + "</table>"
