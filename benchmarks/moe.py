"""MoE with TopK against transformers' Mixtral block, same weights, one thread, forward pass without gradients.

    python benchmarks/moe.py

Prints CPU milliseconds (median of alternating runs) and the ratio to the peer's faster experts implementation.
"""

import statistics
import time

import torch
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

from notebook_kit.mixtures import MoE

#        d_model, d_ff, experts, k
SHAPES = [(256, 512, 8, 2), (256, 128, 64, 8), (256, 64, 256, 8)]
TOKENS = [16, 128, 512, 2048]
RUNS = 31


def block(d_model: int, d_ff: int, n_experts: int, k: int) -> MixtralSparseMoeBlock:
    """A Mixtral block with random weights."""
    config = MixtralConfig(
        hidden_size=d_model, intermediate_size=d_ff, num_local_experts=n_experts, num_experts_per_tok=k
    )
    peer = MixtralSparseMoeBlock(config).eval()
    for parameter in peer.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return peer


def alternate(functions: dict, runs: int = RUNS) -> dict[str, float]:
    """Median CPU time of each in milliseconds; they take turns, so that a busy machine harms all alike."""
    times = {name: [] for name in functions}
    for run in range(runs + 3):
        for name, function in functions.items():
            started = time.process_time()
            function()
            if run >= 3:
                times[name].append(time.process_time() - started)
    return {name: 1e3 * statistics.median(values) for name, values in times.items()}


@torch.no_grad()
def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(
        f"{'d_model d_ff experts k':>24} {'tokens':>6} "
        f"{'eager':>8} {'grouped':>8} {'ours':>8} {'ratio':>6} {'error':>8}"
    )
    for shape in SHAPES:
        peer = block(*shape)
        ours = MoE.from_transformers(peer).eval()
        for n_tokens in TOKENS:
            x = torch.randn(1, n_tokens, shape[0])

            def theirs(implementation: str, x=x, peer=peer):
                peer.experts.config._experts_implementation = implementation
                return peer(x)

            error = (ours(x) - theirs("eager")).abs().max().item()
            ms = alternate(
                {
                    "eager": lambda: theirs("eager"),
                    "grouped": lambda: theirs("grouped_mm"),
                    "ours": lambda x=x, ours=ours: ours(x),
                }
            )
            ratio = ms["ours"] / min(ms["eager"], ms["grouped"])
            row = f"{ms['eager']:8.2f} {ms['grouped']:8.2f} {ms['ours']:8.2f} {ratio:6.2f} {error:8.1e}"
            print(f"{' '.join(map(str, shape)):>24} {n_tokens:>6} {row}")


if __name__ == "__main__":
    main()
