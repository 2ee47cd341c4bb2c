"""Train a variational autoencoder on FashionMNIST, measure its evidence lower
bound, and draw what it learned.

examples:
  python run_vae.py                               about a minute on two cores
  python run_vae.py --arch conv                   convolutions, not dense layers
  python run_vae.py --latent-dim 2 --out runs/2d  a 2-D latent space, in a plot
  python run_vae.py --beta 4 --out runs/beta-4    fewer latent dimensions in use
"""

from functools import partial

from scratchgen import plots, tree, vae  # before NumPy: sets NumPy's threads
from scratchgen.data import CLASSES, first_images, load_fashion_mnist, scale
from scratchgen.machinery import cli
from scratchgen.machinery.parallel import in_parallel, ranks_for, sharded
from scratchgen.machinery.run import INIT, SAMPLES, TEST, Run, rng_for
from scratchgen.muon import muon_step
from scratchgen.optim import adam_step, cosine_decay, flush_denormals, init_moments
from scratchgen.trained import VAE

import numpy as np

EPOCHS = {"mlp": 22, "gated": 12, "conv": 7}  # by default
SHARD = 64  # test images that one rank (a process) measures at a time


def parse_arguments(argv):
    networks = "mlp: dense layers; gated: dense layers with gates; conv: convolutions"
    parser = cli.run_parser("run_vae.py", __doc__, EPOCHS, batch_size=128, lr=3e-3, out="runs/vae", networks=networks)
    parser.flag("--latent-dim", "dimensions of z", type=cli.number(int, 2, high=10_000), default=20, metavar="D")
    help = "the two dimensions of z to plot in latents_I_J.png (default: those with most KL)"
    parser.flag("--latents", help, type=cli.number(int, 0), nargs=2, metavar=("I", "J"))
    help = "weight of the KL in the loss: 1 for the ELBO, 0 for no KL (z is still drawn)"
    parser.flag("--beta", help, type=cli.number(float, 0, high=1000), default=1.0, metavar="B")
    args = parser.parse_args(argv)
    args.epochs = args.epochs or EPOCHS[args.arch]
    if args.latents and (max(args.latents) >= args.latent_dim or args.latents[0] == args.latents[1]):
        parser.error(f"--latents needs two different dimensions from 0 to {args.latent_dim - 1}")
    return args


def main(argv=None):
    args = parse_arguments(argv)
    ranks = ranks_for(args.workers)
    data = load_fashion_mnist(args.data)
    train_images = first_images(data["train_images"], args.train_images)
    x_test = scale(data["test_images"], 0, 1)
    eps_test = rng_for(args.seed, TEST).standard_normal((len(x_test), args.latent_dim), dtype=np.float32)

    init, encode, decode = vae.VAES[args.arch]
    params = init(rng_for(args.seed, INIT), args.latent_dim)
    arrays = {"params": params, "moments": init_moments(params)}
    settings = {"model": "vae", "arch": args.arch, "latent_dim": args.latent_dim, "beta": args.beta}
    run = Run(args, settings, (train_images, data["test_images"]), arrays, ranks)
    params = run.arrays["params"]  # in memory that forked ranks share
    moments = run.arrays["moments"]
    optimiser_step = adam_step if args.arch == "mlp" else muon_step  # docs/quality.md compares them
    model = VAE(run.config, run.arrays)

    # params comes first: the gradient is with respect to the first argument. batch is (x, eps): random numbers are
    # drawn outside, so that the loss is pure.
    def loss(params, batch):
        return vae.negative_elbo(partial(encode, params), partial(decode, params), batch, args.beta)

    def both_terms(x, eps):  # -> (N, 2)
        return np.stack(vae.elbo_terms(model.encode, model.decode, (x, eps)), axis=1)

    # Like gradients.value_and_grad, but each rank (a process) differentiates some shards of the minibatch.
    value_and_grad = sharded(loss, ranks, params, run.shard_size, args.batch_size)
    evaluate = in_parallel(both_terms, SHARD, ranks)

    print(f"VAE {args.arch}: {tree.size(params):,} parameters, {len(train_images):,} training images")
    with ranks, run:  # from here, every rank runs the same lines and updates the parameters that it owns
        for _epoch in run.epochs():
            for step, images in run.minibatches():
                x = scale(images, 0, 1)
                eps = run.rng.standard_normal((len(x), args.latent_dim), dtype=np.float32)
                value, terms, gradient = value_and_grad(params, (x, eps))
                if step % 100 == 0:
                    flush_denormals(ranks.own(moments))  # denormals become 0: processors are slow with them
                optimiser_step(params, gradient, moments, step, cosine_decay(step, run.total_steps, args.lr))
                run.record(value, terms)

            reconstruction, kl = evaluate(x_test, eps_test).mean(axis=0, dtype=np.float64).tolist()
            train = {"elbo": run.epoch_means["reconstruction"] - run.epoch_means["kl"]} | run.epoch_means
            test = {"elbo": reconstruction - kl, "reconstruction": reconstruction, "kl": kl}
            summary = f"ELBO: train {train['elbo']:.2f}, test {test['elbo']:.2f} = {reconstruction:.2f} - {kl:.2f} nats"
            run.end_epoch({"train": train, "test": test}, summary)

        floor = vae.entropy_floor(x_test)
        numbers = {name: run.log[-1][f"test_{name}"] for name in ("elbo", "reconstruction", "kl")}
        numbers |= {"entropy_floor": floor}
        run.write_metrics(numbers, params)
        print("test ELBO {elbo:.2f} = {reconstruction:.2f} - {kl:.2f} nats per image;".format(**numbers), end=" ")
        print(f"no model gets above {-floor:.2f}, which is -(entropy of the grey pixels)")

        plots.save(plots.vae_loss(run.log, floor), args.out / "loss.png")
        x = x_test[np.arange(40) % len(x_test)]
        mu, _ = model.encode(x)
        plots.save(plots.reconstructions(x, model.generate(mu)), args.out / "reconstructions.png")
        between = plots.interpolation(model.generate, mu[:8], mu[8:16], x[:8], x[8:16])
        plots.save(between, args.out / "interpolation.png")
        z = rng_for(args.seed, SAMPLES).standard_normal((100, args.latent_dim), dtype=np.float32)
        title = f"variational autoencoder, {args.arch}: decoded from $z \\sim N(0, I)$"
        plots.save(plots.grid(model.generate(z), 10, title), args.out / "samples.png")
        codes = in_parallel(lambda x: np.stack(model.encode(x), axis=1), SHARD, ranks)(x_test)  # (N, 2, D)
        kl = vae.kl_per_dimension(codes[:, 0], codes[:, 1]).mean(axis=0)
        plots.save(plots.codes_by_class(codes[:, 0], kl, data["test_labels"], CLASSES), args.out / "codes.png")
        i, j = args.latents or sorted(np.argsort(kl)[-2:].tolist())
        plots.save(plots.plot_latents(model.generate, args.latent_dim, i, j), args.out / f"latents_{i}_{j}.png")
        print(f"figures and numbers are in {args.out}")
    model.log = run.log
    return model


if __name__ == "__main__":
    cli.run(main)
