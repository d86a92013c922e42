"""Computes confidences of a logistic regression with a last-layer Laplace approximation.

Shape letters: N training rows, M other rows, H features, C classes.
"""

import numpy as np

from sweet_jax.objectives.objective import softmax


def laplace_confidences(
    x: np.ndarray, kernel: np.ndarray, bias: np.ndarray, penalty: float, rows: np.ndarray
) -> np.ndarray:
    """Returns the largest predictive probability of each row, float64 [M].

    The posterior of the weights is a normal distribution around the fit. Its precision is the sum
    of the Kronecker-factored generalised Gauss-Newton matrix (Ritter et al. 2018) and the prior's
    precision N λ, the default of Daxberger et al. 2021, "Laplace Redux" (arXiv 2106.14806, section
    2 and appendix B). The probabilities are their extended probit approximation,
    softmax(m_c / sqrt(1 + π/8 v_c)), where m and v are the mean and the variance of a logit.

    Args:
      x: features that the regression was fitted on, float32 [N, H].
      kernel, bias: its weights for features that are not standardised, [H, C] and [C].
      penalty: λ of its loss, mean cross-entropy + λ/2 |W|^2, with W for standardised features. The
        intercepts, which were fitted without a penalty, get the same prior, since their variance is
        small compared with that of the weights.
      rows: features to classify, float32 [M, H].

    """
    mean, scale = x.mean(axis=0, dtype=np.float64), x.std(axis=0, dtype=np.float64)
    scale = np.where(scale > 1e-6, scale, 1)

    def standardise(values: np.ndarray) -> np.ndarray:  # [M, H + 1]
        return np.column_stack([(values - mean) / scale, np.ones(len(values))])

    fitted, others = standardise(x), standardise(rows)
    p = softmax((x @ kernel + bias).astype(np.float64))
    count = len(x)
    input_values, input_vectors = np.linalg.eigh(fitted.T @ fitted / count)
    curvature = np.diag(p.mean(axis=0)) - p.T @ p / count  # [C, C]
    output_values, output_vectors = np.linalg.eigh(curvature)
    # A shift of all logits of a row changes no probability, so its direction has no curvature.
    curved = output_values > 1e-9 * output_values[-1]
    precision = count * (
        np.outer(np.clip(input_values, 0, None), output_values[curved]) + penalty
    )  # [H + 1, C]
    variance = (
        (others @ input_vectors) ** 2 @ (1 / precision) @ (output_vectors[:, curved] ** 2).T
    )  # [M, C]
    logits = (rows @ kernel + bias) / np.sqrt(1 + np.pi / 8 * variance)
    return softmax(logits.astype(np.float64)).max(axis=-1)
