"""Train the variational autoencoder of questions 4 and 5 on FashionMNIST, and
draw the figures of questions 5 and 6. A minute or two.
"""

import argparse
from functools import partial
from pathlib import Path

from scratchgen import plots, tree, vae
from scratchgen.data import DATA, load_fashion_mnist, minibatches, scale
from scratchgen.gradients import value_and_grad
from scratchgen.optim import adam_step, cosine_decay, init_moments

import numpy as np
from tqdm import tqdm

LATENT_DIM = 20
BATCH_SIZE = 128


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--epochs", type=int, default=10, help="passes over the training images")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate; it falls along a cosine to 0")
    parser.add_argument("--seed", type=int, default=0, help="decides every random number")
    parser.add_argument("--data", type=Path, default=DATA, help="folder with the four FashionMNIST files")
    parser.add_argument("--out", type=Path, default=Path("runs/vae"), help="folder for the figures")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)

    data = load_fashion_mnist(args.data)
    x_test = scale(data["test_images"], 0, 1)
    rng = np.random.default_rng(args.seed)
    eps_test = rng.standard_normal((len(x_test), LATENT_DIM), dtype=np.float32)
    params = vae.init_mlp_vae(rng, LATENT_DIM)
    moments = init_moments(params)
    print(f"{tree.size(params):,} parameters, {len(data['train_images']):,} training images")

    def loss(params, batch):
        return vae.negative_elbo(partial(vae.mlp_encode, params), partial(vae.mlp_decode, params), batch)

    steps_per_epoch = -(-len(data["train_images"]) // BATCH_SIZE)
    total_steps = args.epochs * steps_per_epoch
    step = 0
    log = {"train": [], "test": []}
    for epoch in range(1, args.epochs + 1):
        values = []
        for images in tqdm(
            minibatches(data["train_images"], BATCH_SIZE, rng), f"epoch {epoch}", steps_per_epoch, leave=False
        ):
            step += 1
            x = scale(images, 0, 1)
            eps = rng.standard_normal((len(x), LATENT_DIM), dtype=np.float32)
            value, _, gradient = value_and_grad(loss)(params, (x, eps))
            adam_step(params, gradient, moments, step, cosine_decay(step, total_steps, args.lr))
            values.append(float(value))

        encode, decode = partial(vae.mlp_encode, params), partial(vae.mlp_decode, params)
        parts = [vae.elbo_terms(encode, decode, (x_test[k::20], eps_test[k::20])) for k in range(20)]
        reconstruction, kl = (float(np.mean(np.concatenate(term))) for term in zip(*parts, strict=True))
        log["train"].append(-np.mean(values))
        log["test"].append(reconstruction - kl)
        print(f"epoch {epoch}: test ELBO {reconstruction - kl:.2f} = {reconstruction:.2f} - {kl:.2f} nats per image")

    generate = partial(vae.generate, decode)
    mu, log_var = encode(x_test[:1000])
    pairs = np.stack([x_test[:40].reshape(4, 10, 28, 28, 1), generate(mu[:40]).reshape(4, 10, 28, 28, 1)], axis=1)
    title = "test images, and beneath them decoded from their $\\mu$"
    z = rng.standard_normal((100, LATENT_DIM), dtype=np.float32)
    plots.curves(log, "ELBO, nats per image").savefig(args.out / "loss.png")
    plots.grid(pairs.reshape(80, 28, 28, 1), 10, title).savefig(args.out / "reconstructions.png")
    plots.grid(generate(z), 10, "decoded from $z \\sim N(0, I)$").savefig(args.out / "samples.png")
    print(f"the figures of question 5 are in {args.out}")

    i, j = np.sort(np.argsort(vae.kl_per_dimension(mu, log_var).mean(axis=0))[-2:]).tolist()  # the two that say most
    plots.plot_latents(generate, LATENT_DIM, i, j).savefig(args.out / f"latents_{i}_{j}.png")
    print(f"and so is that of question 6, latents_{i}_{j}.png")


if __name__ == "__main__":
    main()
