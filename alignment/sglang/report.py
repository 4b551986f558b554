"""Judging what an engine's hooks report (`hooks.Binding.report`). Needs no SGLang."""

from __future__ import annotations

from typing import Any

from zerokl.alignment.sglang.errors import HookError


def check_report(report: dict[str, Any] | None) -> None:
    """Raise HookError unless every hook ran exactly as often as the forward passes so far demand."""
    if not report:
        raise HookError("SGLang's scheduler reports no zerokl binding: the plugin did not load or was not asked for")
    if report["forwards"] < 2:
        raise HookError(f"{report['forwards']} forward passes ran: the warm-up needs a prefill and a decode step")
    for row in report["hooks"]:
        expected = row["per_forward"] * report["forwards"]
        if row["calls"] != expected or not row["intact"]:
            state = "" if row["intact"] else ", and something replaced it since"
            raise HookError(
                f"hook {row['hook']!r} did not take effect: {row['calls']} calls in {report['forwards']} forward "
                f"passes, {expected} expected{state}; the engine would compute with SGLang's own kernels"
            )
