"""The table of ``ssrctl critic --calibrate``: the measures for choosing a critic, readable at 80 columns."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

Row = tuple[str, str, str]
NOT_KNOWN = "-"
_VERDICTS = {
    "early": "too early",
    "late": "too late",
    "missed": "all called right",
    "false_alarm": "false alarm",
    "undecided": "undecided",
}


def calibration_table(name: str, report: dict[str, Any]) -> Table:
    """Build the table of a calibration: measure, value, and a note for comparison.

    Args:
        name: the critic's name, for the title; not taken as markup.
        report: the result of ``ssrctl.critics.calibration.calibrate.calibrate``.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    title = Text(_title(name, report))
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("measure", no_wrap=True)
    table.add_column("value", justify="right", no_wrap=True)
    table.add_column("note", overflow="fold")
    for rows in (_first_errors(report), _separation(report), _noise(report), _missing(report), _cost(report["cost"])):
        for row in rows:
            table.add_row(*map(Text, row))
        table.add_section()
    return table


def show_calibration(report: dict[str, Any]) -> None:
    """Print the table to stdout; ``report`` has the critic's name as ``critic``."""
    from ssrctl.io.terminal import SafeConsole

    SafeConsole(highlight=False).print(calibration_table(report["critic"], report))


def _title(name: str, report: dict[str, Any]) -> str:
    judged, given = report["traces"], report["traces_given"]
    traces = f"{judged:,} solutions" if judged == given else f"{judged:,} of {given:,} solutions"
    times = f", {report['judgements']:,} judgements" if report["repeats"] > 1 else ""
    return f"{name}: {traces} of {report['problems']:,} problems{times}"


def _first_errors(report: dict[str, Any]) -> list[Row]:
    found, best = report["first_error"], report["best_threshold"]
    score, chance = found["f1"], _share(report["random_f1"])
    note = "needs solutions with and without an error"
    if score is not None:
        interval = f"{_share(score['low'])} to {_share(score['high'])}"
        note = f"{interval} ({score['confidence']:.0%}); by chance {chance}"
    rows = [
        ("first-error F1", _share(score and score["value"]), note),
        _accuracy("  first error found", found["erroneous_accuracy"], report["erroneous"], found["erroneous_verdicts"]),
        _accuracy("  right ones passed", found["correct_accuracy"], report["correct"], found["correct_verdicts"]),
    ]
    if found["undecided_frac"]:
        lenient = _share(found["f1_missing_as_right"])
        rows.append(("  F1, missing passed", lenient, "missing scores count as no objection"))
    if best is not None:
        used = report["wrong_below"]
        thresholds = "the current threshold is the best"
        if best["wrong_below"] != used:
            thresholds = f"below {best['wrong_below']:g}, fitted on these solutions; current: below {used:g}"
        rows.append(("  F1, best threshold", _share(best["f1"]), thresholds))
    return rows


def _accuracy(label: str, value: float | None, count: int, verdicts: dict[str, float]) -> Row:
    others = ", ".join(f"{word} {_share(verdicts[kind])}" for kind, word in _VERDICTS.items() if verdicts.get(kind))
    return label, _share(value), f"of {count:,}" + (f"; {others}" if others else "")


def _separation(report: dict[str, Any]) -> list[Row]:
    outcome = report["outcome"]
    of = "final answer right" if outcome["of"] == "final_answer" else "no wrong step"
    rows = [("AUC, steps", _share(report["step_auc"]), "right step above first wrong; by chance 0.5")]
    agreement = report["step_kappa"]
    note = f"Cohen's kappa with the labels of {agreement['steps']:,} steps; by chance 0"
    rows.append(("kappa, steps", _signed(agreement["kappa"]), note))
    for key, by in (("mean_score", "mean"), ("min_score", "least")):
        note = f"{of}, by {by} step score; correlation {_signed(outcome[key]['correlation'])}"
        rows.append((f"AUC, outcome by {by}", _share(outcome[key]["auc"]), f"{note}; {outcome['traces']:,} solutions"))
    return rows


def _noise(report: dict[str, Any]) -> list[Row]:
    noise = report["noise"]
    if noise is None:
        return [("noise of a score", NOT_KNOWN, "judge several times to measure it: --repeats 3")]
    note = f"standard deviation; two differ by {noise['mean_abs_difference']:.1f}"
    rows = [
        ("noise of a score", f"{noise['score_std']:.1f}", note),
        ("  agreement, ICC(1)", _share(noise["icc"]), "1: no noise; 0: only noise"),
        ("  first error changes", _share(noise["first_error_changed_frac"]), "between two judgements of a solution"),
    ]
    rounds = [value for value in report["first_error"]["f1_by_repeat"] if value is not None]
    if len(rounds) > 1:
        note = f"{_share(min(rounds))} to {_share(max(rounds))} over {len(rounds)} rounds"
        rows.append(("  F1 of one round", _share(sum(rounds) / len(rounds)), note))
    return rows


def _missing(report: dict[str, Any]) -> list[Row]:
    classes = ", ".join(f"{name} {share:.1%}" for name, share in report["missing"]["by_class"].items())
    return [("missing scores", f"{report['missing']['frac']:.1%}", classes)]


def _cost(cost: dict[str, Any]) -> list[Row]:
    rows: list[Row] = []
    if cost["calls"] is not None:
        rows = [_price(cost), _calls(cost)]
    if cost["seconds"] is not None:
        rows.append(("time per solution", _time(cost["seconds"]), _latency(cost)))
    elif cost["cached_frac"]:
        rows.append(("time per solution", NOT_KNOWN, "unknown: replies came from the cache"))
    return rows


def _price(cost: dict[str, Any]) -> Row:
    price = cost["cost_usd"]
    if price is not None:
        return "cost of 1,000", f"${1000 * price:,.2f}", f"spent now ${cost['spent_usd']:,.4f}"
    if cost["cached_frac"] == 1:
        return "cost of 1,000", NOT_KNOWN, "every reply came from the cache; --no-cache asks again"
    return "cost of 1,000", NOT_KNOWN, "no prices known; give --input-price and --output-price"


def _calls(cost: dict[str, Any]) -> Row:
    tokens = [
        f"{cost[name]:,.0f} {word}"
        for name, word in (("prompt_tokens", "prompt"), ("completion_tokens", "reply"))
        if cost[name] is not None
    ]
    parts = [" and ".join(tokens) + " tokens"] if tokens else []
    if cost["cached_frac"]:
        parts.append(f"{cost['cached_frac']:.0%} from the cache")
    return "calls per solution", f"{cost['calls']:.2f}", "; ".join(parts)


def _latency(cost: dict[str, Any]) -> str:
    per_call = cost["seconds_per_call"]
    return "" if per_call is None else f"at this concurrency; {per_call:.2f} s per call"


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 0.01 else f"{1000 * seconds:.2g} ms"


def _share(value: float | None) -> str:
    return NOT_KNOWN if value is None else f"{value:.3f}"


def _signed(value: float | None) -> str:
    return NOT_KNOWN if value is None else f"{value:+.3f}"
