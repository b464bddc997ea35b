"""Merge the experts of a checkpoint on disk: never as much as one layer's experts in memory.

First the calibration text runs through the model: each decoder layer is read when its turn comes, and its experts one
at a time, each for the tokens that the router sends it. When all layers are heard the plan is made. Then, layer by
layer, experts are read again, one at a time, aligned and added up, and a group is written before the next one begins.

Memory, beside embeddings and hidden states: attention and one expert; while merging, four experts in float32 (the sum,
the leader, a member before and after) and 20 f² bytes that the assignment needs; where outputs are compared, those of
all experts on f tokens, which is a third of a layer, twice.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import torch
from jaxtyping import Float, Int
from torch import Tensor

from notebook_kit.checkpoints import Checkpoint, atomic
from notebook_kit.expert_merging.align_experts import Aligner, average_group
from notebook_kit.expert_merging.clusters import agglomerate, k_means, led_by_usage, share_budget
from notebook_kit.expert_merging.disk import DiskLayer, disk_layers, empty_model, known_config, run_from_disk
from notebook_kit.expert_merging.folder_writer import FolderWriter, finish_folder
from notebook_kit.expert_merging.m_smoe import SIMILARITIES, expert_similarity
from notebook_kit.expert_merging.mapped import ARCHITECTURES
from notebook_kit.expert_merging.outputs import output_statistics
from notebook_kit.expert_merging.plan import (
    LayerPlan,
    check_n_experts,
    dominant_experts,
    group_by_similarity,
    merge_weights_of,
)
from notebook_kit.hyperparameters import Choice, Range, hyperparameters, validate

FILE_METHODS = ("m_smoe", "average_experts", "hc_smoe", "sub_moe")


@dataclass(frozen=True)
class MergedLayer:
    """What became of one layer: usage [N], similarity [N, N], the plan, and the bytes of its experts."""

    name: str
    usage: Float[Tensor, " experts"] = field(repr=False)
    similarity: Float[Tensor, "experts experts"] = field(repr=False)
    plan: LayerPlan
    bytes: tuple[int, int]


@torch.no_grad()
def merge_expert_files(
    folder: str | Path,
    out: str | Path,
    ids: Int[Tensor, "n length"],
    *,
    method: Annotated[str, Choice(*FILE_METHODS)] = "m_smoe",
    n_experts: Annotated[int, Range(1, 512)] = 4,
    align: Annotated[bool | str, Choice(True, False, "weight", "sketch")] = True,
    adaptive: bool = False,
    similarity: Annotated[str, Choice(*SIMILARITIES)] = "router-logits",
    chunk: Annotated[int, Range(1, 1024, log=True)] = 8,
    progress: bool = True,
    finish=None,
) -> list[MergedLayer]:
    """Merge a Mixtral, Qwen2/3-MoE or OLMoE folder into another, the same as the method does in memory.

    Args:
        folder: config.json and safetensors, sharded or not.
        out: a folder that does not exist yet; appears when complete, with a shard for each layer.
        ids: calibration text, token ids.
        method: which experts join: as `m_smoe`, `average_experts`, `hc_smoe` or `sub_moe` (whole matrices).
        n_experts: experts that each layer stores afterwards.
        align: bring members into the dominant expert's order first (not for average_experts): True or "weight",
            "sketch" (faster, a little worse, see `Aligner`), False.
        adaptive: let layers keep different numbers, n_experts on average (not for hc_smoe), as the method does.
        similarity: what groups experts, for m_smoe and average_experts.
        chunk: sequences that run through attention at a time; hidden states of all are kept.
        progress: show a bar.
        finish: called with (hidden folder, layers) before the result takes its name: may add files.

    Returns:
        One entry a routed layer.

    Raises:
        ValueError: an architecture that is not known on disk, a quantised checkpoint, too few experts or no text;
            adaptive with hc_smoe.
        FileExistsError: `out` is there already.
        BadCheckpoint: as `Checkpoint`.
    """
    schema = hyperparameters(merge_expert_files)
    choices = {"method": method, "n_experts": n_experts, "align": align, "similarity": similarity, "chunk": chunk}
    validate(schema, choices)
    if adaptive and method == "hc_smoe":
        raise ValueError(
            "adaptive goes with m_smoe, average_experts and sub_moe: hc_smoe has no rule that compares layers"
        )
    folder, out = Path(folder), Path(out)
    if out.exists():
        raise FileExistsError(f"{out} exists; give a folder that does not")
    if not out.absolute().parent.is_dir():
        raise FileNotFoundError(f"no folder {out.absolute().parent} to write {out.name} in")
    if ids.numel() == 0:
        raise ValueError("the calibration text is empty")
    config, checkpoint = known_config(folder), Checkpoint(folder)
    check_n_experts(n_experts, {"": torch.empty(getattr(config, ARCHITECTURES[config.model_type][1]))}, method)
    model = empty_model(config, checkpoint)
    layers = disk_layers(model, checkpoint)
    from tqdm.auto import tqdm

    with (
        atomic(out) as partial,
        tqdm(total=2 * len(model.layers), desc=f"merging with {method}", unit="layer", disable=not progress) as bar,
    ):
        partial.mkdir()
        evidence: dict[int, _Evidence] = {}

        def heard(number: int, logits: Tensor, chosen: Tensor, x: Tensor) -> None:
            evidence[number] = _evidence(layers[number], logits, chosen, x, method, similarity)

        run_from_disk(model, layers, ids, heard, chunk=chunk, step=bar.update)
        plans = _plans(evidence, method, n_experts, adaptive)
        how = {True: "weight", False: "none"}.get(align, align)
        combine = average_group(Aligner("none" if method == "average_experts" else how))
        writer, merged = FolderWriter(checkpoint, config, partial), []
        for number in range(len(model.layers)):
            if number not in layers:
                writer.write(number, {})
            else:
                size = writer.merge(layers[number], number, plans[number], combine)
                seen = evidence[number]
                merged.append(MergedLayer(layers[number].name, seen.usage, seen.similarity, plans[number], size))
            bar.update()
        writer.write_rest(len(model.layers))
        finish_folder(folder, partial, config, writer)
        if finish is not None:
            finish(partial, merged)
    return merged


@dataclass(frozen=True)
class _Evidence:
    """What a layer's plan needs: usage [N], similarity [N, N], and what is clustered, mean outputs or cosines."""

    usage: Float[Tensor, " experts"]
    similarity: Float[Tensor, "experts experts"]
    points: Float[Tensor, "experts n"] | None = None


