"""Results as a person reads them: Markdown for Prefect's pages, a table for the terminal."""

from typing import Any

from rich.table import Table

METRICS = {"ndcg_at_10": "nDCG@10", "recall_at_10": "Recall@10", "mrr_at_10": "MRR@10"}
SYSTEMS = {"bm25": "BM25", "base": "base encoder", "trained": "trained model"}


def metric_rows(comparison: dict[str, Any]) -> list[list[str]]:
    """A row per system: its name and its metrics."""
    systems = comparison["systems"]
    return [
        [name, *(f"{systems[system][metric]:.4f}" for metric in METRICS)]
        for system, name in SYSTEMS.items()
        if system in systems
    ]


def difference_rows(comparison: dict[str, Any]) -> list[list[str]]:
    """A row per pair of systems: their names, and for each metric the difference and its corrected p-value."""
    pairs: dict[tuple[str, str], dict[str, str]] = {}
    for row in comparison["differences"]:
        p_value = row.get("p_value_holm", row["p_value"])
        shown = f"{row['difference']:+.4f} (p {_p(p_value)})"
        pairs.setdefault((row["left"], row["right"]), {})[row["metric"]] = shown
    return [
        [f"{SYSTEMS.get(left, left)} − {SYSTEMS.get(right, right)}", *(cells.get(metric, "") for metric in METRICS)]
        for (left, right), cells in pairs.items()
    ]


def _p(value: float) -> str:
    return f"= {value:.2g}" if value >= 0.001 else "< 0.001"


def metrics_markdown(comparison: dict[str, Any]) -> str:
    """Metrics and differences as Markdown tables."""
    measured = comparison["set"]
    return "\n".join(
        [
            f"{measured['queries']} queries over {measured['passages']} passages; p-values are corrected (Holm).",
            "",
            *_markdown_table(["", *METRICS.values()], metric_rows(comparison)),
            "",
            *_markdown_table(["difference", *METRICS.values()], difference_rows(comparison)),
        ]
    )


def decision_markdown(registration: dict[str, Any]) -> str:
    """Version, alias and the gate's reasons."""
    alias = registration["alias"] or "no alias"
    title = f"**{registration['model_name']} version {registration['version']}: {alias}**"
    return "\n".join([title, "", *(f"- {reason}" for reason in registration["reasons"])])


def _markdown_table(header: list[str], rows: list[list[str]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return [f"| {' | '.join(line)} |" for line in lines]


def results_table(comparison: dict[str, Any]) -> Table:
    """Metrics and differences for the terminal."""
    table = Table(title=f"Test set: {comparison['set']['queries']} queries", title_justify="left")
    table.add_column("")
    for name in METRICS.values():
        table.add_column(name, justify="right")
    for row in metric_rows(comparison):
        table.add_row(*row)
    table.add_section()
    for row in difference_rows(comparison):
        table.add_row(*row)
    return table
