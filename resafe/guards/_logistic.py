"""L2-regularised logistic regression by L-BFGS on a sparse matrix: numpy and scipy only."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Vector = npt.NDArray[np.floating[Any]]


def sigmoid(x: Any) -> Any:
    """1 / (1 + exp(-x)), without overflow."""
    from scipy.special import expit

    return expit(x)


def logistic(
    table: Any, target: Vector, l2: float, balanced: bool, weight: Vector | None = None
) -> tuple[Vector, float]:
    """Weights and intercept that minimise sum_i c_i log(1 + exp(-s_i z_i)) + l2/2 |w|^2; the intercept is not shrunk.

    `table` is rows x features, `target` 0 or 1; c_i is the row's `weight` (default 1); `balanced`
    scales it so that both classes weigh half of the whole. Features that occur in no
    row keep the weight 0 and take no part in the search.
    """
    import numpy as np
    from scipy.optimize import minimize

    used = np.unique(table.indices)
    x = table[:, used].tocsr()
    cost = np.ones_like(target) if weight is None else weight.astype(np.float64)
    if balanced:
        positive = (cost * target).sum() / cost.sum()
        cost = cost * np.where(target == 1, 0.5 / positive, 0.5 / (1 - positive))
    solution = minimize(
        _objective, np.zeros(len(used) + 1), args=(x, x.T.tocsr(), target, cost, l2),
        jac=True, method="L-BFGS-B", options={"maxiter": 1000, "ftol": 1e-10, "gtol": 1e-5},
    )  # fmt: skip
    weights = np.zeros(table.shape[1], dtype=np.float32)
    weights[used] = solution.x[:-1]
    return weights, float(solution.x[-1])


def _objective(theta: Vector, x: Any, xt: Any, target: Vector, cost: Vector, l2: float) -> tuple[float, Vector]:
    import numpy as np

    w, z = theta[:-1], x @ theta[:-1] + theta[-1]
    residual = cost * (sigmoid(z) - target)
    value = float((cost * (np.logaddexp(0, z) - target * z)).sum() + 0.5 * l2 * (w @ w))
    return value, np.concatenate([xt @ residual + l2 * w, [residual.sum()]])
