"""A variational autoencoder (VAE) and a diffusion model (DDPM) of FashionMNIST on one page, each gradient by hand.

    python micro.py [FOLDER]        FOLDER, by default data, holds train-images-idx3-ubyte.gz

It trains both in two minutes and draws micro.png: 64 garments by the VAE, and below them 64 by the DDPM.

VAE: Kingma and Welling 2014 (arXiv:1312.6114). DDPM: Ho, Jain and Abbeel 2020 (arXiv:2006.11239). Numbers of equations
and algorithms are those of the DDPM paper. x is a matrix of images, N rows of 784 pixels. d_x is the derivative of the
loss with respect to x.
"""

import gzip
import struct
import sys
import zlib

import numpy as np

D = 20  # dimensions of z, the VAE's latent vector of an image
T = 200  # steps of the DDPM from image to noise
rng = np.random.default_rng(0)


# ------------------------------------------------------------------------------------------------- networks, and Adam
def init_mlp(*sizes):
    """Returns a list of layers (W, b). Var(W) = 2 / inputs keeps activations equally large in all layers."""
    params = []
    for inputs, outputs in zip(sizes[:-1], sizes[1:], strict=True):
        W = rng.standard_normal((inputs, outputs)) * np.sqrt(2 / inputs)
        params.append((W.astype(np.float32), np.zeros(outputs, np.float32)))
    return params


def mlp(params, x):
    """Returns the last y, and the x of each layer. A layer is y = x W + b; relu(y) is the x of the next layer."""
    xs = []
    for W, b in params:
        xs.append(x)
        y = x @ W + b
        x = np.maximum(y, 0)  # relu; after the last layer it is not used
    return y, xs


def mlp_backward(params, xs, d_y):
    """Returns the gradient, a list like params, and d_x, by the chain rule from the last layer to the first."""
    gradient = []
    for (W, _), x in zip(reversed(params), reversed(xs), strict=True):
        d_x, d_W, d_b = d_y @ W.T, x.T @ d_y, d_y.sum(axis=0)
        gradient.insert(0, (d_W, d_b))
        d_y = d_x * (x > 0)  # d_y of the layer before: this x is relu(y), with derivative 1 for y > 0, else 0
    return gradient, d_x


def adam_step(params, gradient, moments, step, lr):
    """Adam (Kingma and Ba 2015, Algorithm 1), in place. The first step is 1."""
    for layer, d_layer, layer_moments in zip(params, gradient, moments, strict=True):
        for p, g, (m, v) in zip(layer, d_layer, layer_moments, strict=True):
            m[:] = 0.9 * m + 0.1 * g
            v[:] = 0.999 * v + 0.001 * g**2
            m_hat, v_hat = m / (1 - 0.9**step), v / (1 - 0.999**step)
            p -= lr * m_hat / (np.sqrt(v_hat) + 1e-8)


# ------------------------------------ both models end in logits; sigmoid(logits) are the pixels of an image, in [0, 1]
def sigmoid(logits):
    return (1 + np.tanh(logits / 2)) / 2  # equals 1 / (1 + e^-logits), but cannot overflow


def cross_entropy(logits, x):
    """Returns -log p(x | logits) of Bernoulli pixels in nats, a sum over pixels, a mean over images; and d_logits."""
    softplus = np.maximum(logits, 0) + np.log1p(np.exp(-np.abs(logits)))  # log(1 + e^logits)
    loss = np.sum(softplus - x * logits) / len(x)  # a grey x is taken as the probability of white
    d_logits = (sigmoid(logits) - x) / len(x)
    return loss, d_logits