def _evidence(layer: DiskLayer, logits: Tensor, chosen: Tensor, x: Tensor, method: str, similarity: str) -> _Evidence:
    usage = torch.bincount(chosen.reshape(-1), minlength=logits.shape[1]).float()
    usage = usage / usage.sum()
    if method in ("m_smoe", "average_experts"):
        return _Evidence(usage, expert_similarity(layer, logits.float(), similarity))
    cosine, means = output_statistics(layer, x, chunk=layer.width)
    return _Evidence(usage, (1 + cosine) / 2, means if method == "hc_smoe" else cosine)


def _plans(evidence: Mapping[int, _Evidence], method: str, n: int, adaptive: bool) -> dict[int, LayerPlan]:
    usage = {number: seen.usage for number, seen in evidence.items()}
    if method in ("m_smoe", "average_experts"):
        leaders = dominant_experts(usage, n, adaptive=adaptive)
        groups = {number: group_by_similarity(leaders[number], seen.similarity) for number, seen in evidence.items()}
    else:
        counts = dict.fromkeys(evidence, n)
        if adaptive:
            counts = share_budget({number: seen.points for number, seen in evidence.items()}, n)
        groups = {
            number: led_by_usage(
                (agglomerate if method == "hc_smoe" else k_means)(seen.points, counts[number]), seen.usage
            )
            for number, seen in evidence.items()
        }
    rule = "uniform" if method == "average_experts" else "frequency"
    return {number: LayerPlan(found, merge_weights_of(usage[number], found, rule)) for number, found in groups.items()}
