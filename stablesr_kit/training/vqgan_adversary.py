"""CodeFormer's discriminator beside the network it judges: batch-normalised, its weight adapted at every step."""

from dataclasses import dataclass

from torch import Tensor

from stablesr_kit.models.discriminators import VQGANDiscriminator
from stablesr_kit.training.losses import HINGE, adaptive_adversarial_weight
from stablesr_kit.training.network_files import load_network
from stablesr_kit.training.run import TrainingRun
from stablesr_kit.training.trained_network import judging


@dataclass(frozen=True, kw_only=True)
class VQGANAdversaryOptions:
    """Options of a program that trains against CodeFormer's discriminator."""

    adversarial_weight: float = 0.0
    """Weight of the adversarial loss once it pulls as hard as the reconstruction loss; 0: there is no discriminator."""
    discriminator_start: int = 0
    """Steps before the discriminator is trained and counts."""
    discriminator_channels: int = 64
    """Width of an untrained discriminator's first layer."""
    discriminator_layers: int = 4
    """How often an untrained discriminator halves the picture."""
    pretrained_discriminator: str | None = None
    """Folder of a discriminator to start from, that of stage I for stage III; None builds an untrained one."""


class VQGANAdversary:
    """A discriminator that is trained by the run with the options' own learning rate and betas."""

    def __init__(self, run: TrainingRun, options: VQGANAdversaryOptions) -> None:
        self.run = run
        self.options = options
        if options.pretrained_discriminator is None:
            discriminator = VQGANDiscriminator(
                base_channels=options.discriminator_channels, num_layers=options.discriminator_layers
            )
        else:
            discriminator = load_network(
                VQGANDiscriminator, options.pretrained_discriminator, "pretrained_discriminator"
            )
        self.discriminator = run.train(discriminator.train(), {"discriminator": ""}, is_clipped=False, average=False)

    def judge(
        self, fake: Tensor, real: Tensor, reconstruction: Tensor, last_layer: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted loss that the network which made `fake` adds to its own, and its terms for the record.

        fake, real: (B, 3, H, W) in [-1, 1]; reconstruction: the loss between them, whose gradient with respect to
        last_layer, a weight of that network, sets the adversarial loss's share. The gradients of the discriminator's
        own loss are taken here. Before discriminator_start the loss is zero and there are no terms.
        """
        run = self.run
        if run.step < self.options.discriminator_start:
            return fake.new_zeros(()), {}

        # the generator's loss: the discriminator is not trained by this
        with judging(self.discriminator, run.accelerator), run.accelerator.autocast():
            logits = self.discriminator(fake)
        adversarial = HINGE.generator(logits.float())
        weight = self.options.adversarial_weight * adaptive_adversarial_weight(reconstruction, adversarial, last_layer)

        # its own: photographs and fakes are normalised by the statistics of their own batch
        with run.accelerator.autocast():
            real_logits = self.discriminator(real)
        real_loss = HINGE.real(real_logits.float())
        run.backward(real_loss)
        with run.accelerator.autocast():
            fake_logits = self.discriminator(fake.detach())
        fake_loss = HINGE.fake(fake_logits.float())
        run.backward(fake_loss)
        terms = {"adversarial": adversarial, "adversarial_weight": weight, "discriminator": real_loss + fake_loss}
        return weight * adversarial, terms
