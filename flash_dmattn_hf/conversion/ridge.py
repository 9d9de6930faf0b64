"""Ridge regression from streamed sums: memory depends on the number of features, not on the number of samples."""

import torch

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Penalties that `fit` tries, as multiples of the mean variance of a feature."""


class RidgeStatistics:
    """Float64 sums over samples (x, y), from which any ridge fit and its R2 follow.

    num_features: F, length of x. num_targets: length of y; every target is fitted on its own.
    """

    def __init__(self, num_features: int, num_targets: int, device: torch.device | str = "cpu"):
        options = {"dtype": torch.float64, "device": device}
        self.count = 0
        self.x = torch.zeros(num_features, **options)
        self.y = torch.zeros(num_targets, **options)
        self.xx = torch.zeros(num_features, num_features, **options)
        self.xy = torch.zeros(num_features, num_targets, **options)
        self.yy = torch.zeros(num_targets, **options)

    def add(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """x: (n, F), y: (n, targets), any float dtype."""
        x, y = x.double(), y.double()
        self.count += len(x)
        self.x += x.sum(0)
        self.y += y.sum(0)
        self.xx.addmm_(x.T, x)
        self.xy.addmm_(x.T, y)
        self.yy += y.square().sum(0)

    def __add__(self, other: "RidgeStatistics") -> "RidgeStatistics":
        total = RidgeStatistics(len(self.x), len(self.y), self.x.device)
        for name in vars(total):
            setattr(total, name, getattr(self, name) + getattr(other, name))
        return total

    def solve(self, ridge: float) -> tuple[torch.Tensor, torch.Tensor]:
        """-> weight (targets, F), intercept (targets,): argmin mean (y - w.x - b)^2 + ridge var(x) |w|^2."""
        mean_x, mean_y = self.x / self.count, self.y / self.count
        covariance = self.xx / self.count - torch.outer(mean_x, mean_x)
        variance = covariance.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny)
        covariance.diagonal().add_(ridge * variance)
        weight = torch.linalg.solve(covariance, self.xy / self.count - torch.outer(mean_x, mean_y)).T
        return weight, mean_y - weight @ mean_x

    def r2(self, weight: torch.Tensor, intercept: torch.Tensor) -> torch.Tensor:
        """Explained share of the variance of these samples, (targets,); NaN for a constant target."""
        residual = (
            self.yy
            - 2 * (weight * self.xy.T).sum(1)
            - 2 * intercept * self.y
            + ((weight @ self.xx) * weight).sum(1)
            + 2 * intercept * (weight @ self.x)
            + self.count * intercept.square()
        )
        variance = self.yy - self.y.square() / self.count
        return torch.where(variance > 0, 1 - residual / variance, torch.nan)


def fit(train: RidgeStatistics, held_out: RidgeStatistics) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Chooses the penalty by mean R2 on `held_out`, then solves on both.

    Returns weight (targets, F), the mean (F,) of x, and r2 (targets,) on `held_out` of the fit that had
    not seen it.
    """
    ridge = max(RIDGES, key=lambda ridge: held_out.r2(*train.solve(ridge)).nan_to_num(-1.0).mean().item())
    r2 = held_out.r2(*train.solve(ridge))
    total = train + held_out
    return total.solve(ridge)[0], total.x / total.count, r2