# --------------------------------------- VAE: prior p(z) = N(0, I), encoder q(z | x) = N(mu, sigma^2), decoder p(x | z)
def vae_loss(encoder, decoder, x, eps):
    """Returns -log p(x | z) for one z ~ q(z | x), KL(q(z | x) || p(z)), both in nats, and the gradient of their sum."""
    h, encoder_xs = mlp(encoder, x)
    mu, log_var = h[:, :D], h[:, D:]
    sigma = np.exp(log_var / 2)
    z = mu + sigma * eps  # eps ~ N(0, I). Reparameterisation: z ~ q(z | x), and gradients pass through z
    logits, decoder_xs = mlp(decoder, z)
    reconstruction, d_logits = cross_entropy(logits, x)
    kl = np.sum(mu**2 + sigma**2 - 1 - log_var) / 2 / len(x)  # summed over dimensions, averaged over images

    decoder_gradient, d_z = mlp_backward(decoder, decoder_xs, d_logits)
    d_mu = d_z + mu / len(x)  # the first term comes through z, the second from the KL
    d_log_var = d_z * sigma * eps / 2 + (sigma**2 - 1) / 2 / len(x)  # likewise
    encoder_gradient, _ = mlp_backward(encoder, encoder_xs, np.concatenate([d_mu, d_log_var], axis=1))
    return reconstruction, kl, encoder_gradient + decoder_gradient


# ------------------- DDPM: x_0 is an image, pixels in [-1, 1], x_T is noise; from here on z is noise and sigma its size
# The paper's betas are for T = 1000. With fewer steps each must be larger, or x_T would still show the image.
beta = np.append(0, np.linspace(1e-4, 0.02, T) * 1000 / T)  # beta[0] = 0, then beta_1 to beta_T
alpha = 1 - beta
alpha_bar = np.cumprod(alpha)  # falls from 1 at t = 0 to 0.00003 at t = T


def denoise(network, x_t, t):
    """Returns the logits of the predicted x_0, and the x of each layer; t is an array (N, 1)."""
    angles = t * 10_000 ** -np.linspace(0, 1, 32)  # the network sees t as 64 numbers, sines and cosines
    seen = np.concatenate([x_t, np.sin(angles), np.cos(angles)], axis=1)
    return mlp(network, seen.astype(network[0][0].dtype))  # float32, like W: twice as fast as float64


def ddpm_loss(network, x_0, t, eps):
    """Returns our loss and its gradient. The loss replaces that of Algorithm 1, line 5."""
    # The paper's network predicts eps. Ours predicts x_0, because 512 hidden units cannot hold 784 numbers of noise;
    # eps follows by Eq. (4). Squared error and cross-entropy have the same best prediction, E[x_0 | x_t].
    x_t = np.sqrt(alpha_bar[t]) * x_0 + np.sqrt(1 - alpha_bar[t]) * eps  # Eq. (4)
    logits, xs = denoise(network, x_t, t)
    loss, d_logits = cross_entropy(logits, (x_0 + 1) / 2)
    gradient, _ = mlp_backward(network, xs, d_logits)
    return loss, gradient


def p_sample(network, x_t, t, z):
    """Algorithm 2, line 4: draws x_{t-1} ~ q(x_{t-1} | x_t, x_0), Eq. (6), with the predicted x_0; t is a number."""
    logits, _ = denoise(network, x_t, np.full((len(x_t), 1), t))
    x_0 = 2 * sigmoid(logits) - 1
    eps = (x_t - np.sqrt(alpha_bar[t]) * x_0) / np.sqrt(1 - alpha_bar[t])  # Eq. (4), solved for eps
    sigma = np.sqrt(beta[t] * (1 - alpha_bar[t - 1]) / (1 - alpha_bar[t]))
    return (x_t - (1 - alpha[t]) / np.sqrt(1 - alpha_bar[t]) * eps) / np.sqrt(alpha[t]) + sigma * z


def sample(network, N):
    """Algorithm 2: draws N images. Without z, x_{t-1} would have less noise than in training, Eq. (4)."""
    x = rng.standard_normal((N, 784))  # line 1: x_T is pure noise, since alpha_bar[T] is almost 0
    for t in range(T, 0, -1):  # line 2
        z = rng.standard_normal((N, 784))  # line 3; at t = 1 the paper has z = 0, and here sigma is 0
        x = p_sample(network, x, t, z)  # line 4
    return x


