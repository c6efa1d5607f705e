"""Every field of a run's configuration, with its default and its meaning: the reference.

    saex train --config=experiments/base.py --dry_run
    saex train --config=experiments/base.py --dry_run --config.sae.k=64 --config.mesh.data=2

It runs as it stands, but a config of your own names only what differs from the defaults, as
``experiments/quickstart.py`` does. ``--config=experiments/base.py:relu`` takes the other method.
A field that says *run* is about where and how: it may change when a workdir is gone on with; all
others are part of what is learned, of the run's hash, and of what a workdir refuses to mix.
"""

from ml_collections import ConfigDict

SAES = {
    "topk": {
        "d_in": 256,  # width of the site's activations; no default
        "n": 4096,  # latents; no default
        "k": 32,  # active latents a row
        "aux_coefficient": 1 / 32,  # weight of AuxK, which revives dead latents; 0: without
        "k_aux": None,  # dead latents that may serve a row; None: the power of two next to d_in / 2
        "dead_after_tokens": 10_000_000,  # rows without firing after which a latent counts as dead
        "normalize": "unit_mean_square",  # weights see rows of mean square norm 1; "none": raw rows
        "b_dec_init": "geometric_median",  # of a sample of rows; or "mean", "zeros"
        "matmul_dtype": "float32",  # inputs of matmuls; "bfloat16": half the memory traffic
    },
    "relu": {
        "d_in": 256,  # width of the site's activations; no default
        "n": 4096,  # latents; no default
        "l1": 0.02,  # weight of the sum of latents times decoder norms, for normalised rows
        "l1_warmup_steps": 1000,  # steps over which that weight grows from 0
        "capacity": None,  # room in training, latents a row in the mean; 0: dense; None: what pays
        "decoder_norm": 0.1,  # norm of decoder rows at the start
        "dead_after_tokens": 10_000_000,  # rows without firing: a metric only, nothing is revived
        "normalize": "unit_mean_square",  # as above
        "b_dec_init": "mean",  # and b_enc to match; "zeros" (both) is the source's
        "matmul_dtype": "float32",  # as above
    },
    "batch_topk": {  # TopK over a batch
        "d_in": 256,  # width of the site's activations; no default
        "n": 4096,  # latents; no default
        "k": 32,  # mean of active latents a row
        "capacity": None,  # room in training, latents a row in the mean; 0: dense; None: 2 k
        "threshold_rate": 0.01,  # weight of a batch in the inference threshold's running mean
        "aux_coefficient": 1 / 32,  # as topk's
        "k_aux": None,  # as topk's
        "dead_after_tokens": 10_000_000,  # as topk's
        "normalize": "unit_mean_square",  # as topk's
        "b_dec_init": "geometric_median",  # as topk's
        "matmul_dtype": "float32",  # as topk's
    },
    "jump_relu": {  # one threshold a latent
        "d_in": 256,  # width of the site's activations; no default
        "n": 4096,  # latents; no default
        "l0": 1e-3,  # weight of the number of active latents, for normalised rows
        "l0_target": None,  # or the L0 to reach: l0 then weighs (L0 / l0_target - 1)^2
        "l0_warmup_steps": 10_000,  # steps over which that weight grows from 0
        "bandwidth": 0.001,  # width of the rectangle that thresholds feel; 0.03 for short runs
        "threshold": 0.001,  # of all latents at the start; 0.03 for short runs
        "capacity": None,  # room in training, latents a row in the mean; 0: dense; None: what pays
        "dead_after_tokens": 10_000_000,  # rows without firing: a metric only
        "normalize": "unit_mean_square",  # as above
        "b_dec_init": "geometric_median",  # as above
        "matmul_dtype": "float32",  # as above
    },
    "gated": {  # which latents are on apart from how large they are
        "d_in": 256,  # width of the site's activations; no default
        "n": 4096,  # latents; no default
        "l1": 0.1,  # weight of the sum of open gates, for normalised rows
        "l1_warmup_steps": 1000,  # steps over which that weight grows from 0
        "capacity": None,  # room in training, latents a row in the mean; 0: dense; None: what pays
        "dead_after_tokens": 10_000_000,  # rows without firing: a metric only
        "normalize": "unit_mean_square",  # as topk's
        "b_dec_init": "geometric_median",  # as topk's
        "matmul_dtype": "float32",  # as topk's
    },
    "matryoshka": {  # prefixes of the dictionary that each reconstruct alone
        "d_in": 256,  # width of the site's activations; no default
        "n": 4096,  # latents; no default
        "k": 32,  # mean of active latents a row
        "fractions": (1 / 32, 1 / 16, 1 / 8, 1 / 4, 17 / 32),  # shares of the latents, by group
        "sampled": 0,  # prefixes drawn anew in each step, instead of fractions; 0: none
        "capacity": None,  # room in training, latents a row in the mean; 0: dense; None: 2 k
        "threshold_rate": 0.01,  # weight of a batch in the inference threshold's running mean
        "aux_coefficient": 1 / 32,  # as topk's
        "k_aux": None,  # as topk's
        "dead_after_tokens": 10_000_000,  # as topk's
        "normalize": "unit_mean_square",  # as topk's
        "b_dec_init": "geometric_median",  # as topk's
        "matmul_dtype": "float32",  # as topk's
    },
    "abs_topk": {  # AbsTopK: signed latents
        "d_in": 256,  # width of the site's activations; no default
        "n": 4096,  # latents; no default
        "k": 32,  # active latents a row
        "dead_after_tokens": 10_000_000,  # rows without firing: a metric only
        "normalize": "unit_mean_square",  # as above
        "b_dec_init": "geometric_median",  # as above
        "matmul_dtype": "float32",  # as above
    },
    "multi_topk": {  # TopK for several k
        "d_in": 256,  # width of the site's activations; no default
        "n": 4096,  # latents; no default
        "k": 32,  # active latents a row at inference
        "wide": 4,  # times k: how many the wide sum keeps
        "wide_weight": 1 / 8,  # of the wide sum's loss
        "aux_coefficient": 1 / 32,  # as topk's
        "k_aux": None,  # as topk's
        "dead_after_tokens": 10_000_000,  # as topk's
        "normalize": "unit_mean_square",  # as above
        "b_dec_init": "geometric_median",  # as above
        "matmul_dtype": "float32",  # as above
    },
    "jump_relu_tanh": {  # JumpReLU with tanh sparsity
        "d_in": 256,  # width of the site's activations; no default
        "n": 4096,  # latents; no default
        "sparsity": 10.0,  # weight of the tanh, for rows of mean square d: it grows with d
        "sparsity_warmup_steps": None,  # steps over which it grows from 0; None: the whole run
        "tanh_scale": 4.0,  # of a latent times its decoder norm inside the tanh
        "pre_activation": 3e-6,  # weight of how far latents are below their thresholds
        "bandwidth": 2.0,  # width of the rectangle that thresholds feel
        "threshold": 0.1,  # of all latents at the start
        "initial_l0": 10_000,  # latents that fire in a row at the start, at most n / 2
        "dead_after_tokens": 10_000_000,  # rows without firing: a metric only
        "matmul_dtype": "float32",  # as above
    },
    "group_max": {  # the largest of each group
        "d_in": 256,  # width of the site's activations; no default
        "n": 4096,  # latents; no default
        "k": 32,  # groups, each with one active latent; divides n
        "aux_coefficient": 1 / 32,  # as topk's
        "k_aux": None,  # as topk's
        "dead_after_tokens": 10_000_000,  # as topk's
        "normalize": "unit_mean_square",  # as above
        "b_dec_init": "geometric_median",  # as above
        "matmul_dtype": "float32",  # as above
    },
    "kron": {  # an encoder of small heads, whose units are paired
        "d_in": 256,  # width of the site's activations; no default
        "n": 4096,  # latents, a multiple of base * extension; no default
        "k": 32,  # active latents a row
        "base": 2,  # base units of a head
        "extension": 4,  # extension units of a head
        "epsilon": 1e-5,  # under the root of a pair: bounds its slope at 0
        "aux_coefficient": 1 / 32,  # as topk's
        "k_aux": None,  # as topk's
        "dead_after_tokens": 10_000_000,  # as topk's
        "normalize": "unit_mean_square",  # as topk's
        "b_dec_init": "mean",  # or as topk's
        "matmul_dtype": "float32",  # as topk's
    },
    "msae": {  # several k at once
        "d_in": 256,  # width of the site's activations; no default
        "n": 4096,  # latents; no default
        "k": 32,  # active latents a row at inference
        "levels": (1, 2, 4, 8),  # multiples of k that must reconstruct, each
        "whole": True,  # all of relu(p) must, too: a dense pass more
        "weights": "uniform",  # of the levels; "reverse": the sparsest weighs most
        "dead_after_tokens": 10_000_000,  # rows without firing: a metric only
        "normalize": "unit_mean_square",  # as topk's
        "b_dec_init": "geometric_median",  # as topk's
        "matmul_dtype": "float32",  # as topk's
    },
    "top_afa": {  # as many latents as make up a row's norm
        "d_in": 256,  # width of the site's activations; no default
        "n": 4096,  # latents; no default
        "afa": 1 / 64,  # weight of the norm loss; L0 grows with it
        "aux_coefficient": 1 / 32,  # as topk's
        "k_aux": None,  # as topk's
        "dead_after_tokens": 10_000_000,  # as topk's
        "normalize": "unit_mean_square",  # as above
        "b_dec_init": "zeros",  # as above
        "matmul_dtype": "float32",  # as above
    },
    "mutual_choice": {  # BatchTopK that revives underused latents
        "d_in": 256,  # width of the site's activations; no default
        "n": 4096,  # latents; no default
        "k": 32,  # mean of active latents a row
        "capacity": None,  # room in training, latents a row in the mean; 0: dense; None: 2 k
        "threshold_rate": 0.01,  # weight of a batch in the inference threshold's running mean
        "aux_coefficient": 1 / 32,  # weight of aux_zipf
        "k_aux": None,  # underused latents that may serve a row; None: as topk's
        "underused": 0.5,  # share of what the fitted law gives to a latent's rank; 0: dead alone
        "density_rows": 1_000_000,  # memory of densities; until then only dead latents count
        "law_every": 100,  # steps between fits of the law
        "dead_after_tokens": 10_000_000,  # as topk's
        "normalize": "unit_mean_square",  # as above
        "b_dec_init": "geometric_median",  # as above
        "matmul_dtype": "float32",  # as above
    },
    "feature_choice": {  # latents choose their rows
        "d_in": 256,  # width of the site's activations; no default
        "n": 4096,  # latents; no default
        "k": 32,  # mean of active latents a row
        "choice_from": 0.8,  # share of the run after which latents choose; 0: from the start
        "threshold_rate": 0.01,  # weight of a batch in the inference thresholds' running means
        "aux_coefficient": 1 / 32,  # as mutual_choice's
        "k_aux": None,  # as mutual_choice's
        "underused": 0.5,  # as mutual_choice's
        "density_rows": 1_000_000,  # as mutual_choice's
        "law_every": 100,  # as mutual_choice's
        "dead_after_tokens": 10_000_000,  # as topk's
        "normalize": "unit_mean_square",  # as above
        "b_dec_init": "geometric_median",  # as above
        "matmul_dtype": "float32",  # as above
    },
    "adaptive_k": {  # a k for each row, by a probe; reads the column "complexity"
        "d_in": 256,  # width of the site's activations; no default
        "n": 4096,  # latents; no default
        "k_min": 20,  # active latents of the simplest row ...
        "k_max": 320,  # ... and of the most complex one; both are approached
        "steep": 6.0,  # of the sigmoid between them
        "lowest": 0.0,  # value of the column that is complexity 0
        "highest": 10.0,  # value of the column that is complexity 10
        "tune_from": 0.9,  # share of the run after which the probe is tuned
        "probe_weight": 0.9,  # of the probe's loss
        "l1": 0.005,  # weight of the L1 term; 0: without
        "aux_coefficient": 1 / 32,  # as topk's
        "k_aux": None,  # as topk's
        "dead_after_tokens": 10_000_000,  # as topk's
        "normalize": "unit_mean_square",  # as above
        "b_dec_init": "geometric_median",  # as above
        "matmul_dtype": "float32",  # as above
    },
    "group_bias": {  # biases steered to how often latents shall fire
        "d_in": 256,  # width of the site's activations; no default
        "n": 4096,  # latents; no default
        "groups": 10,  # of latents, each with a target of its own
        "most": 0.1,  # the first group's target: the share of rows in which a latent may fire
        "least": 1e-3,  # the last group's; those between fall geometrically
        "every": 50,  # steps between adaptations of the biases
        "rate_down": 0.01,  # how far a bias falls, of the latent's largest pre-activation
        "rate_up": 0.01,  # how far that of a silent latent rises, of its group's mean largest
        "rarely": 1e-6,  # share of rows up to which a latent counts as silent
        "relu": False,  # size with the bias instead of without
        "dead_after_tokens": 10_000_000,  # rows without firing: a metric only
        "matmul_dtype": "float32",  # as topk's
    },
    "transcoder": {  # an MLP's output from its input: name columns {"y": "blocks.1.mlp_out"}
        "d_in": 256,  # width of the site's activations; no default
        "d_out": 256,  # width of column y; no default
        "n": 4096,  # latents; no default
        "l1": 0.01,  # weight of the sum of latents, for normalised rows
        "l1_warmup_steps": 1000,  # steps over which that weight grows from 0
        "capacity": None,  # room in training, latents a row in the mean; 0: dense; None: what pays
        "dead_after_tokens": 10_000_000,  # rows without firing: a metric only
        "normalize": "unit_mean_square",  # as above, x and y each
        "b_init": "mean",  # where b_in and b_dec start; or "geometric_median", "zeros"
        "matmul_dtype": "float32",  # as above
    },
    "skip_transcoder": {  # TopK latents beside a linear path; columns as transcoder
        "d_in": 256,  # width of the site's activations; no default
        "d_out": 256,  # width of column y; no default
        "n": 4096,  # latents; no default
        "k": 32,  # active latents a row
        "aux_coefficient": 0.0,  # weight of AuxK
        "k_aux": None,  # latents that may serve a row; None: the power of two next to d_out / 2
        "dead_after_tokens": 10_000_000,  # as topk's
        "normalize": "unit_mean_square",  # as above, x and y each
        "skip": True,  # the linear path; False: a TopK transcoder
        "matmul_dtype": "float32",  # as above
    },
    "crosscoder": {  # one code for several sites: site "a+b"
        "d_in": 256,  # width of all sites together; no default
        "n": 4096,  # latents; no default
        "widths": (),  # of each site: (256, 256); (): one site
        "l1": 0.02,  # weight of latents times the sum over sites of decoder norms
        "l1_warmup_steps": 1000,  # steps over which that weight grows from 0
        "capacity": None,  # room in training, latents a row in the mean; 0: dense; None: what pays
        "decoder_norm": 0.1,  # norm of decoder rows at each site at the start
        "dead_after_tokens": 10_000_000,  # rows without firing: a metric only
        "normalize": "unit_mean_square",  # as above, each site
        "b_dec_init": "mean",  # and b_enc to match; "zeros" (both) is the source's
        "matmul_dtype": "float32",  # as above
    },
    "batch_crosscoder": {  # a crosscoder that keeps a batch's largest
        "d_in": 256,  # width of all sites together; no default
        "n": 4096,  # latents; no default
        "widths": (),  # of each site: (256, 256); (): one site
        "k": 32,  # mean of active latents a row
        "capacity": None,  # as batch_topk's
        "threshold_rate": 0.01,  # as batch_topk's
        "decoder_norm": 1.0,  # norm of decoder rows at each site at the start
        "aux_coefficient": 1 / 32,  # as topk's
        "k_aux": None,  # as topk's
        "dead_after_tokens": 10_000_000,  # as topk's
        "normalize": "unit_mean_square",  # as above, each site
        "b_dec_init": "geometric_median",  # as above
        "matmul_dtype": "float32",  # as above
    },
    "matching_pursuit": {  # MP-SAE: the encoder is an unrolled pursuit
        "d_in": 256,  # width of the site's activations; no default
        "n": 4096,  # atoms; no default
        "k": 32,  # steps: at most so many are active
        "tolerance": 0.0,  # inference stops where the residual's norm is at most this
        "stop_training": False,  # training too
        "atom_dropout": 0.0,  # share of atoms withheld from a batch at first
        "dropout_steps": 0,  # steps with withheld atoms
        "aux_coefficient": 1 / 32,  # weight of AuxK, on what the pursuit leaves over
        "k_aux": None,  # as topk's
        "dead_after_tokens": 10_000_000,  # as topk's
        "normalize": "unit_mean_square",  # as above
        "b_dec_init": "geometric_median",  # as above
        "matmul_dtype": "float32",  # of the choice of atoms
    },
    "gradient_topk": {  # TopK by effect on the loss: columns {"gradient": "SITE.gradient"}
        "d_in": 256,  # width of the site's activations; no default
        "n": 4096,  # latents; no default
        "k": 32,  # active latents a row
        "beta": 1.0,  # weight of the effect in the choice; at the start the mean effect is 1
        "aux_coefficient": 1 / 32,  # as topk's
        "k_aux": None,  # as topk's
        "dead_after_tokens": 10_000_000,  # as topk's
        "normalize": "unit_mean_square",  # as above
        "b_dec_init": "geometric_median",  # as above
        "matmul_dtype": "float32",  # as above
    },
    "multi_layer": {  # one dictionary for the rows of several sites: site "a+b+c"
        "d_in": 256,  # width of one site's activations; no default
        "n": 4096,  # latents; no default
        "sites": 1,  # how many
        "k": 32,  # active latents an example: a row of one site
        "aux_coefficient": 1 / 32,  # as topk's
        "k_aux": None,  # as topk's
        "dead_after_tokens": 10_000_000,  # examples without firing, as topk's
        "b_dec_init": "geometric_median",  # as above
        "matmul_dtype": "float32",  # as above
    },
    "variational": {  # latents with noise in training
        "d_in": 256,  # width of the site's activations; no default
        "n": 4096,  # latents; no default
        "k": 32,  # active latents a row
        "variance": "learned",  # of the noise; "fixed": 1, "none": no noise
        "log_variance": -6.0,  # at the start, where it is learned
        "kl_coefficient": 1e-5,  # weight of the divergence from N(0, 1), summed over latents
        "kl_warmup_steps": 1000,  # steps over which that weight grows from 0
        "kl_over": "all",  # latents whose divergence counts; or "selected"
        "aux_coefficient": 1 / 32,  # as topk's
        "k_aux": None,  # as topk's
        "dead_after_tokens": 10_000_000,  # as topk's
        "normalize": "unit_mean_square",  # as topk's
        "b_dec_init": "geometric_median",  # as topk's
        "matmul_dtype": "float32",  # as topk's
    },
    "guided": {  # latents that are taught labels
        "d_in": 256,  # width of the site's activations; no default
        "n": 4096,  # latents; no default
        "k": 32,  # active latents a row
        "concepts": 1,  # labels a row, in column "label"; they take the first latents
        "label_coefficient": 1.0,  # weight of the labels' cross-entropy
        "positive_weight": 1.0,  # weight of a label that is 1 against one that is 0
        "aux_coefficient": 1 / 32,  # as topk's
        "k_aux": None,  # as topk's
        "dead_after_tokens": 10_000_000,  # as topk's
        "normalize": "unit_mean_square",  # as topk's
        "b_dec_init": "geometric_median",  # as topk's
        "matmul_dtype": "float32",  # as topk's
    },
}


