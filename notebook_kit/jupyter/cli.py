"""`notebook-kit`: the kit from the command line."""

import argparse
import sys
from pathlib import Path

from notebook_kit.claims import board
from notebook_kit.jupyter.recipe_help import RECIPES

START, END = "<!-- methods: written by `make readme` -->", "<!-- end of methods -->"


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="notebook-kit", description="Modular deep learning, live in Jupyter.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("doctor", help="what is wrong with this Jupyter, and how to mend it")
    commands.add_parser("catalog", help="all methods, as a Markdown table")
    cite = commands.add_parser("cite", help="BibTeX of a method's papers")
    cite.add_argument("name")
    claims = commands.add_parser("claims", help="the table of verdicts found in executed lessons")
    claims.add_argument("folder", type=Path)
    readme = commands.add_parser("readme", help="write the table of methods into a README")
    readme.add_argument("file", type=Path)
    merge = commands.add_parser("merge-experts", help="shrink a mixture of experts on disk, layer by layer")
    merge.add_argument("folder", type=Path, help="a transformers model: Mixtral, Qwen2/3-MoE, OLMoE")
    merge.add_argument("--method", default="m_smoe", help="m_smoe, average_experts, hc_smoe or sub_moe")
    merge.add_argument("--n-experts", type=int, default=4, help="experts that each layer stores afterwards")
    merge.add_argument("--calibration", type=Path, required=True, help="plain text that the routers are heard on")
    merge.add_argument("--out", type=Path, help="folder to write; default: beside the model")
    merge.add_argument("--similarity", default="router-logits", help="router-logits, router-weight or weight")
    merge.add_argument("--no-align", dest="align", action="store_false", help="average units as they lie")
    merge.add_argument(
        "--sketch", dest="align", action="store_const", const="sketch", help="align faster, on projected weights"
    )
    merge.add_argument(
        "--adaptive", action="store_true", help="layers may keep different numbers, --n-experts on average"
    )
    merge.add_argument("--tokens", type=int, default=16384, help="calibration tokens, at most")
    merge.add_argument("--length", type=int, default=512, help="tokens in a sequence")
    recipe = commands.add_parser(
        "merge",
        help="merge checkpoints on disk by any method, from a recipe (TOML, or mergekit's YAML)",
        description="Merge checkpoints on disk, one tensor in memory at a time.",
        epilog=RECIPES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    recipe.add_argument("recipe", type=Path, help="a .toml file, or mergekit's .yml or .yaml")
    recipe.add_argument("--out", type=Path, help="what to write; default: the recipe's `out`")
    recipe.add_argument("--dry-run", action="store_true", help="print the plan and its price, and write nothing")
    options = parser.parse_args(arguments)
    try:
        return globals()[f"_{options.command.replace('-', '_')}"](options)
    except (ValueError, OSError) as error:
        print(f"notebook-kit: {error}", file=sys.stderr)
        return 2


def methods_table() -> str:
    """The catalogue as Markdown."""
    from notebook_kit.catalog import methods, papers

    lines = ["| method | what it does | paper | hyperparameters |", "|---|---|---|---|"]
    for row, entry in zip(_rows(), methods().values(), strict=True):
        links = [
            f"[{papers()[slug]['year']}](https://arxiv.org/abs/{papers()[slug]['arxiv']})"
            if papers()[slug].get("arxiv")
            else str(papers()[slug]["year"])
            for slug in entry.papers
        ]
        hyper = ", ".join(f"`{name}`" for name in row["hyperparameters"].split(", ") if name)
        lines.append(f"| `{row['family']}.{row['name']}` | {row['summary']} | {', '.join(links)} | {hyper} |")
    return "\n".join(lines)


def _rows() -> list[dict]:
    from notebook_kit.catalog import catalog

    return catalog().to_dict("records")


def _doctor(options) -> int:
    from notebook_kit.jupyter.doctor import doctor

    report = doctor()
    print(report)
    return 0 if report.well else 1


def _catalog(options) -> int:
    print(methods_table())
    return 0


def _cite(options) -> int:
    from notebook_kit.catalog import cite

    print(cite(options.name))
    return 0


def _claims(options) -> int:
    if not options.folder.is_dir():
        raise ValueError(f"no folder {options.folder}")
    print(board(sorted(options.folder.glob("[0-9][0-9]_*.ipynb"))), end="")
    return 0


def _merge(options) -> int:
    from notebook_kit.jupyter.merge import merge_recipe

    done = merge_recipe(options.recipe, out=options.out, dry_run=options.dry_run)
    print(done)
    return 2 if getattr(done, "problems", ()) else 0


def _merge_experts(options) -> int:
    from notebook_kit.jupyter.merge_experts import PAGE, merge_experts

    names = ("out", "tokens", "length", "method", "n_experts", "align", "adaptive", "similarity")
    chosen = {name: getattr(options, name) for name in names}
    out = merge_experts(options.folder, options.calibration, **chosen)
    print(f"{out}\n{out / PAGE}")
    return 0


def _readme(options) -> int:
    text = options.file.read_text("utf-8")
    if START not in text or END not in text:
        raise ValueError(f"{options.file} lacks the marks {START!r} and {END!r}")
    before, rest = text.split(START)
    after = rest.split(END)[1]
    options.file.write_text(f"{before}{START}\n\n{methods_table()}\n\n{END}{after}", "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
