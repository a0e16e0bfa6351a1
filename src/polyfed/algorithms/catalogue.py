"""The algorithms by name, without importing them (nor torch), so that `polyfed list` answers at once."""

from __future__ import annotations

#: name -> (module:class, one line)
ALGORITHMS: dict[str, tuple[str, str]] = {
    "depthfl": (
        "polyfed.algorithms.depthfl:DepthFL",
        "each client trains the first stages, with classifiers that teach one another (Kim et al. 2023)",
    ),
    "fd": (
        "polyfed.algorithms.fd:FD",
        "mean softmax outputs by class, each client learning from the others' (Jeong et al. 2018)",
    ),
    "fedapen": (
        "polyfed.algorithms.fedapen:FedAPEN",
        "a private and a shared model, trained through an ensemble whose weight each client learns (Qin et al. 2023)",
    ),
    "fedavg": (
        "polyfed.algorithms.fedavg:FedAvg",
        "one model for all, averaged over clients (McMahan et al. 2017)",
    ),
    "fedgen": (
        "polyfed.algorithms.fedgen:FedGen",
        "a generator of representations, trained at the server, that all clients learn from (Zhu et al. 2021)",
    ),
    "fedgh": (
        "polyfed.algorithms.fedgh:FedGH",
        "a header that the server trains on mean representations by class (Yi et al. 2023)",
    ),
    "fedin": (
        "polyfed.algorithms.fedin:FedIN",
        "models of different depth learn from each other's features (a reconstruction of Chan et al. 2023)",
    ),
    "fedkd": (
        "polyfed.algorithms.fedkd:FedKD",
        "private teachers and a small shared student, whose updates travel at low rank (Wu et al. 2022)",
    ),
    "fedl2g": (
        "polyfed.algorithms.fedl2g:FedL2G",
        "guiding vectors, learnt for held-out examples at rate 0.1 (logits) or 100 (features) (Zhang et al. 2024)",
    ),
    "fedmrl": (
        "polyfed.algorithms.fedmrl:FedMRL",
        "a small shared model beside each private one, fused at two nested granularities (Yi et al. 2024)",
    ),
    "fedmrl-adaptive": (
        "polyfed.algorithms.fedmrl_adaptive:FedMRLAdaptive",
        "FedMRL in which each client takes as much of the shared model as it needs (beyond Yi et al. 2024)",
    ),
    "fedmrl-e": (
        "polyfed.algorithms.fedmrl_e:FedMRLE",
        "FedMRL with one private header, tied over several granularities (future work of Yi et al. 2024)",
    ),
    "fedmrl-ssl": (
        "polyfed.algorithms.fedmrl_ssl:FedMRLSSL",
        "FedMRL without labels, by views of each example; linear probes predict (beyond Yi et al. 2024)",
    ),
    "fednova": (
        "polyfed.algorithms.fednova:FedNova",
        "FedAvg whose clients may take unlike numbers of steps (Wang et al. 2020)",
    ),
    "fedproto": (
        "polyfed.algorithms.fedproto:FedProto",
        "mean representations by class, which every client's own are pulled to (Tan et al. 2022)",
    ),
    "fedprox": (
        "polyfed.algorithms.fedprox:FedProx",
        "FedAvg whose clients are pulled back to the model that they received (Li et al. 2020)",
    ),
    "fedrolex": (
        "polyfed.algorithms.fedrolex:FedRolex",
        "each client trains a window of channels that moves on every round (Alam et al. 2022)",
    ),
    "fedtgp": (
        "polyfed.algorithms.fedtgp:FedTGP",
        "prototypes that the server trains to keep apart, which clients are pulled to (Zhang et al. 2024)",
    ),
    "fiarse": (
        "polyfed.algorithms.fiarse:FIARSE",
        "each client trains the largest weights that its capacity allows (Wu et al. 2024)",
    ),
    "fiarse-neuron": (
        "polyfed.algorithms.fiarse_neuron:FIARSENeuron",
        "each client trains the strongest channels that its capacity allows (future work of Wu et al. 2024)",
    ),
    "fjord": (
        "polyfed.algorithms.fjord:FjORD",
        "each client trains the first channels of every layer, at widths drawn up to its own (Horváth et al. 2021)",
    ),
    "fml": (
        "polyfed.algorithms.fml:FML",
        "a private and a shared model teach each other, the shared one is averaged (Shen et al. 2020)",
    ),
    "heterofl": (
        "polyfed.algorithms.heterofl:HeteroFL",
        "each client trains the first channels of every layer that its capacity allows (Diao et al. 2021)",
    ),
    "inclusivefl": (
        "polyfed.algorithms.inclusivefl:InclusiveFL",
        "networks of several depths share layers, but for last blocks, which deeper ones teach (Liu et al. 2022)",
    ),
    "lg-fedavg": (
        "polyfed.algorithms.lg_fedavg:LGFedAvg",
        "private representations under one shared head (Liang et al. 2020)",
    ),
    "scalefl": (
        "polyfed.algorithms.scalefl:ScaleFL",
        "narrower and shallower networks, whose early exits learn from their deepest (Ilhan et al. 2023)",
    ),
    "moon": (
        "polyfed.algorithms.moon:Moon",
        "FedAvg with a contrast of representations by the received and the last local model (Li et al. 2021)",
    ),
    "scaffold": (
        "polyfed.algorithms.scaffold:Scaffold",
        "FedAvg whose steps are corrected by control variates, which travel too (Karimireddy et al. 2020)",
    ),
    "standalone": (
        "polyfed.algorithms.standalone:Standalone",
        "every client trains alone: what federating has to beat",
    ),
}

#: Spellings of papers and other libraries.
ALIASES = {
    "fed-avg": "fedavg",
    "fed-in": "fedin",
    "fed-mrl": "fedmrl",
    "fed-nova": "fednova",
    "fed-prox": "fedprox",
    "fed-proto": "fedproto",
    "feddistill": "fd",
    "fedmrle": "fedmrl-e",
    "inclusive-fl": "inclusivefl",
    "lgfedavg": "lg-fedavg",
    "local": "standalone",
}
