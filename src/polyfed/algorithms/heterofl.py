"""HeteroFL: every client trains the first channels of every layer, as many as its capacity allows.

    E. Diao, J. Ding, V. Tarokh: HeteroFL: Computation and Communication Efficient Federated Learning for
    Heterogeneous Clients. ICLR 2021. https://arxiv.org/abs/2010.01264

Server:  w[c] <- mean of w_k[c] over the clients that hold coordinate c; as it was where none does. Rows of the output
         layer: over the clients that have examples of the class.
Client:  rho = share of the channels. E epochs of cross-entropy over the client's own classes, with the outputs of
         layers that rho narrows divided by rho (the Scaler, in training only).
Then static BatchNorm: an exchange of its own asks the clients for means and variances of the new model at their width.

Statistics are of one width and of the round's clients; in the released code of the largest model and of all training
data. Other differences, from the paper and from diaoenmao/HeteroFL: docs/algorithms/heterofl.md.
"""

from dataclasses import dataclass

from polyfed.blocks.widths import Widths


@dataclass(frozen=True, kw_only=True)
class HeteroFL(Widths):
    """Hyper-parameters of HeteroFL: those of `Widths`, whose slices are prefixes."""

    name = "heterofl"
    exempt = {"idle_rounds_change_nothing": "statistics of BatchNorm depend on the data, also where no weight moves"}
