"""MOS: classes arrive task by task; each task trains a copy of one small adapter, held near its predecessors.

    merge, after every optimiser step of task t >= 1:   A_t <- (1 − m) A_t + m · (1/t) Σ_{j<t} A_j
    loss:   CE(g(φ(x; A_t)) over the classes of task t)  +  λ · CE(M Mᵀ / 0.8, row i belongs to row i)

φ(x; A) [d] features of the frozen backbone under adapter A; g one linear head over all classes seen; M [classes seen
before + batch, d] unit rows: the means of earlier classes, then the batch, so that features keep clear of both.
After its task A_t is stored, and every class leaves a Gaussian of its features. From draws of these the head alone is
trained over all classes seen (classifier alignment). Prototypes are class means under the FIRST adapter. No image is
kept. Answers come from `refine_retrieval`.
Paper: Sun et al. 2024 (2412.09441, AAAI 2025); official code sun-hailong/AAAI25-MOS, `models/mos.py`.
Where this differs: the official code repeats the merge in every forward pass, evaluation included, so that stored
adapters creep towards the mean whenever they are used; here it is done once a step and never at test. Rows of M have
length one (raw dot products swamp a network this small). Old rows of the head are not in the optimiser while a task
trains; in the official code weight decay still shrinks them. Limits: an image must ask up to T adapters.
"""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from notebook_kit.catalog import method
from notebook_kit.expert_merging.adapter_retrieval import Retrieval, refine_retrieval
from notebook_kit.expert_merging.class_gaussians import ClassGaussian, align_head, fit_gaussian
from notebook_kit.expert_merging.surgery_file import take_up, weights_of
from notebook_kit.hyperparameters import Choice, Range
from notebook_kit.weights import load, save


def cls_token(model: nn.Module, x: Tensor) -> Float[Tensor, "n d"]:
    """Read the features of a transformers vision model: the class token after the last norm."""
    return model(x).last_hidden_state[:, 0]


def merge_with_earlier(
    adapter: Mapping[str, Tensor], earlier: Mapping[str, Tensor], adapter_momentum: float
) -> dict[str, Tensor]:
    """Pull an adapter towards the mean of the earlier ones: (1 − m) A + m Ā."""
    return {name: tensor.lerp(earlier[name], adapter_momentum) for name, tensor in adapter.items()}


def orthogonality_loss(rows: Float[Tensor, "n d"], temperature: float = 0.8) -> Float[Tensor, ""]:
    """Ask every row to be most like itself: CE(M Mᵀ / temperature, row i belongs to row i), M of unit rows."""
    unit = F.normalize(rows, dim=1)
    return F.cross_entropy(unit @ unit.T / temperature, torch.arange(len(rows), device=rows.device))


