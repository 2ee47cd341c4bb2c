"""Train a variational autoencoder on FashionMNIST, measure its evidence lower bound, and draw what it learned.

examples:
  python run_vae.py                                one to two minutes on two cores
  python run_vae.py --arch conv                    convolutions in place of dense layers
  python run_vae.py --latent-dim 2 --out runs/2d   a latent space that latents_0_1.png shows whole
  python run_vae.py --arch gated --binarize --latent-dim 40 --hold-out 10000 --epochs 700 --warm-up 100 \\
    --lr 2e-3 --weight-decay 0.02 --out runs/vae-binarized
                                                   the protocol of published numbers; docs/quality.md has the rest
"""

import math
import time
from functools import partial

from scratchgen import checkpoint, cli, plots, tree, vae  # before NumPy, whose threads it sets up
from scratchgen.data import binarise, binarised_test, load_fashion_mnist, minibatches, scale
from scratchgen.gradients import in_parallel, sharded_value_and_grad
from scratchgen.optim import cosine_decay, init_adam, muon_step
from scratchgen.runtime import Workers

import numpy as np
from tqdm import tqdm

EPOCHS = {"mlp": 17, "gated": 12, "conv": 7}  # by default
BATCH = 128  # images a gradient step, by default
SHARD = 64  # images that one worker differentiates at a time
INIT, NOISE, ORDER, TEST, SAMPLES, HELD_OUT = range(6)  # what a stream of random numbers is for


def parse_arguments():
    parser = cli.parser(__doc__, EPOCHS, batch_size=BATCH, lr=3e-3, out="runs/vae")
    flag = parser.add_argument
    flag(
        "--latent-dim",
        type=cli.number(int, 2, high=10_000),
        default=20,
        metavar="D",
        help="dimensions of z (default: 20)",
    )
    flag(
        "--latents",
        type=cli.number(int, 0),
        nargs=2,
        metavar=("I", "J"),
        help="the dimensions that latents_I_J.png varies (default: the two with most KL)",
    )
    flag(
        "--beta",
        type=cli.number(float, 0),
        default=1.0,
        metavar="B",
        help="weight of the KL in the loss: 1 for the ELBO, 0 for an autoencoder (default: 1)",
    )
    flag(
        "--warm-up",
        type=cli.number(int, 0),
        default=0,
        metavar="N",
        help="raise that weight from 0 over the first N epochs, so that no latent dimension is given up before the "
        "decoder has learned to use it (default: 0)",
    )
    flag(
        "--binarize",
        action="store_true",
        help="pixels of 0 and 1, on with probability their grey value: drawn anew each epoch, for the test images once",
    )
    flag(
        "--weight-decay",
        type=cli.number(float, 0),
        default=0.0,
        metavar="W",
        help="shrink every matrix of weights by W times the learning rate at each step; pays in long runs (default: 0)",
    )
    flag(
        "--hold-out",
        type=cli.number(int, 0),
        default=0,
        metavar="N",
        help="hold out the last N training images, and keep the weights of the epoch whose ELBO on them is best "
        "(default: 0, those of the last epoch)",
    )
    args = parser.parse_args()
    args.epochs = args.epochs or EPOCHS[args.arch]
    if args.lr * args.weight_decay >= 1:
        parser.error(f"--weight-decay {args.weight_decay} is out of range: times --lr {args.lr} it must be below 1")
    if args.latents and (max(args.latents) >= args.latent_dim or args.latents[0] == args.latents[1]):
        parser.error(f"--latents needs two different dimensions from 0 to {args.latent_dim - 1}")
    return args


