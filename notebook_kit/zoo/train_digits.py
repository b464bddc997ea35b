"""How the digit beds were trained: seconds each, on one core."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from notebook_kit.data import VIEWS, digit_labelings, digits
from notebook_kit.models import MLP
from notebook_kit.training import fit
from notebook_kit.zoo import digits as beds
from notebook_kit.zoo import store

BATCH = 64


def _draw(x: Tensor, y: Tensor) -> Callable[[torch.Generator], tuple[Tensor, Tensor]]:
    def batches(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        rows = torch.randint(len(x), (BATCH,), generator=generator)
        return x[rows], y[rows]

    return batches


def _classify(model: nn.Module, batch: tuple[Tensor, Tensor], classes: slice = slice(None)) -> Tensor:
    return F.cross_entropy(model(batch[0])[:, classes], batch[1])


def _seeded(make: Callable[[], nn.Module], seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


def train_digit_labels(seed: int = 0) -> None:
    """Pretrain the encoder as a denoising autoencoder, then fine-tune one copy per labeling."""
    x, y = digits("train")
    encoder = _seeded(beds.label_encoder, seed)
    decoder = _seeded(lambda: nn.Sequential(nn.GELU(), nn.Linear(64, 64)), seed + 1)
    both = nn.ModuleDict({"encoder": encoder, "decoder": decoder})

    def denoise(model: nn.ModuleDict, batch: tuple[Tensor, Tensor]) -> Tensor:
        noisy = batch[0] + 0.1 * torch.randn_like(batch[0])
        return F.mse_loss(model["decoder"](model["encoder"].encode(noisy)), batch[0])

    fit(both, _draw(x, y), denoise, steps=300, seed=seed, desc="digit_labels: base")
    base = {key: tensor.clone() for key, tensor in encoder.state_dict().items()}
    store.write("digit_labels", "base", base)
    first = 0
    for i, (name, labeling) in enumerate(digit_labelings().items()):
        encoder.load_state_dict(base)
        loss = partial(_classify, classes=slice(first, first + labeling.n_classes))
        settings = {"steps": 150, "lr": 5e-4, "seed": seed + 1 + i, "desc": f"digit_labels: {name}"}
        fit(encoder, _draw(x, labeling(x, y)), loss, **settings)
        store.write("digit_labels", name, encoder.state_dict())
        first += labeling.n_classes


def train_digit_views(seed: int = 0) -> None:
    """Pretrain the encoder briefly on all views, then fine-tune one copy per view."""
    x, y = digits("train")
    everything = torch.cat([view(x) for view in VIEWS.values()]), y.repeat(len(VIEWS))
    encoder = _seeded(beds.view_encoder, seed)
    fit(encoder, _draw(*everything), _classify, steps=120, seed=seed, desc="digit_views: base")
    base = {key: tensor.clone() for key, tensor in encoder.state_dict().items()}
    store.write("digit_views", "base", base)
    for i, (name, view) in enumerate(VIEWS.items()):
        encoder.load_state_dict(base)
        fit(encoder, _draw(view(x), y), _classify, steps=150, lr=3e-4, seed=seed + 1 + i, desc=f"digit_views: {name}")
        store.write("digit_views", name, encoder.state_dict())


def train_digit_twins(width: int, seed: int = 0) -> None:
    """Train two networks of one width; first weights and batches both come from the seed, which differs."""
    for i, name in enumerate(("A", "B")):
        model = _seeded(lambda: MLP([64, width, width, 10], "relu"), seed + i)
        fit(model, _draw(*digits("train")), _classify, steps=1500, seed=seed + i, desc=f"digit_twins_{width}: {name}")
        store.write(f"digit_twins_{width}", name, model.state_dict())
