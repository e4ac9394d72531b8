"""The ARMED paper's autoencoder-classifier, with random effects on image and label."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from armed_pyro import Adversary, FilterScaleBias, MixedEffects, Reconstruction, Slopes

__all__ = ["AutoencoderClassifier", "autoencoder_program"]

# Filters after each of the encoder's convolutions; the decoder has them in reverse.
WIDTHS = (16, 32, 64)


class AutoencoderClassifier(nn.Module):
    r"""f(x) = c(e(x)), and the reconstructed image g(x) = d(e(x)).

    The encoder e has 4x4 convolutions of stride 2, each with batch normalisation and PReLU, and a
    linear layer to the latents. The decoder d mirrors it with transposed convolutions, each
    followed by instance normalisation and PReLU. Cluster effects may scale and shift the filters
    after the normalisation. The classifier c has one hidden layer on the latents.

    Module paths: ``"encoder.conv1"``, ... for `Adversary` taps; ``"latents"`` for `Slopes`;
    ``"decoder.norm1"``, ... for `FilterScaleBias`; ``"decoder"`` for `Reconstruction`.

    Parameters
    ----------
    image : sequence of int
        Channels, height and width of x. Height and width are multiples of 2^L for L convolutions.
    n_outputs : int
        Width of f(x): 1, or the number of classes.
    widths : sequence of int
        Filters of each of the encoder's convolutions.
    latents : int
        Dimensions of the latent space.
    units : int
        Width of the classifier's hidden layer.

    Raises
    ------
    ValueError
        If the image cannot be halved once for every convolution, or a width is not positive.

    Examples
    --------
    >>> net = AutoencoderClassifier((1, 16, 16), widths=(4, 8), latents=3)
    >>> [name for name, _ in net.named_children()]
    ['encoder', 'latents', 'classifier', 'decoder']

    References
    ----------
    Nguyen, Treacher, Montillo (2023), IEEE TPAMI 45(7), section 4.4.
    """

    def __init__(
        self,
        image: Sequence[int] = (1, 64, 64),
        n_outputs: int = 1,
        *,
        widths: Sequence[int] = WIDTHS,
        latents: int = 56,
        units: int = 32,
    ) -> None:
        super().__init__()
        if len(image) != 3 or min(image) < 1:
            raise ValueError(f"`image` is (channels, height, width), not {tuple(image)}")
        if not widths or min(*widths, latents, units) < 1:
            raise ValueError(
                "`widths` must be one or more positive numbers of filters, `latents` and `units` "
                f"positive, not {tuple(widths)}, {latents} and {units}"
            )
        channels, height, width = image
        halved = 2 ** len(widths)
        if height % halved or width % halved:
            raise ValueError(
                f"{len(widths)} convolutions of stride 2 halve the image as often: height and "
                f"width must be multiples of {halved}, not {height} and {width}; pad or crop the "
                "images, or use fewer convolutions"
            )
        small = (widths[-1], height // halved, width // halved)
        self.encoder = nn.Sequential()
        for number, filters in enumerate(widths, 1):
            convolution = nn.Conv2d(channels, filters, 4, stride=2, padding=1, bias=False)
            layers = [convolution, nn.BatchNorm2d(filters), nn.PReLU(filters)]
            self.encoder.add_module(f"conv{number}", nn.Sequential(*layers))
            channels = filters
        flat = small[0] * small[1] * small[2]
        self.latents = nn.Sequential(nn.Flatten(), nn.Linear(flat, latents))
        self.classifier = nn.Sequential(
            nn.Linear(latents, units), nn.PReLU(), nn.Linear(units, n_outputs)
        )
        self.decoder = nn.Sequential()
        self.decoder.add_module("spread", nn.Linear(latents, flat))
        self.decoder.add_module("shape", nn.Unflatten(1, small))
        for number, filters in enumerate([*reversed(widths[:-1]), image[0]], 1):
            last = number == len(widths)
            up = nn.ConvTranspose2d(channels, filters, 4, stride=2, padding=1)
            name = "image" if last else f"conv{number}"
            self.decoder.add_module(name, up)
            if not last:
                self.decoder.add_module(f"norm{number}", nn.InstanceNorm2d(filters))
                self.decoder.add_module(f"act{number}", nn.PReLU(filters))
            channels = filters

    def forward(self, x: Tensor) -> Tensor:
        """f(x); the reconstructed image is the output of the module ``"decoder"``."""
        z = self.latents(self.encoder(x))
        self.decoder(z)
        return self.classifier(z)


def autoencoder_program(
    factor: str,
    image: Sequence[int] = (1, 64, 64),
    n_outputs: int = 1,
    *,
    widths: Sequence[int] = WIDTHS,
    latents: int = 56,
    units: int = 32,
    image_weight: float | None = None,
    adversary_weight: float = 1.0,
    fixed_weight: float = 0.0,
) -> MixedEffects:
    r"""The paper's program: image and label, with random effects on decoder and classifier.

    .. math::
        \eta_i &= c(z_i) + u_{0k} + z_i^\top u_k, \quad z_i = e(x_i), \; k = g(i) \\
        x_i &\sim N(d_k(z_i), sd^2)

    Cluster k scales and shifts every filter of the decoder after its instance normalisation, to
    :math:`(1 + a_{kc}) h_c + b_{kc}`. The adversary taps the encoder's activations. Without
    effects, d and c are the fixed-effects decoder and classifier.

    Parameters
    ----------
    factor : str
        Grouping factor, such as ``"batch"``.
    image, n_outputs, widths, latents, units
        Sizes of the network; see `AutoencoderClassifier`.
    image_weight : float, optional
        Weight of the image's likelihood; by default 1 over the number of values of an image.
    adversary_weight : float
        lambda_A; 0 removes the adversary.
    fixed_weight : float
        lambda_F. Above 0, the network runs twice per step, with and without effects on filters.

    Examples
    --------
    >>> program = autoencoder_program("batch", (1, 8, 8), widths=(2, 2), latents=3)
    >>> [str(term) for term in program.terms][2:]
    ["FilterScaleBias('batch', at='decoder.norm1')"]
    """
    net = AutoencoderClassifier(image, n_outputs, widths=widths, latents=latents, units=units)
    values = image[0] * image[1] * image[2]
    taps = [f"encoder.{name}" for name, _ in net.encoder.named_children()]
    norms = [f"decoder.{name}" for name, _ in net.decoder.named_children() if "norm" in name]
    adversary = Adversary(factor, taps, weight=adversary_weight)
    return MixedEffects(
        net,
        [
            f"(1 | {factor})",
            Slopes(factor, on="latents"),
            *(FilterScaleBias(factor, at=path) for path in norms),
        ],
        "bernoulli" if n_outputs == 1 else "categorical",
        adversary if adversary_weight else (),
        fixed_weight=fixed_weight,
        others=Reconstruction("decoder", weight=image_weight or 1 / values),
    )
