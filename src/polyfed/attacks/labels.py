"""Labels from the classifier's input: whoever has it and the classifier can predict them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class LabelLeak:
    """What the predictions say of the labels of a batch; all in [0, 1].

    Args:
        accuracy: share of examples whose label is the class of the largest logit.
        majority: share of the batch's most frequent label: what a constant guess would reach, if it were known.
        histogram: half the sum over classes of the absolute difference between the shares of predictions and of labels;
            0: the mix of classes is known exactly.
    """

    accuracy: float
    majority: float
    histogram: float


def label_inference(logits: Tensor, labels: Tensor) -> LabelLeak:
    """Return what ``classify(s_out)`` gives away of the labels of the examples.

    The attacker knows the classifier, which server and clients have, and no other data. Where networks are accurate it
    is right, so this measures the network as much as the veil. On training examples, which a network fits, it is right
    more often than the test accuracy says.

    Args:
        logits: (B, L), the classifier's output for s_out as it was sent.
        labels: (B,) int64.
    """
    guessed, classes = logits.argmax(1), logits.shape[1]
    said, true = (value.bincount(minlength=classes).double() / len(labels) for value in (guessed, labels))
    right = float((guessed == labels).double().mean())
    return LabelLeak(right, float(true.max()), float((said - true).abs().sum() / 2))
