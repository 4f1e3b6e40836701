"""Calibration of logits z = z_yes - z_no against soft labels: temperature and Platt scaling, ECE, Brier, NLL.

Pruning and compression move the scale of the logits, which ranking metrics cannot see: fit again after each.
"""

from dataclasses import dataclass

import numpy as np

from jaxslm.config import Calibration
from jaxslm.errors import InputError

BINS = 15
RIDGE = 1e-6  # weight of the mean squared calibrated log-odds; keeps separable data finite (log-odds end near 11)
MIN_SPREAD = 1e-3  # least spread of scale * logits (root mean square, or standard deviation with a bias): scale > 0

_MAX_STEPS = 200


@dataclass(frozen=True)
class ReliabilityBin:
    """One bin of a reliability diagram: where predictions lie and what the labels are there."""

    low: float
    high: float
    count: int
    mean_probability: float
    mean_label: float


@dataclass(frozen=True)
class CalibrationReport:
    """Quality of probabilities against soft labels: see `ece`, `brier`, `nll`, `reliability_table`."""

    pairs: int
    ece: float
    brier: float
    nll: float
    bins: tuple[ReliabilityBin, ...]


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> Calibration:
    """Returns sigmoid(a z), a = 1 / temperature, fitted as `fit_platt` with bias 0 (Guo et al., ICML 2017).

    Raises:
        InputError: as `fit_platt`; all logits 0.
    """
    z, y = _pairs(logits, labels)
    spread = float(np.sqrt(np.mean(z**2)))
    if spread == 0:
        raise InputError("calibration needs logits that are not all 0")
    weights = _fit(z[:, None] / spread, y)
    return Calibration(scale=float(weights[0]) / spread, method="temperature")


def fit_platt(logits: np.ndarray, labels: np.ndarray) -> Calibration:
    """Returns sigmoid(a z + b), fitted on held-out pairs (Platt 1999; Newton as Lin, Lin and Weng 2007).

    Minimises mean(-y log p - (1 - y) log(1 - p)) + RIDGE / 2 * mean((a z + b)^2) over a, b in float64 by damped
    Newton. The objective is strictly convex, so the answer is unique, exists for separable data too, and scaling all
    logits by c divides a by c. The scale is bounded below (`MIN_SPREAD`): logits that say nothing, or the opposite of
    the labels, give a flat probability near the base rate, never a reversed order. Labels are not smoothed.

    Args:
        logits: z_yes - z_no of held-out pairs, [n].
        labels: soft labels in [0, 1], [n].

    Raises:
        InputError: fewer than 2 pairs, unequal lengths, numbers that are not finite, labels outside [0, 1], or all
            logits equal.
    """
    z, y = _pairs(logits, labels)
    centre, spread = float(z.mean()), float(z.std())
    if spread <= 1e-12 * max(1.0, abs(centre)):
        raise InputError("Platt scaling needs logits that are not all equal")
    weights = _fit(np.stack([(z - centre) / spread, np.ones_like(z)], axis=1), y)
    scale = float(weights[0]) / spread
    return Calibration(scale=scale, bias=float(weights[1]) - scale * centre, method="platt")


