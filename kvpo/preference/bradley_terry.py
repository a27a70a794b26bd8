"""A Bradley-Terry model that is linear in features: logistic regression on their differences.

    P(a beats b) = sigmoid(w . (z_a - z_b))
    loss(w)      = - sum_n weight_n [c_n log P_n + (1 - c_n) log(1 - P_n)] / sum_n weight_n + strength / 2 |w|^2

with c = 1 for a win, 0 for a loss, 1/2 for a tie (Bradley and Terry, Biometrika 1952). The loss is
strictly convex for strength > 0, so its minimum is one point, which L-BFGS finds.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

REACH = 4.0
"""Standard deviations of the recorded clips at which a feature is cut.

Beyond what people saw nothing is known, and nothing is to be won there.
"""
LEAST = 0.01
"""Smallest difference of two compared clips that counts, of a feature's smallest spread."""


@dataclass(frozen=True)
class Scale:
    """Centre and unit of each feature, and how far from its centre it is looked at."""

    mean: np.ndarray
    """float64 [F], over the recorded clips."""
    spread: np.ndarray
    """float64 [F], above 0: root mean square difference of two clips that were compared."""
    reach: np.ndarray
    """float64 [F], above 0: distance from the mean at which a feature is cut, in its spread."""

    def __call__(self, features_CF: np.ndarray) -> np.ndarray:
        """Standardise features, [C, F]; what could not be measured is the mean, 0."""
        z = np.clip((features_CF - self.mean) / self.spread, -self.reach, self.reach)
        return np.nan_to_num(z, nan=0.0)


def scale_of(features_CF: np.ndarray, difference_NF: np.ndarray, floors_F: np.ndarray) -> Scale:
    """Scale of each feature by the clips, and the comparisons, where it could be measured.

    Branches of one story differ far less than stories do. A feature is one unit where it differs
    as two compared clips do: in units of the stories' spread it would hardly move a score. Floors
    bound the spread of the clips, and LEAST of them that of the differences.
    """
    known = np.isfinite(features_CF)
    count = np.maximum(known.sum(0), 1)
    mean = np.where(known, features_CF, 0.0).sum(0) / count
    far = np.maximum(_root_mean_square(features_CF - mean), floors_F)
    spread = np.maximum(_root_mean_square(difference_NF), LEAST * floors_F)
    return Scale(mean, spread, REACH * far / spread)


def _root_mean_square(x_NF: np.ndarray) -> np.ndarray:
    """Root mean square of each column over what could be measured; 0 where nothing could."""
    known = np.isfinite(x_NF)
    return np.sqrt(np.square(np.where(known, x_NF, 0.0)).sum(0) / np.maximum(known.sum(0), 1))


def log_sigmoid(x: np.ndarray) -> np.ndarray:
    return -np.logaddexp(0.0, -x)


def log_loss(margin_N: np.ndarray, credit_N: np.ndarray, weight_N: np.ndarray) -> float:
    """Weighted mean of the negative log likelihood, nats; log 2 is chance."""
    each = credit_N * log_sigmoid(margin_N) + (1 - credit_N) * log_sigmoid(-margin_N)
    return float(-(weight_N * each).sum() / weight_N.sum())


def fit(
    difference_NF: np.ndarray, credit_N: np.ndarray, weight_N: np.ndarray, strength: float
) -> np.ndarray:
    """Weights [F] of the least loss.

    Raises ValueError for a strength that is not above 0: separable answers would have no minimum.
    """
    if not strength > 0:
        raise ValueError(
            f"strength = {strength} must be above 0: without it answers that a feature tells apart without a fault have no best weights"
        )
    from scipy.optimize import minimize

    # Weights outside the span of the differences only cost: with many features and few answers
    # the search is for as many numbers as there are answers.  Rotations leave |w| alone.
    rotate_RF = np.eye(difference_NF.shape[1])
    if difference_NF.shape[0] < difference_NF.shape[1]:
        rotate_RF = np.linalg.svd(difference_NF, full_matrices=False)[2]
    x_NR, weight_N = difference_NF @ rotate_RF.T, weight_N / weight_N.sum()

    def loss(w_R: np.ndarray) -> tuple[float, np.ndarray]:
        margin = x_NR @ w_R
        wrong = weight_N * (np.exp(log_sigmoid(margin)) - credit_N)
        value = log_loss(margin, credit_N, weight_N) + strength / 2 * w_R @ w_R
        return value, x_NR.T @ wrong + strength * w_R

    options = {"maxiter": 500, "gtol": 1e-7, "ftol": 1e-12}
    found = minimize(loss, np.zeros(x_NR.shape[1]), jac=True, method="L-BFGS-B", options=options)
    return found.x @ rotate_RF
