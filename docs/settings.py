"""Write settings.md, the settings of training, from their code: python docs/settings.py"""

from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from surestep.config import FitSettings, RunConfig

PAGE = Path(__file__).with_name("settings.md")
HEAD = """# Settings of training

The first table has the settings that `surestep.fit` and `surestep train` share, the second those of
`surestep train` alone. `fit` also takes `out`, `validation`, `resume`, `overwrite`, `quiet`,
`device`, `workers`, `steps_per_epoch`, `describe` and `on_epoch` (`help(surestep.fit)`). On the
command line a name has dashes for underscores and begins with `--`, `params` is
`--param NAME=VALUE`, and `mean_sparse` is not an option; `config.yaml` in a run folder has the
names as they are here. A method's preset changes the defaults (`surestep methods NAME`). This page
is written by `python docs/settings.py`.
"""


def page() -> str:
    """Return the page as Markdown."""
    every = RunConfig.model_fields
    own = {k: v for k, v in every.items() if k not in FitSettings.model_fields}
    parts = [HEAD]
    titles = ("Of `fit` and `surestep train`", "Of `surestep train` alone")
    for title, fields in zip(titles, (FitSettings.model_fields, own), strict=True):
        parts.append(f"\n## {title}\n\n| setting | default | meaning |\n|---|---|---|\n")
        for name, field in fields.items():
            default = "required" if field.is_required() else _written(field.get_default())
            meaning = f"{field.description}{_choices(field.annotation)}"
            parts.append(f"| `{name}` | {default} | {meaning} |\n")
    return "".join(parts)


def _written(value: object) -> str:
    if value in (None, (), {}):
        return ""
    return f"`{', '.join(map(str, value)) if isinstance(value, tuple) else value}`"


def _choices(annotation: Any) -> str:
    """Return the values that a setting can have, if these are names from a list."""
    if get_origin(annotation) is not Literal:
        return ""
    return f" (`{'`, `'.join(get_args(annotation))}`)"


if __name__ == "__main__":
    PAGE.write_text(page(), "utf-8")
