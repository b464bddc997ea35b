"""`notebook-kit merge-experts`: shrink a checkpoint on disk, and a page that shows what was joined."""

import base64
import html
from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor

from notebook_kit.expert_merging.files import MergedLayer, merge_expert_files
from notebook_kit.figures.experts import experts_similarity_figure, usage_figure
from notebook_kit.figures.static import to_png

PAGE = "merge_report.html"


def merge_experts(
    folder: Path,
    calibration: Path,
    *,
    out: Path | None = None,
    tokens: int = 16384,
    length: int = 512,
    progress: bool = True,
    **choices,
) -> Path:
    """Merge the experts of a model folder, calibrated on a text file, and write a report beside the weights.

    Args:
        folder: of the model.
        calibration: plain text, UTF-8.
        out: folder to write; default: beside the model, its name with method and number of experts.
        tokens: of the text that are used, at most.
        length: of a sequence, in tokens.
        progress: show a bar.
        choices: method, n_experts, align, adaptive, similarity of `merge_expert_files`.

    Returns:
        The folder written; the report is merge_report.html in it.

    Raises:
        ValueError, OSError: as `merge_expert_files`; a text shorter than two tokens, no tokenizer.
    """
    folder = Path(folder)
    method, n = choices.get("method", "m_smoe"), choices.get("n_experts", 4)
    out = folder.resolve().with_name(f"{folder.resolve().name}-{method}-{n}") if out is None else Path(out)
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}")
    ids = calibration_ids(folder, Path(calibration), tokens, length)
    about = {
        "model": folder.name,
        "method": method,
        "experts per layer afterwards": f"{n} on average" if choices.get("adaptive") else n,
    }
    about |= {"calibration": f"{Path(calibration).name}, {ids.numel():,} tokens"}

    def report(target: Path, layers: list[MergedLayer]) -> None:
        (target / PAGE).write_text(report_page(about, layers), "utf-8")

    merge_expert_files(folder, out, ids, progress=progress, finish=report, **choices)
    return out


def calibration_ids(folder: Path, text: Path, tokens: int, length: int) -> Int[Tensor, "n length"]:
    """Cut a text into sequences of token ids; the rest that fills no sequence is left out.

    Args:
        folder: of the model, with its tokenizer; without one, ids are bytes if the vocabulary has 256.
        text: plain text.
        tokens: at most.
        length: of a sequence; a shorter text is one sequence.

    Raises:
        ValueError: no tokenizer and another vocabulary than bytes, a text that is not UTF-8, or too short a text.
    """
    import transformers

    if tokens < 2 or length < 2:
        raise ValueError(f"tokens and length must be at least 2, got {tokens} and {length}")
    raw = text.read_bytes()
    if any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")):
        try:
            written = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{text} is not UTF-8 text: {error}") from None
        found = transformers.AutoTokenizer.from_pretrained(folder)(written)["input_ids"]
    else:
        vocabulary = transformers.AutoConfig.from_pretrained(folder).vocab_size
        if vocabulary != 256:
            raise ValueError(f"{folder} has no tokenizer, and its {vocabulary} token ids are not bytes")
        found = list(raw)
    ids = torch.tensor(found[:tokens], dtype=torch.long)
    if len(ids) < 2:
        raise ValueError(f"{text} gives {len(ids)} tokens; calibration needs at least 2, and better some thousands")
    length = min(length, len(ids))
    return ids[: len(ids) // length * length].view(-1, length)


def report_page(about: dict[str, object], layers: Sequence[MergedLayer]) -> str:
    """Write what was joined as one HTML page that needs nothing else: a table, and two pictures a layer.

    Args:
        about: heading to value, shown on top.
        layers: from `merge_expert_files`.
    """
    before, after = (sum(layer.bytes[i] for layer in layers) for i in (0, 1))
    about = about | {"bytes of experts": f"{before:,} before, {after:,} after ({after / max(before, 1):.0%})"}
    top = "".join(f"<tr><th>{_text(name)}</th><td>{_text(value)}</td></tr>" for name, value in about.items())
    body = []
    for layer in layers:
        groups = layer.plan.groups
        rows = "".join(
            f"<tr><td>{number}</td><td>{', '.join(map(str, group))}</td>"
            f"<td>{', '.join(f'{weight:.2f}' for weight in weights)}</td></tr>"
            for number, (group, weights) in enumerate(zip(groups, layer.plan.weights, strict=True))
        )
        pictures = (
            (usage_figure(layer.usage.numpy(), groups, title="How often each expert is picked"), "usage"),
            (experts_similarity_figure(layer.similarity.numpy(), groups, title="How alike they are"), "similarity"),
        )
        images = "".join(
            f'<img alt="{kind} of {_text(layer.name)}" src="data:image/png;base64,'
            f'{base64.b64encode(to_png(figure, width=520)).decode()}">'
            for figure, kind in pictures
        )
        body.append(
            f"<h2>{_text(layer.name)}: {len(layer.usage)} experts become {len(groups)}</h2><div>{images}</div>"
            f"<details><summary>groups and weights</summary><table><tr><th>group</th><th>experts, the leader first</th>"
            f"<th>weights</th></tr>{rows}</table></details>"
        )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Merged experts</title><style>'
        "body{font:15px/1.5 system-ui,sans-serif;max-width:1100px;margin:2em auto;padding:0 1em;color:#222}"
        "th{text-align:left;padding-right:1.5em;font-weight:600}td{padding-right:1.5em}img{max-width:49%}"
        f"h2{{font-size:1.1em;margin-top:2em}}</style></head><body><h1>Merged experts</h1><table>{top}</table>"
        f"{''.join(body)}</body></html>\n"
    )


def _text(value: object) -> str:
    return html.escape(str(value))
