"""The protocol of published likelihoods: a VAE on binarised pixels, measured
by the importance-weighted bound.

Exemplar-VAE (Norouzi et al. 2020) trains on pixels of 0 and 1, drawn anew each
epoch with the grey values as probabilities, keeps the weights of the epoch
whose ELBO on held-out images is best, and measures with 5,000 samples per
image. quality.md has the result. Beyond run_vae.py this has ``binarise``,
``--hold-out``, ``--warm-up``, ``--weight-decay`` and ``--iwae``. Muon trains
every --arch.

examples:
  python docs/published_protocol.py    80 minutes of one core, then 10 more
  python docs/published_protocol.py --epochs 20 --warm-up 4 --iwae 100
"""

from functools import partial

from scratchgen import plots, tree, vae  # before NumPy: sets NumPy's threads
from scratchgen.data import first_images, load_fashion_mnist, scale
from scratchgen.evaluate.metrics import active_units
from scratchgen.machinery import cli
from scratchgen.machinery.parallel import in_parallel, ranks_for, sharded
from scratchgen.machinery.run import INIT, TEST, Run, rng_for
from scratchgen.muon import muon_step
from scratchgen.optim import cosine_decay, flush_denormals, init_moments
from scratchgen.trained import VAE

import numpy as np

EPOCHS = {"gated": 700, "mlp": 700, "conv": 700}  # by default
SHARD = 64  # images that one rank (a process) measures at a time
HELD_OUT = 5  # a purpose for `rng_for`, besides those of `run`


def binarise(images, rng):
    """uint8 images to float32 pixels of 0 or 1, at random: 1 with probability grey value / 255; any shape."""
    return (rng.random(images.shape, dtype=np.float32) < scale(images, 0, 1)).astype(np.float32)


def binarised_test(images):
    """The test images, binarised with a fixed seed: every run is measured on the same pixels."""
    return binarise(images, np.random.default_rng(2008))


def parse_arguments(argv):
    parser = cli.run_parser(
        "docs/published_protocol.py",
        __doc__,
        EPOCHS,
        batch_size=128,
        lr=2e-3,
        out="runs/vae-binarized",
    )
    natural = cli.number(int, 0)
    parser.flag("--latent-dim", "dimensions of z", type=cli.number(int, 2, high=10_000), default=40, metavar="D")
    help = (
        "raise the weight of the KL from 0 to 1 over the first N epochs, so that no latent dimension is given up "
        "before the decoder has learned to use it"
    )
    parser.flag("--warm-up", help, type=natural, default=100, metavar="N")
    help = "shrink every matrix of weights by W times the learning rate at each step"
    parser.flag("--weight-decay", help, type=cli.number(float, 0, high=1e9), default=0.02, metavar="W")
    help = "hold out the last N training images, and keep the weights of the epoch whose ELBO on them is best"
    parser.flag("--hold-out", help, type=cli.number(int, 1), default=10_000, metavar="N")
    parser.flag("--iwae", "samples per image, for the final bound", type=cli.number(int, 1), default=5000, metavar="K")
    args = parser.parse_args(argv)
    args.epochs = args.epochs or EPOCHS[args.arch]
    if args.lr * args.weight_decay >= 1:
        parser.error(f"--weight-decay {args.weight_decay} is out of range: times --lr {args.lr} it must be below 1")
    return args


