"""Optimisers by name, with weight decay on matrices alone or on every weight."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from persea.config.optimization import OptimizerName, WeightDecayOn
from persea.errors import MissingRequirementError, RefusedError
from persea.training.settings import TrainingSettings

MUON_MOMENTUM = 0.95


class CombinedOptimizer(torch.optim.Optimizer):
    """Several optimisers of disjoint parameters that step as one.

    Muon is defined for matrices; AdamW steps the embeddings, the head and the vectors.

    Args:
        optimizers: The optimisers. Together their groups hold all parameters once.
        parameters: All parameters, in the order of the checkpoint.
    """

    def __init__(
        self,
        optimizers: Sequence[torch.optim.Optimizer],
        parameters: Sequence[torch.nn.Parameter],
    ) -> None:
        self.optimizers = tuple(optimizers)
        # the base class would make groups of its own; the ones of the parts are shared instead
        super().__init__(list(parameters), {})
        self.param_groups = [g for one in self.optimizers for g in one.param_groups]

    def step(self, closure: Any = None) -> Any:
        """Step every part."""
        for one in self.optimizers:
            one.step()
        return None

    def state_dict(self) -> dict[str, Any]:
        """Return the state of all parts, numbered by the order of all parameters."""
        state: dict[int, Any] = {}
        groups: list[Any] = []
        offset = 0
        for one in self.optimizers:
            part = one.state_dict()
            state |= {k + offset: v for k, v in part["state"].items()}
            for group in part["param_groups"]:
                groups.append(group | {"params": [k + offset for k in group["params"]]})
            offset += sum(len(g["params"]) for g in part["param_groups"])
        return {"state": state, "param_groups": groups}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load the state of all parts."""
        offset, begin = 0, 0
        for one in self.optimizers:
            count = sum(len(g["params"]) for g in one.param_groups)
            groups = state_dict["param_groups"][begin : begin + len(one.param_groups)]
            one.load_state_dict(
                {
                    "state": {
                        k - offset: v
                        for k, v in state_dict["state"].items()
                        if offset <= k < offset + count
                    },
                    "param_groups": [
                        g | {"params": [k - offset for k in g["params"]]} for g in groups
                    ],
                }
            )
            offset, begin = offset + count, begin + len(one.param_groups)
        self.param_groups = [g for one in self.optimizers for g in one.param_groups]


def build_optimizer(
    parameters: Sequence[torch.nn.Parameter],
    settings: TrainingSettings,
    embedding_ids: frozenset[int] = frozenset(),
) -> torch.optim.Optimizer:
    """Build the optimiser of a training.

    Args:
        parameters: The trainable parameters.
        settings: Name, learning rate, weight decay and Adam's constants.
        embedding_ids: `id` of the embedding and the head, which Muon does not step.

    Raises:
        MissingRequirementError: The 8-bit optimiser needs a package or a GPU that is not there.
        RefusedError: Muon has no matrix to step.
    """
    options: dict[str, Any] = {
        "lr": settings.learning_rate,
        "betas": settings.adam_betas,
        "eps": settings.adam_epsilon,
    }
    groups = _decay_groups(parameters, settings)
    if settings.optim is OptimizerName.ADAMW_8BIT:
        optimizer: torch.optim.Optimizer = require_adamw_8bit()(groups, **options)
        return optimizer
    if settings.optim is not OptimizerName.MUON:
        options |= {"fused": True} if settings.optim is OptimizerName.ADAMW_FUSED else {}
        return torch.optim.AdamW(groups, **options)
    matrices = [p for p in parameters if p.ndim == 2 and id(p) not in embedding_ids]
    chosen = {id(p) for p in matrices}
    others = [p for p in parameters if id(p) not in chosen]
    if not matrices:
        raise RefusedError(
            "no matrix is trained besides embeddings, and Muon steps matrices",
            where="training.optim",
            remedy="write `optim: adamw_torch`",
        )
    muon = torch.optim.Muon(
        matrices,
        lr=settings.learning_rate,
        weight_decay=settings.weight_decay,
        momentum=MUON_MOMENTUM,
        # the step of a matrix has the size of AdamW's, so that one learning rate fits both
        adjust_lr_fn="match_rms_adamw",
    )
    if not others:
        return muon
    adamw = torch.optim.AdamW(_decay_groups(others, settings), **options)
    return CombinedOptimizer([muon, adamw], [*matrices, *others])


def _decay_groups(
    parameters: Iterable[torch.nn.Parameter], settings: TrainingSettings
) -> list[dict[str, Any]]:
    """Return one group, or matrices with weight decay and vectors (norms, biases) without."""
    listed = list(parameters)
    if settings.weight_decay_on is WeightDecayOn.ALL:
        return [{"params": listed, "weight_decay": settings.weight_decay}]
    groups = [
        {"params": [p for p in listed if p.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in listed if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def require_adamw_8bit() -> Any:
    """Return the class of the 8-bit optimiser.

    Raises:
        MissingRequirementError: bitsandbytes or a GPU is missing.
    """
    try:
        from bitsandbytes.optim import AdamW8bit  # extra `bitsandbytes`
    except ImportError as error:
        raise MissingRequirementError(
            "optim: adamw_8bit needs bitsandbytes",
            where="training.optim",
            remedy="pip install 'persea[bitsandbytes]', or write `optim: adamw_torch`",
        ) from error
    if not torch.cuda.is_available():
        raise MissingRequirementError(
            "optim: adamw_8bit needs a GPU",
            where="training.optim",
            remedy="write `optim: adamw_torch`",
        )
    return AdamW8bit