@method(family="expert_merging", paper="mos-model-surgery")
class ModelSurgery:
    """Learn classes as they arrive: one adapter a task, merged with the earlier ones, chosen anew for every image.

    Args:
        model: the backbone with adapters in it; what requires a gradient is the adapter, all else stays frozen
            (`insert_mlp_adapters(model)`, or `notebook_kit.adapters.attach`). Trained in place, task after task.
        features: (model, images) -> Float[n, d].
        adapter_momentum: m, the pull towards the mean of earlier adapters at every step; 0 merges nothing.
        orthogonality: λ.
        epochs: passes over a task's images.
        lr: of the adapter; the head learns at a tenth of it. SGD with momentum 0.9, cosine to 0.
        weight_decay: of both.
        batch_size: images a step.
        alignment_epochs: passes of classifier alignment; 0 leaves it out.
        statistics: what a class leaves behind: a full covariance, only variances, or k-means centroids.
        seed: of batches, dropout, new head rows and draws.

    Raises:
        ValueError: nothing in the model requires a gradient; later, as `learn`.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        features: Callable[[nn.Module, Tensor], Tensor] = cls_token,
        adapter_momentum: Annotated[float, Range(0, 1)] = 0.1,
        orthogonality: Annotated[float, Range(0, 10)] = 0.1,
        epochs: Annotated[int, Range(1, 100)] = 10,
        lr: Annotated[float, Range(1e-5, 1, log=True)] = 0.05,
        weight_decay: Annotated[float, Range(0, 0.1)] = 5e-4,
        batch_size: Annotated[int, Range(1, 1024, log=True)] = 32,
        alignment_epochs: Annotated[int, Range(0, 200)] = 30,
        statistics: Annotated[str, Choice("covariance", "variance", "centroids")] = "covariance",
        seed: int = 0,
    ):
        self.model, self.features, self.seed = model, features, seed
        self.adapter_momentum, self.orthogonality, self.statistics = adapter_momentum, orthogonality, statistics
        self.epochs, self.lr, self.weight_decay, self.batch_size = epochs, lr, weight_decay, batch_size
        self.alignment_epochs = alignment_epochs
        self.trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not self.trained:
            raise ValueError("nothing in the model requires a gradient: put adapters in first (ModelSurgery)")
        self.classes: list[int] = []  # labels, in the order of arrival: column c of all logits is classes[c]
        self.tasks: list[int] = []  # the task each came with
        self.adapters: list[dict[str, Tensor]] = []
        self.gaussians: list[ClassGaussian] = []
        self.prototypes = torch.empty(0)
        self.head: tuple[Tensor, Tensor] | None = None

    # ------------------------------------------------------------ learning
    def learn(self, x: Float[Tensor, "n ..."], y: Int[Tensor, " n"]) -> list[float]:
        """Learn the classes of one task, and forget its images.

        Args:
            x: images of new classes, at least two of each.
            y: labels, any integers.

        Returns:
            The loss of every step.

        Raises:
            ValueError: no images, a class that was learnt before, a class with one image, or a loss that is not finite.
        """
        new = self._check_task(x, y)
        t, seen = len(self.adapters), len(self.classes)
        columns = torch.tensor([new.index(label) for label in y.tolist()], device=y.device)
        before = self.copy_adapter()
        try:
            with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
                torch.manual_seed(self.seed * 10_007 + t)
                losses, rows = self._train(x, columns, len(new), t)
        except BaseException:
            self.set_adapter(before)
            raise
        self.adapters.append(self.copy_adapter())
        self.classes += new
        self.tasks += [t] * len(new)
        old = self.head or tuple(part[:0] for part in rows)
        self.head = tuple(torch.cat(pair) for pair in zip(old, rows, strict=True))
        own, first = self.read(x, adapter=t), self.read(x, adapter=0)
        for c in range(len(new)):
            self.gaussians.append(fit_gaussian(own[columns == c], self.statistics, seed=self.seed))
        means = torch.stack([first[columns == c].mean(0) for c in range(len(new))])
        self.prototypes = torch.cat([self.prototypes, means]) if seen else means
        if t:
            generator = torch.Generator().manual_seed(self.seed * 10_007 + t)
            how = {"epochs": self.alignment_epochs, "draws": 5 * self.batch_size, "generator": generator}
            self.head = align_head(*self.head, self.gaussians, **how)
        return losses

    def _train(self, x: Tensor, columns: Tensor, n_new: int, t: int) -> tuple[list[float], tuple[Tensor, Tensor]]:
        """Train A_t from A_{t−1} and the new rows of the head; old rows and the backbone are not in the optimiser."""
        with torch.no_grad():
            like = self.features(self.model.eval(), x[:1])
        rows = nn.Linear(like.shape[1], n_new).to(like)
        old_means = torch.stack([g.centre for g in self.gaussians]) if self.gaussians else like[:0]
        earlier = self._mean_adapter() if t and self.adapter_momentum else None
        groups = [{"params": list(self.trained.values())}, {"params": list(rows.parameters()), "lr": self.lr / 10}]
        optimizer = torch.optim.SGD(groups, lr=self.lr, momentum=0.9, weight_decay=self.weight_decay)
        total = self.epochs * math.ceil(len(x) / self.batch_size)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total)
        losses = []
        self.model.train()
        for module in self.model.modules():
            if isinstance(module, nn.modules.batchnorm._NormBase):
                module.eval()  # running statistics belong to the frozen backbone
        for _ in range(self.epochs):
            for batch in torch.randperm(len(x)).split(self.batch_size):
                f = self.features(self.model, x[batch])
                loss = F.cross_entropy(rows(f), columns[batch])
                if self.orthogonality:
                    loss = loss + self.orthogonality * orthogonality_loss(torch.cat([old_means, f]))
                if not torch.isfinite(loss):
                    raise ValueError(f"the loss of task {t} is {loss.item()}: lower lr={self.lr:g} (ModelSurgery)")
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                if earlier is not None:
                    self.set_adapter(merge_with_earlier(self.copy_adapter(), earlier, self.adapter_momentum))
                losses.append(loss.item())
        self.model.eval()
        return losses, (rows.weight.detach(), rows.bias.detach())

    # ------------------------------------------------------------ answering
    @torch.no_grad()
    def read(self, x: Float[Tensor, "n ..."], *, adapter: int) -> Float[Tensor, "n d"]:
        """Compute the features under one stored adapter.

        Raises:
            ValueError: there is no such adapter.
        """
        if not 0 <= adapter < len(self.adapters):
            raise ValueError(f"adapter must be one of {len(self.adapters)} learnt so far, got {adapter} (ModelSurgery)")
        last = self.copy_adapter()
        try:
            self.set_adapter(self.adapters[adapter])
            return self.features(self.model.eval(), x)
        finally:
            self.set_adapter(last)

    def logits(self, x: Float[Tensor, "n ..."]) -> tuple[Float[Tensor, "tasks n classes"], Float[Tensor, "n classes"]]:
        """Compute what retrieval works on: the head's logits under every adapter, and the prototypes' cosines.

        Raises:
            ValueError: nothing was learnt yet.
        """
        if not self.adapters:
            raise ValueError("nothing was learnt yet, so there is no adapter to retrieve: call `learn` first")
        f = torch.stack([self.read(x, adapter=j) for j in range(len(self.adapters))])
        return F.linear(f, *self.head), F.normalize(f[0], dim=1) @ F.normalize(self.prototypes, dim=1).T

    def retrieve(self, x: Float[Tensor, "n ..."], *, rounds: int = 4, ensemble: bool = True) -> Retrieval:
        """Choose an adapter for every image and answer with it; arguments as `refine_retrieval`."""
        return refine_retrieval(
            *self.logits(x), torch.tensor(self.tasks, device=x.device), rounds=rounds, ensemble=ensemble
        )

    def predict(self, x: Float[Tensor, "n ..."], *, rounds: int = 4, ensemble: bool = True) -> Int[Tensor, " n"]:
        """Name the class of every image, among all classes seen; arguments as `refine_retrieval`."""
        return torch.tensor(self.classes, device=x.device)[self.retrieve(x, rounds=rounds, ensemble=ensemble).column]

    def score(
        self, x: Float[Tensor, "n ..."], y: Int[Tensor, " n"], *, rounds: int = 4, ensemble: bool = True
    ) -> float:
        """Measure the accuracy among all classes seen; arguments as `refine_retrieval`.

        Raises:
            ValueError: nothing was learnt yet, there are no images, or a label is of no class seen so far.
        """
        unknown = sorted(set(y.tolist()) - set(self.classes))
        if self.classes and unknown:
            raise ValueError(f"class {unknown[0]} was not learnt yet, only {self.classes} (ModelSurgery.score)")
        if len(y) == 0:
            raise ValueError("score needs at least one image, got none (ModelSurgery.score)")
        return (self.predict(x, rounds=rounds, ensemble=ensemble) == y).float().mean().item()

    # ------------------------------------------------------------ keeping
    def weights(self) -> dict[str, Tensor]:
        """All that was learnt, as tensors: adapters, head, prototypes, Gaussians, classes; not the backbone."""
        return weights_of(self)

    def save(self, path: str | Path) -> Path:
        """Write `weights()` as a safetensors file."""
        return save(self.weights(), path)

    def load(self, path: str | Path) -> None:
        """Take up what `save` wrote, in place of what was learnt here, and be ready to learn on.

        Raises:
            ValueError: the file was made on another backbone or with other adapters, lacks a part, or holds NaN.
                Nothing is changed then.
        """
        device = next(iter(self.trained.values())).device
        take_up(self, {name: tensor.to(device) for name, tensor in load(path).items()}, path)

    # ------------------------------------------------------------ inside
    def _check_task(self, x: Tensor, y: Tensor) -> list[int]:
        if len(x) == 0 or len(x) != len(y):
            raise ValueError(f"a task needs images and as many labels, got {len(x)} and {len(y)} (ModelSurgery.learn)")
        labels, counts = y.unique(return_counts=True)
        again = [label for label in labels.tolist() if label in self.classes]
        if again:
            raise ValueError(
                f"class {again[0]} was learnt in task {self.tasks[self.classes.index(again[0])]} already; a class "
                "arrives once (ModelSurgery.learn)"
            )
        if int(counts.min()) < 2:
            raise ValueError(
                f"class {int(labels[counts.argmin()])} has one image, at least 2 are needed (ModelSurgery.learn)"
            )
        return labels.tolist()

    def _mean_adapter(self) -> dict[str, Tensor]:
        return {name: torch.stack([a[name] for a in self.adapters]).mean(0) for name in self.trained}

    def copy_adapter(self) -> dict[str, Tensor]:
        """The adapter that is in the model now."""
        return {name: parameter.detach().clone() for name, parameter in self.trained.items()}

    @torch.no_grad()
    def set_adapter(self, adapter: Mapping[str, Tensor]) -> None:
        """Put an adapter into the model."""
        for name, parameter in self.trained.items():
            parameter.copy_(adapter[name])
