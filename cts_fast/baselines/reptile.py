"""Reptile: one step towards the tasks' final parameters in every round."""

from cts_fast.baselines.base import Method


class Reptile(Method):
    r"""φ ← φ + β (mean_t θ_t − φ) after K inner steps, then θ_t ← φ.

    The released code of the shifting paper calls −(mean_t θ_t − φ) the meta-gradient; β = `meta_lr` is at most 1 in
    practice.

    Source: Nichol et al., "On First-Order Meta-Learning Algorithms", 2018, Algorithm 2 (batched).
    """

    once_a_round = True