def get_config(arg: str = "topk") -> ConfigDict:
    return ConfigDict(
        {
            "sae": {"name": arg, **SAES[arg]},  # the dictionary: a row of saex.sae.SAES
            "site": "blocks.1.resid_post",  # hook point it is trained on: a column of the store
            "columns": {},  # where other columns of the method lie: {"y": "blocks.1.mlp_out"}
            "steps": 1000,  # budget in updates, or ...
            "tokens": None,  # ... in rows; exactly one of the two; no default
            "seed": 0,  # of weights, data order and random draws
            "data_seed": None,  # of the data order alone; None: seed
            "members": (),  # a stack: trained together, ({"seed": 1, "optim.lr": 1e-3}, ...)
            "subject": {  # the model whose activations are taken: a row of MODELS, or None
                "name": "pocket-lm",
                "matmul": "bfloat16",  # inputs of its matmuls; or "float32"
            },
            "text": {  # what it reads: a row of saex.data.SOURCES (stdlib, files, table, chat)
                "name": "stdlib",
                "path": "",  # another standard library's folder; "": the running Python's own
            },
            "harvest": {  # how text becomes a store of activations
                "sites": (),  # sites to harvest besides the run's own
                "rows": 1_000_000,  # rows of the training store, at most
                "heldout_rows": 200_000,  # rows of the held-out store, at most
                "context": 0,  # tokens a context; 0: as many as the model was made for
                "batch": 32,  # contexts a forward pass
                "dtype": "bfloat16",  # of activations on disk; or "float32", or "int8" with scales
                "calibration_rows": 16_384,  # on which the scales of int8 are found
                "segment_rows": 131_072,  # rows after which a segment is committed
                "chunk_rows": 256,  # rows a chunk of the store
                "shuffle": True,  # put the rows of each training segment in random order
                "gradients": (),  # sites of which the loss's gradient is a column SITE.gradient
                "norms": True,  # a column SITE.norm for each site
                "pack": False,  # several documents a context; without, short ones are padded
                "parts": 1,  # written side by side by the processes of a job
                "non_finite": "refuse",  # rows with NaN or infinity; or "drop"
                "check_room": True,  # run: refuse a store that the disk has no room for
            },
            "store": None,  # run: a store (a hash splits it), or a folder with train/, heldout/
            "live": {  # rows made while the run goes on, instead of being read from a store
                "enabled": False,  # sections text, harvest, stream hold; a chunk: a forward pass
                "tee": False,  # run: write them to WORKDIR/store/train as well
                "devices": 0,  # run: the model on so many last devices; 0: on the mesh's
            },
            "stream": {  # how rows become batches
                "batch": 4096,  # rows a step, over all processes
                "window": 0,  # chunks shuffled together; 0: 64, or as many as hold 131,072 rows
                "exclude_positions": (0,),  # positions left out: the first is often an outlier
                "exclude_tokens": (),  # token ids left out
                "exclude": {},  # column -> values by which rows are left out: {"label": (3, 7)}
                "max_norm": 0.0,  # rows beyond so many times the median norm left out; 0: none
                "lanes": 8,  # a multiple of the processes; each reads the lanes of its own rows
                "threads": 1,  # run: threads that make batches; 0: on demand
                "prefetch": 4,  # run: batches made ahead
                "on_device": False,  # run: keep windows on the devices, pick batches there
                "checksums": False,  # run: check every chunk as it is read
            },
            "optim": {  # Adam with linear warm-up and decay
                "lr": None,  # peak learning rate; None: 2e-4 / sqrt(n / 2^14)
                "b1": 0.9,  # decay of Adam's first moment
                "b2": 0.999,  # decay of Adam's second moment
                "eps": 1e-8,  # Adam's
                "warmup": 0.02,  # share of the run over which the rate rises from 0
                "decay": 0.2,  # share of the run, at its end, over which it falls to 0
                "clip": None,  # largest global gradient norm; None: none; 0.01 for short runs
                "moments": "float32",  # how Adam's moments are kept; "bfloat16": half the memory
            },
            "mesh": {  # run: the devices
                "data": 1,  # groups that the rows of a batch are split over
                "model": 1,  # groups that the latents are split over
                "sweep": 1,  # groups that the members of a stack are spread over
                "strategy": "tp",  # how state is stored: "tp", or "fsdp" (split over data as well)
            },
            "checkpoint": {  # run
                "every": 500,  # steps between checkpoints
                "keep": 2,  # newest ones that stay
            },
            "log": {  # run
                "every": 10,  # steps between lines of metrics.jsonl
                "tensorboard": True,  # write event files too
            },
            "eval": {  # run: what is measured on held-out text
                "rows": 1_000_000,  # rows for dead and dense latents, where there are as many
                "contexts": 256,  # contexts for cross-entropy with the reconstruction in place
                "controls": True,  # score PCA, an untrained dictionary and a per-token mean too
                "every": 0,  # steps between small evaluations during the run; 0: only at the end
            },
            "report": {  # run: the HTML page
                "latents": 24,  # how many are shown
                "contexts": 8,  # top contexts of each
                "enabled": True,  # write the page
            },
        }
    )
