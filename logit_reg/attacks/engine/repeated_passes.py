"""Randomised networks: several passes taken for one, with their gradients averaged."""

import dataclasses
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from logit_reg.attacks.engine.examples import Examples
from logit_reg.attacks.engine.forward import LogitsFn, call_logits, isolated
from logit_reg.attacks.engine.low_precision import is_screened


@dataclasses.dataclass(frozen=True)
class RepeatedPasses:
    """A randomised network as attacks see it: each call makes `num_passes` passes, each drawn anew.

    Its logits are the logarithm of the mean probabilities. `logits_and_gradient` averages the
    gradients of the loss over the passes, each at its own logits, which is not the gradient at
    the mean of the logits.

    Source:
        Expectation over transformation: Athalye et al. 2018, arXiv:1707.07397 and 1802.00420;
        `eot_iter` of the public code of Croce and Hein 2020, arXiv:2003.01690. Deviation: the
        public code judges and ranks an iterate by the last pass alone, here by all of them.
    """

    logits_fn: LogitsFn
    """Images -> logits, other ones in every pass."""
    num_passes: int
    """At least 1."""

    def __call__(self, images):
        """Logarithm of the mean probabilities: (N, H, W, C) -> (N, K) float64."""
        (logits,) = self.average(lambda: (call_logits(self.logits_fn, images),))
        return logits

    def average(self, one_pass: Callable[[], tuple]) -> tuple:
        """Average over the passes.

        Args:
            one_pass: gives (N, K) logits and any further tensors.

        Returns:
            (N, K) float64 logarithm of the mean probabilities, and the means of the rest.
        """

        # One graph, or an operation with a seed of its own would draw the same in two passes.
        @isolated
        def draw():
            logits, *others = one_pass()
            # In float64: near ln K, float32 loses small differences of the logits.
            return tf.nn.log_softmax(tf.cast(logits, tf.float64)), *(
                other / self.num_passes for other in others
            )

        def another(count, logits, *sums):
            more, *others = draw()
            total = tf.reduce_logsumexp(tf.stack([logits, more]), axis=0)
            return count + 1, total, *(a + b for a, b in zip(sums, others, strict=True))

        _, logits, *means = tf.while_loop(
            lambda count, *_: count < self.num_passes,
            another,
            (tf.constant(1), *draw()),
            # One after the other: side by side they would take the memory of all.
            parallel_iterations=1,
        )
        return logits - tf.math.log(tf.constant(self.num_passes, tf.float64)), *means


def repeated(functions: tuple[LogitsFn, LogitsFn], num_passes: int) -> tuple[LogitsFn, LogitsFn]:
    """The function that judges and the one that gives directions, with several passes each.

    Args:
        functions: as `Examples.functions` gives them.
        num_passes: at least 1, where they stay as they are.

    Returns:
        Two functions; one and the same if they were. A lower precision is left out: its margin of
        doubt was measured on single passes.
    """
    if num_passes == 1:
        return functions
    judging: Any = RepeatedPasses(functions[0], num_passes)
    is_same = functions[1] is functions[0] or is_screened(functions[1])
    return judging, judging if is_same else RepeatedPasses(functions[1], num_passes)


def with_repeats(
    logits_fn: LogitsFn, examples: Examples, num_passes: int
) -> tuple[LogitsFn, Examples]:
    """A network and what is attacked of it, with several passes for each; see `repeated`.

    Args:
        logits_fn: the network.
        examples: with what the attack follows.
        num_passes: at least 1, where both stay as they are.
    """
    judging, followed = repeated(examples.functions(logits_fn), num_passes)
    if num_passes > 1:
        hook = None if followed is judging else followed
        examples = dataclasses.replace(examples, gradient_logits_fn=hook)
    return judging, examples
