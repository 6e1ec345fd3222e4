"""Write settings.md, the settings of training, from their code: python docs/settings.py"""

from pathlib import Path

from surestep.config import FitSettings, RunConfig

PAGE = Path(__file__).with_name("settings.md")
HEAD = """# Settings of training

The first table has the keyword arguments of `surestep.fit`, the second what a run of
`surestep train` has besides. On the command line a name has dashes for underscores and begins with
`--`; `config.yaml` in a run folder has the names as they are here. A method's preset changes the
defaults (`surestep methods NAME`). This page is written by `python docs/settings.py`.
"""


def page() -> str:
    """Return the page as Markdown."""
    every = RunConfig.model_fields
    own = {k: v for k, v in every.items() if k not in FitSettings.model_fields}
    parts = [HEAD]
    for title, fields in (("Of fit", FitSettings.model_fields), ("Of a run", own)):
        parts.append(f"\n## {title}\n\n| setting | default | meaning |\n|---|---|---|\n")
        for name, field in fields.items():
            default = "required" if field.is_required() else _written(field.get_default())
            parts.append(f"| `{name}` | {default} | {field.description} |\n")
    return "".join(parts)


def _written(value: object) -> str:
    if value in (None, (), {}):
        return ""
    return f"`{', '.join(map(str, value)) if isinstance(value, tuple) else value}`"


if __name__ == "__main__":
    PAGE.write_text(page(), "utf-8")
