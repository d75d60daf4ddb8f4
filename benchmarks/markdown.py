"""Lines of a Markdown table: what the benchmarks print and keep for people."""

from __future__ import annotations


def table_head(*columns: str, numbers: int = 0) -> str:
    """The names of the columns, and the line below them. The last ``numbers`` columns are set to the right.

    >>> print(table_head("op", "ms", numbers=1))
    | op | ms |
    |---|---:|
    """
    marks = ["---"] * (len(columns) - numbers) + ["---:"] * numbers
    return f"{table_row(*columns)}\n|{'|'.join(marks)}|"


def table_row(*cells: object) -> str:
    """One row. A bar or a line break within a cell would end it: a space stands there.

    >>> table_row("a|b", 1.5, "")
    '| a b | 1.5 | |'
    """
    texts = [str(cell).replace("|", " ").replace("\n", " ") for cell in cells]
    return "|" + "".join(f" {text} |" if text else " |" for text in texts)