def nll(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Returns mean(-y log p - (1 - y) log(1 - p)); probabilities are kept 1e-15 away from 0 and 1."""
    p, y = _pairs(probabilities, labels)
    p = np.clip(p, 1e-15, 1 - 1e-15)
    return float(np.mean(-y * np.log(p) - (1 - y) * np.log1p(-p)))


def brier(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Returns mean((p - y)^2) (Brier 1950)."""
    p, y = _pairs(probabilities, labels)
    return float(np.mean((p - y) ** 2))


def ece(probabilities: np.ndarray, labels: np.ndarray, bins: int = BINS) -> float:
    """Returns the expected calibration error: sum_b n_b / n |mean label_b - mean p_b|, bins of `reliability_table`."""
    table = reliability_table(probabilities, labels, bins)
    total = sum(row.count for row in table)
    return sum(row.count / total * abs(row.mean_label - row.mean_probability) for row in table)


def reliability_table(probabilities: np.ndarray, labels: np.ndarray, bins: int = BINS) -> tuple[ReliabilityBin, ...]:
    """Returns bins of equal mass by rising probability (Nixon et al., "Measuring calibration in deep learning", 2019).

    Equal probabilities always share a bin, so the table does not depend on the order of the pairs; then bins may hold
    more or fewer pairs than n / bins, and empty ones are left out.
    """
    p, y = _pairs(probabilities, labels)
    if p.min() < 0 or p.max() > 1:
        raise InputError("probabilities must lie in [0, 1]")
    if bins < 1:
        raise InputError(f"the number of bins must be 1 or more, not {bins}")
    edges = np.sort(p)[[len(p) * index // bins for index in range(1, bins)]]
    bin_of = np.searchsorted(edges, p, side="right")
    rows = []
    for index in range(bins):
        chosen = bin_of == index
        if chosen.any():
            inside = p[chosen]
            rows.append(
                ReliabilityBin(
                    low=float(inside.min()),
                    high=float(inside.max()),
                    count=int(chosen.sum()),
                    mean_probability=float(inside.mean()),
                    mean_label=float(y[chosen].mean()),
                )
            )
    return tuple(rows)


def calibration_report(probabilities: np.ndarray, labels: np.ndarray, bins: int = BINS) -> CalibrationReport:
    """Returns ECE, Brier, NLL and the reliability table of probabilities in [0, 1] against labels in [0, 1]."""
    return CalibrationReport(
        pairs=int(np.size(probabilities)),
        ece=ece(probabilities, labels, bins),
        brier=brier(probabilities, labels),
        nll=nll(probabilities, labels),
        bins=reliability_table(probabilities, labels, bins),
    )


def _fit(features: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Minimises the objective with weights[0] >= MIN_SPREAD: convex, so a violated bound is tight at the optimum."""
    weights = _newton(features, labels, np.zeros(len(labels)))
    if weights[0] >= MIN_SPREAD:
        return weights
    rest = _newton(features[:, 1:], labels, MIN_SPREAD * features[:, 0])
    return np.concatenate([[MIN_SPREAD], rest])


def _newton(features: np.ndarray, labels: np.ndarray, offset: np.ndarray) -> np.ndarray:
    """Returns the weights w [d] of least mean(log(1 + e^t) - y t) + RIDGE / 2 mean(t^2), t = features w + offset."""

    def objective(log_odds: np.ndarray) -> float:
        return float(np.mean(np.logaddexp(0, log_odds) - labels * log_odds + RIDGE / 2 * log_odds**2))

    weights = np.zeros(features.shape[1])
    if features.shape[1] == 0:
        return weights
    for _ in range(_MAX_STEPS):
        log_odds = features @ weights + offset
        probability = Calibration().apply(log_odds)
        gradient = features.T @ (probability - labels + RIDGE * log_odds) / len(labels)
        curvature = probability * (1 - probability) + RIDGE
        step = np.linalg.solve(features.T @ (features * curvature[:, None]) / len(labels), gradient)
        decrement = float(gradient @ step)
        if decrement < 1e-12:  # quadratic convergence: one full step more is exact to rounding
            return weights - step
        length, start = 1.0, objective(log_odds)
        while objective(log_odds - length * (features @ step)) > start - 0.25 * length * decrement:
            length /= 2
        weights = weights - length * step
    raise InputError(f"calibration did not converge in {_MAX_STEPS} Newton steps: check the logits")


def _pairs(values: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    x, y = np.asarray(values, dtype=np.float64), np.asarray(labels, dtype=np.float64)
    if x.ndim != 1 or x.shape != y.shape:
        raise InputError(f"values and labels must be two lists of equal length, not shapes {x.shape} and {y.shape}")
    if len(x) < 2:
        raise InputError(f"calibration needs 2 pairs or more, not {len(x)}")
    if not np.isfinite(x).all():
        raise InputError(f"pair {int(np.flatnonzero(~np.isfinite(x))[0])}: the value is not finite")
    bad = ~((y >= 0) & (y <= 1))
    if bad.any():
        first = int(np.flatnonzero(bad)[0])
        raise InputError(f"pair {first}: label {y[first]} is outside [0, 1]")
    return x, y