# -------------------------------- data, training, the picture. For other images change 784, 28, read_idx, cross_entropy
def read_idx(path):
    with gzip.open(path) as file:
        ndim = file.read(4)[3]  # the fourth byte
        shape = struct.unpack(f">{ndim}I", file.read(4 * ndim))
        return np.frombuffer(file.read(), np.uint8).reshape(shape)


def save_png(path, grey):
    """Writes a PNG file: three chunks (header, pixels, end), each with its length, kind, data and checksum."""
    header = struct.pack(">IIBBBBB", grey.shape[1], grey.shape[0], 8, 0, 0, 0, 0)  # 8 bits, grey
    pixels = zlib.compress(np.insert(grey, 0, 0, axis=1).tobytes())  # a 0 before each row: no filter
    with open(path, "wb") as file:
        file.write(b"\x89PNG\r\n\x1a\n")
        for kind, data in [(b"IHDR", header), (b"IDAT", pixels), (b"IEND", b"")]:
            file.write(struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)))


def main(folder):
    np.empty(30_000_000, np.uint8)  # 1.4 times faster: after this, Linux keeps freed memory
    images = read_idx(f"{folder}/train-images-idx3-ubyte.gz").reshape(-1, 784).astype(np.float32) / 255

    encoder, decoder = init_mlp(784, 300, 300, 2 * D), init_mlp(D, 300, 300, 784)
    params = encoder + decoder  # one list of the same arrays
    moments = [[(0 * p, 0 * p) for p in layer] for layer in params]  # m and v begin as zeros
    for step in range(1, 3501):
        x = images[rng.integers(0, len(images), 128)]
        eps = rng.standard_normal((128, D), np.float32)
        reconstruction, kl, gradient = vae_loss(encoder, decoder, x, eps)
        adam_step(params, gradient, moments, step, lr=2e-3 * (1 - step / 3500))
        if step % 500 == 0:  # about once an epoch
            print(f"VAE, step {step} of 3500: -ELBO = {reconstruction:.1f} + {kl:.1f} nats for this minibatch")

    network = init_mlp(784 + 64, 512, 512, 512, 784)
    moments = [[(0 * p, 0 * p) for p in layer] for layer in network]
    for step in range(1, 4501):  # Algorithm 1, line 1
        x_0 = 2 * images[rng.integers(0, len(images), 256)] - 1  # line 2
        t = rng.integers(1, T + 1, (256, 1))  # line 3
        eps = rng.standard_normal((256, 784), np.float32)  # line 4
        loss, gradient = ddpm_loss(network, x_0, t, eps)  # line 5: the gradient, and the step
        adam_step(network, gradient, moments, step, lr=2e-3 * (1 - step / 4500))
        if step % 250 == 0:  # about once an epoch
            print(f"DDPM, step {step} of 4500: loss {loss:.1f} for this minibatch")

    logits, _ = mlp(decoder, rng.standard_normal((64, D), np.float32))  # images decoded from z ~ p(z)
    drawn = np.concatenate([sigmoid(logits), (sample(network, 64) + 1) / 2]).clip(0, 1)
    grid = drawn.reshape(8, 16, 28, 28).swapaxes(1, 2).reshape(8 * 28, 16 * 28)  # eight rows of sixteen images
    save_png("micro.png", (255 * grid).astype(np.uint8).repeat(2, axis=0).repeat(2, axis=1))  # twice as large
    print("wrote micro.png: 64 garments by the VAE, and below them 64 by the DDPM")
    return decoder, network


if __name__ == "__main__":
    try:
        main(sys.argv[1] if len(sys.argv) > 1 else "data")
    except (KeyboardInterrupt, OSError, EOFError, zlib.error) as error:
        sys.exit(f"micro.py: {type(error).__name__}: {error}")

# The package has more. gradients.py differentiates any network. layers.py has convolutions, which know which pixels are
# neighbours. improved.py predicts v, and guides samples. samplers.py takes 20 steps instead of 200. parallel.py uses
# all cores, with bit-identical results. run.py stops and resumes. evaluate/ measures the Frechet distance from samples
# to real images: 1.3 for the package's diffusion model, 12 for the one on this page.
