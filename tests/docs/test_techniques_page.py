"""docs/recipes.md shows the techniques and their windows; ``python tests/docs/test_techniques_page.py`` writes them."""

from pathlib import Path

from lightning_optim.techniques import TECHNIQUES, windows

PAGE = Path(__file__).parents[2] / "docs" / "recipes.md"


def techniques_table():
    """A row for each technique that is registered."""
    lines = ["| key | callback | a bare value sets | its window |", "| --- | --- | --- | --- |"]
    for name, technique in TECHNIQUES.items():
        window = ", ".join(f"`{argument}`" for argument in technique.window) or "-"
        lines.append(f"| `{name}` | {technique.callback_class.__name__} | `{technique.first}` | {window} |")
    return "\n".join(lines)


def windows_table():
    """A row for each number of techniques in a run."""
    lines = ["| techniques | their windows |", "| --- | --- |", "| 1 | the defaults of its callback |"]
    for count in range(2, len(TECHNIQUES) + 1):
        lines.append(f"| {count} | {', '.join(f'{start:g} to {end:g}' for start, end in windows(count))} |")
    return "\n".join(lines)


def with_tables(text):
    for mark, table in (("techniques", techniques_table()), ("windows", windows_table())):
        begin, end = f"<!-- {mark}: begin -->", f"<!-- {mark}: end -->"
        before, rest = text.split(begin)
        text = f"{before}{begin}\n{table}\n{end}{rest.split(end)[1]}"
    return text


def test_the_page_shows_the_techniques_as_they_are():
    text = PAGE.read_text(encoding="utf-8")
    assert text == with_tables(text), "run: python tests/docs/test_techniques_page.py"


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