def main():
    args = parse_arguments()
    data = load_fashion_mnist(args.data)
    train = cli.first_images(data["train_images"], args.train_images)
    if args.hold_out >= len(train):
        raise cli.UsageError(f"--hold-out {args.hold_out} leaves none of {len(train)} images to train on")
    train, held_out = np.split(train, [len(train) - args.hold_out])
    x_test = binarised_test(data["test_images"]) if args.binarize else scale(data["test_images"], 0, 1)
    workers = Workers(args.workers)

    def stream(*purpose):
        return np.random.default_rng([args.seed, *purpose])

    init, encode, decode = vae.VAES[args.arch]
    params = init(stream(INIT), args.latent_dim)
    arrays = {"params": params, "moments": init_adam(params)}
    if args.hold_out:
        arrays["best"] = tree.map(np.copy, params)
    arrays = workers.share(arrays)
    params, noise = arrays["params"], stream(NOISE)
    beta = workers.share(np.ones(1, np.float32))
    config = {"model": "vae"} | checkpoint.settings(args) | {"train_images": checkpoint.fingerprint(train)}
    args.out.mkdir(parents=True, exist_ok=True)
    state, save = checkpoint.begin(args.out / "checkpoint.npz", config, arrays, noise, args.resume)

    def loss(params, batch):
        return vae.negative_elbo(partial(encode, params), partial(decode, params), batch, beta[0])

    def both_terms(x, eps):  # -> (N, 2)
        return np.stack(vae.elbo_terms(partial(encode, params), partial(decode, params), (x, eps)), axis=1)

    gradient_of = sharded_value_and_grad(loss, SHARD, workers)
    terms_of = in_parallel(both_terms, SHARD, workers)
    x_held_out = binarise(held_out, stream(HELD_OUT)) if args.binarize else scale(held_out, 0, 1)

    def evaluate(x):
        eps = stream(TEST).standard_normal((len(x), args.latent_dim), dtype=np.float32)  # the same after each epoch
        mean = terms_of(x, eps).mean(axis=0, dtype=np.float64)
        return {"reconstruction": float(mean[0]), "kl": float(mean[1])}

    print(f"VAE {args.arch}, D = {args.latent_dim}: {tree.size(params):,} parameters, {len(train):,} training images")
    steps = math.ceil(len(train) / args.batch_size)  # in one epoch
    began = time.monotonic() - state["seconds"]
    done = state["step"] // steps * len(train) + state["step"] % steps * args.batch_size
    bar = cli.progress(args.epochs * len(train), done)
    with bar, cli.StopBetweenSteps() as stop:
        for epoch in range(state["step"] // steps, args.epochs):
            # The order depends on seed and epoch alone: a run that resumes inside the epoch skips what it has seen.
            for images in minibatches(train, args.batch_size, stream(ORDER, epoch), skip=state["step"] % steps):
                stop.here(save)
                x = binarise(images, noise) if args.binarize else scale(images, 0, 1)
                eps = noise.standard_normal((len(x), args.latent_dim), dtype=np.float32)
                beta[0] = args.beta * min(1, (state["step"] + 1) / max(1, args.warm_up * steps))
                (value, means), gradient = gradient_of(params, (x, eps))
                cli.check_finite(value, state["step"])
                lr = cosine_decay(state["step"], args.epochs * steps, args.lr)
                state["step"] += 1
                muon_step(params, gradient, arrays["moments"], state["step"], lr, args.weight_decay)

                cli.add_to_epoch(state["sums"], means, len(x) / len(train))
                state["seconds"] = time.monotonic() - began
                bar.set_postfix(loss=f"{value:.1f}", refresh=False)
                bar.update(len(x))

            row = {"epoch": epoch + 1, "step": state["step"]}
            for part, means in (("train", state["sums"]), ("test", evaluate(x_test))):
                row[f"{part}_elbo"] = means["reconstruction"] - means["kl"]
                row |= {f"{part}_{name}": mean for name, mean in means.items()}
            cli.check_finite(row["test_elbo"], state["step"])
            if args.hold_out:
                means = evaluate(x_held_out)
                row["held_out_elbo"] = means["reconstruction"] - means["kl"]
                if row["held_out_elbo"] >= max(r["held_out_elbo"] for r in [*state["log"], row]):
                    tree.map(np.copyto, arrays["best"], params)
            row["seconds"] = state["seconds"] = time.monotonic() - began
            state["log"].append(row)
            state["sums"] = {}
            checkpoint.write_log(args.out / "log.csv", state["log"])
            save()
            tqdm.write(
                f"epoch {row['epoch']}/{args.epochs}  ELBO: train {row['train_elbo']:.2f}, test {row['test_elbo']:.2f} "
                f"= {row['test_reconstruction']:.2f} - {row['test_kl']:.2f} nats  {row['seconds']:.0f} s"
            )
        stop.here(save)

    last, floor = state["log"][-1], vae.entropy_floor(x_test)
    if args.hold_out:
        last = max(state["log"], key=lambda row: row["held_out_elbo"])
        tree.map(np.copyto, params, arrays["best"])
        print(f"kept the weights of best held-out ELBO, {last['held_out_elbo']:.2f}: row {last['epoch']} of log.csv")
    metrics = {name: last[f"test_{name}"] for name in ("elbo", "reconstruction", "kl")} | {"entropy_floor": floor}
    checkpoint.write_metrics(args, metrics, params, state)
    limit = "0, since pixels are 0 or 1" if args.binarize else f"{-floor:.2f}, the entropy of the grey pixels"
    print(
        f"test ELBO {metrics['elbo']:.2f} = {metrics['reconstruction']:.2f} - {metrics['kl']:.2f} nats per image; "
        f"no model gets above {limit}"
    )

    def images_from(z):
        return vae.generate(partial(decode, params), z)

    plots.save(plots.vae_loss(state["log"], None if args.binarize else floor), args.out / "loss.png")
    x = x_test[np.arange(40) % len(x_test)]
    mu, _ = encode(params, x)
    plots.save(plots.reconstructions(x, images_from(mu)), args.out / "reconstructions.png")
    plots.save(plots.interpolation(images_from, mu[:8], mu[8:16]), args.out / "interpolation.png")
    z = stream(SAMPLES).standard_normal((100, args.latent_dim), dtype=np.float32)
    plots.save(plots.grid(images_from(z), 10, "decoded from z ~ N(0, I)"), args.out / "samples.png")
    kl = in_parallel(lambda x: vae.kl_per_dimension(*encode(params, x)), SHARD, workers)(x_test).mean(axis=0)
    i, j = args.latents or sorted(np.argsort(kl)[-2:].tolist())
    plots.save(plots.plot_latents(images_from, args.latent_dim, i, j), args.out / f"latents_{i}_{j}.png")
    print(f"figures and numbers are in {args.out}")


if __name__ == "__main__":
    cli.run(main)