def main(argv=None):
    args = parse_arguments(argv)
    ranks = ranks_for(args.workers)
    data = load_fashion_mnist(args.data, labels=False)
    train_images = first_images(data["train_images"], args.train_images)
    if args.hold_out >= len(train_images):
        raise cli.UsageError(f"--hold-out {args.hold_out} leaves none of {len(train_images)} images to train on")
    train_images, held_out_images = np.split(train_images, [len(train_images) - args.hold_out])
    x_held_out = binarise(held_out_images, rng_for(args.seed, HELD_OUT))
    x_test = binarised_test(data["test_images"])

    init, encode, decode = vae.VAES[args.arch]
    params = init(rng_for(args.seed, INIT), args.latent_dim)
    arrays = {"params": params, "moments": init_moments(params), "best": tree.map(np.copy, params)}
    own = ("arch", "latent_dim", "warm_up", "weight_decay", "hold_out")
    settings = {"model": "vae on binarised pixels"} | {name: getattr(args, name) for name in own}
    run = Run(args, settings, (train_images, data["test_images"]), arrays, ranks)
    params, moments, best = (run.arrays[name] for name in ("params", "moments", "best"))
    model = VAE(run.config, run.arrays)
    best_model = VAE(run.config, {"params": best})
    beta = np.float32(1)  # of the warm-up

    def loss(params, batch):
        return vae.negative_elbo(partial(encode, params), partial(decode, params), batch, beta)

    def both_terms(x, eps):  # -> (N, 2)
        return np.stack(vae.elbo_terms(model.encode, model.decode, (x, eps)), axis=1)

    value_and_grad = sharded(loss, ranks, params, run.shard_size, args.batch_size)
    evaluate = in_parallel(both_terms, SHARD, ranks)

    def means(x):  # with the same eps after each epoch
        eps = rng_for(args.seed, TEST).standard_normal((len(x), args.latent_dim), dtype=np.float32)
        reconstruction, kl = evaluate(x, eps).mean(axis=0, dtype=np.float64).tolist()
        return {"elbo": reconstruction - kl, "reconstruction": reconstruction, "kl": kl}

    print(f"VAE {args.arch}, binarised pixels: {tree.size(params):,} parameters")
    print(f"{len(train_images):,} training images, {args.hold_out:,} held out")
    with ranks, run:
        for _epoch in run.epochs():
            for step, images in run.minibatches():
                x = binarise(images, run.rng)
                eps = run.rng.standard_normal((len(x), args.latent_dim), dtype=np.float32)
                beta = np.float32(min(1, step / max(1, args.warm_up * run.steps_per_epoch)))
                value, terms, gradient = value_and_grad(params, (x, eps))
                if step % 100 == 0:
                    flush_denormals(ranks.own(moments))  # denormals become 0: processors are slow with them
                lr = cosine_decay(step, run.total_steps, args.lr)
                # Weight decay (Loshchilov and Hutter 2019): what only a few images call for decays.
                for leaf in tree.leaves(ranks.own(params)):
                    if leaf.ndim >= 2:
                        leaf *= 1 - lr * args.weight_decay
                muon_step(params, gradient, moments, step, lr)
                run.record(value, terms)

            train = {"elbo": run.epoch_means["reconstruction"] - run.epoch_means["kl"]} | run.epoch_means
            test = means(x_test)
            held_out = {"elbo": means(x_held_out)["elbo"]}
            if all(held_out["elbo"] >= row["held_out_elbo"] for row in run.log):
                tree.map(np.copyto, best, params)
            summary = f"ELBO: train {train['elbo']:.2f}, held-out {held_out['elbo']:.2f}, test {test['elbo']:.2f} nats"
            run.end_epoch({"train": train, "test": test, "held_out": held_out}, summary)

        row = max(run.log, key=lambda row: row["held_out_elbo"])
        print(f"best held-out ELBO: {row['held_out_elbo']:.2f} nats, after epoch {row['epoch']}; there, test", end=" ")
        print("ELBO {test_elbo:.2f} = {test_reconstruction:.2f} - {test_kl:.2f} nats".format(**row))
        plots.save(plots.vae_loss(run.log, None), args.out / "loss.png")
        active = int(active_units(best_model.encode(x_test)[0]).sum())
        numbers = {name: row[f"test_{name}"] for name in ("elbo", "reconstruction", "kl")} | {"active_units": active}
        run.write_metrics(numbers, best)  # before what takes ten minutes
        bound = best_model.importance_weighted_bound(x_test, args.iwae, args.seed, ranks)
        run.write_metrics(numbers | {f"iwae_{args.iwae}": bound}, best)
        print(f"{active} of {args.latent_dim} latent dimensions active")
        print(f"log p(x) is at least {bound:.2f} nats: the importance-weighted bound, {args.iwae:,} samples per image")


if __name__ == "__main__":
    cli.run(main)
