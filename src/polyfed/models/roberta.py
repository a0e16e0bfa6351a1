"""RoBERTa for sequence classification: the network of Hugging Face's package ``transformers``, an extra of polyfed.

Its tensors have the names of that package's checkpoints, so the option ``weights`` reads a pretrained one.

References:
    Liu et al., "RoBERTa: A Robustly Optimized BERT Pretraining Approach", 2019, https://arxiv.org/abs/1907.11692.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from polyfed.base.errors import ModelError

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
            f"roberta has places = {places}, for texts of up to {places - 2} tokens, got {input_shape[0]}; shorten "
            "texts by data.options.length, or set places to two more than that"
        )
    if width % heads:
        raise ModelError(f"roberta has width = {width} and heads = {heads}; set heads to a divisor of width")
    config = {"vocab_size": vocabulary, "hidden_size": width, "num_hidden_layers": depth, "num_attention_heads": heads}
    config |= {"intermediate_size": ffn, "max_position_embeddings": places, "num_labels": num_classes}
    config |= {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    usual = {"type_vocab_size": 1, "layer_norm_eps": 1e-5, "pad_token_id": PADDING, "bos_token_id": 0}
    try:
        package = import_module("transformers")
    except ImportError as error:
        raise ModelError(
            f"model 'roberta' needs the package transformers, which cannot be imported ({error}); install it with "
            "`pip install 'polyfed[text]'`, or choose text-transformer or bilstm"
        ) from error
    settings = package.RobertaConfig(**config, **usual, eos_token_id=2, attn_implementation="eager")
    return Roberta(package.RobertaForSequenceClassification(settings))


class Roberta(nn.Module):
    """The package's network, called with tokens alone.

    It makes the mask itself, of zeros and large negative numbers, as a stack needs it.

    Args:
        network: a ``RobertaForSequenceClassification``.
    """

    #: Beginnings of names that a checkpoint may lack, as that of the pretraining does: they get a draw.
    may_lack = ("classifier.",)
    #: Beginnings of names of a checkpoint without a place here: heads of other tasks, and numbers that need no file.
    passed_over = ("lm_head.", "roberta.pooler.", "roberta.embeddings.position_ids")

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.roberta: Any = network.roberta
        self.classifier: Any = network.classifier
        for name in ("position_ids", "token_type_ids"):  # the forward gives them; as buffers they would be sent
            delattr(self.roberta.embeddings, name)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens ``(B, T)``, 0 = padding -> logits ``(B, L)``."""
        own = torch.where(x == 0, PADDING, torch.where(x == PADDING, 0, x))
        here = (x != 0).long()
        given = {"token_type_ids": torch.zeros_like(x), "position_ids": here.cumsum(1) * here + PADDING}
        bias = (here - 1)[:, None, None] * _FAR  # (B, 1, 1, T)
        h = self.roberta(own, attention_mask=bias, **given)[0][:, 0]  # (B, width), the first token's
        head = self.classifier
        return head.out_proj(head.dropout(head.dense(head.dropout(h)).tanh()))
