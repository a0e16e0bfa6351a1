"""RoBERTa for sequence classification: the network of Hugging Face's package ``transformers``, an extra of polyfed.

Its tensors have the names of that package's checkpoints, so the option ``weights`` reads a pretrained one.

References:
    Liu et al., "RoBERTa: A Robustly Optimized BERT Pretraining Approach", 2019, https://arxiv.org/abs/1907.11692.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from polyfed.base.errors import ModelError

#: Beginnings of names that a checkpoint lacks, such as one of the pretrained network: they start with a draw.
DRAWN = ("classifier.",)
#: Beginnings of names of a checkpoint that have no place here: heads of other tasks, and numbers that need no file.
LEFT_OUT = ("lm_head.", "roberta.pooler.", "roberta.embeddings.position_ids")

#: RoBERTa's own number of padding. Here padding is 0 in all data, so the two change places.
PADDING = 1
_FAR = 1e4  # taken off the scores of padding


def new(
    input_shape: tuple[int, ...],
    *,
    vocabulary: int,
    width: int,
    depth: int,
    heads: int,
    ffn: int,
    places: int,
    dropout: float,
    num_classes: int,
) -> nn.Module:
    """Return a new network for tokens ``(T,)``.

    Args:
        input_shape: ``(T,)``, the most tokens of a text.
        vocabulary: number of tokens.
        width: width of a token.
        depth: number of layers.
        heads: heads of each attention; a divisor of ``width``.
        ffn: hidden width of a layer's dense part.
        places: rows of the table of places: two more than tokens, as the first two stand for padding.
        dropout: of weights of attention and of what layers put out.
        num_classes: number of logits.

    Raises:
        ModelError: the package is missing, the data are no tokens or too long, or ``heads`` does not divide ``width``.
    """
    if len(input_shape) != 1:
        raise ModelError(f"roberta takes tokens (T,), got samples of shape {input_shape}; choose a data set of texts")
    if input_shape[0] > places - 2:
        raise ModelError(
            f"roberta has places = {places}, for texts of up to {places - 2} tokens, got {input_shape[0]}; shorten texts "
            "by data.options.length, or set places to two more than that"
        )
    if width % heads:
        raise ModelError(f"roberta has width = {width} and heads = {heads}; set heads to a divisor of width")
    config = {"vocab_size": vocabulary, "hidden_size": width, "num_hidden_layers": depth, "num_attention_heads": heads}
    config |= {"intermediate_size": ffn, "max_position_embeddings": places, "num_labels": num_classes}
    config |= {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    usual = {"type_vocab_size": 1, "layer_norm_eps": 1e-5, "pad_token_id": PADDING, "bos_token_id": 0}
    settings, network = _package()
    module = network(settings(**config, **usual, eos_token_id=2, attn_implementation="eager"))
    for name in ("position_ids", "token_type_ids"):  # numbers that the forward gives; as buffers they would be sent
        delattr(module.roberta.embeddings, name)
    return module


@cache
def _package() -> tuple[Any, Any]:
    """Return the package's configuration, and its network with a forward that takes tokens alone."""
    try:
        from transformers import RobertaConfig, RobertaForSequenceClassification
    except ImportError as error:
        raise ModelError(
            f"model 'roberta' needs the package transformers, which cannot be imported ({error}); install it with "
            "`pip install 'polyfed[text]'`, or choose text-transformer or bilstm"
        ) from error

    class Roberta(RobertaForSequenceClassification):
        """The package's network; it makes the mask itself, of zeros and large negative numbers, as a stack needs it."""

        may_lack, passed_over = DRAWN, LEFT_OUT

        def forward(self, x: Tensor) -> Tensor:
            """Tokens ``(B, T)``, 0 = padding -> logits ``(B, L)``."""
            own = torch.where(x == 0, PADDING, torch.where(x == PADDING, 0, x))
            here = (x != 0).long()
            given = {"token_type_ids": torch.zeros_like(x), "position_ids": here.cumsum(1) * here + PADDING}
            bias = (here - 1)[:, None, None] * _FAR  # (B, 1, 1, T)
            return self.classifier.out_proj(self.state(self.roberta(own, attention_mask=bias, **given)[0]))

        def state(self, h: Tensor) -> Tensor:
            """``(B, T, width)`` -> ``(B, width)``: the dense layer behind the first token."""
            head = self.classifier
            return head.dropout(head.dense(head.dropout(h[:, 0])).tanh())

    return RobertaConfig, Roberta
