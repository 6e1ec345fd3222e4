"""Write checks.md, the table of the audit's checks, from their code: python docs/checks.py"""

from pathlib import Path

from surestep.auditing import CHECKS

PAGE = Path(__file__).with_name("checks.md")
HEAD = """# The twenty checks

What `surestep audit` looks at for signs of masked gradients. A flag is a reason to look harder:
further attacks follow, and the verdict rests on what all attacks find. Some flags also count in
the verdict: they can withhold `robust`, or tell masking from plain weakness
([audit.md](audit.md)). This page is written by `python docs/checks.py`.

| | check | flags when | why | source |
|---|---|---|---|---|
"""


def page() -> str:
    """Return the page as Markdown."""
    rows = ((str(c.number), c.title, c.threshold, c.reason, c.source) for c in CHECKS)
    return HEAD + "".join(f"| {' | '.join(row)} |\n" for row in rows)


if __name__ == "__main__":
    PAGE.write_text(page(), "utf-8")
