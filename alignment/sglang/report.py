"""Judging what an engine's hooks report (`hooks.Binding.reports`). Needs no SGLang."""

from __future__ import annotations

from typing import Any

from zerokl.alignment.sglang.errors import HookError


def check_reports(reports: list[dict[str, Any]] | None, ranks: int) -> None:
    """Raise HookError unless on each of the ranks every hook ran exactly as often as the forward passes so far demand,
    and all ranks ran the same passes and sampled the same tokens with the same log-probabilities."""
    if not reports:
        raise HookError("SGLang's scheduler reports no zerokl binding: the plugin did not load or was not asked for")
    if [report["rank"] for report in reports] != list(range(ranks)):
        raise HookError(f"ranks {[report['rank'] for report in reports]} report a binding, 0 to {ranks - 1} expected")
    for report in reports:
        _check_report(report, f" on rank {report['rank']}" if ranks > 1 else "")
    for what in ("forwards", "sampled"):
        if len({report[what] for report in reports}) > 1:
            raise HookError(f"ranks differ in {what}: {[report[what] for report in reports]}")


def _check_report(report: dict[str, Any], where: str) -> None:
    if report["forwards"] < 2:
        raise HookError(
            f"{report['forwards']} forward passes ran{where}: the warm-up needs a prefill and a decode step"
        )
    for row in report["hooks"]:
        expected = row["per_forward"] * report["forwards"]
        if row["calls"] != expected or not row["intact"]:
            state = "" if row["intact"] else ", and something replaced it since"
            raise HookError(
                f"hook {row['hook']!r} did not take effect{where}: {row['calls']} calls in {report['forwards']} "
                f"forward passes, {expected} expected{state}; the engine would compute with SGLang's own kernels"
            )
