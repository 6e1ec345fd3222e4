"""``surestep evaluate``."""

from __future__ import annotations

import click

from surestep.cli._options import check_writable, json_option, names, write_json
from surestep.cli._show import evaluation_table, progress_bar

_POSITIVE = click.IntRange(min=1)


@click.command(short_help="Measure a run's accuracy clean and under attack.")
@click.argument("run", metavar="RUN")
@click.option(
    "--attacks",
    default="fgsm,pgd-100,pgd-100-margin",
    show_default=True,
    metavar="A,B,...",
    help="fgsm, r-fgsm, i-fgsm-K, mi-fgsm-K, noise-K, pgd-K[xRESTARTS][-ce|-margin|-dlr].",
)
@click.option("--n", type=_POSITIVE, help="Only the first N test images. [default: all]")
@click.option("--eps", metavar="NUMBER", help="Radius, 0.3 or 8/255. [default: the run's]")
@click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    default=500,
    show_default=True,
    help="Of the attacks.",
)
@click.option(
    "--seed",
    type=click.IntRange(0, 2**32 - 1),
    default=0,
    show_default=True,
    help="Of the random starts.",
)
@click.option("--device", metavar="TEXT", help="cpu, cuda, cuda:1, mps; by default the best.")
@json_option
def evaluate(
    run: str,
    attacks: str,
    n: int | None,
    eps: str | None,
    batch_size: int,
    seed: int,
    device: str | None,
    json_file: str | None,
) -> None:
    """Measure the accuracy of the run folder RUN on its test images, clean and under attack.

    The worst case counts, per image, the strongest of all attacks; it is the number to quote.

    \b
    Examples:
      surestep evaluate runs/one
      surestep evaluate runs/one --attacks pgd-50x10,pgd-50x10-margin --n 1000 --json result.json
    """
    check_writable(json_file)

    import surestep
    from surestep import runs
    from surestep.config import RunConfig, parse

    loaded = runs.load(run, device)
    threat = loaded.threat
    if eps is not None:
        changed = parse(RunConfig, {**loaded.config.model_dump(), "eps": eps})
        threat = runs.build_threat(changed)
    with progress_bar("attacking") as progress:
        result = surestep.evaluate(
            loaded.model,
            runs.load_data(loaded.config, "test"),
            threat,
            names(attacks),
            batch_size=batch_size,
            n=n,
            seed=seed,
            progress=progress,
        )
    if json_file != "-":
        evaluation_table({run: result})
    write_json({"run": run, "seed": seed, **result.to_dict()}, json_file)
