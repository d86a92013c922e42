"""Last-layer Laplace approximation of a logistic regression: confidences under its uncertainty.

Shape letters: N training rows, M other rows, H features, C classes.
"""

import numpy as np

from sweet_jax.objectives.objective import softmax


def laplace_confidences(
    x: np.ndarray, kernel: np.ndarray, bias: np.ndarray, penalty: float, rows: np.ndarray
) -> np.ndarray:
    """Returns the largest predictive probability of each row, float64 [M].

    The posterior of the weights is a normal distribution about the fit. Its precision is the
    generalised Gauss-Newton matrix, Kronecker-factored (Ritter et al. 2018), and the prior's, N λ:
    what Daxberger et al. 2021, "Laplace Redux" (arXiv 2106.14806, section 2 and appendix B), take
    by default. Probabilities: their extended probit approximation,
    softmax(m_c / sqrt(1 + π/8 v_c)), m and v the mean and variance of a logit.

    Args:
      x: float32 [N, H], what the regression was fitted on.
      kernel, bias: [H, C] and [C], on features as they come.
      penalty: λ of its loss, mean cross-entropy + λ/2 |W|^2, W on standardised features. The
        intercepts get the same prior, which they were not fitted with: their variance is small
        beside the weights'.
      rows: float32 [M, H].

    """
    mean, scale = x.mean(axis=0, dtype=np.float64), x.std(axis=0, dtype=np.float64)
    scale = np.where(scale > 1e-6, scale, 1)

    def standardise(values: np.ndarray) -> np.ndarray:  # [M, H + 1]
        return np.column_stack([(values - mean) / scale, np.ones(len(values))])

    own, others = standardise(x), standardise(rows)
    p = softmax((x @ kernel + bias).astype(np.float64))
    count = len(x)
    inputs, across = np.linalg.eigh(own.T @ own / count)
    curvature = np.diag(p.mean(axis=0)) - p.T @ p / count  # [C, C]
    outputs, between = np.linalg.eigh(curvature)
    # All logits of a row may rise together: nothing says by how much, and no probability changes.
    told = outputs > 1e-9 * outputs[-1]
    precision = count * (np.outer(np.clip(inputs, 0, None), outputs[told]) + penalty)  # [H + 1, C]
    variance = (others @ across) ** 2 @ (1 / precision) @ (between[:, told] ** 2).T  # [M, C]
    logits = (rows @ kernel + bias) / np.sqrt(1 + np.pi / 8 * variance)
    return softmax(logits.astype(np.float64)).max(axis=-1)
