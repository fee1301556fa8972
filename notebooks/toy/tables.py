"""Results as Markdown tables."""

import math


def share(hits: int, asked: int) -> str:
    """Percent with Wilson's 95 % interval (Wilson, JASA 1927)."""
    z, p = 1.96, hits / asked
    middle = (p + z**2 / (2 * asked)) / (1 + z**2 / asked)
    half = z / (1 + z**2 / asked) * math.sqrt(p * (1 - p) / asked + z**2 / (4 * asked**2))
    low, high = max(0, middle - half), min(1, middle + half)
    return f"{100 * p:.1f} ({100 * low:.0f} to {100 * high:.0f})"


def table(*rows: list[str]) -> str:
    """Markdown; the first row is the header."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])
