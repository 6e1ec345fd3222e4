"""Write methods.md, the table of all methods, from the registry: python docs/methods.py"""

from pathlib import Path

from surestep import methods

PAGE = Path(__file__).with_name("methods.md")
CARDS = "../src/surestep/methods/cards"
HEAD = """# Methods

All that `surestep train --method NAME` takes, the cheapest step first; `surestep methods NAME`
shows the card that a name here leads to: what it is for, hyperparameters, formulas, known
failures. Passes are forward, input-gradient and weight-gradient passes per image of a step at
batch size 128, of about equal work; standard training takes 3. A test compares each method's step
with a second implementation, written separately from the papers' formulas
(`tests/methods/test_formulas.py`). How they
compare under one protocol: [leaderboard.md](leaderboard.md). This page is written by
`python docs/methods.py`.

| method | passes | what a step does | source | presets |
|---|---|---|---|---|
"""


def page() -> str:
    """Return the page as Markdown."""
    lines = []
    for row in methods.overview():
        name, presets = row["name"], ", ".join(f"`{preset}`" for preset in row["presets"])
        passes = f"{row['passes']:.3g}"
        cells = (f"[{name}]({CARDS}/{name}.md)", passes, row["summary"], row["paper"], presets)
        lines.append(f"| {' | '.join(cells)} |\n")
    return HEAD + "".join(lines)


if __name__ == "__main__":
    PAGE.write_text(page(), "utf-8")
